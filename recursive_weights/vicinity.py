r"""More Sudokus from the solutions of given ones.

  python -m recursive_weights.vicinity --path=train_1k.csv --out=near.csv

From every puzzle a walk begins (`tasks._sudoku.wander`): some blanks are
filled, then clues go until none can, so that other clues of the same solution
are left, and the step is taken where the puzzle stays hard. The file has the
given puzzles and then all that the walks come to, the columns `question` and
`answer`: `task.train_path` for a network that learns its puzzles by heart. It
shows no solution that the given puzzles do not.
"""

import csv
import functools
import logging
import multiprocessing
import os
import pathlib
from concurrent import futures

import numpy as np
from absl import flags

from recursive_weights import command
from recursive_weights.interfaces import UserError

_log = logging.getLogger('recursive_weights.vicinity')  # even as __main__

ROWS = 500  # walks of a process that go in step


def main(overrides):
  given = flags.FLAGS
  if overrides:
    raise UserError(f'there is no config here, got {overrides[0]}')
  for name in ('path', 'out'):
    if not given[name].value:
      raise UserError(f'give --{name}')
  write(
    given.path, given.out, size=given.size, steps=given.steps, seed=given.seed
  )


def write(
  path: str, out: str, *, size: int = 9, steps: int = 64, seed: int = 0
) -> int:
  """Writes the puzzles of `path` and those near them; arguments are the flags.

  Returns:
    The number of puzzles in `out`, which is there whole or not at all.

  Raises:
    UserError: the file cannot be read, or there is no folder for `out`.
  """
  from recursive_weights.tasks import sudoku

  target = pathlib.Path(out)
  if not target.absolute().parent.is_dir():
    raise UserError(f'no folder for {out}')
  puzzles_BX, solutions_BX = sudoku.read(path, size=size)
  firsts = range(0, len(puzzles_BX), ROWS)
  parts = [
    (
      first,
      puzzles_BX[first : first + ROWS],
      solutions_BX[first : first + ROWS],
    )
    for first in firsts
  ]
  walk = functools.partial(_walk, steps, seed)
  found = [np.concatenate([puzzles_BX, solutions_BX], axis=1)]
  # Not forked, since JAX has threads.
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(mp_context=context) as pool:
    for part, near in zip(parts, pool.map(walk, parts), strict=True):
      found.append(near)
      _log.info('walked from the puzzles %d ...', part[0] + 1)
  pairs_BX = np.concatenate(found)
  _, first_B = np.unique(pairs_BX, axis=0, return_index=True)
  pairs = [''.join(map(str, row)) for row in pairs_BX[np.sort(first_B)]]
  half = size * size
  partial = target.with_name(target.name + '.part')
  with partial.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['question', 'answer'])
    for pair in pairs:
      writer.writerow([pair[:half].replace('0', '.'), pair[half:]])
  os.replace(partial, target)
  _log.info(
    '%d puzzles, %d of them new', len(pairs), len(pairs) - len(found[0])
  )
  return len(pairs)


def _walk(steps, seed, part):
  from recursive_weights.tasks import _splits, _sudoku

  first, puzzles_BX, solutions_BX = part
  stream = _splits.generator(seed, first)
  near_SBX = _sudoku.wander(stream, puzzles_BX, solutions_BX, steps=steps)
  both_SBX = np.broadcast_to(solutions_BX, near_SBX.shape)
  return np.concatenate([near_SBX, both_SBX], 2).reshape(
    -1, 2 * both_SBX.shape[2]
  )


if __name__ == '__main__':
  flags.DEFINE_string('path', None, 'CSV with the columns question and answer')
  flags.DEFINE_string('out', None, 'CSV to write')
  flags.DEFINE_integer('size', 9, 'of the puzzles: 4, 6 or 9')
  flags.DEFINE_integer('steps', 64, 'of the walk from a puzzle', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'of the walks', 0, 2**31 - 1)
  command.run(main, __doc__)
