"""The constraint half over the digits of single cells as one kernel (Triton).

A program holds some cells of the puzzles with all their digits, so that pooled
values, gates and hidden units never leave the chip: the forward pass reads x
and writes y. The backward pass makes them again; what it leaves to XLA are the
gradients of the weights, products over all rows (a row is a cell and a digit).
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import tiling, token_half

EPS = 1e-5


class Tiles(NamedTuple):
  """How the work is cut: rows of a program, a power of two in which every cell
  takes the power of two that its digits fit, and its warps, and the same of the
  backward pass."""

  rows: int = 128
  warps: int = 8
  back_rows: int = 128
  back_warps: int = 8


def fits(width: int, pooled: int, families: tuple[str, ...], pool: str) -> bool:
  """Whether the kernel takes this: D and P values of cells alone, of which half
  are means and half are largest values."""
  sizes = all(n >= 16 and n & (n - 1) == 0 for n in (width, pooled))
  return families == ('cell',) and pool == 'both' and sizes


def apply(
  params: Mapping[str, Array],
  x_TBVD: Array,
  *,
  families: tuple[str, ...] = ('cell',),
  box: tuple[int, int] | tuple[()] = (),
  pool: str = 'both',
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms_D(x + (silu(x gate) * [mean_V(x up_1), max_V(x up_2)]) down)`.

  The same as `layers.symmetric_block.constraint_half` for the family 'cell':
  products in the dtype of x, sums and the norm in float32. Digits that tie for
  the largest value share its gradient.

  Args:
    params: `gate [D, P]`, `up [D, P]`, `down [P, D]`.
    x_TBVD: the state.
    families, pool: ('cell',) and 'both'. box: not used.
    tiles: see `Tiles`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: what `fits` refuses.
  """
  del box
  digits, width = x_TBVD.shape[-2:]
  pooled = params['gate'].shape[1]
  if not fits(width, pooled, families, pool):
    raise ValueError(
      "families must be ('cell',), pool 'both', width and pool_width powers of "
      f'2 from 16, got {families}, {pool!r}, {width} and {pooled}'
    )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  plan = _Plan(digits, tiles or Tiles(), interpret)
  y_ND = _mix(dict(params), x_TBVD.reshape(-1, width), plan)
  return y_ND.reshape(x_TBVD.shape)


class _Plan(NamedTuple):
  digits: int
  tiles: Tiles
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mix(params, x_ND, plan):
  return _forward(_weights(params, x_ND.dtype), x_ND, plan)[0]


def _mix_forward(params, x_ND, plan):
  y_ND, scale_N = _forward(_weights(params, x_ND.dtype), x_ND, plan)
  return y_ND, (params, x_ND, y_ND, scale_N)


def _mix_backward(plan, saved, g_ND):
  params, x_ND, y_ND, scale_N = saved
  weights = _weights(params, x_ND.dtype)
  dx_ND, dr_ND, dpair_N2P, hidden_NP = _backward(
    weights, x_ND, y_ND, scale_N, g_ND, plan
  )
  dgate_DP, dup_DP = jnp.split(tiling.over_rows(x_ND, dpair_N2P), 2, axis=1)
  dparams = {
    'gate': dgate_DP,
    'up': dup_DP,
    'down': tiling.over_rows(hidden_NP, dr_ND),
  }
  return {k: d.astype(params[k].dtype) for k, d in dparams.items()}, dx_ND


_mix.defvjp(_mix_forward, _mix_backward)


def _weights(params, dtype):
  """`[gate, up] [D, 2 P]` and `down [P, D]`."""
  pair = jnp.concatenate([params['gate'], params['up']], axis=1)
  return pair.astype(dtype), params['down'].astype(dtype)


class _Rows:
  """The rows of a program: cells with `slots` rows each, some of them void."""

  def __init__(self, total, size, digits):
    self.slots = pl.next_power_of_2(digits)
    row = jnp.arange(size)
    slot = row % self.slots
    cell = pl.program_id(0) * (size // self.slots) + row // self.slots
    self.exists = (slot < digits) & (cell * digits < total)
    # Void rows lie nowhere: those of a store must not be another cell's.
    self.index = jnp.where(self.exists, cell * digits + slot, total)

  def _of(self, ref):
    return ref.at[self.index[:, None], jnp.arange(ref.shape[1])[None]]

  def load(self, ref):
    return plgpu.load(self._of(ref), mask=self.exists[:, None], other=0.0)

  def store(self, ref, value):
    value = value.astype(ref.dtype)
    plgpu.store(self._of(ref), value, mask=self.exists[:, None])

  def over_digits(self, reduce, value, void):
    """A reduction over a cell's digits, seen from each of them."""
    rows, columns = value.shape
    value = jnp.where(self.exists[:, None], value, void)
    parts = value.reshape(rows // self.slots, self.slots, columns)
    found = jnp.broadcast_to(reduce(parts, axis=1)[:, None], parts.shape)
    return found.reshape(rows, columns)


def _pooled(rows, values, digits):
  """`(pooled, largest)`: the first half of the columns by their means."""
  means = jnp.arange(values.shape[1])[None] < values.shape[1] // 2
  largest = rows.over_digits(jnp.max, values, -jnp.inf)
  mean = rows.over_digits(jnp.sum, values, 0.0) / digits
  return jnp.where(means, mean, largest), largest, means


def _forward_kernel(pair_ref, down_ref, x_ref, y_ref, scale_ref, *, plan):
  total, width = x_ref.shape
  rows = _Rows(total, plan.tiles.rows, plan.digits)
  x, half = rows.load(x_ref), down_ref.shape[0]
  products = tiling.dot(x, pair_ref[...])
  gate, values = jax.lax.split(products, (half, half), axis=1)
  pooled, _, _ = _pooled(rows, values, plan.digits)
  hidden = tiling.silu(gate, tiling.rough(x_ref.dtype)) * pooled
  r = tiling.dot(hidden.astype(x_ref.dtype), down_ref[...])
  r += x.astype(jnp.float32)
  scale = jax.lax.rsqrt((r * r).sum(1) / width + EPS)
  rows.store(y_ref, r * scale[:, None])
  plgpu.store(scale_ref.at[rows.index], scale, mask=rows.exists)


def _grid(total, rows, digits):
  cells = rows // pl.next_power_of_2(digits)
  if not cells:
    raise ValueError(f'{rows} rows do not hold the {digits} digits of a cell')
  return (pl.cdiv(total // digits, cells),)


@functools.partial(jax.jit, static_argnames='plan')
def _forward(weights, x_ND, plan):
  tiles = plan.tiles
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan),
    out_shape=(
      jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
      jax.ShapeDtypeStruct(x_ND.shape[:1], jnp.float32),
    ),
    grid=_grid(x_ND.shape[0], tiles.rows, plan.digits),
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps),
    interpret=plan.interpret,
    name='cell_half_forward',
  )(*weights, x_ND)


def _backward_kernel(
  pair_ref,
  down_ref,
  x_ref,
  y_ref,
  scale_ref,
  g_ref,
  dx_ref,
  dr_ref,
  dpair_ref,
  hidden_ref,
  *,
  plan,
):
  total, width = x_ref.shape
  dtype, half = x_ref.dtype, down_ref.shape[0]
  rows = _Rows(total, plan.tiles.back_rows, plan.digits)

  # y = r s, s = (mean r^2 + eps)^(-1/2): dr = s (g - y mean(g y)).
  g, y = (rows.load(ref).astype(jnp.float32) for ref in (g_ref, y_ref))
  scale = plgpu.load(scale_ref.at[rows.index], mask=rows.exists, other=0.0)
  dr = scale[:, None] * (g - y * ((g * y).sum(1) / width)[:, None])
  dr = dr.astype(dtype)
  rows.store(dr_ref, dr)

  x = rows.load(x_ref)
  products = tiling.dot(x, pair_ref[...])
  gate, values = jax.lax.split(products, (half, half), axis=1)
  pooled, largest, means = _pooled(rows, values, plan.digits)
  dhidden = tiling.dot(dr, down_ref[...].T)
  fast = tiling.rough(dtype)
  dgate, dpooled, hidden = tiling.swiglu_backward(gate, pooled, dhidden, fast)
  rows.store(hidden_ref, hidden)
  dpooled = rows.over_digits(jnp.sum, dpooled, 0.0)
  first = (values == largest).astype(jnp.float32)
  shared = dpooled * first / rows.over_digits(jnp.sum, first, 0.0)
  dvalues = jnp.where(means, dpooled / plan.digits, shared)
  dpair = token_half.join(dgate.astype(dtype), dvalues.astype(dtype))
  rows.store(dpair_ref, dpair)
  rows.store(
    dx_ref, dr.astype(jnp.float32) + tiling.dot(dpair, pair_ref[...].T)
  )


@functools.partial(jax.jit, static_argnames='plan')
def _backward(weights, x_ND, y_ND, scale_N, g_ND, plan):
  total, tiles = x_ND.shape[0], plan.tiles
  width, both = weights[0].shape
  return pl.pallas_call(
    functools.partial(_backward_kernel, plan=plan),
    out_shape=tuple(
      jax.ShapeDtypeStruct((total, size), x_ND.dtype)
      for size in (width, width, both, both // 2)
    ),
    grid=_grid(total, tiles.back_rows, plan.digits),
    compiler_params=plgpu.CompilerParams(num_warps=tiles.back_warps),
    interpret=plan.interpret,
    name='cell_half_backward',
  )(*weights, x_ND, y_ND, scale_N, g_ND)
