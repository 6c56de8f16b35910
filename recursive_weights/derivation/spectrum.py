"""Functions of the singular values of a weight, with finite gradients.

Differentiating an SVD divides by gaps `s_i² - s_j²` between singular values, so
a repeated or zero value gives NaN. The functions here differentiate the product
`U diag(f(s)) Vᵀ` as a whole instead: where f is an odd function of each value,
all gaps cancel (Daleckii and Krein 1965; for singular values see Noferini 2017,
'A formula for the Fréchet derivative of a generalized matrix function').
"""

import functools

import jax
import jax.numpy as jnp

from recursive_weights.derivation import matrix

# Two values closer than this, relative to the larger, take the derivative of f
# in place of the divided difference: balances the rounding of the difference
# (1e-7 / 5e-3) against the curvature it leaves out ((5e-3)² / 12).
_TIE = 5e-3
# Where f is not one function of each value, gaps below this share of the
# largest value are damped to zero, since no derivative exists at a tie.
_DAMP = 3e-6
_TINY = 1e-15


def svd(w_FD):
  """Thin SVD `(u_FR, s_R, v_RD)`; NaN everywhere if `w_FD` is not finite."""
  finite = jnp.all(jnp.isfinite(w_FD))
  # LAPACK may loop or return numbers for infinite input.
  u_FR, s_R, v_RD = jnp.linalg.svd(
    jnp.where(finite, w_FD, 0), full_matrices=False
  )
  return u_FR, jnp.where(finite, s_R, jnp.nan), v_RD


def bound(w_FD):
  """Smooth upper bound of the largest singular value: the Schatten-8 norm.

  `(Σ s_i⁸)^(1/8) = ||(W Wᵀ)²||_F^(1/4)`, between s_max and R^(1/8) s_max with
  R = min(F, D) (1.8 s_max at R = 128). Differentiable where s_max is tied, and
  two products of matrices in place of an SVD.
  """
  norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(w_FD * w_FD)))
  # The result does not depend on the unit, so its gradient does not either.
  unit = jnp.where(norm > 0, norm, 1.0)
  x_FD = w_FD / unit
  rows, columns = x_FD.shape
  gram = matrix.matmul(*((x_FD, x_FD.T) if rows <= columns else (x_FD.T, x_FD)))
  square = matrix.matmul(gram, gram)
  return unit * (jnp.sum(square * square) + 1e-30) ** 0.125


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def modulate(f, elementwise: bool, params, w_FD):
  """`U diag(f(params, s)) Vᵀ` for `W = U diag(s) Vᵀ`, with safe gradients.

  Args:
    f: `(params, s_R) -> values_R`; closes over no traced value. `s_R` descends.
    elementwise: whether value i depends on s_i alone, by one odd function.
    params: a tree of arrays; gradients flow to it.
    w_FD: the weight.

  First derivatives are finite for every finite weight. For an elementwise f
  they are exact, at ties and zeros too. Otherwise they are exact where gaps
  and values exceed about 1e-3 of the largest value; at a tie, where U and V
  are arbitrary and no derivative exists, the term that rotates the two modes
  into each other is left out. Second derivatives are not gap-safe.

  Cost: one SVD, O(F D min(F, D)). A weight that is not finite gives NaN.
  """
  u_FR, s_R, v_RD = svd(w_FD)
  return matrix.matmul(u_FR * f(params, s_R)[None, :], v_RD)


@modulate.defjvp
def _modulate_jvp(f, elementwise, primals, tangents):
  (params, w_FD), (dparams, dw_FD) = primals, tangents
  u_FR, s_R, v_RD = svd(w_FD)
  left_RD = matrix.matmul(u_FR.T, dw_FD)
  p_RR = matrix.matmul(left_RD, v_RD.T)
  value_R, dvalue_R = jax.jvp(f, (params, s_R), (dparams, jnp.diagonal(p_RR)))

  a_RR, b_RR = s_R[:, None], s_R[None, :]
  if elementwise:
    _, slope_R = jax.jvp(
      functools.partial(f, params), (s_R,), (jnp.ones_like(s_R),)
    )
    tie, zero = _TIE * jnp.maximum(a_RR, b_RR) + _TINY, _TINY
  else:
    slope_R = jnp.zeros_like(s_R)
    tie = zero = _DAMP * jnp.max(s_R) + 1e-8
  slope_RR = (slope_R[:, None] + slope_R[None, :]) / 2
  minus_RR = _ratio(
    value_R[:, None] - value_R[None, :], a_RR - b_RR, slope_RR, tie
  )
  plus_RR = _ratio(
    value_R[:, None] + value_R[None, :], a_RR + b_RR, slope_RR, zero
  )
  core_RR = (minus_RR * (p_RR + p_RR.T) + plus_RR * (p_RR - p_RR.T)) / 2
  eye = jnp.eye(s_R.shape[0], dtype=bool)
  core_RR = jnp.where(eye, dvalue_R[:, None], core_RR)
  derivative = matrix.matmul(u_FR, core_RR, v_RD)

  # What dW adds outside the row space or the column space of a thin SVD.
  secant_R = _ratio(value_R, s_R, slope_R, zero)
  rows, columns = w_FD.shape
  if rows > columns:
    rest_FR = matrix.matmul(dw_FD, v_RD.T) - matrix.matmul(u_FR, p_RR)
    derivative += matrix.matmul(rest_FR * secant_R[None, :], v_RD)
  elif columns > rows:
    rest_RD = left_RD - matrix.matmul(p_RR, v_RD)
    derivative += matrix.matmul(u_FR * secant_R[None, :], rest_RD)
  return matrix.matmul(u_FR * value_R[None, :], v_RD), derivative


def _ratio(numerator, denominator, limit, width):
  """`numerator / denominator`, moving to `limit` below `width`."""
  return (denominator * numerator + width**2 * limit) / (
    denominator**2 + width**2
  )
