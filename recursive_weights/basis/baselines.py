"""What a basis is compared with: the same clusters, other members' weights.

Each returns `w_EDV`, so a member predicts `q W_i` as with a basis.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.sparse.linalg import cg

from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import (
  Objective,
  einsum,
  laplacian,
  rows,
)
from recursive_weights.interfaces import Array, UserError

Kernel = Literal['gaussian', 'laplacian', 'matern32', 'matern52']
_TINY = 1e-9


def identity(clusters: Clusters) -> Array:
  """`W_i = I`: no training, the answer nearest to the question itself.

  Raises:
    UserError: questions and answers differ in size.
  """
  width, values = clusters.q_ETD.shape[-1], clusters.a_ETV.shape[-1]
  if width != values:
    raise UserError(
      f'the identity needs answers of the size of questions, {width}, got '
      f'{values}'
    )
  return _repeat(clusters, jnp.eye(width))


def shared(clusters: Clusters, *, ridge: float = 1e-4) -> Array:
  """`W = (Σ w qᵀq + ridge I)^-1 Σ w qᵀa`, one for all members. D² weights.

  Raises:
    UserError: ridge <= 0.
  """
  _positive(ridge=ridge)
  q_ETD, a_ETV, weight_ET = clusters
  gram_DD = einsum('etd,et,etf->df', q_ETD, weight_ET, q_ETD)
  cross_DV = einsum('etd,et,etv->dv', q_ETD, weight_ET, a_ETV)
  system = gram_DD + ridge * jnp.eye(gram_DD.shape[0])
  return _repeat(clusters, cho_solve(cho_factor(system), cross_DV))


def independent(clusters: Clusters, *, ridge: float = 0.0) -> Array:
  """`W_i = argmin Σ_t w |q W - a|² + ridge |W|²`, each member for itself.

  `ridge = 0` is the pseudo-inverse: of all solutions, that of least norm.
  E D² weights.

  Raises:
    UserError: ridge < 0.
  """
  q_ETD, z_ETV = dual(clusters, ridge)
  return einsum('etd,etv->edv', q_ETD, z_ETV)


def dual(clusters: Clusters, ridge: float) -> tuple[Array, Array]:
  """`(q, z)` with `qᵀ z` the members' ridge solutions: `E T (D + V)` numbers.

  By the T x T system `(√w q qᵀ √w + ridge I)`, cheap where questions are few;
  its eigenvalues below 1e-6 of the largest count as 0 where ridge is 0.

  Raises:
    UserError: ridge < 0.
  """
  if not ridge >= 0:
    raise UserError(f'ridge must be >= 0, got {ridge}')
  root_ET = jnp.sqrt(clusters.weight_ET)
  x_ETD = root_ET[..., None] * clusters.q_ETD
  y_ETV = root_ET[..., None] * clusters.a_ETV
  value_ET, vector_ETT = jnp.linalg.eigh(einsum('etd,esd->ets', x_ETD, x_ETD))
  value_ET = jnp.maximum(value_ET, 0)
  keep_ET = value_ET > 1e-6 * value_ET[:, -1:]
  inverse_ET = 1 / jnp.where(keep_ET, value_ET + ridge, 1)
  inverse_ET = jnp.where(keep_ET, inverse_ET, 0)
  z_ETV = einsum(
    'ets,es,eus,euv->etv', vector_ETT, inverse_ET, vector_ETT, y_ETV
  )
  # A row's weight is in z once more, so that rows of weight 0 add nothing.
  return clusters.q_ETD, root_ET[..., None] * z_ETV


def procrustes(clusters: Clusters) -> Array:
  """The least turn of a member's mean question onto its mean answer.

    W = s (I + K + K² / (1 + u·v)),  K = uᵀv - vᵀu,  s = |ā| / |q̄|

  with u, v the directions of q̄, ā: a rotation in their plane, the identity
  across it. Opposite directions have no least turn: `u W = s v` may fail.

  Source: UnifyWeaver, minimal transform.

  Raises:
    UserError: questions and answers differ in size.
  """
  eye_EDD = identity(clusters)
  q_ED, q_E = _direction(_mean(clusters, clusters.q_ETD))
  a_ED, a_E = _direction(_mean(clusters, clusters.a_ETV))
  turn_EDF = einsum('ed,ef->edf', q_ED, a_ED) - einsum('ed,ef->edf', a_ED, q_ED)
  align_E = jnp.sum(q_ED * a_ED, -1)
  share_E = 1 / jnp.maximum(1 + align_E, 1e-6)
  twice_EDF = einsum('edf,efg->edg', turn_EDF, turn_EDF)
  w_EDV = eye_EDD + turn_EDF + share_E[:, None, None] * twice_EDF
  return (a_E / jnp.maximum(q_E, _TINY))[:, None, None] * w_EDV


def graph_laplacian(
  clusters: Clusters,
  similarity_EE: Array,
  *,
  strength: float = 0.1,
  ridge: float = 1e-4,
) -> Array:
  """Members coupled by a graph, with no basis.

    min Σ_it w |q W_i - a|² + strength Σ_ij S_ij |W_i - W_j|² / 2 + ridge |W|²

  = `+ strength tr Wᵀ L W`. By the system of the N = E T questions,

    W_i = Σ_j M_ij Σ_t q_jtᵀ z_jt,  M = (ridge I + strength L)^-1,
    (M_i(n)i(m) q_n · q_m + I) z = a,

  which is never formed: conjugate gradients to a residual of 1e-6 of the
  answers, or 1,000 of them, each time through the W_i, in `E T D V + E² D V`;
  memory `E T (T + D + V) + E D V + E²`. The system without coupling, one of T
  questions a member, is the preconditioner. A member without questions gets
  what its neighbours have.

  Source: UnifyWeaver, smoothness regularisation ('unified').

  Raises:
    UserError: strength < 0, ridge <= 0, or S not of the members.
  """
  _positive(ridge=ridge)
  if not strength >= 0:
    raise UserError(f'strength must be >= 0, got {strength}')
  members = clusters.weight_ET.shape[0]
  graph_EE = laplacian(similarity_EE)
  if len(graph_EE) != members:
    raise UserError(
      f'similarity_EE must be of the {members} clusters, got {graph_EE.shape}'
    )
  penalty_EE = ridge * jnp.eye(members) + strength * graph_EE
  near_EE = cho_solve(cho_factor(penalty_EE), jnp.eye(members))
  return _coupled(clusters, near_EE)


@jax.jit
def _coupled(clusters, near_EE):
  root_ET1 = jnp.sqrt(clusters.weight_ET)[..., None]
  q_ETD, a_ETV = root_ET1 * clusters.q_ETD, root_ET1 * clusters.a_ETV

  def weights(z_ETV):
    own_EDV = einsum('etd,etv->edv', q_ETD, z_ETV)
    return einsum('ef,fdv->edv', near_EE, own_EDV)

  alone_ETT = einsum('e,etd,esd->ets', near_EE.diagonal(), q_ETD, q_ETD)
  factor = cho_factor(alone_ETT + jnp.eye(alone_ETT.shape[-1])[None])
  z_ETV, _ = cg(
    lambda z_ETV: einsum('etd,edv->etv', q_ETD, weights(z_ETV)) + z_ETV,
    a_ETV,
    tol=1e-6,
    maxiter=1000,
    M=lambda z_ETV: cho_solve(factor, z_ETV),
  )
  return weights(z_ETV)


def gradient(
  clusters: Clusters,
  *,
  cosine: float = 0.5,
  rate: float = 0.5,
  steps: int = 100,
) -> Array:
  """Gradient descent from `W_i = 0`, each member for itself.

    W <- W - rate ∂/∂W mean_t ((1 - λ) |q W - a|² + λ (1 - cos(q W, a)))

  In the span of a member's questions: `W_i = qᵀ z`, so a step costs `E T² V`.
  At 0 the cosine has no gradient: the first step is the squared error's.

  Raises:
    UserError: cosine not in [0, 1), rate or steps not positive.
  """
  _positive(rate=rate, steps=steps)
  if not 0 <= cosine < 1:
    raise UserError(f'cosine must be in [0, 1), got {cosine}')
  z_ETV = _descend(Objective(cosine), clusters, rate, steps)
  return einsum('etd,etv->edv', clusters.q_ETD, z_ETV)


# The number of steps is not static: one program for all settings.
@functools.partial(jax.jit, static_argnums=0)
def _descend(objective, clusters, rate, steps):
  q_ETD, a_ETV, weight_ET = clusters
  inner_ETT = einsum('etd,esd->ets', q_ETD, q_ETD)
  share_ET = weight_ET / jnp.maximum(weight_ET.sum(-1), _TINY)[:, None]

  def value(p_ETV):
    return jnp.sum(share_ET * rows(objective, p_ETV, a_ETV))

  def body(_, z_ETV):
    p_ETV = einsum('ets,esv->etv', inner_ETT, z_ETV)
    return z_ETV - rate * jax.grad(value)(p_ETV)

  first_ETV = 2 * (1 - objective.cosine) * share_ET[..., None] * a_ETV
  return jax.lax.fori_loop(1, steps, body, rate * first_ETV)


def kernel(
  clusters: Clusters,
  w_EDV: Array,
  *,
  length: float = 0.5,
  kind: Kernel = 'matern52',
) -> Array:
  """Members' weights averaged over neighbours, `Σ_j K_ij W_j / Σ_j K_ij`.

  K falls with the distance r of mean questions: 'gaussian' `exp(-r²/2l²)`,
  'laplacian' `exp(-r/l)`, 'matern32' `(1 + s) e^-s`, s = √3 r/l, 'matern52'
  `(1 + s + s²/3) e^-s`, s = √5 r/l. Members without questions count nothing.

  Raises:
    UserError: length <= 0 or an unknown kernel.
  """
  _positive(length=length)
  mean_ED = _mean(clusters, clusters.q_ETD)
  # By differences: a product of matrices would lose the distance of neighbours.
  square_E = jnp.sum(mean_ED**2, -1)
  cross_EE = einsum('ed,fd->ef', mean_ED, mean_ED)
  r_EE = square_E[:, None] + square_E[None, :] - 2 * cross_EE
  r_EE = jnp.sqrt(jnp.maximum(r_EE, 0)) * (1 - jnp.eye(r_EE.shape[0])) / length
  three, five = 3**0.5 * r_EE, 5**0.5 * r_EE
  forms = {
    'gaussian': jnp.exp(-0.5 * r_EE**2),
    'laplacian': jnp.exp(-r_EE),
    'matern32': (1 + three) * jnp.exp(-three),
    'matern52': (1 + five + five**2 / 3) * jnp.exp(-five),
  }
  if kind not in forms:
    raise UserError(f'kind must be one of {", ".join(forms)}, got {kind!r}')
  has_E = jnp.any(clusters.weight_ET > 0, -1)
  k_EE = forms[kind] * has_E[None, :]
  k_EE /= jnp.maximum(k_EE.sum(1, keepdims=True), _TINY)
  return einsum('ef,fdv->edv', k_EE, w_EDV)


def low_rank(
  clusters: Clusters, w_EDV: Array, *, rank: int = 1, ridge: float = 1.0
) -> Array:
  """`W_i = w_i + U_i V_iᵀ` of rank R, the least squares adapter of a weight.

  Reduced-rank ridge regression of what `w_EDV` (say, `shared`) leaves: the
  ridge solution Δ, projected on the leading right singular vectors of its
  fitted values `[√w q; √ridge I] Δ`. E R (D + V) weights.

  Source: A. Mukherjee and J. Zhu, Reduced rank ridge regression, 2011.

  Raises:
    UserError: rank is not in 1 .. min(D, V), or ridge is not positive.
  """
  _positive(ridge=ridge)
  limit = min(w_EDV.shape[1:])
  if not 0 < rank <= limit:
    raise UserError(f'rank must be in 1 .. {limit}, got {rank}')
  q_ETD, a_ETV, weight_ET = clusters
  left_ETV = a_ETV - einsum('etd,edv->etv', q_ETD, w_EDV)
  rest = Clusters(q_ETD, left_ETV, weight_ET)
  delta_EDV = independent(rest, ridge=ridge)
  p_ETV = einsum('etd,edv->etv', q_ETD, delta_EDV)
  gram_EVV = einsum('etv,et,etu->evu', p_ETV, weight_ET, p_ETV)
  gram_EVV += ridge * einsum('edv,edu->evu', delta_EDV, delta_EDV)
  top_EVR = jnp.linalg.eigh(gram_EVV)[1][..., -rank:]
  return w_EDV + einsum('edv,evr,eur->edu', delta_EDV, top_EVR, top_EVR)


def _mean(clusters, x_ETD):
  total_E = jnp.maximum(clusters.weight_ET.sum(-1), _TINY)
  return einsum('et,etd->ed', clusters.weight_ET, x_ETD) / total_E[:, None]


def _direction(x_ED):
  norm_E = jnp.sqrt(jnp.sum(x_ED**2, -1))
  return x_ED / jnp.maximum(norm_E, _TINY)[:, None], norm_E


def _repeat(clusters, w_DV):
  return jnp.broadcast_to(w_DV[None], (clusters.q_ETD.shape[0], *w_DV.shape))


def _positive(**values):
  for name, x in values.items():
    if not x > 0:  # NaN is not
      raise UserError(f'{name} must be > 0, got {x}')
