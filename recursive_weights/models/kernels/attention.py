"""Attention over few tokens as one kernel (Pallas, Triton).

A program holds keys and values of one head of one example and goes through its
queries, some tokens at a time. It reads all three where the projection wrote
them, tokens first, turns them, and writes what was seen where the output
projection reads it: no transposes, and no scores in memory. The backward pass
makes the scores again.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import channel_half, tiling


class Tiles(NamedTuple):
  """How the work is cut.

  rows: tokens whose queries are taken at a time, a power of two, at least 16:
  with fewer a program holds fewer scores, so that more of them share a
  multiprocessor. warps: of a program. `back_*`: the same of the backward pass.
  apart: queries and keys are turned before the forward kernel, by XLA, which
  leaves a program more registers.
  """

  rows: int = 128
  warps: int = 8
  apart: bool = False
  back_rows: int = 128
  back_warps: int = 8


def fits(tokens: int, width: int, heads: int) -> bool:
  """Whether the kernel takes these sizes: half heads are powers of two."""
  half = width // heads // 2
  return tokens <= 128 and half >= 16 and half == tiling.divisor(half, half)


def apply(
  params: Mapping[str, Array],
  x_TBD: Array,
  *,
  heads: int,
  turn: tuple[Array, Array] | None = None,
  tiles: Tiles | None = None,
  out_tiles: channel_half.Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms_D(x + softmax(q k^T / sqrt(K)) v out)`, every token sees every one.

  The same as `layers.trm_block.attention_half`.

  Args:
    params: `qkv [D, 3 D]`, `out [D, D]`.
    x_TBD: the state.
    heads: H, of K = D / H entries.
    turn: cosines and sines `[T, K]`, the same in both halves of K; or None.
    tiles: see `Tiles`.
    out_tiles: of the output projection, see `channel_half.project`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: sizes that `fits` refuses.
  """
  tokens, batch, width = x_TBD.shape
  if not fits(tokens, width, heads):
    raise ValueError(
      'tokens must be <= 128 and half a head a power of two >= 16, got '
      f'{tokens} tokens, {heads} heads of {width // heads}'
    )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  plan = _Plan(batch, heads, tiles or Tiles(), interpret)
  qkv_TBE = x_TBD @ params['qkv'].astype(x_TBD.dtype)
  half = width // heads // 2
  if turn is not None:
    cos_TK, sin_TK = (t[:, :half].astype(jnp.float32) for t in turn)
    turn = cos_TK, sin_TK
  seen_TN = _attend(qkv_TBE.reshape(tokens, -1), turn, plan)
  y_ND = channel_half.project(
    params['out'],
    seen_TN.reshape(-1, width),
    x_TBD.reshape(-1, width),
    tiles=out_tiles,
    interpret=interpret,
  )
  return y_ND.reshape(x_TBD.shape)


class _Plan(NamedTuple):
  batch: int
  heads: int
  tiles: Tiles
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv_TN, turn, plan):
  return _forward(qkv_TN, turn, plan)


def _attend_forward(qkv_TN, turn, plan):
  return _forward(qkv_TN, turn, plan), (qkv_TN, turn)


def _attend_backward(plan, saved, g_TN):
  qkv_TN, turn = saved
  still = jax.tree.map(jnp.zeros_like, turn)
  return _backward(qkv_TN, turn, g_TN, plan), still


_attend.defvjp(_attend_forward, _attend_backward)


def _head(which, heads, half, parts=3):
  """First column of a head's queries, keys (1) or values (2)."""
  head, example = pl.program_id(0), pl.program_id(1)
  return ((example * parts + which) * heads + head) * 2 * half


class _Tokens(NamedTuple):
  """`size` rows from `first` on, of `total`; zero past the last."""

  first: Any
  size: int
  total: int

  def load(self, ref, column, width):
    columns = pl.ds(column, width)
    return tiling.load_rows(ref, self.first, self.size, self.total, columns)

  def pair(self, ref, column, half):
    """The halves of a head, which are turned together."""
    return self.load(ref, column, half), self.load(ref, column + half, half)

  def angles(self, turn_refs):
    return [self.load(ref, 0, ref.shape[1]) for ref in turn_refs]

  def store(self, ref, column, value):
    columns = pl.ds(column, value.shape[1])
    tiling.store_rows(ref, value, self.first, self.total, columns)


def _everyone(total):
  """All tokens, as one power of two."""
  size = max(16, pl.next_power_of_2(total))
  # A start that is known only when run may reach past the end.
  return _Tokens(0 * pl.program_id(0), size, total)


def _over(total, rows, body, carry):
  """`body(tokens, carry) -> carry` for `rows` tokens after the other."""
  everyone = _everyone(total)
  if rows >= everyone.size:
    return body(everyone, carry)
  return jax.lax.fori_loop(
    0,
    pl.cdiv(total, rows),
    lambda index, carry: body(_Tokens(index * rows, rows, total), carry),
    carry,
  )


def _turned(halves, turn, sign):
  """Both halves turned by `sign` times the angles."""
  if not turn:
    return halves
  a, b = (x.astype(jnp.float32) for x in halves)
  cos, sin = turn
  out = a * cos - sign * b * sin, b * cos + sign * a * sin
  return tuple(x.astype(halves[0].dtype) for x in out)


def _products(xs, ys):
  return sum(tiling.dot(x, y.T) for x, y in zip(xs, ys, strict=True))


def _shares(q, k, total):
  """`(e [R, P], 1 / sum e [R])`, e exponentials of the scores, at most 1.

  Columns past the last token are zero.
  """
  half = q[0].shape[1]
  score = _products(q, k)
  exists = jnp.arange(score.shape[1])[None] < total
  score = jnp.where(exists, score, -1e30)
  # By powers of two, which the GPU has an instruction for.
  score = score * np.float32(np.log2(np.e) / np.sqrt(2 * half))
  e = jnp.exp2(score - score.max(1)[:, None])
  return e, 1 / e.sum(1)


def _forward_kernel(qk_ref, qkv_ref, *refs, heads, half, rows):
  *turn_refs, seen_ref = refs
  total = qkv_ref.shape[0]
  everyone = _everyone(total)
  # Queries and keys lie among the values, or apart from them.
  parts = 3 if qk_ref.shape == qkv_ref.shape else 2
  q_first, k_first = (_head(which, heads, half, parts) for which in (0, 1))
  seen_first = _head(0, heads, half, 1)
  k = everyone.pair(qk_ref, k_first, half)
  k = _turned(k, everyone.angles(turn_refs), 1)
  v = everyone.load(qkv_ref, _head(2, heads, half), 2 * half)

  def body(some, carry):
    q = some.pair(qk_ref, q_first, half)
    q = _turned(q, some.angles(turn_refs), 1)
    e, norm = _shares(q, k, total)
    seen = tiling.dot(e.astype(v.dtype), v) * norm[:, None]
    some.store(seen_ref, seen_first, seen)
    return carry

  _over(total, rows, body, 0)


def _turned_apart(qkv_TN, turn, heads, half):
  """Queries and keys, turned, in an array of their own."""
  x = qkv_TN.reshape(qkv_TN.shape[0], -1, 3, heads, 2, half)[:, :, :2]
  turn = [angle_TK[:, None, None, None] for angle_TK in turn]
  turned = _turned((x[..., 0, :], x[..., 1, :]), turn, 1)
  return jnp.stack(turned, axis=-2).reshape(qkv_TN.shape[0], -1)


def _sizes(qkv_TN, plan, rows):
  half = qkv_TN.shape[1] // (plan.batch * 3 * plan.heads * 2)
  return {'heads': plan.heads, 'half': half, 'rows': rows}


@functools.partial(jax.jit, static_argnames='plan')
def _forward(qkv_TN, turn, plan):
  tokens, columns = qkv_TN.shape
  sizes = _sizes(qkv_TN, plan, plan.tiles.rows)
  qk_TN = qkv_TN
  if turn and plan.tiles.apart:
    qk_TN = _turned_apart(qkv_TN, turn, plan.heads, sizes['half'])
    turn = None
  return pl.pallas_call(
    functools.partial(_forward_kernel, **sizes),
    out_shape=jax.ShapeDtypeStruct((tokens, columns // 3), qkv_TN.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=plan.tiles.warps, num_stages=2
    ),
    interpret=plan.interpret,
    name='attention_forward',
  )(qk_TN, qkv_TN, *(turn or ()))


def _backward_kernel(qkv_ref, g_ref, *refs, heads, half, rows):
  *turn_refs, dqkv_ref = refs
  dtype, total = qkv_ref.dtype, qkv_ref.shape[0]
  everyone = _everyone(total)
  first = [_head(which, heads, half) for which in range(3)]
  seen_first = _head(0, heads, half, 1)
  angles = everyone.angles(turn_refs)
  k = _turned(everyone.pair(qkv_ref, first[1], half), angles, 1)
  v = everyone.load(qkv_ref, first[2], 2 * half)

  def store(tokens, which, pair, angles):
    for part, value in enumerate(_turned(pair, angles, -1)):
      tokens.store(dqkv_ref, first[which] + part * half, value)

  def body(some, sums):
    *dk, dv = sums
    angles = some.angles(turn_refs)
    q = _turned(some.pair(qkv_ref, first[0], half), angles, 1)
    g = some.load(g_ref, seen_first, 2 * half)
    e, norm = _shares(q, k, total)
    share = e * norm[:, None]
    dshare = tiling.dot(g, v.T)
    dscore = share * (dshare - (share * dshare).sum(1)[:, None])
    dscore = (dscore * np.float32(1 / np.sqrt(2 * half))).astype(dtype)
    store(some, 0, tuple(tiling.dot(dscore, x) for x in k), angles)
    dk = [d + tiling.dot(dscore.T, x) for d, x in zip(dk, q, strict=True)]
    return *dk, dv + tiling.dot(share.astype(dtype).T, g)

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (*k, v)]
  *dk, dv = _over(total, rows, body, tuple(zeros))
  store(everyone, 1, tuple(dk), angles)
  everyone.store(dqkv_ref, first[2], dv)


@functools.partial(jax.jit, static_argnames='plan')
def _backward(qkv_TN, turn, g_TN, plan):
  return pl.pallas_call(
    functools.partial(
      _backward_kernel, **_sizes(qkv_TN, plan, plan.tiles.back_rows)
    ),
    out_shape=jax.ShapeDtypeStruct(qkv_TN.shape, qkv_TN.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=plan.tiles.back_warps, num_stages=2
    ),
    interpret=plan.interpret,
    name='attention_backward',
  )(qkv_TN, g_TN, *(turn or ()))
