"""What the kernels share: how rows are cut, loaded and multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array


def divisor(size: int, most: int) -> int:
  """The largest power of two that divides size, at most `most`."""
  return min(most, size & -size)


def pieces_of(tokens: int, whole: bool = False) -> list[tuple[int, int]]:
  """`(start, size)` of descending powers of two that cover the tokens.

  81 -> 64 + 32, 97 -> 64 + 32 + 16: less padding than one power of two, and
  matrix units take multiples of 16.
  """
  if whole:
    return [(0, max(16, pl.next_power_of_2(tokens)))]
  pieces, start, left = [], 0, -(-tokens // 16) * 16
  for size in (256, 128, 64, 32, 16):
    if left >= size:
      pieces.append((start, size))
      start, left = start + size, left - size
  return pieces


def _rows(start, size, tokens):
  """Slice of a piece and the mask of its rows that exist, or None."""
  if start + size <= tokens:
    return pl.ds(start, size), None
  # A start that is known only when run may reach past the end.
  first = start + 0 * pl.program_id(0)
  return pl.ds(first, size), (start + jnp.arange(size) < tokens)[:, None]


def load(ref, columns, whole: bool) -> list[Array]:
  """The pieces of some columns; rows past the last token are zero."""
  values = []
  for piece in pieces_of(ref.shape[0], whole):
    rows, mask = _rows(*piece, ref.shape[0])
    other = None if mask is None else 0.0
    values.append(plgpu.load(ref.at[rows, columns], mask=mask, other=other))
  return values


def store(ref, columns, values: list[Array], whole: bool) -> None:
  """The reverse of `load`."""
  pieces = pieces_of(ref.shape[0], whole)
  for value, piece in zip(values, pieces, strict=True):
    rows, mask = _rows(*piece, ref.shape[0])
    plgpu.store(ref.at[rows, columns], value.astype(ref.dtype), mask=mask)


def load_rows(ref, first, size: int, total: int, columns) -> Array:
  """Rows `first ...` of some columns; rows past the end are zero."""
  at = ref.at[pl.ds(first, size), columns]
  if total % size == 0:
    return plgpu.load(at)
  mask = (first + jnp.arange(size) < total)[:, None]
  return plgpu.load(at, mask=mask, other=0.0)


def store_rows(ref, value: Array, first, total: int, columns) -> None:
  """The reverse of `load_rows`."""
  size = value.shape[0]
  at = ref.at[pl.ds(first, size), columns]
  mask = None
  if total % size:
    mask = (first + jnp.arange(size) < total)[:, None]
  plgpu.store(at, value.astype(ref.dtype), mask=mask)


def dot(a: Array, b: Array) -> Array:
  """`a b` with sums in float32."""
  if jax.default_backend() == 'cpu':
    # Exact, and the CPU lacks some mixed products.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def over_rows(a_NF: Array, b_ND: Array) -> Array:
  """`a^T b [F, D]`, sums over many rows in float32.

  XLA splits a long sum over multiprocessors in powers of two, and where these
  do not divide the rows it copies both operands with rows of zeros below. So
  the odd part of their number is split off here, while the sums are small.
  """
  rows, sums = a_NF.shape[0], a_NF.shape[1] * b_ND.shape[1]
  odd = rows // divisor(rows, rows)
  fitting = range(1, min(128, 2**21 // sums) + 1, 2)
  parts = max([n for n in fitting if odd % n == 0], default=1)
  if parts == 1:
    return dot(a_NF.T, b_ND)
  a_SRF, b_SRD = (x.reshape(parts, -1, x.shape[1]) for x in (a_NF, b_ND))
  return jax.vmap(dot)(a_SRF.transpose(0, 2, 1), b_SRD).sum(0)


def rough(dtype) -> bool:
  """Whether approximate instructions are good enough, and there."""
  return jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == 'gpu'


def fma(
  a: Array, b: Array | np.float32, c: Array | np.float32, fast: bool = False
) -> Array:
  """`a b + c`, in one instruction where `fast`: the compiler fuses none."""
  return _fused('fma.rn.f32 $0, $1, $2, $3;', a, b, c) if fast else a * b + c


def exp2_fma(a: Array, b: Array, c: Array, fast: bool = False) -> Array:
  """`2 ** (a b + c)`, where `fast` in two instructions (Triton).

  The compiler has six, so that results below 2 ** -126 are not zero.
  """
  if not fast:
    return jnp.exp2(a * b + c)
  text = 'fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t;'
  return _fused('{ .reg .f32 t; ' + text + ' }', a, b, c)


def _fused(text, *args):
  """What some instructions make of float32 arrays, element by element."""
  args = jnp.broadcast_arrays(*args)
  (found,) = plgpu.elementwise_inline_asm(
    text,
    args=args,
    constraints='=' + ','.join('f' * (1 + len(args))),
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
  )
  return found


def silu(u: Array, fast: bool = False) -> Array:
  """`u sigmoid(u) = a + a tanh(a)`, a = u / 2.

  By the hyperbolic tangent, for which the GPU has an instruction: where `fast`,
  it is asked for (11 bits; Triton).
  """
  a = 0.5 * u
  return fma(a, _tanh(a, fast), a, fast)


def _tanh(a, fast):
  return plgpu.approx_tanh(a) if fast else jnp.tanh(a)


def swiglu_backward(
  u: Array, v: Array, dh: Array, fast: bool = False
) -> tuple[Array, ...]:
  """`(du, dv, h)` of h = silu(u) v, in float32."""
  half = np.float32(0.5)
  s = fma(_tanh(half * u, fast), half, half, fast)
  a = u * s
  return dh * v * fma(a, 1 - s, s, fast), dh * a, a * v
