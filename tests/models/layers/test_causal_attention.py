"""Attention in a ring against attention over all tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.models.layers import causal_attention, past

B, T, D, HEAD = 2, 24, 8, 4
HEADS = D // HEAD


def initial():
  return jax.jit(lambda key: causal_attention.init(key, D, head_width=HEAD))(
    jax.random.key(0)
  )


def dense(p, x_TD, place_T, window):
  """Every token with its own row of scores; angles by absolute position."""
  q, k, v = np.split(x_TD @ p['qkv'], 3, axis=-1)
  q, k, v = (y.reshape(-1, HEADS, HEAD) for y in (q, k, v))
  angle = np.arange(len(x_TD))[:, None] * 10_000.0 ** (
    -np.arange(0, HEAD, 2) / HEAD
  )
  # A turn is a product with a complex number of modulus one.
  phase = np.exp(1j * angle)[:, None]
  q, k = (
    (y[..., : HEAD // 2] + 1j * y[..., HEAD // 2 :]) * phase for y in (q, k)
  )
  outputs = []
  for t, place in enumerate(place_T):
    seen = slice(t - min(place, window - 1), t + 1)
    score = np.einsum('hk,mhk->hm', q[t].conj(), k[seen]).real / np.sqrt(HEAD)
    share = np.exp(score - score.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    outputs.append(np.einsum('hm,mhk->hk', share, v[seen]).reshape(D))
  return np.stack(outputs) @ p['out']


@pytest.mark.parametrize('window', [1, 5, 64])
@pytest.mark.parametrize('size', [24, 8])
def test_the_ring_is_attention_over_the_window(window, size):
  params = initial()
  stream = np.random.default_rng(0)
  x = stream.normal(size=(B, T, D))
  resets = np.zeros((B, T), bool)
  resets[0, 8] = True
  position_B = jnp.zeros([B], jnp.int32)
  place = np.asarray(past.places(position_B, T, jnp.asarray(resets)))
  np.testing.assert_array_equal(place[0], [*range(8), *range(16)])
  np.testing.assert_array_equal(place[1], range(24))
  double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = [dense(double, *row, window) for row in zip(x, place, strict=True)]

  @jax.jit
  def run(cache, position_B, x_BTD, resets_BT):
    place_BT = past.places(position_B, size, resets_BT)
    length_B = jnp.full([B], size, jnp.int32)
    y, parts = causal_attention.apply(params, cache, x_BTD, place_BT)
    cache = causal_attention.commit(cache, parts, place_BT, length_B)
    return y, cache, past.advance(position_B, place_BT, length_B)

  cache = causal_attention.start(B, D, window=window, head_width=HEAD)
  found = []
  for start in range(0, T, size):
    part = slice(start, start + size)
    chunk = np.asarray(x[:, part], np.float32)
    y, cache, position_B = run(cache, position_B, chunk, resets[:, part])
    found.append(y)
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), np.stack(expected), rtol=1e-4, atol=1e-5
  )


def test_long_documents_lose_no_precision():
  """Only distances are turned by, so token 10^9 sees what token 10 sees."""
  params = initial()
  x = jax.random.normal(jax.random.key(1), (1, 4, D))
  window = 8
  run = jax.jit(lambda *given: causal_attention.apply(params, *given)[0])
  found = []
  for begin in (16, 16 + window * 10**8):
    cache = causal_attention.start(1, D, window=window, head_width=HEAD)
    key = jax.random.normal(jax.random.key(2), cache['key'].shape)
    cache = {'key': key, 'value': 2 * key}
    place_BT = past.places(jnp.array([begin], jnp.int32), 4)
    found.append(run(cache, x, place_BT))
  np.testing.assert_array_equal(*found)
