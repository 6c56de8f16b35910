"""The validation matrix: its members, what it decides, and a run of it."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from configs import hybrid_matrix
from recursive_weights import build, config, matrix
from recursive_weights.training import checkpoints, loop, optimizers

ROOT = pathlib.Path(__file__).parents[1]


def count(name):
  data = config.to_data(hybrid_matrix.get_config(name))
  return matrix.parameters(data)


def test_every_tier_has_the_baseline_and_every_question_a_member():
  for members in hybrid_matrix.TIERS.values():
    assert members[0] == matrix.BASELINE
  questions = hybrid_matrix.QUESTIONS
  for _, member, keep, take, *against in questions:
    assert {member, *against} <= set(hybrid_matrix.MEMBERS) and keep != take
  assert len({question for question, *_ in questions}) == len(questions)
  asked = [(member, *against) for _, member, _, _, *against in questions]
  assert {('groups_1',), ('groups_4',), ('groups_4', 'groups_1')} <= set(asked)
  assert set(matrix.PURE) <= set(hybrid_matrix.MEMBERS)


def test_pure_models_are_as_large_as_the_hybrid():
  baseline = count('baseline')
  assert 8e6 < baseline < 11.1e6
  for name in matrix.PURE:
    assert abs(count(name) / baseline - 1) < 0.03, name
  assert count('shallow') < 0.6 * baseline


@pytest.mark.parametrize('member', ['baseline', 'ssm_slow', 'time_alone'])
def test_a_head_of_its_own_decays(member):
  data = config.to_data(hybrid_matrix.get_config(f'{member},smoke'))
  data['model']['tied'] = False  # no part of a layer: its path is its name
  groups = {g: x['pattern'] for g, x in data['optimizer']['groups'].items()}
  labels = optimizers.label(build.parameter_shapes(data), groups)
  assert labels['head'] == labels['attention']['mlp']['up'] == 'matrices'
  assert labels['embedding']['table'] == labels['norm']['scale'] == 'rest'


CHANGES = {
  'no_anchor': {'model.anchors'},
  'shallow': {'model.anchors', 'model.layers'},
  'second_text': {'task.source'},
  'wide': {'model.anchors', 'model.layers', 'model.width'},
  'gamma_one': {'model.gamma'},
  'groups_4': {'model.state_norm'},
  'alpha_learned': {'model.learned_grounding'},
  'recurrent_slow': {'optimizer.groups.recurrent.lr_scale'},
  'long_warmup': {'optimizer.schedule.warmup_steps'},
  'rwkv6': {'model.pattern', 'model.anchors'},
  'gf_mh': {'model.fusion'},
  'restart': set(),
}


@pytest.mark.parametrize('name', CHANGES)
def test_a_member_changes_no_more_than_it_says(name):
  base, data = (
    config.to_data(hybrid_matrix.get_config(x)) for x in ('baseline', name)
  )
  lines = checkpoints.differences(data, base)
  assert {line.split(':')[0] for line in lines} == CHANGES[name]


@pytest.mark.parametrize(
  ('name', 'half'), [('time_alone', 'ssm'), ('ssm_alone', 'time')]
)
def test_a_resting_half_does_not_move(name, half):
  data = config.to_data(hybrid_matrix.get_config(f'{name},smoke'))
  shapes = build.parameter_shapes(data)
  groups = {g: x['pattern'] for g, x in data['optimizer']['groups'].items()}
  labels = optimizers.label(shapes, groups)
  paths = dict(
    zip(
      optimizers.path_names(shapes),
      jax.tree.leaves(labels),
      strict=True,
    )
  )
  assert data['optimizer']['groups']['resting']['frozen']
  for path, label in paths.items():
    assert (label == 'resting') == path.startswith(f'hybrid/{half}/'), path


def test_two_runs_share_the_steps_that_are_asked_for(monkeypatch):
  given = {'variant': 'smoke', 'num_seeds': 1, 'path': '', 'second_path': ''}
  monkeypatch.setattr(matrix.flags, 'FLAGS', types.SimpleNamespace(**given))
  for member in ('baseline', 'restart', 'half', 'ssm_first', 'ssm_alone'):
    built = matrix.build(hybrid_matrix, member, ['--config.training.steps=12'])
    steps = built.config['training']['steps']
    assert steps == (12 if member == 'baseline' else 6), member


@pytest.mark.parametrize(
  ('name', 'scale'), [('ssm_slow', 0.1), ('ssm_fast', 3.0)]
)
def test_one_half_learns_at_another_rate(name, scale):
  """And decays as before: no more changes than the rate of that half."""

  def groups_by_path(name):
    data = config.to_data(hybrid_matrix.get_config(f'{name},smoke'))
    shapes = build.parameter_shapes(data)
    groups = data['optimizer']['groups']
    patterns = {g: x['pattern'] for g, x in groups.items()}
    labels = jax.tree.leaves(optimizers.label(shapes, patterns))
    return {
      path: {k: v for k, v in groups[label].items() if k != 'pattern'}
      for path, label in zip(optimizers.path_names(shapes), labels, strict=True)
    }

  before, after = groups_by_path('baseline'), groups_by_path(name)
  for path, group in before.items():
    ours = path.startswith('hybrid/ssm/')
    assert after[path] == group | ({'lr_scale': scale} if ours else {}), path


@pytest.fixture
def screen(monkeypatch):
  """`best_rate` of runs that diverge from a rate on, and the runs it made.

  The loss of a rate is its distance from .002.
  """

  def best(folder, *, diverges=math.inf, rates=('4e-3', '1e-3', '2e-3')):
    runs = []

    def run(module, member, workdir, overrides, fields):
      runs.append((workdir, fields))
      if max(rates_of(fields)) >= diverges:
        raise loop.Diverged('at step 3')

    def rates_of(fields):
      first = fields['optimizer.learning_rate']
      return [first * factor for factor in fields['rate_factors']]

    def measure(member, workdir):
      assert workdir == runs[-1][0]
      return {'best': [abs(x - 2e-3) for x in rates_of(runs[-1][1])]}

    given = {'learning_rates': rates, 'screen_steps': 30}
    built = types.SimpleNamespace(config={'training': {'steps': 20}})
    monkeypatch.setattr(matrix.flags, 'FLAGS', types.SimpleNamespace(**given))
    monkeypatch.setattr(matrix, 'build', lambda *_: built)
    monkeypatch.setattr(matrix, 'run', run)
    monkeypatch.setattr(matrix, 'measure', measure)
    return matrix.best_rate(None, 'wide', folder, []), runs

  return best


def test_a_member_takes_the_rate_with_the_lowest_loss(screen, tmp_path):
  rate, [(workdir, fields)] = screen(tmp_path)
  assert rate == 2e-3
  assert workdir == tmp_path / 'screen' / 'wide-20-0.001-0.002-0.004'
  # One short program without the evaluators at the end, a seed for each rate.
  assert fields == {
    'num_seeds': 3,
    'rate_factors': (1.0, 2.0, 4.0),
    'training.steps': 20,
    'optimizer.learning_rate': 1e-3,
    'evaluators.after': {},
  }


def test_rates_that_diverge_are_left_out_from_the_largest(screen, tmp_path):
  rate, runs = screen(tmp_path, diverges=2e-3)
  assert rate == 1e-3
  assert [fields['num_seeds'] for _, fields in runs] == [3, 2, 1]
  assert len({workdir for workdir, _ in runs}) == 3  # each its own folder
  with pytest.raises(loop.Diverged, match='wide diverged with every'):
    screen(tmp_path, diverges=0.0)


def test_apart_by_hand():
  gain, least = matrix.apart([3.0, 4.0, 5.0], [1.0, 2.5, 2.5])
  assert gain == pytest.approx(2.0)
  # Differences 2, 1.5, 2.5: standard deviation .5; t(.975, 2) = 4.3027.
  assert least == pytest.approx(4.3027 * 0.5 / math.sqrt(3), rel=1e-4)
  # Only the first seed is in both.
  assert matrix.apart([3.0], [1.0, 2.0]) == (2.0, math.inf)


def test_one_seed_diagnoses_nothing():
  found = {name: row([x]) for name, x in (('restart', 1.0), ('ssm_first', 2.0))}
  assert matrix.diagnosis(found).endswith('one seed tells no spread.\n')


def row(best, data='a', last=None, steps=10, **results):
  return {
    'best': best,
    'last': last or best,
    'data': {'train': data},
    'steps': steps,
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


@pytest.mark.parametrize('other', [{'data': 'b'}, {'steps': 5}])
def test_other_data_or_steps_decide_nothing(other):
  found = {'baseline': row([1.0, 1.1]), 'shallow': row([2.0, 2.1], **other)}
  assert matrix.decide(found, *QUESTION) is None
  assert matrix.decide({'baseline': row([1.0])}, *QUESTION) is None


def test_members_may_be_compared_with_each_other():
  question = ('one or four?', 'four', 'one', 'four', 'one')
  found = {'one': row([1.5, 1.51, 1.52]), 'four': row([1.3, 1.31, 1.32])}
  decision = matrix.decide(found, *question)
  assert decision['verdict'] == 'four' and decision['against'] == 'one'
  assert decision['gain'] == pytest.approx(0.2)
  assert '| four | one | +0.2000 |' in matrix.answers([decision])
  assert matrix.decide(found | {'one': row([1.0], steps=5)}, *question) is None
  assert matrix.decide({'four': row([1.0])}, *question) is None


@pytest.mark.parametrize(
  ('hybrid', 'words'),
  [
    ([1.0, 1.001], 'together'),
    ([1.5, 1.515], 'as good as the better half'),
    ([1.7, 1.71], 'capacity'),
    ([2.3, 2.31], 'training'),
  ],
)
def test_diagnosis(hybrid, words):
  first, second = [1.51, 1.51], [2.0, 2.01]
  assert words in matrix.diagnose(hybrid, first, second)
  assert words in matrix.diagnose(hybrid, second, first)
  alone = [x[:1] for x in (hybrid, first, second)]
  assert 'tells no spread' in matrix.diagnose(*alone)


def test_scaling_needs_everything():
  share = {'gates/gradient_share/a': 1.0, 'gates/gradient_share/b': 0.5}
  found = {'baseline': row([1.0, 1.01], **share)}
  assert matrix.scale(found, [], [QUESTION])['verdict'] == 'not known yet'
  found |= {name: row([1.2, 1.21]) for name in (*matrix.PURE, 'shallow')}
  decisions = [matrix.decide(found, *QUESTION)]
  assert matrix.scale(found, decisions, [QUESTION])['verdict'] == 'scale'
  # A member was measured, but not against all that is asked.
  pair = ('four or shallow?', 'shallow', 'four', 'shallow', 'four')
  verdict = matrix.scale(found, decisions, [QUESTION, pair])['verdict']
  assert verdict == 'not known yet'
  both = [*decisions, matrix.decide(found | {'four': row([1.0, 1.1])}, *pair)]
  assert matrix.scale(found, both, [QUESTION, pair])['verdict'] == 'scale'
  # Each condition alone can refuse.
  uneven = row([1.0, 1.01], **share | {'gates/gradient_share/b': 0.1})
  rising = row([1.0, 1.01], last=[1.2, 1.2], **share)
  worse = row([1.3, 1.31], **share)
  for other in (uneven, rising, worse):
    verdict = matrix.scale(found | {'baseline': other}, decisions, [QUESTION])
    assert verdict['verdict'] == 'do not scale'


@pytest.mark.parametrize(
  'pure', [row([2.0]), row([2.0, 2.1], steps=5), row([2.0, 2.1], data='b')]
)
def test_scaling_asks_for_equal_runs_and_a_spread(pure):
  found = {'baseline': row([1.0, 1.1])} | dict.fromkeys(matrix.PURE, pure)
  verdict = matrix.scale(found, [], [QUESTION])
  first, *_ = verdict['conditions'].values()
  assert first is None and verdict['verdict'] == 'not known yet'
  told = matrix.diagnosis(found)
  assert told == '' or 'one seed tells no spread' in told


def test_one_seed_has_no_spread():
  """None in the table, and no chance that it is decided."""
  fields = {'parameters': 10, 'learning_rate': 1e-3, 'tokens_per_second': 5.0}
  fields |= {'gates_failed': {}}
  three = row([1.0, 1.01, 1.02]) | fields
  found = {'baseline': three, 'shallow': row([1.2]) | fields, 'wide': three}
  lines = matrix.table(found).splitlines()[2:]
  assert [line.split(' | ')[4:6] for line in lines] == [
    ['1.0100 ± 0.0100', ''],
    ['1.2000', '+0.2000'],
    ['1.0100 ± 0.0100', '+0.0000 (needs 0.0000)'],
  ]
  wide = ('wide?', 'wide', 'no', 'yes')
  decisions = [matrix.decide(found, *x) for x in (QUESTION, wide)]
  assert 'about 0.1 of these' in matrix.answers(decisions)
  assert 'about 0.0 of these' in matrix.answers(decisions[:1])


def test_failed_gates_stand_in_the_table():
  results = {
    'gates/G3.5': 1.5,
    'gates/G3.5/seed0': 1.0,
    'gates/G3.5/seed1': 2.0,
  }
  results |= {'gates/G1': 0.0, 'gates/G1/seed0': 0.0, 'test/perplexity': 4.0}
  results['gates/gradient_share/hybrid_time'] = 0.25
  member = row([1.0, 1.1], **results)
  member |= {'parameters': 10, 'learning_rate': 1e-3, 'tokens_per_second': 5.0}
  member |= {'gates_failed': {50: [], 100: ['G2', 'G3']}, 'sample': 'To be\nor'}
  line = matrix.table({'baseline': member}).splitlines()[-1]
  assert line.endswith('| 4.000 | 5 | 0.25 | 100: G2, G3; end: G3.5 |')
  assert matrix.samples({'baseline': member}).splitlines() == [
    *('baseline:', '', '    To be', '    or'),
  ]
  well = member | {'gates_failed': {50: []}, 'results': {'gates/G1': 0.0}}
  line = matrix.table({'baseline': well}).splitlines()[-1]
  assert line.endswith('|  | 5 |  |  |')


def run_matrix(workdir, config, *arguments):
  process = subprocess.run(
    [
      *(sys.executable, '-m', 'recursive_weights.matrix'),
      *(f'--config={config}', '--variant=smoke', f'--workdir={workdir}'),
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    # One device: eight simulated ones take many times as long.
    env=os.environ | {'XLA_FLAGS': ''},
    timeout=3600,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr


@pytest.mark.slow
def test_one_seed_is_trained_and_decides_nothing(tmp_path):
  pair = tmp_path / 'pair.py'
  tier = "TIERS = {'1': ('baseline', 'attention')}"
  pair.write_text(f'from configs.hybrid_matrix import *\n\n{tier}\n')
  code, out, err = run_matrix(tmp_path / 'runs', pair, '--num_seeds=1')
  assert code == 0, err
  found = json.loads(out.splitlines()[-1])
  assert set(found) == {'baseline', 'attention'}
  assert all(math.isfinite(loss) for loss in found.values())
  assert 'To a larger size: not known yet.' in out
  assert '- what every feature is worth was measured: not known' in out
  assert (tmp_path / 'runs' / 'table.md').read_text() in out
  report = json.loads((tmp_path / 'runs' / 'table.json').read_text())
  assert [x['tokens_per_second'] > 0 for x in report['members']] == [True] * 2
  assert all(x['sample'] for x in report['members'])


@pytest.mark.long
def test_a_tier_is_trained_once(tmp_path):
  def run(*arguments):
    config = 'configs/hybrid_matrix.py'
    return run_matrix(tmp_path, config, '--num_seeds=2', *arguments)

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
