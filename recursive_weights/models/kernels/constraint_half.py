"""The constraint half of a symmetric block with its gated unit on chip.

The gate, what it multiplies and the hidden units pass through memory in no
forward pass: a program holds some rows of one cell, whose groups' pooled values
it looks up. Pooling itself is left to XLA.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import tiling
from recursive_weights.models.layers import symmetric_block

EPS = 1e-5


class Tiles(NamedTuple):
  """How the work is cut: rows (a power of two, at least 16), warps and loads in
  flight of a program, and the same of the backward pass."""

  rows: int = 64
  warps: int = 4
  stages: int = 2
  back_rows: int = 64
  back_warps: int = 4
  back_stages: int = 2


class _Plan(NamedTuple):
  """What is known before a trace: groups' names, sides of a box, and tiles."""

  families: tuple[str, ...]
  box: tuple[int, int]
  tiles: Tiles
  interpret: bool


def fits(width: int, pooled: int) -> bool:
  """Whether the kernels take these sizes: D, and P values of a family."""
  return all(n >= 16 and n & (n - 1) == 0 for n in (width, pooled))


def apply(
  params: Mapping[str, Array],
  x_TBVD: Array,
  *,
  families: tuple[str, ...],
  box: tuple[int, int],
  pool: str,
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms_D(x + (silu(x gate) * pool(x up)) down)`.

  The same as `layers.symmetric_block.constraint_half`: products in the dtype of
  x, sums and the norm in float32. The backward pass computes gates again.

  Args:
    params, x_TBVD, families, box, pool: see there.
    tiles: see `Tiles`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: sizes that `fits` refuses.
  """
  tokens, batch, digits, width = x_TBVD.shape
  size = params['gate'].shape[1] // len(families)
  if not fits(width, size):
    raise ValueError(
      f'width and pool_width must be powers of 2 from 16, got {width}, {size}'
    )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  values = symmetric_block.pooled(
    params, x_TBVD, families=families, box=box, pool=pool
  )
  rows = batch * digits
  cells = (tokens, batch, digits, size)
  flat = tuple(
    (jnp.broadcast_to(value, cells) if family == 'cell' else value).reshape(
      -1, rows, size
    )
    for family, value in zip(families, values, strict=True)
  )
  y_TND = _mix(
    {name: params[name] for name in ('gate', 'down')},
    x_TBVD.reshape(tokens, rows, width),
    flat,
    _Plan(families, box, tiles or Tiles(), interpret),
  )
  return y_TND.reshape(x_TBVD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mix(params, x_TND, values, plan):
  return _forward(_cast(params, x_TND.dtype), x_TND, values, plan)[0]


def _mix_forward(params, x_TND, values, plan):
  weights = _cast(params, x_TND.dtype)
  y_TND, scale_TN = _forward(weights, x_TND, values, plan)
  return y_TND, (params, x_TND, values, y_TND, scale_TN)


def _mix_backward(plan, saved, g_TND):
  params, x_TND, values, y_TND, scale_TN = saved
  weights = _cast(params, x_TND.dtype)
  dx_TND, dr_TND, dgate_TNF, hidden_TNF, dvalue_TNF = _backward(
    weights, x_TND, values, y_TND, scale_TN, g_TND, plan
  )
  rows = (-1, x_TND.shape[-1])
  hidden = (-1, hidden_TNF.shape[-1])
  dparams = {
    'gate': tiling.over_rows(x_TND.reshape(rows), dgate_TNF.reshape(hidden)),
    'down': tiling.over_rows(hidden_TNF.reshape(hidden), dr_TND.reshape(rows)),
  }
  dparams = {k: d.astype(params[k].dtype) for k, d in dparams.items()}
  parts = jnp.split(dvalue_TNF, len(values), axis=-1)
  dvalues = tuple(
    _gather(part, name, plan.box)
    for part, name in zip(parts, plan.families, strict=True)
  )
  return dparams, dx_TND, dvalues


_mix.defvjp(_mix_forward, _mix_backward)


def _cast(params, dtype):
  return params['gate'].astype(dtype), params['down'].astype(dtype)


def _gather(part_TNP, family, box):
  """Sums over the cells of each of a family's groups, `[G, N, P]`."""
  if family == 'cell':
    return part_TNP
  grid = (box[1], box[0], box[0], box[1])
  axes = symmetric_block.FAMILIES[family]
  whole = part_TNP.reshape(*grid, *part_TNP.shape[1:])
  sums = whole.sum(axes, dtype=jnp.float32)
  return sums.astype(part_TNP.dtype).reshape(-1, *part_TNP.shape[1:])


def _group(family, cell, box):
  """The number of a cell's group."""
  digits = box[0] * box[1]
  row, column = cell // digits, cell % digits
  return {
    'row': row,
    'column': column,
    'box': row // box[0] * box[0] + column // box[1],
    'cell': cell,
  }[family]


class _Rows:
  """Some rows of a cell, loaded and stored; rows past the end are zero."""

  def __init__(self, total, size):
    self.cell = pl.program_id(0)
    first = pl.program_id(1) * size
    self.rows = pl.ds(first, size)
    self.mask = None
    if total % size:
      self.mask = first + jnp.arange(size) < total

  def load(self, ref, group=None, columns=slice(None)):
    at = ref.at[self.cell if group is None else group, self.rows, columns]
    if self.mask is None:
      return plgpu.load(at)
    return plgpu.load(at, mask=self.mask[:, None], other=0.0)

  def store(self, ref, value, columns=slice(None)):
    at = ref.at[self.cell, self.rows, columns]
    mask = None if self.mask is None else self.mask[:, None]
    plgpu.store(at, value.astype(ref.dtype), mask=mask)

  def load_scale(self, ref):
    at = ref.at[self.cell, self.rows]
    if self.mask is None:
      return plgpu.load(at)
    return plgpu.load(at, mask=self.mask, other=0.0)

  def store_scale(self, ref, value):
    plgpu.store(ref.at[self.cell, self.rows], value, mask=self.mask)


def _forward_kernel(gate_ref, down_ref, x_ref, *refs, plan):
  *value_refs, y_ref, scale_ref = refs
  rows = _Rows(x_ref.shape[1], plan.tiles.rows)
  x = rows.load(x_ref)
  fast = tiling.rough(x_ref.dtype)
  r = x.astype(jnp.float32)
  size = value_refs[0].shape[-1]
  for index, (ref, family) in enumerate(
    zip(value_refs, plan.families, strict=True)
  ):
    at = pl.ds(index * size, size)
    gate = tiling.dot(x, gate_ref[:, at])
    value = rows.load(ref, _group(family, rows.cell, plan.box))
    hidden = tiling.silu(gate, fast) * value.astype(jnp.float32)
    r += tiling.dot(hidden.astype(x.dtype), down_ref[at, :])
  scale = jax.lax.rsqrt((r * r).sum(1) / x_ref.shape[-1] + EPS)
  rows.store(y_ref, r * scale[:, None])
  rows.store_scale(scale_ref, scale)


@functools.partial(jax.jit, static_argnames='plan')
def _forward(weights, x_TND, values, plan):
  tokens, rows, _ = x_TND.shape
  tiles = plan.tiles
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan),
    out_shape=(
      jax.ShapeDtypeStruct(x_TND.shape, x_TND.dtype),
      jax.ShapeDtypeStruct((tokens, rows), jnp.float32),
    ),
    grid=(tokens, pl.cdiv(rows, tiles.rows)),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=plan.interpret,
    name='constraint_half_forward',
  )(*weights, x_TND, *values)


def _backward_kernel(gate_ref, down_ref, x_ref, *refs, plan):
  *value_refs, y_ref, scale_ref, g_ref = refs[:-5]
  dx_ref, dr_ref, dgate_ref, hidden_ref, dvalue_ref = refs[-5:]
  rows = _Rows(x_ref.shape[1], plan.tiles.back_rows)
  dtype, fast = x_ref.dtype, tiling.rough(x_ref.dtype)

  # y = r s, s = (mean r^2 + eps)^(-1/2): dr = s (g - y mean(g y)).
  g = rows.load(g_ref).astype(jnp.float32)
  y = rows.load(y_ref).astype(jnp.float32)
  mean = (g * y).sum(1) / x_ref.shape[-1]
  scale = rows.load_scale(scale_ref)
  dr = (scale[:, None] * (g - y * mean[:, None])).astype(dtype)
  rows.store(dr_ref, dr)
  x = rows.load(x_ref)
  dx = dr.astype(jnp.float32)
  size = value_refs[0].shape[-1]
  for index, (ref, family) in enumerate(
    zip(value_refs, plan.families, strict=True)
  ):
    at = pl.ds(index * size, size)
    gate_weight = gate_ref[:, at]
    gate = tiling.dot(x, gate_weight)
    value = rows.load(ref, _group(family, rows.cell, plan.box))
    dhidden = tiling.dot(dr, down_ref[at, :].T)
    dgate, dvalue, hidden = tiling.swiglu_backward(
      gate, value.astype(jnp.float32), dhidden, fast
    )
    dgate = dgate.astype(dtype)
    rows.store(dgate_ref, dgate, at)
    rows.store(hidden_ref, hidden, at)
    rows.store(dvalue_ref, dvalue, at)
    dx += tiling.dot(dgate, gate_weight.T)
  rows.store(dx_ref, dx)


@functools.partial(jax.jit, static_argnames='plan')
def _backward(weights, x_TND, values, y_TND, scale_TN, g_TND, plan):
  tokens, rows, _ = x_TND.shape
  tiles = plan.tiles
  like_x = jax.ShapeDtypeStruct(x_TND.shape, x_TND.dtype)
  hidden = jax.ShapeDtypeStruct(
    (tokens, rows, weights[0].shape[1]), x_TND.dtype
  )
  return pl.pallas_call(
    functools.partial(_backward_kernel, plan=plan),
    out_shape=(like_x, like_x, hidden, hidden, hidden),
    grid=(tokens, pl.cdiv(rows, tiles.back_rows)),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.back_warps, num_stages=tiles.back_stages
    ),
    interpret=plan.interpret,
    name='constraint_half_backward',
  )(*weights, x_TND, *values, y_TND, scale_TN, g_TND)
