"""Spectral: a learned function of the singular values."""

import math
from typing import Literal

import jax.numpy as jnp

from recursive_weights.derivation import matrix, spectrum
from recursive_weights.interfaces import Operator

Kind = Literal['mlp', 'scale', 'odd']


def make(kind: Kind = 'mlp', rank: int = 8, degree: int = 3) -> Operator:
  """`W2 = U f(S) Vᵀ`, computed as `W + U (f(S) - S) Vᵀ`: exact where f = id.

  Args:
    kind: which f.
      'mlp': `f(S) = S + net(S)` on the k largest values, net: k -> 2k -> k
        with GELU.
      'scale': `f(s_i) = softplus(scale_i + ln(e - 1)) s_i + shift_i` for the k
        largest values. `scale = 0` is a gain of exactly 1.
      'odd': `f(s) = s (1 + Σ_j c_j (s / b)^(2j))`, j = 1..degree, for every
        value; b is the smooth bound of the largest one (`spectrum.bound`).
    rank: k for 'mlp' and 'scale', clipped to min(F, D): a `[4, 128]` weight
      has four singular values, so there rank 8 means 4.
    degree: number of coefficients of 'odd'.

  Parameters: 'mlp' `4 k² + 3 k`, 'scale' `2 k`, 'odd' `degree`.
  Start: W.
  Gradients: finite everywhere. 'odd' is smooth, at ties and zeros too. 'mlp'
    and 'scale' treat modes by their order, so they jump where two values
    cross (see `spectrum.modulate`).
  Cost: one SVD, O(F D min(F, D)); on accelerators prefer `polynomial`. A
    weight that is not finite gives NaN, never W.
  Transfer: no parameter depends on F or D. Where fewer than k values exist,
    the missing ones count as zero.
  Source: examiner-ctm v5.3, SpectralResidualOperator ('mlp') and its
    repository ('scale', without its gain of 1.3 at the start).
  """
  matrix.one_of('kind', kind, ('mlp', 'scale', 'odd'))
  matrix.positive(rank=rank, degree=degree)

  def init(key, base):
    k = _modes(base.shape, rank)
    if kind == 'mlp':
      return matrix.network_init(key, k, 2 * k, k)
    if kind == 'scale':
      return {'scale': jnp.zeros(k), 'shift': jnp.zeros(k)}
    return {'coefficients': jnp.zeros(degree)}

  def apply(theta, base):
    w_FD = matrix.view(base)
    if kind == 'odd':
      params = (theta, spectrum.bound(w_FD))
      delta_FD = spectrum.modulate(_odd, True, params, w_FD)
    else:
      change = _mlp if kind == 'mlp' else _scale
      delta_FD = spectrum.modulate(change, False, theta, w_FD)
    return matrix.restore(w_FD + delta_FD, base)

  return Operator(init, apply)


def count(base_shape, kind: Kind = 'mlp', rank: int = 8, degree: int = 3):
  """'mlp' `4 k² + 3 k`, 'scale' `2 k`, 'odd' `degree`; k = min(rank, F, D)."""
  k = _modes(base_shape, rank)
  return {'mlp': 4 * k * k + 3 * k, 'scale': 2 * k, 'odd': degree}[kind]


def _modes(base_shape, rank):
  return min(rank, *matrix.size(base_shape))


# Each function below returns the change f(s) - s.


def _mlp(theta, s_R):
  k = theta['down']['kernel'].shape[0]
  n = min(k, s_R.shape[0])
  top_k = jnp.zeros(k, s_R.dtype).at[:n].set(s_R[:n])
  delta_k = matrix.network_apply(theta, top_k[None, :])[0]
  return jnp.zeros_like(s_R).at[:n].set(delta_k[:n])


def _scale(theta, s_R):
  n = min(theta['scale'].shape[0], s_R.shape[0])
  # softplus(x + ln(e - 1)) - 1, without rounding at x = 0.
  gain_k = jnp.log1p((1 - math.exp(-1)) * jnp.expm1(theta['scale'][:n]))
  delta_k = gain_k * s_R[:n] + theta['shift'][:n]
  return jnp.zeros_like(s_R).at[:n].set(delta_k)


def _odd(params, s_R):
  theta, bound = params
  x_R = (s_R / bound) ** 2
  total_R = jnp.zeros_like(s_R)
  for coefficient in theta['coefficients'][::-1]:
    total_R = (total_R + coefficient) * x_R
  return s_R * total_R
