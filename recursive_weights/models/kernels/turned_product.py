"""Queries, keys and values of attention as one product (Hopper GPUs).

Queries and keys leave it turned, and all of them times the scale of their row,
so that the kernel of attention has nothing left to do to them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import hopper


def fits(tiles: hopper.Tiles, head: int) -> bool:
  """Whether tiles hold whole heads, whose halves are wide enough to copy."""
  return tiles.columns % head == 0 and head % 32 == 0


@functools.partial(jax.jit, static_argnames=('head', 'plan'))
def turned(
  x_ND: Array,
  qkv_DE: Array,
  turn: tuple[Array, ...],
  scale_N: Array | None,
  head: int,
  plan: hopper.Plan,
) -> Array:
  """`s x qkv` `[N, 3 D]`, queries and keys turned by their place's angles.

  Args:
    x_ND: rows, an example's places one after the other.
    qkv_DE: `[D, 3 D]`.
    turn: cosines and sines `[T, K / 2]` by place; () for none.
    scale_N: of rows; None for one.
    head: K.
    plan: `plan.turned` are the tiles.

  Raises:
    ValueError: sizes that are not whole tiles, or tiles without whole heads.
  """
  tiles = plan.turned
  if not fits(tiles, head):
    raise ValueError(f'{tiles} do not hold whole heads of {head}')
  (total, width), columns = x_ND.shape, qkv_DE.shape[1]
  dtype, half = x_ND.dtype, head // 2
  grid = hopper.grid_of(tiles, total, width, columns)
  steps = width // tiles.width
  pieces = tiles.columns // half
  angles, period, start = _angles(turn, half, tiles.rows, dtype)

  def block(x_gmem, w_gmem, cos_gmem, sin_gmem, *refs):
    *scale_gmem, out_gmem = refs

    def scoped(left, right, full, empty, factors, outs, ready, free):
      loop = hopper.Loop(grid, steps, tiles, full, empty, alone=True)

      def fetch(number, step, slot, arrived):
        row, column = loop.place(number)
        along = pl.ds(step * tiles.width, tiles.width)
        for gmem, at, smem in (
          (x_gmem, (pl.ds(row, tiles.rows), along), left),
          (w_gmem, (along, pl.ds(column, tiles.columns)), right),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], arrived)
        # As soon as what is multiplied first is on its way.
        pl.when(step == min(tiles.stages, steps) - 1)(
          functools.partial(fetch_angles, number, row, column)
        )

      def fetch_angles(number, row, column):
        which = jax.lax.rem(number, 2)

        @pl.when(number >= 2)
        def _wait():
          plgpu.barrier_wait(free.at[which])

        place = jax.lax.rem(row, period)
        # Values are not turned.
        first = jnp.where(column < 2 * width, place, place + start)
        at = pl.ds(pl.multiple_of(first, 8), tiles.rows)
        for term, gmem in enumerate((cos_gmem, sin_gmem)):
          smem = factors.at[which, term]
          plgpu.copy_gmem_to_smem(gmem.at[at], smem, ready.at[which])

      def tile(number):
        row, column = loop.place(number)
        which = jax.lax.rem(number, 2)
        scale = None
        for gmem in scale_gmem:
          scale = hopper.scale_of(gmem, row, tiles.rows, plan)

        def accumulate(acc):
          def issue(slot):
            plgpu.wgmma(acc, left.at[slot], right.at[slot])

          loop.contract(number, issue, 1)
          product = hopper.scaled(acc[...], scale)
          plgpu.barrier_wait(ready.at[which])
          cos, sin = (
            factors[which, term].astype(jnp.float32) for term in (0, 1)
          )
          for piece in range(0, pieces, 2):
            a, b = (
              product[:, first * half : (first + 1) * half]
              for first in (piece, piece + 1)
            )
            for place, value in enumerate(
              (a * cos - b * sin, b * cos + a * sin)
            ):
              outs[which, piece + place] = value.astype(dtype)
          plgpu.commit_smem()
          rows = pl.ds(row, tiles.rows)
          for piece in range(pieces):
            at = rows, pl.ds(column + piece * half, half)
            plgpu.copy_smem_to_gmem(outs.at[which, piece], out_gmem.at[at])
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(free.at[which])

        shape = tiles.rows, tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      def drain(mine):
        def body(number, carry):
          plgpu.barrier_wait(free.at[jax.lax.rem(number, 2)])
          return carry

        jax.lax.fori_loop(jnp.maximum(mine - 2, 0), mine, body, 0)

      loop.run(fetch, tile, drain)

    pl.run_scoped(
      scoped,
      left=hopper.memory(tiles.rows, tiles.width, dtype, tiles.stages),
      right=hopper.memory(tiles.width, tiles.columns, dtype, tiles.stages),
      factors=hopper.memory(tiles.rows, half, angles[0].dtype, 2, 2),
      outs=hopper.memory(tiles.rows, half, dtype, 2, pieces),
      ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
      free=plgpu.Barrier(num_arrivals=1, num_barriers=2),
      **hopper.barriers(tiles.stages, 2, alone=True),
      collective_axes='group',
    )

  scales = [] if scale_N is None else [scale_N]
  out_type = jax.ShapeDtypeStruct((total, columns), dtype)
  return hopper.launch(block, out_type, plan, x_ND, qkv_DE, *angles, *scales)


def _angles(turn, half, rows, dtype):
  """Cosines and sines `[2 (P + rows), K / 2]`, P, and where the others begin.

  Tiles begin at multiples of eight rows, so places come again after P rows, a
  multiple of both. The second half of them turns by nothing.
  """
  if turn:
    tokens = turn[0].shape[0]
    period = math.lcm(tokens, 8)
    places = jnp.arange(period + rows) % tokens
    cos, sin = (table[places] for table in turn)
  else:
    period = 8
    cos = jnp.ones((period + rows, half), dtype)
    sin = jnp.zeros_like(cos)
  tables = (
    jnp.concatenate([cos, jnp.ones_like(cos)]),
    jnp.concatenate([sin, jnp.zeros_like(sin)]),
  )
  return tables, period, period + rows
