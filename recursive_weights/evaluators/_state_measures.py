"""Measures of recurrent states, `S [..., H, K, V]` float32, by head.

They are numbers only: what is healthy is for `_verdicts` to say. N = K V is the
number of entries of one head's state of one row and layer.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array

LARGE = 5.0  # in units of the root mean square
NEVER = 1e6  # tokens: a half-life that is longer is given as this
# Tokens: half-lives of heads that keep something and lose something. A head
# with a shorter one keeps less than a thousandth of its state for a token, and
# one with a longer one loses less than a hundredth in a thousand tokens. Those
# of healthy models lie far inside: from .4 to 700 where Mamba-2 starts as
# published, from .5 to 250 in trained hybrids, RWKV-6 and Mamba-2.
ALIVE = (0.1, 1e5)
_TINY = 1e-30


def rms(state: Array) -> Array:
  """Root of the mean square of a head's entries, `[..., H]`."""
  return jnp.sqrt((state * state).mean((-2, -1)))


def entropy(state: Array) -> Array:
  """-sum p ln p / ln N with p = softmax(S / rms), of a head's N entries.

  Over its root mean square and over ln N, since what is read is normalised and
  a large state has much entropy whatever it holds: 1 for equal entries, about
  1 - 1 / (2 ln N) for Gaussian ones, less where few stand out.
  """
  scale = jnp.maximum(rms(state), _TINY)[..., None, None]
  flat = (state / scale).reshape(*state.shape[:-2], -1)
  log_p = jax.nn.log_softmax(flat, axis=-1)
  return -(jnp.exp(log_p) * log_p).sum(-1) / math.log(flat.shape[-1])


def evenness(state: Array) -> Array:
  """exp(H) / N, H = -sum p ln p with p = S^2 / sum S^2, of a head's N entries.

  The share of its entries that holds it, whatever N is: 1 for equal entries,
  .48 for Gaussian ones, .23 for a product of two long Gaussian vectors (.27 for
  16 values each), 1 / N for a single one. An exponential of entries, as in
  `entropy`, sees no more than the few largest, and more so the larger N.
  """
  energy = (state * state).reshape(*state.shape[:-2], -1)
  p = energy / jnp.maximum(energy.sum(-1, keepdims=True), _TINY)
  return jnp.exp(jax.scipy.special.entr(p).sum(-1)) / p.shape[-1]


def spectrum(state: Array) -> tuple[Array, Array]:
  """s_1 / sum s and (s_1 + ... + s_5) / sum s of a head's singular values.

  1 / min(K, V) is the least of the first; a state of rank one has 1, and one
  that is all zero 0.
  """
  s = jnp.linalg.svd(state, compute_uv=False)
  total = jnp.maximum(s.sum(-1), _TINY)
  return s[..., 0] / total, s[..., :5].sum(-1) / total


def saturation(state: Array) -> Array:
  """Share of a head's entries that exceed 5 times its root mean square.

  A linear state saturates nowhere, and its unit is arbitrary, since what reads
  it is normalised; so large means large beside the other entries. Of Gaussian
  entries 6e-7 are, and never more than 1/25 can be (Chebyshev).
  """
  limit = LARGE * rms(state)[..., None, None]
  return (jnp.abs(state) > limit).astype(jnp.float32).mean((-2, -1))


def cosine(before: Array, after: Array) -> Array:
  """Of the angle between two states of a head; 0 where one is zero."""
  dot = (before * after).mean((-2, -1))
  return dot / jnp.maximum(rms(before) * rms(after), _TINY)


def update(before: Array, after: Array) -> Array:
  """|S_t - S_(t-1)| / |S_t|, which resolves what a cosine near 1 does not."""
  return rms(after - before) / jnp.maximum(rms(after), _TINY)


def half_life(distance: np.ndarray) -> np.ndarray:
  """Tokens after which a perturbation has halved.

  Interpolated where its logarithm passes ln 1/2; where it has not halved by the
  end, from what it has lost by then, and `NEVER` where it has lost nothing.

  Args:
    distance: `[1 + T, ...]`, the norm of the perturbation after 0, 1, ... T
      tokens.
  """
  distance = np.asarray(distance, np.float64)
  lost = -np.log(np.maximum(distance, _TINY) / np.maximum(distance[0], _TINY))
  tokens = len(lost) - 1
  halved = lost >= math.log(2)
  after = np.where(halved.any(0), halved.argmax(0), tokens)
  below, above = (
    np.take_along_axis(lost, index[None], 0)[0]
    for index in (np.maximum(after - 1, 0), after)
  )
  share = (math.log(2) - below) / np.maximum(above - below, _TINY)
  inside = after - 1 + share
  rate = np.maximum(lost[-1] / tokens, math.log(2) / NEVER)
  return np.where(halved.any(0), inside, math.log(2) / rate)


def collapsed(half_life: np.ndarray) -> np.ndarray:
  """Share of heads, the last axis, whose decay is 0 or 1 by `ALIVE`.

  A median of half-lives does not see them: it is that of the other heads as
  long as these are more.
  """
  shortest, longest = ALIVE
  return 1 - ((shortest <= half_life) & (half_life <= longest)).mean(-1)


def selection(distance: np.ndarray, tokens: int = 8) -> np.ndarray:
  """How much what is forgotten depends on the text.

  The standard deviation over texts of ln(d_0 / d_n) over its mean, n tokens
  after the same perturbation; 0 where decays are constants.

  Args:
    distance: `[1 + T, ..., B, H]`, see `half_life`; B texts.
    tokens: n, at most T.

  Returns:
    `[..., H]`.
  """
  distance = np.maximum(np.asarray(distance, np.float64), _TINY)
  lost = np.log(distance[0] / distance[min(tokens, len(distance) - 1)])
  spread, mean = lost.std(-2), np.abs(lost.mean(-2))
  # A hundredth of a percent in n tokens is what float32 cannot tell from none.
  return np.where(mean > 1e-4, spread / np.maximum(mean, 1e-4), 0.0)
