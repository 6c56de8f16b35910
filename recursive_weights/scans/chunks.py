"""What the chunked scans of matrix states share: layout, checks, commits.

Inside, arrays are `[chunks, N, R, C, K]`, N = B G: G heads of queries and keys,
each of which serves R heads of values, H = G R. No more axes than that: in
gradients of arrays of seven, XLA's CPU backend (jaxlib 0.10.2) makes programs
that crash, and `vmap` over members and blocks of `decay` add two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree
from recursive_weights.scans import decay

ALGORITHMS = ('chunked', 'recurrent')
CHOICES = (*ALGORITHMS, 'fused', 'auto')
PREFILLS = ('chunked', 'fused', 'auto')


class Pending(NamedTuple):
  """A prefill whose tokens are not yet accepted: what `commit` needs.

  The states at the start of each chunk, `[chunks, N, R, K, V]`, the keys, what
  they wrote, the log decays, the resets and the state that resets bring in.
  """

  starts: Array
  k: Array
  written: Array
  log_decay: Array
  resets: Array
  fresh: Array | None


class Inputs(NamedTuple):
  """Checked inputs: masked, decays `[B, T, H, K or 1]`, state float32."""

  q_BTGK: Array
  k_BTGK: Array
  v_BTHV: Array
  log_decay_BTHK: Array
  beta_BTH: Array
  state_BHKV: Array
  fresh_BHKV: Array | None
  resets_BT: Array


def recurrent(step, state: Array, tokens: tuple) -> tuple[Array, Array]:
  """`step(state, *token) -> (y, state)` along axis 1 of every leaf."""

  def body(state, token):
    y, state = step(state, *token)
    return state, y

  last, y = jax.lax.scan(
    body, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
  )
  return jnp.moveaxis(y, 0, 1), last


def prepare(
  q_BTGK: Array,
  k_BTGK: Array,
  v_BTHV: Array,
  log_decay: Array,
  beta_BTH: Array | None,
  state: Array | None,
  fresh: Array | None,
  resets: Array | None,
  mask: Array | None,
) -> Inputs:
  """Checks shapes, fills defaults, takes masked tokens out."""
  if q_BTGK.ndim != 4 or q_BTGK.shape != k_BTGK.shape or v_BTHV.ndim != 4:
    raise ValueError(
      'q and k must be [B, T, G, K] and v [B, T, H, V], got '
      f'{q_BTGK.shape}, {k_BTGK.shape} and {v_BTHV.shape}'
    )
  batch, length, groups, keys = q_BTGK.shape
  heads, values = v_BTHV.shape[2:]
  if v_BTHV.shape[:2] != (batch, length) or heads % groups:
    raise ValueError(
      f'v must be [{batch}, {length}, H, V] with H a multiple of the '
      f'{groups} heads of q and k, got {v_BTHV.shape}'
    )
  if log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  if log_decay.shape not in [
    (batch, length, heads, width) for width in (1, keys)
  ]:
    raise ValueError(
      f'log_decay must be [{batch}, {length}, {heads}] or with a last axis '
      f'of {keys}, got {log_decay.shape}'
    )
  if beta_BTH is None:
    beta_BTH = jnp.ones((batch, length, heads), jnp.float32)
  if beta_BTH.shape != (batch, length, heads):
    raise ValueError(
      f'beta must be {(batch, length, heads)}, got {beta_BTH.shape}'
    )
  log_decay = log_decay.astype(jnp.float32)
  beta_BTH = beta_BTH.astype(jnp.float32)
  resets_BT = flags('resets', resets, (batch, length), False)
  if mask is not None:
    mask = flags('mask', mask, (batch, length), True)
    resets_BT &= mask
    q_BTGK, k_BTGK, v_BTHV, log_decay = (
      jnp.where(mask[:, :, None, None], x, jnp.zeros([], x.dtype))
      for x in (q_BTGK, k_BTGK, v_BTHV, log_decay)
    )
    beta_BTH = jnp.where(mask[:, :, None], beta_BTH, 0.0)
  state, fresh = states(state, fresh, (batch, heads, keys, values))
  return Inputs(
    q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state, fresh, resets_BT
  )


def flags(
  name: str, given: Array | None, shape: tuple[int, ...], default: bool
) -> Array:
  if given is None:
    return jnp.full(shape, default)
  if given.shape != shape or given.dtype != jnp.bool_:
    raise ValueError(
      f'{name} must be bool {shape}, got {given.dtype} {given.shape}'
    )
  return given


def states(
  state: Array | None, fresh: Array | None, shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
  """The state to start from and the one of resets, float32 of this shape."""
  if fresh is not None:
    if fresh.shape not in (shape, shape[1:]):
      raise ValueError(
        f'fresh must be {shape} or {shape[1:]}, got {fresh.shape}'
      )
    if fresh.ndim < len(shape):
      fresh = fresh[None]
    fresh = jnp.broadcast_to(fresh.astype(jnp.float32), shape)
  if state is None:
    state = jnp.zeros(shape, jnp.float32) if fresh is None else fresh
  if state.shape != shape:
    raise ValueError(f'state must be {shape}, got {state.shape}')
  return state.astype(jnp.float32), fresh


def choose(
  algorithm: str, chunk: int, length: int, known: tuple[str, ...] = CHOICES
) -> int:
  """The chunk to use for T tokens: no longer than they need.

  Raises:
    ValueError: an unknown algorithm, or a chunk that is no power of two.
    UserError: 'fused' with a JAX from which kernels cannot be imported.
  """
  if algorithm not in known:
    raise ValueError(f'algorithm must be in {known}, got {algorithm!r}')
  if algorithm == 'fused':
    from recursive_weights.scans import kernels

    kernels.check_triton()
  if chunk < 2 or chunk & (chunk - 1):
    raise ValueError(f'chunk must be a power of two > 1, got {chunk}')
  return min(chunk, 1 << max(length - 1, 1).bit_length())


def resolve(algorithm: str, given: Inputs) -> str:
  """What 'auto' is: 'fused' on a GPU where it fits, or 'chunked'.

  With values of bfloat16: products of float32 do not run on matrix units, and
  kernels keep states between chunks in the dtype of the values, where float16
  overflows. Of no tokens kernels have no chunk: 'fused' is 'chunked' then too.
  """
  if algorithm == 'fused' and not given.v_BTHV.shape[1]:
    return 'chunked'
  if algorithm != 'auto':
    return algorithm
  from recursive_weights.scans import kernels

  if not kernels.on_one_gpu() or not given.v_BTHV.shape[1]:
    return 'chunked'
  from recursive_weights.scans.kernels import matrix_state

  narrow = given.v_BTHV.dtype == jnp.bfloat16
  return 'fused' if narrow and matrix_state.fits(given) else 'chunked'


def split(x: Array, chunk: int, groups: int) -> Array:
  """`[B, T, H, K]` to `[chunks, N, R, C, K]`, padded with zeros."""
  batch, length, heads, width = x.shape
  count = max(1, -(-length // chunk))
  x = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
  # Two transpositions of five axes, not one of six.
  x = jnp.swapaxes(x, 1, 2).reshape(
    batch * groups, heads // groups, count, chunk, width
  )
  return jnp.moveaxis(x, 2, 0)


def split_flags(x_BT: Array, chunk: int, groups: int) -> Array:
  """bool `[B, T]` to `[chunks, N, 1, C]`."""
  x = split(x_BT[:, :, None, None], chunk, 1)[..., 0]
  return jnp.repeat(x, groups, axis=1)


def join(y: Array, length: int, groups: int) -> Array:
  """The inverse of `split`."""
  count, rows, repeats, chunk, width = y.shape
  y = jnp.moveaxis(y, 0, 2).reshape(
    rows // groups, groups * repeats, count * chunk, width
  )
  return jnp.swapaxes(y, 1, 2)[:, :length]


def grouped(states: Tree, groups: int) -> Tree:
  """Every `[B, H, ...]` of a tree, which may be None, as `[N, R, ...]`."""

  def one(x):
    batch, heads, *rest = x.shape
    return x.reshape(batch * groups, heads // groups, *rest)

  return jax.tree.map(one, states)


def ungrouped(state: Array, groups: int) -> Array:
  rows, repeats, *rest = state.shape
  return state.reshape(rows // groups, groups * repeats, *rest)


def per_head(x_BGK: Array, heads: int) -> Array:
  """Each group's row for every head that it serves, float32."""
  repeats = heads // x_BGK.shape[-2]
  return jnp.repeat(x_BGK, repeats, axis=-2).astype(jnp.float32)


def pending_of(given: Inputs, written_BTHV: Array) -> Pending:
  """A prefill as one chunk, for no state inside it is known."""
  length, groups = given.q_BTGK.shape[1:3]
  chunk = max(length, 1)
  k, written, log_decay = (
    split(x, chunk, groups)
    for x in (given.k_BTGK, written_BTHV, given.log_decay_BTHK)
  )
  return Pending(
    grouped(given.state_BHKV, groups)[None],
    k,
    written,
    log_decay,
    split_flags(given.resets_BT, chunk, groups),
    grouped(given.fresh_BHKV, groups),
  )


def commit(pending: Pending, length_B: Array) -> Array:
  """The state after the first `length_B` tokens of a prefill, without a rerun.

  S_b = diag(exp sum_(m<=b) g_m) S_0
      + sum_(j<=b) diag(exp sum_(j<m<=b) g_m) k_j u_j^T,

  over the tokens of one chunk, S_0 the state at its start and u_j what token
  j wrote: its value, or its correction in the delta rule.

  Args:
    pending: from `prefill`.
    length_B: int `[B]` in [0, T]; rows may differ.

  Returns:
    float32 `[B, H, K, V]`.
  """
  chunk, rows = pending.k.shape[-2], pending.k.shape[1]
  groups = rows // length_B.shape[0]
  length_N = jnp.repeat(length_B, groups)
  index_N, on_NC = locate(pending.starts, chunk, length_N)
  state, k, written, log_decay, resets = (
    x[index_N, jnp.arange(rows)] for x in pending[:-1]
  )
  on = on_NC[:, None, :]
  k = jnp.where(on[..., None], k, jnp.zeros([], k.dtype))
  # Not by anchors: of a whole sequence they compile for most of a minute.
  factors = decay.ends(
    jnp.where(on[..., None], log_decay, 0.0),
    resets & on,
    fresh=pending.fresh is not None,
  )
  state = factors.whole_K[..., None] * state + jnp.einsum(
    '...ck,...cv->...kv',
    k.astype(jnp.float32) * factors.write_CK,
    written.astype(jnp.float32),
    precision='highest',
  )
  if pending.fresh is not None:
    state = state + factors.fresh_whole_K[..., None] * pending.fresh
  return ungrouped(state, groups)


def locate(starts: Array, chunk: int, length_B: Array) -> tuple[Array, Array]:
  """The chunk in which a length ends, and its tokens that count."""
  index_B = jnp.clip((length_B - 1) // chunk, 0, starts.shape[0] - 1)
  rest_B = length_B - index_B * chunk
  return index_B, jnp.arange(chunk)[None] < rest_B[:, None]


def restart(state: Array, fresh: Array | None, resets: Array | None) -> Array:
  """The state with `fresh` in the rows that `resets` names."""
  state, fresh = states(state, fresh, state.shape)
  if resets is None:
    return state
  resets = resets.reshape(-1, *([1] * (state.ndim - 1)))
  return jnp.where(resets, 0.0 if fresh is None else fresh, state)
