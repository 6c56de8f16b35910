r"""Trains a tier of a validation matrix, compares its members, and decides.

  python -m recursive_weights.matrix --config=configs/hybrid_matrix.py \
      --tier=1 --num_seeds=3 --workdir=runs/matrix \
      [--variant=small] [--path=TEXT] [--second_path=OTHER_TEXT] \
      [--learning_rates=5e-4,1e-3,2e-3 --screen_steps=3000] \
      [--config.field=value ...]

Tiers, members and questions are those of the config's module. Seeds of a member
train in one program; with `--learning_rates` each member first tries them with
one seed for `--screen_steps`, in one program too, and takes the one with the
best validation loss.
Every run has its folder in the workdir, and the same command goes on where it
stopped; members of earlier tiers are read, not trained again, and stand in the
table too. Writes `table.md` (with what each member wrote), `table.json` and
`plots/curves.png`.
"""

import json
import logging
import math
import pathlib
import re
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from recursive_weights import command
from recursive_weights.io import json_files

_log = logging.getLogger('recursive_weights.matrix')  # even as __main__

LOSS = 'validation/loss'
BASELINE = 'baseline'
RESTART = 'restart'  # the baseline in two halves, as those below
PURE = ('rwkv6', 'mamba2', 'attention')
# Of a component's gradient norm over the largest one's, by component.
SHARES = re.compile(r'gates/gradient_share/(?!.*/(?:std|seed\d+)$)')
GATES = re.compile(r'gates/(G[\d.]+)(?:/seed\d+)?')
FAIL = 2
SAMPLE = 200  # characters of what a member wrote that are shown


def main(overrides):
  from recursive_weights.interfaces import UserError
  from recursive_weights.training import loop

  given = flags.FLAGS
  for name in ('config', 'workdir'):
    if not given[name].value:
      raise UserError(f'give --{name}')
  module = command.read_module(given.config)
  parts = ('TIERS', 'MEMBERS', 'QUESTIONS', 'AFTER')
  if not all(hasattr(module, part) for part in parts):
    raise UserError(
      f'--config must be a matrix, with {", ".join(parts)}, got '
      f'{given.config!r}: give one such as configs/hybrid_matrix.py'
    )
  if given.tier not in module.TIERS:
    raise UserError(
      f'tier must be one of {", ".join(module.TIERS)}, got {given.tier!r}'
    )
  folder = pathlib.Path(given.workdir)
  members = module.TIERS[given.tier]
  if 0 in command.numbers('learning_rates', given.learning_rates):
    raise UserError('--learning_rates must be > 0, got one that is 0')
  # All are built first: a mistake in the last one costs no training.
  for member in members:
    build(module, member, overrides)
  for member in members:
    try:
      train(module, member, folder, overrides)
    except loop.Diverged as error:
      _log.warning('%s is left out: %s', member, error)
  rows = [
    measure(member, folder / member)
    for member in module.MEMBERS
    if (folder / member / 'results.json').exists()
  ]
  found = {row['member']: row for row in rows}
  decisions = [decide(found, *question) for question in module.QUESTIONS]
  decisions = [d for d in decisions if d]
  verdict = scale(found, decisions, module.QUESTIONS)
  text = '\n'.join(
    [
      *(table(found), answers(decisions), diagnosis(found), report(verdict)),
      *('', samples(found)),
    ]
  )
  (folder / 'table.md').write_text(text)
  whole = {'members': rows, 'decisions': decisions, 'scale': verdict}
  json_files.write(folder / 'table.json', whole)
  picture([row['member'] for row in rows], folder)
  print(text)
  print(json.dumps({row['member']: mean(row['best']) for row in rows}))


def build(module, member: str, overrides: list[str], workdir='', **fields):
  """The experiment of a member; `fields` are dotted names of its config."""
  from recursive_weights import build, config

  given = flags.FLAGS
  size = [given.variant] if given.variant else []
  path = given.second_path if member == 'second_text' else given.path
  data = module.get_config(','.join([member, *size]))
  data.num_seeds, data.task.path = given.num_seeds, path
  data = command.override(data, overrides)
  if member in module.AFTER or member in module.AFTER.values():
    data.training.steps //= 2  # of the two runs together
  data.update_from_flattened_dict(fields)
  return build.build(config.to_data(data), str(workdir))


def train(module, member: str, folder: pathlib.Path, overrides) -> None:
  """Trains a member, after the one whose weights it begins with."""
  fields: dict[str, Any] = {}
  if flags.FLAGS.learning_rates:
    fields['optimizer.learning_rate'] = best_rate(
      module, member, folder, overrides
    )
  first = module.AFTER.get(member)
  if first:
    run(module, first, folder / first, overrides, fields)
    fields['init_from'] = str(folder / first)
  run(module, member, folder / member, overrides, fields)


def best_rate(module, member: str, folder, overrides) -> float:
  """The learning rate with the lowest validation loss in one short run of all.

  They are members of one program with one seed. Where that diverges it is tried
  again without the largest rate.

  Raises:
    Diverged: with every rate.
  """
  from recursive_weights.training import loop

  given = flags.FLAGS
  steps = build(module, member, overrides).config['training']['steps']
  steps = min(given.screen_steps, steps)
  rates = sorted(command.numbers('learning_rates', given.learning_rates))
  for count in range(len(rates), 0, -1):
    some = rates[:count]
    names = '-'.join(f'{rate:g}' for rate in some)
    workdir = folder / 'screen' / f'{member}-{steps}-{names}'
    fields = {
      'num_seeds': count,
      'rate_factors': tuple(rate / some[0] for rate in some),
      'training.steps': steps,
      'optimizer.learning_rate': some[0],
      'evaluators.after': {},
    }
    try:
      run(module, member, workdir, overrides, fields)
    except loop.Diverged as error:
      _log.info('%s: %s', workdir, error)
      continue
    losses = measure(member, workdir)['best']
    break
  else:
    raise loop.Diverged(f'{member} diverged with every learning rate')
  chosen = some[int(np.argmin(losses))]
  found = zip(some, losses, strict=True)
  tried = ', '.join(f'{rate:g}: {loss:.4f}' for rate, loss in found)
  _log.info('%s takes learning rate %g of %s', member, chosen, tried)
  return chosen


def run(module, member: str, workdir: pathlib.Path, overrides, fields) -> None:
  """Trains a member to its end, from where it is."""
  from recursive_weights import compare
  from recursive_weights.interfaces import UserError
  from recursive_weights.training import loop

  _log.info('%s', workdir)
  experiment = build(module, member, overrides, workdir, **fields)
  loop.run(experiment, str(workdir))
  if not compare.finished(workdir):
    raise UserError(
      f'{workdir} was interrupted; the same command goes on from there'
    )


def measure(member: str, workdir: pathlib.Path) -> dict[str, Any]:
  """What a finished run came to, by seed where there are several.

  `best` and `last` are validation losses in training, `gates_failed` the gates
  that failed by step, `results` what the final evaluators found, `sample` the
  beginning of what it wrote, `tokens_per_second` of all seeds together the
  median.
  """
  from recursive_weights.evaluators import compression
  from recursive_weights.training import checkpoints, metrics

  data = checkpoints.read_config(workdir)
  history = metrics.read(workdir / 'metrics.jsonl')
  curve_EN = compression.curves(history, LOSS).astype(float)  # null is NaN
  curve_EN = np.where(np.isfinite(curve_EN), curve_EN, np.inf)
  steps = history[-1]['step']
  rates = [
    x['time/steps_per_second'] for x in history if 'time/steps_per_second' in x
  ]
  train, seeds = data['training'], data['num_seeds']
  results = json_files.read(workdir / 'results.json')
  written = workdir / 'samples.txt'
  judged = [x for x in history if any(map(GATES.fullmatch, x))]
  tokens = seeds * train['batch_size'] * data['task']['length']
  return {
    'member': member,
    'parameters': parameters(data),
    'learning_rate': data['optimizer']['learning_rate'],
    'steps': steps,
    'tokens': steps * tokens // seeds,
    'best': curve_EN.min(1).tolist(),
    'last': curve_EN[:, -1].tolist(),
    'tokens_per_second': float(np.median(rates)) * tokens,
    'data': data['data_hash'],
    'gates_failed': {x['step']: failed(x) for x in judged},
    'sample': written.read_text('utf-8')[:SAMPLE] if written.exists() else '',
    'results': results,
  }


def failed(values: dict[str, Any]) -> list[str]:
  """Gates that failed, of any seed."""
  return sorted(
    {
      found[1]
      for key, value in values.items()
      if value == FAIL and (found := GATES.fullmatch(key))
    }
  )


def parameters(data: dict[str, Any]) -> int:
  """Number of parameters that a run of this config stores, of one seed."""
  import jax

  from recursive_weights import build

  shapes = build.parameter_shapes(data | {'num_seeds': 1})
  return sum(x.size for x in jax.tree.leaves(shapes))


def mean(values) -> float:
  return float(np.mean(values))


def spread(values) -> float:
  """Sample standard deviation, 0 of one value."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def apart(ours: list[float], theirs: list[float]) -> tuple[float, float]:
  """Mean of `ours - theirs`, and what it must exceed to be more than chance.

  Pairs of seeds, as many as both have: Student's t, 95 %, two-sided. Infinite
  for a single seed, which tells nothing of its spread.
  """
  count = min(len(ours), len(theirs))
  difference_E = np.subtract(ours[:count], theirs[:count])
  found = float(difference_E.mean())
  if count < 2:
    return found, math.inf
  quantile = float(stats.t.ppf(0.975, count - 1))
  return found, quantile * spread(difference_E) / math.sqrt(count)


def comparable(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
  """Whether two runs had the same data and as many steps."""
  return all(ours[name] == theirs[name] for name in ('data', 'steps'))


def decide(
  found, question: str, member: str, keep: str, take: str, against=BASELINE
):
  """A line of the table of decisions; None where there is none to compare.

  Args:
    found: rows by member.
    question, member, keep, take, against: as in QUESTIONS of a config; the
      answer is `keep` where `against` is better, `take` where `member` is.
  """
  if against not in found or member not in found:
    return None
  if not comparable(found[against], found[member]):
    return None
  gain, least = apart(found[against]['best'], found[member]['best'])
  verdict = 'within the spread'
  if math.isinf(least):
    verdict = 'one seed tells no spread'
  elif abs(gain) > least:
    verdict = take if gain > 0 else keep
  return {
    'question': question,
    'member': member,
    'against': against,
    'gain': gain,
    'least': None if math.isinf(least) else least,
    'verdict': verdict,
  }


def diagnose(hybrid: list[float], first: list[float], second: list[float]):
  """What it means where the losses of a hybrid and its halves' models lie.

  Worse than both pure models: they hinder each other, so the training is at
  fault. Between them: the hybrid is no more than its better half, so its
  capacity or its block is. Better than both: they work together. By mean
  losses, where the difference from the next one is more than the spread.
  """
  low, high = sorted((first, second), key=mean)
  gain, least = apart(low, hybrid)
  if math.isinf(least):
    return 'not told apart from its halves: one seed tells no spread'
  if gain > least:
    return 'better than both halves: they work together'
  if gain >= 0 or -gain <= least:
    return 'as good as the better half, within the spread'
  gain, least = apart(high, hybrid)
  if gain < -least:
    return 'worse than both halves: a problem of training'
  return 'between its halves: a problem of capacity or architecture'


def scale(found, decisions, questions) -> dict[str, Any]:
  """Whether the baseline may be scaled: conditions, True, False or None.

  None is 'not known': not measured, or not told by one seed or by unequal runs.
  The verdict is 'scale' where all are True, 'do not scale' where one is False,
  else 'not known yet'.
  """
  conditions: dict[str, bool | None] = dict.fromkeys(
    (
      'beats every pure model by more than the spread',
      'validation does not rise again by 5 %',
      'gradients of the halves are within 3x',
      'what every feature is worth was measured',
    )
  )
  names = list(conditions)
  if BASELINE in found:
    row = found[BASELINE]
    pure = [found[name] for name in PURE if name in found]
    gaps = [apart(x['best'], row['best']) for x in pure if comparable(x, row)]
    # One seed tells no spread.
    if len(gaps) == len(PURE) and all(math.isfinite(x) for _, x in gaps):
      conditions[names[0]] = all(gain > least for gain, least in gaps)
    conditions[names[1]] = mean(row['last']) <= 1.05 * mean(row['best'])
    shares = [x for key, x in row['results'].items() if SHARES.match(key)]
    if shares:
      conditions[names[2]] = min(shares) >= 1 / 3
  # By question: a member may be compared with several others.
  known = {d['question'] for d in decisions if d['least'] is not None}
  if known >= {question for question, *_ in questions}:
    conditions[names[3]] = True
  values = conditions.values()
  verdict = 'scale' if all(values) else 'not known yet'
  if any(value is False for value in values):
    verdict = 'do not scale'
  return {'verdict': verdict, 'conditions': conditions}


def table(rows) -> str:
  """Members as a Markdown table.

  'gradients' is the least component's gradient norm over the largest one's;
  gates that failed stand by step, then those of the final evaluation.
  """
  head = ['member', 'parameters', 'rate', 'seeds', 'best validation']
  head += ['against the baseline', 'last validation', 'test perplexity']
  head += ['tokens/s', 'gradients', 'gates failed']
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for name, row in rows.items():
    best, gap = f'{mean(row["best"]):.4f}', ''
    if len(row['best']) > 1:  # one seed has no spread
      best += f' ± {spread(row["best"]):.4f}'
    against = rows.get(BASELINE)
    if against and name != BASELINE and comparable(against, row):
      difference, least = apart(row['best'], against['best'])
      gap = f'{difference:+.4f}'
      if math.isfinite(least):
        gap += f' (needs {least:.4f})'
    perplexity = row['results'].get('test/perplexity')
    shares = [x for key, x in row['results'].items() if SHARES.match(key)]
    gates = [
      f'{step}: {", ".join(names)}'
      for step, names in row['gates_failed'].items()
      if names
    ]
    gates += [f'end: {", ".join(failed(row["results"]))}']
    cells = [
      name,
      f'{row["parameters"]:,}',
      f'{row["learning_rate"]:g}',
      str(len(row['best'])),
      best,
      gap,
      f'{mean(row["last"]):.4f}',
      '' if perplexity is None else f'{perplexity:.3f}',
      f'{row["tokens_per_second"]:,.0f}',
      f'{min(shares):.2f}' if shares else '',
      '; '.join(gates).removesuffix('end: ').removesuffix('; '),
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def samples(rows) -> str:
  """What every member wrote, indented as Markdown shows it unchanged."""
  written = [
    f'{name}:\n\n' + '\n'.join(f'    {x}' for x in row['sample'].splitlines())
    for name, row in rows.items()
    if row['sample']
  ]
  return '\n\n'.join(written) + '\n' if written else ''


def answers(decisions) -> str:
  """The table of decisions; a gain is what a member's loss is lower by."""
  head = ['question', 'member', 'against', 'gain', 'needs', 'answer']
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for d in decisions:
    least = '' if d['least'] is None else f'{d["least"]:.4f}'
    lines.append(
      f'| {d["question"]} | {d["member"]} | {d["against"]} | '
      f'{d["gain"]:+.4f} | {least} | {d["verdict"]} |'
    )
  chance = 0.05 * sum(d['least'] is not None for d in decisions)
  lines += [
    '',
    f'By chance alone about {chance:.1f} of these would be decided.',
  ]
  return '\n'.join(lines) + '\n' if decisions else ''


def diagnosis(found) -> str:
  """What the hybrid and its halves tell of each other, as far as known."""
  lines = []

  def known(*names):
    """Whether all were trained, on the same data and as long."""
    rows = [found[name] for name in names if name in found]
    return len(rows) == len(names) and all(comparable(x, rows[0]) for x in rows)

  halves = (BASELINE, 'rwkv6', 'mamba2')
  if known(*halves):
    losses = [found[name]['best'] for name in halves]
    lines.append(f'The hybrid is {diagnose(*losses)}.')
  for name in ('time_first', 'ssm_first'):
    if known(RESTART, name):
      gain, least = apart(found[RESTART]['best'], found[name]['best'])
      what = 'no difference beyond the spread'
      if gain > least:
        what = 'halves hinder each other when they learn at once'
      if gain < -least:
        what = 'halves help each other from the start'
      if math.isinf(least):
        what = 'one seed tells no spread'
      lines.append(
        f'{name} against {RESTART}: {gain:+.4f} (needs {least:.4f}): {what}.'
      )
  return '\n'.join(lines) + '\n' if lines else ''


def report(verdict: dict[str, Any]) -> str:
  words = {True: 'yes', False: 'no', None: 'not known'}
  return '\n'.join(
    [
      f'To a larger size: {verdict["verdict"]}.',
      *(f'- {k}: {words[v]}' for k, v in verdict['conditions'].items()),
    ]
  )


def picture(members: list[str], folder: pathlib.Path) -> None:
  """Validation curves of all members, where matplotlib is installed."""
  from recursive_weights.interfaces import UserError
  from recursive_weights.plots import curves

  runs = {m: [folder / m / 'metrics.jsonl'] for m in members}
  path = folder / 'plots' / 'curves.png'
  path.parent.mkdir(exist_ok=True)
  try:
    curves.curves(path, runs, metrics=(LOSS,), log=(LOSS,))
  except UserError as error:
    _log.info('no picture: %s', error)


if __name__ == '__main__':
  flags.DEFINE_string('config', None, 'configs/NAME.py')
  flags.DEFINE_string('tier', '1', 'which members: a name of the TIERS')
  flags.DEFINE_string('variant', '', "a size, such as 'small'")
  flags.DEFINE_integer('num_seeds', 3, 'seeds of each member', lower_bound=1)
  flags.DEFINE_string('workdir', None, 'folder of all runs')
  flags.DEFINE_string('path', '', "a text; '': what Python ships")
  flags.DEFINE_string('second_path', '', 'the text of member second_text')
  flags.DEFINE_list('learning_rates', [], 'tried by each member; (): none')
  flags.DEFINE_integer('screen_steps', 3000, 'length of such a try')
  command.run(main, __doc__)
