"""Causal attention that sees a fixed number of tokens, in constant memory.

  y_t = softmax_s(q_t R_(t-s) k_s / sqrt(K)) v_s W_out

over the M tokens of its document up to token t itself; R turns by the distance
(rotary positions). Keys and values of the last M tokens are kept in a ring:
token number p of a document lies in slot p mod M. Keys are kept as they are and
turned where they are read, by their distance from the chunk, so angles stay
small however long the document.
"""

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array
from recursive_weights.models.layers import trm_block


def init(
  key: Array, width: int, *, layers: int = 1, head_width: int = 64
) -> dict[str, Array]:
  """`{qkv [D, 3 D], out [D, D]}`; qkv's columns are query, key, value.

  Args:
    width: D.
    layers: of the model; `out` starts smaller by the root of 2 L.
    head_width: K, even.

  Raises:
    ValueError: the heads do not fit.
  """
  if head_width < 2 or width % head_width or head_width % 2:
    raise ValueError(
      f'head_width must be even and divide width = {width}, got {head_width}'
    )
  qkv_key, out_key = jax.random.split(key)
  return {
    'qkv': trm_block.lecun(qkv_key, width, 3 * width),
    'out': trm_block.lecun(out_key, width, width) / np.sqrt(2 * layers),
  }


def start(
  batch_size: int,
  width: int,
  *,
  window: int,
  head_width: int = 64,
  dtype=jnp.float32,
) -> dict[str, Array]:
  """The cache at the start of a document: `key`, `value` `[B, M, H, K]`."""
  shape = (batch_size, window, width // head_width, head_width)
  return {'key': jnp.zeros(shape, dtype), 'value': jnp.zeros(shape, dtype)}


def apply(
  params: dict[str, Array],
  cache: dict[str, Array],
  x_BTD: Array,
  place_BT: Array,
  *,
  theta: float = 10_000.0,
) -> tuple[Array, dict[str, Array]]:
  """`(y_BTD, parts)`; parts are for `commit`.

  Args:
    params: from `init`.
    cache: from `start` or `commit`.
    x_BTD: the chunk; its dtype is that of the products.
    place_BT: place of each token in its document, see `past`.
    theta: base of the rotary frequencies.
  """
  dtype = x_BTD.dtype
  window, heads, width = cache['key'].shape[1:]
  batch, length = place_BT.shape
  qkv = (x_BTD @ params['qkv'].astype(dtype)).reshape(
    batch, length, 3, heads, width
  )
  query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
  # The token of the chunk is at its index, cached ones lie before it. A first
  # token of a document sees no slot, so what the slots mean there is no matter.
  age_BM = _age(place_BT[:, 0], window)
  time_BT = jnp.broadcast_to(
    jnp.arange(length, dtype=jnp.int32)[None], (batch, length)
  )
  time_BM = jnp.concatenate([-age_BM, time_BT], axis=1)
  keys = jnp.concatenate([cache['key'].astype(dtype), key], axis=1)
  values = jnp.concatenate([cache['value'].astype(dtype), value], axis=1)
  score_BHTM = jnp.einsum(
    'BTHK,BMHK->BHTM',
    _turn(query, time_BT, theta),
    _turn(keys, time_BM, theta),
    preferred_element_type=jnp.float32,
  ) / np.sqrt(width)
  distance_BTM = time_BT[:, :, None] - time_BM[:, None]
  sees_BTM = (
    (distance_BTM >= 0)
    & (distance_BTM < window)
    & (distance_BTM <= place_BT[:, :, None])
  )
  score_BHTM = jnp.where(sees_BTM[:, None], score_BHTM, -jnp.inf)
  share_BHTM = jax.nn.softmax(score_BHTM, axis=-1).astype(dtype)
  seen = jnp.einsum('BHTM,BMHK->BTHK', share_BHTM, values)
  y_BTD = seen.reshape(x_BTD.shape) @ params['out'].astype(dtype)
  return y_BTD, {'key': key, 'value': value}


def commit(
  cache: dict[str, Array],
  parts: dict[str, Array],
  place_BT: Array,
  length_B: Array,
) -> dict[str, Array]:
  """The cache after the first `length_B` tokens of the chunk."""
  last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
  next_B = jnp.take_along_axis(place_BT, last_B1, axis=1)[:, 0] + 1
  window = cache['key'].shape[1]
  # Slot by slot the token that it holds; one before the chunk is there already.
  token_BM = length_B[:, None] - _age(next_B, window)
  index_BM = jnp.maximum(token_BM, 0)[:, :, None, None]
  return {
    name: jnp.where(
      token_BM[:, :, None, None] >= 0,
      jnp.take_along_axis(parts[name], index_BM, axis=1).astype(old.dtype),
      old,
    )
    for name, old in cache.items()
  }


def _age(position_B, window):
  """How many tokens before number `position_B` each slot's token is, >= 1."""
  slot_M = jnp.arange(window, dtype=jnp.int32)
  return (position_B[:, None] - 1 - slot_M[None]) % window + 1


def _turn(x_BTHK, time_BT, theta):
  """Entry i and entry i + K / 2 turned by `time theta^(-2 i / K)`."""
  width = x_BTHK.shape[-1]
  frequency_K = theta ** (-np.arange(0, width, 2) / width)
  angle_BTK = (
    time_BT.astype(jnp.float32)[:, :, None]
    * jnp.asarray(frequency_K, jnp.float32)[None, None]
  )
  cos, sin = jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]
  first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)
