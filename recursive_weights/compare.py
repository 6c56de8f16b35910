r"""Trains variants of one config and compares them in one table.

  python -m recursive_weights.compare --config=configs/ctm_digits.py \
      --variants='independent;shared;spectral_residual' --num_seeds=3 \
      --workdir=runs/compare [--config.field=value ...]

The first variant is the baseline. Seeds of a variant train in one program.
Every variant has its folder in the workdir; finished ones are not trained
again. Writes `table.md`, `table.json` and `plots/curves.png`.
"""

import json
import logging
import math
import pathlib

import jax
import numpy as np
from absl import flags

from recursive_weights import command
from recursive_weights.io import json_files

_log = logging.getLogger('recursive_weights.compare')  # even as __main__


def main(overrides):
  from recursive_weights import interfaces

  given = flags.FLAGS
  for name in ('config', 'variants', 'workdir'):
    if not given[name].value:
      raise interfaces.UserError(f'give --{name}')
  folder = pathlib.Path(given.workdir)
  overrides = [*overrides, f'--config.num_seeds={given.num_seeds}']
  variants = [v.strip() for v in given.variants.split(';') if v.strip()]
  if not variants:
    raise interfaces.UserError(
      "--variants must be one or more, joined by ';', the baseline first, got "
      f'{given.variants!r}'
    )
  # All are built first, so that a mistake in the last one costs no training.
  experiments = {v: read(given.config, v, overrides) for v in variants}
  rows = []
  for name, experiment in experiments.items():
    _log.info('%s', name)
    workdir = folder / name.replace(',', '-')
    rows.append(measure(name, experiment, workdir))
  for row in rows:
    row |= against(row, rows[0])
  json_files.write(folder / 'table.json', rows)
  text = table(rows)
  (folder / 'table.md').write_text(text)
  picture(variants, folder)
  print(text)
  print(json.dumps({r['variant']: r['final_loss'] for r in rows}))


def read(path: str, variant: str, overrides: list[str]):
  """The experiment of a variant."""
  from recursive_weights import build, config

  fields = command.override(
    command.read_config_file(f'{path}:{variant}'), overrides
  )
  return build.build(brief(config.to_data(fields)))


def brief(data: dict) -> dict:
  """The config with no final evaluator but accuracy and perplexity.

  The table shows no more, and pictures and sweeps of every variant would take
  longer than training it.
  """
  evaluators, shown = data['evaluators'], ('accuracy', 'perplexity')
  after = {k: v for k, v in evaluators['after'].items() if k in shown}
  return data | {'evaluators': evaluators | {'after': after}}


def measure(name: str, experiment, workdir: pathlib.Path) -> dict:
  """Trains an experiment, unless it is finished, and measures it."""
  from recursive_weights import build, interfaces
  from recursive_weights.evaluators import compression
  from recursive_weights.training import loop, metrics

  data = experiment.config
  loop.check_workdir(workdir, data)
  # Maybe on another machine, so that there is no checkpoint here.
  if not finished(workdir) or steps_of(workdir) != data['training']['steps']:
    loop.run(experiment, str(workdir))
  if not finished(workdir):
    raise interfaces.UserError(
      f'{name} was interrupted; the same command goes on from there'
    )
  # Without evaluators there are none of a finished run either.
  results = json_files.read(workdir / 'results.json')
  results = {k: math.nan if v is None else v for k, v in results.items()}
  del results['step']
  history = metrics.read(workdir / 'metrics.jsonl')
  steps_N = np.array([x['step'] for x in history if 'train/loss' in x])
  curve_EN = compression.curves(history, 'train/loss')
  task = experiment.tasks[0]
  model = build.build_model(data, task)
  size = data['training']['batch_size']
  params = model.init(jax.random.key(0), build.example(task, size))
  batch = task.batch('train', 0, size)
  inputs = jax.tree.map(jax.numpy.asarray, batch['inputs'])
  return {
    'variant': name,
    'parameters': compression.parameters(params),
    'final_loss': mean_std(compression.final(curve_EN)),
    'steps_to_90': mean_std(compression.steps_to(steps_N, curve_EN)),
    'latency_ms': compression.latency(model, params, inputs),
    'results': {k: v for k, v in results.items() if '@' not in k},
    'final_loss_by_seed': compression.final(curve_EN).tolist(),
  }


def finished(workdir: pathlib.Path) -> bool:
  """Whether a run came to its end: its results are those of its last step."""
  from recursive_weights.training import metrics

  path = workdir / 'results.json'
  if not path.exists():
    return False
  history = metrics.read(workdir / 'metrics.jsonl')
  # Results stay while a longer run goes on from them.
  return bool(history) and history[-1]['step'] == json_files.read(path)['step']


def steps_of(workdir: pathlib.Path) -> int:
  """How many steps a run was to take, by its stored config."""
  from recursive_weights.training import checkpoints

  return checkpoints.read_config(workdir)['training']['steps']


def mean_std(values) -> tuple[float, float]:
  """Mean and sample standard deviation (0 for one value)."""
  spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return float(np.mean(values)), spread


def against(row: dict, baseline: dict) -> dict:
  """A row's measures relative to the baseline's, in per cent.

  The loss gap is paired by seed: members share their seed's data order.
  """
  ours = np.array(row['final_loss_by_seed'])
  theirs = np.array(baseline['final_loss_by_seed'])

  def percent(name, value):
    return 100 * (value(row[name]) / value(baseline[name]) - 1)

  return {
    'parameters_%': percent('parameters', float),
    'loss_gap_%': mean_std(100 * (ours / theirs - 1)),
    'steps_to_90_%': percent('steps_to_90', lambda x: x[0]),
    'latency_%': percent('latency_ms', float),
  }


def table(rows: list[dict]) -> str:
  """The comparison as a Markdown table."""
  splits = [
    name
    for name in rows[0]['results']
    if f'{name}/std' in rows[0]['results'] and name.startswith('test/')
  ] or [n for n in rows[0]['results'] if n.startswith('test/')]
  head = ['variant', 'parameters', 'vs first']
  head += ['final train loss', 'loss gap', 'steps to 90 %', 'forward ms']
  head += splits
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for row in rows:
    results = row['results']
    cells = [
      row['variant'],
      f'{row["parameters"]:,}',
      f'{row["parameters_%"]:+.1f} %',
      '{:.4f} ± {:.4f}'.format(*row['final_loss']),
      '{:+.0f} ± {:.0f} %'.format(*row['loss_gap_%']),
      '{:.0f} ± {:.0f}'.format(*row['steps_to_90']),
      f'{row["latency_ms"]:.2f} ({row["latency_%"]:+.0f} %)',
    ]
    for name in splits:
      spread = results.get(f'{name}/std')
      cells.append(
        f'{results[name]:.4f}' + ('' if spread is None else f' ± {spread:.4f}')
      )
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def picture(variants: list[str], folder: pathlib.Path) -> None:
  """Training curves of all variants, where matplotlib is installed."""
  from recursive_weights.interfaces import UserError
  from recursive_weights.plots import curves

  runs = {v: [folder / v.replace(',', '-') / 'metrics.jsonl'] for v in variants}
  path = folder / 'plots' / 'curves.png'
  path.parent.mkdir(exist_ok=True)
  try:
    curves.curves(path, runs, metrics=('train/loss',), log=('train/loss',))
  except UserError as error:
    _log.info('no picture: %s', error)


if __name__ == '__main__':
  # Here, because `transfer` imports this module and has flags of these names.
  flags.DEFINE_string('config', None, 'configs/NAME.py')
  flags.DEFINE_string(
    'variants', None, "variants, the baseline first: 'independent;power,rank4'"
  )
  flags.DEFINE_integer('num_seeds', 3, 'seeds of each variant', lower_bound=1)
  flags.DEFINE_string('workdir', None, 'folder of all runs')
  command.run(main, __doc__)
