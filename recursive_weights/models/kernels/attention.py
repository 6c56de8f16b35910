"""Attention over few tokens as one kernel (Pallas, Triton).

A program takes some heads of an example, one after the other. It reads their
queries, keys and values where they lie beside each other, and writes what was
seen where the output projection reads it: no transposes, and no scores in
memory. Rows come before tokens, so that what a program reads lies in a few
pages of memory. Queries and keys have been turned before; the backward pass,
which makes the scores again, turns their gradients back.
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

  warps: of a program, which takes as many heads, one after the other, as divide
  them all, `heads` at most, `stages` of them on their way or at work.
  back_warps: of one of the backward pass, which takes one head.
  """

  warps: int = 8
  heads: int = 8
  stages: int = 2
  back_warps: int = 8


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
  (seen_ND,) = forward(turned(qkv_NE, turn, plan), plan)
  return seen_ND


def _attend_forward(qkv_NE, turn, plan):
  turned_NE = turned(qkv_NE, turn, plan)
  seen_ND, log_HN = forward(turned_NE, plan, keep=True)
  return seen_ND, (turned_NE, seen_ND, log_HN, turn)


def _attend_backward(plan, saved, g_ND):
  *kept, turn = saved
  still = jax.tree.map(jnp.zeros_like, turn)
  return backward(*kept, g_ND, plan, turn), still


_attend.defvjp(_attend_forward, _attend_backward)


def turned(qkv_NE: Array, turn: tuple[Array, ...], plan: Plan) -> Array:
  """Queries and keys turned by their token's angles, values as they are."""
  if not turn:
    return qkv_NE
  rows, columns = qkv_NE.shape
  tokens, half = turn[0].shape
  exact = qkv_NE.astype(jnp.float32)
  a, b = jnp.unstack(exact.reshape(plan.batch, tokens, 3, -1, 2, half), axis=4)
  # Values are not turned.
  turns = jnp.arange(3).reshape(1, 1, 3, 1, 1) < 2
  cos, sin = (table[None, :, None, None].astype(jnp.float32) for table in turn)
  cos, sin = jnp.where(turns, cos, 1), jnp.where(turns, sin, 0)
  both = jnp.stack([a * cos - b * sin, b * cos + a * sin], 4)
  return both.reshape(rows, columns).astype(qkv_NE.dtype)


class _Sizes(NamedTuple):
  """Of all programs; `width` the entries of a head."""

  tokens: int
  heads: int
  width: int


class _Head(NamedTuple):
  """A head of an example."""

  example: Any
  head: Any
  sizes: _Sizes

  @property
  def _padded(self):
    return max(16, pl.next_power_of_2(self.sizes.tokens))

  def rows(self, first=None):
    """All its tokens as one power of two, and which of them exist."""
    tokens = self.sizes.tokens
    first = self.example * tokens if first is None else first
    return pl.ds(first, self._padded), jnp.arange(self._padded) < tokens

  def load(self, ref, which=0):
    """Its queries (or what is alone), keys (1) or values (2); else zero."""
    rows, exists = self.rows()
    at = ref.at[rows, pl.ds(self._column(which), self.sizes.width)]
    return plgpu.load(at, mask=exists[:, None], other=0.0)

  def store(self, ref, which, values):
    """The reverse of `load`, of parts side by side."""
    rows, exists = self.rows()
    for part, value in enumerate(values):
      width = value.shape[1]
      at = ref.at[rows, pl.ds(self._column(which) + part * width, width)]
      plgpu.store(at, value.astype(ref.dtype), mask=exists[:, None])

  def _column(self, which):
    return (which * self.sizes.heads + self.head) * self.sizes.width

  def logs(self, ref):
    """Where it keeps a number for each token."""
    rows, exists = self.rows()
    return ref.at[self.head, rows], exists

  def table(self, ref):
    """A table of all tokens, in float32."""
    # Known only when run, so that what begins there may reach past the end.
    start = 0 * self.head
    rows, exists = self.rows(start)
    at = ref.at[rows, pl.ds(start, ref.shape[1])]
    found = plgpu.load(at, mask=exists[:, None], other=0.0)
    return found.astype(jnp.float32)

  def scale(self, ref):
    """Factors of all its tokens, of which those past the last are zero."""
    rows, exists = self.rows()
    return plgpu.load(ref.at[rows], mask=exists, other=0.0)[:, None]


def _powers(width):
  """What makes a product of a query and a key a power of two.

  The GPU has an instruction for those.
  """
  return np.float32(np.log2(np.e) / np.sqrt(width))


def _per_program(heads, most):
  return max(n for n in range(1, most + 1) if heads % n == 0)


def _loop(each, sizes, run):
  """`run(head)` for the heads of a program, the next one on its way."""
  first, example = pl.program_id(0) * each, pl.program_id(1)

  def body(index, carry):
    run(_Head(example, first + index, sizes))
    return carry

  if each == 1:
    body(0, None)
  else:
    jax.lax.fori_loop(0, each, body, 0)


def _forward_kernel(qkv_ref, seen_ref, *log_refs, sizes, each):
  fast = tiling.rough(qkv_ref.dtype)

  def run(head):
    q, k, v = (head.load(qkv_ref, which) for which in range(3))
    score = tiling.dot(q, k.T)
    exists = jnp.arange(score.shape[1])[None] < sizes.tokens
    score = jnp.where(exists, score, -1e30)
    power = _powers(sizes.width)
    top = score.max(1) * power
    e = tiling.exp2_fma(score, power, -top[:, None], fast)
    total = e.sum(1)
    seen = tiling.dot(e.astype(v.dtype), v) * (1 / total)[:, None]
    head.store(seen_ref, 0, [seen])
    for ref in log_refs:
      at, exists = head.logs(ref)
      plgpu.store(at, top + jnp.log2(total), mask=exists)

  _loop(each, sizes, run)


@functools.partial(jax.jit, static_argnames=('plan', 'keep'))
def forward(qkv_NE: Array, plan: Plan, keep: bool = False) -> tuple[Array, ...]:
  """What is seen `[N, D]` of `qkv [N, 3 D]`.

  If `keep`, also the logarithms `[H, N]` to the base of two of the sums of
  exponentials, for `backward`.
  """
  rows, columns = qkv_NE.shape
  tiles, heads = plan.tiles, plan.heads
  each = _per_program(heads, tiles.heads)
  seen = jax.ShapeDtypeStruct((rows, columns // 3), qkv_NE.dtype)
  log = jax.ShapeDtypeStruct((heads, rows), jnp.float32)
  return pl.pallas_call(
    functools.partial(_forward_kernel, sizes=_sizes(qkv_NE, plan), each=each),
    out_shape=(seen, log) if keep else (seen,),
    grid=(heads // each, plan.batch),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=plan.interpret,
    name='attention_forward',
  )(qkv_NE)


def _sizes(qkv_NE, plan):
  rows, columns = qkv_NE.shape
  return _Sizes(
    tokens=rows // plan.batch,
    heads=plan.heads,
    width=columns // (3 * plan.heads),
  )


def _backward_kernel(qkv_ref, seen_ref, log_ref, g_ref, *refs, sizes, turns):
  *factor_refs, dqkv_ref = refs
  dtype = qkv_ref.dtype
  fast = tiling.rough(dtype)
  head = _Head(pl.program_id(1), pl.program_id(0), sizes)
  q, k, v = (head.load(qkv_ref, which) for which in range(3))
  g, seen = head.load(g_ref), head.load(seen_ref)
  at, exists = head.logs(log_ref)
  log = plgpu.load(at, mask=exists, other=0.0)

  # Keys along rows: so shares and the gradients of scores are factors of
  # products as they lie, and one alone is turned over.
  share = tiling.exp2_fma(
    tiling.dot(k, q.T), _powers(sizes.width), -log[None], fast
  )
  # Past the last token keys are zero, so shares could be infinite there.
  share = jnp.where(exists[:, None], share, 0)
  dv = tiling.dot(share.astype(dtype), g)
  # sum_j share_ij dshare_ij, from what was seen.
  mean = (seen.astype(jnp.float32) * g.astype(jnp.float32)).sum(1)
  scaled = np.float32(1 / np.sqrt(sizes.width))
  dscore = share * tiling.fma(
    tiling.dot(v, g.T), scaled, -(mean * scaled)[None], fast
  )
  dscore = dscore.astype(dtype)

  turn = [head.table(ref) for ref in factor_refs[: 2 * turns]]
  scale = None
  for ref in factor_refs[2 * turns :]:
    scale = head.scale(ref)
    turn = [table * scale for table in turn]

  def back(value):
    if not turn:
      return [value if scale is None else value * scale]
    cos, sin = turn
    a, b = jax.lax.split(value, (sizes.width // 2,) * 2, axis=1)
    return [
      tiling.fma(a, cos, b * sin, fast),
      tiling.fma(b, cos, -(a * sin), fast),
    ]

  head.store(dqkv_ref, 2, [dv if scale is None else dv * scale])
  head.store(dqkv_ref, 1, back(tiling.dot(dscore, q)))
  head.store(dqkv_ref, 0, back(tiling.dot(dscore.T, k)))


@functools.partial(jax.jit, static_argnames='plan')
def backward(
  qkv_NE: Array,
  seen_ND: Array,
  log_HN: Array,
  g_ND: Array,
  plan: Plan,
  turn: tuple[Array, ...] = (),
  scale_N: Array | None = None,
) -> Array:
  """The gradient of what became `qkv` by being turned, and times the scale."""
  scales = [] if scale_N is None else [scale_N]
  return pl.pallas_call(
    functools.partial(
      _backward_kernel, sizes=_sizes(qkv_NE, plan), turns=bool(turn)
    ),
    out_shape=jax.ShapeDtypeStruct(qkv_NE.shape, qkv_NE.dtype),
    grid=(plan.heads, plan.batch),
    compiler_params=plgpu.CompilerParams(num_warps=plan.tiles.back_warps),
    interpret=plan.interpret,
    name='attention_backward',
  )(qkv_NE, seen_ND, log_HN, g_ND, *turn, *scales)
