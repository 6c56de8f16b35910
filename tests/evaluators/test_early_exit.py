"""The early-exit evaluator on a recursion whose certainty is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import interfaces
from recursive_weights.evaluators import early_exit
from recursive_weights.interfaces import Recursion, Spec, Task, UserError
from recursive_weights.recursion import objective
from recursive_weights.recursion.unroll import from_recursion

STEPS, ROWS, BATCH = 6, 10, 4


def task():
  """Row b is right from step `b % 4 + 1` on, and knows it (see `model`)."""

  def batch(split, index, size):
    rows = np.arange(index * size, (index + 1) * size)
    weight = (rows < ROWS).astype(np.float32)
    inputs = (rows % 4).astype(np.int32)
    return {'inputs': inputs, 'targets': np.ones(size, int), 'weight': weight}

  def loss(logits_BV, batch):
    right_B = jnp.argmax(logits_BV, -1) == batch['targets']
    return 1.0 - right_B, {'accuracy': right_B.astype(jnp.float32)}

  return Task(
    Spec(
      jax.ShapeDtypeStruct((), jnp.int32),
      (),
      2,
      {'train': None, 'validation': ROWS, 'test': ROWS},
    ),
    batch,
    lambda key, batch: batch,
    loss,
  )


def model():
  """Certainty 0.6 and wrong before the row is right, then 0.9 and right."""

  def step(weights, context, state, key):
    right_B = state['now'] >= context['late']
    logits_BV = jnp.stack([1 - right_B, right_B * weights], -1) * 1.0
    sure_B = jnp.where(right_B, 0.9, 0.6)
    return {'now': state['now'] + 1}, {'logits': logits_BV, 'certainty': sure_B}

  return from_recursion(
    Recursion(
      lambda params: params['scale'],
      lambda weights, inputs, key: {'late': inputs},
      lambda weights, context: {'now': jnp.zeros_like(context['late'])},
      step,
    ),
    lambda key, inputs: {'scale': jnp.ones([])},
    STEPS,
  )


def evaluate(**fields):
  fields = {'batch_size': BATCH, 'chunk': 2} | fields
  made = early_exit.make(model(), task(), objective.make('certainty'), **fields)
  return made({'scale': jnp.ones([])}, None)


def test_threshold_is_the_lowest_without_loss():
  result = evaluate(thresholds=(0.5, 0.7, 0.95))
  late = np.arange(ROWS) % 4
  assert result['test/accuracy@all'] == 1
  np.testing.assert_allclose(result['test/accuracy@0.5'], (late == 0).mean())
  assert result['test/steps@0.5'] == 1
  assert result['test/accuracy@0.7'] == 1
  np.testing.assert_allclose(result['test/steps@0.7'], (late + 1).mean())
  assert result['test/steps@0.95'] == STEPS
  assert result['test/threshold'] == 0.7
  assert result['test/accuracy@chosen'] == result['test/accuracy@0.7']
  assert result['test/steps@chosen'] == result['test/steps@0.7']
  timed = {name for name in result if name.startswith('time/')}
  assert timed == {f'time/test/{x}' for x in ('all', 'chosen', 'saved')}
  assert all(isinstance(x, float) for x in result.values())


def test_nothing_stops_early_where_all_thresholds_lose():
  result = evaluate(thresholds=(0.1, 0.5))
  assert result['test/threshold'] == float('inf')
  assert result['test/accuracy@chosen'] == result['test/accuracy@all']
  assert result['test/steps@chosen'] == STEPS


@pytest.mark.parametrize(
  'fields',
  [
    {'thresholds': ()},
    {'splits': ('dev',)},
    {'batch_size': 0},
    {'metric': 'bleu'},
  ],
)
def test_arguments_out_of_range(fields):
  with pytest.raises(UserError):
    evaluate(**fields)


def test_needs_a_recursion():
  plain = interfaces.Model(None, None, None)
  with pytest.raises(UserError, match='recursion'):
    early_exit.make(plain, task(), objective.make('last'), batch_size=2)
