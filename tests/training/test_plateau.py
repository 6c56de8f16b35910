"""Stopping rules on curves whose verdict a person would not doubt."""

import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.training import plateau
from recursive_weights.training.plateau import Rules


def history(validation, train=None, **probes):
  """A line every 100 steps; training losses come twice as often."""
  lines = []
  for index, value in enumerate(validation):
    step = 100 * (index + 1)
    falling = 3.0 * 0.97**index if train is None else train[index]
    lines.append({'step': step - 50, 'train/loss': falling + 0.001})
    probe = {name: float(x[index]) for name, x in probes.items()}
    lines.append(
      {'step': step, 'train/loss': falling, 'validation/loss': value} | probe
    )
  return lines


def verdicts(validation, rules=Rules(), train=None, probe='', **probes):  # noqa: B008
  """The verdict after every evaluation, until the first stop."""
  found = []
  for count in range(1, len(validation) + 1):
    lines = history(
      validation[:count],
      train,
      **{name: x[:count] for name, x in probes.items()},
    )
    found.append(plateau.judge(lines, rules, probe=probe))
    if found[-1].action == 'stop':
      break
  return found


def rules_of(found):
  return [verdict.rule for verdict in found]


def noise(count, size, seed=0):
  return size * np.random.default_rng(seed).normal(size=count)


def then_flat(curve, count):
  return np.concatenate([curve, np.full(count, curve[-1])])


def falling(count, to=1.0, start=4.0, rate=0.85):
  return to + (start - to) * rate ** np.arange(count)


ASKING = Rules(budget=0)


def test_a_falling_curve_goes_on():
  found = verdicts(falling(40, rate=0.95))
  assert {x.action for x in found} == {'continue'}
  assert found[-1].rule == 'improving'


@pytest.mark.parametrize('rules', [Rules(), ASKING])
def test_a_saw_tooth_is_judged_by_its_minima(rules):
  """Teeth of 15 % on an envelope that falls: more than `overfit` allows."""
  curve = falling(60, rate=0.97) * (1 + 0.05 * (np.arange(60) % 4))
  found = verdicts(curve, rules)
  assert {x.action for x in found} == {'continue'}


def test_overfitting_stops_at_once():
  down = falling(20)
  up = down[-1] * (1 + 0.02 * np.arange(1, 20))
  found = verdicts(np.concatenate([down, up]))
  assert found[-1].rule == 'overfit'
  # 5 % above its best, seen by a window of three evaluations: a few after it.
  assert 20 + 3 <= len(found) <= 20 + 6
  # The same curve with a training loss that rises too is no overfitting.
  train = np.concatenate([np.linspace(3, 1, 20), np.linspace(1, 2, 19)])
  again = verdicts(np.concatenate([down, up]), train=train)
  assert 'overfit' not in rules_of(again)


@pytest.mark.parametrize('budget', [3, 0])
def test_slow_descent_never_stops(budget):
  """A twentieth of a percent an evaluation, two hundred times."""
  curve = np.concatenate([falling(30, rate=0.7), 1 - 5e-4 * np.arange(1, 200)])
  found = verdicts(curve, Rules(tolerance=0.02, wobble=0.001, budget=budget))
  assert {x.action for x in found} == {'continue'}
  assert 'slow' in rules_of(found)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('size', [1e-3, 3e-3])
def test_a_descent_as_large_as_its_noise_is_seen(size, seed):
  """It falls by .003 an evaluation; nobody cuts anything meanwhile."""
  down = 1 - 3e-3 * np.arange(1, 51)
  curve = np.concatenate([falling(30, rate=0.7), down]) + noise(80, size, seed)
  assert 'noise' not in rules_of(verdicts(curve, ASKING))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
  ('size', 'rule'),
  [(1e-5, 'drops'), (1e-4, 'drops'), (5e-3, 'noise'), (1e-2, 'noise')],
)
def test_a_flat_curve_is_cut_then_stopped(size, rule, seed):
  """By `noise` where an improvement (.2 %) would drown in it."""
  curve = then_flat(falling(60, rate=0.93), 80) + noise(140, size, seed)
  found = verdicts(curve, Rules(flat=0.5))
  assert found[-1].rule == rule
  actions = [x.action for x in found]
  first = actions.index('cut')
  assert set(actions[:first]) == {'continue'}
  # Nothing is cut within the first tenth after the last improvement.
  assert first > 60
  if rule == 'drops':
    assert actions.count('cut') == 2
  last = len(found) - 1 - actions[::-1].index('cut')
  assert len(found) - 1 - last >= Rules().window
  if not seed:  # of any unit
    assert rules_of(verdicts(0.1 * curve, Rules(flat=0.5))) == rules_of(found)


@pytest.mark.parametrize('seed', range(3))
def test_a_gain_that_can_be_seen_is_not_noise(seed):
  """Nothing comes near one lucky evaluation again, but a cut helps."""
  curve = then_flat(falling(60, rate=0.93), 60) + noise(120, 0.01, seed)
  curve[60] = 0.93
  rules = Rules(flat=1.0, overfit=0.2, wobble=0.05)
  found = rules_of(verdicts(curve, rules))
  assert found[-1] == 'noise'
  first = found.index('cut')
  curve[first + 1 :] -= 0.03
  found = rules_of(verdicts(curve, rules))
  assert 'noise' not in found and found.count('cut') == 2


def test_cuts_without_gain_stop():
  curve = then_flat(falling(20), 200)
  rules = Rules(flat=1.0, long=0.2, drops=2)
  found = verdicts(curve, rules)
  assert found[-1].rule == 'drops'
  cuts = [i for i, x in enumerate(found) if x.action == 'cut']
  assert len(cuts) == 2
  # The second waits until a tenth more has been trained.
  assert (cuts[1] + 1) * 0.9 >= cuts[0] + 1
  between = rules_of(found)[cuts[0] + 1 : cuts[1]]
  assert set(between) == {'extra'}


def test_flat_for_long_has_converged():
  curve = then_flat(falling(10), 100)
  found = verdicts(curve, Rules(extra=0.5))
  assert found[-1].rule == 'flat'
  # 30 % of the run since the last improvement or cut.
  cuts = [i + 1 for i, x in enumerate(found) if x.action == 'cut']
  last = max([*cuts, 1 + int(np.argmin(curve))])
  assert (len(found) - last) / len(found) > 0.3


def test_small_new_dips_are_a_heartbeat():
  """Each a little lower, none by the tolerance: go on until it is too long."""
  start = falling(12, to=1.3, rate=0.6)
  flat = np.full(40, start[-1] + 1e-3)
  beats = flat.copy()
  beats[3::4] -= 2e-3 + 1e-4 * np.arange(10)
  rules = Rules(tolerance=0.004)
  found = verdicts(np.concatenate([start, beats]), rules)
  assert 'heartbeat' in rules_of(found)
  dead = verdicts(np.concatenate([start, flat]), rules)
  assert 'heartbeat' not in rules_of(dead)
  actions = [[x.action for x in f] for f in (found, dead)]
  assert 'cut' not in actions[0] and found[-1].rule == 'flat'
  assert 'cut' in actions[1]


def test_early_divergence_stops_before_there_is_a_trend():
  found = verdicts([3.0, 2.5, 2.8, 2.8, 2.9, 3.0])
  assert found[-1].rule == 'divergence' and len(found) == 5
  assert rules_of(verdicts([3.0, 2.5, 2.8, 2.4, 2.9, 2.3]))[-1] != 'divergence'


def test_a_falling_probe_stops():
  curve = falling(40, rate=0.97)
  probe = np.concatenate([np.linspace(0.2, 0.9, 20), np.linspace(0.9, 0.5, 20)])
  found = verdicts(curve, probe='test/recall', **{'test/recall': probe})
  assert found[-1].rule == 'probe'
  assert 20 < len(found) < 30
  found = verdicts(curve, **{'test/recall': probe})  # nobody watches it
  assert found[-1].action == 'continue'


@pytest.mark.parametrize('value', [None, float('inf'), float('nan')])
def test_a_probe_that_was_not_finite_says_nothing(value):
  curve = falling(40, rate=0.97)
  probe = np.linspace(0.2, 0.9, 40)
  lines = history(curve, probe=probe)
  wanted = [plateau.judge(lines[:n], probe='probe') for n in range(len(lines))]
  assert {x.action for x in wanted} == {'continue'}
  evaluated = [line for line in lines if 'probe' in line]
  for index in (3, 20, 37, 38, 39):
    evaluated[index]['probe'] = value
  found = [plateau.judge(lines[:n], probe='probe') for n in range(len(lines))]
  assert found == wanted
  # And it hides no fall.
  for line in evaluated[21:37]:
    line['probe'] = 0.1
  assert plateau.judge(lines, probe='probe').rule == 'probe'


def test_people_are_asked_where_there_is_no_budget():
  curve = then_flat(falling(20), 20)
  found = verdicts(curve, Rules(budget=0))
  assert 'examine' in [x.action for x in found]
  assert 'cut' not in [x.action for x in found]
  assert found[-1].rule == 'flat'


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('size', [5e-3, 1e-2])
def test_noise_that_hides_a_gain_stops_where_nothing_is_cut(size, seed):
  """A window after a person was asked, at the earliest."""
  curve = then_flat(falling(60, rate=0.93), 80) + noise(140, size, seed)
  found = verdicts(curve, ASKING)
  assert found[-1].rule == 'noise'
  asked = [x.action for x in found].index('examine')
  assert len(found) - 1 - asked >= Rules().window
  # As much noise as is no improvement hides none.
  quiet = curve[-1] + 0.05 * (curve - curve[-1])
  assert 'noise' not in rules_of(verdicts(quiet, ASKING))


def test_a_budget_of_plateaus_is_spent():
  """Stairs: each plateau ends by itself, the second is one too many."""
  stairs = [np.full(n, 3.0 * 0.8**i) for i, n in enumerate((12, 12, 14, 18))]
  rules = Rules(budget=1, flat=0.9, drops=9)
  found = verdicts(np.concatenate([falling(10, to=3.1), *stairs]), rules)
  assert found[-1].rule == 'budget'
  more = verdicts(
    np.concatenate([falling(10, to=3.1), *stairs]), rules._replace(budget=9)
  )
  assert 'budget' not in rules_of(more)


@pytest.mark.parametrize('value', [None, float('inf')])
def test_what_is_not_finite_stops(value):
  lines = history(falling(3))
  lines.append({'step': 999, 'validation/loss': value})
  assert plateau.judge(lines).rule == 'diverged'


def test_swings_stop():
  curve = np.where(np.arange(12) % 2, 2.0, 3.0)
  assert verdicts(curve)[-1].rule == 'oscillation'


def test_the_verdict_is_a_function_of_the_history():
  curve = then_flat(falling(20), 60)
  lines = history(curve)
  first = [plateau.judge(lines[:n]) for n in range(len(lines))]
  again = [plateau.judge(lines[:n]) for n in reversed(range(len(lines)))]
  assert first == again[::-1]
  assert first[0] == plateau.Verdict('continue', 'early', 'no values')
  # Lines without the metric, and other metrics, change nothing.
  noisy = [x | {'time/x': 1.0} for x in lines] + [{'step': 10**6, 'other': 1.0}]
  assert plateau.judge(noisy) == plateau.judge(lines)


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    (Rules(short=0.3), 'short <= long'),
    (Rules(cut=1.0), r'cut must lie in \(0, 1\), got 1.0'),
    (Rules(window=2), 'window must be > 2'),
    (Rules(drops=0), 'drops > 0'),
  ],
)
def test_rules_that_contradict_each_other(rules, message):
  with pytest.raises(UserError, match=message):
    plateau.judge([], rules)
