"""From measures to verdicts: two-sided bounds, gates, a table.

Verdicts are 0 PASS, 1 WARN, 2 FAIL. A measure has a value at one or more
places (a component, or a layer of one), and the worst of them counts.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from recursive_weights.interfaces import UserError
from recursive_weights.io import json_files

MEASURED = pathlib.Path(__file__).parents[1] / (
  'benchmarks/results/hybrid_gates.json'
)
VERDICTS = ('PASS', 'WARN', 'FAIL')
# No bound on this side.
LOW, HIGH = -1e30, 1e30

# By measure (fail below, warn below, warn above, fail above). Set on three
# trained hybrids (heads of 16, 400 steps) and broken ones of them: between the
# two where a measure tells them apart, else around the healthy ones
# (`benchmarks/results/hybrid_gates.json`, with those of other sizes).
BOUNDS: dict[str, tuple[float, float, float, float]] = {
  'round_trip': (1.0, 1.0, HIGH, HIGH),
  'boundary': (1.0, 1.0, HIGH, HIGH),
  'kernels': (1.0, 1.0, HIGH, HIGH),
  'finite': (1.0, 1.0, HIGH, HIGH),
  'initial_entropy': (0.5, 0.9, HIGH, HIGH),
  'initial_evenness': (0.01, 0.05, HIGH, HIGH),
  'fall': (0.0, 0.1, HIGH, HIGH),
  'gradient_norm': (1e-3, 0.1, 3.0, 20.0),
  'growth': (-0.5, -0.3, 0.7, 0.75),
  'evenness': (0.01, 0.02, 0.45, 0.7),
  'structure': (1.0, 1.5, HIGH, HIGH),
  'top1': (LOW, LOW, 0.82, 0.93),
  'saturation': (LOW, LOW, 0.02, 0.035),
  'update': (1e-5, 5e-3, 0.7, 1.2),
  'half_life': (1.0, 2.0, 1e4, 1e5),
  # One head of many may well be of no use, or there for the last token alone.
  # A quarter of a layer's is no accident: no healthy model of width 48 had any.
  'collapsed': (LOW, LOW, 0.0, 0.24),
  'selection': (1e-6, 1e-3, HIGH, HIGH),
  'contribution': (1e-3, 0.01, HIGH, HIGH),
  'gradient_share': (0.03, 0.1, HIGH, HIGH),
  'phase_shift': (1e-3, 0.01, 5.0, 50.0),
  'spread': (0.1, 0.3, HIGH, HIGH),
  'activation': (0.01, 0.05, HIGH, HIGH),
  'variance_ratio': (0.01, 0.1, 10.0, 100.0),
  'measured': (1.0, 1.0, HIGH, HIGH),
  'top': (LOW, LOW, 0.9, 0.95),
  'distinct': (0.1, 0.3, HIGH, HIGH),
  'over_bigram': (LOW, LOW, 0.0, HIGH),
  'over_unigram': (LOW, LOW, 0.0, 0.0),
}

GATES = {
  'G0': ('round_trip', 'boundary', 'kernels'),
  'G1': ('finite',),
  'G2': ('initial_entropy', 'initial_evenness'),
  'G3': ('fall', 'gradient_norm'),
  'G3.5': (
    *('growth', 'evenness', 'structure', 'top1', 'saturation', 'update'),
    *('half_life', 'collapsed', 'selection'),
  ),
  'G3.6': (
    *('contribution', 'gradient_share', 'phase_shift'),
    *('spread', 'activation', 'variance_ratio'),
  ),
  'G4': ('measured', 'top', 'distinct'),
  'G5': ('over_bigram', 'over_unigram'),
}


def bounds(changed: Mapping[str, Any]) -> dict[str, tuple]:
  """`BOUNDS` with some of them changed.

  Raises:
    UserError: an unknown measure, or bounds that do not rise.
  """
  unknown = sorted(set(changed) - set(BOUNDS))
  if unknown:
    raise UserError(
      f'bounds has no measure {", ".join(unknown)}; there are: '
      f'{", ".join(BOUNDS)}'
    )
  for name, four in changed.items():
    if len(four) != 4 or list(four) != sorted(four):
      raise UserError(
        f'bounds.{name} must be four numbers that rise (fail below, warn below,'
        f' warn above, fail above), got {four}'
      )
  return BOUNDS | dict(changed)


def healthy() -> dict[str, dict[str, tuple[float, float]]]:
  """What trained models had that passed: least and greatest.

  By measure and component, '' for all components together; of the measures that
  `MEASURED` has.
  """
  found: dict[str, dict[str, tuple[float, float]]] = {}
  for run in json_files.read(MEASURED)['runs']:
    if run['defect']:
      continue
    for measure, by_component in run['measures'].items():
      places = found.setdefault(measure, {})
      for component, values in by_component.items():
        if not isinstance(values, list):  # of the model or of all layers
          values = [values]
        for place in {component, ''}:
          least, most = places.get(place, (math.inf, -math.inf))
          places[place] = min(least, *values), max(most, *values)
  return found


def judge_value(value: float, four: tuple) -> int:
  """0, 1 or 2 of one value; 2 where it is not finite."""
  fail_below, warn_below, warn_above, fail_above = four
  if not math.isfinite(value) or value < fail_below or value > fail_above:
    return 2
  return int(value < warn_below or value > warn_above)


def judge(
  values: dict[str, dict[str, float]], limits: Mapping[str, tuple]
) -> dict[str, dict[str, Any]]:
  """`{gate: {'verdict', 'reasons'}}`, of the gates whose measures there are.

  Args:
    values: by measure and place.
    limits: from `bounds`.
  """
  found = {}
  for gate, names in GATES.items():
    reasons, worst, known = [], 0, False
    for name in names:
      for place, value in values.get(name, {}).items():
        known = True
        verdict = judge_value(value, limits[name])
        worst = max(worst, verdict)
        if verdict:
          reasons.append(
            f'{VERDICTS[verdict]} {name} {place} = {value:.4g}, '
            f'wanted {_range(limits[name])}'
          )
    if known:
      found[gate] = {'verdict': VERDICTS[worst], 'reasons': reasons}
  return found


def table(
  verdicts: dict[str, dict],
  values: dict[str, dict[str, float]],
  controls: dict[str, dict[str, dict[str, float]]],
  trained: dict[str, dict[str, tuple[float, float]]],
) -> str:
  """Gates with their reasons, then every measure beside its controls.

  Args:
    verdicts: from `judge`.
    values: by measure and place.
    controls: the same of other models, by name.
    trained: from `healthy`; a component that it lacks stands beside all.
  """
  rows = [f'{"gate":<6}{"verdict":<9}']
  for gate, found in verdicts.items():
    rows.append(f'{gate:<6}{found["verdict"]:<9}' + '; '.join(found['reasons']))
  names = list(controls)
  rows += ['', f'{"measure":<42}{"model":>11}']
  rows[-1] += ''.join(f'{name:>11}' for name in names) + f'{"healthy":>20}'
  for measure, places in values.items():
    for place, value in places.items():
      row = f'{measure + " " + place:<42}{value:>11.4g}'
      for name in names:
        other = controls[name].get(measure, {}).get(place)
        row += f'{"" if other is None else f"{other:.4g}":>11}'
      if measure in trained:
        ranges = trained[measure]
        least, most = ranges.get(place.split('@')[0], ranges[''])
        row += f'{f"{least:.3g} to {most:.3g}":>20}'
      rows.append(row.rstrip())
  return '\n'.join(rows)


def _range(four):
  _, warn_below, warn_above, _ = four
  below = '' if warn_below == LOW else f'>= {warn_below:g}'
  above = '' if warn_above == HIGH else f'<= {warn_above:g}'
  return ' and '.join(x for x in (below, above) if x) or 'less'
