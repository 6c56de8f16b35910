"""The constraint half over the digits of single cells as one kernel (Triton).

A program holds some cells of the puzzles with all their digits, so that pooled
values, gates and hidden units never leave the chip: the forward pass reads x
and writes y. The backward pass makes them again; what it leaves to XLA are the
gradients of the weights, products over all cells.
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
  """How the work is cut: cells (a power of two, at least 16), warps and loads
  in flight of a program, and the same of the backward pass."""

  rows: int = 64
  warps: int = 4
  stages: int = 2
  back_rows: int = 64
  back_warps: int = 8
  back_stages: int = 2


def fits(width: int, pooled: int, families: tuple[str, ...], pool: str) -> bool:
  """Whether the kernel takes this: D and P values of cells alone, of which half
  are means and half are largest values."""
  powers = all(n & (n - 1) == 0 for n in (width, pooled))
  sizes = width >= 16 and pooled >= 32 and powers
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
  """`rms_D(x + (silu(x gate) * [mean_V(x) up_1, max_V(x up_2)]) down)`.

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
  *_, digits, width = x_TBVD.shape
  pooled = params['gate'].shape[1]
  if not fits(width, pooled, families, pool):
    raise ValueError(
      "families must be ('cell',), pool 'both', width and pool_width powers of "
      f'2 from 16 and 32, got {families}, {pool!r}, {width} and {pooled}'
    )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  plan = _Plan(digits, tiles or Tiles(), interpret)
  y_NE = _mix(dict(params), x_TBVD.reshape(-1, digits * width), plan)
  return y_NE.reshape(x_TBVD.shape)


class _Plan(NamedTuple):
  digits: int
  tiles: Tiles
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mix(params, x_NE, plan):
  return _forward(_weights(params, x_NE.dtype), x_NE, plan)[0]


def _mix_forward(params, x_NE, plan):
  y_NE, scale_VN = _forward(_weights(params, x_NE.dtype), x_NE, plan)
  return y_NE, (params, x_NE, y_NE, scale_VN)


def _mix_backward(plan, saved, g_NE):
  params, x_NE, y_NE, scale_VN = saved
  weights = _weights(params, x_NE.dtype)
  dx_NE, dr_NE, dpair, hidden, mean_ND, dmean_NP = _backward(
    weights, x_NE, y_NE, scale_VN, g_NE, plan
  )
  pooled, width = params['down'].shape
  # Gates and what is compared come from x: one product for both gradients.
  dpair = dpair.reshape(-1, pooled + pooled // 2)
  dfrom_x = tiling.dot(x_NE.reshape(-1, width).T, dpair)
  dgate, dlargest = jnp.split(dfrom_x, [pooled], axis=1)
  dups = [tiling.dot(mean_ND.T, dmean_NP), dlargest]
  rows = hidden.reshape(-1, pooled), dr_NE.reshape(-1, width)
  dparams = {
    'gate': dgate,
    'up': jnp.concatenate(dups, axis=1),
    'down': tiling.dot(rows[0].T, rows[1]),
  }
  return {k: d.astype(params[k].dtype) for k, d in dparams.items()}, dx_NE


_mix.defvjp(_mix_forward, _mix_backward)


def _weights(params, dtype):
  """gate, the two halves of up, down."""
  gate, up, down = (params[k].astype(dtype) for k in ('gate', 'up', 'down'))
  return gate, *jnp.split(up, 2, axis=1), down


def _sum_largest(load, largest_ref, shape, digits):
  """Over the digits of a program's cells: sum of x, and the largest values."""

  def body(digit, carry):
    total, largest = carry
    x = load(digit)
    values = tiling.dot(x, largest_ref[...])
    return total + x.astype(jnp.float32), jnp.maximum(largest, values)

  rows, width, values = shape
  start = (
    jnp.zeros((rows, width), jnp.float32),
    jnp.full((rows, values), -jnp.inf, jnp.float32),
  )
  return jax.lax.fori_loop(0, digits, body, start)


def _digit(ref, first, rows, width):
  """`digit -> [rows, width]` of a reference `[N, V width]`, and its store."""
  total = ref.shape[0]

  def load(digit):
    columns = pl.ds(digit * width, width)
    return tiling.load_rows(ref, first, rows, total, columns)

  return load


def _forward_kernel(
  gate_ref, mean_ref, largest_ref, down_ref, x_ref, y_ref, scale_ref, *, plan
):
  width, pooled = gate_ref.shape
  rows, total = plan.tiles.rows, x_ref.shape[0]
  first = pl.program_id(0) * rows
  dtype, fast = x_ref.dtype, tiling.rough(x_ref.dtype)
  load = _digit(x_ref, first, rows, width)
  shape = rows, width, pooled // 2
  sums, largest = _sum_largest(load, largest_ref, shape, plan.digits)
  mean = tiling.dot((sums / plan.digits).astype(dtype), mean_ref[...])
  value = token_half.join(mean, largest)

  def body(digit, carry):
    x = load(digit)
    gate = tiling.dot(x, gate_ref[...])
    hidden = gate * tiling.sigmoid(gate, fast) * value
    r = x.astype(jnp.float32) + tiling.dot(hidden.astype(dtype), down_ref[...])
    scale = jax.lax.rsqrt((r * r).sum(1) / width + EPS)
    columns = pl.ds(digit * width, width)
    tiling.store_rows(y_ref, r * scale[:, None], first, total, columns)
    mask = first + jnp.arange(rows) < total
    plgpu.store(scale_ref.at[digit, pl.ds(first, rows)], scale, mask=mask)
    return carry

  jax.lax.fori_loop(0, plan.digits, body, 0)


@functools.partial(jax.jit, static_argnames='plan')
def _forward(weights, x_NE, plan):
  total, tiles = x_NE.shape[0], plan.tiles
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan),
    out_shape=(
      jax.ShapeDtypeStruct(x_NE.shape, x_NE.dtype),
      jax.ShapeDtypeStruct((plan.digits, total), jnp.float32),
    ),
    grid=(pl.cdiv(total, tiles.rows),),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=plan.interpret,
    name='cell_half_forward',
  )(*weights, x_NE)


def _backward_kernel(
  gate_ref,
  mean_ref,
  largest_ref,
  down_ref,
  x_ref,
  y_ref,
  scale_ref,
  g_ref,
  dx_ref,
  dr_ref,
  dpair_ref,
  hidden_ref,
  means_ref,
  dmean_ref,
  *,
  plan,
):
  width, pooled = gate_ref.shape
  half = pooled // 2
  rows, total, digits = plan.tiles.back_rows, x_ref.shape[0], plan.digits
  first = pl.program_id(0) * rows
  dtype, fast = x_ref.dtype, tiling.rough(x_ref.dtype)
  load, load_y, load_g = (
    _digit(ref, first, rows, width) for ref in (x_ref, y_ref, g_ref)
  )
  mask = first + jnp.arange(rows) < total

  def store(ref, value, start):
    columns = pl.ds(start, value.shape[1])
    tiling.store_rows(ref, value, first, total, columns)

  shape = rows, width, half
  sums, largest = _sum_largest(load, largest_ref, shape, digits)
  mean = (sums / digits).astype(dtype)
  store(means_ref, mean, 0)
  value = token_half.join(tiling.dot(mean, mean_ref[...]), largest)

  def gates(digit):
    """x, the gradient before the norm, and those of the gated unit."""
    # y = r s, s = (mean r^2 + eps)^(-1/2): dr = s (g - y mean(g y)).
    x, g = load(digit), load_g(digit).astype(jnp.float32)
    y = load_y(digit).astype(jnp.float32)
    at = scale_ref.at[digit, pl.ds(first, rows)]
    scale = plgpu.load(at, mask=mask, other=0.0)
    dr = scale[:, None] * (g - y * ((g * y).sum(1) / width)[:, None])
    dr = dr.astype(dtype)
    gate = tiling.dot(x, gate_ref[...])
    dhidden = tiling.dot(dr, down_ref[...].T)
    return x, dr, tiling.swiglu_backward(gate, value, dhidden, fast)

  def total_of(digit, carry):
    dvalue, ties = carry
    x, _, (_, part, _) = gates(digit)
    same = tiling.dot(x, largest_ref[...]) == largest
    return dvalue + part, ties + same.astype(jnp.float32)

  dvalue, ties = jax.lax.fori_loop(
    0,
    digits,
    total_of,
    (jnp.zeros((rows, pooled), jnp.float32), jnp.zeros((rows, half))),
  )
  dmean, dlargest = jax.lax.split(dvalue, (half, half), axis=1)
  dlargest = dlargest / ties
  store(dmean_ref, dmean, 0)
  dsum = tiling.dot(dmean.astype(dtype), mean_ref[...].T) / digits

  def body(digit, carry):
    x, dr, (dgate, _, hidden) = gates(digit)
    same = tiling.dot(x, largest_ref[...]) == largest
    dchosen = jnp.where(same, dlargest, 0.0).astype(dtype)
    dgate = dgate.astype(dtype)
    dx = dr.astype(jnp.float32) + dsum + tiling.dot(dgate, gate_ref[...].T)
    dx += tiling.dot(dchosen, largest_ref[...].T)
    store(dx_ref, dx, digit * width)
    store(dr_ref, dr, digit * width)
    store(hidden_ref, hidden, digit * pooled)
    store(dpair_ref, dgate, digit * (pooled + half))
    store(dpair_ref, dchosen, digit * (pooled + half) + pooled)
    return carry

  jax.lax.fori_loop(0, digits, body, 0)


@functools.partial(jax.jit, static_argnames='plan')
def _backward(weights, x_NE, y_NE, scale_VN, g_NE, plan):
  total, tiles = x_NE.shape[0], plan.tiles
  width, pooled = weights[0].shape
  columns = (
    plan.digits * width,
    plan.digits * width,
    plan.digits * (pooled + pooled // 2),
    plan.digits * pooled,
    width,
    pooled // 2,
  )
  return pl.pallas_call(
    functools.partial(_backward_kernel, plan=plan),
    out_shape=tuple(
      jax.ShapeDtypeStruct((total, size), x_NE.dtype) for size in columns
    ),
    grid=(pl.cdiv(total, tiles.back_rows),),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.back_warps, num_stages=tiles.back_stages
    ),
    interpret=plan.interpret,
    name='cell_half_backward',
  )(*weights, x_NE, y_NE, scale_VN, g_NE)
