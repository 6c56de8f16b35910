"""What `config.early_stopping` says at the last line of a history.

A pure function of the lines of metrics.jsonl, so that a run which was
interrupted stops and cuts where it would have done.
"""

from typing import Any, NamedTuple

from recursive_weights.interfaces import UserError
from recursive_weights.training import metrics, plateau
from recursive_weights.training.plateau import Rules, Verdict


class Limits(NamedTuple):
  """Stop rules on measures of `evaluators.state_gates`, each (least, most).

  A rule NAME reads every `gates/NAME/COMPONENT` of the latest line that has
  it; one that is not finite stops the run, and so does one outside where an
  earlier line was inside, or after `least` evaluations: weights may begin
  outside, as RWKV-6 does, whose decays are alike for all texts at first.

  selection: spread of the decays over texts; 0 where nothing is selected.
  collapsed: share of a layer's heads with a decay of 0 or 1, in the worst
    layer; a quarter is too many, since one alone may be as it should be.
  update: change of a state in a token; 0 where it is not updated.
  gradient_share: of a component; 0 where nothing trains it.
  activation: spread over tokens of what a component puts out; 0 where that is
    constant.

  Source: GroundThink, entry 2.6.
  """

  selection: tuple[float, float] = (1e-6, 1e9)
  collapsed: tuple[float, float] = (0.0, 0.24)
  update: tuple[float, float] = (1e-6, 1e9)
  gradient_share: tuple[float, float] = (1e-4, 1e9)
  activation: tuple[float, float] = (1e-3, 1e9)


# Which metrics `plateau.judge` reads.
CURVES = {'train': 'train/loss', 'validation': 'validation/loss', 'probe': ''}


def defaults() -> dict[str, Any]:
  """All fields of `early_stopping.rules` at their defaults."""
  return Rules()._asdict() | Limits()._asdict() | CURVES


def judge(
  history: list[dict],
  *,
  metric: str,
  mode: str,
  patience: int,
  rules: dict[str, Any],
  target: float = 0.0,
) -> Verdict:
  """The verdict at the last line: the metric, then limits, then plateaus.

  Args:
    history: lines of metrics.jsonl.
    metric, mode, patience, target: see `metrics.should_stop`.
    rules: fields of `plateau.Rules`, `Limits` and `CURVES` that differ from
      their defaults; {} for no rules.

  Raises:
    UserError: a field is unknown, or rules contradict each other.
  """
  reason = metrics.should_stop(
    history, metric=metric, mode=mode, patience=patience, target=target
  )
  if reason:
    return Verdict('stop', 'metric', reason)
  if not rules:
    return Verdict('continue', 'none', 'there are no rules')
  shape, limits, curves = parse(rules)
  verdict = _outside(history, limits, shape.least)
  return verdict or plateau.judge(history, shape, **curves)


def parse(rules: dict[str, Any]) -> tuple[Rules, Limits, dict[str, str]]:
  """The rules, limits and curves of `early_stopping.rules`.

  Raises:
    UserError: a field is unknown, or a limit is no pair that rises.
  """
  unknown = sorted(set(rules) - set(defaults()))
  if unknown:
    raise UserError(
      f'early_stopping.rules has no field {", ".join(unknown)}; it has: '
      f'{", ".join(defaults())}'
    )

  def of(names):
    return {name: rules[name] for name in names if name in rules}

  limits = of(Limits._fields)
  for name, pair in limits.items():
    if (
      not isinstance(pair, tuple | list)
      or len(pair) != 2
      or (pair[0] > pair[1])
    ):
      raise UserError(
        f'early_stopping.rules.{name} must be (least, most), got {pair}'
      )
  shape = Rules(**of(Rules._fields))
  plateau.check(shape)
  return shape, Limits(**limits), CURVES | of(CURVES)


def _outside(history, limits, evaluations):
  """The verdict of the first limit that is not kept, None for none."""
  for rule, limit in limits._asdict().items():
    found = [_measures(line, f'gates/{rule}/') for line in history]
    wrong = [_beyond(measures, *limit) for measures in found if measures]
    if not wrong or not wrong[-1]:
      continue
    name, value = wrong[-1]
    was_inside = not all(wrong)
    if value is None or was_inside or len(wrong) >= evaluations:
      shown = 'not finite' if value is None else f'{value:.3g}'
      reason = f'{name} is {shown}, outside [{limit[0]:g}, {limit[1]:g}]'
      return Verdict('stop', rule, reason)
  return None


def _measures(line, prefix):
  return {
    name: value
    for name, value in line.items()
    if name.startswith(prefix) and not name.endswith('/std')
  }


def _beyond(measures, least, most):
  """The first that is not finite, else the first outside, () for none."""
  wrong = [
    (name, value)
    for name, value in measures.items()
    if value is None or not least <= value <= most
  ]
  return min(wrong, key=lambda item: item[1] is not None, default=())
