"""The validation matrix: its members, what it decides, and a run of it."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import hybrid_matrix
from recursive_weights import build, config, matrix

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def counts():
  found = {}
  for name in hybrid_matrix.MEMBERS:
    data = config.to_data(hybrid_matrix.get_config(name))
    experiment = build.build(data)
    shapes = jax.eval_shape(experiment.init, np.int32(0)).params
    found[name] = sum(x.size for x in jax.tree.leaves(shapes))
  return found


def test_every_tier_has_the_baseline_and_every_question_a_member():
  for members in hybrid_matrix.TIERS.values():
    assert members[0] == matrix.BASELINE
  for _, member, keep, take in hybrid_matrix.QUESTIONS:
    assert member in hybrid_matrix.MEMBERS and keep != take
  assert set(matrix.PURE) <= set(hybrid_matrix.MEMBERS)


def test_pure_models_are_as_large_as_the_hybrid(counts):
  for name in matrix.PURE:
    assert abs(counts[name] / counts['baseline'] - 1) < 0.04, name
  assert 8e6 < counts['baseline'] < 11.1e6
  assert counts['shallow'] < 0.6 * counts['baseline']


def test_a_member_changes_one_thing():
  base = config.to_data(hybrid_matrix.get_config('baseline'))
  seen = set()
  for name in hybrid_matrix.MEMBERS[1:]:
    data = config.to_data(hybrid_matrix.get_config(name))
    text = json.dumps(data, sort_keys=True)
    if name not in hybrid_matrix.AFTER:
      assert data != base, name
      assert text not in seen, name
    seen.add(text)


def test_a_resting_half_does_not_move():
  for name, half in (('time_alone', 'ssm'), ('ssm_alone', 'time')):
    groups = hybrid_matrix.get_config(name).optimizer.groups
    frozen = [g for g in groups.values() if g.frozen]
    assert [g.pattern for g in frozen] == [f'^hybrid/{half}/']
    build.build(config.to_data(hybrid_matrix.get_config(f'{name},smoke')))


def test_apart_by_hand():
  gain, least = matrix.apart([3.0, 4.0, 5.0], [1.0, 2.5, 2.5])
  assert gain == pytest.approx(2.0)
  # Differences 2, 1.5, 2.5: standard deviation .5.
  assert least == pytest.approx(2 * 0.5 / math.sqrt(3))
  assert matrix.apart([3.0], [1.0, 2.0]) == (1.5, math.inf)


def row(best, data='a', last=None, **results):
  return {
    'best': best,
    'last': last or best,
    'data': {'train': data},
    'results': results,
  }


QUESTION = ('deep or shallow?', 'shallow', 'deep', 'shallow')


@pytest.mark.parametrize(
  ('losses', 'verdict'),
  [
    ([1.5, 1.51, 1.52], 'within the spread'),
    ([1.3, 1.31, 1.32], 'shallow'),
    ([1.7, 1.71, 1.72], 'deep'),
    ([1.3], 'one seed tells no spread'),
  ],
)
def test_decisions(losses, verdict):
  found = {'baseline': row([1.51, 1.5, 1.53]), 'shallow': row(losses)}
  assert matrix.decide(found, *QUESTION)['verdict'] == verdict


def test_other_data_decide_nothing():
  found = {'baseline': row([1.0, 1.1]), 'shallow': row([2.0, 2.1], data='b')}
  assert matrix.decide(found, *QUESTION) is None
  assert matrix.decide({'baseline': row([1.0])}, *QUESTION) is None


@pytest.mark.parametrize(
  ('hybrid', 'words'),
  [
    ([1.0, 1.01], 'together'),
    ([1.5, 1.52], 'as good as the better half'),
    ([1.7, 1.71], 'capacity'),
    ([2.3, 2.31], 'training'),
  ],
)
def test_diagnosis(hybrid, words):
  first, second = [1.51, 1.51], [2.0, 2.01]
  assert words in matrix.diagnose(hybrid, first, second)
  assert words in matrix.diagnose(hybrid, second, first)


def test_scaling_needs_everything():
  share = {'gates/gradient_share/a': 1.0, 'gates/gradient_share/b': 0.5}
  found = {'baseline': row([1.0, 1.01], **share)}
  assert matrix.scale(found, [], [QUESTION])['verdict'] == 'not known yet'
  found |= {name: row([1.2, 1.21]) for name in (*matrix.PURE, 'shallow')}
  decisions = [matrix.decide(found, *QUESTION)]
  assert matrix.scale(found, decisions, [QUESTION])['verdict'] == 'scale'
  # Each condition alone can refuse.
  uneven = row([1.0, 1.01], **share | {'gates/gradient_share/b': 0.1})
  rising = row([1.0, 1.01], last=[1.2, 1.2], **share)
  worse = row([1.3, 1.31], **share)
  for other in (uneven, rising, worse):
    verdict = matrix.scale(found | {'baseline': other}, decisions, [QUESTION])
    assert verdict['verdict'] == 'do not scale'


def test_failed_gates_stand_in_the_table():
  results = {
    'gates/G3.5': 1.5,
    'gates/G3.5/seed0': 1.0,
    'gates/G3.5/seed1': 2.0,
  }
  results |= {'gates/G1': 0.0, 'gates/G1/seed0': 0.0, 'test/perplexity': 4.0}
  member = row([1.0, 1.1], **results)
  member |= {'parameters': 10, 'learning_rate': 1e-3, 'tokens_per_second': 5.0}
  line = matrix.table({'baseline': member}).splitlines()[-1]
  assert line.endswith('| 4.000 | 5 | G3.5 |')


@pytest.mark.long
def test_a_tier_is_trained_once(tmp_path):
  def run(*arguments):
    process = subprocess.run(
      [
        *(sys.executable, '-m', 'recursive_weights.matrix'),
        *('--config=configs/hybrid_matrix.py', '--variant=smoke'),
        *('--num_seeds=2', f'--workdir={tmp_path}', *arguments),
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=900,
      check=False,
    )
    return process.returncode, process.stdout, process.stderr

  code, out, err = run('--tier=diagnosis')
  assert code == 0, err
  found = json.loads(out.splitlines()[-1])
  assert set(found) == set(hybrid_matrix.TIERS['diagnosis'])
  assert all(math.isfinite(loss) for loss in found.values())
  report = json.loads((tmp_path / 'table.json').read_text())
  assert report['scale']['verdict'] != 'scale'
  assert (tmp_path / 'time_alone' / 'results.json').exists()
  times = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*/metrics.jsonl')}
  code, again, err = run('--tier=diagnosis')
  assert code == 0, err
  assert again == out
  assert times == {p: p.stat().st_mtime_ns for p in times}
  code, _, err = run('--tier=nine')
  assert code == 2 and "got 'nine'" in err
