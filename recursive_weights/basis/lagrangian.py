"""Where a fit is stationary: the Lagrangian of a basis with constraints."""

from typing import NamedTuple

import jax.numpy as jnp

from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import (
  Objective,
  answer_slope,
  einsum,
  gradients,
  predict,
  scale,
  total_weight,
)
from recursive_weights.basis.subspace import inner
from recursive_weights.interfaces import Array


class Multipliers(NamedTuple):
  """Of the Lagrangian, for the constraints on a basis; see `multipliers`."""

  basis_RR: Array
  tangent_ER: Array
  tangent_RDV: Array


def multipliers(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
  *,
  orthonormal: bool = True,
  slopes: tuple[Array, Array] | None = None,
) -> Multipliers:
  """Stationarity of the Lagrangian of a basis with constraints.

    ℒ = L + Σ_i <M_i, W_i - Σ_k c_ik G_k> + Σ_k ν_k (|G_k|² - 1)
          + Σ_{j<k} ρ_jk <G_j, G_k>

  `M_i = -∇_{W_i} L` (see `weight_multipliers`) eliminates the W_i, and leaves

    c_ik: <∇_{W_i} L, G_k> + ∂(sparsity) = 0           `tangent_ER`
    G_k:  ∂L/∂G_k + 2 ν_k G_k + Σ_j ρ_jk G_j = 0       `tangent_RDV`

  with ν on half the diagonal of `basis_RR` and ρ off it: the least squares
  choice `-sym <∂L/∂G_j, G_k>`. The first line is all that the proposal tests;
  it holds after every solve for coefficients, at any basis. Without sparsity
  the constraints choose among equals, and ν = ρ = 0 where the first line holds.

  Args:
    orthonormal: bases are orthogonal, not only of norm 1.
    slopes: `gradients` of the objective there; None to find them.
  """
  c_ER = coefficients_ER
  if slopes is None:
    slopes = gradients(objective, clusters, c_ER, basis_RDV)
  tangent_ER, gradient_RDV = slopes
  limit = objective.sparsity / total_weight(clusters)
  # At 0 the absolute value takes up any slope within its own.
  idle_ER = jnp.sign(tangent_ER) * jnp.maximum(jnp.abs(tangent_ER) - limit, 0)
  tangent_ER = jnp.where(
    c_ER == 0, idle_ER, tangent_ER + limit * jnp.sign(c_ER)
  )
  cross_RR = inner(gradient_RDV, basis_RDV)
  basis_RR = -(cross_RR + cross_RR.T) / 2
  if not orthonormal:
    basis_RR = jnp.diag(jnp.diagonal(basis_RR))
  tangent_RDV = gradient_RDV + einsum('rs,sdv->rdv', basis_RR, basis_RDV)
  return Multipliers(basis_RR, tangent_ER, tangent_RDV)


def weight_multipliers(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """`M_i = -∇_{W_i} L`, `[E, D, V]`: as large as all members' weights."""
  c_ER = coefficients_ER
  slope_ETV = slope(objective, clusters, c_ER, basis_RDV)
  pull_ER = 2 * objective.ridge * c_ER
  if objective.graph_EE is not None:
    coupled_ER = einsum('ef,fr->er', objective.graph_EE, c_ER)
    pull_ER += 4 * objective.similarity * coupled_ER
  gradient_EDV = einsum('etd,etv->edv', clusters.q_ETD, slope_ETV)
  gradient_EDV += einsum('er,rdv->edv', pull_ER, basis_RDV)
  return -gradient_EDV / total_weight(clusters)


def slope(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """Derivative of the data's terms by what is predicted, `[E, T, V]`."""
  p_ETV = predict(clusters.q_ETD, coefficients_ER, basis_RDV)
  return answer_slope(objective, clusters, p_ETV)


def tangent(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  found: Multipliers,
) -> Array:
  """Largest norm of the tangent gradients, in units of the objective."""
  unit = scale(objective, clusters)
  norm = jnp.sqrt(jnp.sum(coefficients_ER**2))
  by_coefficient = norm * jnp.sqrt(jnp.sum(found.tangent_ER**2))
  by_basis = jnp.sqrt(jnp.sum(found.tangent_RDV**2))
  return jnp.maximum(by_coefficient, by_basis) / unit
