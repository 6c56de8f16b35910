"""Where a fit starts: bases from gradients, from ridge solutions, random."""

from typing import Literal

import jax
import jax.numpy as jnp

from recursive_weights.basis import fit as fit_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.basis.baselines import dual
from recursive_weights.basis.clusters import Clusters, check
from recursive_weights.basis.objective import Objective, einsum
from recursive_weights.basis.subspace import leading, orthonormalise
from recursive_weights.interfaces import Array, UserError

Choice = Literal['all', 'first', 'most', 'random']


def random(key: Array, rank: int, width: int, values: int) -> Array:
  """An orthonormal basis of a random span, `[R, D, V]`."""
  return orthonormalise(jax.random.normal(key, (rank, width, values)))


def from_ridge(
  clusters: Clusters, rank: int, key: Array, *, ridge: float = 1.0
) -> Array:
  """Leading right singular vectors of the members' ridge solutions.

  The best R-dimensional span for the stack of `W_i = argmin |qW - a|² +
  ridge |W|²`, `[R, D, V]`, by a randomised SVD without forming the stack.

  Raises:
    UserError: the rank does not fit, or ridge <= 0.
  """
  check(clusters, rank)
  if ridge <= 0:
    raise UserError(f'ridge must be > 0, got {ridge}')
  q_ETD, z_ETV = dual(clusters, ridge)
  return leading(q_ETD, z_ETV, rank, key)


def from_stronger_ridge(
  clusters: Clusters, basis_RDV: Array, *, ridge: float = 1.0, steps: int = 100
) -> Array:
  """The basis that least squares with a stronger ridge leads to from another.

  Where questions hardly suffice the fit has minima that interpolate. A ridge
  takes them away, and its own minimum lies in the valley of the right one.

  Args:
    basis_RDV: where to start, say `from_ridge`.
    ridge: in units of questions.
    steps: of `fit.step`, fewer where it is stationary to 1e-4.
  """
  fit = fit_lib.make(objective_lib.make(ridge=ridge))
  state = fit.init(clusters, basis_RDV)
  state, _ = fit_lib.run(fit, clusters, state, steps=steps, tolerance=1e-4)
  return state.basis_RDV


def from_gradients(
  objective: Objective,
  clusters: Clusters,
  rank: int,
  key: Array,
  *,
  ridge: float | None = None,
  choice: Choice = 'all',
) -> Array:
  """Directions of the members' gradients `∇_{W_i} L`, `[R, D, V]`.

  Args:
    ridge: gradients are taken at the members' own ridge solutions; None for
      `W_i = 0`, where they are `-2 qᵀ a`. As proposed they are taken at the
      pseudo-inverse, ridge = 0: there the squared error's gradient vanishes,
      and the basis is rounding (`gradient_norm` tells).
    choice: of the clusters. 'all': leading singular vectors of all gradients;
      else orthonormal gradients of R clusters: the 'first', those with the
      'most' questions, or 'random' ones.

  Raises:
    UserError: the rank does not fit, or ridge < 0, or an unknown choice.
  """
  check(clusters, rank)
  if choice not in ('all', 'first', 'most', 'random'):
    raise UserError(
      f'choice must be one of all, first, most, random, got {choice!r}'
    )
  q_ETD, z_ETV = _gradients(objective, clusters, ridge)
  if choice == 'all':
    return leading(q_ETD, z_ETV, rank, key)
  size = q_ETD.shape[0]
  pick_R = jnp.arange(rank)
  if choice == 'most':
    count_E = jnp.sum(clusters.weight_ET > 0, -1)
    pick_R = jax.lax.top_k(count_E, rank)[1]
  if choice == 'random':
    pick_R = jax.random.permutation(key, size)[:rank]
  chosen_RDV = einsum('rtd,rtv->rdv', q_ETD[pick_R], z_ETV[pick_R])
  return orthonormalise(chosen_RDV)


def gradient_norm(
  objective: Objective, clusters: Clusters, *, ridge: float | None = None
) -> Array:
  """`|∇_{W_i} L|_F` of each member there, as a share of that at W_i = 0."""

  def norm_E(q_ETD, z_ETV):
    gradient_EDV = einsum('etd,etv->edv', q_ETD, z_ETV)
    return jnp.sqrt(jnp.sum(gradient_EDV**2, (1, 2)))

  square = objective._replace(cosine=0.0)
  unit_E = norm_E(*_gradients(square, clusters, None))
  found_E = norm_E(*_gradients(objective, clusters, ridge))
  return found_E / jnp.maximum(unit_E, 1e-20)


def _gradients(objective, clusters, ridge):
  """`(q, z)` with `∇_{W_i} L = qᵀ z`, in units of one question."""
  p_ETV = jnp.zeros_like(clusters.a_ETV)
  if ridge is not None:
    if ridge < 0:
      raise UserError(f'ridge must be >= 0, got {ridge}')
    q_ETD, z_ETV = dual(clusters, ridge)
    inner_ETT = einsum('etd,esd->ets', clusters.q_ETD, q_ETD)
    p_ETV = einsum('ets,esv->etv', inner_ETT, z_ETV)

  def data(p_ETV):
    row_ET = objective_lib.rows(objective, p_ETV, clusters.a_ETV)
    return jnp.sum(clusters.weight_ET * row_ET)

  return clusters.q_ETD, jax.grad(data)(p_ETV)
