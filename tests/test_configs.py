"""Every config: two finite steps small, a gradient everywhere, TPU lowering."""

import importlib
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import build, config
from recursive_weights.interfaces import UserError
from recursive_weights.io import pretrained
from recursive_weights.training import checkpoints
from recursive_weights.training.state import make_dispatch

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if 'def get_config' in path.read_text()
)

# What begins behind zeros (an output, a factor of low rank) moves later, and a
# state at the start of a document where one begins: tests of models see to it.
_HYBRID = r'^hybrid/time/(decay_up|mix_up|mix_x|first|state/initial)$'
LATE = dict.fromkeys(('hybrid_lm', 'hybrid_matrix', 'hybrid_recall'), _HYBRID)


def load(name, variant):
  module = importlib.import_module(f'configs.{name}')
  return config.to_data(module.get_config(variant))


def batches(experiment, count):
  size = experiment.config['training']['batch_size']
  rows = [
    experiment.tasks[0].batch('train', index, size) for index in range(count)
  ]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_smoke_takes_two_steps_and_lowers_for_tpu(name):
  experiment = build.build(load(name, 'smoke'))
  state = jax.jit(experiment.init)(np.int32(0))
  before, weak = state.params, jax.tree.map(lambda x: x.weak_type, state)
  data = batches(experiment, 3)
  dispatch = jax.jit(make_dispatch(experiment.make_step(None)))
  state, metrics = dispatch(state, data, np.int32(0), np.int32(2))
  assert int(state.step) == 2
  # Else the second dispatch would compile anew.
  assert jax.tree.map(lambda x: x.weak_type, state) == weak
  chex.assert_tree_all_finite((state, metrics))
  assert np.isfinite(metrics['loss'][:2]).all() and metrics['loss'][2] == 0
  # Every parameter moved, it has a gradient (or decay) and an optimizer, unless
  # it is frozen.
  groups = experiment.config['optimizer']['groups'].values()
  still = [g['pattern'] for g in groups if g.get('frozen')]
  still += [LATE[name]] if name in LATE else []
  names = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, same in jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda a, b: bool((a == b).all()), before, state.params)
    )
    if same
  ]
  assert [
    name
    for name in names
    if name != 'attention/key/bias'
    and not any(re.search(pattern, name) for pattern in still)
  ] == []
  lowered = jax.export.export(dispatch, platforms=['tpu'])(
    state, data, np.int32(0), np.int32(2)
  )
  assert lowered.platforms == ('tpu',)


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_survive_json(name):
  data = load(name, None)
  again = config.to_data(config.from_data(data))
  assert again == data
  assert not build.check(data)


@pytest.mark.parametrize(
  'name', ['bfloat16', pytest.param('float16', marks=pytest.mark.long)]
)
@pytest.mark.slow
def test_half_precision_trains(name):
  data = load('ctm_parity', 'smoke,residual') | {'dtype': name}
  if name == 'float16':
    data['training']['loss_scale'] = 256.0
  experiment = build.build(data)
  state = jax.jit(experiment.init)(np.int32(0))
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    jnp.dtype('float32')
  }
  step = jax.jit(experiment.make_step(None))
  full = jax.jit(
    build.build(load('ctm_parity', 'smoke,residual')).make_step(None)
  )
  batch = jax.tree.map(lambda x: x[0], batches(experiment, 1))
  _, metrics = step(state, batch)
  _, expected = full(state, batch)
  np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=0.02)
  np.testing.assert_allclose(
    metrics['gradient_norm'], expected['gradient_norm'], rtol=0.1
  )


def test_all_errors_of_a_config_come_at_once():
  data = load('ctm_digits', None)
  data['training']['steps'] = 0
  data['task']['patch'] = 3
  data['model']['heads'] = 0
  data['objective']['name'] = 'hope'
  with pytest.raises(UserError) as error:
    build.build(data)
  text = str(error.value)
  for part in ('training.steps must be > 0', 'patch must be', 'hope'):
    assert part in text


def test_fits_in_turn_refuse_what_they_would_not_use():
  data = load('basis_synthetic', 'smoke')
  assert not build.check(data)
  for group, field, value in (
    ('recursive', 'rules', {'one': {'source': 'basis'}}),
    ('training', 'slots', data['training']['slots'] | {'steps': 4}),
    ('training', 'keep_carry', True),
  ):
    errors = build.check(data | {group: data[group] | {field: value}})
    assert len(errors) == 1
    assert errors[0].startswith(f'{group}.{field}')
    assert 'with step alternating' in errors[0]


def test_unknown_names_list_what_there_is():
  data = load('ctm_digits', None)
  data['task']['name'] = 'chess'
  with pytest.raises(UserError, match=r"no 'chess'; there are: .*digits"):
    build.build(data)
  data = load('ctm_digits', None)
  data['recursive']['rules']['w2']['source'] = 'nlm/w9'
  with pytest.raises(UserError, match=r'no parameter nlm/w9; there are'):
    build.build(data)


def test_weights_without_pickles_come_back(tmp_path):
  params = {'a': {'b': jnp.arange(6.0).reshape(2, 3)}, 'c': jnp.ones(())}
  pretrained.write_npz(tmp_path / 'w.npz', params)
  shapes = jax.eval_shape(lambda: params)
  chex.assert_trees_all_equal(
    pretrained.read_npz(tmp_path / 'w.npz', shapes), params
  )
  half = jax.tree.map(lambda x: x.astype('float16'), params)
  pretrained.write_npz(tmp_path / 'half.npz', half)  # as large models are
  found = pretrained.read_npz(tmp_path / 'half.npz', shapes)
  chex.assert_trees_all_equal(found, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
  with pytest.raises(UserError, match='also holds a/b: weights and config'):
    pretrained.read_npz(tmp_path / 'w.npz', {'c': shapes['c']})
  wrong = {'a': {'b': jnp.ones((3, 3))}, 'c': jnp.ones(())}
  with pytest.raises(UserError, match=r'a/b must be \(3, 3\), found \(2, 3\)'):
    pretrained.read_npz(tmp_path / 'w.npz', wrong)


def test_stored_configs_get_the_fields_that_they_are_older_than():
  data = load('ctm_parity', None)
  old = json.loads(json.dumps(data))
  del old['training']['slots'], old['optimizer']['moments']
  del old['optimizer']['groups']['all']['sign']
  assert config.complete(old) == config.complete(data) == data


def test_stopping_rules_that_are_no_more_are_left_out():
  data = load('hybrid_lm', 'smoke,plateau')
  rules = data['early_stopping']['rules'] | {'half_life_least': [0.1, 1e9]}
  old = data | {'early_stopping': data['early_stopping'] | {'rules': rules}}
  assert config.complete(old) == data
  assert not checkpoints.foreign(data, old)


def test_how_a_model_is_run_is_not_what_it_is():
  ours = {'model': {'name': 'ctm', 'unrolled': 1, 'remat': False, 'width': 8}}
  theirs = {'model': {'name': 'ctm', 'unrolled': 5, 'remat': True, 'width': 9}}
  (line,) = checkpoints.foreign(ours, theirs)
  assert line == 'model.width: 8 here, 9 there'


def test_another_fit_is_another_experiment():
  ours, theirs = ({'step': {'name': 'alternating', 'ridge': r}} for r in (1, 2))
  (line,) = checkpoints.foreign(ours, theirs)
  assert line == 'step.ridge: 1 here, 2 there'


def test_a_run_on_other_data_is_another_experiment():
  """Generated or from a file: the config that is stored tells which."""
  data = load('trm_mini', 'smoke')
  ours = build.build(data).config
  assert set(ours['data_hash']) == {'train', 'validation', 'test'}
  data['task']['train_size'] += 1
  theirs = build.build(data).config | {'task': ours['task']}
  (line,) = checkpoints.foreign(ours, theirs)
  assert line.startswith('data_hash.train: ')


def test_evaluators_take_the_rows_of_a_micro_batch(monkeypatch):
  """So that what fits in training fits in evaluation; or what they ask for."""
  data = load('trm_mini', 'smoke')
  data['training'].update(batch_size=8, accumulation=4)
  data['evaluators']['after']['halting'] = {
    'splits': ('test',),
    'batch_size': 5,
  }
  made, rows = build.build_task, set()

  def watched(config, seed):
    task = made(config, seed)

    def batch(split, index, size):
      rows.add(size)
      return task.batch(split, index, size)

    return task._replace(batch=batch)

  monkeypatch.setattr(build, 'build_task', watched)
  experiment = build.build(data)
  params = jax.jit(experiment.init)(np.int32(0)).params
  for evaluator, wanted in (
    (experiment.during['accuracy'], 2),
    (experiment.after['accuracy'], 2),
    (experiment.after['halting'], 5),
  ):
    rows.clear()
    evaluator(params, jax.random.key(0))
    assert rows == {wanted}


def test_data_are_known_by_what_they_are_not_by_where_they_lie(tmp_path):
  data = load('trm_mini', 'smoke')
  batch = build.build_task(data, 0).batch('train', 0, 16)
  rows = [
    ','.join(''.join(map(str, x)) for x in (question, answer + 1))
    for question, answer in zip(batch['inputs'], batch['targets'], strict=True)
  ]

  def built(name, rows):
    path = tmp_path / name
    path.write_text('\n'.join(['question,answer', *rows]))
    splits = ('train_path', 'validation_path', 'test_path')
    task = data['task'] | dict.fromkeys(splits, str(path))
    return build.build(data | {'task': task}).config

  here, there = built('here.csv', rows), built('there.csv', rows)
  assert here['task'] != there['task']
  assert not checkpoints.foreign(here, there)
  names = [
    line.split(':')[0]
    for line in checkpoints.foreign(here, built('other.csv', rows[1:]))
  ]
  splits = ('test', 'train', 'validation')
  assert names == [f'data_hash.{x}' for x in splits] + [
    f'task.{x}_path' for x in splits
  ]
  # Where no hash is stored the place is all that tells.
  here, there = (x | {'data_hash': {}} for x in (here, there))
  assert len(checkpoints.foreign(here, there)) == 3


def test_what_only_sounds_like_a_place_is_none():
  ours, theirs = (
    {'task': {'name': 'maze_path', 'min_path': x}, 'data_hash': {'train': 'a'}}
    for x in (1, 2)
  )
  (line,) = checkpoints.foreign(ours, theirs)
  assert line == 'task.min_path: 1 here, 2 there'
