"""The products of a channel half as Hopper kernels (Pallas, Mosaic GPU).

Of the three warpgroups of a block two multiply and one fetches tiles through
the copy engine. A block goes through all its tiles in one loop, so that the
next tile is on its way while one is finished. The gated unit is applied to the
accumulators: gate and up are written nowhere, or (`Plan.keep`) once, for the
backward pass.
"""

import functools
import itertools
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
  after the next step's are under way.
  """

  rows: int = 128
  columns: int = 128
  width: int = 64
  stages: int = 3
  ahead: bool = False


class Plan(NamedTuple):
  """Tiles of the kernels.

  keep: gate, up and the hidden units are kept for the backward pass, which then
  has one product (`kept`) for three (`backward`); None: as the caller finds
  best. blocks: of a launch; 0 for as many as the device has multiprocessors.
  interpret: for `plgpu.kernel`.
  """

  gated: Tiles = Tiles(stages=4, ahead=True)
  backward: Tiles = Tiles(columns=64)
  kept: Tiles = Tiles(stages=4, ahead=True)
  keep: bool | None = None
  blocks: int = 0
  interpret: Any = False


def available() -> bool:
  """Whether the first device is of the Hopper generation."""
  return kernels.generation() == kernels.HOPPER


def fits(rows: int, width: int, hidden: int, plan: Plan) -> bool:
  """Whether the sizes are whole tiles."""
  sizes = rows, width, hidden
  return all(
    size % tile == 0
    for tiles in (plan.gated, plan.kept if plan.keep else plan.backward)
    for size, tile in zip(
      sizes, (tiles.rows, tiles.width, tiles.columns), strict=True
    )
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
  """The tiles of a block: `grid` of them in all, `steps` products in each."""

  grid: tuple[int, int]
  steps: int
  tiles: Tiles
  full: Any
  empty: Any

  def place(self, number):
    """Row and column of a block's tile; neighbours share rows."""
    blocks = jax.lax.axis_size('block')
    index = jax.lax.axis_index('block') + number * blocks
    row = jax.lax.div(index, self.grid[1]) * self.tiles.rows
    return row, jax.lax.rem(index, self.grid[1]) * self.tiles.columns

  def run(self, fetch: Callable, tile: Callable) -> None:
    """`fetch(number, step, slot)` and `tile(number)`, all of a block."""
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
        fetch(number, jax.lax.rem(step, self.steps), slot)
        return carry

      count = mine * self.steps
      jax.lax.fori_loop(0, count, body, 0)

      def settle(step, carry):
        plgpu.barrier_wait(self.empty.at[jax.lax.rem(step, self.tiles.stages)])
        return carry

      # A barrier is left only when all its turns were seen.
      first = jnp.maximum(count - self.tiles.stages, 0)
      jax.lax.fori_loop(first, count, settle, 0)

    @pl.when(group < 2)
    def _compute():
      plgpu.set_max_registers(232, action='increase')

      def body(number, carry):
        tile(number)
        return carry

      jax.lax.fori_loop(0, mine, body, 0)
      plgpu.wait_smem_to_gmem(0)

  def contract(self, number, issue, products):
    """`issue(slot)` for all steps of a tile, as what they need comes in."""
    stages = self.tiles.stages

    def body(step, carry):
      at = number * self.steps + step
      slot = jax.lax.rem(at, stages)
      plgpu.barrier_wait(self.full.at[slot])
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


def _barriers(stages, copies):
  return {
    'full': plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    'empty': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  }


def _store(memory, value, gmem):
  """A group's tile to device memory, once its last one is out."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  memory[...] = value.astype(memory.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(memory, gmem)


# Under jit, so that equal calls of a program are lowered once.
@functools.partial(jax.jit, static_argnames=('plan', 'keep'))
def gated(
  gate_DF: Array, up_DF: Array, x_ND: Array, plan: Plan, keep: bool = False
) -> tuple[Array, ...]:
  """`silu(x gate) * (x up)` `[N, F]`, and if `keep` both products `[N, 2F]`."""
  tiles = plan.gated
  (total, width), hidden = x_ND.shape, gate_DF.shape[1]
  dtype, half = x_ND.dtype, tiles.rows // 2
  grid = total // tiles.rows, hidden // tiles.columns

  def block(x_gmem, gate_gmem, up_gmem, out_gmem, both_gmem=None):
    def scoped(xs, gates, ups, outs, full, empty):
      loop = _Loop(grid, width // tiles.width, tiles, full, empty)
      group = jax.lax.axis_index('group')

      def fetch(number, step, slot):
        row, column = loop.place(number)
        inner = pl.ds(step * tiles.width, tiles.width)
        outer = pl.ds(column, tiles.columns)
        rows = pl.ds(row, tiles.rows)
        plgpu.copy_gmem_to_smem(
          x_gmem.at[rows, inner], xs.at[slot], full.at[slot]
        )
        for gmem, smem in ((gate_gmem, gates), (up_gmem, ups)):
          plgpu.copy_gmem_to_smem(
            gmem.at[inner, outer], smem.at[slot], full.at[slot]
          )

      def tile(number):
        row, column = loop.place(number)

        def accumulate(gate_acc, up_acc):
          def issue(slot):
            x = xs.at[slot, pl.ds(group * half, half)]
            plgpu.wgmma(gate_acc, x, gates.at[slot])
            plgpu.wgmma(up_acc, x, ups.at[slot])

          loop.contract(number, issue, 2)
          gate, up = gate_acc[...], up_acc[...]
          value = gate * tiling.sigmoid(gate) * up
          places = [(out_gmem, column, value)]
          if keep:
            places += [(both_gmem, column, gate)]
            places += [(both_gmem, column + hidden, up)]
          for gmem, first, value in places:
            at = pl.ds(row + group * half, half), pl.ds(first, tiles.columns)
            _store(outs.at[group], value, gmem.at[at])

        shape = half, tiles.columns
        pl.run_scoped(accumulate, *(plgpu.ACC(shape, jnp.float32),) * 2)

      loop.run(fetch, tile)

    pl.run_scoped(
      scoped,
      xs=_memory(tiles.rows, tiles.width, dtype, tiles.stages),
      gates=_memory(tiles.width, tiles.columns, dtype, tiles.stages),
      ups=_memory(tiles.width, tiles.columns, dtype, tiles.stages),
      outs=_memory(half, tiles.columns, dtype, 2),
      **_barriers(tiles.stages, 3),
      collective_axes='group',
    )

  out_type = [jax.ShapeDtypeStruct((total, hidden), dtype)]
  if keep:
    out_type += [jax.ShapeDtypeStruct((total, 2 * hidden), dtype)]
  return _launch(block, tuple(out_type), plan, x_ND, gate_DF, up_DF)


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

      def fetch(number, step, slot):
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
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], full.at[slot])

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


@functools.partial(jax.jit, static_argnames='plan')
def kept_backward(
  down_FD: Array, both_N2F: Array, dr_ND: Array, plan: Plan
) -> Array:
  """Gradients `[N, 2F]` of gate and up, from the products that `gated` kept."""
  tiles = plan.kept
  (total, width), hidden = dr_ND.shape, down_FD.shape[0]
  dtype, half = dr_ND.dtype, tiles.rows // 2
  grid = total // tiles.rows, hidden // tiles.columns
  steps = width // tiles.width
  # By this step of a tile the one before is left, without waiting for it.
  late = min(tiles.stages, steps - 1)

  def block(dr_gmem, down_gmem, both_gmem, dboth_gmem):
    def scoped(left, downs, kept, full, empty, ready, free):
      loop = _Loop(grid, steps, tiles, full, empty)
      group = jax.lax.axis_index('group')

      def fetch(number, step, slot):
        row, column = loop.place(number)
        inner = pl.ds(step * tiles.width, tiles.width)
        outer = pl.ds(column, tiles.columns)
        for gmem, at, smem in (
          (dr_gmem, (pl.ds(row, tiles.rows), inner), left),
          (down_gmem, (inner, outer), downs),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], full.at[slot])

        @pl.when(step == late)
        def _products():
          plgpu.barrier_wait(free)
          for which, whose in itertools.product((0, 1), repeat=2):
            rows = pl.ds(row + whose * half, half)
            columns = pl.ds(column + which * hidden, tiles.columns)
            plgpu.copy_gmem_to_smem(
              both_gmem.at[rows, columns], kept.at[which, whose], ready
            )

      def tile(number):
        row, column = loop.place(number)
        # The last tile's results are on their way from where these come.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(free)

        def accumulate(dh_acc):
          def issue(slot):
            mine = left.at[slot, pl.ds(group * half, half)]
            plgpu.wgmma(dh_acc, mine, downs.at[slot])

          loop.contract(number, issue, 1)
          plgpu.barrier_wait(ready)
          places = [kept.at[which, group] for which in (0, 1)]
          u, v = (place[...].astype(jnp.float32) for place in places)
          du, dv, _ = tiling.swiglu_backward(u, v, dh_acc[...])
          for place, value in zip(places, (du, dv), strict=True):
            place[...] = value.astype(dtype)
          plgpu.commit_smem()
          rows = pl.ds(row + group * half, half)
          for which, place in enumerate(places):
            columns = pl.ds(column + which * hidden, tiles.columns)
            plgpu.copy_smem_to_gmem(place, dboth_gmem.at[rows, columns])

        pl.run_scoped(accumulate, plgpu.ACC((half, tiles.columns), jnp.float32))

      loop.run(fetch, tile)

    pl.run_scoped(
      scoped,
      left=_memory(tiles.rows, tiles.width, dtype, tiles.stages),
      downs=_memory(tiles.width, tiles.columns, dtype, tiles.stages),
      kept=_memory(half, tiles.columns, dtype, 2, 2),
      ready=plgpu.Barrier(num_arrivals=4),
      free=plgpu.Barrier(num_arrivals=2),
      **_barriers(tiles.stages, 2),
      collective_axes='group',
    )

  out_type = jax.ShapeDtypeStruct((total, 2 * hidden), dtype)
  return _launch(block, out_type, plan, dr_ND, down_FD.T, both_N2F)
