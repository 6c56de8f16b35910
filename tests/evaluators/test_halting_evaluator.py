"""Halting and depth beyond the model's own steps, on a known recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import depth_sweep, halting
from recursive_weights.interfaces import Recursion, Spec, Task, UserError
from recursive_weights.recursion import objective
from recursive_weights.recursion.unroll import from_recursion

OWN, ROWS, BATCH, CELLS = 4, 10, 4, 3


def task():
  """Row b is right in cell c from step `b + c + 1` on (see `model`)."""

  def batch(split, index, size):
    rows = np.arange(index * size, (index + 1) * size)
    return {
      'inputs': (rows % ROWS).astype(np.int32),
      'targets': np.ones((size, CELLS), np.int32),
      'weight': (rows < ROWS).astype(np.float32),
    }

  def loss(logits, batch):
    right_BX = jnp.argmax(logits, -1) == batch['targets']
    return 1.0 - right_BX.mean(-1), {
      'accuracy': right_BX.astype(jnp.float32).mean(-1),
      'puzzle_accuracy': right_BX.all(-1).astype(jnp.float32),
    }

  sizes = {'train': None, 'validation': ROWS, 'test': ROWS}
  inputs = jax.ShapeDtypeStruct((), jnp.int32)
  return Task(
    Spec(inputs, (CELLS,), 2, sizes), batch, lambda key, batch: batch, loss
  )


def model(without=()):
  """Wants to halt from step `2 (b % 3) + 2` on, whatever the answer is."""

  def step(weights, context, state, key):
    now_B = state['now'] + 1
    late_BX = context['row'][:, None] + 1 + jnp.arange(CELLS)[None]
    right_BX = now_B[:, None] >= late_BX
    outputs = {
      'logits': jnp.stack([1 - right_BX, right_BX * 1], -1) * weights,
      'halt': now_B - 2.0 * (context['row'] % 3) - 1.5,
    }
    outputs = {k: x for k, x in outputs.items() if k not in without}
    return {'now': now_B}, outputs

  return from_recursion(
    Recursion(
      lambda params: params['scale'],
      lambda weights, inputs, key: {'row': inputs},
      lambda weights, context: {'now': jnp.zeros_like(context['row'])},
      step,
    ),
    lambda key, inputs: {'scale': jnp.ones([])},
    OWN,
  )


PARAMS = {'scale': jnp.ones([])}
LAST = objective.make('last')


@pytest.mark.parametrize('steps', [0, 12])
def test_halting_by_hand(steps):
  evaluate = halting.make(model(), task(), LAST, batch_size=BATCH, steps=steps)
  result = evaluate(PARAMS, None)
  total = steps or OWN
  row_B, step_S = np.arange(ROWS), np.arange(1, total + 1)
  right_SB = step_S[:, None] >= row_B[None] + CELLS
  stop_SB = step_S[:, None] >= 2 * (row_B[None] % 3) + 2
  halted_B = stop_SB.any(0)
  at_B = np.where(halted_B, stop_SB.argmax(0), total - 1)
  right_B = right_SB[at_B, row_B]
  wanted = {
    'halting_accuracy': (stop_SB == right_SB).mean(),
    'halted': halted_B.mean(),
    'halted_wrong': (halted_B & ~right_B).mean(),
    'halting_steps': (at_B + 1).mean(),
    'puzzle_accuracy@halted': right_B.mean(),
  }
  assert set(result) == {f'test/{name}' for name in wanted}
  for name, value in wanted.items():
    np.testing.assert_allclose(result[f'test/{name}'], value, rtol=1e-6)
  assert 0 < wanted['halted_wrong'] < 1


def test_depth_beyond_the_steps_of_training():
  steps = (1, 4, 12)
  evaluate = depth_sweep.make(
    model(), task(), LAST, batch_size=BATCH, steps=steps
  )
  result = evaluate(PARAMS, None)
  for step in steps:
    share = (step >= np.arange(ROWS) + CELLS).mean()
    np.testing.assert_allclose(
      result[f'test/puzzle_accuracy@{step}'], share, rtol=1e-6
    )
  assert result['test/puzzle_accuracy@12'] == 1
  assert not any('halt' in name for name in result)


def test_depth_inside_the_recursion_is_that_of_the_model():
  own = depth_sweep.make(model(), task(), LAST, batch_size=BATCH)
  same = depth_sweep.make(
    model(), task(), LAST, batch_size=BATCH, steps=tuple(range(1, OWN + 1))
  )
  assert own(PARAMS, None) == same(PARAMS, None)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'steps': -1}, 'steps must be >= 0, got -1'),
    ({'splits': ('dev',)}, "got 'dev'"),
    ({'batch_size': 0}, 'batch_size must be > 0, got 0'),
    ({'metric': 'bleu'}, "metric must be one of .* got 'bleu'"),
  ],
)
def test_arguments_out_of_range(fields, message):
  with pytest.raises(UserError, match=message):
    halting.make(model(), task(), LAST, **({'batch_size': BATCH} | fields))(
      PARAMS, None
    )


def test_needs_a_halting_head():
  evaluate = halting.make(model(('halt',)), task(), LAST, batch_size=BATCH)
  with pytest.raises(UserError, match='halting head'):
    evaluate(PARAMS, None)
