"""Synchronisation of neuron pairs: how alike two neurons' histories are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, UserError

PAIRINGS = ('first-last', 'random', 'random-pairing')
_ONE_HOT_LIMIT = 2**18  # entries of a selection that is a product backwards
_MAX_DECAY = 15.0


class Pairs(NamedTuple):
  """Which neurons are paired: constants, a function of (seed, widths) alone.

  left, right: J neurons on either side.
  rows, cols: pair p is (left[rows[p]], right[cols[p]]).
  """

  left: np.ndarray
  right: np.ndarray
  rows: np.ndarray
  cols: np.ndarray

  @property
  def size(self) -> int:
    return len(self.rows)


def make_pairs(
  pairing: str, side: str, width: int, count: int, self_pairs: int, seed: int
) -> Pairs:
  """The pairs of one read-out.

  first-last: the first (out) or last (action) J neurons, each with each:
    P = J (J + 1) / 2.
  random: J neurons left and J right, drawn with replacement; the upper
    triangle of all J x J pairs.
  random-pairing: J pairs drawn with replacement, the first `self_pairs` of
    them of a neuron with itself.

  Args:
    side: 'out' or 'action'; they are drawn from independent streams.
  """
  if pairing not in PAIRINGS:
    raise UserError(f'pairing must be one of {PAIRINGS}, got {pairing!r}')
  if not 0 < count <= width:
    raise UserError(f'sync_{side} must be in [1, {width}], got {count}')
  if not 0 <= self_pairs <= count:
    raise UserError(f'self_pairs must be in [0, {count}], got {self_pairs}')
  if pairing == 'first-last':
    start = 0 if side == 'out' else width - count
    left = right = np.arange(start, start + count)
  else:
    key = np.array([seed, ('out', 'action').index(side)], np.uint64)
    stream = np.random.Generator(np.random.Philox(key=key))
    left = stream.integers(0, width, count)
    right = stream.integers(0, width, count)
  if pairing == 'random-pairing':
    right = np.concatenate([left[:self_pairs], right[self_pairs:]])
    return Pairs(left, right, np.arange(count), np.arange(count))
  return Pairs(left, right, *np.triu_indices(count))


def product(pairs: Pairs, z: Array) -> Array:
  """`z_i z_j` of every pair in float32: `[..., D]` to `[..., P]`."""
  z_ND = z.astype(jnp.float32).reshape(-1, z.shape[-1])
  left_NJ, right_NJ = _select(z_ND, pairs.left), _select(z_ND, pairs.right)
  if len(pairs.left) != pairs.size:
    left_NJ = _select(left_NJ, pairs.rows)
    right_NJ = _select(right_NJ, pairs.cols)
  return (left_NJ * right_NJ).reshape(*z.shape[:-1], pairs.size)


def decay(p: Array) -> Array:
  """`clip(p, 0, 15)`, the exponent of the decay r = exp(-p) of a pair.

  The gradient is that of a projection after each update: 1 inside and *at*
  the bounds (p starts at 0, where the gradient of a clip would be dead), and
  beyond a bound only what leads a descent back.
  """
  return _projected(p.astype(jnp.float32))


def accumulate(
  rate_P: Array, alpha_BP: Array, beta_BP: Array, product_BP: Array
) -> tuple[Array, Array, Array]:
  """One step of synchronisation; alpha and beta start at 0.

  alpha <- r alpha + z_i z_j,  beta <- r beta + 1,  sync = alpha / sqrt(beta)
  """
  alpha_BP = rate_P[None] * alpha_BP + product_BP
  beta_BP = rate_P[None] * beta_BP + 1
  return alpha_BP, beta_BP, alpha_BP * jax.lax.rsqrt(beta_BP)


def over_steps(decay_P: Array, products_SBP: Array) -> Array:
  """`accumulate` over a whole history at once, its first entry left out.

  sync_s = sum_(t <= s) r^(s - t) product_t / sqrt(sum_(t <= s) r^(s - t))

  Args:
    decay_P: from `decay`.
    products_SBP: products of the start and after each of the S steps.

  Returns:
    `[S, B, P]` for the S steps.
  """
  steps = products_SBP.shape[0]
  ages_ST = np.arange(1, steps)[:, None] - np.arange(steps)[None]
  exponent_STP = np.maximum(ages_ST, 0)[..., None] * -decay_P[None, None]
  weight_STP = jnp.where((ages_ST >= 0)[..., None], jnp.exp(exponent_STP), 0.0)
  alpha_SBP = jnp.einsum(
    'STP,TBP->SBP',
    weight_STP,
    products_SBP,
    precision=jax.lax.Precision.HIGHEST,
  )
  return alpha_SBP * jax.lax.rsqrt(weight_STP.sum(1))[:, None]


@jax.custom_vjp
def _projected(p):
  return jnp.clip(p, 0.0, _MAX_DECAY)


def _projected_forward(p):
  return jnp.clip(p, 0.0, _MAX_DECAY), p


def _projected_backward(p, g):
  g = jnp.where(p < 0, jnp.minimum(g, 0), g)
  return (jnp.where(p > _MAX_DECAY, jnp.maximum(g, 0), g),)


_projected.defvjp(_projected_forward, _projected_backward)


def _select(x_BN, index_J):
  """`x[:, index]`, whose backward pass is a product where that is small.

  A scatter is slow on CPUs and adds in no fixed order on GPUs.
  """
  width = x_BN.shape[1]
  if width * len(index_J) > _ONE_HOT_LIMIT:
    return x_BN[:, index_J]

  @jax.custom_vjp
  def select(x_BN):
    return x_BN[:, index_J]

  def backward(_, g_BJ):
    one_hot_JN = jax.nn.one_hot(index_J, width, dtype=g_BJ.dtype)
    return (jnp.matmul(g_BJ, one_hot_JN, precision=jax.lax.Precision.HIGHEST),)

  select.defvjp(lambda x_BN: (select(x_BN), None), backward)
  return select(x_BN)
