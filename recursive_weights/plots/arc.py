"""Grids of the Abstraction and Reasoning Corpus, as they are usually shown."""

import math

import numpy as np

_PAD, _END, _FIRST = range(3)
_SIDE = 8  # pixels of a square
_COLOURS = np.array(  # beyond, end marker, then the ten colours of the corpus
  [
    [0.93, 0.93, 0.93], [0.80, 0.80, 0.84],
    [0.00, 0.00, 0.00], [0.00, 0.45, 0.85], [1.00, 0.25, 0.21],
    [0.18, 0.80, 0.25], [1.00, 0.86, 0.00], [0.67, 0.67, 0.67],
    [0.94, 0.07, 0.75], [1.00, 0.52, 0.11], [0.50, 0.86, 1.00],
    [0.53, 0.05, 0.15],
  ]
)  # fmt: skip
_WRONG = np.array([1.0, 1.0, 1.0])


def canvas_picture(tokens, wrong=None) -> np.ndarray:
  """A canvas of tokens `[C^2]` as `[h, w, 3]` in [0, 1].

  Args:
    tokens: 0 beyond the grid, 1 an end marker, 2..11 colours.
    wrong: bool `[C^2]`, squares to mark by a white cross.
  """
  tokens = np.asarray(tokens)
  side = math.isqrt(len(tokens))
  squares = np.repeat(_COLOURS[tokens][:, None, None], _SIDE, axis=1)
  squares = np.repeat(squares, _SIDE, axis=2)
  if wrong is not None:
    cross = np.eye(_SIDE, dtype=bool)
    cross |= cross[::-1]
    squares[np.asarray(wrong)[:, None, None] & cross[None]] = _WRONG
  squares[:, -1] = squares[:, :, -1] = 0.35
  picture = squares.reshape(side, side, _SIDE, _SIDE, 3).swapaxes(1, 2)
  return picture.reshape(side * _SIDE, side * _SIDE, 3)


def answer_picture(tokens, answer, target) -> np.ndarray:
  """Input, answer and target side by side; wrong squares are crossed.

  What lies beyond the target and its end markers is not judged and not shown,
  nor is the part of the canvas that neither input nor target use.

  Args:
    tokens, answer, target: canvases `[C^2]`.
  """
  tokens, answer, target = (np.asarray(x) for x in (tokens, answer, target))
  side = math.isqrt(len(tokens))
  used = ((tokens != _PAD) | (target != _PAD)).reshape(side, side)
  extent = 1 + max(int(x.max()) for x in np.nonzero(used))
  tokens, answer, target = (
    x.reshape(side, side)[:extent, :extent].ravel()
    for x in (tokens, answer, target)
  )
  judged = target != _PAD
  canvases = (
    canvas_picture(tokens),
    canvas_picture(np.where(judged, answer, _PAD), judged & (answer != target)),
    canvas_picture(target),
  )
  gap = np.ones((len(canvases[0]), _SIDE, 3))
  return np.concatenate([canvases[0], gap, canvases[1], gap, canvases[2]], 1)
