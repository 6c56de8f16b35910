"""Rules in a run: named stops, cuts of the learning rate, the same bits."""

import os
import signal

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_loop import final_state, lines

from recursive_weights import build
from recursive_weights import config as config_lib
from recursive_weights.interfaces import UserError
from recursive_weights.training import checkpoints, loop, plateau, stopping

OFF = {'metric': '', 'mode': 'max', 'patience': 10}
# Judged by a curve that is flat from the beginning.
IMPATIENT = {'validation': 'validation/flat', 'least': 3, 'flat': 0.99}
IMPATIENT |= {'wobble': 0.0, 'extra': 0.2, 'drops': 9}


TWO = {'num_seeds': 2}


def experiment(rules, stop_at=None, **changes):
  changes = {'training__evaluate_every': 2, 'training__report_every': 1} | (
    changes
  )
  made = toy.experiment(early_stopping=OFF | {'rules': rules}, **changes)
  flat = {'flat': lambda params, key: {'validation/flat': 1.0}}
  made = made._replace(during=made.during | flat)
  if stop_at is None:
    return made
  clean = made.tasks[0].batch

  def batch(split, index, size):
    if split == 'train' and index == stop_at:
      os.kill(os.getpid(), signal.SIGTERM)
    return clean(split, index, size)

  tasks = (made.tasks[0]._replace(batch=batch), *made.tasks[1:])
  return made._replace(tasks=tasks)


def history(**values):
  return [{'step': 1, 'train/loss': 1.0}, {'step': 2} | values]


def judge(lines, **rules):
  return stopping.judge(lines, **OFF, rules=rules or {'drops': 2})


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  made = experiment(IMPATIENT, **TWO)
  loop.run(made, workdir)
  return workdir, final_state(made, workdir)


def test_a_plateau_lowers_the_learning_rate_from_the_next_step_on(whole):
  workdir, state = whole
  schedule = {}
  found = lines(workdir)
  factor, cuts = 1.0, 0
  for index, line in enumerate(found):
    rate = line['train/learning_rate']
    schedule[line['step']] = rate / factor
    verdict = stopping.judge(found[: index + 1], **OFF, rules=IMPATIENT)
    if 'validation/flat' in line and verdict.action == 'cut':
      factor, cuts = factor * 0.6, cuts + 1
  assert cuts >= 2
  np.testing.assert_allclose(state.rate['factor'], [0.6**cuts] * 2, rtol=1e-6)
  # What is left when the cuts are taken out is the cosine of the config.
  steps = np.array(list(schedule))
  cosine = 1e-3 * (1 + np.cos(np.pi * (steps - 1) / 40)) / 2
  np.testing.assert_allclose(list(schedule.values()), cosine, rtol=1e-4)


def test_interrupted_after_a_cut_is_uninterrupted(whole, tmp_path):
  workdir, state = whole
  assert float(lines(workdir)[16]['train/learning_rate']) < 6e-4
  first = experiment(IMPATIENT, 17, training__steps_per_dispatch=3, **TWO)
  assert loop.run(first, tmp_path) == {}
  again = experiment(IMPATIENT, **TWO)
  loop.run(again, tmp_path)
  chex.assert_trees_all_equal(final_state(again, tmp_path), state)
  assert lines(tmp_path) == lines(workdir)


def test_a_checkpoint_without_a_factor_has_factor_one(tmp_path):
  plain = toy.experiment()
  saved = checkpoints.open_folder(tmp_path, plain.config)
  saved.save(plain.init(0)._replace(step=jnp.int32(3)), {})
  saved.close()
  ruled = experiment(IMPATIENT)
  state = final_state(ruled, tmp_path)
  assert state.step == 3 and state.rate['factor'] == 1
  chex.assert_trees_all_equal(final_state(plain, tmp_path).rate, ())


def test_a_named_rule_ends_a_run(tmp_path, caplog):
  made = experiment({'drops': 2})
  values = iter([1.0, 1.0, 1e-9, 1.0])
  gates = {'gates': lambda params, key: {'gates/update/rnn': next(values)}}
  made = made._replace(during=made.during | gates)
  with caplog.at_level('INFO'):
    loop.run(made, tmp_path)
  assert lines(tmp_path)[-1]['step'] == 6
  assert 'update: gates/update/rnn is 1e-09, outside' in caplog.text


@pytest.mark.parametrize(
  ('rule', 'name', 'good', 'bad'),
  [
    ('selection', 'selection', 0.1, 0.0),
    ('collapsed', 'collapsed', 1 / 8, 1 / 4),
    ('update', 'update', 0.2, 0.0),
    ('gradient_share', 'gradient_share', 0.4, 0.0),
    ('activation', 'activation', 0.9, 1e-7),
    ('update', 'update', 0.2, None),
  ],
)
def test_limits_name_themselves(rule, name, good, bad):
  kept = history(**{f'gates/{name}/a': good, f'gates/{name}/a/std': 0.0})
  assert judge(kept).action == 'continue'
  broken = history(**{f'gates/{name}/a': good, f'gates/{name}/b': bad})
  verdict = judge([*kept, *broken])
  assert (verdict.action, verdict.rule) == ('stop', rule)
  broken = [*kept, *broken]
  # The latest line that has it counts, and later ones without it say nothing.
  assert judge([*broken, {'step': 3, 'train/loss': 1.0}]) == verdict
  assert judge([*broken, *kept]).action == 'continue'
  least, most = (-1.0, 1e9) if bad is not None else (0.0, 0.0)
  relaxed = judge(broken, **{rule: (least, most)})
  assert relaxed.action == ('continue' if bad is not None else 'stop')


def test_weights_may_begin_outside_a_limit():
  """RWKV-6's decays are alike for all texts before it learns."""
  start = {'train/loss': 1.0, 'gates/selection/a': 0.0}
  lines = [{'step': i} | start for i in range(4)]
  assert judge(lines[:3], least=4).action == 'continue'
  assert judge(lines, least=4).rule == 'selection'
  risen = [lines[0], lines[1] | {'gates/selection/a': 0.1}, lines[2]]
  assert judge(risen[:2], least=4).action == 'continue'
  assert judge(risen, least=4).rule == 'selection'


def test_no_rules_is_patience_alone():
  lines = [{'step': i, 'a': 1.0, 'validation/loss': None} for i in range(5)]
  verdict = stopping.judge(lines, **OFF, rules={})
  assert verdict.action == 'continue'
  patient = {'metric': 'a', 'mode': 'min', 'patience': 3}
  assert stopping.judge(lines, **patient, rules={}).rule == 'metric'
  assert judge(lines).rule == 'diverged'


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rules': {'pateince': 1}}, r'no field pateince; it has: tolerance, '),
    ({'rules': {'update': 3.0}}, r'update must be \(least, most\), got 3.0'),
    ({'rules': {'update': (2.0, 1.0)}}, r'update must be \(least, most\)'),
    ({'rules': {'cut': 1.5}}, r'cut must lie in \(0, 1\), got 1.5'),
    ({'target': 0.5}, r'target needs early_stopping.metric, got 0.5 alone'),
  ],
)
def test_bad_fields_are_errors_of_the_config(fields, message):
  config = config_lib.base()
  config.early_stopping.update(fields)
  (error,) = build.check(config_lib.to_data(config))
  with pytest.raises(UserError, match=message):
    raise UserError(error)


def test_a_curve_that_is_not_there_is_an_error():
  config = experiment({'validation': 'validation/lost'}).config
  with pytest.raises(UserError, match=r"rules.validation = 'validation/lost'"):
    loop._check_names(config, [{'step': 1}], {'validation/loss': 1.0})


def test_a_training_curve_is_looked_for_once_there_is_a_report():
  config = experiment({'train': 'train/lost'}).config
  line = {'validation/loss': 1.0}
  loop._check_names(config, [{'step': 1}], line)
  with pytest.raises(UserError, match=r"rules.train = 'train/lost'"):
    loop._check_names(config, [{'step': 1, 'train/loss': 1.0}], line)


def test_a_line_without_the_curve_cuts_nothing(tmp_path):
  """Other metrics may be evaluated in between, by evaluators of their own."""
  made = experiment(IMPATIENT)
  calls = iter(range(100))

  def flat(params, key):
    del params, key
    # Judged at every third evaluation.
    other = {'validation/other': 1.0}
    return other if next(calls) % 3 else other | {'validation/flat': 1.0}

  made = made._replace(during=made.during | {'flat': flat})
  loop.run(made, tmp_path)
  found = lines(tmp_path)
  cuts = sum(
    'validation/flat' in line
    and stopping.judge(found[: i + 1], **OFF, rules=IMPATIENT).action == 'cut'
    for i, line in enumerate(found)
  )
  again = sum(
    stopping.judge(found[: i + 1], **OFF, rules=IMPATIENT).action == 'cut'
    for i in range(len(found))
  )
  assert 0 < cuts < again
  state = final_state(made, tmp_path)
  np.testing.assert_allclose(state.rate['factor'], 0.6**cuts, rtol=1e-6)


def test_a_report_cuts_where_the_curve_is_of_training():
  made = experiment(IMPATIENT | {'validation': 'train/flat'})
  line, verdict = {'train/flat': 1.0}, plateau.Verdict('cut', 'cut', '')
  state = made.init(0)

  class Whole:
    gather = staticmethod(lambda state: state)
    scatter = staticmethod(lambda state: state)

  cut = loop._cut(state, verdict, line, made.config, Whole)
  assert float(cut.rate['factor']) == pytest.approx(0.6)
  kept = loop._cut(state, verdict, {'other': 1.0}, made.config, Whole)
  assert float(kept.rate['factor']) == 1.0


def test_all_fields_survive_json():
  config = config_lib.base()
  config.early_stopping.rules = stopping.defaults()
  data = config_lib.to_data(config)
  assert config_lib.to_data(config_lib.from_data(data)) == data
  assert not build.check(data)
