"""Which member's weight a new question meets: it does not say its cluster.

Either every answer is judged by its own member's weight, or the question goes
through a mixture of weights, by how near it is to each cluster, and all answers
are compared with the one result. Each returns scores `[B, E]`, larger better.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import einsum
from recursive_weights.interfaces import Array, UserError

_TINY = 1e-9
JUDGED = ('dot', 'cosine', 'distance')


def unit(x: Array) -> Array:
  """`x / |x|` over the last axis; 0 stays 0."""
  norm = jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
  return x / jnp.maximum(norm, _TINY)


def centroids(clusters: Clusters, a_EV: Array) -> Array:
  """Mean question of each member, `[E, D]`; its answer where it has none."""
  weight_E1 = clusters.weight_ET.sum(-1)[:, None]
  total_ED = einsum('et,etd->ed', clusters.weight_ET, clusters.q_ETD)
  mean_ED = total_ED / jnp.maximum(weight_E1, _TINY)
  if mean_ED.shape != a_EV.shape:
    return mean_ED
  return jnp.where(weight_E1 > 0, mean_ED, a_EV)


def shares(q_BD: Array, centroid_ED: Array, temperature: float) -> Array:
  """`softmax_i(cos(q, c_i) / τ)`, `[B, E]`.

  Source: UnifyWeaver, with τ = 0.1; τ → 0 takes the nearest cluster alone.

  Raises:
    UserError: temperature <= 0.
  """
  if temperature <= 0:
    raise UserError(f'temperature must be > 0, got {temperature}')
  cosine_BE = einsum('bd,ed->be', unit(q_BD), unit(centroid_ED))
  return jax.nn.softmax(cosine_BE / temperature)


def multi_head(
  q_BD: Array, a_EV: Array, centroid_ED: Array, temperature: float
) -> Array:
  """`cos(Σ_i p_i a_i, a_j)` with p from `shares`: answers alone, no weights.

  Source: UnifyWeaver, multi-head projection.
  """
  mixed_BV = einsum('be,ev->bv', shares(q_BD, centroid_ED, temperature), a_EV)
  return einsum('bv,ev->be', unit(mixed_BV), unit(a_EV))


def scores(
  q_BD: Array,
  w_EDV: Array,
  a_EV: Array,
  centroid_ED: Array,
  *,
  temperatures: Sequence[float] = (0.05, 0.1, 0.2),
) -> dict[str, Array]:
  """Scores of all answers by every rule, `{rule: [B, E]}`.

    dot       q W_j · a_j
    cosine    cos(q W_j, a_j)
    distance  -|q W_j - a_j|²
    routed@τ  cos(Σ_i p_i q W_i, a_j),  p from `shares`

  The first three ask each answer's own weight; a weight that sends everything
  to its own answer wins by `cosine` whatever is asked. One pass over members,
  time `B E D V`.
  """
  share_SBE = [shares(q_BD, centroid_ED, t) for t in temperatures]
  stacked_ESB = jnp.moveaxis(
    jnp.stack(share_SBE)
    if share_SBE
    else jnp.zeros((0, q_BD.shape[0], a_EV.shape[0])),
    2,
    0,
  )

  def body(mixed_SBV, member):
    w_DV, a_V, share_SB = member
    p_BV = einsum('bd,dv->bv', q_BD, w_DV)
    mixed_SBV += share_SB[..., None] * p_BV[None]
    return mixed_SBV, (einsum('bv,v->b', p_BV, a_V), jnp.sum(p_BV**2, -1))

  start_SBV = jnp.zeros((len(temperatures), q_BD.shape[0], a_EV.shape[1]))
  mixed_SBV, (dot_EB, square_EB) = jax.lax.scan(
    body, start_SBV, (w_EDV, a_EV, stacked_ESB)
  )
  found = _judged(dot_EB.T, square_EB.T, a_EV)
  for t, mixed_BV in zip(temperatures, mixed_SBV, strict=True):
    found[f'routed@{t}'] = einsum('bv,ev->be', unit(mixed_BV), unit(a_EV))
  return found


def basis_scores(
  q_BD: Array,
  coefficients_ER: Array,
  basis_RDV: Array,
  a_EV: Array,
  *,
  identity: bool = True,
) -> dict[str, Array]:
  """`scores` of `W_i = [I +] Σ_k c_ik G_k` that ask each answer's own weight.

  No W_i is formed: time `B R (D V + E V + E R)` in place of `B E D V`.
  """
  c_ER = coefficients_ER
  seen_BRV = einsum('bd,rdv->brv', q_BD, basis_RDV)
  onto_BRE = einsum('brv,ev->bre', seen_BRV, a_EV)
  dot_BE = einsum('bre,er->be', onto_BRE, c_ER)
  gram_BRS = einsum('brv,bsv->brs', seen_BRV, seen_BRV)
  pair_ERS = einsum('er,es->ers', c_ER, c_ER)
  square_BE = einsum('brs,ers->be', gram_BRS, pair_ERS)
  if identity:
    dot_BE += einsum('bd,ed->be', q_BD, a_EV)
    along_BR = einsum('brv,bv->br', seen_BRV, q_BD)
    square_BE += 2 * einsum('br,er->be', along_BR, c_ER)
    square_BE += jnp.sum(q_BD**2, -1)[:, None]
  return _judged(dot_BE, square_BE, a_EV)


def pair_scores(
  q_BD: Array, a_BV: Array, coefficients_ER: Array, basis_RDV: Array
) -> Array:
  """`-|q Σ_k c_ik G_k - a|²` of every member i for pairs (q, a), `[B, E]`."""
  c_ER = coefficients_ER
  seen_BRV = einsum('bd,rdv->brv', q_BD, basis_RDV)
  dot_BE = einsum('brv,bv,er->be', seen_BRV, a_BV, c_ER)
  gram_BRS = einsum('brv,bsv->brs', seen_BRV, seen_BRV)
  square_BE = einsum('brs,er,es->be', gram_BRS, c_ER, c_ER)
  return 2 * dot_BE - square_BE - jnp.sum(a_BV**2, -1)[:, None]


def _judged(dot_BE, square_BE, a_EV):
  size_E = jnp.sqrt(jnp.sum(a_EV**2, -1))
  # Rounding may leave a square below 0, and a root has no slope at 0.
  length_BE = jnp.sqrt(jnp.maximum(square_BE, _TINY**2)) * size_E[None]
  return {
    'dot': dot_BE,
    'cosine': dot_BE / jnp.maximum(length_BE, _TINY),
    'distance': 2 * dot_BE - square_BE - size_E[None] ** 2,
  }


def extend(
  w_EDV: Array, clusters: Clusters, a_EV: Array, temperature: float
) -> Array:
  """Weights of members without questions: means over similar answers.

    W_i = Σ_j p_ij W_j,  p_i = softmax_j(cos(a_i, a_j) / τ),  j with questions

  Raises:
    UserError: temperature <= 0.
  """
  if temperature <= 0:
    raise UserError(f'temperature must be > 0, got {temperature}')
  has_E = jnp.any(clusters.weight_ET > 0, -1)
  cosine_EE = einsum('ev,fv->ef', unit(a_EV), unit(a_EV))
  share_EE = jax.nn.softmax(
    jnp.where(has_E[None], cosine_EE / temperature, -jnp.inf)
  )
  mixed_EDV = einsum('ef,fdv->edv', share_EE, w_EDV)
  return jnp.where(has_E[:, None, None], w_EDV, mixed_EDV)
