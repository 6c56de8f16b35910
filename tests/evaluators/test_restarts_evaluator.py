"""Restarts are measured as they are made: keys, counts, padding, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import restarts as evaluator
from recursive_weights.interfaces import Model, Recursion, Spec, Task, UserError
from recursive_weights.recursion import restarts
from recursive_weights.recursion.unroll import from_recursion

ROWS, BATCH = 10, 4


def task():
  def batch(split, index, size):
    rows = np.arange(index * size, (index + 1) * size)
    return {
      'inputs': rows.astype(np.float32),
      'targets': np.ones(size, np.int32),
      'weight': (rows < ROWS).astype(np.float32),
    }

  def loss(logits_BV, batch):
    right_B = jnp.argmax(logits_BV, -1) == batch['targets']
    return logits_BV[:, 0], {'accuracy': right_B.astype(jnp.float32)}

  sizes = {'train': None, 'validation': ROWS, 'test': ROWS}
  inputs = jax.ShapeDtypeStruct((), jnp.float32)
  return Task(Spec(inputs, (), 2, sizes), batch, lambda key, batch: batch, loss)


MODEL = from_recursion(
  Recursion(
    lambda params: params,
    lambda weights, inputs, key: {'x': inputs},
    lambda weights, context: {'z': jnp.zeros_like(context['x'])},
    lambda weights, context, state, key: (state, {'logits': state['z']}),
  ),
  lambda key, inputs: {},
  2,
)


@pytest.fixture
def asked(monkeypatch):
  """Restarts by a stand-in: right in the first `count` rows of a batch."""
  calls = []

  def stand_in(recursion, params, inputs, key, **fields):
    calls.append(fields)
    assert recursion is MODEL.recursion
    right_B = jnp.arange(len(inputs)) < fields['count']
    noise_B = jax.random.uniform(key, inputs.shape)
    return jnp.stack([noise_B, jnp.where(right_B, 2.0, -2.0)], -1)

  monkeypatch.setattr(restarts, 'restarts', stand_in)
  return calls


def test_every_count_is_measured(asked):
  evaluate = evaluator.make(
    MODEL, task(), None, batch_size=BATCH, counts=(1, 3), noise=0.2, steps=5,
    select='residual',
  )  # fmt: skip
  result = evaluate({}, jax.random.key(0))
  assert set(result) == {
    f'test/{name}@restarts{count}'
    for name in ('loss', 'accuracy')
    for count in (1, 3)
  }
  # Batches of 4, 4 and 2 rows.
  np.testing.assert_allclose(result['test/accuracy@restarts1'], 3 / ROWS)
  np.testing.assert_allclose(result['test/accuracy@restarts3'], 8 / ROWS)
  assert asked == [
    {'count': count, 'noise': 0.2, 'steps': 5, 'select': 'residual'}
    for count in (1, 3)
  ]


def test_attempts_may_share_the_steps(asked):
  evaluate = evaluator.make(
    MODEL, task(), None, batch_size=BATCH, counts=(1, 4), steps=8, shared=True
  )
  evaluate({}, jax.random.key(0))
  assert [(x['count'], x['steps']) for x in asked] == [(1, 8), (4, 2)]


def test_noise_is_a_function_of_the_key(asked):
  evaluate = evaluator.make(
    MODEL, task(), None, batch_size=BATCH, counts=(2,),
    splits=('validation', 'test'),
  )  # fmt: skip
  first = evaluate({}, jax.random.key(0))
  assert first == evaluate({}, jax.random.key(0))
  other = evaluate({}, jax.random.key(1))
  assert first['test/loss@restarts2'] != other['test/loss@restarts2']
  # Splits of the same rows get noise of their own.
  assert first['test/loss@restarts2'] != first['validation/loss@restarts2']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'counts': ()}, r'counts must be numbers > 0, got \(\)'),
    ({'counts': (0,)}, r'counts must be numbers > 0, got \(0,\)'),
    ({'steps': 0}, 'steps must be > 0, got 0'),
    (
      {'counts': (2, 3), 'shared': True},
      r'counts must divide steps = 16 .* got \(2, 3\)',
    ),
    ({'noise': -1.0}, 'noise must be >= 0, got -1.0'),
    ({'select': 'best'}, "select must be one of .* got 'best'"),
    ({'splits': ('dev',)}, "got 'dev'"),
  ],
)
def test_errors_name_the_value(fields, message):
  with pytest.raises(UserError, match=message):
    evaluator.make(MODEL, task(), None, **({'batch_size': BATCH} | fields))


def test_needs_a_recursion():
  plain = Model(None, None, None)
  with pytest.raises(UserError, match='recursion over depth'):
    evaluator.make(plain, task(), None, batch_size=BATCH)
