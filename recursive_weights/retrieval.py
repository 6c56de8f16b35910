r"""Compares the shared basis with every baseline on questions held out.

  python -m recursive_weights.retrieval --config=configs/basis_retrieval.py \
      --train_questions=1,2,3,5,10 --num_seeds=3 --output_dir=runs/retrieval \
      [--config.task.path=FILE ...]

Each method's settings, and the rule by which an answer is scored, are those of
the best mean reciprocal rank on the validation questions of the first seed;
test questions are judged once. Seeds choose which questions train. Writes
`table.json` and `table.md`; rows that are there are not measured again, and
`asked.json` says of which task, methods and seeds they are. With `--settings`
a method takes what its row of another table has, if there is one. Rows of the
basis say how stationary their fits are, seed by seed (`basis.lagrangian`).
"""

import json
import logging
import pathlib
import time

import jax.numpy as jnp
import numpy as np
from absl import flags

from recursive_weights import command
from recursive_weights.io import json_files

_log = logging.getLogger('recursive_weights.retrieval')  # even as __main__
OURS = 'basis'


def main(overrides):
  from recursive_weights import config, interfaces

  given = flags.FLAGS
  for name in ('config', 'output_dir'):
    if not given[name].value:
      raise interfaces.UserError(f'give --{name}')
  counts = command.numbers('train_questions', given.train_questions, int)
  if not counts:
    raise interfaces.UserError(
      '--train_questions must be one number or more, as in 1,2,5, got none'
    )
  fields = command.override(command.read_config_file(given.config), overrides)
  rows = fill(
    pathlib.Path(given.output_dir),
    config.to_data(fields)['task'],
    counts,
    given.num_seeds,
    given.methods,
    read_settings(given.settings) if given.settings else {},
  )
  print(table(rows))
  last = rows[-1]['train_questions']
  print(
    json.dumps(
      {r['method']: r['recall_1'] for r in rows if r['train_questions'] == last}
    )
  )


def fill(
  folder: pathlib.Path,
  task: dict,
  counts: list[int],
  seeds: int,
  names: list[str],
  stored: dict,
) -> list[dict]:
  """The folder's rows, those of `counts` that it lacks measured now.

  Args:
    folder: of `table.json`, `table.md` and `asked.json`, what its rows are of.
    counts: training questions a cluster.
    stored: of `read_settings`. For the rest see `compare`.

  Raises:
    UserError: the folder's rows are of another task, other methods or seeds;
      see `compare`.
  """
  from recursive_weights.basis import methods

  # Those that `compare` sets, and the one that changes no result.
  free = ('train_questions', 'split_seed', 'cache')
  asked = {f'task.{k}': x for k, x in task.items() if k not in free} | {
    'methods': names or list(methods.METHODS),
    'num_seeds': seeds,
  }
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'table.json'
  rows = json_files.read(path) if path.exists() else []
  if rows:
    check_same(folder, asked)
  for count in counts:
    if any(row['train_questions'] == count for row in rows):
      continue
    chosen = {m: row for (m, n), row in stored.items() if n == count}
    rows += compare(task, count, seeds, names, chosen)
    # Before the rows, so that there are none of unknown origin.
    json_files.write(folder / 'asked.json', asked)
    json_files.write(path, rows)
    (folder / 'table.md').write_text(table(rows))
  return rows


def check_same(folder: pathlib.Path, asked: dict) -> None:
  """Raises `UserError` where the rows of a folder are of something else."""
  from recursive_weights import interfaces

  path = folder / 'asked.json'
  if not path.exists():
    raise interfaces.UserError(
      f'{folder} has rows but no asked.json that says of what: give another '
      '--output_dir'
    )
  before = json_files.read(path)
  now = json.loads(json.dumps(asked))  # lists for tuples
  differ = [
    f'{name} {before.get(name)!r} there and {now.get(name)!r} here'
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
  ]
  if differ:
    raise interfaces.UserError(
      f'the rows in {folder} must be of the same comparison, got '
      f'{"; ".join(differ)}: give another --output_dir'
    )


def read_settings(path: str) -> dict[tuple[str, int], dict]:
  """Rows of a `table.json` by method and number of training questions.

  Raises:
    UserError: no such file, not rows, or two rows of one method and number.
  """
  from recursive_weights import interfaces

  found: dict[tuple[str, int], dict] = {}
  try:
    for row in json_files.read(path):
      key = row['method'], row['train_questions']
      if key in found:
        raise interfaces.UserError(
          f'{path} must have one row a method and number, got two of '
          f'{key[0]} with {key[1]} questions: keep those of one set'
        )
      found[key] = {name: row[name] for name in ('settings', 'rule')}
  except (KeyError, TypeError) as error:
    raise interfaces.UserError(
      f'cannot read settings from {path}: {type(error).__name__}: {error}'
    ) from error
  return found


def compare(
  task: dict, count: int, seeds: int, names: list[str], stored: dict
) -> list[dict]:
  """A row for each method, trained on `count` questions a cluster.

  Args:
    task: fields of the config's task.
    names: methods; [] for all.
    stored: rows by method of another set, whose settings to take.

  Raises:
    UserError: unknown method; no validation questions and nothing stored.
  """
  from recursive_weights import build, interfaces
  from recursive_weights.basis import methods

  if unknown := sorted(set(names) - set(methods.METHODS)):
    raise interfaces.UserError(
      f'methods has no {", ".join(unknown)}; there are: '
      f'{", ".join(methods.METHODS)}'
    )
  names = names or list(methods.METHODS)
  found: dict[str, list] = {name: [] for name in names}
  tangents: list[float] = []
  chosen: dict[str, tuple[dict, str]] = {}
  for seed in range(seeds):
    fields = task | {'train_questions': count, 'split_seed': seed}
    problem = build.build_task({'task': fields}, 0)
    for name in names:
      begun = time.monotonic()
      if name not in chosen:
        chosen[name] = choose(name, problem, stored)
      rank_B = measure(name, problem, *chosen[name])
      found[name].append(rank_B)
      if name == OURS:
        settings = chosen[name][0]
        tangents.append(methods.stationarity(*trained(problem), **settings))
      _log.info(
        '%d questions, seed %d, %s: Recall@1 %.3f (%s; %.1f s)',
        count,
        seed,
        name,
        np.mean(rank_B <= 1),
        chosen[name],
        time.monotonic() - begun,
      )
  sizes = problem.spec.sizes
  return [
    {
      'train_questions': count,
      'method': name,
      'answers': problem.spec.classes,
      'questions': sizes,
      'data_hash': (problem.data_hash or {}).get('test'),
    }
    | summary(ranks, found.get(OURS, []))
    | {
      'settings': chosen[name][0],
      'rule': chosen[name][1],
      'parameters': methods.parameters(
        name, task_sizes(problem), *chosen[name]
      ),
    }
    | ({'tangent/by_seed': tangents} if name == OURS else {})
    for name, ranks in found.items()
  ]


def choose(name: str, problem, stored: dict) -> tuple[dict, str]:
  """Settings and rule of a method: of `stored`, rows by method, or the best.

  By the validation questions.

  Raises:
    UserError: neither validation questions nor a stored row.
  """
  from recursive_weights.basis import methods
  from recursive_weights.interfaces import UserError

  if name in stored:
    return stored[name]['settings'], stored[name]['rule']
  if not problem.spec.sizes['validation']:
    raise UserError(
      'there are no validation questions to choose settings by: lower '
      'train_questions, or give --settings=TABLE.json of another set'
    )
  clusters, a_EV = trained(problem)
  extra: tuple[dict, ...] = ({},)
  if name in methods.EXTENDED and not clusters.weight_ET.any(-1).all():
    extra = tuple({'neighbours': t} for t in (0.0, 0.03, 0.1, 0.3))
  q_BD, targets_B = questions(problem, 'validation')
  settings, rule, _ = methods.choose(
    methods.METHODS[name], clusters, a_EV, q_BD, targets_B, extra
  )
  return settings, rule


def measure(name: str, problem, settings: dict, rule: str) -> np.ndarray:
  """Where the right answers to the test questions stand, from 1."""
  from recursive_weights.basis import methods

  clusters, a_EV = trained(problem)
  q_BD, targets_B = questions(problem, 'test')
  scores = methods.METHODS[name].fit(clusters, a_EV, **settings)(q_BD)
  return np.asarray(methods.ranks(scores[rule], targets_B))


def questions(problem, split: str):
  """All of a split, and which answers are right."""
  batch = problem.batch(split, 0, problem.spec.sizes[split])
  return jnp.asarray(batch['inputs']), jnp.asarray(batch['targets'])


def trained(problem):
  """The training questions by cluster, and all answers."""
  from recursive_weights.basis import clusters

  a_EV = jnp.asarray(problem.answers)
  q_BD, member_B = questions(problem, 'train')
  return clusters.group(
    q_BD, a_EV[member_B], member_B, problem.spec.classes, allow_empty=True
  ), a_EV


def task_sizes(problem):
  """The sizes by which `methods.parameters` counts."""
  from recursive_weights.basis import methods

  members, values = problem.answers.shape
  width = problem.spec.inputs.shape[-1]
  return methods.Sizes(members, problem.spec.sizes['train'], width, values)


def summary(ranks: list[np.ndarray], ours: list[np.ndarray]) -> dict:
  """Means over questions and seeds with intervals, and against the basis."""
  from recursive_weights.evaluators import _bootstrap, retrieval

  def values(some, name):
    return np.stack([retrieval.measures(rank_B)[name] for rank_B in some])

  row: dict = {}
  for name in ('recall_1', 'recall_5', 'mrr'):
    mine_SB = values(ranks, name)
    row[name] = float(mine_SB.mean())
    row[f'{name}/interval'] = _bootstrap.interval(mine_SB)
    row[f'{name}/by_seed'] = mine_SB.mean(1).tolist()
    if ours:
      gap_SB = values(ours, name) - mine_SB
      row[f'{name}/basis_gap'] = float(gap_SB.mean())
      row[f'{name}/basis_gap/interval'] = _bootstrap.interval(gap_SB)
  return row


def table(rows: list[dict]) -> str:
  """Recall@1 by method and number of training questions, as Markdown.

  In brackets what the basis has more, with its interval; bold where that
  interval holds no 0. `parameters`: of `methods.parameters`, from the least to
  the most where they change with the settings that were chosen.
  """
  counts = sorted({row['train_questions'] for row in rows})
  names = list(dict.fromkeys(row['method'] for row in rows))
  cells = {(row['method'], row['train_questions']): row for row in rows}

  def cell(row):
    if row is None:
      return ''
    low, high = row['recall_1/interval']
    text = f'{row["recall_1"]:.3f} [{low:.3f}, {high:.3f}]'
    if row['method'] == OURS or 'recall_1/basis_gap' not in row:
      return text
    low, high = row['recall_1/basis_gap/interval']
    gap = f'{row["recall_1/basis_gap"]:+.3f}'
    return f'{text} ({f"**{gap}**" if low > 0 or high < 0 else gap})'

  def stored(name):
    found = {row.get('parameters') for row in rows if row['method'] == name}
    known = sorted(found - {None})
    return ' to '.join(f'{x:,}' for x in dict.fromkeys(known[:1] + known[-1:]))

  head = ['method', 'parameters', *(f'{n} a cluster' for n in counts)]
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  lines += [
    '| '
    + ' | '.join(
      [name, stored(name), *(cell(cells.get((name, n))) for n in counts)]
    )
    + ' |'
    for name in names
  ]
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  flags.DEFINE_string('config', None, 'configs/NAME.py, or NAME.py:variant')
  flags.DEFINE_list(
    'train_questions', ['1', '2', '3', '5', '10'], 'a cluster; 0 for all'
  )
  flags.DEFINE_list('methods', [], 'of basis.methods; all unless given')
  flags.DEFINE_integer(
    'num_seeds', 3, 'choices of training questions', lower_bound=1
  )
  flags.DEFINE_string(
    'settings', None, 'table.json whose settings to take; chosen unless given'
  )
  flags.DEFINE_string('output_dir', None, 'folder of table.json and table.md')
  command.run(main, __doc__)
