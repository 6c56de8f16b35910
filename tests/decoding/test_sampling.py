"""Filters of logits against NumPy, and samples against their distribution."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.decoding import sampling
from recursive_weights.interfaces import UserError


def logits(rows=40, classes=9, seed=0):
  rng = np.random.default_rng(seed)
  found = rng.normal(size=(rows, classes)).astype(np.float32) * 2
  return np.round(found, 1)  # so that some are equal


def p_of(row):
  e = np.exp(row.astype(np.float64) - row.max())
  return e / e.sum()


def in_order(row):
  """Tokens by likelihood, of equals the first one first."""
  return sorted(range(len(row)), key=lambda v: (-row[v], v))


@pytest.mark.parametrize('count', [1, 3, 9, 20])
def test_keep_largest(count):
  x = logits()
  found = np.asarray(sampling.keep_largest(jnp.asarray(x), count))
  for row, kept in zip(x, found, strict=True):
    on = in_order(row)[:count]
    wanted = np.full_like(row, -np.inf)
    wanted[on] = row[on]
    np.testing.assert_array_equal(kept, wanted)


@pytest.mark.parametrize('share', [0.0, 1e-6, 0.3, 0.77, 0.95, 0.9999])
def test_keep_share(share):
  x = logits()
  found = np.asarray(sampling.keep_share(jnp.asarray(x), share))
  for row, kept in zip(x, found, strict=True):
    p, total, on = p_of(row), 0.0, []
    for token in in_order(row):
      if on and total >= share:
        break
      on.append(token)
      total += p[token]
    wanted = np.full_like(row, -np.inf)
    wanted[on] = row[on]
    np.testing.assert_array_equal(kept, wanted)


def test_the_first_token_is_kept_however_sure():
  x = jnp.array([[0.0, 100.0, 0.0], [-1e30, -1e30, 5.0]])
  found = sampling.keep_share(x, 0.1)
  np.testing.assert_array_equal(np.isfinite(found).sum(-1), [1, 1])
  np.testing.assert_array_equal(np.argmax(found, -1), [1, 2])


@pytest.mark.parametrize(
  'fields',
  [
    {'temperature': 1.0},
    {'temperature': 0.5, 'top_k': 4},
    {'temperature': 2.0, 'top_k': 6, 'top_p': 0.8},
  ],
)
def test_samples_follow_the_filtered_distribution(fields):
  row = logits(1)[0]
  x = row / fields['temperature']
  on = in_order(x)[: fields.get('top_k') or len(x)]
  p = np.zeros(len(x))
  p[on] = p_of(x[on])
  kept, total = [], 0.0
  for token in on:
    if kept and total >= fields.get('top_p', 1.0):
      break
    kept.append(token)
    total += p[token]
  wanted = np.where(np.isin(np.arange(len(x)), kept), p, 0)
  wanted /= wanted.sum()
  count = 20_000
  keys = sampling.keys(jnp.zeros(count, jnp.int32), jnp.arange(count))
  drawn = sampling.make(**fields)(keys, jnp.tile(row[None], (count, 1)))
  found = np.bincount(np.asarray(drawn), minlength=len(row)) / count
  assert set(np.flatnonzero(found)) <= set(kept)
  np.testing.assert_allclose(found, wanted, atol=5 * 0.5 / count**0.5)


def test_no_temperature_takes_the_likeliest():
  x = logits()
  keys = sampling.keys(jnp.zeros(40, jnp.int32), jnp.arange(40))
  greedy = sampling.make(temperature=0.0, top_k=3, top_p=0.5)
  chex.assert_trees_all_equal(greedy(keys, jnp.asarray(x)), x.argmax(-1))
  for fields in ({'top_k': 1}, {'top_p': 0.0}):
    chex.assert_trees_all_equal(
      sampling.make(**fields)(keys, jnp.asarray(x)), x.argmax(-1)
    )


def test_keys_are_of_seed_and_position_alone():
  seeds, places = jnp.array([3, 3, 4, 3]), jnp.array([7, 8, 7, 7])
  data = np.asarray(jax.random.key_data(sampling.keys(seeds, places)))
  assert (data[0] == data[3]).all()
  assert len({row.tobytes() for row in data}) == 3
  alone = sampling.keys(seeds[1:2], places[1:2])
  np.testing.assert_array_equal(jax.random.key_data(alone)[0], data[1])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'temperature': -1.0}, 'temperature must be >= 0, got -1.0'),
    ({'temperature': float('nan')}, 'temperature must be >= 0, got nan'),
    ({'top_k': -1}, 'top_k must be >= 0, got -1'),
    ({'top_p': 1.5}, r'top_p must lie in \[0, 1\], got 1.5'),
  ],
)
def test_errors(fields, message):
  with pytest.raises(UserError, match=message):
    sampling.make(**fields)
