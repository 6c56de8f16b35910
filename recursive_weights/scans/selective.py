"""Mamba-1: a selective scan, with a decay of its own for every state entry.

  h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T
  y_t = h_t C_t

h in R^(D x N): channel d has N entries, which decay by A_dn. Each is a scalar
recurrence, so no product of matrices does many tokens at once: a chunk is an
associative scan of (decay, input) pairs, decays are products of numbers in
[0, 1], and the backward pass runs chunks again from their starts. The skip
D x and the gate belong to the layer.

Source: Gu and Dao 2023, 'Mamba: Linear-Time Sequence Modeling with Selective
State Spaces'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array
from recursive_weights.scans import chunks


class Pending(NamedTuple):
  """A prefill whose tokens are not yet accepted: what `commit` needs.

  The state at the start of each chunk, and inputs, step sizes, input maps and
  resets by chunk, `[chunks, C, B, ...]`; A; the state of resets.
  """

  starts: Array
  x: Array
  dt: Array
  b: Array
  resets: Array
  a_DN: Array
  fresh: Array | None


def scan(
  x_BTD: Array,
  dt_BTD: Array,
  a_DN: Array,
  b_BTN: Array,
  c_BTN: Array,
  *,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
) -> tuple[Array, Array]:
  """A whole sequence, from any state; all arithmetic in float32.

  Args:
    x_BTD: inputs.
    dt_BTD: step sizes >= 0 (after the softplus).
    a_DN: A <= 0.
    b_BTN, c_BTN: input and output maps.
    state, fresh, resets, mask: see the package; states are `[B, D, N]`.
    algorithm: 'chunked' (parallel within chunks), 'recurrent' (token by token
      within chunks: less work), 'fused' (a GPU kernel, token by token; D must
      be a multiple of 16 and N a power of two from 2 to 64), or 'auto': fused
      for values of at most 32 bits on one GPU, from Ampere on, where it can be,
      recurrent on a CPU, else chunked. All keep only the states between chunks
      for the backward pass.
    chunk: tokens a chunk, a power of two.

  Returns:
    Outputs `[B, T, D]` in the dtype of x, and the last state, float32.

  Raises:
    ValueError: a shape, the algorithm or the chunk is wrong, or 'fused' does
      not take D and N, see `kernels.selective`.
    UserError: 'fused' on a GPU that cannot run kernels.
  """
  chunk = chunks.choose(algorithm, chunk, x_BTD.shape[1])
  y, state, _ = _chunked(
    *(x_BTD, dt_BTD, a_DN, b_BTN, c_BTN),
    *(state, fresh, resets, mask, algorithm, chunk),
  )
  return y, state


def prefill(
  x_BTD: Array,
  dt_BTD: Array,
  a_DN: Array,
  b_BTN: Array,
  c_BTN: Array,
  *,
  state: Array | None = None,
  fresh: Array | None = None,
  resets: Array | None = None,
  mask: Array | None = None,
  algorithm: str = 'auto',
  chunk: int = 64,
) -> tuple[Array, Pending]:
  """As `scan`; `commit(pending, length_B)` gives the states."""
  chunk = chunks.choose(algorithm, chunk, x_BTD.shape[1])
  y, _, pending = _chunked(
    *(x_BTD, dt_BTD, a_DN, b_BTN, c_BTN),
    *(state, fresh, resets, mask, algorithm, chunk),
  )
  return y, pending


def commit(pending: Pending, length_B: Array) -> Array:
  """The state after the first `length_B` tokens of a prefill, `[B, D, N]`.

  Args:
    pending: from `prefill`.
    length_B: int `[B]` in [0, T]; rows may differ.
  """
  chunk = pending.x.shape[1]
  index_B, on_BC = chunks.locate(pending.starts, chunk, length_B)
  rows_B = jnp.arange(index_B.shape[0])
  x, dt, b, resets = (
    x[index_B, :, rows_B].swapaxes(0, 1)
    for x in (pending.x, pending.dt, pending.b, pending.resets)
  )
  on_CB = on_BC.T
  tokens = (x, jnp.where(on_CB[..., None], dt, 0.0), b, resets & on_CB)
  states = _parallel(
    pending.starts[index_B, rows_B], pending.a_DN, pending.fresh, tokens
  )
  return states[-1]


def step(
  state: Array,
  x_BD: Array,
  dt_BD: Array,
  a_DN: Array,
  b_BN: Array,
  c_BN: Array,
  *,
  resets: Array | None = None,
  fresh: Array | None = None,
) -> tuple[Array, Array]:
  """One token: the arguments of `scan` without their axis T."""
  x, dt, a_DN, b, c = (
    z.astype(jnp.float32) for z in (x_BD, dt_BD, a_DN, b_BN, c_BN)
  )
  state = chunks.restart(state, fresh, resets)
  decay, written = _factors(a_DN, x, dt, b)
  state = decay * state + written
  y_BD = (state * c[:, None]).sum(-1)
  return y_BD.astype(x_BD.dtype), state


def resolve(algorithm: str, dtype, width: int, entries: int) -> str:
  """What 'auto' is: 'fused' on a GPU where it fits, else by the device.

  With values of float16 and float32 too, unlike a matrix state's: the kernel
  has no products for matrix units and all its arithmetic is in float32. Not
  with float64, as there.
  """
  if algorithm != 'auto':
    return algorithm
  if jax.default_backend() == 'cpu':
    return 'recurrent'
  from recursive_weights.scans import kernels

  if dtype == jnp.float64 or not kernels.on_one_gpu():
    return 'chunked'
  from recursive_weights.scans.kernels import selective

  return 'fused' if selective.fits(width, entries) else 'chunked'


def _factors(a_DN, x, dt, b):
  """exp(dt A) and dt x B^T, `[..., D, N]`."""
  a_DN = a_DN.reshape((1,) * (x.ndim - 1) + a_DN.shape)
  return jnp.exp(dt[..., None] * a_DN), (dt * x)[..., None] * b[..., None, :]


def _parallel(state, a_DN, fresh, tokens):
  """The states after every token of a chunk, `[C, B, D, N]`."""
  x, dt, b, resets = tokens
  decay, written = _factors(a_DN, x, dt, b)
  resets = resets[..., None, None]
  if fresh is not None:
    written += jnp.where(resets, decay, 0.0) * fresh[None]
  decay = jnp.where(resets, 0.0, decay)

  def then(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]

  decay, written = jax.lax.associative_scan(then, (decay, written))
  return decay * state[None] + written


def _chunked(
  x_BTD, dt_BTD, a_DN, b_BTN, c_BTN, state, fresh, resets, mask, algorithm,
  chunk,
):  # fmt: skip
  batch, length, width = _check(x_BTD, dt_BTD, a_DN, b_BTN, c_BTN)
  algorithm = resolve(algorithm, x_BTD.dtype, *a_DN.shape)
  count = max(1, -(-length // chunk))
  state, fresh = chunks.states(state, fresh, (batch, width, a_DN.shape[1]))
  resets = chunks.flags('resets', resets, (batch, length), False)
  tokens = [z.astype(jnp.float32) for z in (x_BTD, dt_BTD, b_BTN, c_BTN)]
  a_DN = a_DN.astype(jnp.float32)
  if mask is not None:
    mask = chunks.flags('mask', mask, (batch, length), True)
    resets &= mask
    tokens = [jnp.where(mask[..., None], z, 0.0) for z in tokens]
  x, dt, b, c, resets = (
    _split(z, count, chunk) for z in (*tokens, resets[..., None])
  )
  resets = resets[..., 0]
  pending = Pending(state, x, dt, b, resets, a_DN, fresh)
  if algorithm == 'fused':
    from recursive_weights.scans.kernels import selective

    x, dt, b, c, resets = (_join(z) for z in (x, dt, b, c, resets))
    y, state, starts = selective.scan(
      *(x, dt, a_DN, b, c, state, fresh, resets), chunk=chunk
    )
    y = y[:, :length].astype(x_BTD.dtype)
    return y, state, pending._replace(starts=starts)

  @jax.checkpoint
  def run(state, a_DN, fresh, tokens):
    *written, c = tokens
    if algorithm == 'chunked':
      states = _parallel(state, a_DN, fresh, tuple(written))
      return states[-1], jnp.einsum(
        'cbdn,cbn->cbd', states, c, precision='highest'
      )

    def one(state, token):
      x, dt, b, resets, c = token
      y, state = step(state, x, dt, a_DN, b, c, resets=resets, fresh=fresh)
      return state, y

    return jax.lax.scan(one, state, tokens, unroll=min(4, chunk))

  def body(state, tokens):
    after, y = run(state, a_DN, fresh, tokens)
    return after, (state, y)

  state, (starts, y) = jax.lax.scan(body, state, (x, dt, b, resets, c))
  y = y.reshape(count * chunk, batch, width)[:length]
  y = y.swapaxes(0, 1).astype(x_BTD.dtype)
  return y, state, pending._replace(starts=starts)


def _split(z_BTD, count, chunk):
  """`[B, T, D]` to `[chunks, C, B, D]`, padded with zeros."""
  batch, length, width = z_BTD.shape
  z = jnp.pad(z_BTD, ((0, 0), (0, count * chunk - length), (0, 0)))
  return z.swapaxes(0, 1).reshape(count, chunk, batch, width)


def _join(z):
  """The reverse of `_split`, but for the zeros."""
  return z.reshape(-1, *z.shape[2:]).swapaxes(0, 1)


def _check(x_BTD, dt_BTD, a_DN, b_BTN, c_BTN):
  if x_BTD.ndim != 3 or a_DN.ndim != 2:
    raise ValueError(
      f'x must be [B, T, D] and A [D, N], got {x_BTD.shape} and {a_DN.shape}'
    )
  batch, length, width = x_BTD.shape
  maps = (batch, length, a_DN.shape[1])
  if (
    dt_BTD.shape != x_BTD.shape
    or a_DN.shape[0] != width
    or b_BTN.shape != maps
    or c_BTN.shape != maps
  ):
    raise ValueError(
      f'dt must be {x_BTD.shape}, A [{width}, N] and B and C {maps}, got '
      f'{dt_BTD.shape}, {a_DN.shape}, {b_BTN.shape} and {c_BTN.shape}'
    )
  return batch, length, width
