"""Attention over few tokens as one kernel (Pallas, Triton).

A program holds all tokens of one head of one example. It reads queries, keys
and values where the projection wrote them, tokens first, turns them, and
writes what was seen where the output projection reads it: no transposes, and
no scores in memory. The backward pass makes the scores again.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import channel_half, tiling


class Tiles(NamedTuple):
  """Warps of a program, forward and backward."""

  warps: int = 8
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


def _load(ref, first, size):
  """All rows `[P, size]`, zero past the last."""
  return tiling.load(ref, pl.ds(first, size), True)[0]


def _store(ref, first, value):
  tiling.store(ref, pl.ds(first, value.shape[1]), [value], True)


def _pair(ref, first, half):
  """The halves of a head, which are turned together."""
  return _load(ref, first, half), _load(ref, first + half, half)


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


def _shares(q, k, tokens):
  """`(e [P, P], 1 / sum e [P])`, e exponentials of the scores, at most 1.

  Columns past the last token are zero.
  """
  rows, half = q[0].shape
  score = _products(q, k)
  exists = jnp.arange(rows)[None] < tokens
  score = jnp.where(exists, score, -1e30)
  # By powers of two, which the GPU has an instruction for.
  score = score * np.float32(np.log2(np.e) / np.sqrt(2 * half))
  e = jnp.exp2(score - score.max(1)[:, None])
  return e, 1 / e.sum(1)


def _angles(turn_refs):
  everything = slice(None)
  return [tiling.load(ref, everything, True)[0] for ref in turn_refs]


def _turned_pairs(qkv_ref, turn, heads, half):
  return (
    _turned(_pair(qkv_ref, _head(which, heads, half), half), turn, 1)
    for which in (0, 1)
  )


def _forward_kernel(qkv_ref, *refs, heads, half):
  *turn_refs, seen_ref = refs
  q, k = _turned_pairs(qkv_ref, _angles(turn_refs), heads, half)
  v = _load(qkv_ref, _head(2, heads, half), 2 * half)
  e, norm = _shares(q, k, qkv_ref.shape[0])
  seen = tiling.dot(e.astype(v.dtype), v) * norm[:, None]
  _store(seen_ref, _head(0, heads, half, 1), seen)


def _sizes(qkv_TN, plan):
  half = qkv_TN.shape[1] // (plan.batch * 3 * plan.heads * 2)
  return {'heads': plan.heads, 'half': half}


@functools.partial(jax.jit, static_argnames='plan')
def _forward(qkv_TN, turn, plan):
  tokens, columns = qkv_TN.shape
  return pl.pallas_call(
    functools.partial(_forward_kernel, **_sizes(qkv_TN, plan)),
    out_shape=jax.ShapeDtypeStruct((tokens, columns // 3), qkv_TN.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=plan.tiles.warps, num_stages=2
    ),
    interpret=plan.interpret,
    name='attention_forward',
  )(qkv_TN, *(turn or ()))


def _backward_kernel(qkv_ref, g_ref, *refs, heads, half):
  *turn_refs, dqkv_ref = refs
  dtype = qkv_ref.dtype
  turn = _angles(turn_refs)
  q, k = _turned_pairs(qkv_ref, turn, heads, half)
  v = _load(qkv_ref, _head(2, heads, half), 2 * half)
  g = _load(g_ref, _head(0, heads, half, 1), 2 * half)
  e, norm = _shares(q, k, qkv_ref.shape[0])
  share = e * norm[:, None]
  dshare = tiling.dot(g, v.T)
  dscore = share * (dshare - (share * dshare).sum(1)[:, None])
  dscore = (dscore * np.float32(1 / np.sqrt(2 * half))).astype(dtype)
  dv = tiling.dot(share.astype(dtype).T, g)
  dq = tuple(tiling.dot(dscore, x) for x in k)
  dk = tuple(tiling.dot(dscore.T, x) for x in q)
  for which, pair in enumerate((dq, dk)):
    first = _head(which, heads, half)
    for part, value in enumerate(_turned(pair, turn, -1)):
      _store(dqkv_ref, first + part * half, value)
  _store(dqkv_ref, _head(2, heads, half), dv)


@functools.partial(jax.jit, static_argnames='plan')
def _backward(qkv_TN, turn, g_TN, plan):
  return pl.pallas_call(
    functools.partial(_backward_kernel, **_sizes(qkv_TN, plan)),
    out_shape=jax.ShapeDtypeStruct(qkv_TN.shape, qkv_TN.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=plan.tiles.back_warps, num_stages=2
    ),
    interpret=plan.interpret,
    name='attention_backward',
  )(qkv_TN, g_TN, *(turn or ()))
