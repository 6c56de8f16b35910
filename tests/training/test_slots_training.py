"""Deep supervision in the real loop: resuming, devices, seeds, sizes."""

import chex
import jax
import numpy as np
import pytest
from test_loop import final_state, lines

from recursive_weights import build
from recursive_weights import config as config_lib
from recursive_weights.interfaces import UserError
from recursive_weights.training import checkpoints, loop


def experiment(**changes):
  """A tiny TRM on parity; `changes` are fields, dots written as `__`."""
  config = config_lib.base()
  config.task = {'name': 'parity', 'length': 6, 'eval_size': 32}
  config.model = {
    'name': 'trm',
    'cell': 'mixer',
    'width': 8,
    'layers': 1,
    'cycles': 2,
    'inner': 1,
    'steps': 4,
    'multiple': 8,
  }
  config.objective = {
    'name': 'halting',
    'weight': 0.5,
    # A share of right bits is near one half, so that the head comes to it.
    'whole': 'accuracy',
  }
  config.optimizer.update(name='adam_atan2', b2=0.95, moments='bfloat16')
  # All but the halting head, whose bias starts at -5, learn slowly: rows halt
  # at different steps within a few updates.
  config.optimizer.groups = {
    'start': {'pattern': '^start/', 'frozen': True},
    'halt': {'pattern': '^halt/', 'lr_scale': 1000.0},
    'rest': {'pattern': '^(?!start/|halt/)', 'weight_decay': 1.0},
  }
  config.training.update(
    steps=24, batch_size=16, report_every=6, evaluate_every=12, ema_decay=0.9
  )
  config.training.slots.update(steps=4, explore=0.3)
  config.checkpoint.every = 6
  for name, value in changes.items():
    node = config
    *path, last = name.split('__')
    for part in path:
      node = node[part]
    node[last] = value
  return build.build(config_lib.to_data(config))


def stop_after(experiment, steps):
  """The same training, cut off there: only the end is moved."""
  config = experiment.config | {
    'training': experiment.config['training'] | {'steps': steps}
  }
  return experiment._replace(config=config)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('slots')
  run = experiment()
  loop.run(run, workdir)
  return workdir, final_state(run, workdir)


def test_rows_halt_at_different_steps(whole):
  workdir, state = whole
  found = lines(workdir)
  assert 0 < found[-1]['train/halted'] < 1
  assert 1 < found[-1]['train/steps'] < 4
  assert {'train/sequence_accuracy', 'train/halting_loss'} <= set(found[0])
  slots = state.carry
  assert len(set(slots['steps'])) > 1
  assert {x.dtype.name for x in jax.tree.leaves(state.opt_state)} == {
    'int32',
    'bfloat16',
  }


def test_resumed_is_uninterrupted_to_the_bit(whole, tmp_path):
  workdir, state = whole
  run = experiment(training__steps_per_dispatch=4)
  for steps in (5, 13):
    loop.run(stop_after(run, steps), tmp_path)
  loop.run(run, tmp_path)
  chex.assert_trees_all_equal(final_state(run, tmp_path), state)
  wanted = {line['step']: line for line in lines(workdir)}
  for line in lines(tmp_path):
    if line['step'] in wanted:
      same = wanted[line['step']]
      assert {k: line[k] for k in same} == same


def test_emptied_slots_are_not_stored(tmp_path):
  run = experiment(training__slots={
    'steps': 4, 'explore': 0.3, 'empty_every': 6
  })  # fmt: skip
  loop.run(run, tmp_path / 'whole')
  loop.run(stop_after(run, 12), tmp_path / 'parts')
  folder = tmp_path / 'parts' / 'checkpoints' / '12'
  assert not (folder / 'carry').exists() and (folder / 'ema').exists()
  loop.run(stop_after(run, 15), tmp_path / 'parts')  # within a period: whole
  assert (tmp_path / 'parts' / 'checkpoints' / '15' / 'carry').exists()
  loop.run(run, tmp_path / 'parts')
  states = [final_state(run, tmp_path / name) for name in ('whole', 'parts')]
  chex.assert_trees_all_equal(*states)
  # It is another training than one whose slots are never emptied.
  with pytest.raises(UserError, match=r'training\.slots'):
    loop.run(experiment(), tmp_path / 'parts')


def test_what_goes_on_from_emptied_slots_fills_them_at_once(tmp_path):
  slots = {'steps': 4, 'explore': 0.3, 'empty_every': 6}
  run = experiment(training__slots=slots)
  loop.run(stop_after(run, 6), tmp_path / 'first')
  # Its seventh step is not one that empties slots.
  run = experiment(
    resume_from=str(tmp_path / 'first'), training__report_every=1
  )
  loop.run(stop_after(run, 8), tmp_path / 'second')
  assert lines(tmp_path / 'second')[0]['train/loss'] > 0


def test_leaving_for_want_of_time_waits_for_empty_slots(tmp_path):
  run = experiment(
    max_minutes=1e-6,
    training__slots={'steps': 4, 'explore': 0.3, 'empty_every': 9},
  )
  assert loop.run(run, tmp_path) == {}
  newest = checkpoints.folders(tmp_path)[0]
  assert newest.name == '9' and not (newest / 'carry').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  'strategy', ['fsdp', pytest.param('pmap', marks=pytest.mark.long)]
)
def test_devices_agree(whole, tmp_path, strategy):
  _, state = whole
  run = experiment(devices__strategy=strategy)
  loop.run(run, tmp_path)
  found = final_state(run, tmp_path)
  chex.assert_trees_all_equal(found.carry['batch'], state.carry['batch'])
  chex.assert_trees_all_close(found.params, state.params, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_accumulation_is_the_large_batch(tmp_path):
  run = experiment(training__accumulation=2)
  loop.run(stop_after(run, 6), tmp_path / 'parts')
  loop.run(stop_after(experiment(), 6), tmp_path / 'whole')
  found = final_state(run, tmp_path / 'parts')
  wanted = final_state(run, tmp_path / 'whole')
  chex.assert_trees_all_equal(found.carry['batch'], wanted.carry['batch'])
  chex.assert_trees_all_close(found.params, wanted.params, atol=1e-4)
  metrics = [lines(tmp_path / name)[-1] for name in ('parts', 'whole')]
  for name in ('train/loss', 'train/accuracy', 'train/steps', 'train/halted'):
    np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-4)


@pytest.mark.long
def test_seeds_in_one_program(tmp_path):
  both = experiment(num_seeds=2)
  loop.run(stop_after(both, 6), tmp_path / 'both')
  states = final_state(both, tmp_path / 'both')
  for seed in range(2):
    alone = experiment(seed=seed)
    loop.run(stop_after(alone, 6), tmp_path / str(seed))
    found = final_state(alone, tmp_path / str(seed))
    mine = jax.tree.map(lambda x, s=seed: x[s], states)
    chex.assert_trees_all_equal(mine.carry['batch'], found.carry['batch'])
    chex.assert_trees_all_close(mine.params, found.params, atol=1e-4)


def test_frozen_start_states_are_not_averaged(whole):
  _, state = whole
  chex.assert_trees_all_equal(state.ema['start'], state.params['start'])
  first = jax.jit(experiment().init)(np.int32(0))
  chex.assert_trees_all_equal(state.params['start'], first.params['start'])
  assert (state.ema['readout'] != state.params['readout']).any()


@pytest.mark.parametrize(
  'changes, text',
  [
    ({'training__slots__explore': 2.0}, 'explore must lie in'),
    ({'training__slots__steps': -1}, 'steps >= 0'),
    ({'training__keep_carry': True}, 'keep_carry must be False'),
    ({'optimizer__b2': 0.999}, 'needs b1 and b2 <= 0.99'),
  ],
)
def test_fields_out_of_range(changes, text):
  with pytest.raises(UserError, match=text):
    experiment(**changes)
