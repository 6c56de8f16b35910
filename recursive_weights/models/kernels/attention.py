"""Attention over few tokens as one kernel (Pallas, Triton).

A program takes a head of an example. It reads its queries, keys and values
where the projection wrote them, turns them, and writes what was seen where the
output projection reads it: no transposes, and no scores in memory. Rows come
before tokens, so that what a program reads lies in a few pages of memory. A
program of the backward pass, which makes the scores again, takes heads one
after the other.
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

  warps: of a program. `back_*`: of one of the backward pass, which takes as
  many heads as divide them all, `back_heads` at most, `back_stages` of them on
  their way or at work.
  """

  warps: int = 8
  back_heads: int = 8
  back_warps: int = 8
  back_stages: int = 2


def fits(tokens: int, width: int, heads: int) -> bool:
  """Whether the kernel takes these sizes: half heads are powers of two."""
  half = width // heads // 2
  return tokens <= 128 and half >= 16 and half == tiling.divisor(half, half)


def apply(
  params: Mapping[str, Array],
  x_BTD: Array,
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
    x_BTD: the state.
    heads: H, of K = D / H entries.
    turn: cosines and sines `[T, K]`, the same in both halves of K; or None.
    tiles: see `Tiles`.
    out_tiles: of the output projection, see `channel_half.project`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: sizes that `fits` refuses.
  """
  batch, tokens, width = x_BTD.shape
  if not fits(tokens, width, heads):
    raise ValueError(
      'tokens must be <= 128 and half a head a power of two >= 16, got '
      f'{tokens} tokens, {heads} heads of {width // heads}'
    )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  plan = Plan(batch, heads, tiles or Tiles(), interpret)
  qkv_BTE = x_BTD @ params['qkv'].astype(x_BTD.dtype)
  angles = tables(turn, width // heads // 2, x_BTD.dtype)
  y_ND = channel_half.project(
    params['out'],
    _attend(qkv_BTE.reshape(-1, 3 * width), angles, plan),
    x_BTD.reshape(-1, width),
    tiles=out_tiles,
    interpret=interpret,
  )
  return y_ND.reshape(x_BTD.shape)


class Plan(NamedTuple):
  """What the kernels are told besides their arrays."""

  batch: int
  heads: int
  tiles: Tiles
  interpret: bool


def tables(
  turn: tuple[Array, Array] | None, half: int, dtype
) -> tuple[Array, ...]:
  """Cosines and sines of half a head, of which the other half has the same.

  Of 16 bits where the states are: with 11 bits of a number, where bfloat16 has
  eight, and half as much to read.
  """
  if turn is None:
    return ()
  exact = jnp.dtype(dtype).itemsize > 2
  kept = jnp.float32 if exact else jnp.float16
  return tuple(table[:, :half].astype(kept) for table in turn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv_NE, turn, plan):
  return forward(qkv_NE, turn, plan)


def _attend_forward(qkv_NE, turn, plan):
  return forward(qkv_NE, turn, plan), (qkv_NE, turn)


def _attend_backward(plan, saved, g_NE):
  qkv_NE, turn = saved
  still = jax.tree.map(jnp.zeros_like, turn)
  return backward(qkv_NE, turn, g_NE, plan), still


_attend.defvjp(_attend_forward, _attend_backward)


class _Sizes(NamedTuple):
  """Of all programs; `half` the entries of a head.

  turned, scaled: whether there are tables of angles, and factors of rows.
  """

  tokens: int
  heads: int
  half: int
  turned: bool
  scaled: bool


class _Head(NamedTuple):
  """A head of an example."""

  example: Any
  head: Any
  sizes: _Sizes

  def first(self, which):
    """First column of its queries, keys (1) or values (2)."""
    return (which * self.sizes.heads + self.head) * 2 * self.sizes.half

  def _at(self, ref, row, column, width):
    """All tokens as one power of two, and which of them exist."""
    exists = (jnp.arange(self._padded) < self.sizes.tokens)[:, None]
    return ref.at[pl.ds(row, self._padded), pl.ds(column, width)], exists

  @property
  def _padded(self):
    return max(16, pl.next_power_of_2(self.sizes.tokens))

  def load(self, ref, column, width):
    """Some columns of all tokens; zero past the last."""
    at, mask = self._at(ref, self.example * self.sizes.tokens, column, width)
    return plgpu.load(at, mask=mask, other=0.0)

  def store(self, ref, column, value):
    """The reverse of `load`."""
    row = self.example * self.sizes.tokens
    at, mask = self._at(ref, row, column, value.shape[1])
    plgpu.store(at, value.astype(ref.dtype), mask=mask)

  def factors(self, refs):
    """`(turn, scale)`: cosines and sines times the rows' scale, and it alone.

    `()` and None where there are none.
    """
    # Known only when run, so that what begins there may reach past the end.
    start = 0 * self.head
    turn, scale = [], None
    for ref in refs[: 2 * self.sizes.turned]:
      at, mask = self._at(ref, start, start, ref.shape[1])
      table = plgpu.load(at, mask=mask, other=0.0)
      turn.append(table.astype(jnp.float32))
    if self.sizes.scaled:
      at = pl.ds(self.example * self.sizes.tokens, self._padded)
      exists = jnp.arange(self._padded) < self.sizes.tokens
      scale = plgpu.load(refs[-1].at[at], mask=exists, other=0.0)[:, None]
      turn = [table * scale for table in turn]
    return turn, scale

  def pair(self, ref, which, factors):
    """The halves of its queries or keys, turned together."""
    column, half = self.first(which), self.sizes.half
    halves = tuple(
      self.load(ref, first, half) for first in (column, column + half)
    )
    return _turned(halves, factors, 1)

  def values(self, ref, which=2, scale=None):
    found = self.load(ref, self.first(which), 2 * self.sizes.half)
    return found if scale is None else (found * scale).astype(found.dtype)


def _turned(halves, factors, sign):
  """Both halves turned by `sign` times the angles, and scaled."""
  turn, scale = factors
  a, b = (x.astype(jnp.float32) for x in halves)
  if turn:
    cos, sin = turn
    a, b = a * cos - sign * b * sin, b * cos + sign * a * sin
  elif scale is not None:
    a, b = a * scale, b * scale
  return tuple(x.astype(halves[0].dtype) for x in (a, b))


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
  # By powers of two, which the GPU has an instruction for; scaled and shifted
  # by one more.
  scale = np.float32(np.log2(np.e) / np.sqrt(2 * half))
  e = jnp.exp2(score * scale - (score.max(1) * scale)[:, None])
  return e, 1 / e.sum(1)


def _forward_kernel(qkv_ref, *refs, sizes):
  *factor_refs, seen_ref = refs
  head = _Head(pl.program_id(1), pl.program_id(0), sizes)
  factors = head.factors(factor_refs)
  k = head.pair(qkv_ref, 1, factors)
  v = head.values(qkv_ref, scale=factors[1])
  q = head.pair(qkv_ref, 0, factors)
  e, norm = _shares(q, k, sizes.tokens)
  seen = tiling.dot(e.astype(v.dtype), v) * norm[:, None]
  head.store(seen_ref, head.first(0), seen)


def _sizes(qkv_NE, turn, plan, scale_N):
  rows, columns = qkv_NE.shape
  return _Sizes(
    tokens=rows // plan.batch,
    heads=plan.heads,
    half=columns // (6 * plan.heads),
    turned=bool(turn),
    scaled=scale_N is not None,
  )


@functools.partial(jax.jit, static_argnames='plan')
def forward(
  qkv_NE: Array,
  turn: tuple[Array, ...],
  plan: Plan,
  scale_N: Array | None = None,
) -> Array:
  """What is seen `[N, D]` of `qkv [N, 3 D]`, whose rows are times the scale."""
  rows, columns = qkv_NE.shape
  scales = [] if scale_N is None else [scale_N]
  return pl.pallas_call(
    functools.partial(
      _forward_kernel, sizes=_sizes(qkv_NE, turn, plan, scale_N)
    ),
    out_shape=jax.ShapeDtypeStruct((rows, columns // 3), qkv_NE.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(num_warps=plan.tiles.warps),
    interpret=plan.interpret,
    name='attention_forward',
  )(qkv_NE, *turn, *scales)


def _backward_kernel(qkv_ref, g_ref, *refs, sizes, each):
  *factor_refs, dqkv_ref = refs
  dtype = qkv_ref.dtype
  first, example = pl.program_id(0) * each, pl.program_id(1)

  def body(index, carry):
    head = _Head(example, first + index, sizes)
    factors = head.factors(factor_refs)
    k = head.pair(qkv_ref, 1, factors)
    v = head.values(qkv_ref, scale=factors[1])
    q = head.pair(qkv_ref, 0, factors)
    g = head.values(g_ref, 0)
    e, norm = _shares(q, k, sizes.tokens)
    share = e * norm[:, None]
    # First, so that the shares in 16 bits need not be kept.
    dv = tiling.dot(share.astype(dtype).T, g)
    if sizes.scaled:
      dv *= factors[1]
    head.store(dqkv_ref, head.first(2), dv)
    dshare = tiling.dot(g, v.T)
    dscore = share * (dshare - (share * dshare).sum(1)[:, None])
    dscore = (dscore * np.float32(1 / np.sqrt(2 * sizes.half))).astype(dtype)

    def store(which, pair):
      for place, value in enumerate(_turned(pair, factors, -1)):
        column = head.first(which) + place * sizes.half
        head.store(dqkv_ref, column, value)

    store(0, tuple(tiling.dot(dscore, x) for x in k))
    store(1, tuple(tiling.dot(dscore.T, x) for x in q))
    return carry

  # In a loop the next head is on its way while one is worked on.
  jax.lax.fori_loop(0, each, body, 0)


@functools.partial(jax.jit, static_argnames='plan')
def backward(
  qkv_NE: Array,
  turn: tuple[Array, ...],
  g_NE: Array,
  plan: Plan,
  scale_N: Array | None = None,
) -> Array:
  """The gradient of `qkv`, of which the rows times the scale were taken."""
  tiles, heads = plan.tiles, plan.heads
  each = max(n for n in range(1, tiles.back_heads + 1) if heads % n == 0)
  scales = [] if scale_N is None else [scale_N]
  sizes = _sizes(qkv_NE, turn, plan, scale_N)
  return pl.pallas_call(
    functools.partial(_backward_kernel, sizes=sizes, each=each),
    out_shape=jax.ShapeDtypeStruct(qkv_NE.shape, qkv_NE.dtype),
    grid=(heads // each, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.back_warps, num_stages=tiles.back_stages
    ),
    interpret=plan.interpret,
    name='attention_backward',
  )(qkv_NE, g_NE, *turn, *scales)
