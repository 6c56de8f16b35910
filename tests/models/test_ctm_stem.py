"""The convolutional stem of the CTM against a plain loop in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.models import ctm, ctm_attention


def spec(places, dtype=jnp.float32):
  shape = (places, 2) if dtype == jnp.float32 else (places,)
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  return interfaces.Spec(inputs, (), 3, {'train': None})


def make(places, **fields):
  return ctm.make(
    spec(places, fields.pop('inputs', jnp.float32)),
    width=8,
    input_width=4,
    heads=2,
    memory=3,
    ticks=2,
    sync_out=3,
    sync_action=3,
    **fields,
  )


def test_stem_is_two_convolutions_of_neighbours():
  model = make(9, stem=5)
  x_BTC = np.random.default_rng(0).normal(size=(2, 9, 2)).astype(np.float32)
  params = model.init(jax.random.key(0), x_BTC)['features']['stem']
  x = x_BTC.astype(np.float64).reshape(2, 3, 3, 2)
  for name in ('first', 'second'):
    kernel = np.asarray(params[name]['kernel'], np.float64)
    y = np.zeros((2, 3, 3, 5))
    for i in range(3):
      for j in range(3):
        for di in range(3):
          for dj in range(3):
            a, b = i + di - 1, j + dj - 1
            if 0 <= a < 3 and 0 <= b < 3:
              y[:, i, j] += x[:, a, b] @ kernel[di, dj]
    y = y + np.asarray(params[name]['bias'])
    x = y / (1 + np.exp(-y))
  found = ctm_attention._stem(params, jnp.asarray(x_BTC), jnp.float32)
  np.testing.assert_allclose(found, x.reshape(2, 9, 5), rtol=1e-4, atol=1e-6)


def test_without_a_stem_nothing_of_it_is_there():
  x_BTC = jnp.ones((1, 9, 2))
  plain = make(9).init(jax.random.key(0), x_BTC)
  stemmed = make(9, stem=5).init(jax.random.key(0), x_BTC)
  assert 'stem' not in plain['features']
  assert stemmed['features']['stem']['second']['kernel'].shape == (3, 3, 5, 5)


def test_tokens_go_through_the_stem_as_one_hot_vectors():
  tokens_BT = jnp.asarray([[0, 2, 1, 1, 0, 2, 2, 1, 0]], jnp.int32)
  model = make(9, stem=5, inputs=jnp.int32, vocabulary=3)
  params = model.init(jax.random.key(0), tokens_BT)
  assert 'embedding' not in params['features']
  found = ctm_attention.tokens(params['features'], tokens_BT, jnp.float32)
  one_hot_BTV = jnp.asarray(np.eye(3, dtype=np.float32)[tokens_BT])
  wanted = ctm_attention.tokens(params['features'], one_hot_BTV, jnp.float32)
  chex.assert_trees_all_equal(found, wanted)
  # A place sees what its neighbours hold.
  other_BT = tokens_BT.at[0, 4].set(1)
  moved = ctm_attention.tokens(params['features'], other_BT, jnp.float32)
  assert float(jnp.abs(moved - found)[0, 0].max()) > 0


def test_stem_needs_a_square():
  for dtype in (jnp.float32, jnp.int32):
    with pytest.raises(UserError, match='stem must be 0 unless'):
      make(8, stem=4, inputs=dtype)
