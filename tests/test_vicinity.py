"""More Sudokus from given ones, as a user asks for them."""

import csv
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from recursive_weights import vicinity
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _splits, _sudoku, sudoku


@pytest.fixture
def given(tmp_path):
  """A file of three puzzles of 4 x 4, and what it holds."""
  stream = _splits.generator(0)
  solutions_BX = _sudoku.complete(stream, 3, 4)
  puzzles_BX = _sudoku.dig(stream, solutions_BX, solutions_BX, np.full(3, 8))
  path = tmp_path / 'given.csv'
  with path.open('w') as file:
    writer = csv.writer(file)
    writer.writerow(['answer', 'question'])
    for pair in zip(solutions_BX, puzzles_BX, strict=True):
      writer.writerow(''.join(map(str, x)) for x in pair)
  return str(path), puzzles_BX, solutions_BX


def test_a_file_has_the_given_puzzles_and_new_ones(given, tmp_path):
  path, puzzles_BX, solutions_BX = given
  out = tmp_path / 'near.csv'
  command = [sys.executable, '-m', 'recursive_weights.vicinity', '--size=4']
  command += [f'--path={path}', f'--out={out}', '--steps=5']
  told = subprocess.run(command, capture_output=True, text=True, check=True)
  found_BX, answers_BX = sudoku.read(str(out), size=4)  # each proven unique
  assert (
    f'{len(found_BX)} puzzles, {len(found_BX) - 3} of them new' in told.stderr
  )
  np.testing.assert_array_equal(found_BX[:3], puzzles_BX)
  assert len(found_BX) > 6
  assert len(np.unique(found_BX, axis=0)) == len(found_BX)
  known = {row.tobytes() for row in solutions_BX}
  assert {row.tobytes() for row in answers_BX} == known
  again = tmp_path / 'again.csv'
  vicinity.write(path, str(again), size=4, steps=5)
  assert again.read_bytes() == out.read_bytes()
  vicinity.write(path, str(again), size=4, steps=5, seed=1)
  assert again.read_bytes() != out.read_bytes()
  assert not list(tmp_path.glob('*.part'))


def test_given_puzzles_that_repeat_are_not_new(given, tmp_path, caplog):
  path, *_ = given
  lines = pathlib.Path(path).read_text().splitlines()
  twice = tmp_path / 'twice.csv'
  twice.write_text('\n'.join([*lines, *lines[1:]]))
  out = str(tmp_path / 'near.csv')
  with caplog.at_level('INFO', 'recursive_weights.vicinity'):
    total = vicinity.write(str(twice), out, size=4, steps=2)
  assert f'{total} puzzles, {total - 3} of them new' in caplog.text
  # A file that changed is read again.
  twice.write_text('\n'.join(lines[:2]))
  assert len(sudoku.read(str(twice), 4)[0]) == 1


def test_bad_input_is_named_before_the_work(given, tmp_path):
  path, out = given[0], tmp_path / 'near.csv'
  held = pathlib.Path(path).read_bytes()
  for target, fields, message in (
    (tmp_path / 'none' / 'near.csv', {}, 'cannot write .*No such file'),
    (tmp_path, {}, 'cannot write .*it is a folder'),
    (path, {}, 'must be another file than --path'),
    (out, {'steps': 0}, 'steps must be > 0, got 0'),
    (out, {'size': 5}, 'size must be 4, 6 or 9, got 5'),
    (out, {'size': 9}, 'question must have 81 characters, got 16'),
  ):
    with pytest.raises(UserError, match=message):
      vicinity.write(path, str(target), **{'size': 4, 'steps': 1} | fields)
  assert pathlib.Path(path).read_bytes() == held
  assert not out.exists() and not list(tmp_path.glob('*.part'))
