"""Votes of versions, scored by hand, and the submission file."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import trm_arc
from recursive_weights import build, config
from recursive_weights.evaluators import arc_submission
from recursive_weights.interfaces import Model, UserError
from recursive_weights.recursion import objective
from recursive_weights.tasks import arc, parity

VOTERS = 5
LAST = objective.make('last')


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  rng = np.random.default_rng(0)

  def pair():
    return {
      side: rng.integers(0, 10, (2 + (side == 'output'), 3)).tolist()
      for side in ('input', 'output')
    }

  folder = tmp_path_factory.mktemp('arc')
  sets = {
    'train': {'0000000a': {'train': [pair()], 'test': [pair()]}},
    'eval': {
      '0000000b': {'train': [pair()], 'test': [pair(), pair()]},
      '0000000c': {'train': [pair()], 'test': [pair()]},
      '0000000d': {'train': [pair()], 'test': [pair()]},
    },
  }
  paths = {}
  for name, tasks in sets.items():
    (folder / name).write_text(json.dumps(tasks))
    paths[f'{name}_path'] = str(folder / name)
  return arc.make(**paths, canvas=4, augmentations=VOTERS, voters=VOTERS), sets[
    'eval'
  ]


def oracle(task, says, sure):
  """A model that gives row r of the split the answer `says[r]`, by identity."""
  size = task.spec.sizes['test']
  batch = task.batch('test', 0, size)
  # Two tests of one task share identities, so rows are found by their tokens.
  tokens_BX = jnp.asarray(batch['inputs']['tokens'])

  def apply(params, carry, inputs, *, key, train):
    assert key is None and not train
    same_BR = (inputs['tokens'][:, None] == tokens_BX[None]).all(-1)
    same_BR &= (
      inputs['puzzle'][:, None] == jnp.asarray(batch['inputs']['puzzle'])[None]
    )
    row_B = same_BR.argmax(1)
    logits = jax.nn.one_hot(jnp.asarray(says)[row_B], task.spec.classes)
    return {
      'logits': jnp.stack([jnp.zeros_like(logits), logits]),
      'certainty': jnp.stack([row_B * 0.0, jnp.asarray(sure)[row_B]]),
    }, carry

  return Model(
    init=lambda key, inputs: {},
    carry=lambda params, batch_size: {},
    apply=apply,
  )


def run(task, says, sure, batch_size=7, **fields):
  evaluate = arc_submission.make(
    oracle(task, says, sure), task, LAST, batch_size=batch_size, **fields
  )
  return evaluate({}, None)


def test_right_answers_of_all_versions_win(task, tmp_path):
  task, tasks = task
  batch = task.batch('test', 0, task.spec.sizes['test'])
  sure = np.ones(len(batch['weight']), np.float32)
  for batch_size in (7, 20):
    result = run(
      task, batch['targets'], sure, batch_size, output_dir=str(tmp_path)
    )
    assert result == {'test/pass@1': 1.0, 'test/pass@2': 1.0}
  submission = json.loads((tmp_path / 'submission.json').read_text())
  assert submission == {
    name: [
      {'attempt_1': p['output'], 'attempt_2': p['output']} for p in t['test']
    ]
    for name, t in tasks.items()
  }


def test_votes_then_certainty_rank_answers(task, tmp_path):
  """By test: 1 of 2 rank by votes, by certainty, second, nothing at all."""
  task, tasks = task
  batch = task.batch('test', 0, task.spec.sizes['test'])
  says = batch['targets'].copy()
  sure = np.full(len(says), 0.5, np.float32)

  def wrong(row):  # a grid of one square, in the task's colour 0
    says[row] = 0
    says[row, 0] = 2

  # Test 0 of b: three wrong votes beat two right and surer ones.
  for row in (0, 1, 2):
    wrong(row)
  sure[3:5] = 0.9
  # Test 1 of b: two against two and a third answer; the surer ones win.
  for row in (5, 6):
    wrong(row)
  says[7] = 0
  says[7, :2] = 2
  sure[8:10] = 0.6
  # The test of c: no version gives a grid.
  says[10:15] = 1
  # The test of d: only wrong answers.
  for row in range(15, 20):
    wrong(row)
  result = run(task, says, sure, output_dir=str(tmp_path), passes=(1, 2, 3))
  np.testing.assert_allclose(result['test/pass@1'], (0.5 + 0 + 0) / 3)
  np.testing.assert_allclose(result['test/pass@2'], (1.0 + 0 + 0) / 3)
  assert result['test/pass@3'] == result['test/pass@2']
  submission = json.loads((tmp_path / 'submission.json').read_text())
  first, second = (pair['output'] for pair in tasks['0000000b']['test'])
  assert submission['0000000b'] == [
    {'attempt_1': [[0]], 'attempt_2': first},
    {'attempt_1': second, 'attempt_2': [[0]]},
  ]
  assert submission['0000000c'] == [{'attempt_1': [[0]], 'attempt_2': [[0]]}]
  assert list(submission) == ['0000000b', '0000000c', '0000000d']


def test_tests_without_output_are_answered_and_not_scored(tmp_path):
  """From files as the prize's to a submission, by a network that knows none."""
  shown = {'input': [[1, 2], [3, 4]], 'output': [[1]]}
  hidden = {'input': [[5, 0], [0, 5]]}
  paths = {}
  for name, tasks in (
    ('train', {'0000000a': {'train': [shown], 'test': [shown]}}),
    (
      'eval',
      {
        '0000000b': {'train': [shown], 'test': [hidden]},
        '0000000c': {'train': [shown], 'test': [shown, hidden]},
      },
    ),
    ('prize', {'0000000b': {'train': [shown], 'test': [hidden]}}),
  ):
    paths[name] = str(tmp_path / f'{name}.json')
    pathlib.Path(paths[name]).write_text(json.dumps(tasks))

  def evaluated(evaluation):
    data = config.to_data(trm_arc.get_config('smoke'))
    data['task'].update(
      train_path=paths['train'], eval_path=evaluation, tasks=(), canvas=4
    )
    data['evaluators']['after'] = {
      'accuracy': {'splits': ('test',)},
      'arc_submission': {'split': 'test', 'passes': (1, 2)},
    }
    # One task to train on leaves none for validation.
    experiment = build.build(data, str(tmp_path), trains=False)
    params = jax.jit(experiment.init)(np.int32(0)).params
    found = {}
    for evaluator in experiment.after.values():
      found |= evaluator(params, jax.random.key(0))
    submission = json.loads((tmp_path / 'submission.json').read_text())
    return experiment.tasks[0], found, submission

  task, found, submission = evaluated(paths['eval'])
  assert {name: len(tests) for name, tests in submission.items()} == {
    '0000000b': 1,
    '0000000c': 2,
  }
  for attempts in (a for tests in submission.values() for a in tests):
    assert set(attempts) == {'attempt_1', 'attempt_2'}
    assert all(np.ndim(grid) == 2 for grid in attempts.values())
  assert found['test/not_scored'] == 2
  assert {'test/pass@1', 'test/pass@2'} <= set(found)  # of the known one
  assert np.isfinite(found['test/accuracy'])
  batch = task.batch('test', 0, task.spec.sizes['test'])
  assert batch['weight'].tolist() == [0, 0, 1, 1, 0, 0]

  # The right answers, where there are any, are all that scores.
  assert run(task, batch['targets'], np.ones(6, np.float32)) == {
    'test/pass@1': 1.0,
    'test/pass@2': 1.0,
    'test/not_scored': 2.0,
  }

  _, found, submission = evaluated(paths['prize'])
  assert list(submission) == ['0000000b'] and len(submission['0000000b']) == 1
  assert found.pop('test/not_scored') == 1
  assert not [x for x in found.values() if np.isfinite(x)]


def test_nothing_is_written_without_a_folder(task, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  task, _ = task
  batch = task.batch('test', 0, task.spec.sizes['test'])
  run(task, batch['targets'], np.ones(20, np.float32))
  assert not list(tmp_path.iterdir())


def test_errors_say_what_is_needed(task):
  task, _ = task
  model = oracle(task, np.zeros((20, 16), int), np.zeros(20))
  for fields, message in (
    ({'passes': (0,)}, r'passes must be numbers > 0, got \(0,\)'),
    ({'split': 'dev'}, "got 'dev'"),
    ({'batch_size': 0}, 'batch_size must be > 0, got 0'),
  ):
    with pytest.raises(UserError, match=message):
      arc_submission.make(model, task, LAST, **({'batch_size': 4} | fields))
  other = parity.make(length=4)
  evaluate = arc_submission.make(model, other, LAST, batch_size=4)
  with pytest.raises(UserError, match='needs the task arc'):
    evaluate({}, None)
