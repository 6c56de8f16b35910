"""The products of a block as Hopper kernels (Pallas, Mosaic GPU).

Of the three warpgroups of a block two multiply and one fetches tiles through
the copy engine. A block goes through all its tiles in one loop, so that the
next tile is on its way while one is finished. What follows a product is done to
the accumulators: the gated unit, of which gate and up are written nowhere or
once, for the backward pass; and sums with what lies in memory.

Rows may have factors `scale [N]`: a norm that was left out, see
`kernels.deferred_norm`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import tiling
from recursive_weights.scans import kernels


class Tiles(NamedTuple):
  """How a product is cut.

  rows, columns: of a block's tile. width: of a step of the contraction, of
  which `stages` are fetched ahead. ahead: a step's products are waited for
  after the next step's are under way. sets: of memory for what is added to
  products, so many tiles' at a time.
  """

  rows: int = 128
  columns: int = 128
  width: int = 64
  stages: int = 3
  ahead: bool = False
  sets: int = 2


class Plan(NamedTuple):
  """Tiles of the kernels, each as fast as any that was tried on an H200.

  gated: of the gated unit. backward: of its backward pass. kept, joined,
  spread: of `kernels.deferred_norm`, the backward pass of a unit whose products
  were kept, products with one term and with two. defer: whether those are used;
  None: where that is better. blocks: of a launch; 0 for as many as the device
  has multiprocessors. interpret: for `plgpu.kernel`.
  """

  gated: Tiles = Tiles(stages=4)
  backward: Tiles = Tiles(columns=64)
  kept: Tiles = Tiles(columns=64, stages=6, ahead=True)
  joined: Tiles = Tiles(stages=5, ahead=True)
  spread: Tiles = Tiles(stages=5, ahead=True, sets=1)
  defer: bool | None = None
  blocks: int = 0
  interpret: Any = False


def available() -> bool:
  """Whether the first device is of the Hopper generation."""
  return kernels.generation() == kernels.HOPPER


def whole(tiles: Tiles, rows: int, inner: int, columns: int) -> bool:
  """Whether the sizes of a product are whole tiles."""
  return (
    rows % tiles.rows == 0
    and inner % tiles.width == 0
    and columns % tiles.columns == 0
  )


def fits(rows: int, width: int, hidden: int, plan: Plan) -> bool:
  """Whether `gated` and `gated_backward` take these sizes."""
  return all(
    whole(tiles, rows, width, hidden) for tiles in (plan.gated, plan.backward)
  )


def _memory(rows, columns, dtype, *slots):
  """Shared memory `[*slots, rows, columns]` as the tensor units read it."""
  swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
  transforms = (
    plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM((*slots, rows, columns), dtype, transforms=transforms)


def _launch(block, out_type, plan, *args):
  blocks = plan.blocks or getattr(jax.devices()[0], 'core_count', 132)
  return plgpu.kernel(
    block,
    out_type=out_type,
    grid=(blocks,),
    grid_names=('block',),
    num_threads=3,
    thread_name='group',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
    ),
    interpret=plan.interpret,
  )(*args)


class _Loop(NamedTuple):
  """The tiles of a block: `grid` of them in all, `steps` products in each.

  Both groups work on a tile, or where `alone` each on every other: then one
  multiplies while the other finishes.
  """

  grid: tuple[int, int]
  steps: int
  tiles: Tiles
  full: Any
  empty: Any
  alone: bool = False

  def place(self, number):
    """Row and column of a block's tile; neighbours share rows."""
    blocks = jax.lax.axis_size('block')
    index = jax.lax.axis_index('block') + number * blocks
    row = jax.lax.div(index, self.grid[1]) * self.tiles.rows
    return row, jax.lax.rem(index, self.grid[1]) * self.tiles.columns

  def run(
    self, fetch: Callable, tile: Callable, settle: Callable = lambda mine: None
  ) -> None:
    """`fetch(number, step, slot, full)` and `tile(number)`, all of a block."""
    blocks, block = jax.lax.axis_size('block'), jax.lax.axis_index('block')
    total = self.grid[0] * self.grid[1]
    mine = jax.lax.div(total - block + blocks - 1, blocks)
    group = jax.lax.axis_index('group')

    @pl.when(group == 2)
    def _fetch():
      plgpu.set_max_registers(40, action='decrease')

      def body(step, carry):
        slot = jax.lax.rem(step, self.tiles.stages)

        @pl.when(step >= self.tiles.stages)
        def _wait():
          plgpu.barrier_wait(self.empty.at[slot])

        number = jax.lax.div(step, self.steps)
        full = self._full(slot, jax.lax.rem(number, 2))
        fetch(number, jax.lax.rem(step, self.steps), slot, full)
        return carry

      count = mine * self.steps
      jax.lax.fori_loop(0, count, body, 0)

      settle(mine)

      def leave(step, carry):
        plgpu.barrier_wait(self.empty.at[jax.lax.rem(step, self.tiles.stages)])
        return carry

      # A barrier is left only when all its turns were seen.
      first = jnp.maximum(count - self.tiles.stages, 0)
      jax.lax.fori_loop(first, count, leave, 0)

    @pl.when(group < 2)
    def _compute():
      plgpu.set_max_registers(232, action='increase')

      def body(turn, carry):
        tile(2 * turn + group if self.alone else turn)
        return carry

      turns = jax.lax.div(mine + 1 - group, 2) if self.alone else mine
      jax.lax.fori_loop(0, turns, body, 0)
      plgpu.wait_smem_to_gmem(0)

  def _full(self, slot, group):
    """Whoever waits for a barrier must see all of its turns."""
    return self.full.at[slot + group * self.tiles.stages * self.alone]

  def contract(self, number, issue, products):
    """`issue(slot)` for all steps of a tile, as what they need comes in."""
    stages, group = self.tiles.stages, jax.lax.axis_index('group')

    def body(step, carry):
      at = number * self.steps + step
      slot = jax.lax.rem(at, stages)
      plgpu.barrier_wait(self._full(slot, group))
      issue(slot)
      if not self.tiles.ahead:
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.empty.at[slot])
        return carry
      plgpu.wgmma_wait(products)

      @pl.when(step > 0)
      def _release():
        before = jax.lax.rem(at + stages - 1, stages)
        plgpu.barrier_arrive(self.empty.at[before])

      return carry

    jax.lax.fori_loop(0, self.steps, body, 0)
    if self.tiles.ahead:
      plgpu.wgmma_wait(0)
      slot = jax.lax.rem((number + 1) * self.steps - 1, stages)
      plgpu.barrier_arrive(self.empty.at[slot])


def _barriers(stages, copies, alone=False):
  fulls = 2 * stages if alone else stages
  return {
    'full': plgpu.Barrier(num_arrivals=copies, num_barriers=fulls),
    'empty': plgpu.Barrier(num_arrivals=1 if alone else 2, num_barriers=stages),
  }


def _scale(gmem, first, size, plan):
  """Factors of rows `[size]`, or None."""
  if gmem is None:
    return None
  at = gmem.at[pl.ds(first, size)]
  # The simulator lacks the load that a GPU needs here.
  return at[...] if plan.interpret else plgpu.load(at, (), optimized=False)


def _scaled(value, scale):
  """Rows times their factors; None is one."""
  if scale is None:
    return value
  return value * jax.lax.broadcast_in_dim(scale, value.shape, (0,))


def _store(memory, value, gmem):
  """A group's tile to device memory, once its last one is out."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  memory[...] = value.astype(memory.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(memory, gmem)


# Under jit, so that equal calls of a program are lowered once.
@functools.partial(jax.jit, static_argnames=('plan', 'keep'))
def gated(
  gate_DF: Array,
  up_DF: Array,
  x_ND: Array,
  plan: Plan,
  keep: bool = False,
  scale_N: Array | None = None,
) -> tuple[Array, ...]:
  """`silu(x gate) * (x up)` `[N, F]`, and if `keep` both products `[N, 2F]`.

  Rows of x are taken times their scale.
  """
  tiles = plan.gated
  (total, width), hidden = x_ND.shape, gate_DF.shape[1]
  dtype, half = x_ND.dtype, tiles.rows // 2
  grid = total // tiles.rows, hidden // tiles.columns

  def block(x_gmem, pair_gmem, *refs):
    refs = list(refs)
    scale_gmem = None if scale_N is None else refs.pop(0)
    out_gmem, *both_gmem = refs

    def scoped(xs, weights, outs, full, empty):
      loop = _Loop(grid, width // tiles.width, tiles, full, empty)
      group = jax.lax.axis_index('group')

      def fetch(number, step, slot, ready):
        row, column = loop.place(number)
        inner = pl.ds(step * tiles.width, tiles.width)
        pair = pl.ds(2 * column, 2 * tiles.columns)
        for gmem, at, smem in (
          (x_gmem, (pl.ds(row, tiles.rows), inner), xs),
          (pair_gmem, (inner, pair), weights),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], ready)

      def tile(number):
        row, column = loop.place(number)
        scale = _scale(scale_gmem, row + group * half, half, plan)

        def accumulate(acc):
          def issue(slot):
            x = xs.at[slot, pl.ds(group * half, half)]
            plgpu.wgmma(acc, x, weights.at[slot])

          loop.contract(number, issue, 1)
          both = _scaled(acc[...], scale)
          gate, up = both[:, : tiles.columns], both[:, tiles.columns :]
          value = gate * tiling.sigmoid(gate) * up
          places = [(out_gmem, column, value)]
          for gmem in both_gmem:
            places += [(gmem, column, gate), (gmem, column + hidden, up)]
          for gmem, first, value in places:
            at = pl.ds(row + group * half, half), pl.ds(first, tiles.columns)
            _store(outs.at[group], value, gmem.at[at])

        shape = half, 2 * tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      loop.run(fetch, tile)

    pl.run_scoped(
      scoped,
      xs=_memory(tiles.rows, tiles.width, dtype, tiles.stages),
      weights=_memory(tiles.width, 2 * tiles.columns, dtype, tiles.stages),
      outs=_memory(half, tiles.columns, dtype, 2),
      **_barriers(tiles.stages, 2),
      collective_axes='group',
    )

  # Tiles of both side by side: the wider a product, the less is read twice.
  shape = width, hidden // tiles.columns, tiles.columns
  pair = jnp.stack([gate_DF.reshape(shape), up_DF.reshape(shape)], 2)
  out_type = [jax.ShapeDtypeStruct((total, hidden), dtype)]
  if keep:
    out_type += [jax.ShapeDtypeStruct((total, 2 * hidden), dtype)]
  scales = [] if scale_N is None else [scale_N]
  args = x_ND, pair.reshape(width, 2 * hidden), *scales
  return _launch(block, tuple(out_type), plan, *args)


@functools.partial(jax.jit, static_argnames='plan')
def gated_backward(
  gate_DF: Array,
  up_DF: Array,
  down_FD: Array,
  x_ND: Array,
  dr_ND: Array,
  plan: Plan,
) -> tuple[Array, Array]:
  """Gradients `[N, 2F]` of gate and up, and the hidden units `[N, F]` again."""
  tiles = plan.backward
  (total, width), hidden = x_ND.shape, gate_DF.shape[1]
  dtype, half = x_ND.dtype, tiles.rows // 2
  grid = total // tiles.rows, hidden // tiles.columns
  steps = width // tiles.width

  def block(x_gmem, dr_gmem, gate_gmem, up_gmem, down_gmem, both_gmem, h_gmem):
    def scoped(xs, drs, gates, ups, downs, outs, full, empty):
      loop = _Loop(grid, steps, tiles, full, empty)
      group = jax.lax.axis_index('group')

      def fetch(number, step, slot, ready):
        row, column = loop.place(number)
        inner = pl.ds(step * tiles.width, tiles.width)
        outer = pl.ds(column, tiles.columns)
        rows = pl.ds(row, tiles.rows)
        for gmem, smem, at in (
          (x_gmem, xs, (rows, inner)),
          (dr_gmem, drs, (rows, inner)),
          (gate_gmem, gates, (inner, outer)),
          (up_gmem, ups, (inner, outer)),
          (down_gmem, downs, (inner, outer)),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], ready)

      def tile(number):
        row, column = loop.place(number)

        def accumulate(gate_acc, up_acc, dh_acc):
          def issue(slot):
            x, dr = (
              smem.at[slot, pl.ds(group * half, half)] for smem in (xs, drs)
            )
            plgpu.wgmma(gate_acc, x, gates.at[slot])
            plgpu.wgmma(up_acc, x, ups.at[slot])
            plgpu.wgmma(dh_acc, dr, downs.at[slot])

          loop.contract(number, issue, 3)
          u, v, dh = gate_acc[...], up_acc[...], dh_acc[...]
          rows = pl.ds(row + group * half, half)
          du, dv, h = tiling.swiglu_backward(u, v, dh)
          for gmem, first, value in (
            (both_gmem, column, du),
            (both_gmem, column + hidden, dv),
            (h_gmem, column, h),
          ):
            at = rows, pl.ds(first, tiles.columns)
            _store(outs.at[group], value, gmem.at[at])

        shape = half, tiles.columns
        pl.run_scoped(accumulate, *(plgpu.ACC(shape, jnp.float32),) * 3)

      loop.run(fetch, tile)

    def stage(*shape):
      return _memory(*shape, dtype, tiles.stages)

    pl.run_scoped(
      scoped,
      xs=stage(tiles.rows, tiles.width),
      drs=stage(tiles.rows, tiles.width),
      gates=stage(tiles.width, tiles.columns),
      ups=stage(tiles.width, tiles.columns),
      downs=stage(tiles.width, tiles.columns),
      outs=_memory(half, tiles.columns, dtype, 2),
      **_barriers(tiles.stages, 5),
      collective_axes='group',
    )

  out_type = (
    jax.ShapeDtypeStruct((total, 2 * hidden), dtype),
    jax.ShapeDtypeStruct((total, hidden), dtype),
  )
  args = x_ND, dr_ND, gate_DF, up_DF, down_FD.T
  return _launch(block, out_type, plan, *args)


class _Terms(NamedTuple):
  """Tiles that are added to a tile's products, and where its results are put.

  memory: `[sets, terms, rows, columns]`, a set for each of so many tiles.
  ready: of a group; free: of a set.
  """

  memory: Any
  ready: Any
  free: Any

  @staticmethod
  def scratch(tiles, dtype, count):
    """For `count` terms."""
    shape = tiles.rows, tiles.columns
    return {
      'memory': _memory(*shape, dtype, tiles.sets, count),
      'ready': plgpu.Barrier(num_arrivals=count, num_barriers=2),
      'free': plgpu.Barrier(num_arrivals=1, num_barriers=tiles.sets),
    }

  def _set(self, number):
    return jax.lax.rem(number, self.memory.shape[0])

  def fetch(self, number, places):
    """Terms of a tile, from their `places` `(gmem, row, column)`."""
    which = self._set(number)

    @pl.when(number >= self.memory.shape[0])
    def _wait():
      plgpu.barrier_wait(self.free.at[which])

    ready = self.ready.at[jax.lax.rem(number, 2)]
    _, _, rows, columns = self.memory.shape
    for term, (gmem, row, column) in enumerate(places):
      at = pl.ds(row, rows), pl.ds(column, columns)
      plgpu.copy_gmem_to_smem(gmem.at[at], self.memory.at[which, term], ready)

  def settle(self, mine):
    """Waits until the last of `mine` tiles are out."""

    def body(number, carry):
      plgpu.barrier_wait(self.free.at[self._set(number)])
      return carry

    first = jnp.maximum(mine - self.memory.shape[0], 0)
    jax.lax.fori_loop(first, mine, body, 0)

  def read(self, number):
    """In float32."""
    plgpu.barrier_wait(self.ready.at[jax.lax.rem(number, 2)])
    places = self.memory.at[self._set(number)]
    count = self.memory.shape[1]
    return [places[term].astype(jnp.float32) for term in range(count)]

  def store(self, number, values, places):
    """Results, where the terms were, and from there to their places."""
    which = self._set(number)
    smems = [self.memory.at[which, term] for term in range(len(values))]
    for smem, value in zip(smems, values, strict=True):
      smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    _, _, rows, columns = self.memory.shape
    for smem, (gmem, row, column) in zip(smems, places, strict=True):
      at = pl.ds(row, rows), pl.ds(column, columns)
      plgpu.copy_smem_to_gmem(smem, gmem.at[at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(self.free.at[which])


def _product(
  finish: Callable,
  a_NK: Array,
  w_KD: Array,
  terms: list[tuple[Array, int]],
  scales: list[Array | None],
  *,
  results: int,
  sums: bool,
  tiles: Tiles,
  plan: Plan,
) -> tuple[Array, ...]:
  """What `finish` makes of `a w [N, D]` and of terms like it, tile by tile.

  Args:
    finish: `(product, terms, scales) -> (results, sums)`: of a tile's float32
      values, as many results as asked for, not more than terms, and a sum a row
      or None.
    terms: `(array, shift)`, of which columns `shift ... shift + D` are taken.
    scales: of rows `[N]`, or None.
    results: how many.
    sums: whether `finish` has them.

  Returns:
    The results side by side `[N, results D]`, and sums `[P, N]` of P tiles a
    row.
  """
  (total, inner), width = a_NK.shape, w_KD.shape[1]
  grid = total // tiles.rows, width // tiles.columns
  steps = inner // tiles.width
  given = [scale for scale in scales if scale is not None]

  def block(a_gmem, w_gmem, *refs):
    refs = list(refs)
    term_gmems = [(refs.pop(0), shift) for _, shift in terms]
    scale_gmems = [None if s is None else refs.pop(0) for s in scales]
    out_gmem, *sums_gmem = refs

    def scoped(left, right, full, empty, **scratch):
      loop = _Loop(grid, steps, tiles, full, empty, alone=True)
      held = _Terms(**scratch)

      def fetch(number, step, slot, ready):
        row, column = loop.place(number)
        along = pl.ds(step * tiles.width, tiles.width)
        for gmem, at, smem in (
          (a_gmem, (pl.ds(row, tiles.rows), along), left),
          (w_gmem, (along, pl.ds(column, tiles.columns)), right),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], ready)
        places = [(gmem, row, column + shift) for gmem, shift in term_gmems]
        # As soon as what is multiplied first is on its way.
        late = step == min(tiles.stages, steps) - 1
        pl.when(late)(functools.partial(held.fetch, number, places))

      def tile(number):
        row, column = loop.place(number)
        factors = [_scale(gmem, row, tiles.rows, plan) for gmem in scale_gmems]

        def accumulate(acc):
          def issue(slot):
            plgpu.wgmma(acc, left.at[slot], right.at[slot])

          loop.contract(number, issue, 1)
          product = acc[...]
          found = held.read(number)
          values, of_rows = finish(product, found, factors)
          for gmem in sums_gmem:
            part = jax.lax.div(column, tiles.columns)
            gmem[part, pl.ds(row, tiles.rows)] = of_rows
          places = [
            (out_gmem, row, column + which * width) for which in range(results)
          ]
          held.store(number, values, places)

        shape = tiles.rows, tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      loop.run(fetch, tile, held.settle)

    pl.run_scoped(
      scoped,
      left=_memory(tiles.rows, tiles.width, a_NK.dtype, tiles.stages),
      right=_memory(tiles.width, tiles.columns, a_NK.dtype, tiles.stages),
      **_Terms.scratch(tiles, a_NK.dtype, len(terms)),
      **_barriers(tiles.stages, 2, alone=True),
      collective_axes='group',
    )

  out_type = [jax.ShapeDtypeStruct((total, results * width), a_NK.dtype)]
  if sums:
    out_type += [jax.ShapeDtypeStruct((grid[1], total), jnp.float32)]
  arrays = [array for array, _ in terms]
  return _launch(block, tuple(out_type), plan, a_NK, w_KD, *arrays, *given)


@functools.partial(jax.jit, static_argnames='plan')
def kept_backward(
  down_FD: Array,
  both_N2F: Array,
  dr_ND: Array,
  plan: Plan,
  scale_N: Array | None = None,
) -> tuple[Array, ...]:
  """Gradients `[N, 2F]` of gate and up, from the products that `gated` kept.

  With a scale, rows of them are times it, and there are sums `[P, N]`, over P
  parts of a row, of gate times its gradient (which is not).
  """

  def finish(dh, terms, scales):
    du, dv, _ = tiling.swiglu_backward(*terms, dh)
    (scale,) = scales
    of_rows = None if scale is None else (terms[0] * du).sum(1)
    return [_scaled(du, scale), _scaled(dv, scale)], of_rows

  return _product(
    finish,
    dr_ND,
    down_FD.T,
    [(both_N2F, 0), (both_N2F, down_FD.shape[0])],
    [scale_N],
    results=2,
    sums=scale_N is not None,
    tiles=plan.kept,
    plan=plan,
  )


@functools.partial(jax.jit, static_argnames=('tiles', 'plan', 'squares'))
def added(
  a_NK: Array,
  w_KD: Array,
  terms: tuple[tuple[Array, Array | None], ...],
  tiles: Tiles,
  plan: Plan,
  squares: bool = False,
) -> tuple[Array, ...]:
  """`a w + sum_i s_i x_i` `[N, D]` of terms `(x [N, D], s [N])`, s = None one.

  If `squares`, also sums `[P, N]` of its squares, over P parts of a row.
  """

  def finish(product, found, scales):
    for value, scale in zip(found, scales, strict=True):
      product += _scaled(value, scale)
    return [product], (product * product).sum(1) if squares else None

  return _product(
    finish,
    a_NK,
    w_KD,
    [(x_ND, 0) for x_ND, _ in terms],
    [scale_N for _, scale_N in terms],
    results=1,
    sums=squares,
    tiles=tiles,
    plan=plan,
  )
