"""What a basis and its coefficients are judged by."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.basis.clusters import Clusters, by_block
from recursive_weights.interfaces import Array, UserError

# Accelerators multiply float32 in fewer bits unless told otherwise, and the
# solvers divide by small eigenvalues.
einsum = functools.partial(jnp.einsum, precision='highest')
_EPSILON = 1e-6


class Objective(NamedTuple):
  """Weights of the terms; see `value`. `graph_EE` is the answers' Laplacian."""

  cosine: float = 0.0
  ridge: float = 0.0
  sparsity: float = 0.0
  similarity: float = 0.0
  graph_EE: Array | None = None


def make(
  *,
  cosine: float = 0.0,
  ridge: float = 1e-4,
  sparsity: float = 0.0,
  similarity: float = 0.0,
  similarity_EE: Array | None = None,
) -> Objective:
  """The objective of these weights; `value` has the formula.

  Args:
    cosine: λ in [0, 1], share of the angle against the squared error. At 1
      nothing holds the length of an answer: any penalty shrinks it to 0.
    ridge: of the members' weights, in units of questions.
    sparsity: of the absolute coefficients.
    similarity: pulls weights of members with similar answers together.
    similarity_EE: `S_ij >= 0`, symmetric; needed where `similarity` > 0.

  Raises:
    UserError: a weight out of range, or `similarity_EE` missing or not one.
  """
  if not 0 <= cosine <= 1:
    raise UserError(f'cosine must be in [0, 1], got {cosine}')
  for name, x in (
    ('ridge', ridge),
    ('sparsity', sparsity),
    ('similarity', similarity),
  ):
    if not 0 <= x < math.inf:
      raise UserError(f'{name} must be >= 0 and finite, got {x}')
  if not similarity:
    return Objective(cosine, ridge, sparsity)
  if similarity_EE is None:
    raise UserError(
      f'similarity_EE must be given where similarity is {similarity}'
    )
  return Objective(
    cosine, ridge, sparsity, similarity, laplacian(similarity_EE)
  )


def laplacian(similarity_EE: Array) -> Array:
  """`L = diag(Σ_j S_ij) - S`, so `Σ_ij S_ij |x_i - x_j|² = 2 tr xᵀ L x`.

  Raises:
    UserError: S is not square, or, where it is not traced, has a number that is
      negative or not finite.
  """
  s_EE = jnp.asarray(similarity_EE, jnp.float32)
  if s_EE.ndim != 2 or s_EE.shape[0] != s_EE.shape[1]:
    raise UserError(f'similarity_EE must be square, got {s_EE.shape}')
  if not isinstance(s_EE, jax.core.Tracer):
    seen_EE = np.asarray(s_EE)
    bad_EE = ~(np.isfinite(seen_EE) & (seen_EE >= 0))
    if bad_EE.any():
      raise UserError(
        f'similarity_EE must be >= 0 and finite, got {seen_EE[bad_EE][0]}'
      )
  s_EE = (s_EE + s_EE.T) / 2
  return jnp.diag(s_EE.sum(1)) - s_EE


def answer_similarity(clusters: Clusters) -> Array:
  """`S_ij = max(0, cos(ā_i, ā_j))` of the members' mean answers, 0 on i = j."""
  mean_EV = einsum('et,etv->ev', clusters.weight_ET, clusters.a_ETV)
  unit_EV = mean_EV / jnp.maximum(_norm(mean_EV)[:, None], _EPSILON)
  s_EE = jnp.maximum(einsum('ev,fv->ef', unit_EV, unit_EV), 0.0)
  return s_EE * (1 - jnp.eye(s_EE.shape[0]))


def weights(coefficients_ER: Array, basis_RDV: Array) -> Array:
  """`W_i = Σ_k c_ik G_k`, `[E, D, V]`: large; predictions do not need it."""
  return einsum('er,rdv->edv', coefficients_ER, basis_RDV)


def predict(q_ETD: Array, coefficients_ER: Array, basis_RDV: Array) -> Array:
  """`q W_i`, `[E, T, V]`, without the members' weights in memory."""

  def some(c_ER, q_ETD):
    mixed_ETRD = einsum('er,etd->etrd', c_ER, q_ETD)
    return einsum('etrd,rdv->etv', mixed_ETRD, basis_RDV)

  each = basis_RDV.shape[0] * q_ETD.shape[1] * q_ETD.shape[2]
  return by_block(some, each, coefficients_ER, q_ETD)


def cosine(p: Array, a: Array) -> Array:
  """`p · a / (|p| |a|)` over the last axis; 0 where one of them is 0."""
  scale = jnp.maximum(_norm(p), _EPSILON) * jnp.maximum(_norm(a), _EPSILON)
  return jnp.sum(p * a, -1) / scale


def rows(objective: Objective, p_ETV: Array, a_ETV: Array) -> Array:
  """`(1 - λ) |p - a|² + λ (1 - cos(p, a))` of each row, `[E, T]`."""
  share = objective.cosine
  total = jnp.zeros(())
  if share < 1:
    total = (1 - share) * jnp.sum((p_ETV - a_ETV) ** 2, -1)
  if share > 0:
    total = total + share * (1 - cosine(p_ETV, a_ETV))
  return total


def smooth(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """`value` without the term of sparsity: what autodiff differentiates."""
  p_ETV = predict(clusters.q_ETD, coefficients_ER, basis_RDV)
  gram_RR = einsum('rdv,sdv->rs', basis_RDV, basis_RDV)
  free = objective._replace(sparsity=0.0)
  return value_at(free, clusters, p_ETV, coefficients_ER, gram_RR)


def value(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """The objective, a scalar.

    L = [Σ_it w_it ((1 - λ) |q W_i - a|² + λ (1 - cos(q W_i, a)))
         + ridge Σ_i |W_i|²_F + similarity Σ_ij S_ij |W_i - W_j|²_F
         + sparsity Σ_ik |c_ik|] / Σ_it w_it

  All terms but the last depend on the W_i alone, so no change of basis within
  the span changes them. The squared error sums over the V entries of a row and
  the cosine is a row's own, so neither depends on the size of a cluster.

  Source: UnifyWeaver, Smoothing Basis, 2025, whose code took the mean of the
  square over V in the loss but not in the gradient, and one norm for all rows.
  """
  p_ETV = predict(clusters.q_ETD, coefficients_ER, basis_RDV)
  gram_RR = einsum('rdv,sdv->rs', basis_RDV, basis_RDV)
  return value_at(objective, clusters, p_ETV, coefficients_ER, gram_RR)


def value_at(
  objective: Objective,
  clusters: Clusters,
  p_ETV: Array,
  coefficients_ER: Array,
  gram_RR: Array,
) -> Array:
  """`value` where predictions and the bases' inner products are known."""
  found = jnp.sum(clusters.weight_ET * rows(objective, p_ETV, clusters.a_ETV))
  found += jnp.sum(coupling(objective, coefficients_ER) * gram_RR)
  if objective.sparsity:
    found += objective.sparsity * jnp.sum(jnp.abs(coefficients_ER))
  return found / total_weight(clusters)


def coupling(objective: Objective, coefficients_ER: Array) -> Array:
  """`Cᵀ (ridge I + 2 similarity L) C`: the penalty is `<this, Gram(G)>`."""
  c_ER = coefficients_ER
  total_RR = objective.ridge * einsum('er,es->rs', c_ER, c_ER)
  if objective.graph_EE is not None:
    total_RR += (
      2
      * objective.similarity
      * einsum('er,ef,fs->rs', c_ER, objective.graph_EE, c_ER)
    )
  return total_RR


def scale(objective: Objective, clusters: Clusters) -> Array:
  """The objective of predicting nothing: the unit of its gradients."""
  nothing_ET = rows(objective, jnp.zeros_like(clusters.a_ETV), clusters.a_ETV)
  return jnp.sum(clusters.weight_ET * nothing_ET) / total_weight(clusters)


# `(objective, clusters, coefficients_ER, basis_RDV) -> (∂L/∂C, ∂L/∂G)`.
gradients = jax.grad(smooth, argnums=(2, 3))


def answer_slope(
  objective: Objective, clusters: Clusters, p_ETV: Array
) -> Array:
  """Derivative of the data's terms by what is predicted, `[E, T, V]`."""

  def data(p_ETV):
    return jnp.sum(clusters.weight_ET * rows(objective, p_ETV, clusters.a_ETV))

  return jax.grad(data)(p_ETV)


def basis_slope(
  objective: Objective,
  clusters: Clusters,
  p_ETV: Array,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """`∂L/∂G` of `smooth` where predictions are known, `[R, D, V]`."""
  c_ER = coefficients_ER
  back = jax.linear_transpose(
    lambda g_RDV: predict(clusters.q_ETD, c_ER, g_RDV), basis_RDV
  )
  (data_RDV,) = back(answer_slope(objective, clusters, p_ETV))
  pull_RDV = 2 * einsum('rs,sdv->rdv', coupling(objective, c_ER), basis_RDV)
  return (data_RDV + pull_RDV) / total_weight(clusters)


def total_weight(clusters: Clusters) -> Array:
  """Σ w, the number of questions where weights are 1."""
  return jnp.maximum(jnp.sum(clusters.weight_ET), _EPSILON)


def _norm(x):
  square = jnp.sum(x * x, -1)
  # The derivative of a root is infinite at 0, and `0 · inf` is NaN.
  return jnp.where(
    square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0
  )
