"""Sudoku by the batch: a solver that proves uniqueness, and a generator.

A puzzle of size n is a row of n^2 cells in reading order, 0 blank, else a digit
1..n. Its boxes are `height x width` cells, `height * width = n`.

The search holds, for every cell, the set of digits that it may still have, bit
d - 1 for digit d. Arrays of these sets have the cells first and the puzzles
last, `[n, n, B]`, so that every operation runs along puzzles in memory.

In names of arrays, X counts cells and N states of the search.
"""

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size to (height, width) of a box

_STATES = 4096  # looked at together; bounds the memory of the search


def search(
  sets_BX: np.ndarray, limit: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Solves many puzzles together, depth first, up to `limit` solutions each.

  In every round each state loses the digits that its fixed cells forbid, and
  cells that alone can hold a digit of their row, column or box are fixed. A
  state that does not change any more guesses: a cell with the fewest digits
  has its lowest one, or has not.

  Args:
    sets_BX: digits that each cell may have, bits in uint16 `[B, X]` (`sets`).
    limit: solutions after which a puzzle is left.

  Returns:
    The first solution found, uint8 `[B, X]`, zeros where there is none; the
    number of solutions found, int `[B]`; and the number of guesses, int `[B]`.
    Where fewer than `limit` solutions exist the guesses are those of the whole
    proof, in no order, so they rate the puzzle and not the run.
  """
  count, cells = sets_BX.shape
  size = int(cells**0.5)
  solutions_BX = np.zeros((count, cells), np.uint8)
  found_B = np.zeros(count, int)
  guesses_B = np.zeros(count, int)
  stack = [(sets_BX.T.reshape(size, size, count), np.arange(count))]
  while stack:
    sets_NNN, owner_N = _pop(stack)
    sets_NNN, owner_N = _keep(found_B[owner_N] < limit, sets_NNN, owner_N)
    after_NNN, fine_N = _eliminate(sets_NNN)
    moved_N = (after_NNN != sets_NNN).any(axis=(0, 1))
    fixed_N = _is_one(after_NNN).all(axis=(0, 1))

    # A solution is only sure when its last change has been checked.
    solved_N = fine_N & fixed_N & ~moved_N
    first_S, place_S = np.unique(owner_N[solved_N], return_index=True)
    digits_XS = _digit(after_NNN[:, :, solved_N][:, :, place_S])
    new_S = found_B[first_S] == 0
    solutions_BX[first_S[new_S]] = digits_XS.reshape(cells, -1).T[new_S]
    np.add.at(found_B, owner_N[solved_N], 1)

    going_N = fine_N & moved_N
    if going_N.any():
      stack.append(_keep(going_N, after_NNN, owner_N))
    stuck_N = fine_N & ~moved_N & ~fixed_N
    if stuck_N.any():
      sets_NNN, owner_N = _keep(stuck_N, after_NNN, owner_N)
      np.add.at(guesses_B, owner_N, 1)
      stack += _guess(sets_NNN, owner_N)
  return solutions_BX, np.minimum(found_B, limit), guesses_B


def sets(puzzles_BX: np.ndarray) -> np.ndarray:
  """What each cell may be before any reasoning: bits, uint16 `[B, X]`."""
  size = int(puzzles_BX.shape[1] ** 0.5)
  one = np.left_shift(1, np.maximum(puzzles_BX, 1).astype(np.uint16) - 1)
  return np.where(puzzles_BX > 0, one, 2**size - 1).astype(np.uint16)


def solve(puzzles_BX: np.ndarray):
  """`search` of puzzles: first solution, solutions up to 2, guesses."""
  return search(sets(puzzles_BX))


def solved(answers_BX: np.ndarray) -> np.ndarray:
  """Whether every row, column and box holds every digit once, bool `[B]`."""
  size = int(answers_BX.shape[1] ** 0.5)
  inside_BX = (answers_BX >= 1) & (answers_BX <= size)
  bits_BX = sets(np.where(inside_BX, answers_BX, 1))
  bits_NNB = bits_BX.T.reshape(size, size, -1)
  full_B = [
    (joined == 2**size - 1).all(axis=(0, 1))
    for joined in _units(np.bitwise_or, bits_NNB)
  ]
  return inside_BX.all(axis=1) & np.logical_and.reduce(full_B)


def complete(stream: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Random solved grids, uint8 `[B, X]`: digits are drawn cell by cell.

  All grids in lock-step: where reasoning does not go on, a cell with the fewest
  digits draws one of them; a grid that gets stuck begins again.
  """
  every = np.uint16(2**size - 1)
  done: list[np.ndarray] = []
  missing = count
  sets_NNN = np.full((size, size, count), every, np.uint16)
  while missing:
    after_NNN, fine_N = _eliminate(sets_NNN)
    moved_N = (after_NNN != sets_NNN).any(axis=(0, 1))
    fixed_N = _is_one(after_NNN).all(axis=(0, 1))
    after_NNN[:, :, ~fine_N] = every
    ready_N = fine_N & fixed_N & ~moved_N
    if ready_N.any():
      ready_XN = _digit(after_NNN[:, :, ready_N]).reshape(size * size, -1)
      done.append(ready_XN.T)
      missing -= ready_XN.shape[1]
      after_NNN, moved_N = _keep(~ready_N, after_NNN, moved_N)
      fine_N = fine_N[~ready_N]
    stuck = np.flatnonzero(fine_N & ~moved_N)
    if len(stuck):
      place = (*_fewest(after_NNN[:, :, stuck]), stuck)
      key_NV = stream.random((len(stuck), size), np.float32) + np.float32(0.5)
      bits_1V = np.left_shift(1, np.arange(size))[None]
      key_NV *= (after_NNN[place][:, None] & bits_1V) > 0
      after_NNN[place] = np.left_shift(1, key_NV.argmax(axis=1))
    sets_NNN = after_NNN
  return np.concatenate(done)[:count]


def dig(
  stream: np.random.Generator,
  puzzles_BX: np.ndarray,
  solutions_BX: np.ndarray,
  clues_B: np.ndarray,
) -> np.ndarray:
  """Blanks cells of puzzles with these unique solutions, in random order.

  A cell stays where without it a second solution exists, and from `clues_B`
  clues on. Where a unique puzzle loses clue d of a cell, every other solution
  has another digit there, so it is enough to look for one without d.

  Args:
    stream: of the order.
    puzzles_BX: uint8 `[B, X]`; the solutions themselves have all cells.
    solutions_BX: their solutions.
    clues_B: fewest clues.

  Returns:
    uint8 `[B, X]`. A puzzle that has more than `clues_B` clues is minimal: none
    of them can go.
  """
  order_BX = stream.random(solutions_BX.shape).argsort(axis=1)
  puzzles_BX = puzzles_BX.copy()
  every = np.arange(len(puzzles_BX))
  for cell_B in order_BX.T:
    more_B = (puzzles_BX > 0).sum(axis=1) > clues_B
    rows_B = np.flatnonzero(more_B & (puzzles_BX[every, cell_B] > 0))
    cell_B = cell_B[rows_B]
    tried_BX = puzzles_BX[rows_B]
    tried_BX[np.arange(len(rows_B)), cell_B] = 0
    sets_BX = sets(tried_BX)
    lost_B = sets(solutions_BX[rows_B])[np.arange(len(rows_B)), cell_B]
    sets_BX[np.arange(len(rows_B)), cell_B] ^= lost_B
    _, found_B, _ = search(sets_BX, limit=1)
    can_go_B = found_B == 0
    puzzles_BX[rows_B[can_go_B], cell_B[can_go_B]] = 0
  return puzzles_BX


def vicinity(
  stream: np.random.Generator,
  puzzles_BX: np.ndarray,
  solutions_BX: np.ndarray,
  *,
  steps: int,
  shown: int = 3,
  share: float = 0.25,
) -> np.ndarray:
  """Puzzles near given ones: other clues of the same unique solutions.

  A step fills `shown` random blanks and then digs until no clue can go. It is
  taken where the proof that the new puzzle is unique needs at least `share` of
  the guesses that the given one's needs, so that hard ones stay hard; else the
  walk stays where it is.

  Returns:
    uint8 `[steps, B, X]`, the puzzle of every walk after every step.
  """
  least_B = share * solve(puzzles_BX)[2]
  none_B, found = np.zeros(len(puzzles_BX), int), []
  for _ in range(steps):
    key_BX = np.where(puzzles_BX > 0, 2, stream.random(puzzles_BX.shape))
    fill_BX = key_BX.argsort(axis=1).argsort(axis=1) < shown
    filled_BX = np.where(fill_BX, solutions_BX, puzzles_BX)
    near_BX = dig(stream, filled_BX, solutions_BX, none_B)
    hard_B = solve(near_BX)[2] >= least_B
    puzzles_BX = np.where(hard_B[:, None], near_BX, puzzles_BX)
    found.append(puzzles_BX)
  return np.stack(found)


def _pop(stack):
  """The states on top, as many as may be looked at together."""
  taken, number = [], 0
  while stack and number < _STATES:
    taken.append(stack.pop())
    number += len(taken[-1][1])
  sets_NNN = np.concatenate([s for s, _ in taken], axis=2)
  owner_N = np.concatenate([o for _, o in taken])
  if number > _STATES:
    stack.append((sets_NNN[:, :, _STATES:], owner_N[_STATES:]))
    sets_NNN, owner_N = sets_NNN[:, :, :_STATES], owner_N[:_STATES]
  return sets_NNN, owner_N


def _keep(which_N, sets_NNN, owner_N):
  # Unlike an index, `compress` keeps the puzzles contiguous in memory.
  return np.compress(which_N, sets_NNN, axis=2), owner_N[which_N]


def _is_one(x):
  return (x & (x - 1)) == 0


def _digit(one):
  """The digit of a set of one digit."""
  return (np.bitwise_count(one - 1) + 1).astype(np.uint8)


def _fewest(sets_NNN):
  """Row and column of a cell with the fewest digits but more than one."""
  size = len(sets_NNN)
  number_XN = np.bitwise_count(sets_NNN).reshape(size * size, -1)
  return divmod(np.where(number_XN > 1, number_XN, 99).argmin(axis=0), size)


def _guess(sets_NNN, owner_N):
  """Two states of each: a cell has its lowest digit, or has not."""
  place = (*_fewest(sets_NNN), np.arange(len(owner_N)))
  set_N = sets_NNN[place]
  lowest_N = set_N & (~set_N + np.uint16(1))
  has, has_not = sets_NNN, sets_NNN.copy()
  has[place] = lowest_N
  has_not[place] ^= lowest_N
  return [(has_not, owner_N), (has, owner_N)]


def _units(function, x_NNN):
  """`function` reduced over each row, column and box, ready to broadcast."""
  size = len(x_NNN)
  height, width = BOXES[size]
  x = x_NNN.reshape(size // height, height, size // width, width, -1)
  boxes = function.reduce(function.reduce(x, axis=3), axis=1)
  return (
    function.reduce(x_NNN, axis=1)[:, None],
    function.reduce(x_NNN, axis=0)[None],
    boxes.repeat(height, axis=0).repeat(width, axis=1),
  )


def _places(x_NNN):
  """Views of the first, second, ... cells of all rows, columns and boxes."""
  size = len(x_NNN)
  height, width = BOXES[size]
  x = x_NNN.reshape(size // height, height, size // width, width, -1)
  return (
    [x_NNN[:, place] for place in range(size)],
    [x_NNN[place] for place in range(size)],
    [x[:, row, :, column] for row in range(height) for column in range(width)],
  )


def _eliminate(sets_NNN):
  """One round of reasoning: the sets after it, and whether none contradicts.

  Digits fixed twice in a unit are found when another has no place in it.
  """
  size = len(sets_NNN)
  every = np.uint16(2**size - 1)
  one_NNN = _is_one(sets_NNN)
  rows, columns, boxes = _units(
    np.bitwise_or, np.where(one_NNN, sets_NNN, np.uint16(0))
  )
  after_NNN = np.bitwise_not(rows | columns | boxes)
  np.copyto(after_NNN, every, where=one_NNN)
  after_NNN &= sets_NNN
  fine_N = (after_NNN > 0).all(axis=(0, 1))

  only_NNN = np.zeros_like(after_NNN)
  for cells, targets in zip(_places(after_NNN), _places(only_NNN), strict=True):
    once, twice = cells[0].copy(), np.zeros_like(cells[0])
    for cell in cells[1:]:
      twice |= once & cell
      once |= cell
    fine_N &= (once == every).reshape(size, -1).all(axis=0)
    once &= ~twice
    for target in targets:
      target |= once
  only_NNN &= after_NNN
  fine_N &= _is_one(only_NNN).all(axis=(0, 1))  # two digits need no one cell
  np.copyto(after_NNN, only_NNN, where=only_NNN > 0)
  return after_NNN, fine_N
