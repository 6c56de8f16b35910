"""Spans of matrices: orthonormal bases, leading directions, angles."""

import jax
import jax.numpy as jnp

from recursive_weights.basis.clusters import by_block
from recursive_weights.basis.objective import einsum
from recursive_weights.interfaces import Array

# Eigenvalues of a float32 Gram matrix below this share of the largest are
# rounding.
_TINY = 1e-6


def inner(x_RDV: Array, y_RDV: Array) -> Array:
  """Frobenius inner products `<X_j, Y_k>`, `[R, R]`."""
  return einsum('rn,sn->rs', _flat(x_RDV), _flat(y_RDV))


def normalise(basis_RDV: Array) -> Array:
  """Each matrix divided by its Frobenius norm; 0 stays 0."""
  norm_R = jnp.sqrt(jnp.diagonal(inner(basis_RDV, basis_RDV)))
  unit_R = jnp.where(norm_R > 0, norm_R, 1.0)
  return basis_RDV / unit_R[:, None, None]


def orthonormalise(basis_RDV: Array) -> Array:
  """The nearest orthonormal basis of the span: `(G Gᵀ)^(-1/2) G`.

  A matrix that depends on the others is told by the eigenvalues of the Gram
  matrix, after all have been given norm 1. Where the span has fewer than R
  dimensions the result is orthonormal on the span and `Gram` a projection.

  Source: P.-O. Löwdin, 1950. Gram and Schmidt's procedure as proposed divides
  a dependent matrix by its rounding, and keeps noise.
  """
  gram_RR = inner(basis_RDV, basis_RDV)
  norm_R = jnp.sqrt(jnp.diagonal(gram_RR))
  scale_R = 1 / jnp.where(norm_R > 0, norm_R, 1.0)
  cosine_RR = scale_R[:, None] * gram_RR * scale_R[None]
  whiten_RR = _whiten(cosine_RR) * scale_R[None]
  near_RDV = _mix(whiten_RR, basis_RDV)
  # The Gram matrix squares the condition; a second pass removes what is left.
  return _mix(_whiten(inner(near_RDV, near_RDV)), near_RDV)


def leading(
  q_ETD: Array, z_ETV: Array, rank: int, key: Array, *, passes: int = 20
) -> Array:
  """Leading right singular vectors of the stack `vec(q_iᵀ z_i)`, `[R, D, V]`.

  Ridge solutions and gradients both have the form `q_iᵀ z_i`, so the stack of
  `[E, D V]` is never formed: a pass costs `E T R D V`.

  Args:
    rank: R; with fewer independent members the others are arbitrary.
    key: of the random start.
    passes: of subspace iteration; the error falls as `(s_{R+9} / s_R)^(2n)`.

  Source: N. Halko et al., Finding structure with randomness, 2011.
  """
  wide = min(rank + 8, q_ETD.shape[2] * z_ETV.shape[2])
  start_RDV = jax.random.normal(key, (wide, q_ETD.shape[2], z_ETV.shape[2]))

  def scores(x_RDV):
    def some(q_ETD, z_ETV):
      seen_ERTV = einsum('etd,rdv->ertv', q_ETD, x_RDV)
      return einsum('ertv,etv->er', seen_ERTV, z_ETV)

    each = wide * z_ETV.shape[1] * z_ETV.shape[2]
    return by_block(some, each, q_ETD, z_ETV)

  images = jax.linear_transpose(scores, start_RDV)

  def body(_, x_RDV):
    return _qr(images(scores(x_RDV))[0])

  x_RDV = jax.lax.fori_loop(0, passes, body, _qr(start_RDV))
  c_ER = scores(x_RDV)
  _, vector_RR = jnp.linalg.eigh(einsum('er,es->rs', c_ER, c_ER))
  top_RR = vector_RR[:, ::-1][:, :rank]
  return einsum('rs,rdv->sdv', top_RR, x_RDV)


def cosines(first_RDV: Array, second_RDV: Array) -> Array:
  """Cosines of the principal angles between two spans, descending, `[R]`."""
  cross_RR = inner(orthonormalise(first_RDV), orthonormalise(second_RDV))
  return jnp.linalg.svd(cross_RR, compute_uv=False)


def coordinates(
  coefficients_ER: Array, basis_RDV: Array, onto_RDV: Array
) -> Array:
  """The members' coefficients on another basis: `c M`, where `G ≈ M H`.

  Least squares: what of `W_i = Σ_k c_ik G_k` lies outside the span of H counts
  nothing (`cosines` tells how much may). A change of basis within the span
  leaves them as they are.

  Args:
    onto_RDV: H, independent matrices; as many as G has, or not.
  """
  gram_RR = inner(onto_RDV, onto_RDV)
  m_RR = jnp.linalg.solve(gram_RR, inner(onto_RDV, basis_RDV)).T
  return einsum('er,rs->es', coefficients_ER, m_RR)


def _whiten(gram_RR):
  """`Gram^(-1/2)` on the span, 0 beside it."""
  value_R, vector_RR = jnp.linalg.eigh(gram_RR)
  keep_R = value_R > _TINY * value_R[-1]
  root_R = jnp.where(keep_R, 1 / jnp.sqrt(jnp.where(keep_R, value_R, 1)), 0)
  return einsum('rs,s,ts->rt', vector_RR, root_R, vector_RR)


def _mix(mix_RR, x_RDV):
  return einsum('rs,sn->rn', mix_RR, _flat(x_RDV)).reshape(x_RDV.shape)


def _flat(x_RDV):
  # Products over one long axis are several times as fast as over two.
  return x_RDV.reshape(x_RDV.shape[0], -1)


def _qr(x_RDV):
  return jnp.linalg.qr(_flat(x_RDV).T)[0].T.reshape(x_RDV.shape)
