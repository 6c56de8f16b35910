"""Gated delta rule and Kimi Delta Attention: a memory that corrects itself.

  S~_t = diag(exp g_t) S_(t-1)
  S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T
  o_t  = S_t^T q_t

per head, S in R^(K x V). One g a head is the gated delta rule, one a channel
is Kimi Delta Attention. Keys are expected to have norm 1 and beta to lie in
[0, 2] for a stable memory; no scale is applied to q.

In chunks (the WY form): with E and A the decays from the start of the chunk
and between two tokens,
L_ij = beta_i (k_i A_ij k_j^T) for j < i and M = (I + L)^-1 diag(beta), the
corrections of a whole chunk are U = M V - M (E K) S, so that
S' = E_C S + (E_C / E K)^T U, with E_C / E never formed as a quotient.

Sources: Yang et al. 2024, 'Gated Delta Networks: Improving Mamba2 with Delta
Rule'; Kimi Team 2025, 'Kimi Linear: An Expressive, Efficient Attention
Architecture'.
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
  beta_BTH: Array,
  *,
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
    q_BTGK, k_BTGK: queries and keys; each of the G heads serves H / G heads of
      values.
    v_BTHV: values.
    log_decay: g <= 0, `[B, T, H, K]` (Kimi Delta Attention) or `[B, T, H]`
      (gated delta rule). No bound: 0 keeps, minus infinity forgets.
    beta_BTH: strength of the correction.
    state, fresh, resets, mask: see the package; states are `[B, H, K, V]`.
    algorithm: 'chunked', 'recurrent', 'fused' (GPU kernels; K and V must be
      powers of two from 16 to 256, with room for a state on chip), or 'auto':
      fused for values of bfloat16 on one GPU, from Ampere on, where it can be,
      else chunked.
    chunk: tokens a chunk, a power of two; 32 suits CPUs, 64 GPUs and TPUs.
    precision: of products of float32; operands of 16 bits stay what they are,
      the inverse is float32 at 'highest', but TF32 in GPU kernels of 16 bits.

  Returns:
    Outputs `[B, T, H, V]` in the dtype of v, and the last state, float32.

  Raises:
    ValueError: a shape, the algorithm or the chunk is wrong.
    UserError: 'fused' on a GPU that cannot run kernels.
  """
  chunk = chunks.choose(algorithm, chunk, v_BTHV.shape[1])
  given = chunks.prepare(
    q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state, fresh, resets, mask
  )
  algorithm = chunks.resolve(algorithm, given)
  if algorithm == 'chunked':
    return _chunked(given, chunk, precision)[:2]

  if algorithm == 'fused':
    return _fused(given, precision)

  def one(state, q, k, v, log_decay, beta, resets):
    options = {'resets': resets, 'fresh': given.fresh_BHKV}
    return step(state, q, k, v, log_decay, beta, **options)

  tokens = (
    *(given.q_BTGK, given.k_BTGK, given.v_BTHV),
    *(given.log_decay_BTHK, given.beta_BTH, given.resets_BT),
  )
  return chunks.recurrent(one, given.state_BHKV, tokens)


def prefill(
  q_BTGK: Array,
  k_BTGK: Array,
  v_BTHV: Array,
  log_decay: Array,
  beta_BTH: Array,
  *,
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
      tokens, so that `commit` sums over the whole sequence, and corrections in
      the dtype of v.
  """
  chunk = chunks.choose(algorithm, chunk, v_BTHV.shape[1], chunks.PREFILLS)
  given = chunks.prepare(
    q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, state, fresh, resets, mask
  )
  if chunks.resolve(algorithm, given) == 'fused':
    y, _, written = _fused(given, precision, written=True)
    return y, chunks.pending_of(given, written)
  y, _, pending = _chunked(given, chunk, precision)
  return y, pending


def step(
  state: Array,
  q_BGK: Array,
  k_BGK: Array,
  v_BHV: Array,
  log_decay: Array,
  beta_BH: Array,
  *,
  resets: Array | None = None,
  fresh: Array | None = None,
) -> tuple[Array, Array]:
  """One token: the arguments of `scan` without their axis T."""
  heads = v_BHV.shape[1]
  q_BHK, k_BHK = (chunks.per_head(x, heads) for x in (q_BGK, k_BGK))
  if log_decay.ndim == 2:
    log_decay = log_decay[..., None]
  state = chunks.restart(state, fresh, resets)
  state = jnp.exp(log_decay.astype(jnp.float32))[..., None] * state
  error_BHV = v_BHV.astype(jnp.float32) - (k_BHK[..., None] * state).sum(-2)
  written_BHV = beta_BH.astype(jnp.float32)[..., None] * error_BHV
  state = state + k_BHK[..., None] * written_BHV[:, :, None]
  y_BHV = (q_BHK[..., None] * state).sum(-2)
  return y_BHV.astype(v_BHV.dtype), state


def _fused(given: chunks.Inputs, precision, *, written=False):
  from recursive_weights.scans.kernels import matrix_state

  return matrix_state.scan(
    given, delta=True, written=written, precision=precision
  )


def _chunked(given: chunks.Inputs, chunk, precision):
  groups = given.q_BTGK.shape[2]
  dtype = given.v_BTHV.dtype
  q, k, v, log_decay, beta = (
    chunks.split(x, chunk, groups)
    for x in (
      *(given.q_BTGK, given.k_BTGK, given.v_BTHV),
      *(given.log_decay_BTHK, given.beta_BTH[..., None]),
    )
  )
  resets = chunks.split_flags(given.resets_BT, chunk, groups)
  fresh = chunks.grouped(given.fresh_BHKV, groups)
  q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
  factors = decay.anchors(log_decay, resets, fresh=fresh is not None)

  def times(spec, a, b):
    return decay.product(spec, a, b, dtype, precision)

  below = decay.blocks(
    beta * k32, k32, factors, dtype=dtype, precision=precision
  )
  solve_CC = decay.inverse(below) * jnp.swapaxes(beta, -1, -2)
  scores_CC = decay.scores(
    *(q32, k32, factors, (q32 * k32).sum(-1)),
    dtype=dtype,
    precision=precision,
  )
  old_CK = times('...cd,...dk->...ck', solve_CC, k32 * factors.read_CK)
  new_CV = times('...cd,...dv->...cv', solve_CC, v)
  if fresh is not None:
    born_CK = times('...cd,...dk->...ck', solve_CC, k32 * factors.fresh_read_CK)
    new_CV -= times('...ck,...kv->...cv', born_CK, fresh[None])

  def body(state, chunk_of):
    whole_K, write_CK, old_CK, new_CV, *born = chunk_of
    written_CV = new_CV - times('...ck,...kv->...cv', old_CK, state)
    after = whole_K[..., None] * state
    after += times('...ck,...cv->...kv', write_CK, written_CV)
    if born:
      after += born[0][..., None] * fresh
    return after, (state, written_CV)

  sequence = [factors.whole_K, k32 * factors.write_CK, old_CK, new_CV]
  if fresh is not None:
    sequence.append(factors.fresh_whole_K)
  state, (starts, written) = jax.lax.scan(
    body, chunks.grouped(given.state_BHKV, groups), tuple(sequence)
  )
  y = times('...cd,...dv->...cv', scores_CC, written)
  y += times('...ck,...kv->...cv', q32 * factors.read_CK, starts)
  if fresh is not None:
    y += times('...ck,...kv->...cv', q32 * factors.fresh_read_CK, fresh[None])
  y_BTHV = chunks.join(y, given.v_BTHV.shape[1], groups).astype(dtype)
  pending = Pending(starts, k, written, log_decay, resets, fresh)
  return y_BTHV, chunks.ungrouped(state, groups), pending
