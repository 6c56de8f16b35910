"""Mazes by the batch: carving, shortest routes, symmetries. NumPy only.

A maze of odd side `size` is a flat row of `size^2` squares in reading order.
Squares whose row and column are odd are cells; the others are walls or
passages between cells. The outer squares are always wall, so a step along the
flat row never wraps from one side of an open square to the other.

In names of arrays, X counts squares and G symmetries.
"""

import functools

import numpy as np

from recursive_weights.tasks import _splits

WALL, OPEN, START, GOAL, PATH = range(5)
UP, DOWN, LEFT, RIGHT, STAY = range(5)


def offsets(size: int) -> np.ndarray:
  """What each of the five moves adds to the index of a square."""
  return np.array([-size, size, -1, 1, 0], np.int32)


def carve(
  stream: np.random.Generator,
  count: int,
  size: int,
  *,
  branching: float,
  loops: float,
) -> np.ndarray:
  """Perfect mazes, grown from cell to free cell, all mazes in lock-step.

  A perfect maze has one route between any two cells. Each step goes on from
  the newest cell that has free neighbours (depth-first search), or with
  probability `branching` from any earlier one, which makes every perfect maze
  possible. Each wall that is left between neighbouring cells is then removed
  with probability `loops`.

  Returns:
    bool `[B, size^2]`, true where open.
  """
  cells = (size - 1) // 2
  total = cells * cells
  step_4 = 2 * offsets(size)[:4]
  rows_B = np.arange(count)

  free_BX = np.zeros((count, size, size), bool)
  free_BX[:, 1::2, 1::2] = True
  open_BX = free_BX.reshape(count, -1).copy()
  # A rim of two squares keeps steps over the border inside the array.
  rim = 2 * size
  free_BX = np.pad(free_BX.reshape(count, -1), ((0, 0), (rim, rim)))

  # The last cell is entered at step 2 (total - 1) at the latest: every step
  # goes to a new cell or leaves one for good.
  stack_TB = np.zeros((total + 1, count), np.int32)
  depth_B = np.zeros(count, np.int32)
  row_B, column_B = 2 * stream.integers(0, cells, (2, count)) + 1
  stack_TB[0] = row_B * size + column_B
  free_BX[rows_B, stack_TB[0] + rim] = False
  for _ in range(2 * (total - 1)):
    if branching > 0:
      jump_B = stream.random(count) < branching
      earlier_B = (stream.random(count) * (depth_B + 1)).astype(np.int32)
      earlier_B = np.where(jump_B, earlier_B, depth_B)
      top_B = stack_TB[depth_B, rows_B]
      stack_TB[depth_B, rows_B] = stack_TB[earlier_B, rows_B]
      stack_TB[earlier_B, rows_B] = top_B
    here_B = stack_TB[depth_B, rows_B]
    next_B4 = here_B[:, None] + step_4[None, :]
    key_B4 = stream.random((count, 4), np.float32) + np.float32(0.5)
    key_B4 *= free_BX[rows_B[:, None], next_B4 + rim]
    move_B = key_B4.argmax(axis=1)
    forward_B = key_B4[rows_B, move_B] > 0
    depth_B = np.maximum(depth_B + np.where(forward_B, 1, -1), 0)

    rows_F = rows_B[forward_B]
    there_F = next_B4[rows_F, move_B[rows_F]]
    stack_TB[depth_B[rows_F], rows_F] = there_F
    free_BX[rows_F, there_F + rim] = False
    open_BX[rows_F, (here_B[rows_F] + there_F) // 2] = True

  if loops > 0:
    between = np.zeros((size, size), bool)
    between[1:-1:2, 2:-1:2] = True
    between[2:-1:2, 1:-1:2] = True
    open_BX |= between.reshape(1, -1) & (stream.random(open_BX.shape) < loops)
  return open_BX


def place(
  stream: np.random.Generator, open_BX: np.ndarray, size: int, route: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws start and goal and finds a shortest route by breadth-first search.

  The start is uniform among open squares, the goal uniform among those from 1
  to `route` moves away.

  Returns:
    tokens uint8 `[B, size^2]` and moves uint8 `[B, route]`, padded with STAY.
  """
  count = len(open_BX)
  rows_B = np.arange(count)
  start_B = _any(stream, open_BX)
  distance_BX = _distances(open_BX, start_B, size, route)
  goal_B = _any(stream, distance_BX > 0)

  moves_BT = np.full((count, route), STAY, np.uint8)
  square_B = goal_B
  left_B = distance_BX[rows_B, goal_B]
  for _ in range(left_B.max(initial=0)):
    before_B4 = square_B[:, None] - offsets(size)[None, :4]
    nearer_B4 = distance_BX[rows_B[:, None], before_B4] == left_B[:, None] - 1
    move_B = nearer_B4.argmax(axis=1)
    on_B = left_B > 0
    moves_BT[rows_B[on_B], left_B[on_B] - 1] = move_B[on_B]
    square_B = np.where(on_B, before_B4[rows_B, move_B], square_B)
    left_B = np.maximum(left_B - 1, 0)

  tokens_BX = np.where(open_BX, OPEN, WALL).astype(np.uint8)
  tokens_BX[rows_B, start_B] = START
  tokens_BX[rows_B, goal_B] = GOAL
  return tokens_BX, moves_BT


def draw_path(
  stream: np.random.Generator, open_BX: np.ndarray, size: int, min_path: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws start and goal at least `min_path` moves apart, and a shortest path.

  The start is uniform among open squares, the goal uniform among those that
  are far enough. Mazes that have none are left out.

  Returns:
    tokens uint8 `[B, size^2]`, and the same with PATH on the squares between.
  """
  start_B = _any(stream, open_BX)
  distance_BX = _distances(open_BX, start_B, size, size * size)
  far_BX = distance_BX >= max(min_path, 1)
  kept_B = far_BX.any(axis=1)
  open_BX, start_B, distance_BX, far_BX = (
    x[kept_B] for x in (open_BX, start_B, distance_BX, far_BX)
  )
  rows_B = np.arange(len(open_BX))
  goal_B = _any(stream, far_BX)
  tokens_BX = np.where(open_BX, OPEN, WALL).astype(np.uint8)
  tokens_BX[rows_B, start_B] = START
  tokens_BX[rows_B, goal_B] = GOAL

  answers_BX = tokens_BX.copy()
  square_B = goal_B
  left_B = distance_BX[rows_B, goal_B]
  while (left_B > 1).any():
    before_B4 = square_B[:, None] - offsets(size)[None, :4]
    nearer_B4 = distance_BX[rows_B[:, None], before_B4] == left_B[:, None] - 1
    move_B = nearer_B4.argmax(axis=1)
    on_B = left_B > 1
    square_B = np.where(on_B, before_B4[rows_B, move_B], square_B)
    answers_BX[rows_B[on_B], square_B[on_B]] = PATH
    left_B = np.maximum(left_B - 1, 0)
  return tokens_BX, answers_BX


def shortest(tokens_BX: np.ndarray, size: int) -> np.ndarray:
  """Fewest moves from start to goal, int `[B]`; -1 where there is no way."""
  start_B = (tokens_BX == START).argmax(axis=1)
  goal_B = (tokens_BX == GOAL).argmax(axis=1)
  distance_BX = _distances(tokens_BX != WALL, start_B, size, size * size)
  return distance_BX[np.arange(len(tokens_BX)), goal_B]


def of_split(grids_BX: np.ndarray, size: int, wanted: int) -> np.ndarray:
  """Whether grids fall to a split, as do all their turned versions, `[B]`."""
  squares_GX, _ = symmetries(size)
  hash_GB = [_splits.hash_rows(grids_BX[:, squares]) for squares in squares_GX]
  return _splits.by_hash(np.max(hash_GB, axis=0)) == wanted


def _any(stream, allowed_BX):
  """One allowed square of each row, all equally likely."""
  key_BX = stream.random(allowed_BX.shape, np.float32) + np.float32(0.5)
  return (key_BX * allowed_BX).argmax(axis=1)


def _distances(open_BX, start_B, size, limit):
  """Moves from the start, int16 `[B, size^2]`; -1 beyond `limit` or walled."""
  rows_B = np.arange(len(open_BX))
  unseen_BX = open_BX.copy()
  unseen_BX[rows_B, start_B] = False
  front_BX = np.zeros_like(open_BX)
  front_BX[rows_B, start_B] = True
  distance_BX = np.where(front_BX, 0, -1).astype(np.int16)
  for distance in range(1, limit + 1):
    next_BX = np.zeros_like(front_BX)
    next_BX[:, size:] |= front_BX[:, :-size]
    next_BX[:, :-size] |= front_BX[:, size:]
    next_BX[:, 1:] |= front_BX[:, :-1]
    next_BX[:, :-1] |= front_BX[:, 1:]
    next_BX &= unseen_BX
    if not next_BX.any():
      break
    unseen_BX &= ~next_BX
    distance_BX[next_BX] = distance
    front_BX = next_BX
  return distance_BX


@functools.cache
def symmetries(size: int) -> tuple[np.ndarray, np.ndarray]:
  """The eight turns and mirrorings of a square.

  Returns:
    `squares_GX`: int32 `[8, size^2]`; `grid[squares_GX[g]]` is the turned grid.
    `moves_GV`: int32 `[8, 5]`; `moves_GV[g, move]` is the turned move.
  """
  grid = np.arange(size * size).reshape(size, size)
  turned = [np.rot90(x, k) for x in (grid, grid.T) for k in range(4)]
  squares_GX = np.array([x.ravel() for x in turned], np.int32)

  centre = (size // 2) * (size + 1)
  place_GX = np.argsort(squares_GX, axis=1)  # where each old square has gone
  step_GV = place_GX[:, centre + offsets(size)] - place_GX[:, [centre]]
  is_move_GVV = step_GV[:, :, None] == offsets(size)[None, None, :]
  return squares_GX, is_move_GVV.argmax(axis=2).astype(np.int32)
