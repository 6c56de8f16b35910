"""Cross-entropies against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks._losses import cross_entropy


def stable(a):
  return np.where(a >= 0, a + 1, 1 / (1 - np.minimum(a, 0)))


SHARES = {'softmax': np.exp, 'stablemax': stable}


def reference(logits, targets, kind):
  share = SHARES[kind](logits.astype(np.float64))
  own = np.take_along_axis(share, targets[..., None], -1)[..., 0]
  return -np.log(own / share.sum(-1))


@pytest.mark.parametrize('kind', SHARES)
@pytest.mark.parametrize('scale', [1e-3, 1.0, 30.0, 80.0])
def test_values_are_those_of_float64(kind, scale):
  rng = np.random.default_rng(0)
  logits = (scale * rng.normal(size=(50, 9, 11))).astype(np.float32)
  targets = rng.integers(0, 11, (50, 9))
  found = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), kind)
  wanted = reference(logits, targets, kind)
  assert found.dtype == jnp.float32
  # float32 logits of this size are no closer to one another than that.
  atol = 1e-6 if kind == 'stablemax' else 1e-6 * max(scale, 1)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=atol)


def test_stable_max_keeps_its_range_and_slope():
  """Huge logits give finite losses, and at 0 the slope is that of a + 1."""
  targets = jnp.zeros([1], jnp.int32)
  for size in (1e6, 1e30, -1e30):
    logits = jnp.asarray([[0.0, size]])
    assert np.isfinite(cross_entropy(logits, targets, 'stablemax')).all()
  slope = jax.grad(lambda a: cross_entropy(a, targets, 'stablemax').sum())
  found = slope(jnp.zeros([1, 4]))
  np.testing.assert_allclose(found, [[-0.75, 0.25, 0.25, 0.25]], rtol=1e-6)


def test_gradient_against_differences():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(4, 5)).astype(np.float32)
  targets = rng.integers(0, 5, 4)
  found = jax.grad(
    lambda a: cross_entropy(a, jnp.asarray(targets), 'stablemax').sum()
  )(jnp.asarray(logits))
  for index in np.ndindex(*logits.shape):
    step = np.zeros_like(logits, np.float64)
    step[index] = 1e-6
    slope = [
      reference(logits + sign * step, targets, 'stablemax').sum()
      for sign in (1, -1)
    ]
    np.testing.assert_allclose(
      found[index], (slope[0] - slope[1]) / 2e-6, rtol=1e-4, atol=1e-5
    )


def test_an_unknown_kind():
  with pytest.raises(UserError, match="got 'hinge'"):
    cross_entropy(jnp.zeros([1, 2]), jnp.zeros([1], int), 'hinge')
