"""When to stop, when to lower the learning rate, and why: rules by name.

`judge` is a pure function of a metric history. Every threshold is a field of
`Rules`, and every verdict names the rule that spoke. Training calls it through
`training.stopping`.

Source: GroundThink, entries 1 and 2 on training dynamics, where improvement is
judged by the envelope of minima, since recurrent models have saw-tooth curves.
"""

import math
from typing import NamedTuple

import numpy as np

from recursive_weights.interfaces import UserError


class Rules(NamedTuple):
  """Thresholds. Lengths of time are shares of the steps done so far.

  tolerance: a minimum is an improvement if it is lower by this share.
  patience: a plateau begins to count after so many typical (median) intervals
    between improvements without one (3 to 5).
  short: up to this share nothing is a plateau.
  long: from this share on half of that patience is enough.
  flat: without slope for this share, since the last improvement or cut, a run
    has converged.
  wobble: values within this share of their mean are given `extra` time before a
    plateau counts; a fall by more than it over the plateau is slow descent.
  extra: time to train on after a cut.
  overfit: validation this share above its best (.05 to .10), while the training
    loss falls; before `least` evaluations, whatever the training loss does.
  probe_drop: a probe (higher is better) this share below its best, while the
    training loss falls.
  oscillation: differences of the validation loss that swing to and fro by more.
  window: evaluations over which slopes, spread and swings are looked at.
  cut: factor on the learning rate at a plateau, 30 to 50 % less.
  drops: cuts without a gain after which to stop.
  budget: plateaus to train through; 0 asks a person at each one (`examine`),
    the policy for small models, where a plateau is worth understanding. Nothing
    is cut then, so `cut`, `drops` and the wait of `extra` after a cut say
    nothing.
  least: evaluations before which only `diverged`, `oscillation` and
    `divergence` speak.
  """

  tolerance: float = 0.002
  patience: float = 4.0
  short: float = 0.1
  long: float = 0.2
  flat: float = 0.3
  wobble: float = 0.005
  extra: float = 0.1
  overfit: float = 0.05
  probe_drop: float = 0.1
  oscillation: float = 0.5
  window: int = 5
  cut: float = 0.6
  drops: int = 2
  budget: int = 3
  least: int = 6


class Verdict(NamedTuple):
  """action: 'continue', 'cut', 'examine' or 'stop'; rule: its name; reason."""

  action: str
  rule: str
  reason: str


class _Past(NamedTuple):
  """What of earlier verdicts counts. improved: the steps of improvements."""

  best: float = math.inf
  improved: tuple[float, ...] = ()
  cuts: tuple[float, ...] = ()  # steps, in this plateau
  plateaus: int = 0
  begun: float | None = None  # the step from which this plateau counts


def judge(
  history: list[dict],
  rules: Rules = Rules(),  # noqa: B008 (a NamedTuple of numbers)
  *,
  train: str = 'train/loss',
  validation: str = 'validation/loss',
  probe: str = '',
) -> Verdict:
  """The verdict at the last line of a history.

  In this order: `diverged` (not finite), `oscillation`, `divergence` (early),
  `early`, `overfit`, `probe` stop or let go on; then `improving` and `short`
  continue. On a plateau `slow` (still falling) continues, `flat` stops,
  `heartbeat` (new minima, lower by a tenth of the tolerance or more) continues,
  `budget` stops. Without a budget `noise` stops and `examine` asks; with one
  `extra` waits after a cut, `drops` and `noise` stop and `cut` lowers the
  learning rate. `noise`: a window after the latest cut, or without a budget
  after the plateau began to count, two standard errors of what has been gained
  exceed both the gain and the tolerance (GroundThink: the variance exceeds the
  mean gain, which are of two units).

  Args:
    history: lines of metrics.jsonl; those without `validation` only tell of the
      other two. None stands for what was not finite.
    train, validation: names of positive losses, lower is better.
    probe: a metric of which higher is better, '' for none. Values that were not
      finite are left out.

  Raises:
    UserError: the rules contradict each other.
  """
  verdicts = _replay(history, rules, train, validation, probe)
  return verdicts[-1] if verdicts else Verdict('continue', 'early', 'no values')


def _replay(history, rules, train, validation, probe):
  """The verdict at every evaluation, each given the ones before it."""
  check(rules)
  curves = [
    _curve(history, train),
    _curve(history, validation),
    _finite(*_curve(history, probe)),
  ]
  past, verdicts = _Past(), []
  for step in curves[1][0]:
    seen = []
    for steps, values in curves:
      count = int(np.searchsorted(steps, step, 'right'))
      seen.append((steps[:count], values[:count]))
    verdict, past = _verdict(*seen, past, rules)
    verdicts.append(verdict)
  return verdicts


def _verdict(train, validation, probe, past, rules):
  steps, values = validation
  step, value = steps[-1], values[-1]
  if not math.isfinite(value):
    return Verdict('stop', 'diverged', f'validation is {value}'), past
  swings = np.diff(values[-rules.window :])
  if (
    len(swings) == rules.window - 1
    and (np.abs(swings) > rules.oscillation).all()
    and (swings[1:] * swings[:-1] < 0).all()
  ):
    least = np.abs(swings).min()
    return _stop('oscillation', f'validation swings by {least:.3g}'), past
  if value < past.best * (1 - rules.tolerance):
    past = _Past(value, (*past.improved, step), (), past.plateaus)
  # The envelope of minima: one high tooth of a saw is no trend.
  above = values[-(rules.window // 2 + 1) :].min() / past.best - 1
  if len(values) < rules.least:
    if above > rules.overfit:
      reason = f'validation is {above:.1%} above its best this early'
      return _stop('divergence', reason), past
    reason = f'{len(values)} of {rules.least} evaluations'
    return Verdict('continue', 'early', reason), past

  after = train[0] >= min(past.improved[-1], steps[-rules.window :][0])
  falls = _slope(train[0][after], train[1][after]) < 0
  if falls and above > rules.overfit:
    reason = f'validation is {above:.1%} above its best, training falls'
    return _stop('overfit', reason), past
  if len(probe[1]) >= rules.least:
    below = 1 - probe[1][-(rules.window // 2 + 1) :].max() / probe[1].max()
    if falls and below > rules.probe_drop:
      reason = f'the probe is {below:.1%} below its best, training falls'
      return _stop('probe', reason), past
  since = step - past.improved[-1]
  if not since:
    return Verdict('continue', 'improving', f'best is {past.best:.4g}'), past
  if not _is_plateau(step, since, values, past, rules):
    reason = f'{since / step:.1%} of the run without improvement'
    return Verdict('continue', 'short', reason), past
  return _on_plateau(steps, values, since, past, rules)


def _is_plateau(step, since, values, past, rules):
  share = since / step
  wobbles = np.ptp(values[-rules.window :]) <= (
    2 * rules.wobble * values[-rules.window :].mean()
  )
  if share <= rules.short + (rules.extra if wobbles else 0.0):
    return False
  intervals = np.diff(past.improved)
  if not len(intervals):
    return share > rules.long
  typical = np.median(intervals)
  waits = rules.patience * typical
  return since > waits or (share > rules.long and since > waits / 2)


def _on_plateau(steps, values, since, past, rules):
  step = steps[-1]
  # Without the point that began it, whose lowness would tilt the line.
  on = steps > past.improved[-1]
  later = values[on]
  falls = -_slope(steps[on], later) * since / later.mean()
  if falls > rules.wobble:
    return Verdict('continue', 'slow', f'falls by {falls:.2%}'), past
  if past.begun is None:
    past = past._replace(begun=step, plateaus=past.plateaus + 1)
  quiet = step - max(past.improved[-1], *past.cuts, 0)
  if quiet / step > rules.flat:
    return _stop('flat', f'{quiet / step:.1%} of the run without slope'), past
  half = len(later) // 2
  dip = past.best * (1 - rules.tolerance / 10)
  if half and later[half:].min() < min(later[:half].min(), dip):
    return Verdict('continue', 'heartbeat', 'there are new, lower dips'), past
  if 0 < rules.budget < past.plateaus:
    return _stop('budget', f'plateau {past.plateaus}'), past
  if not rules.budget:
    # A window after the plateau began to count, as after a cut: so a slow
    # descent under noise has the time to show itself.
    reason = _noise(later, steps[on] > past.begun, past.best, rules)
    if reason:
      return _stop('noise', reason), past
    reason = f'plateau {past.plateaus}, {since / step:.1%} of the run'
    return Verdict('examine', 'examine', reason), past
  if past.cuts and step - past.cuts[-1] <= rules.extra * step:
    return Verdict('continue', 'extra', 'the learning rate was cut'), past
  if len(past.cuts) >= rules.drops:
    return _stop('drops', f'{len(past.cuts)} cuts without a gain'), past
  if past.cuts:
    reason = _noise(later, steps[on] > past.cuts[-1], past.best, rules)
    if reason:
      return _stop('noise', reason), past
  past = past._replace(cuts=(*past.cuts, step))
  return Verdict('cut', 'cut', f'learning rate times {rules.cut}'), past


def _noise(values, after, best, rules):
  """Why no gain `after` a moment could be seen, '' where one could be.

  The gain is what the mean over a window fell by, its noise two standard errors
  of that. Noise below what counts as an improvement hides none.
  """
  if after.sum() < rules.window:
    return ''
  old, new = (values[x][-rules.window :] for x in (~after, after))
  gain = old.mean() - new.mean()
  noise = 2 * math.sqrt(old.var() / len(old) + new.var() / len(new))
  if noise <= max(gain, rules.tolerance * best):
    return ''
  return f'{rules.window} evaluations gained {gain:.2g} +- {noise:.2g}'


def _stop(rule, reason):
  return Verdict('stop', rule, reason)


def _curve(history, name):
  """Steps and values of a metric; what was not finite is infinite."""
  pairs = [(line['step'], line[name]) for line in history if name in line]
  steps = np.array([step for step, _ in pairs], float)
  values = [math.inf if value is None else value for _, value in pairs]
  return steps, np.array(values, float)


def _finite(steps, values):
  # Beside one infinite value no share of the best means anything.
  kept = np.isfinite(values)
  return steps[kept], values[kept]


def _slope(steps, values):
  """Of the least-squares line; 0 for fewer than two values."""
  if len(values) < 2 or not np.isfinite(values).all():
    return 0.0
  x = steps - steps.mean()
  return float((x * (values - values.mean())).sum() / (x * x).sum())


def check(rules: Rules) -> None:
  """Refuses rules that contradict each other.

  Raises:
    UserError: names the values.
  """
  if not 0 <= rules.short <= rules.long <= rules.flat <= 1:
    raise UserError(
      'plateau rules must have 0 <= short <= long <= flat <= 1, got '
      f'{rules.short}, {rules.long} and {rules.flat}'
    )
  if not 0 < rules.cut < 1:
    raise UserError(f'cut must lie in (0, 1), got {rules.cut}')
  if rules.window < 3 or rules.least < 2:
    raise UserError(
      f'window must be > 2 and least > 1, got {rules.window} and {rules.least}'
    )
  if rules.budget < 0 or rules.drops < 1:
    raise UserError(
      f'budget must be >= 0 and drops > 0, got {rules.budget} and {rules.drops}'
    )
