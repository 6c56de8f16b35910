"""How a product runs on a Hopper GPU (Pallas, Mosaic GPU).

Of the three warpgroups of a block two multiply and one fetches tiles through
the copy engine. A block goes through all its tiles in one loop, so that the
next tile is on its way while one is finished.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recursive_weights.scans import kernels


class Tiles(NamedTuple):
  """How a product is cut.

  rows, columns: of a block's tile. width: of a step of the contraction, of
  which `stages` are fetched ahead. ahead: a step's products are waited for
  after the next step's are under way (then two stages at least). sets: of
  memory for what is added to products, one or two tiles' at a time.
  """

  rows: int = 128
  columns: int = 128
  width: int = 64
  stages: int = 3
  ahead: bool = False
  sets: int = 2


class Plan(NamedTuple):
  """Tiles of the kernels, as fast as any tried on an H200 at width 512.

  gated: of the gated unit. backward: of its backward pass. kept, joined,
  spread: of `kernels.deferred_norm`, the backward pass of a unit whose products
  were kept, products with one term and with two. turned: of
  `kernels.turned_product`. defer: whether those of deferred norms are used;
  None: where that is better. blocks: of a launch; 0 for as many as the device
  has multiprocessors. interpret: for `plgpu.kernel`.
  """

  gated: Tiles = Tiles(stages=4)
  backward: Tiles = Tiles(columns=64)
  kept: Tiles = Tiles(columns=64, stages=6, ahead=True)
  joined: Tiles = Tiles(stages=5, ahead=True)
  spread: Tiles = Tiles(stages=5, ahead=True, sets=1)
  turned: Tiles = Tiles(stages=5, ahead=True)
  defer: bool | None = None
  blocks: int = 0
  interpret: Any = False


def available() -> bool:
  """Whether the first device is of the Hopper generation."""
  return kernels.generation() == kernels.HOPPER


def whole(tiles: Tiles, rows: int, inner: int, columns: int) -> bool:
  """Whether the sizes of a product are whole tiles.

  Raises:
    ValueError: tiles by which groups would wait for each other for ever.
  """
  if tiles.stages < (2 if tiles.ahead else 1) or tiles.sets not in (1, 2):
    raise ValueError(
      'stages must be > 0, > 1 with ahead, and sets 1 or 2 (each group sees '
      f'when its own is ready), got {tiles}'
    )
  return (
    rows > 0
    and rows % tiles.rows == 0
    and inner % tiles.width == 0
    and columns % tiles.columns == 0
  )


def grid_of(tiles: Tiles, rows: int, inner: int, columns: int):
  """Tiles of a product `[rows, inner] [inner, columns]`, along both axes.

  Raises:
    ValueError: its sizes are not whole tiles.
  """
  if not whole(tiles, rows, inner, columns):
    raise ValueError(f'{(rows, inner, columns)} are not whole {tiles}')
  return rows // tiles.rows, columns // tiles.columns


def memory(rows, columns, dtype, *slots):
  """Shared memory `[*slots, rows, columns]` as the tensor units read it."""
  swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
  transforms = (
    plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM((*slots, rows, columns), dtype, transforms=transforms)


def launch(block, out_type, plan, *args):
  """`block(*refs of args, *refs of results)` in three groups of threads."""
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


class Loop(NamedTuple):
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
    self, fetch: Callable, tile: Callable, drain: Callable = lambda mine: None
  ) -> None:
    """All tiles of a block.

    Args:
      fetch: `(number, step, slot, full)`: starts the copies into a slot, which
        arrive at the barrier `full`.
      tile: `(number)`: makes a tile, by `contract`.
      drain: `(mine)`: waits, when all `mine` tiles are fetched, for what their
        ends still hold.
    """
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

      drain(mine)

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
    """All steps of a tile, as what they need comes in.

    Args:
      number: the tile's, of the block.
      issue: `(slot)`: starts the products of a step.
      products: how many it starts.
    """
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


def barriers(stages, copies, alone=False):
  """Of slots: `full` once `copies` are in, `empty` once all have read."""
  fulls = 2 * stages if alone else stages
  return {
    'full': plgpu.Barrier(num_arrivals=copies, num_barriers=fulls),
    'empty': plgpu.Barrier(num_arrivals=1 if alone else 2, num_barriers=stages),
  }


def scale_of(gmem, first, size, plan):
  """Factors of rows `[size]`, or None."""
  return None if gmem is None else read(gmem, first, size, plan)


def read(gmem, first, size, plan):
  """Some rows, from device memory as they are needed."""
  at = gmem.at[pl.ds(first, size)]
  # The simulator lacks the load that a GPU needs here.
  if plan.interpret:
    return at[...]
  # Before jax 0.11 it asks for an index, from then on it refuses one.
  index = () if jax.__version_info__ >= (0, 11) else ((),)
  return plgpu.load(at, *index, optimized=False)


def scaled(value, scale):
  """Rows times their factors; None is one."""
  if scale is None:
    return value
  return value * jax.lax.broadcast_in_dim(scale, value.shape, (0,))


def store(memory, value, gmem):
  """A group's tile to device memory, once its last one is out."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  memory[...] = value.astype(memory.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(memory, gmem)
