"""The channel half of a block with its gated unit inside the product's kernel.

One kernel makes both products of a tile and their gated unit, so that gate and
up never pass through memory. A second kernel holds whole rows: of the down
projection, residual and norm (`Tiles.down`), or of the last two, after a
product by XLA. Wide halves on Hopper GPUs are `kernels.deferred_norm`'s.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import (
  gated_product,
  hopper,
  row_norm,
  tiling,
)

# From this width on whole rows of the down projection are more than a program's
# registers hold.
WIDE = 384


class Tiles(NamedTuple):
  """How the work is cut; powers of two, at least 16.

  rows, hidden, width: of a product's tile and of a step of its contraction.
  warps, stages: of a program, and of its loads in flight. `back_*`: the same
  of the backward pass; `down_*`: of the down projection, whose tile has all
  columns. down: whether that is a kernel too, else `norm_*` are of the residual
  and the norm alone; None: where the width is less than `WIDE`. `norm_*` are
  also of the norm's backward pass. wide: the plan of the kernels for Hopper
  GPUs, which take the place of these in 16-bit types where sizes are whole
  tiles of theirs, of all where norms are deferred; None for never.
  """

  rows: int = 128
  hidden: int = 128
  width: int = 64
  warps: int = 8
  stages: int = 3
  back_rows: int = 128
  back_hidden: int = 64
  back_width: int = 64
  back_warps: int = 8
  back_stages: int = 3
  down: bool | None = None
  down_rows: int = 64
  down_width: int = 64
  down_warps: int = 8
  down_stages: int = 3
  norm_rows: int = 8
  norm_warps: int = 4
  wide: hopper.Plan | None = hopper.Plan()


def fits(width: int, hidden: int) -> bool:
  """Whether the kernels take these sizes."""
  return width % 16 == 0 and hidden % 16 == 0


def apply(
  params: Mapping[str, Array],
  x_TBD: Array,
  *,
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms_D(x + (silu(x gate) * (x up)) down)`, all over the width.

  The same as `layers.trm_block.channel_half`: products in the dtype of x, sums
  and the norm in float32. The backward pass computes gate and up again.

  Args:
    params: `gate [D, F]`, `up [D, F]`, `down [F, D]`.
    x_TBD: the state; any axes may stand before D.
    tiles: see `Tiles`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: sizes that `fits` refuses.
  """
  width, hidden = params['gate'].shape
  if not fits(width, hidden):
    raise ValueError(
      f'width and hidden must be multiples of 16, got {width} and {hidden}'
    )
  tiles = _fit(tiles, width, hidden)
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  wide = tiles.wide
  if wide is not None:
    runs = wide.interpret or (not interpret and hopper.available())
    whole = gated_product.fits(x_TBD.size // width, width, hidden, wide)
    if not (runs and whole and x_TBD.dtype.itemsize == 2):
      tiles = tiles._replace(wide=None)
  y_ND = _mix(dict(params), x_TBD.reshape(-1, width), tiles, interpret)
  return y_ND.reshape(x_TBD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mix(params, x_ND, tiles, interpret):
  return _whole(params, x_ND, tiles, interpret)[0]


def project(
  down_FD: Array,
  hidden_NF: Array,
  x_ND: Array,
  *,
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms(x + hidden down)`, which saves y and not what it was made of.

  The half that follows saves y too, so that it costs nothing here.
  """
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  tiles = _fit(tiles, *down_FD.shape[::-1])
  return _project(down_FD, hidden_NF, x_ND, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _project(down_FD, hidden_NF, x_ND, tiles, interpret):
  return _projected(down_FD, hidden_NF, x_ND, tiles, interpret)[0]


def _project_forward(down_FD, hidden_NF, x_ND, tiles, interpret):
  y_ND, scale_N = _projected(down_FD, hidden_NF, x_ND, tiles, interpret)
  return y_ND, (down_FD, hidden_NF, y_ND, scale_N)


def _project_backward(tiles, interpret, saved, g_ND):
  down_FD, hidden_NF, y_ND, scale_N = saved
  dr_ND = _norm_backward(y_ND, scale_N, g_ND, tiles, interpret)
  dhidden_NF = dr_ND @ down_FD.astype(dr_ND.dtype).T
  ddown_FD = tiling.over_rows(hidden_NF, dr_ND).astype(down_FD.dtype)
  return ddown_FD, dhidden_NF, dr_ND


_project.defvjp(_project_forward, _project_backward)


def _projected(down_FD, hidden_NF, x_ND, tiles, interpret):
  """The result and its scale, 1 / root mean square."""
  down_FD = down_FD.astype(x_ND.dtype)
  if tiles.down:
    return _down(hidden_NF, down_FD, x_ND, tiles, interpret)
  options = _rows(tiles, interpret)
  return row_norm.forward(hidden_NF @ down_FD, x_ND, **options)


def _norm_backward(y_ND, scale_N, g_ND, tiles, interpret):
  options = _rows(tiles, interpret)
  return row_norm.backward(y_ND, g_ND, gradient_scale_N=scale_N, **options)


def _rows(tiles, interpret):
  return {
    'rows': tiles.norm_rows,
    'warps': tiles.norm_warps,
    'interpret': interpret,
  }


def _fit(tiles, width, hidden):
  """Tiles that divide the sizes."""
  tiles, divisor = tiles or Tiles(), tiling.divisor
  down = width < WIDE if tiles.down is None else tiles.down
  return tiles._replace(
    hidden=divisor(hidden, tiles.hidden),
    width=divisor(width, tiles.width),
    back_hidden=divisor(hidden, tiles.back_hidden),
    back_width=divisor(width, tiles.back_width),
    down=down and width == divisor(width, width),
    down_width=divisor(hidden, tiles.down_width),
  )


def _whole(params, x_ND, tiles, interpret):
  """The result and its scale."""
  gate_DF, up_DF, down_FD = _cast(params, x_ND.dtype)
  if tiles.wide:
    (hidden_NF,) = gated_product.gated(gate_DF, up_DF, x_ND, tiles.wide)
  else:
    hidden_NF = _gated(gate_DF, up_DF, x_ND, tiles, interpret)
  return _projected(down_FD, hidden_NF, x_ND, tiles, interpret)


def _mix_forward(params, x_ND, tiles, interpret):
  y_ND, scale_N = _whole(params, x_ND, tiles, interpret)
  return y_ND, (params, x_ND, y_ND, scale_N)


def _mix_backward(tiles, interpret, saved, g_ND):
  params, x_ND, y_ND, scale_N = saved
  weights = _cast(params, x_ND.dtype)
  dr_ND = _norm_backward(y_ND, scale_N, g_ND, tiles, interpret)
  if tiles.wide:
    dgate_up_N2F, hidden_NF = gated_product.gated_backward(
      *weights, x_ND, dr_ND, tiles.wide
    )
  else:
    dgate_up_N2F, hidden_NF = _gated_backward(
      *weights, x_ND, dr_ND, tiles, interpret
    )
  gate_up_D2F = jnp.concatenate(weights[:2], 1)
  dx_ND = dr_ND + dgate_up_N2F @ gate_up_D2F.T
  dgate_DF, dup_DF = jnp.split(tiling.over_rows(x_ND, dgate_up_N2F), 2, axis=1)
  dparams = {
    'gate': dgate_DF,
    'up': dup_DF,
    'down': tiling.over_rows(hidden_NF, dr_ND),
  }
  return {k: d.astype(params[k].dtype) for k, d in dparams.items()}, dx_ND


_mix.defvjp(_mix_forward, _mix_backward)


def _cast(params, dtype):
  return tuple(params[name].astype(dtype) for name in ('gate', 'up', 'down'))


def _gated_kernel(gate_ref, up_ref, x_ref, hidden_ref, *, tiles):
  total, width = x_ref.shape
  first = pl.program_id(1) * tiles.rows
  columns = pl.ds(pl.program_id(0) * tiles.hidden, tiles.hidden)

  def body(index, sums):
    at = pl.ds(index * tiles.width, tiles.width)
    x = tiling.load_rows(x_ref, first, tiles.rows, total, at)
    gate, up = sums
    gate += tiling.dot(x, gate_ref[at, columns])
    up += tiling.dot(x, up_ref[at, columns])
    return gate, up

  zeros = jnp.zeros((tiles.rows, tiles.hidden), jnp.float32)
  gate, up = jax.lax.fori_loop(0, width // tiles.width, body, (zeros, zeros))
  value = tiling.silu(gate, tiling.rough(x_ref.dtype)) * up
  tiling.store_rows(hidden_ref, value, first, total, columns)


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _gated(gate_DF, up_DF, x_ND, tiles, interpret):
  rows, hidden = x_ND.shape[0], gate_DF.shape[1]
  return pl.pallas_call(
    functools.partial(_gated_kernel, tiles=tiles),
    out_shape=jax.ShapeDtypeStruct((rows, hidden), x_ND.dtype),
    grid=(hidden // tiles.hidden, pl.cdiv(rows, tiles.rows)),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=interpret,
    name='channel_half_gated',
  )(gate_DF, up_DF, x_ND)


def _down_kernel(hidden_ref, down_ref, x_ref, y_ref, scale_ref, *, tiles):
  total, width = x_ref.shape
  first = pl.program_id(0) * tiles.down_rows

  def body(index, r):
    at = pl.ds(index * tiles.down_width, tiles.down_width)
    h = tiling.load_rows(hidden_ref, first, tiles.down_rows, total, at)
    return r + tiling.dot(h, down_ref[at, :])

  r = jnp.zeros((tiles.down_rows, width), jnp.float32)
  steps = hidden_ref.shape[1] // tiles.down_width
  r = jax.lax.fori_loop(0, steps, body, r)
  r += tiling.load_rows(
    x_ref, first, tiles.down_rows, total, slice(None)
  ).astype(r.dtype)
  scale = jax.lax.rsqrt((r * r).sum(1) / width + row_norm.EPSILON)
  tiling.store_rows(y_ref, r * scale[:, None], first, total, slice(None))
  mask = first + jnp.arange(tiles.down_rows) < total
  plgpu.store(scale_ref.at[pl.ds(first, tiles.down_rows)], scale, mask=mask)


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _down(hidden_NF, down_FD, x_ND, tiles, interpret):
  rows = x_ND.shape[0]
  return pl.pallas_call(
    functools.partial(_down_kernel, tiles=tiles),
    out_shape=(
      jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    grid=(pl.cdiv(rows, tiles.down_rows),),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.down_warps, num_stages=tiles.down_stages
    ),
    interpret=interpret,
    name='channel_half_down',
  )(hidden_NF, down_FD, x_ND)


def _gated_backward_kernel(
  gate_ref,
  up_ref,
  down_ref,
  x_ref,
  dr_ref,
  dgate_up_ref,
  hidden_ref,
  *,
  tiles,
):
  total, width = x_ref.shape
  hidden = gate_ref.shape[1]
  rows, units = tiles.back_rows, tiles.back_hidden
  first = pl.program_id(1) * rows
  start = pl.program_id(0) * units
  columns = pl.ds(start, units)

  def body(index, sums):
    at = pl.ds(index * tiles.back_width, tiles.back_width)
    x = tiling.load_rows(x_ref, first, rows, total, at)
    dr = tiling.load_rows(dr_ref, first, rows, total, at)
    gate, up, dh = sums
    gate += tiling.dot(x, gate_ref[at, columns])
    up += tiling.dot(x, up_ref[at, columns])
    dh += tiling.dot(dr, down_ref[columns, at].T)
    return gate, up, dh

  zeros = jnp.zeros((rows, units), jnp.float32)
  sums = jax.lax.fori_loop(
    0, width // tiles.back_width, body, (zeros, zeros, zeros)
  )
  dgate, dup, h = tiling.swiglu_backward(*sums, tiling.rough(x_ref.dtype))
  tiling.store_rows(dgate_up_ref, dgate, first, total, columns)
  tiling.store_rows(
    dgate_up_ref, dup, first, total, pl.ds(hidden + start, units)
  )
  tiling.store_rows(hidden_ref, h, first, total, columns)


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _gated_backward(gate_DF, up_DF, down_FD, x_ND, dr_ND, tiles, interpret):
  """Gradients `[N, 2F]` of gate and up, and the hidden units again."""
  rows, hidden = x_ND.shape[0], gate_DF.shape[1]
  return pl.pallas_call(
    functools.partial(_gated_backward_kernel, tiles=tiles),
    out_shape=(
      jax.ShapeDtypeStruct((rows, 2 * hidden), x_ND.dtype),
      jax.ShapeDtypeStruct((rows, hidden), x_ND.dtype),
    ),
    grid=(hidden // tiles.back_hidden, pl.cdiv(rows, tiles.back_rows)),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.back_warps, num_stages=tiles.back_stages
    ),
    interpret=interpret,
    name='channel_half_backward',
  )(gate_DF, up_DF, down_FD, x_ND, dr_ND)
