"""Halves of a block that leave their norm to those who read it (Hopper GPUs).

A norm is a factor for each row, y = s r, and a product of y is that of r with
its rows scaled. So r and s stand for y, and the norm takes no pass over memory.
Its gradient,

  dr = s (g - y mean(y g)),                                       g that of y,

takes none where the mean is known before g. It is behind a gated unit: if
r' = y + f(y) is normed too, its gradient d is orthogonal to r' (but for the
norm's epsilon of 1e-5), so that with u, v = y gate, y up and hidden units h

  sum(y g) = sum(y f'^T d) + sum(y d) = sum(y f'^T d) - sum(f d)
           = sum(u du) + sum(v dv) - sum(h dh) = sum(u du),       v dv = h dh.

Behind attention it is not so cheap, and g is read once more.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import (
  added_product,
  attention,
  gated_product,
  hopper,
  row_norm,
  tiling,
  turned_product,
)

# From this width on a product costs more than its result's way through memory
# (on an H200 reading 8 bytes against 4 D operations, at some 4 TB/s and 600
# TFLOP/s: D > 300), so gate and up are kept rather than made again. Timed at
# 512 alone; another reason than that of `channel_half.WIDE`.
WIDE = 384


class Deferred(NamedTuple):
  """A normed array `scale[..., None] * value`, `[..., D]`, not made yet.

  To be read by `settle` and the halves here alone: their gradient of `value`
  has that by way of the scale in it, and none is passed through `scale`.
  """

  value: Array
  scale: Array


def value_of(x: Array | Deferred) -> Array:
  """What lies in memory."""
  return x.value if isinstance(x, Deferred) else x


def settle(x: Array | Deferred, *, interpret: bool = False) -> Array:
  """The array that is meant; `interpret`: its gradient without a GPU."""
  if not isinstance(x, Deferred):
    return x
  return _settled(*_rows(x), interpret).reshape(x.value.shape)


def fits(
  x: Array | Deferred, inner: int, plan: hopper.Plan, head: int = 0
) -> bool:
  """Whether halves with `inner` units are to run so, in whole tiles.

  `head`: of attention, its entries.
  """
  value = value_of(x)
  width = value.shape[-1]
  rows = value.size // width
  defer = width >= WIDE if plan.defer is None else plan.defer
  if head and not turned_product.fits(plan.turned, head):
    return False
  return defer and all(
    hopper.whole(tiles, rows, *sizes)
    for tiles, sizes in (
      (plan.gated, (width, inner)),
      (plan.kept, (width, inner)),
      (plan.joined, (inner, width)),
      (plan.spread, (2 * inner, width)),
      (plan.turned, (width, width)),
    )
  )


def attention_half(
  params: Mapping[str, Array],
  x_BTD: Array | Deferred,
  *,
  heads: int,
  turn: tuple[Array, Array] | None = None,
  tiles: attention.Tiles | None = None,
  plan: hopper.Plan,
  interpret: bool = False,
) -> Deferred:
  """`layers.trm_block.attention_half`, the norm left out.

  Args:
    params, heads, turn, tiles: see `attention.apply`.
    x_BTD: the state.
    plan: of the products; sizes must fit it.
    interpret: run what is not of the plan without a GPU, slowly.

  Raises:
    ValueError: sizes that do not fit.
  """
  x_ND, scale_N = _rows(x_BTD)
  batch, half = value_of(x_BTD).shape[0], x_ND.shape[1] // heads // 2
  tables = attention.tables(turn, half, x_ND.dtype)
  tiles = tiles or attention.Tiles()
  settings = _Settings(attention.Plan(batch, heads, tiles, interpret), plan)
  found = _attend(dict(params), x_ND, scale_N, tables, settings)
  return _like(x_BTD, *found)


def channel_half(
  params: Mapping[str, Array],
  x_TBD: Array | Deferred,
  *,
  plan: hopper.Plan,
) -> Deferred:
  """`layers.trm_block.channel_half`, the norm left out.

  Args:
    params: see `channel_half.apply`.
    x_TBD: the state; any axes may stand before D.
    plan: of the products; sizes must fit it.

  Raises:
    ValueError: sizes that do not fit.
  """
  return _like(x_TBD, *_mix(dict(params), *_rows(x_TBD), plan))


def _rows(x):
  """`(value [N, D], scale [N])`, None for one."""
  value = value_of(x)
  scale_N = x.scale.reshape(-1) if isinstance(x, Deferred) else None
  return value.reshape(-1, value.shape[-1]), scale_N


def _like(x, value_ND, scale_N):
  shape = value_of(x).shape
  return Deferred(value_ND.reshape(shape), scale_N.reshape(shape[:-1]))


# The gradient of a value is of all that it does, also by way of its scale. None
# is asked for of the scale, and what is found for it is zero.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _settled(r_ND, scale_N, interpret):
  return (r_ND.astype(jnp.float32) * scale_N[:, None]).astype(r_ND.dtype)


def _settled_forward(r_ND, scale_N, interpret):
  return _settled(r_ND, scale_N, interpret), (r_ND, scale_N)


def _settled_backward(interpret, saved, g_ND):
  r_ND, scale_N = saved
  dr_ND = row_norm.backward(
    r_ND,
    g_ND,
    value_scale_N=scale_N,
    gradient_scale_N=scale_N,
    interpret=interpret,
  )
  return dr_ND, jnp.zeros_like(scale_N)


_settled.defvjp(_settled_forward, _settled_backward)


class _Settings(NamedTuple):
  attention: attention.Plan
  products: hopper.Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(params, x_ND, scale_N, turn, settings):
  return _seen_by_all(params, x_ND, scale_N, turn, settings, keep=False)[0]


def _attend_forward(params, x_ND, scale_N, turn, settings):
  found, kept = _seen_by_all(params, x_ND, scale_N, turn, settings, keep=True)
  return found, (params, x_ND, scale_N, turn, *kept)


def _seen_by_all(params, x_ND, scale_N, turn, settings, keep):
  """The half, and what its backward pass reads."""
  qkv_DE, out_DD = _cast(params, x_ND.dtype, 'qkv', 'out')
  head = x_ND.shape[1] // settings.attention.heads
  qkv_NE = turned_product.turned(
    x_ND, qkv_DE, turn, scale_N, head, settings.products
  )
  seen_ND, *log_HN = attention.forward(qkv_NE, settings.attention, keep)
  found = _joined(seen_ND, out_DD, x_ND, scale_N, settings.products)
  return found, (qkv_NE, seen_ND, *log_HN)


def _attend_backward(settings, saved, gradients):
  params, x_ND, scale_N, turn, qkv_NE, seen_ND, log_HN = saved
  d_ND, _ = gradients
  qkv_DE, out_DD = _cast(params, x_ND.dtype, 'qkv', 'out')
  dqkv_NE = attention.backward(
    qkv_NE,
    seen_ND,
    log_HN,
    d_ND @ out_DD.T,
    settings.attention,
    turn,
    scale_N,
  )
  dparams = {
    'qkv': tiling.over_rows(x_ND, dqkv_NE),
    'out': tiling.over_rows(seen_ND, d_ND),
  }
  plan = settings.products
  (dx_ND,) = added_product.added(
    dqkv_NE, qkv_DE.T, ((d_ND, scale_N),), plan.joined, plan
  )
  if scale_N is not None:
    dx_ND = row_norm.backward(
      x_ND,
      dx_ND,
      value_scale_N=scale_N,
      interpret=settings.attention.interpret,
    )
  return _like_params(params, dparams), dx_ND, *_zeros(scale_N, turn)


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mix(params, x_ND, scale_N, plan):
  (hidden_NF,) = _gated(params, x_ND, scale_N, plan, keep=False)
  (down_FD,) = _cast(params, x_ND.dtype, 'down')
  return _joined(hidden_NF, down_FD, x_ND, scale_N, plan)


def _mix_forward(params, x_ND, scale_N, plan):
  hidden_NF, both_N2F = _gated(params, x_ND, scale_N, plan, keep=True)
  (down_FD,) = _cast(params, x_ND.dtype, 'down')
  found = _joined(hidden_NF, down_FD, x_ND, scale_N, plan)
  return found, (params, x_ND, scale_N, hidden_NF, both_N2F)


def _mix_backward(plan, saved, gradients):
  params, x_ND, scale_N, hidden_NF, both_N2F = saved
  d_ND, _ = gradients
  gate_DF, up_DF, down_FD = _cast(params, x_ND.dtype, 'gate', 'up', 'down')
  dboth_N2F, *sums = added_product.kept_backward(
    down_FD, both_N2F, d_ND, plan, scale_N
  )
  terms = [(d_ND, scale_N)]
  for sums_PN in sums:
    mean_N = sums_PN.sum(0) / x_ND.shape[1]
    terms += [(x_ND, -(scale_N**2) * mean_N)]
  both_D2F = jnp.concatenate([gate_DF, up_DF], 1)
  (dx_ND,) = added_product.added(
    dboth_N2F, both_D2F.T, tuple(terms), plan.spread, plan
  )
  dgate_DF, dup_DF = jnp.split(tiling.over_rows(x_ND, dboth_N2F), 2, axis=1)
  dparams = {
    'gate': dgate_DF,
    'up': dup_DF,
    'down': tiling.over_rows(hidden_NF, d_ND),
  }
  return _like_params(params, dparams), dx_ND, *_zeros(scale_N)


_mix.defvjp(_mix_forward, _mix_backward)


def _gated(params, x_ND, scale_N, plan, keep):
  weights = _cast(params, x_ND.dtype, 'gate', 'up')
  return gated_product.gated(*weights, x_ND, plan, keep, scale_N)


def _joined(inner_NK, w_KD, x_ND, scale_N, plan):
  """`(r, s)` of r = y + inner w, y the rows of x times their scale."""
  r_ND, squares_PN = added_product.added(
    inner_NK, w_KD, ((x_ND, scale_N),), plan.joined, plan, squares=True
  )
  mean_N = squares_PN.sum(0) / x_ND.shape[1]
  return r_ND, jax.lax.rsqrt(mean_N + row_norm.EPSILON)


def _cast(params, dtype, *names):
  return tuple(params[name].astype(dtype) for name in names)


def _like_params(params, dparams):
  return {name: d.astype(params[name].dtype) for name, d in dparams.items()}


def _zeros(*trees):
  return tuple(jax.tree.map(jnp.zeros_like, tree) for tree in trees)
