"""Gated linear attention and RWKV-6: a matrix state with decay per channel.

  S_t = diag(exp g_t) S_(t-1) + k_t v_t^T
  o_t = S_t^T q_t                                  (gated linear attention)
  o_t = (S_(t-1) + diag(u) k_t v_t^T)^T q_t        (RWKV-6, with a bonus u)

per head, S in R^(K x V). No scale is applied: multiply q by K^-1/2 where a
model wants it.

Sources: Yang et al. 2023, 'Gated Linear Attention Transformers with
Hardware-Efficient Training'; Peng et al. 2024, 'Eagle and Finch: RWKV with
Matrix-Valued States and Dynamic Recurrence'.
"""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array
from recursive_weights.scans import chunks, decay
from recursive_weights.scans.chunks import Pending, commit

__all__ = ['Pending', 'commit', 'prefill', 'scan', 'step']


def scan(
  q_BTGK: Array,
  k_BTGK: Array,
  v_BTHV: Array,
  log_decay: Array,
  *,
  bonus_HK: Array | None = None,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Array]:
  """A whole sequence, from any state.

  Args:
    q_BTGK, k_BTGK: queries (RWKV's receptance) and keys; each of the G heads
      serves H / G heads of values.
    v_BTHV: values.
    log_decay: g <= 0, `[B, T, H, K]`, or `[B, T, H]` where heads decay as one.
      No bound: 0 keeps, minus infinity forgets.
    bonus_HK: RWKV-6's u; tokens then read the state before they write.
    state, fresh, resets, mask: see the package; states are `[B, H, K, V]`.
    algorithm: 'chunked', 'recurrent', 'fused' (GPU kernels; K and V must be
      powers of two from 16 to 256, with room for a state on chip), or 'auto':
      fused for values of bfloat16 on one GPU, from Ampere on, where it can be,
      else chunked.
    chunk: tokens a chunk, a power of two; 32 suits CPUs, 64 GPUs and TPUs.
    precision: of products of float32; operands of 16 bits stay what they are.

  Returns:
    Outputs `[B, T, H, V]` in the dtype of v, and the last state, float32.

  Raises:
    ValueError: a shape, the algorithm or the chunk is wrong.
    UserError: 'fused' on a GPU that cannot run kernels.
  """
  chunk = chunks.choose(algorithm, chunk, v_BTHV.shape[1])
  given = chunks.prepare(
    q_BTGK, k_BTGK, v_BTHV, log_decay, None, state, fresh, resets, mask
  )
  algorithm = chunks.resolve(algorithm, given)
  if algorithm == 'chunked':
    return _chunked(given, bonus_HK, chunk, precision)[:2]

  if algorithm == 'fused':
    return _fused(given, bonus_HK, precision)

  def one(state, q, k, v, log_decay, resets):
    options = {'resets': resets, 'fresh': given.fresh_BHKV}
    return step(state, q, k, v, log_decay, bonus_HK=bonus_HK, **options)

  tokens = (
    *(given.q_BTGK, given.k_BTGK, given.v_BTHV),
    *(given.log_decay_BTHK, given.resets_BT),
  )
  return chunks.recurrent(one, given.state_BHKV, tokens)


def prefill(
  q_BTGK: Array,
  k_BTGK: Array,
  v_BTHV: Array,
  log_decay: Array,
  *,
  bonus_HK: Array | None = None,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Pending]:
  """As `scan`; `commit(pending, length_B)` gives the states.

  Args:
    algorithm: 'chunked', 'fused' or 'auto'; the second keeps no states between
      tokens, so that `commit` sums over the whole sequence.
  """
  chunk = chunks.choose(algorithm, chunk, v_BTHV.shape[1], chunks.PREFILLS)
  given = chunks.prepare(
    q_BTGK, k_BTGK, v_BTHV, log_decay, None, state, fresh, resets, mask
  )
  algorithm = chunks.resolve(algorithm, given)
  if algorithm == 'fused':
    y, _ = _fused(given, bonus_HK, precision)
    return y, chunks.pending_of(given, given.v_BTHV)
  y, _, pending = _chunked(given, bonus_HK, chunk, precision)
  return y, pending


def step(
  state: Array,
  q_BGK: Array,
  k_BGK: Array,
  v_BHV: Array,
  log_decay: Array,
  *,
  bonus_HK: Array | None = None,
  resets: Array | None = None,
  fresh: Array | None = None,
) -> tuple[Array, Array]:
  """One token: the arguments of `scan` without their axis T."""
  heads = v_BHV.shape[1]
  q_BHK, k_BHK = (chunks.per_head(x, heads) for x in (q_BGK, k_BGK))
  if log_decay.ndim == 2:
    log_decay = log_decay[..., None]
  state = chunks.restart(state, fresh, resets)
  written = k_BHK[..., None] * v_BHV.astype(jnp.float32)[:, :, None]
  after = jnp.exp(log_decay.astype(jnp.float32))[..., None] * state + written
  read = after
  if bonus_HK is not None:
    read = state + bonus_HK.astype(jnp.float32)[None, :, :, None] * written
  y_BHV = (q_BHK[..., None] * read).sum(-2)
  return y_BHV.astype(v_BHV.dtype), after


def _fused(given: chunks.Inputs, bonus_HK, precision):
  from recursive_weights.scans.kernels import matrix_state

  return matrix_state.scan(
    given,
    delta=False,
    bonus_HK=bonus_HK,
    precision=precision,
  )


def _chunked(given: chunks.Inputs, bonus_HK, chunk, precision):
  groups = given.q_BTGK.shape[2]
  dtype = given.v_BTHV.dtype
  q, k, v, log_decay = (
    chunks.split(x, chunk, groups)
    for x in (given.q_BTGK, given.k_BTGK, given.v_BTHV, given.log_decay_BTHK)
  )
  resets = chunks.split_flags(given.resets_BT, chunk, groups)
  fresh = chunks.grouped(given.fresh_BHKV, groups)
  q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
  factors = decay.anchors(
    log_decay,
    resets,
    exclusive=bonus_HK is not None,
    fresh=fresh is not None,
  )
  diagonal_CK = q32 * k32
  if bonus_HK is not None:
    bonus = chunks.grouped(bonus_HK.astype(jnp.float32)[None], groups)
    bonus = jnp.tile(bonus, (given.v_BTHV.shape[0], 1, 1))
    diagonal_CK = diagonal_CK * bonus[None, :, :, None]

  def times(spec, a, b):
    return decay.product(spec, a, b, dtype, precision)

  written = times('...ck,...cv->...kv', k32 * factors.write_CK, v)
  if fresh is not None:
    written += factors.fresh_whole_K[..., None] * fresh[None]

  def body(state, chunk_of):
    whole_K, written = chunk_of
    return whole_K[..., None] * state + written, state

  state, starts = jax.lax.scan(
    body, chunks.grouped(given.state_BHKV, groups), (factors.whole_K, written)
  )
  scores_CC = decay.scores(
    q32, k32, factors, diagonal_CK.sum(-1), dtype=dtype, precision=precision
  )
  y = times('...cd,...dv->...cv', scores_CC, v)
  y += times('...ck,...kv->...cv', q32 * factors.read_CK, starts)
  if fresh is not None:
    y += times('...ck,...kv->...cv', q32 * factors.fresh_read_CK, fresh[None])
  y_BTHV = chunks.join(y, given.v_BTHV.shape[1], groups).astype(dtype)
  pending = Pending(starts, k, v, log_decay, resets, fresh)
  return y_BTHV, chunks.ungrouped(state, groups), pending
