"""Retrieval measures by hand, their intervals, and the comparison's table."""

import json

import jax
import numpy as np
import pytest

from recursive_weights import retrieval as command
from recursive_weights.evaluators import _bootstrap, retrieval
from recursive_weights.interfaces import Objective, UserError
from recursive_weights.models import shared_basis
from recursive_weights.tasks import question_answer

LAST = Objective(score=None, answer=lambda outputs: outputs['logits'][-1])
FIELDS = {
  'members': 12, 'width': 6, 'rank': 2, 'train_questions': 2,
  'validation_questions': 2, 'noise': 0.1,
}  # fmt: skip


@pytest.mark.parametrize('batch_size', [7, 60])
def test_measures_are_those_of_a_loop(batch_size):
  task = question_answer.make(**FIELDS)
  model = shared_basis.make(task.spec, answers=task.answers, rank=2)
  params = model.init(jax.random.key(0), None)
  evaluate = retrieval.make(
    model, task, LAST, batch_size=batch_size, resamples=50
  )
  found = evaluate(params, jax.random.key(0))
  batch = task.batch('test', 0, 60)
  ranks = []
  for q, target in zip(batch['inputs'], batch['targets'], strict=True):
    distance = np.sum((np.float64(q) - task.answers) ** 2, -1)
    ranks.append(1 + np.sum(distance < distance[target]))
  ranks = np.array(ranks)
  assert found['test/recall_1'] == pytest.approx(np.mean(ranks == 1))
  assert found['test/recall_5'] == pytest.approx(np.mean(ranks <= 5))
  assert found['test/mrr'] == pytest.approx(np.mean(1 / ranks))
  for name in ('recall_1', 'recall_5', 'mrr'):
    low, high = found[f'test/{name}/low'], found[f'test/{name}/high']
    assert low < found[f'test/{name}'] < high


def test_intervals_cover_the_truth_as_often_as_they_say():
  draw = np.random.default_rng(0)
  hits = 0
  for _ in range(200):
    low, high = _bootstrap.interval(draw.random(80) < 0.3, resamples=300)
    hits += low <= 0.3 <= high
  assert 0.9 <= hits / 200 <= 0.99


def test_runs_that_share_examples_are_no_more_examples():
  values = np.random.default_rng(0).random(50)
  one = _bootstrap.interval(values)
  assert _bootstrap.interval(np.stack([values] * 4)) == pytest.approx(one)
  same = _bootstrap.interval(np.ones(50))
  assert same == (1.0, 1.0)


def test_splits_without_questions_and_bad_numbers_are_told():
  task = question_answer.make(**FIELDS | {'validation_questions': 0})
  model = shared_basis.make(task.spec, answers=task.answers, rank=2)

  def make(**fields):
    return retrieval.make(model, task, LAST, batch_size=4, **fields)

  with pytest.raises(UserError, match="'validation' has no examples: leave it"):
    make(splits=('test', 'validation'))
  with pytest.raises(UserError, match='resamples must be >= 0, got -1'):
    make(resamples=-1)


def test_the_gap_is_that_of_two_methods_question_by_question():
  draw = np.random.default_rng(0)
  mine = list(draw.integers(1, 9, (2, 40)))
  # The basis is right where the other is, and at some more.
  ours = [np.where(draw.random(40) < 0.3, 1, rank_B) for rank_B in mine]
  row = command.summary(mine, ours)
  judged = {
    'recall_1': lambda rank: rank == 1,
    'recall_5': lambda rank: rank <= 5,
    'mrr': lambda rank: 1 / rank,
  }
  for name, judge in judged.items():
    gap_SB = np.zeros((2, 40))
    for s in range(2):
      for b in range(40):
        gap_SB[s, b] = float(judge(ours[s][b])) - float(judge(mine[s][b]))
    assert row[f'{name}/basis_gap'] == pytest.approx(gap_SB.mean())
    assert row[f'{name}/basis_gap'] > 0
    # Both methods, and both seeds, are judged on the same resampled questions.
    means = [gap_SB[:, draw.integers(0, 40, 40)].mean() for _ in range(4000)]
    np.testing.assert_allclose(
      row[f'{name}/basis_gap/interval'],
      np.quantile(means, (0.025, 0.975)),
      atol=0.015,
    )
  unpaired = command.summary(mine, [rank_B[::-1] for rank_B in ours])
  low, high = row['recall_1/basis_gap/interval']
  wide_low, wide_high = unpaired['recall_1/basis_gap/interval']
  assert wide_high - wide_low > high - low


def test_a_folder_keeps_to_one_comparison(tmp_path):
  task = {'name': 'question_answer'} | FIELDS
  names = ['identity']
  first = command.fill(tmp_path, task, [1], 1, names, {})
  # Rows that are there are not measured again: a mark on them stays.
  path = tmp_path / 'table.json'
  path.write_text(json.dumps([first[0] | {'mark': 1}]))
  more = command.fill(tmp_path, task, [1, 2], 1, names, {})
  assert [row['train_questions'] for row in more] == [1, 2]
  assert more[0]['mark'] == 1 and 'mark' not in more[1]
  for other, message in (
    ((task | {'noise': 0.2}, [3], 1, names), 'task.noise 0.1 there and 0.2'),
    ((task, [3], 2, names), 'num_seeds 1 there and 2 here'),
    ((task, [3], 1, ['ridge']), 'methods .* there and .*ridge.* here'),
  ):
    with pytest.raises(UserError, match=message) as error:
      command.fill(tmp_path, *other, {})
    assert str(tmp_path) in str(error.value)
  assert json.loads(path.read_text()) == json.loads(json.dumps(more))
  (tmp_path / 'asked.json').unlink()
  with pytest.raises(UserError, match=r'no asked\.json'):
    command.fill(tmp_path, task, [3], 1, names, {})


def test_settings_of_two_sets_are_refused(tmp_path):
  path = tmp_path / 'table.json'
  row = {'method': 'ridge', 'train_questions': 1, 'settings': {}, 'rule': 'dot'}
  path.write_text(json.dumps([row, row | {'train_questions': 2}]))
  assert list(command.read_settings(path)) == [('ridge', 1), ('ridge', 2)]
  for text, message in (
    (json.dumps([row, row]), 'got two of ridge with 1 questions'),
    ('{', 'is not JSON'),
    ('[{"method": "ridge"}]', 'cannot read settings .* KeyError'),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      command.read_settings(path)


@pytest.mark.slow
def test_the_comparison_has_a_row_for_each_method():
  names = ['identity', 'ridge', 'basis']
  task = {'name': 'question_answer'} | FIELDS
  rows = command.compare(task, 2, 2, names, {})
  assert [row['method'] for row in rows] == names
  for row in rows:
    assert len(row['recall_1/by_seed']) == 2
    assert row['recall_1'] == pytest.approx(np.mean(row['recall_1/by_seed']))
  identity, _, basis = rows
  gap = basis['recall_1'] - identity['recall_1']
  assert identity['recall_1/basis_gap'] == pytest.approx(gap)
  assert basis['recall_1'] > identity['recall_1'] + 0.3
  assert json.loads(json.dumps(rows)) is not None
  text = command.table(rows)
  assert f'{basis["recall_1"]:.3f}' in text and f'(**{gap:+.3f}**)' in text
  # The member's own weights, with the mean questions if the rule asks them.
  ridge = rows[1]
  own = 12 * 6 * 6 + 12 * 6 * ridge['rule'].startswith('routed')
  assert ridge['parameters'] == own and f'| ridge | {own:,} |' in text
  assert 0 <= max(basis['tangent/by_seed']) < 0.1
  assert len(basis['tangent/by_seed']) == 2 and 'tangent/by_seed' not in ridge
  # A set without validation questions takes another's settings.
  bare = task | {'validation_questions': 0}
  with pytest.raises(UserError, match='no validation questions'):
    command.compare(bare, 2, 1, ['ridge'], {})
  again = command.compare(bare, 2, 1, ['ridge'], {'ridge': rows[1]})
  assert again[0]['settings'] == rows[1]['settings']
  # And so does one with them that is told to.
  poor = rows[1] | {'settings': {'base': 'zero', 'ridge': 1e6}}
  found = command.compare(task, 2, 1, ['ridge', 'identity'], {'ridge': poor})
  assert found[0]['settings'] == poor['settings']
  assert found[1]['settings'] == {}
  with pytest.raises(UserError, match='methods has no magic'):
    command.compare(task, 2, 1, ['magic'], {})
