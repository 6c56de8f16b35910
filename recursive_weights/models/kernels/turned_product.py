"""Queries, keys and values of attention as one product (Hopper GPUs).

Queries and keys leave it turned, and all of them times the scale of their row,
so that the kernels of attention have nothing left to do to them.
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
  # No tile has keys and values.
  down, across = hopper.grid_of(tiles, total, width, width)
  grid = down, 3 * across
  steps, pieces = width // tiles.width, tiles.columns // half
  angles, period = _angles(turn, half, tiles.rows, dtype)

  def block(x_gmem, w_gmem, cos_gmem, sin_gmem, *refs):
    *scale_gmem, out_gmem = refs

    def scoped(left, right, outs, full, empty):
      loop = hopper.Loop(grid, steps, tiles, full, empty, alone=True)
      mine = outs.at[jax.lax.axis_index('group')]

      def fetch(number, step, slot, ready):
        row, column = loop.place(number)
        along = pl.ds(step * tiles.width, tiles.width)
        for gmem, at, smem in (
          (x_gmem, (pl.ds(row, tiles.rows), along), left),
          (w_gmem, (along, pl.ds(column, tiles.columns)), right),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], ready)

      def tile(number):
        row, column = loop.place(number)
        place = jax.lax.rem(row, period)
        # Values are not turned.
        first = jnp.where(
          column < 2 * width, place, place + period + tiles.rows
        )
        read = functools.partial(hopper.read, size=tiles.rows, plan=plan)
        cos, sin = (read(gmem, first) for gmem in (cos_gmem, sin_gmem))
        scale = [read(gmem, row) for gmem in scale_gmem]

        def accumulate(acc):
          def issue(slot):
            plgpu.wgmma(acc, left.at[slot], right.at[slot])

          loop.contract(number, issue, 1)
          product = hopper.scaled(acc[...], *(scale or [None]))
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          c, s = cos.astype(jnp.float32), sin.astype(jnp.float32)
          for piece in range(0, pieces, 2):
            at = piece * half
            a, b = product[:, at : at + half], product[:, at + half : at + head]
            mine[piece] = (a * c - b * s).astype(dtype)
            mine[piece + 1] = (b * c + a * s).astype(dtype)
          plgpu.commit_smem()
          rows = pl.ds(row, tiles.rows)
          for piece in range(pieces):
            at = rows, pl.ds(column + piece * half, half)
            plgpu.copy_smem_to_gmem(mine.at[piece], out_gmem.at[at])

        shape = tiles.rows, tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      loop.run(fetch, tile)

    pl.run_scoped(
      scoped,
      left=hopper.memory(tiles.rows, tiles.width, dtype, tiles.stages),
      right=hopper.memory(tiles.width, tiles.columns, dtype, tiles.stages),
      outs=hopper.memory(tiles.rows, half, dtype, 2, pieces),
      **hopper.barriers(tiles.stages, 2, alone=True),
      collective_axes='group',
    )

  scales = [] if scale_N is None else [scale_N]
  out_type = jax.ShapeDtypeStruct((total, columns), dtype)
  return hopper.launch(block, out_type, plan, x_ND, qkv_DE, *angles, *scales)


def _angles(turn, half, rows, dtype):
  """Cosines and sines `[2 (P + rows), K / 2]` of rows, and P.

  Tiles begin at multiples of eight rows, so places come again after P rows, a
  multiple of both. The second half of the rows turns by nothing.
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
  return (
    jnp.concatenate([cos, jnp.ones_like(cos)]),
    jnp.concatenate([sin, jnp.zeros_like(sin)]),
  ), period
