"""Mamba-2: a state-space layer whose heads decay as one (SSD).

  S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T
  y_t = S_t^T C_t

per head, S in R^(N x V); B and C are shared by the heads of a group. This is
gated linear attention with keys B, queries C, values dt x and log decays
dt A. The skip D x, the gate and the norm belong to the layer.

Source: Dao and Gu 2024, 'Transformers are SSMs: Generalized Models and
Efficient Algorithms Through Structured State Space Duality'.
"""

import jax.numpy as jnp

from recursive_weights.interfaces import Array
from recursive_weights.scans import chunks, linear_attention
from recursive_weights.scans.linear_attention import Pending, commit

__all__ = ['Pending', 'commit', 'prefill', 'scan', 'step']


def scan(
  x_BTHV: Array,
  dt_BTH: Array,
  a_H: Array,
  b_BTGN: Array,
  c_BTGN: Array,
  *,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Array]:
  """A whole sequence, from any state.

  Args:
    x_BTHV: inputs, V wide in each head.
    dt_BTH: step sizes >= 0 (after the softplus).
    a_H: A <= 0.
    b_BTGN, c_BTGN: input and output maps of G groups, G a divisor of H.
    state, fresh, resets, mask: see the package; states are `[B, H, N, V]`.
    algorithm: 'chunked', 'recurrent', 'fused' (GPU kernels; N and V must be
      powers of two from 16 to 256, with room for a state on chip), or 'auto':
      fused for values of bfloat16 on one GPU, from Ampere on, where it can be,
      else chunked.
    chunk: tokens a chunk, a power of two.
    precision: of products of float32; operands of 16 bits stay what they are.

  Returns:
    Outputs `[B, T, H, V]` in the dtype of x, and the last state, float32.

  Raises:
    ValueError: a shape, the algorithm or the chunk is wrong.
    UserError: 'fused' on a GPU that cannot run kernels.
  """
  return linear_attention.scan(
    *_inputs(x_BTHV, dt_BTH, a_H, b_BTGN, c_BTGN, mask),
    state=state,
    fresh=fresh,
    resets=resets,
    mask=mask,
    algorithm=algorithm,
    chunk=chunk,
    precision=precision,
  )


def prefill(
  x_BTHV: Array,
  dt_BTH: Array,
  a_H: Array,
  b_BTGN: Array,
  c_BTGN: Array,
  *,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Pending]:
  """As `scan`; see `linear_attention.prefill`."""
  return linear_attention.prefill(
    *_inputs(x_BTHV, dt_BTH, a_H, b_BTGN, c_BTGN, mask),
    state=state,
    fresh=fresh,
    resets=resets,
    mask=mask,
    algorithm=algorithm,
    chunk=chunk,
    precision=precision,
  )


def step(
  state: Array,
  x_BHV: Array,
  dt_BH: Array,
  a_H: Array,
  b_BGN: Array,
  c_BGN: Array,
  *,
  resets: Array | None = None,
  fresh: Array | None = None,
) -> tuple[Array, Array]:
  """One token: the arguments of `scan` without their axis T."""
  token = (x[:, None] for x in (x_BHV, dt_BH, b_BGN, c_BGN))
  x, dt, b, c = token
  inputs = (y[:, 0] for y in _inputs(x, dt, a_H, b, c))
  return linear_attention.step(state, *inputs, resets=resets, fresh=fresh)


def _inputs(x_BTHV, dt_BTH, a_H, b_BTGN, c_BTGN, mask=None):
  if dt_BTH.shape != x_BTHV.shape[:3] or a_H.shape != x_BTHV.shape[2:3]:
    raise ValueError(
      f'dt must be {x_BTHV.shape[:3]} and A {x_BTHV.shape[2:3]}, '
      f'got {dt_BTH.shape} and {a_H.shape}'
    )
  dt_BTH = dt_BTH.astype(jnp.float32)
  if mask is not None:
    # Before the product: what a masked token holds may not be a number.
    mask = chunks.flags('mask', mask, x_BTHV.shape[:2], True)
    dt_BTH = jnp.where(mask[..., None], dt_BTH, 0.0)
    x_BTHV = jnp.where(mask[..., None, None], x_BTHV, 0)
  values = (dt_BTH[..., None] * x_BTHV).astype(x_BTHV.dtype)
  log_decay_BTH = dt_BTH * a_H.astype(jnp.float32)[None, None]
  return c_BTGN, b_BTGN, values, log_decay_BTH
