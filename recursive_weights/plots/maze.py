"""A maze and a path drawn into it: the path orange, mistakes red."""

import math

import numpy as np

from recursive_weights.plots.attention import maze_picture

_WALL, _OPEN, _START, _GOAL, _PATH = range(5)
_ORANGE = np.array([0.90, 0.55, 0.10])
_MISSED = np.array([1.0, 0.80, 0.55])
_WRONG = np.array([0.80, 0.10, 0.15])


def path_picture(tokens, answer=None, target=None) -> np.ndarray:
  """A maze, and an answer to it where there is one, `[h, w, 3]` in [0, 1].

  A square that the answer puts on the path has an orange dot. Squares that are
  not the target's: a red dot where they are on the answer's path, a pale
  ground where they are missing from it, a red ring where the answer changed
  the maze.

  Args:
    tokens: `[size^2]`: 0 wall, 1 open, 2 start, 3 goal.
    answer: `[size^2]`: the same, and 4 on the path.
    target: `[size^2]`, likewise.
  """
  tokens = np.asarray(tokens)
  picture = maze_picture(tokens)
  if answer is None:
    return picture
  answer = np.asarray(answer)
  target = answer if target is None else np.asarray(target)
  size = math.isqrt(len(tokens))
  side = len(picture) // size
  squares = picture.reshape(size, side, size, side, 3).swapaxes(1, 2)
  squares = squares.reshape(size * size, side, side, 3)
  middle = np.arange(side) - (side - 1) / 2
  radius = np.hypot(middle[:, None], middle[None]) / side
  dot, ring = radius < 0.28, (0.3 < radius) & (radius < 0.48)
  for square in np.flatnonzero((answer == _PATH) | (answer != target)):
    pixels = squares[square]
    right = answer[square] == target[square]
    if answer[square] == _PATH:
      pixels[dot] = _ORANGE if right else _WRONG
    elif target[square] == _PATH and answer[square] == _OPEN:
      pixels[:] = _MISSED
    else:
      pixels[ring] = _WRONG
  squares = squares.reshape(size, size, side, side, 3).swapaxes(1, 2)
  return squares.reshape(picture.shape)
