"""Restarts against a loop over attempts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Recursion
from recursive_weights.recursion.restarts import residual, restarts

ROWS, WIDTH, STEPS = 6, 3, 4


def chaotic():
  """A map in which a start decides where a row ends."""

  def step(weights, context, state, key):
    assert key is None
    z_BD = jnp.cos(weights * state['z'] + context['x'])
    now = {'z': z_BD, 'count': state['count'] + 1}
    return now, {'logits': z_BD, 'halt': z_BD.sum(-1)}

  return Recursion(
    prepare=lambda params: params,
    encode=lambda weights, inputs, key: {'x': inputs},
    start=lambda weights, context: {
      'z': jnp.zeros_like(context['x']),
      'count': jnp.zeros(len(context['x']), jnp.int32),
    },
    step=step,
  )


def attempts(inputs, key, count, noise):
  """By attempt the last two states."""
  found = []
  for number in range(count):
    # Leaves in order: count, z.
    own = jax.random.split(jax.random.fold_in(key, number), 2)[1]
    z = noise * (number > 0) * jax.random.normal(own, inputs.shape)
    z = np.asarray(z, np.float64)
    for _ in range(STEPS):
      before, z = z, np.cos(3 * z + inputs)
    found.append((before, z))
  return found


@pytest.mark.parametrize('select', ['halt', 'residual'])
@pytest.mark.parametrize('count', [1, 5])
def test_restarts_are_a_loop_over_attempts(select, count):
  inputs = np.random.default_rng(0).normal(size=(ROWS, WIDTH))
  key = jax.random.key(3)
  run = jax.jit(
    lambda x, key: restarts(
      chaotic(), jnp.float32(3), x, key, count=count, noise=0.5, steps=STEPS,
      select=select,
    )
  )  # fmt: skip
  found = run(jnp.asarray(inputs, jnp.float32), key)
  tried = attempts(inputs, key, count, 0.5)
  chosen = set()
  for b in range(ROWS):
    if select == 'halt':
      scores = [z[b].sum() for _, z in tried]
    else:
      scores = [
        -np.linalg.norm(z[b] - before[b]) / np.linalg.norm(z[b])
        for before, z in tried
      ]
    best = int(np.argmax(scores))
    chosen.add(best)
    np.testing.assert_allclose(found[b], tried[best][1][b], atol=1e-4)
  assert len(chosen) == 1 if count == 1 else len(chosen) > 1


def test_residual_by_rows_and_over_leaves():
  before = {'a': jnp.zeros([2, 3]), 'b': jnp.ones([2, 2, 2])}
  after = {'a': jnp.ones([2, 3]), 'b': jnp.ones([2, 2, 2])}
  np.testing.assert_allclose(residual(before, after), np.sqrt([3 / 7] * 2))
  np.testing.assert_allclose(residual(after, after), 0)


@pytest.mark.parametrize(
  'fields', [{'count': 0}, {'steps': 0}, {'noise': -1.0}, {'select': 'best'}]
)
def test_arguments_out_of_range(fields):
  fields = {'count': 2, 'noise': 0.1, 'steps': 2} | fields
  with pytest.raises(ValueError, match='must be'):
    restarts(chaotic(), 1.0, jnp.zeros([2, 3]), jax.random.key(0), **fields)
