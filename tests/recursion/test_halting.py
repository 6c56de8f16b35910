"""Early exit against a loop over rows; compaction loses and mixes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Recursion
from recursive_weights.recursion.halting import early_exit

STEPS, WIDTH = 11, 3


def counting(seen=None):
  """Row b's certainty and answer at a step are tables that it was given."""

  def start(weights, context):
    del weights
    return {'now': jnp.zeros(context['sure'].shape[0], jnp.int32)}

  def step(weights, context, state, key):
    assert key is None
    if seen is not None:
      seen.append(context['sure'].shape[0])
    now_B = state['now']
    rows_B = jnp.arange(now_B.shape[0])
    return {'now': now_B + 1}, {
      'logits': context['logits'][rows_B, now_B] * weights,
      'certainty': context['sure'][rows_B, now_B],
    }

  return Recursion(
    prepare=lambda params: params,
    encode=lambda weights, inputs, key: inputs,
    start=start,
    step=step,
  )


def tables(batch, seed=0):
  stream = np.random.default_rng(seed)
  return {
    'sure': stream.uniform(size=(batch, STEPS)).astype(np.float32),
    'logits': stream.normal(size=(batch, STEPS, WIDTH)).astype(np.float32),
  }


def by_row(inputs, threshold):
  answers, steps = [], []
  for sure, logits in zip(inputs['sure'], inputs['logits'], strict=True):
    above = np.flatnonzero(sure > threshold)
    last = above[0] if len(above) else STEPS - 1
    answers.append(2 * logits[np.argmax(sure[: last + 1])])
    steps.append(last + 1)
  return np.stack(answers), np.array(steps)


@pytest.mark.parametrize('batch', [1, 5, 16])
@pytest.mark.parametrize('chunk', [1, 4, 20])
def test_early_exit_equals_a_loop_over_rows(batch, chunk):
  run = early_exit(counting(), max_steps=STEPS, chunk=chunk)
  inputs = tables(batch)
  for threshold in (-1.0, 0.3, 0.8, 0.95, 2.0):
    answers, steps = run(jnp.float32(2), inputs, threshold)
    wanted, wanted_steps = by_row(inputs, threshold)
    np.testing.assert_array_equal(steps, wanted_steps)
    np.testing.assert_allclose(answers, wanted, rtol=1e-6)


def test_rows_that_are_done_are_not_computed():
  batch = 16
  inputs = tables(batch)
  inputs['sure'][:] = 0
  for row in range(batch - 3):  # three rows never get sure
    inputs['sure'][row, 1 + row % 3] = 1
  seen = []
  run = early_exit(counting(seen), max_steps=STEPS, chunk=2)
  answers, steps = run(jnp.float32(2), inputs, 0.5)
  wanted, wanted_steps = by_row(inputs, 0.5)
  np.testing.assert_array_equal(steps, wanted_steps)
  np.testing.assert_allclose(answers, wanted, rtol=1e-6)
  # Traced once per number of rows: 16, then 13 - 5 -> 16, then 3 -> 4 rows.
  assert set(seen) == {16, 4}


def test_by_the_last_rule_a_row_answers_as_it_leaves():
  inputs = tables(7)
  run = early_exit(counting(), max_steps=STEPS, chunk=3, rule='last')
  for threshold in (0.5, 0.9, 2.0):
    answers, steps = run(jnp.float32(2), inputs, threshold)
    _, wanted_steps = by_row(inputs, threshold)
    np.testing.assert_array_equal(steps, wanted_steps)
    wanted = 2 * inputs['logits'][np.arange(7), wanted_steps - 1]
    np.testing.assert_allclose(answers, wanted, rtol=1e-6)
  with pytest.raises(ValueError, match="got 'first'"):
    early_exit(counting(), max_steps=3, rule='first')


@pytest.mark.parametrize('fields', [{'max_steps': 0}, {'chunk': 0}])
def test_numbers_out_of_range(fields):
  with pytest.raises(ValueError, match='got 0'):
    early_exit(counting(), **{'max_steps': 3, **fields})


def test_a_ctm_that_never_stops_early_equals_its_full_run():
  from recursive_weights import interfaces
  from recursive_weights.models import ctm
  from recursive_weights.recursion import objective

  spec = interfaces.Spec(jax.ShapeDtypeStruct((4,), jnp.int32), (4,), 2, {})
  model = ctm.make(
    spec, width=16, input_width=8, heads=2, memory=3, ticks=6, sync_out=4,
    sync_action=4,
  )  # fmt: skip
  inputs = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(np.int32)
  params = model.init(jax.random.key(0), jnp.asarray(inputs))
  outputs, _ = jax.jit(lambda p, x: model.apply(p, {}, x))(params, inputs)
  run = early_exit(model.recursion, max_steps=6, chunk=4)
  answers, steps = run(params, inputs, 1.01)
  full = objective.make('certainty').answer(outputs)
  np.testing.assert_allclose(answers, full, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(steps, 6)

  # Leaving at different ticks: each row as its own full run says.
  sure_SB = np.asarray(outputs['certainty'])
  threshold = float(np.median(sure_SB.max(0)))
  answers, steps = run(params, inputs, threshold)
  for b in range(6):
    above = np.flatnonzero(sure_SB[:, b] > threshold)
    last = above[0] if len(above) else 5
    assert steps[b] == last + 1
    best = np.argmax(sure_SB[: last + 1, b])
    np.testing.assert_allclose(
      answers[b], outputs['logits'][best, b], rtol=1e-4, atol=1e-5
    )


def test_a_trm_leaves_by_its_halting_head():
  """At halt > 0, with the answer of that step, as in training."""
  from recursive_weights import interfaces
  from recursive_weights.models import trm

  spec = interfaces.Spec(jax.ShapeDtypeStruct((4,), jnp.int32), (4,), 2, {})
  model = trm.make(
    spec, width=8, multiple=8, layers=1, cycles=1, inner=1, steps=6
  )
  inputs = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(np.int32)
  params = model.init(jax.random.key(0), jnp.asarray(inputs))
  params['halt']['kernel'] = jax.random.normal(jax.random.key(1), (8, 1))
  params['halt']['bias'] = jnp.zeros(1)
  outputs, _ = jax.jit(lambda p, x: model.apply(p, model.carry(p, 6), x))(
    params, inputs
  )
  halt_SB = np.asarray(outputs['halt'])
  params['halt']['bias'] -= np.median(halt_SB.max(0))
  halt_SB = halt_SB - np.median(halt_SB.max(0))
  for certainty, threshold in (('halt', 0.0), ('certainty', 0.5)):
    run = early_exit(
      model.recursion, max_steps=6, chunk=2, certainty=certainty, rule='last'
    )
    answers, steps = run(params, inputs, threshold)
    for b in range(6):
      above = np.flatnonzero(halt_SB[:, b] > 0)
      assert steps[b] == (above[0] + 1 if len(above) else 6)
      np.testing.assert_allclose(
        answers[b], outputs['logits'][steps[b] - 1, b], rtol=1e-4, atol=1e-5
      )
  assert 1 < len(set(steps))
