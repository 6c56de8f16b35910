"""Sharing schemes of specialists side by side, and an eighth domain.

  python -m recursive_weights.benchmarks.specialists RUN ... [--domain BOOK]

prints one JSON line a finished run of configs/specialists_*.py: what it stores,
against eight models of its own member, and what it reaches on held-out text.
With --domain (a book beside those that the run was trained on) a member more is
trained on few rows of it, the rest frozen, and beside it all weights of the
centre; the rate and when to stop are chosen on validation rows. That needs
a centre that all members share: no independent ones, no copies (`apart`).
"""

import argparse
import json
import pathlib

import jax
import numpy as np
import optax

from recursive_weights import build, restore
from recursive_weights.derivation import report
from recursive_weights.evaluators import accuracy
from recursive_weights.interfaces import UserError
from recursive_weights.models import specialists
from recursive_weights.tasks import domains

RATES = (1e-3, 3e-3, 1e-2)
ADAM = optax.scale_by_adam()
CENTRE = {'scheme': 'centre', 'rules': {}, 'apart': False}


def scheme(config: dict) -> str:
  """The name of a run's scheme, by its first rule."""
  model = config['model']
  if not model['rules']:
    return model['scheme']
  rule = next(iter(model['rules'].values()))
  name = 'basis' if rule['basis'] else rule['operator']['name']
  federation = config['federation']
  if model['apart']:
    name += f' {federation["topology"]}' if federation['every'] else ' apart'
  return name


def check(workdir: pathlib.Path, domain: str) -> None:
  """Raises `UserError` where a run is not one that this can measure."""
  for name in ('config.json', 'results.json'):
    if not (workdir / name).is_file():
      raise UserError(
        f'{workdir} must be the folder of a finished run, but has no {name}: '
        'train it to the end'
      )
  config = json.loads((workdir / 'config.json').read_text())
  if config['model']['name'] != 'specialists':
    raise UserError(
      f'{workdir} must be a run of model specialists, got '
      f'{config["model"]["name"]!r}'
    )
  if config['num_seeds'] > 1:
    raise UserError(
      f'{workdir} must be of one seed, got num_seeds = {config["num_seeds"]}: '
      'train every seed in a run of its own'
    )
  apart = config['model']['apart']
  if domain and (apart or config['model']['scheme'] == 'independent'):
    raise UserError(
      f'{workdir} must have a centre that all members share for --domain, got '
      f'scheme {scheme(config)!r}: leave --domain out, or give another run'
    )
  trained = config['task']['domains'] or tuple(domains.FILES)
  files = {domains.FILES.get(name, name) for name in trained}
  if domains.FILES.get(domain, domain) in files:
    raise UserError(
      f'--domain must be a book beside those that {workdir} was trained on, '
      f'{", ".join(trained)}, got {domain!r}'
    )


def summary(workdir: pathlib.Path) -> dict:
  """What a finished run stores and reaches."""
  config = json.loads((workdir / 'config.json').read_text())
  results = json.loads((workdir / 'results.json').read_text())
  one = build.parameter_shapes(
    config | {'model': config['model'] | CENTRE, 'num_seeds': 1}
  )
  alone = report.count(one)
  kept = {
    name: round(value, 4)
    for name, value in results.items()
    if name.startswith(('test/', 'router/')) and name.count('/') == 1
  }
  return {
    'config': config['model']['member']['name'],
    'scheme': scheme(config),
    'seed': config['seed'],
    'steps': results['step'],
    'data': config['data_hash']['test'][:12],
    'parameters': int(results['parameters']),
    'saved_of_eight': round(1 - results['parameters'] / (8 * alone), 4),
    **kept,
  }


def transfer(
  workdir: pathlib.Path, domain: str, samples: list[int], steps: int
):
  """Lines for an eighth domain, by how many training rows of it there are."""
  config, load = restore.workdir(workdir)
  params = load(build.parameter_shapes(config), config['raw'])
  task = build.build_task(
    config | {'task': config['task'] | {'domains': (domain,)}}, config['seed']
  )
  model = build.build_model(config, build.build_task(config, config['seed']))
  objective = build.build_objective(config)
  size = config['training']['batch_size']
  key = jax.random.key(config['seed'])
  start = model.init(key, task.batch('train', 0, size)['inputs'])
  new = specialists.select(specialists.at_start(params, start), 0)
  judge = accuracy.make(
    model, task, objective, batch_size=size, splits=('validation', 'test')
  )

  def loss(found):
    values = judge(found, key)
    return values['validation/loss'], values['test/loss']

  line = {'scheme': scheme(config), 'seed': config['seed'], 'domain': domain}
  yield line | {'method': 'centre', 'rows': 0, 'test': round(loss(new)[1], 4)}
  count = specialists.count(params)
  losses = [loss(specialists.select(params, i)) for i in range(count)]
  if losses:
    yield line | {
      'method': 'nearest of the seven, by validation',
      'rows': 0,
      'test': round(min(losses)[1], 4),
    }
  methods = {'a new member': 'members', 'all of the centre': 'centre'}
  for name, part in methods.items():
    if part not in new:
      continue
    step = stepper(model, task, objective, part)
    for rows in samples:
      batch = task.batch('train', 0, rows)
      few = min(rows, size)
      fits = [
        fit(step, new, part, batch, few, steps, rate, loss) for rate in RATES
      ]
      yield line | {
        'method': name,
        'trained': report.count(new[part]),
        'rows': rows,
        'test': round(min(fits)[1], 4),
      }


def stepper(model, task, objective, part):
  """`step(params, moments, rows, rate)` of Adam on one part of the tree."""

  @jax.jit
  def step(params, moments, rows, rate):
    def score(own):
      outputs, _ = model.apply(
        params | {part: own},
        model.carry(params, len(rows['weight'])),
        rows['inputs'],
        key=None,
        train=True,
      )
      return objective.score(outputs, task.loss, rows)[0]

    own = params[part]
    updates, moments = ADAM.update(jax.grad(score)(own), moments)
    own = jax.tree.map(lambda p, u: p - rate * u, own, updates)
    return params | {part: own}, moments

  return step


def fit(step, params, part, batch, size, steps, rate, loss):
  """(validation, test) loss at the best of every 25th of the steps."""
  draw = np.random.default_rng(0)
  moments = ADAM.init(params[part])
  best = loss(params)
  for index in range(steps):
    chosen = draw.choice(len(batch['weight']), size, replace=False)
    rows = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
    params, moments = step(params, moments, rows, rate)
    if index % 25 == 24:
      best = min(best, loss(params))
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('runs', nargs='+', type=pathlib.Path)
  parser.add_argument('--domain', default='', help='an eighth, by its file')
  parser.add_argument('--samples', nargs='+', type=int, default=[28, 112, 448])
  parser.add_argument('--steps', type=int, default=150)
  flags = parser.parse_args()
  try:
    for run in flags.runs:
      check(run, flags.domain)
    for run in flags.runs:
      if not flags.domain:
        print(json.dumps(summary(run)), flush=True)
        continue
      for line in transfer(run, flags.domain, flags.samples, flags.steps):
        print(json.dumps(line), flush=True)
  except UserError as error:
    parser.error(str(error))


if __name__ == '__main__':
  main()
