"""The few tokens just before a token: windows, and where documents begin.

A token's place is its number in its document, from 0. Chunks may hold several
documents, and a document may span chunks; a token sees the one `lag` before it
only where its place is at least `lag`.
"""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array


def places(
  position_B: Array, length: int, resets_BT: Array | None = None
) -> Array:
  """The place of each token of a chunk, int32 `[B, T]`.

  Args:
    position_B: tokens of the document before the chunk; 0 where it begins.
    length: T.
    resets_BT: True at the first token of a document.
  """
  time_T = jnp.arange(length, dtype=jnp.int32)
  on_BT = position_B[:, None] + time_T[None]
  if resets_BT is None:
    return on_BT
  began_BT = jax.lax.cummax(
    jnp.where(resets_BT, time_T[None], jnp.int32(-1)), axis=1
  )
  return jnp.where(began_BT < 0, on_BT, time_T[None] - began_BT)


def advance(position_B: Array, place_BT: Array, length_B: Array) -> Array:
  """`position_B` after the first `length_B` tokens of the chunk."""
  last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
  after_B = jnp.take_along_axis(place_BT, last_B1, axis=1)[:, 0] + 1
  return jnp.where(length_B > 0, after_B, position_B)


def shift(
  before_BD: Array, x_BTD: Array, place_BT: Array, first_D: Array | None = None
) -> Array:
  """The token before each token; `first_D`, or 0, before the first.

  Args:
    before_BD: the token before the chunk.
    x_BTD: the chunk.
    place_BT: from `places`.
    first_D: what stands before a document.
  """
  before_B1D = before_BD[:, None].astype(x_BTD.dtype)
  past_BTD = jnp.concatenate([before_B1D, x_BTD[:, :-1]], axis=1)
  first = jnp.zeros([], x_BTD.dtype)
  if first_D is not None:
    first = first_D.astype(x_BTD.dtype)[None, None]
  return jnp.where(place_BT[:, :, None] > 0, past_BTD, first)


def convolve(
  kernel_MD: Array,
  before_BMD: Array,
  x_BTD: Array,
  place_BT: Array,
  first_MD: Array | None = None,
) -> Array:
  """Causal depthwise convolution, `y_t = sum_j kernel_(M-1-j) x_(t-j)`.

  Args:
    kernel_MD: M taps, that of the token itself last.
    before_BMD: the M - 1 tokens before the chunk, the latest last.
    x_BTD: the chunk.
    place_BT: from `places`.
    first_MD: what stands before a document, M - 1 tokens; None for zeros.
  """
  taps, length = kernel_MD.shape[0], x_BTD.shape[1]
  kernel_MD = kernel_MD.astype(x_BTD.dtype)
  padded = jnp.concatenate([before_BMD.astype(x_BTD.dtype), x_BTD], axis=1)
  y_BTD = jnp.zeros_like(x_BTD)
  for lag in range(taps):
    start = taps - 1 - lag
    seen = jnp.where(
      place_BT[:, :, None] >= lag,
      padded[:, start : start + length],
      jnp.zeros([], x_BTD.dtype),
    )
    y_BTD = y_BTD + kernel_MD[start][None, None] * seen
  if first_MD is not None and taps > 1:
    # What lies before a document adds a vector that only the place tells.
    first_MD = first_MD.astype(x_BTD.dtype)
    for place in range(taps - 1):
      added_D = (kernel_MD[: taps - 1 - place] * first_MD[place:]).sum(0)
      here_BT1 = (place_BT == place)[:, :, None]
      added = jnp.where(
        here_BT1, added_D[None, None], jnp.zeros([], added_D.dtype)
      )
      y_BTD = y_BTD + added
  return y_BTD


def window(before_BMD: Array, x_BTD: Array, length_B: Array) -> Array:
  """The last M tokens before token `length_B` of the chunk, `[B, M, D]`."""
  size = before_BMD.shape[1]
  joined = jnp.concatenate([before_BMD, x_BTD.astype(before_BMD.dtype)], axis=1)
  index_BM = length_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  return jnp.take_along_axis(joined, index_BM[:, :, None], axis=1)
