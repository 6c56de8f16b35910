"""Bases of low rank, `G_k = U_k V_k`: fewer numbers, cheaper products."""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from recursive_weights.basis import solve
from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import Objective, einsum, value
from recursive_weights.interfaces import Array, UserError


class Factors(NamedTuple):
  """Coefficients and factors: `E R + R C (D + V)` numbers, C the inner rank."""

  coefficients_ER: Array
  left_RDC: Array
  right_RCV: Array


def truncate(
  coefficients_ER: Array, basis_RDV: Array, inner_rank: int
) -> Factors:
  """The nearest factors of that rank, basis by basis (Eckart and Young).

  Raises:
    UserError: the rank is not in 1 .. min(D, V).
  """
  limit = min(basis_RDV.shape[1:])
  if not 0 < inner_rank <= limit:
    raise UserError(f'inner_rank must be in 1 .. {limit}, got {inner_rank}')
  u_RDC, s_RC, v_RCV = jnp.linalg.svd(basis_RDV, full_matrices=False)
  # The size goes to both factors alike, so that their gradients are alike.
  root_RC = jnp.sqrt(s_RC[:, :inner_rank])
  return Factors(
    coefficients_ER,
    u_RDC[..., :inner_rank] * root_RC[:, None, :],
    v_RCV[:, :inner_rank] * root_RC[..., None],
  )


def basis(factors: Factors) -> Array:
  """`G_k = U_k V_k`, `[R, D, V]`."""
  return einsum('rdc,rcv->rdv', factors.left_RDC, factors.right_RCV)


def predict(q_ETD: Array, factors: Factors) -> Array:
  """`q Σ_k c_ik U_k V_k`, time `E T R C (D + V)`, `[E, T, V]`."""
  c_ER, left_RDC, right_RCV = factors
  inner_ETRC = einsum('etd,rdc->etrc', q_ETD, left_RDC)
  return einsum('er,etrc,rcv->etv', c_ER, inner_ETRC, right_RCV)


def fit(
  objective: Objective, clusters: Clusters, start: Factors, *, steps: int = 50
) -> Factors:
  """All of the factors at once, by L-BFGS on `objective.value`.

  Raises:
    UserError: the objective has a term of sparsity, which has no gradient.
  """
  if objective.sparsity:
    raise UserError(f'sparsity must be 0 here, got {objective.sparsity}')
  # The objective's numbers choose terms, so they are not traced.
  loss = functools.partial(_loss, objective)
  return solve.minimise(loss, start, (clusters,), steps)


def _loss(objective, factors, clusters):
  return value(objective, clusters, factors.coefficients_ER, basis(factors))
