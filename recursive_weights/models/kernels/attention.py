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
from recursive_weights.models.kernels import tiling

EPS = 1e-5


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
  seen_TBD = seen_TN.reshape(x_TBD.shape)
  return rms(x_TBD + seen_TBD @ params['out'].astype(x_TBD.dtype))


@jax.custom_vjp
def rms(r: Array) -> Array:
  """`r / sqrt(mean(r^2) + 1e-5)` over the last axis, that keeps its result.

  The next half keeps it too, so that the backward pass of both costs one.
  """
  return _rms(r)[0]


def _rms(r):
  r32 = r.astype(jnp.float32)
  scale = jax.lax.rsqrt((r32 * r32).mean(-1, keepdims=True) + EPS)
  y = (r32 * scale).astype(r.dtype)
  return y, (y, scale)


def _rms_backward(saved, g):
  y, scale = saved
  g32, y32 = g.astype(jnp.float32), y.astype(jnp.float32)
  dr = scale * (g32 - y32 * (g32 * y32).mean(-1, keepdims=True))
  return (dr.astype(g.dtype),)


rms.defvjp(_rms, _rms_backward)


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


def _columns(which, heads, half):
  """Both halves of a head's queries, keys (1) or values (2)."""
  head, example = pl.program_id(0), pl.program_id(1)
  first = ((example * 3 + which) * heads + head) * 2 * half
  return pl.ds(first, half), pl.ds(first + half, half)


def _seen_columns(heads, half):
  head, example = pl.program_id(0), pl.program_id(1)
  first = (example * heads + head) * 2 * half
  return pl.ds(first, half), pl.ds(first + half, half)


def _load(ref, columns):
  """Two halves `[P, K/2]` of all rows, which are zero past the last."""
  return tuple(tiling.load(ref, at, True)[0] for at in columns)


def _store(ref, columns, values):
  for at, value in zip(columns, values, strict=True):
    tiling.store(ref, at, [value], True)


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
  """Softmax of the scores; rows and columns past the last token are padded."""
  rows, half = q[0].shape
  score = _products(q, k) * np.float32(1 / np.sqrt(2 * half))
  exists = jnp.arange(rows)[None] < tokens
  score = jnp.where(exists, score, -1e30)
  share = jnp.exp(score - score.max(1)[:, None])
  return share / share.sum(1)[:, None]


def _angles(turn_refs):
  everything = slice(None)
  return [tiling.load(ref, everything, True)[0] for ref in turn_refs]


def _forward_kernel(qkv_ref, *refs, heads, half):
  *turn_refs, seen_ref = refs
  turn = _angles(turn_refs)
  q, k, v = (_load(qkv_ref, _columns(i, heads, half)) for i in range(3))
  q, k = _turned(q, turn, 1), _turned(k, turn, 1)
  share = _shares(q, k, qkv_ref.shape[0]).astype(seen_ref.dtype)
  seen = [tiling.dot(share, x) for x in v]
  _store(seen_ref, _seen_columns(heads, half), seen)


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
  q, k, v = (_load(qkv_ref, _columns(i, heads, half)) for i in range(3))
  g = _load(g_ref, _seen_columns(heads, half))
  q, k = _turned(q, turn, 1), _turned(k, turn, 1)
  share = _shares(q, k, qkv_ref.shape[0])
  dshare = _products(g, v)
  dscore = share * (dshare - (share * dshare).sum(1)[:, None])
  dscore = (dscore * np.float32(1 / np.sqrt(2 * half))).astype(dtype)
  share = share.astype(dtype)
  dq = tuple(tiling.dot(dscore, x) for x in k)
  dk = tuple(tiling.dot(dscore.T, x) for x in q)
  dv = tuple(tiling.dot(share.T, x) for x in g)
  dq, dk = _turned(dq, turn, -1), _turned(dk, turn, -1)
  for which, value in enumerate((dq, dk, dv)):
    _store(dqkv_ref, _columns(which, heads, half), value)


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
