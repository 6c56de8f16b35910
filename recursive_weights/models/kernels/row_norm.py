"""A residual's sum and norm over whole rows, and the norm's gradient (Triton).

s = (mean(r^2) + 1e-5)^(-1/2),   y = s r,   dr = s (g - y mean(g y))
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array

EPSILON = 1e-5


class _Rows(NamedTuple):
  """Whole rows of a program: `first ...`, all columns as one power of two."""

  first: Array
  size: int
  shape: tuple[int, int]

  @property
  def exist(self):
    return self.first + jnp.arange(self.size) < self.shape[0]

  def _at(self, ref):
    columns = pl.next_power_of_2(self.shape[1])
    at = pl.ds(self.first, self.size), pl.ds(0 * self.first, columns)
    inside = jnp.arange(columns) < self.shape[1]
    return ref.at[at], self.exist[:, None] & inside[None]

  def load(self, ref, scale_ref=None):
    """In float32, times a scale; zero past the end and the last column."""
    at, mask = self._at(ref)
    value = plgpu.load(at, mask=mask, other=0.0).astype(jnp.float32)
    if scale_ref is None:
      return value
    scales = scale_ref.at[pl.ds(self.first, self.size)]
    return value * plgpu.load(scales, mask=self.exist, other=0.0)[:, None]

  def store(self, ref, value):
    at, mask = self._at(ref)
    plgpu.store(at, value.astype(ref.dtype), mask=mask)


def _rows_of(ref, size):
  return _Rows(pl.program_id(0) * size, size, ref.shape)


def _kernel(product_ref, x_ref, y_ref, scale_ref, *, size):
  rows = _rows_of(x_ref, size)
  r = rows.load(product_ref) + rows.load(x_ref)
  scale = jax.lax.rsqrt((r * r).sum(1) / x_ref.shape[1] + EPSILON)
  rows.store(y_ref, r * scale[:, None])
  at = scale_ref.at[pl.ds(rows.first, rows.size)]
  plgpu.store(at, scale, mask=rows.exist)


def _backward_kernel(value_ref, g_ref, *refs, size, scaled):
  *scale_refs, dr_ref = refs
  of_value, of_gradient = scaled
  rows = _rows_of(value_ref, size)
  y = rows.load(value_ref, scale_refs[0] if of_value else None)
  h = rows.load(g_ref, scale_refs[-1] if of_gradient else None)
  mean = (h * y).sum(1) / value_ref.shape[1]
  rows.store(dr_ref, h - y * mean[:, None])


@functools.partial(jax.jit, static_argnames=('rows', 'warps', 'interpret'))
def forward(
  product_ND: Array,
  x_ND: Array,
  *,
  rows: int = 8,
  warps: int = 4,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """`(y [N, D], s [N])` of r = x + product; `rows` and `warps` a program."""
  total = x_ND.shape[0]
  return pl.pallas_call(
    functools.partial(_kernel, size=rows),
    out_shape=(
      jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
      jax.ShapeDtypeStruct((total,), jnp.float32),
    ),
    grid=(pl.cdiv(total, rows),),
    compiler_params=plgpu.CompilerParams(num_warps=warps),
    interpret=interpret,
    name='row_norm',
  )(product_ND, x_ND)


@functools.partial(jax.jit, static_argnames=('rows', 'warps', 'interpret'))
def backward(
  value_ND: Array,
  g_ND: Array,
  *,
  value_scale_N: Array | None = None,
  gradient_scale_N: Array | None = None,
  rows: int = 8,
  warps: int = 4,
  interpret: bool = False,
) -> Array:
  """`h - y mean(h y)` `[N, D]`: dr, where y is the norm's result and h = s g.

  y is `value` times its scale and h is g times its own, None for one.
  """
  scales = value_scale_N, gradient_scale_N
  scaled = tuple(scale is not None for scale in scales)
  return pl.pallas_call(
    functools.partial(_backward_kernel, size=rows, scaled=scaled),
    out_shape=jax.ShapeDtypeStruct(value_ND.shape, value_ND.dtype),
    grid=(pl.cdiv(value_ND.shape[0], rows),),
    compiler_params=plgpu.CompilerParams(num_warps=warps),
    interpret=interpret,
    name='row_norm_backward',
  )(value_ND, g_ND, *(scale for scale in scales if scale is not None))
