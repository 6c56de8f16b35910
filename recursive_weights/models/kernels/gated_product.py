"""The gated unit of a channel half on a Hopper GPU, see `kernels.hopper`.

It is applied to the accumulators of its two products, so that gate and up are
written nowhere or once, for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import hopper, tiling


def fits(rows: int, width: int, hidden: int, plan: hopper.Plan) -> bool:
  """Whether `gated` and `gated_backward` take these sizes."""
  return all(
    hopper.whole(tiles, rows, width, hidden)
    for tiles in (plan.gated, plan.backward)
  )


# Under jit, so that equal calls of a program are lowered once.
@functools.partial(jax.jit, static_argnames=('plan', 'keep'))
def gated(
  gate_DF: Array,
  up_DF: Array,
  x_ND: Array,
  plan: hopper.Plan,
  keep: bool = False,
  scale_N: Array | None = None,
) -> tuple[Array, ...]:
  """`silu(x gate) * (x up)` `[N, F]`, and if `keep` both products `[N, 2F]`.

  Rows of x are taken times their scale.

  Raises:
    ValueError: sizes that are not whole tiles.
  """
  tiles = plan.gated
  (total, width), hidden = x_ND.shape, gate_DF.shape[1]
  dtype, half = x_ND.dtype, tiles.rows // 2
  grid = hopper.grid_of(tiles, total, width, hidden)

  def block(x_gmem, pair_gmem, *refs):
    refs = list(refs)
    scale_gmem = None if scale_N is None else refs.pop(0)
    out_gmem, *both_gmem = refs

    def scoped(xs, weights, outs, full, empty):
      loop = hopper.Loop(grid, width // tiles.width, tiles, full, empty)
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
        scale = hopper.scale_of(scale_gmem, row + group * half, half, plan)

        def accumulate(acc):
          def issue(slot):
            x = xs.at[slot, pl.ds(group * half, half)]
            plgpu.wgmma(acc, x, weights.at[slot])

          loop.contract(number, issue, 1)
          both = hopper.scaled(acc[...], scale)
          gate, up = both[:, : tiles.columns], both[:, tiles.columns :]
          value = tiling.silu(gate) * up
          places = [(out_gmem, column, value)]
          for gmem in both_gmem:
            places += [(gmem, column, gate), (gmem, column + hidden, up)]
          for gmem, first, value in places:
            at = pl.ds(row + group * half, half), pl.ds(first, tiles.columns)
            hopper.store(outs.at[group], value, gmem.at[at])

        shape = half, 2 * tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      loop.run(fetch, tile)

    pl.run_scoped(
      scoped,
      xs=hopper.memory(tiles.rows, tiles.width, dtype, tiles.stages),
      weights=hopper.memory(
        tiles.width, 2 * tiles.columns, dtype, tiles.stages
      ),
      outs=hopper.memory(half, tiles.columns, dtype, 2),
      **hopper.barriers(tiles.stages, 2),
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
  return hopper.launch(block, tuple(out_type), plan, *args)


@functools.partial(jax.jit, static_argnames='plan')
def gated_backward(
  gate_DF: Array,
  up_DF: Array,
  down_FD: Array,
  x_ND: Array,
  dr_ND: Array,
  plan: hopper.Plan,
) -> tuple[Array, Array]:
  """Gradients `[N, 2F]` of gate and up, and the hidden units `[N, F]` again.

  Of h = silu(u) v, u = x gate, v = x up, dh = dr down^T: see
  `tiling.swiglu_backward`.

  Raises:
    ValueError: sizes that are not whole tiles.
  """
  tiles = plan.backward
  (total, width), hidden = x_ND.shape, gate_DF.shape[1]
  dtype, half = x_ND.dtype, tiles.rows // 2
  grid = hopper.grid_of(tiles, total, width, hidden)
  steps = width // tiles.width

  def block(x_gmem, dr_gmem, gate_gmem, up_gmem, down_gmem, both_gmem, h_gmem):
    def scoped(xs, drs, gates, ups, downs, outs, full, empty):
      loop = hopper.Loop(grid, steps, tiles, full, empty)
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
            hopper.store(outs.at[group], value, gmem.at[at])

        shape = half, tiles.columns
        pl.run_scoped(accumulate, *(plgpu.ACC(shape, jnp.float32),) * 3)

      loop.run(fetch, tile)

    def stage(*shape):
      return hopper.memory(*shape, dtype, tiles.stages)

    pl.run_scoped(
      scoped,
      xs=stage(tiles.rows, tiles.width),
      drs=stage(tiles.rows, tiles.width),
      gates=stage(tiles.width, tiles.columns),
      ups=stage(tiles.width, tiles.columns),
      downs=stage(tiles.width, tiles.columns),
      outs=hopper.memory(half, tiles.columns, dtype, 2),
      **hopper.barriers(tiles.stages, 5),
      collective_axes='group',
    )

  out_type = (
    jax.ShapeDtypeStruct((total, 2 * hidden), dtype),
    jax.ShapeDtypeStruct((total, hidden), dtype),
  )
  args = x_ND, dr_ND, gate_DF, up_DF, down_FD.T
  return hopper.launch(block, out_type, plan, *args)
