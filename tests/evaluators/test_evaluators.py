"""Evaluators against a loop by hand, with a tiny recursion and real tasks."""

import importlib
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recursive_weights import evaluators
from recursive_weights.evaluators import accuracy, depth_sweep
from recursive_weights.interfaces import Model, Objective, UserError
from recursive_weights.tasks import digits, parity

STEPS = 4
# These need more than a model and a split, and have tests of their own.
APART = {
  'arc_submission',
  'compression',
  'domains',
  'early_exit',
  'forgetting',
  'halting',
  'identity',
  'perplexity',
  'pictures',
  'poison',
  'recall',
  'recovery',
  'restarts',
  'retrieval',
  'samples',
  'state_gates',
  'state_jitter',
  'utilisation',
}
NAMES = sorted(
  m.name
  for m in pkgutil.iter_modules(evaluators.__path__)
  if not m.name.startswith('_') and m.name not in APART
)


def tiny_model(task, step_axis=True, certainty=True):
  """Logits drift linearly with the step; certainty differs by row and step."""
  classes = task.spec.classes
  shape = (int(np.prod(task.spec.inputs.shape)), task.spec.answer, classes)

  def init(key, inputs):
    del inputs
    width = int(np.prod(shape[1])) * classes
    w_DV = jax.random.normal(key, (shape[0], width))
    drift_SV = jnp.sin(jnp.arange(float(STEPS * width))).reshape(STEPS, width)
    return {'w_DV': w_DV, 'drift_SV': drift_SV}

  def apply(params, carry, inputs, *, key, train):
    assert key is None and not train
    x_BD = inputs.reshape(len(inputs), -1).astype(jnp.float32)
    flat_BV = x_BD @ params['w_DV'] + carry['x_BV']
    flat_SBV = flat_BV[None] + 9 * params['drift_SV'][:, None]
    logits = flat_SBV.reshape(STEPS, len(inputs), *task.spec.answer, classes)
    if not step_axis:
      return {'logits': logits[-1]}, carry
    outputs = {'logits': logits}
    if certainty:
      outputs['certainty'] = jnp.cos(flat_SBV[:, :, 0])
    return outputs, carry

  def carry(params, batch_size):
    return {'x_BV': jnp.ones((batch_size, params['w_DV'].shape[1]))}

  return Model(init=init, carry=carry, apply=apply)


LAST = Objective(score=None, answer=lambda outputs: outputs['logits'][-1])


def setting(make):
  task = make()
  model = tiny_model(task)
  params = model.init(jax.random.key(0), task.spec.inputs)
  return task, model, params


def by_hand(task, model, params, split):
  """Loss, metrics and certainty `[S]` by a loop over examples and steps."""
  totals = {}
  batch = task.batch(split, 0, task.spec.sizes[split])
  outputs, _ = model.apply(
    params, model.carry(params, len(batch['weight'])), batch['inputs'],
    key=None, train=False,
  )  # fmt: skip
  for step in range(STEPS):
    loss_B, metrics_B = task.loss(outputs['logits'][step], batch)
    values = {'loss': loss_B, **metrics_B}
    if 'certainty' in outputs:
      values['certainty'] = outputs['certainty'][step]
    for name, value_B in values.items():
      totals.setdefault(name, []).append(np.asarray(value_B, np.float64))
  return {name: np.stack(x_SB) for name, x_SB in totals.items()}


@pytest.fixture(scope='module', params=[digits.make, parity.make])
def case(request):
  task, model, params = setting(request.param)
  return task, model, params, by_hand(task, model, params, 'test')


@pytest.mark.parametrize('batch_size', [50, 128])
def test_accuracy_is_the_mean_over_examples(case, batch_size):
  task, model, params, wanted = case
  evaluate = accuracy.make(model, task, LAST, batch_size=batch_size)
  result = evaluate(params, jax.random.key(0))
  metrics = {k: v for k, v in wanted.items() if k != 'certainty'}
  assert set(result) == {f'test/{name}' for name in metrics}
  for name, value_SB in metrics.items():
    np.testing.assert_allclose(
      result[f'test/{name}'], value_SB[-1].mean(), rtol=1e-5
    )


@pytest.mark.parametrize('batch_size', [50, 128])
def test_depth_sweep_is_the_mean_at_every_step(case, batch_size):
  task, model, params, wanted = case
  evaluate = depth_sweep.make(model, task, LAST, batch_size=batch_size)
  result = evaluate(params, jax.random.key(0))
  best_B = wanted['certainty'].argmax(axis=0)
  assert len(set(best_B.tolist())) > 1
  expected = {}
  for name, value_SB in wanted.items():
    for step in range(STEPS):
      expected[f'test/{name}@{step + 1}'] = value_SB[step].mean()
    if name != 'certainty':
      rows_B = np.arange(len(best_B))
      expected[f'test/{name}@certain'] = value_SB[best_B, rows_B].mean()
  assert set(result) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(
      result[name], value, rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_depth_sweep_at_chosen_steps_without_certainty():
  task, _, params = setting(parity.make)
  model = tiny_model(task, certainty=False)
  result = depth_sweep.make(
    model, task, LAST, batch_size=64, steps=(2, 4), splits=('validation',)
  )(params, jax.random.key(0))
  metrics = ('loss', 'accuracy', 'sequence_accuracy')
  assert set(result) == {f'validation/{m}@{s}' for m in metrics for s in (2, 4)}


@pytest.fixture(scope='module', params=NAMES)
def module(request):
  return importlib.import_module(
    f'recursive_weights.evaluators.{request.param}'
  )


def test_padding_rows_may_be_anything(module):
  task, model, params = setting(digits.make)

  def poisoned(split, index, size):
    batch = task.batch(split, index, size)
    spoiled = np.where(batch['weight'] > 0, 0, np.nan).astype(np.float32)
    return {**batch, 'inputs': batch['inputs'] + spoiled[:, None, None]}

  key = jax.random.key(0)
  args = {'batch_size': 100, 'splits': ('validation',)}
  clean = module.make(model, task, LAST, **args)(params, key)
  dirty = module.make(
    model, task._replace(batch=poisoned), LAST, **args
  )(params, key)  # fmt: skip
  assert clean == dirty and np.isfinite(list(clean.values())).all()


def test_batch_size_does_not_matter(module):
  task, model, params = setting(parity.make)
  results = [
    module.make(model, task, LAST, batch_size=size)(params, jax.random.key(0))
    for size in (17, 204)
  ]
  chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
  assert all(type(x) is float for x in results[0].values())


def test_sharded_params_give_the_same_numbers(module):
  task, model, params = setting(digits.make)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.device_put(
    params,
    {
      'w_DV': NamedSharding(mesh, PartitionSpec('data')),
      'drift_SV': NamedSharding(mesh, PartitionSpec()),
    },
  )
  evaluate = module.make(model, task, LAST, batch_size=60)
  chex.assert_trees_all_close(
    evaluate(params, jax.random.key(0)),
    evaluate(spread, jax.random.key(0)),
    rtol=1e-5,
    atol=1e-6,
  )


def test_model_is_traced_once(module):
  task, model, params = setting(digits.make)
  traces = []

  def apply(*args, **kwargs):
    traces.append(1)
    return model.apply(*args, **kwargs)

  evaluate = module.make(
    model._replace(apply=apply), task, LAST, batch_size=100,
    splits=('validation', 'test'),
  )  # fmt: skip
  first = evaluate(params, jax.random.key(0))
  assert evaluate(params, jax.random.key(1)) == first
  assert len(traces) == 1
  assert {name.split('/')[0] for name in first} == {'validation', 'test'}


def test_endless_split_needs_max_batches(module):
  task, model, params = setting(parity.make)
  with pytest.raises(UserError, match='max_batches'):
    module.make(model, task, LAST, batch_size=8, splits=('train',))
  seen = []

  def watched(split, index, size):
    seen.append((split, index, size))
    return task.batch(split, index, size)

  module.make(
    model, task._replace(batch=watched), LAST, batch_size=8,
    splits=('train', 'test'), max_batches=3,
  )(params, jax.random.key(0))  # fmt: skip
  wanted = [(s, i, 8) for s in ('train', 'test') for i in range(3)]
  assert seen == wanted


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'batch_size': 0}, 'batch_size must be > 0, got 0'),
    ({'splits': ('tset',)}, "got 'tset'"),
    ({'max_batches': 0}, 'max_batches must be > 0 or None, got 0'),
  ],
)
def test_errors_name_the_value(module, wrong, message):
  task, model, _ = setting(digits.make)
  with pytest.raises(UserError, match=message):
    module.make(model, task, LAST, **{'batch_size': 8, **wrong})


def test_an_empty_split_is_refused_before_training(module):
  task, model, _ = setting(digits.make)
  sizes = task.spec.sizes | {'validation': 0}
  task = task._replace(spec=task.spec._replace(sizes=sizes))
  fields = {'batch_size': 8, 'max_batches': 3}
  module.make(model, task, LAST, splits=('test',), **fields)
  with pytest.raises(UserError, match="'validation' has no examples: leave it"):
    module.make(model, task, LAST, splits=('test', 'validation'), **fields)


def test_depth_sweep_refuses_steps_that_are_not_there():
  task, model, params = setting(digits.make)
  with pytest.raises(UserError, match='steps must be > 0'):
    depth_sweep.make(model, task, LAST, batch_size=8, steps=(0, 1))
  evaluate = depth_sweep.make(model, task, LAST, batch_size=8, steps=(5,))
  with pytest.raises(UserError, match='steps must be <= 4'):
    evaluate(params, jax.random.key(0))
  flat = tiny_model(task, step_axis=False)
  evaluate = depth_sweep.make(flat, task, LAST, batch_size=8)
  with pytest.raises(UserError, match='step axis'):
    evaluate(params, jax.random.key(0))
