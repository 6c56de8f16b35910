"""The blocks of Tiny Recursive Models: a mixer and an attention block.

A block is two halves, each of them `x <- rms(x + f(x))` with the norm after
the sum and without a gain:

  mixer:      f = SwiGLU over the tokens, norm over the tokens   (token_half)
  attention:  f = self-attention, norm over the width        (attention_half)
  both then:  f = SwiGLU over the width, norm over the width   (channel_half)

States of a mixer are tokens first, `x_TBD`: then both halves are plain matrix
products over contiguous axes and nothing is transposed between them. Those of
attention are rows first, `x_BTD`, so that a row's tokens lie together. A half
is a function of its own parameters and of x, so another program for it, such as
a fused kernel, takes its place in `apply` with the same signature.

Weights are kept in float32 and cast to x's dtype where they are used, so that
gradients of weights that are used many times add up in float32.

Source: A. Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny
Networks, 2025 (arXiv 2510.04871), and G. Wang et al., Hierarchical Reasoning
Model, 2025 (arXiv 2506.21734).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree

EPSILON = 1e-5  # of the norms

# Standard deviation of a unit normal that is cut off at -2 and 2.
_CUT = 0.87962566103423978


def inner_width(width: int, expansion: float = 4.0, multiple: int = 256) -> int:
  """F of a SwiGLU over an axis of `width`: 2/3 of the expansion, rounded up.

  `ceil(round(2/3 expansion width) / multiple) * multiple`: 1,536 for 512, 512
  for 97, 256 for 81.
  """
  return -(-round(expansion * width * 2 / 3) // multiple) * multiple


def truncated(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
  """Float32 normal, cut off at two sigma, of this standard deviation."""
  sample = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
  return sample * (deviation / _CUT)


def lecun(key: Array, inputs: int, *outputs: int) -> Array:
  """`[I, *outputs]`, truncated normal of standard deviation 1 / sqrt(I)."""
  return truncated(key, (inputs, *outputs), 1 / np.sqrt(inputs))


def swiglu_init(key: Array, width: int, hidden: int) -> dict[str, Array]:
  """`{gate [I, F], up [I, F], down [F, I]}` for an axis of I entries."""
  keys = jax.random.split(key, 3)
  return {
    'gate': lecun(keys[0], width, hidden),
    'up': lecun(keys[1], width, hidden),
    'down': lecun(keys[2], hidden, width),
  }


def attention_init(key: Array, width: int) -> dict[str, Array]:
  """`{qkv [D, 3 D], out [D, D]}`; qkv's columns are query, key, value."""
  qkv_key, out_key = jax.random.split(key)
  return {
    'qkv': lecun(qkv_key, width, 3 * width),
    'out': lecun(out_key, width, width),
  }


def init(
  key: Array,
  kind: str,
  *,
  tokens: int,
  width: int,
  expansion: float = 4.0,
  multiple: int = 256,
) -> dict[str, dict[str, Array]]:
  """Parameters of one block.

  Args:
    kind: 'mixer' (`{token, channel}`) or 'attention' (`{attention, channel}`).
    tokens: T.
    width: D.
    expansion, multiple: see `inner_width`.
  """
  first_key, channel_key = jax.random.split(key)
  hidden = inner_width(width, expansion, multiple)
  channel = swiglu_init(channel_key, width, hidden)
  if kind == 'attention':
    return {'attention': attention_init(first_key, width), 'channel': channel}
  if kind != 'mixer':
    raise ValueError(f"kind must be 'mixer' or 'attention', got {kind!r}")
  hidden = inner_width(tokens, expansion, multiple)
  return {'token': swiglu_init(first_key, tokens, hidden), 'channel': channel}


def rms(x: Array, axis: int = -1) -> Array:
  """`x / sqrt(mean(x^2) + 1e-5)` over an axis, in float32, in x's dtype."""
  x32 = x.astype(jnp.float32)
  square = (x32 * x32).mean(axis, keepdims=True)
  return (x32 * jax.lax.rsqrt(square + EPSILON)).astype(x.dtype)


def token_half(params: Mapping[str, Array], x_TBD: Array) -> Array:
  """`rms_T(x + down^T (silu(gate^T x) * (up^T x)))`, all over the tokens.

  Args:
    params: `gate [T, F]`, `up [T, F]`, `down [F, T]`.
    x_TBD: the state. Further axes may stand in B's place.
  """
  gate_TF, up_TF, down_FT = _cast(params, x_TBD.dtype, 'gate', 'up', 'down')
  gated = jax.nn.silu(jnp.einsum('TF,T...->F...', gate_TF, x_TBD))
  hidden = gated * jnp.einsum('TF,T...->F...', up_TF, x_TBD)
  return rms(x_TBD + jnp.einsum('FT,F...->T...', down_FT, hidden), axis=0)


def channel_half(params: Mapping[str, Array], x_TBD: Array) -> Array:
  """`rms_D(x + (silu(x gate) * (x up)) down)`, all over the width.

  Args:
    params: `gate [D, F]`, `up [D, F]`, `down [F, D]`.
    x_TBD: the state; any axes may stand before D.
  """
  gate_DF, up_DF, down_FD = _cast(params, x_TBD.dtype, 'gate', 'up', 'down')
  hidden = jax.nn.silu(x_TBD @ gate_DF) * (x_TBD @ up_DF)
  return rms(x_TBD + hidden @ down_FD)


def rotation(
  tokens: int, width: int, theta: float = 10_000.0
) -> tuple[Array, Array]:
  """Cosines and sines `[T, K]` of rotary positions for heads of K entries.

  Entry i and entry i + K/2 of token t turn by `t theta^(-2 i / K)`.

  Source: J. Su et al., RoFormer, 2021 (arXiv 2104.09864).
  """
  frequency_K = theta ** (-np.arange(0, width, 2) / width)
  angle_TK = np.arange(tokens)[:, None] * frequency_K[None]
  angle_TK = np.concatenate([angle_TK, angle_TK], axis=1).astype(np.float32)
  return jnp.cos(angle_TK), jnp.sin(angle_TK)


def rotate(x_BTHK: Array, cos_TK: Array, sin_TK: Array) -> Array:
  """`x cos + (-x_2, x_1) sin` with x_1 and x_2 the halves of the last axis."""
  first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  whole = jnp.concatenate([first, second], axis=-1)
  cos, sin = cos_TK[None, :, None], sin_TK[None, :, None]
  return (whole * cos + turned * sin).astype(x_BTHK.dtype)


def attention_half(
  params: Mapping[str, Array],
  x_BTD: Array,
  *,
  heads: int,
  turn: tuple[Array, Array] | None = None,
) -> Array:
  """`rms_D(x + softmax(q k^T / sqrt(K)) v out)`, every token sees every one.

  Args:
    params: `qkv [D, 3 D]`, `out [D, D]`.
    x_BTD: the state.
    heads: H, of K = D / H entries.
    turn: from `rotation`, for queries and keys; None for no positions.
  """
  batch, tokens, width = x_BTD.shape
  qkv_DE, out_DD = _cast(params, x_BTD.dtype, 'qkv', 'out')
  qkv = (x_BTD @ qkv_DE).reshape(batch, tokens, 3, heads, width // heads)
  query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
  if turn is not None:
    query, key = rotate(query, *turn), rotate(key, *turn)
  score_BHTM = jnp.einsum(
    'BTHK,BMHK->BHTM', query, key, preferred_element_type=jnp.float32
  )
  share_BHTM = jax.nn.softmax(score_BHTM / np.sqrt(width // heads), axis=-1)
  seen = jnp.einsum('BHTM,BMHK->BTHK', share_BHTM.astype(x_BTD.dtype), value)
  return rms(x_BTD + seen.reshape(batch, tokens, width) @ out_DD)


class Halves(NamedTuple):
  """The programs of the halves: `(params of the half, state) -> state`.

  `constraint` is that of `symmetric_block`, None for its own. Programs may hand
  on something in the place of a state, of which `settle` makes one: replace
  some of them only by programs that take it, or that settle it first.
  """

  token: Callable[..., Array] = token_half
  channel: Callable[..., Array] = channel_half
  attention: Callable[..., Array] = attention_half
  constraint: Callable[..., Array] | None = None
  settle: Callable[..., Array] = lambda x: x


def apply(
  params: Tree,
  x: Array,
  *,
  heads: int = 8,
  turn: tuple[Array, Array] | None = None,
  halves: Halves = Halves(),  # noqa: B008
) -> Array:
  """One block; its kind is told by its parameters.

  Args:
    params: from `init`.
    x: the state, `[T, B, D]` of a mixer, `[B, T, D]` of attention.
    heads, turn: see `attention_half`; a mixer has no use for them.
    halves: the programs to run; what comes out is a state once it has passed
      `halves.settle`.
  """
  if 'attention' in params:
    x = halves.attention(params['attention'], x, heads=heads, turn=turn)
  else:
    x = halves.token(params['token'], x)
  return halves.channel(params['channel'], x)


def _cast(params, dtype, *names):
  return tuple(params[name].astype(dtype) for name in names)
