r"""More Sudokus from the solutions of given ones.

  python -m recursive_weights.vicinity --path=train_1k.csv --out=near.csv

From every puzzle a walk begins (`tasks._sudoku.vicinity`): some blanks are
filled, then clues go until none can, so that other clues of the same solution
are left, and the step is taken where the puzzle stays hard. The file has the
given puzzles and then all that the walks come to, the columns `question` and
`answer`: `task.train_path` for a network that learns its puzzles by heart. It
shows no solution that the given puzzles do not.

A Python program that calls `write` needs `if __name__ == '__main__':`, since
the walks run in processes of their own.
"""

import csv
import functools
import logging
import multiprocessing
import os
import pathlib
import signal
from concurrent import futures

import numpy as np
from absl import flags

from recursive_weights import command
from recursive_weights.interfaces import UserError

_log = logging.getLogger('recursive_weights.vicinity')  # even as __main__

# Walks that go in step, in a process of their own and with random numbers of
# their own, so another number gives other puzzles.
ROWS = 500


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
    UserError: the file cannot be read, `out` cannot be written or is `path`, or
      there is no step.
  """
  from recursive_weights.tasks import sudoku

  if steps < 1:
    raise UserError(f'steps must be > 0, got {steps}')
  target = pathlib.Path(out)
  if target.resolve() == pathlib.Path(path).resolve():
    raise UserError(f'--out must be another file than --path, got {out} twice')
  puzzles_BX, solutions_BX = sudoku.read(path, size)
  part = target.with_name(target.name + '.part')
  try:
    if target.is_dir():
      raise IsADirectoryError(None, 'it is a folder')
    part.write_text('')  # before the work, not after it
  except OSError as error:
    raise UserError(f'cannot write {out}: {error.strerror}') from error
  try:
    given_BX = np.concatenate([puzzles_BX, solutions_BX], axis=1)
    near_BX = _walk_all(puzzles_BX, solutions_BX, steps, seed)
    pairs_BX = np.concatenate([given_BX, near_BX])
    _, first_B = np.unique(pairs_BX, axis=0, return_index=True)
    known = int((first_B < len(given_BX)).sum())
    _write(part, pairs_BX[np.sort(first_B)])
    os.replace(part, target)
  finally:
    part.unlink(missing_ok=True)
  _log.info('%d puzzles, %d of them new', len(first_B), len(first_B) - known)
  return len(first_B)


def _walk_all(puzzles_BX, solutions_BX, steps, seed):
  firsts = range(0, len(puzzles_BX), ROWS)
  parts = [
    (n, puzzles_BX[n : n + ROWS], solutions_BX[n : n + ROWS]) for n in firsts
  ]
  walk = functools.partial(_walk, steps, seed)
  _log.info('%d walks of %d steps', len(puzzles_BX), steps)
  # Not forked, since JAX has threads. An interrupt is for this process, which
  # ends the others.
  before, found = set(multiprocessing.active_children()), []
  with futures.ProcessPoolExecutor(
    mp_context=multiprocessing.get_context('spawn'),
    initializer=signal.signal,
    initargs=(signal.SIGINT, signal.SIG_IGN),
  ) as pool:
    try:
      for near_BX in pool.map(walk, parts):
        found.append(near_BX)
        _log.info('%d of %d parts of them are done', len(found), len(parts))
    except futures.process.BrokenProcessPool as error:
      raise UserError(
        'a process of the walks was ended from outside: free memory, and run '
        'the same command again'
      ) from error
    except BaseException:
      for process in set(multiprocessing.active_children()) - before:
        process.terminate()
      raise
  return np.concatenate(found)


def _walk(steps, seed, part):
  from recursive_weights.tasks import _splits, _sudoku

  first, puzzles_BX, solutions_BX = part
  stream = _splits.generator(seed, first)
  near_SBX = _sudoku.vicinity(stream, puzzles_BX, solutions_BX, steps=steps)
  both_SBX = np.broadcast_to(solutions_BX, near_SBX.shape)
  pairs_SBX = np.concatenate([near_SBX, both_SBX], axis=2)
  return pairs_SBX.reshape(-1, pairs_SBX.shape[2])


def _write(path, pairs_BX):
  half = pairs_BX.shape[1] // 2
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['question', 'answer'])
    for row in pairs_BX:
      text = ''.join(map(str, row))
      writer.writerow([text[:half].replace('0', '.'), text[half:]])


if __name__ == '__main__':
  flags.DEFINE_string('path', None, 'CSV with the columns question and answer')
  flags.DEFINE_string('out', None, 'CSV to write')
  flags.DEFINE_integer('size', 9, 'of the puzzles: 4, 6 or 9')
  flags.DEFINE_integer('steps', 64, 'of the walk from a puzzle', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'of the walks', 0, 2**31 - 1)
  command.run(main, __doc__)
