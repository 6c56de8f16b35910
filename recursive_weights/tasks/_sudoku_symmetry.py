"""What stays the same when a Sudoku is turned into an equivalent one.

Equivalent are grids that differ by names of digits, order of bands and stacks,
order of rows in a band and columns in a stack, and, where boxes are square, by
reflection in the diagonal.

In names of arrays, X counts cells and G symmetries.
"""

import functools
import itertools

import numpy as np

from recursive_weights.tasks import _splits
from recursive_weights.tasks._sudoku import BOXES


@functools.cache
def orders(size: int, part: int) -> np.ndarray:
  """All orders of lines that keep parts of `part` lines together, `[G, n]`."""
  lines = np.arange(size).reshape(-1, part)
  found = []
  for parts in itertools.permutations(range(size // part)):
    inner = itertools.product(
      *[itertools.permutations(lines[i]) for i in parts]
    )
    found += [[line for lines in order for line in lines] for order in inner]
  return np.array(found)


@functools.cache
def positions(size: int) -> np.ndarray:
  """All rearrangements of the cells, int `[G, X]`: 128 of size 4, 3,456 of 6.

  `puzzle[positions(n)[g]]` is the rearranged puzzle. Size 9 has 3,359,232.
  """
  height, width = BOXES[size]
  rows_GT = orders(size, height)
  columns_GT = orders(size, width)
  cells = rows_GT[:, None, :, None] * size + columns_GT[None, :, None, :]
  cells_GX = cells.reshape(-1, size * size)
  if height == width:
    across = np.arange(size * size).reshape(size, size).T.ravel()
    cells_GX = np.concatenate([cells_GX, cells_GX[:, across]])
  return cells_GX


def hash_puzzles(puzzles_BX: np.ndarray) -> np.ndarray:
  """Equal for equivalent puzzles, uint64 `[B]`: for size 4, see `positions`.

  The largest hash over all rearrangements, with digits named in the order in
  which they come.
  """
  size = int(puzzles_BX.shape[1] ** 0.5)
  cells_GX = positions(size)
  best_B = np.zeros(len(puzzles_BX), np.uint64)
  for cells in cells_GX:
    hash_B = _splits.hash_rows(_renamed(puzzles_BX[:, cells], size))
    best_B = np.maximum(best_B, hash_B)
  return best_B


def hash_solutions(solutions_BX: np.ndarray) -> np.ndarray:
  """Equal for equivalent solved grids, uint64 `[B]`.

  Two digits of a grid form loops: from the first one along its row to the
  second, from there along its column to the first, and so on; and likewise by
  row and box, and by column and box. No symmetry changes the lengths of these
  loops, so the hash is of how long they are, over all pairs of digits. Grids
  that are not equivalent may share a hash; then they share a split.
  """
  count, cells = solutions_BX.shape
  size = int(cells**0.5)
  height, width = BOXES[size]
  row_X, column_X = divmod(np.arange(cells), size)
  box_X = row_X // height * (size // width) + column_X // width

  # where[kind][other][b, d, u]: in unit u of a kind, the unit of another kind
  # in which digit d lies.
  digit_BX = solutions_BX.astype(int) - 1
  rows_B1 = np.arange(count)[:, None]

  def where(unit_X, other_X):
    place_BVU = np.empty((count, size, size), np.int8)
    place_BVU[rows_B1, digit_BX, unit_X[None]] = other_X[None]
    return place_BVU

  first, second = np.triu_indices(size, 1)
  families = []
  for a_X, b_X in ((row_X, column_X), (row_X, box_X), (column_X, box_X)):
    there_BPU = where(a_X, b_X)[:, first]
    back_BPU = where(b_X, a_X)[:, second]
    step_BPU = np.take_along_axis(back_BPU, there_BPU, axis=2)
    families.append(_hash_loops(step_BPU))
  if height == width:  # reflection exchanges the last two
    families = [families[0], families[1] + families[2]]
  pair_BP = _hash_words(families)
  return _hash_words([pair_BP.sum(axis=1, dtype=np.uint64)])


def _hash_loops(step_BPU):
  """Hash of the lengths of the loops of permutations `[B, P, n]`, `[B, P]`.

  The numbers of units that are back after 1, 2, ..., n steps tell them.
  """
  count, pairs, size = step_BPU.shape
  unit_11U = np.arange(size)[None, None]
  here_BPU, back = step_BPU, []
  for _ in range(size):
    back.append((here_BPU == unit_11U).sum(axis=2, dtype=np.uint8))
    here_BPU = np.take_along_axis(step_BPU, here_BPU, axis=2)
  back_BPU = np.stack(back, axis=2)
  return _splits.hash_rows(back_BPU.reshape(-1, size)).reshape(count, pairs)


def _hash_words(words):
  stacked = np.stack(words, axis=-1)
  bytes_BN = stacked.reshape(-1, len(words)).view(np.uint8)
  return _splits.hash_rows(bytes_BN).reshape(stacked.shape[:-1])


def _renamed(puzzles_BX, size):
  """Digits renamed 1, 2, ... in the order in which they come; 0 stays 0."""
  rows_B = np.arange(len(puzzles_BX))
  name_BV = np.zeros((len(puzzles_BX), size + 1), np.uint8)
  next_B = np.ones(len(puzzles_BX), np.uint8)
  renamed_BX = np.empty(puzzles_BX.shape, np.uint8)
  for place, digit_B in enumerate(puzzles_BX.T):
    new_B = (digit_B > 0) & (name_BV[rows_B, digit_B] == 0)
    name_BV[rows_B[new_B], digit_B[new_B]] = next_B[new_B]
    next_B += new_B
    renamed_BX[:, place] = name_BV[rows_B, digit_B]
  return renamed_BX
