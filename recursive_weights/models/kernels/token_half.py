"""The token-mixing half of a mixer block as one kernel (Pallas, Triton).

A program holds all T tokens of some columns (one column is one feature of one
example), so that hidden units, residual and the norm over the tokens never
leave the chip: the forward pass reads x once and writes y once.
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

EPS = 1e-5


class Tiles(NamedTuple):
  """How the work is cut; powers of two, at least 16.

  columns: features of an example in a program. hidden: units in a step of its
  loop. warps, stages: of the program, and of its loads in flight. whole: the
  tokens as one power of two, else in pieces (`tiling.pieces_of`); None: whole
  where there would be more than two. `back_*`: the same of the backward pass.
  """

  columns: int = 64
  hidden: int = 32
  warps: int = 4
  stages: int = 3
  whole: bool | None = None
  back_columns: int = 64
  back_hidden: int = 32
  back_warps: int = 4
  back_stages: int = 3
  back_whole: bool | None = None


def fits(tokens: int, columns: int, hidden: int) -> bool:
  """Whether the kernel takes these sizes; `columns` is batch times width."""
  return tokens <= 256 and columns % 16 == 0 and hidden % 16 == 0


def apply(
  params: Mapping[str, Array],
  x_TBD: Array,
  *,
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Array:
  """`rms_T(x + down^T (silu(gate^T x) * (up^T x)))`, all over the tokens.

  The same as `layers.trm_block.token_half`: products in the dtype of x, sums
  and the norm in float32. The backward pass computes the hidden units again
  from x, and writes them and their gradients once.

  Args:
    params: `gate [T, F]`, `up [T, F]`, `down [F, T]`.
    x_TBD: the state. Further axes may stand in B's place.
    tiles: see `Tiles`.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: sizes that `fits` refuses.
  """
  tokens, hidden = params['gate'].shape
  columns = x_TBD.size // tokens
  if not fits(tokens, columns, hidden):
    raise ValueError(
      'tokens must be <= 256, batch * width and hidden multiples of 16, got '
      f'{tokens}, {columns} and {hidden}'
    )
  tiles = Tiles() if tiles is None else tiles
  many = len(tiling.pieces_of(tokens)) > 2
  tiles = tiles._replace(
    whole=many if tiles.whole is None else tiles.whole,
    back_whole=many if tiles.back_whole is None else tiles.back_whole,
    columns=tiling.divisor(columns, tiles.columns),
    hidden=tiling.divisor(hidden, tiles.hidden),
    back_columns=tiling.divisor(columns, tiles.back_columns),
    back_hidden=tiling.divisor(hidden, tiles.back_hidden),
  )
  if interpret is None:
    interpret = jax.default_backend() != 'gpu'
  y_TN = _mix(dict(params), x_TBD.reshape(tokens, columns), tiles, interpret)
  return y_TN.reshape(x_TBD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mix(params, x_TN, tiles, interpret):
  weights = _weights(params, x_TN.dtype, tiles.hidden, tiles.whole)
  return _forward(weights, x_TN, tiles, interpret)[0]


def _mix_forward(params, x_TN, tiles, interpret):
  weights = _weights(params, x_TN.dtype, tiles.hidden, tiles.whole)
  y_TN, scale_N = _forward(weights, x_TN, tiles, interpret)
  return y_TN, (params, x_TN, y_TN, scale_N)


def _mix_backward(tiles, interpret, saved, g_TN):
  params, x_TN, y_TN, scale_N = saved
  weights = _weights(params, x_TN.dtype, tiles.back_hidden, tiles.back_whole)
  dx_TN, dr_TN, dpair_N2F, hidden_NF = _backward(
    weights, x_TN, y_TN, scale_N, g_TN, tiles, interpret
  )
  # Sums over all columns: plain products with a long contraction.
  dgate_TF, dup_TF = unpair(tiling.dot(x_TN, dpair_N2F), tiles.back_hidden)
  dparams = {
    'gate': dgate_TF,
    'up': dup_TF,
    'down': tiling.dot(dr_TN, hidden_NF).T,
  }
  return {k: d.astype(params[k].dtype) for k, d in dparams.items()}, dx_TN


_mix.defvjp(_mix_forward, _mix_backward)


def _weights(params, dtype, units, whole):
  """Gate and up in pairs `[T, 2F]` and turned down `[T, F]`, in whole pieces.

  Hidden units are last, so that rows are aligned for any T.
  """
  pairs_T2F = pair(params['gate'], params['up'], units)
  tokens = pairs_T2F.shape[0]
  padded = sum(tiling.pieces_of(tokens, whole)[-1])
  padding = ((0, padded - tokens), (0, 0))
  return tuple(
    jnp.pad(weight.astype(dtype), padding)
    for weight in (pairs_T2F, params['down'].T)
  )


def pair(a: Array, b: Array, units: int) -> Array:
  """Columns of a and of b in turns of `units`: one product makes both."""
  rows = a.shape[0]
  both = jnp.stack([a.reshape(rows, -1, units), b.reshape(rows, -1, units)], 2)
  return both.reshape(rows, -1)


def unpair(pairs: Array, units: int) -> tuple[Array, Array]:
  """The two that `pair` joined."""
  rows = pairs.shape[0]
  parts = pairs.reshape(rows, -1, 2, units)
  return parts[:, :, 0].reshape(rows, -1), parts[:, :, 1].reshape(rows, -1)


def join(a: Array, b: Array) -> Array:
  """`pair` of one turn, in a kernel."""
  rows, units = a.shape
  return jnp.stack([a, b], 2).transpose(0, 2, 1).reshape(rows, 2 * units)


def _turn(value, ref):
  return value.astype(ref.dtype).T


def _sum(terms):
  return functools.reduce(jnp.add, terms)


def _product(xs_turned, weights):
  """`x^T w` with tokens, in pieces, contracted."""
  return _sum(
    [tiling.dot(x, w) for x, w in zip(xs_turned, weights, strict=True)]
  )


def _forward_kernel(pairs_ref, down_ref, x_ref, y_ref, scale_ref, *, tiles):
  tokens, hidden = x_ref.shape[0], down_ref.shape[1]
  units, whole = tiles.hidden, tiles.whole
  columns = pl.ds(pl.program_id(0) * tiles.columns, tiles.columns)
  turned = [x.T for x in tiling.load(x_ref, columns, whole)]
  fast = tiling.rough(x_ref.dtype)

  def body(index, sums):
    pairs = tiling.load(pairs_ref, pl.ds(index * 2 * units, 2 * units), whole)
    u, v = jax.lax.split(_product(turned, pairs), (units, units), axis=1)
    h = (tiling.silu(u, fast) * v).astype(x_ref.dtype)
    downs = tiling.load(down_ref, pl.ds(index * units, units), whole)
    return tuple(
      s + tiling.dot(h, w.T) for s, w in zip(sums, downs, strict=True)
    )

  # Rows past the last token are zero in x and in the weights.
  sums = tuple(x.astype(jnp.float32) for x in turned)
  rs = jax.lax.fori_loop(0, hidden // units, body, sums)
  scale = jax.lax.rsqrt(_sum([(r * r).sum(1) for r in rs]) / tokens + EPS)
  scale_ref[columns] = scale
  ys = [_turn(r * scale[:, None], y_ref) for r in rs]
  tiling.store(y_ref, columns, ys, whole)


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _forward(weights, x_TN, tiles, interpret):
  tokens, columns = x_TN.shape
  return pl.pallas_call(
    functools.partial(_forward_kernel, tiles=tiles),
    out_shape=(
      jax.ShapeDtypeStruct((tokens, columns), x_TN.dtype),
      jax.ShapeDtypeStruct((columns,), jnp.float32),
    ),
    grid=(columns // tiles.columns,),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.warps, num_stages=tiles.stages
    ),
    interpret=interpret,
    name='token_half_forward',
  )(*weights, x_TN)


def _backward_kernel(
  pairs_ref,
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
  tiles,
):
  tokens, hidden = x_ref.shape[0], down_ref.shape[1]
  units, whole = tiles.back_hidden, tiles.back_whole
  dtype = x_ref.dtype
  columns = pl.ds(pl.program_id(0) * tiles.back_columns, tiles.back_columns)

  # y = r s, s = (mean r^2 + eps)^(-1/2): dr = s (g - y mean(g y)).
  scale = scale_ref[columns]
  gs = [g.astype(jnp.float32) for g in tiling.load(g_ref, columns, whole)]
  ys = [y.astype(jnp.float32) for y in tiling.load(y_ref, columns, whole)]
  mean = _sum([(g * y).sum(0) for g, y in zip(gs, ys, strict=True)]) / tokens
  drs = [
    (scale[None] * (g - y * mean[None])).astype(dtype)
    for g, y in zip(gs, ys, strict=True)
  ]
  tiling.store(dr_ref, columns, drs, whole)
  xs_turned = [x.T for x in tiling.load(x_ref, columns, whole)]
  drs_turned = [dr.T for dr in drs]

  def body(index, sums):
    at = pl.ds(index * units, units)
    at_pair = pl.ds(index * 2 * units, 2 * units)
    pairs = tiling.load(pairs_ref, at_pair, whole)
    u, v = jax.lax.split(_product(xs_turned, pairs), (units, units), axis=1)
    dh = _product(drs_turned, tiling.load(down_ref, at, whole))
    du, dv, h = tiling.swiglu_backward(u, v, dh, tiling.rough(dtype))
    dpair = join(du.astype(dtype), dv.astype(dtype))
    dpair_ref[columns, at_pair] = dpair
    hidden_ref[columns, at] = h.astype(dtype)
    return tuple(
      s + tiling.dot(dpair, w.T) for s, w in zip(sums, pairs, strict=True)
    )

  sums = tuple(dr.astype(jnp.float32) for dr in drs_turned)
  dxs = jax.lax.fori_loop(0, hidden // units, body, sums)
  tiling.store(dx_ref, columns, [_turn(dx, dx_ref) for dx in dxs], whole)


@functools.partial(jax.jit, static_argnames=('tiles', 'interpret'))
def _backward(weights, x_TN, y_TN, scale_N, g_TN, tiles, interpret):
  tokens, columns = x_TN.shape
  hidden = weights[1].shape[1]
  like_x = jax.ShapeDtypeStruct((tokens, columns), x_TN.dtype)
  return pl.pallas_call(
    functools.partial(_backward_kernel, tiles=tiles),
    out_shape=(
      like_x,
      like_x,
      jax.ShapeDtypeStruct((columns, 2 * hidden), x_TN.dtype),
      jax.ShapeDtypeStruct((columns, hidden), x_TN.dtype),
    ),
    grid=(columns // tiles.back_columns,),
    compiler_params=plgpu.CompilerParams(
      num_warps=tiles.back_warps, num_stages=tiles.back_stages
    ),
    interpret=interpret,
    name='token_half_backward',
  )(*weights, x_TN, y_TN, scale_N, g_TN)
