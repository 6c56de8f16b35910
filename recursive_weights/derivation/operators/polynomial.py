"""Polynomial: powers of the base, without an SVD."""

import jax
import jax.numpy as jnp

from recursive_weights.derivation import matrix, spectrum
from recursive_weights.interfaces import Operator


def make(degree: int = 3) -> Operator:
  """`W2 = b Σ_k a_k X^k` (square) or `W2 = W Σ_k a_k (Xᵀ X)^k`; `X = W / b`.

  b is a smooth upper bound of the largest singular value (`spectrum.bound`),
  so no power of X exceeds norm one, and `T(c W) = c T(W)` for c > 0. Where the
  last two axes are equal, each square matrix of a base `[..., D, D]` takes the
  first form; any other base takes the second, which is odd in W, on its
  `[F, D]` view. k runs from 0 to degree.

  Args:
    degree: the highest k.

  Parameters: degree + 1.
  Start: W: `a = (0, 1, 0, ...)` for square, `(1, 0, ...)` for other bases.
  Cost: O(degree F D min(F, D)), products of matrices only: right for
    accelerators.
  Transfer: no parameter depends on F or D.
  Source: examiner-ctm v5.3, section 9.1, which rejected it for high powers
    that explode and for square bases only; odd form as in Newton-Schulz.
  """
  matrix.positive(degree=degree)

  def init(key, base):
    del key
    linear = 1 if _square(base.shape) else 0
    return {'coefficients': jnp.zeros(degree + 1).at[linear].set(1.0)}

  def apply(theta, base):
    a_K = theta['coefficients']
    if not _square(base.shape):
      return matrix.restore(_odd(a_K, matrix.view(base)), base)
    dtype = jnp.promote_types(base.dtype, jnp.float32)
    stack = base.reshape(-1, *base.shape[-2:]).astype(dtype)
    derived = jax.vmap(_plain, in_axes=(None, 0))(a_K, stack)
    return derived.reshape(base.shape).astype(base.dtype)

  return Operator(init, apply)


def count(base_shape, degree: int = 3) -> int:
  """`degree + 1`."""
  del base_shape
  return degree + 1


def _square(shape):
  return len(shape) > 1 and shape[-1] == shape[-2]


def _plain(a_K, w_DD):
  bound = spectrum.bound(w_DD)
  x_DD = power_DD = w_DD / bound
  eye_DD = jnp.eye(w_DD.shape[0], dtype=w_DD.dtype)
  # As a change of W, so that the start is W without rounding.
  delta_DD = a_K[0] * eye_DD + (a_K[1] - 1) * x_DD
  for a in a_K[2:]:
    power_DD = matrix.matmul(power_DD, x_DD)
    delta_DD += a * power_DD
  return w_DD + bound * delta_DD


def _odd(a_K, w_FD):
  x_FD = w_FD / spectrum.bound(w_FD)
  wide = x_FD.shape[0] <= x_FD.shape[1]
  gram = matrix.matmul(*((x_FD, x_FD.T) if wide else (x_FD.T, x_FD)))
  derived_FD, power_FD = w_FD + (a_K[0] - 1) * w_FD, w_FD
  for a in a_K[1:]:
    factors = (gram, power_FD) if wide else (power_FD, gram)
    power_FD = matrix.matmul(*factors)
    derived_FD += a * power_FD
  return derived_FD
