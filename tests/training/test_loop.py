"""Laws of the training loop: resuming, dispatching, devices, seeds, errors."""

import json
import os
import signal
import threading

import chex
import jax
import numpy as np
import pytest
import toy

from recursive_weights import build
from recursive_weights import config as config_lib
from recursive_weights.interfaces import UserError
from recursive_weights.io import pretrained
from recursive_weights.training import checkpoints, lock, loop, metrics
from recursive_weights.training.state import make_dispatch


def final_state(experiment, workdir):
  """The state in the newest checkpoint, as NumPy arrays."""
  shapes = jax.eval_shape(experiment.init, np.int32(0))
  if experiment.config['num_seeds'] > 1:
    seeds = np.zeros(experiment.config['num_seeds'], np.int32)
    shapes = jax.eval_shape(jax.vmap(experiment.init), seeds)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes
  )
  state, _ = checkpoints.load_state(workdir, abstract)
  return jax.tree.map(np.asarray, state)


def lines(workdir):
  """metrics.jsonl without what is timed."""
  return [
    {k: v for k, v in line.items() if not k.startswith('time/')}
    for line in metrics.read(workdir / 'metrics.jsonl')
  ]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run: (experiment, workdir, results, state)."""
  workdir = tmp_path_factory.mktemp('whole')
  experiment = toy.experiment()
  results = loop.run(experiment, workdir)
  return experiment, workdir, results, final_state(experiment, workdir)


def test_learns_and_reports(whole):
  _, workdir, results, state = whole
  found = lines(workdir)
  assert [line['step'] for line in found] == list(range(5, 41, 5))
  evaluated = [x['validation/loss'] for x in found if 'validation/loss' in x]
  assert len(evaluated) == 4 and evaluated[-1] < evaluated[0]
  assert results['validation/loss'] == evaluated[-1]
  assert int(state.step) == 40
  chex.assert_tree_all_finite(state)
  config = json.loads((workdir / 'config.json').read_text())
  recursive = json.loads((workdir / 'recursive_config.json').read_text())
  assert config['recursive'] == recursive


@pytest.mark.parametrize('most', [1, 3, 40])
def test_steps_per_dispatch_do_not_change_a_bit(whole, tmp_path, most):
  _, workdir, results, state = whole
  experiment = toy.experiment(training__steps_per_dispatch=most)
  assert loop.run(experiment, tmp_path) == results
  chex.assert_trees_all_equal(final_state(experiment, tmp_path), state)
  assert lines(tmp_path) == lines(workdir)


def test_a_dispatch_traces_its_step_once():
  """Most of the time before a first step, where the model is large."""
  experiment, traced = toy.experiment(), []
  step = experiment.make_step(None)

  def watched(state, batch):
    traced.append(state)
    return step(state, batch)

  state = jax.eval_shape(experiment.init, np.int32(0))
  rows = [experiment.tasks[0].batch('train', i, 8) for i in range(2)]
  batches = jax.tree.map(lambda *x: np.stack(x), *rows)
  jax.eval_shape(
    make_dispatch(watched), state, batches, np.int32(0), np.int32(2)
  )
  assert len(traced) == 1


def test_interrupted_twice_is_uninterrupted_to_the_bit(whole, tmp_path):
  _, workdir, results, state = whole

  def stopping(after, **changes):
    """The experiment, told to stop (SIGTERM) when it fetches batch `after`."""
    experiment = toy.experiment(**changes)
    clean = experiment.tasks[0].batch

    def batch(split, index, size):
      if split == 'train' and index == after:
        os.kill(os.getpid(), signal.SIGTERM)
      return clean(split, index, size)

    task = experiment.tasks[0]._replace(batch=batch)
    return experiment._replace(tasks=(task,))

  first = stopping(7, training__steps_per_dispatch=2)
  assert loop.run(first, tmp_path) == {}
  assert 0 < int(final_state(first, tmp_path).step) < 40
  second = stopping(23, training__steps_per_dispatch=4)
  assert loop.run(second, tmp_path) == {}
  third = toy.experiment()
  assert loop.run(third, tmp_path) == results
  chex.assert_trees_all_equal(final_state(third, tmp_path), state)
  assert lines(tmp_path) == lines(workdir)


def test_finished_run_changes_nothing(whole):
  experiment, workdir, results, _ = whole

  def contents():
    return {
      path: (path.read_bytes(), path.stat().st_mtime_ns)
      for path in workdir.rglob('*')
      if path.is_file()
    }

  before = contents()
  assert loop.run(experiment, workdir) == results
  assert contents() == before


@pytest.mark.parametrize('strategy', ['data', 'fsdp', 'pmap'])
@pytest.mark.parametrize('keep_carry', [False, True])
def test_eight_devices_are_one(tmp_path, strategy, keep_carry):
  """Eight devices against a plain loop on one: float32, 40 steps, 1e-5."""
  experiment = toy.experiment(keep_carry=keep_carry, devices__strategy=strategy)
  loop.run(experiment, tmp_path)
  found = final_state(experiment, tmp_path)
  step = jax.jit(experiment.make_step(None))
  state = jax.jit(experiment.init)(np.int32(0))
  for index in range(40):
    state, _ = step(state, experiment.tasks[0].batch('train', index, 16))
  chex.assert_trees_all_close(found, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('strategy', ['data', 'fsdp'])
def test_the_step_compiles_once(tmp_path, strategy, caplog):
  """With its first compilation most short runs spend most of their time."""
  experiment = toy.experiment(devices__strategy=strategy)
  with jax.log_compiles():
    loop.run(experiment, tmp_path)
  texts = [record.getMessage() for record in caplog.records]
  compiled = [
    x for x in texts if x.startswith('Compiling') and 'constrain' in x
  ]
  assert len(compiled) == 1


def test_strategies_resume_one_another(whole, tmp_path):
  _, _, _, state = whole
  for steps, strategy in ((20, 'pmap'), (30, 'fsdp'), (40, 'data')):
    # The schedule must be the whole run's, so only the end is moved.
    experiment = toy.experiment(devices__strategy=strategy)
    experiment.config['training']['steps'] = steps
    loop.run(experiment, tmp_path)
  found = final_state(experiment, tmp_path)
  chex.assert_trees_all_close(found, state, rtol=1e-5, atol=1e-6)


def test_fsdp_shards_what_it_should():
  from recursive_weights.training import devices

  placement = devices.make('fsdp', batch_size=16, min_size=32)
  experiment = toy.experiment()
  state = placement.scatter(jax.jit(experiment.init)(np.int32(0)))
  w1 = state.params['w1']
  assert w1.sharding.shard_shape(w1.shape) == (6, 2)
  b = state.params['b']
  assert b.sharding.shard_shape(b.shape) == b.shape


@pytest.mark.parametrize(
  'shared, apart',
  [
    ({}, [{}, {'seed': 4}]),
    (
      {'rate_factors': (0.5, 2.0)},
      [{'optimizer__learning_rate': rate} for rate in (5e-4, 2e-3)],
    ),
  ],
  ids=['seeds', 'rates'],
)
def test_members_of_one_program_are_separate_runs(tmp_path, shared, apart):
  both = toy.experiment(num_seeds=2, **{'seed': 3} | shared)
  results = loop.run(both, tmp_path / 'both')
  states = final_state(both, tmp_path / 'both')._replace(rate=())
  for index, changes in enumerate(apart):
    alone = toy.experiment(**{'seed': 3} | changes)
    values = loop.run(alone, tmp_path / str(index))
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=index: x[i], states),
      final_state(alone, tmp_path / str(index)),
      rtol=1e-5,
      atol=1e-6,
    )
    np.testing.assert_allclose(
      results[f'validation/loss/seed{index}'],
      values['validation/loss'],
      rtol=1e-4,
    )


@pytest.mark.parametrize('factors', [(1.0,), (1.0, 0.0), ('a', 'b')])
def test_rates_that_fit_no_members_are_refused(factors):
  config = config_lib.base()
  config.num_seeds, config.rate_factors = 2, factors
  (error,) = build.check(config_lib.to_data(config))
  assert error.startswith('rate_factors must be () or one factor > 0 for each')


def test_accumulation_is_the_large_batch(whole, tmp_path):
  """Means of halves are the mean of the whole, up to rounding."""
  _, _, _, state = whole
  experiment = toy.experiment(training__accumulation=2)
  loop.run(experiment, tmp_path)
  found = final_state(experiment, tmp_path)
  chex.assert_trees_all_close(found.params, state.params, atol=1e-5)


def test_bad_update_never_lands(whole, tmp_path):
  experiment = toy.experiment(poison=17)
  with pytest.raises(loop.Diverged, match=r'step 18: loss nan.*checkpoints/10'):
    loop.run(experiment, tmp_path)
  chex.assert_tree_all_finite(final_state(experiment, tmp_path))
  assert int(final_state(experiment, tmp_path).step) == 10
  # With the data mended the run goes on to the bits of an undisturbed one.
  mended = toy.experiment()
  loop.run(mended, tmp_path)
  chex.assert_trees_all_equal(final_state(mended, tmp_path), whole[3])


def test_what_it_says_after_divergence_can_be_done(tmp_path):
  bad = toy.experiment(poison=17)
  with pytest.raises(loop.Diverged) as error:
    loop.run(bad, tmp_path / 'bad')
  path = tmp_path / 'bad' / 'checkpoints' / '10'
  assert f'another --workdir with --config.resume_from={path}' in str(
    error.value
  )
  slower = {'optimizer__learning_rate': 1e-4}
  with pytest.raises(UserError, match='holds another experiment: optimizer'):
    loop.run(toy.experiment(**slower), tmp_path / 'bad')
  loop.run(toy.experiment(resume_from=str(path), **slower), tmp_path / 'good')
  assert lines(tmp_path / 'good')[0]['step'] == 15
  # Before the first checkpoint the workdir is free, and nothing is left there.
  early = tmp_path / 'early'
  with pytest.raises(loop.Diverged, match=r'no checkpoint yet.* and run again'):
    loop.run(toy.experiment(poison=7), early)
  assert [line['step'] for line in lines(early)] == [5]
  loop.run(toy.experiment(training__steps=10, **slower), early)
  assert [line['step'] for line in lines(early)] == [5, 10]
  stored = checkpoints.read_config(early)
  assert stored['optimizer']['learning_rate'] == 1e-4


def test_start_precedence(whole, tmp_path, monkeypatch):
  """Workdir before resume_from before init_from before scratch."""
  _, workdir, _, donated = whole
  donor = str(workdir)

  def begin(name, **changes):
    experiment = toy.experiment(**changes)
    experiment.config['training']['steps'] = 41
    seen = []

    def spy(axis):
      step = experiment.make_step(axis)

      def spied(state, batch):
        jax.debug.callback(lambda s: seen.append(int(s)), state.step)
        return step(state, batch)

      return spied

    loop.run(experiment._replace(make_step=spy), tmp_path / name)
    jax.effects_barrier()
    return min(seen), final_state(experiment, tmp_path / name)

  first, _ = begin('resumed', resume_from=donor, init_from=donor)
  assert first == 40
  first, initialised = begin('initialised', init_from=donor)
  assert first == 0
  # The same weights by the name under which the package ships them.
  monkeypatch.setattr(pretrained, 'FOLDER', tmp_path / 'shipped')
  (tmp_path / 'shipped' / 'toy').mkdir(parents=True)
  path = tmp_path / 'shipped' / 'toy' / 'weights.npz'
  pretrained.write_npz(path, donated.ema)
  _, shipped = begin('by_name', init_from='toy')
  chex.assert_trees_all_equal(shipped, initialised)
  # A run of its own from step 0, but from the donor's average, not a fresh
  # initialisation: its first checkpoint already knows the task.
  fresh = lines(workdir)[1]['validation/loss']
  assert lines(tmp_path / 'initialised')[1]['validation/loss'] < fresh
  # The workdir's own checkpoint wins over resume_from.
  own = toy.experiment()
  own.config['training']['steps'] = 10
  loop.run(own, tmp_path / 'own')
  first, _ = begin('own', resume_from=donor)
  assert first == 10


def test_another_experiment_is_refused(whole):
  _, workdir, _, _ = whole
  before = (workdir / 'config.json').read_bytes()
  with pytest.raises(UserError, match=r'seed: 5 here, 0 there'):
    loop.run(toy.experiment(seed=5), workdir)
  assert (workdir / 'config.json').read_bytes() == before


def test_one_process_to_a_workdir(whole):
  experiment, workdir, results, _ = whole
  with (
    lock.alone(workdir),
    pytest.raises(UserError, match='another process trains in'),
  ):
    loop.run(experiment, workdir)
  assert loop.run(experiment, workdir) == results
  with pytest.raises(UserError, match=r'results\.json cannot be made'):
    loop.run(experiment, workdir / 'results.json')


def test_early_stopping(tmp_path):
  experiment = toy.experiment(
    optimizer__learning_rate=1e-12,
    early_stopping={
      'metric': 'validation/accuracy',
      'mode': 'max',
      'patience': 2,
      'rules': {},
    },
  )
  loop.run(experiment, tmp_path)
  assert int(final_state(experiment, tmp_path).step) == 30
  found = lines(tmp_path)
  loop.run(experiment, tmp_path)  # nothing more to do
  assert lines(tmp_path) == found


@pytest.mark.parametrize(
  'fields',
  [
    {'checkpoint__best': 'validation/acuracy'},
    {'early_stopping__metric': 'validation/acuracy'},
  ],
)
def test_a_misspelt_metric_is_an_error_that_lists_them(tmp_path, fields):
  with pytest.raises(UserError, match=r'acuracy.* is no metric .*train/loss'):
    loop.run(toy.experiment(**fields), tmp_path)


def test_should_stop_is_a_function_of_history():
  def history(*values):
    return [{'step': i, 'm': v} for i, v in enumerate(values)]

  rule = {'metric': 'm', 'mode': 'min', 'patience': 2}
  assert not metrics.should_stop(history(3, 2, 1), **rule)
  assert not metrics.should_stop(history(1, 2), **rule)
  assert metrics.should_stop(history(1, 2, 3), **rule)
  assert metrics.should_stop(history(1, None, None), **rule)
  assert not metrics.should_stop(
    history(1, 2, 3), metric='', mode='min', patience=2
  )
  assert not metrics.should_stop(history(3, 2), **rule, target=1.0)
  assert 'reached 2' in metrics.should_stop(history(3, 2), **rule, target=2.0)
  rule['mode'] = 'max'
  assert 'reached 2' in metrics.should_stop(history(3, 1), **rule, target=2.0)
  assert not metrics.should_stop(history(1, None), **rule, target=2.0)


def test_max_minutes_saves_and_leaves(tmp_path):
  experiment = toy.experiment(max_minutes=1e-6)
  assert loop.run(experiment, tmp_path) == {}
  assert int(final_state(experiment, tmp_path).step) == 5


def test_told_to_stop_in_its_last_steps_it_stops(whole, tmp_path):
  """Whoever started it may have more to do; the next start evaluates."""

  def told(state):
    signal.raise_signal(signal.SIGTERM)
    return state

  experiment, _, results, _ = whole
  assert loop.run(experiment._replace(every=((40, told),)), tmp_path) == {}
  assert loop.run(experiment, tmp_path) == results


def test_every_runs_between_steps(tmp_path):
  seen = []

  def note(state):
    seen.append(int(state.step))
    return state

  experiment = toy.experiment()._replace(every=((15, note),))
  loop.run(experiment, tmp_path)
  assert seen == [15, 30]


def test_signals_are_given_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  experiment = toy.experiment(max_minutes=1e-6)
  thread = threading.Thread(target=loop.run, args=(experiment, tmp_path))
  thread.start()
  thread.join()
  assert signal.getsignal(signal.SIGTERM) is before
