"""A Sudoku as a person sees it: clues bold, answers light, mistakes red."""

import math

import numpy as np

_GLYPHS = {
  1: '00100 01100 00100 00100 00100 00100 01110',
  2: '01110 10001 00001 00110 01000 10000 11111',
  3: '01110 10001 00001 00110 00001 10001 01110',
  4: '00010 00110 01010 10010 11111 00010 00010',
  5: '11111 10000 11110 00001 00001 10001 01110',
  6: '01110 10000 10000 11110 10001 10001 01110',
  7: '11111 00001 00010 00010 00100 00100 00100',
  8: '01110 10001 10001 01110 10001 10001 01110',
  9: '01110 10001 10001 01111 00001 00001 01110',
}
_SIDE = 32  # pixels of a cell
_STROKE = 3  # pixels of a dot of a glyph

_INK = np.array([0.10, 0.11, 0.15])
_PEN = np.array([0.0, 0.45, 0.70])
_CLUE = np.array([0.91, 0.91, 0.90])
_WRONG = np.array([1.0, 0.72, 0.66])
_THIN = np.array([0.75, 0.75, 0.75])


def sudoku_picture(
  puzzle, box: tuple[int, int], answer=None, target=None
) -> np.ndarray:
  """A puzzle, and an answer to it where there is one, `[h, w, 3]` in [0, 1].

  Clues are bold on grey, answered cells blue. Cells that are not the target's
  have a red ground; a clue that an answer changed shows the answer.

  Args:
    puzzle: `[n^2]`, 0 blank, 1..n a clue.
    box: height and width of a box.
    answer: `[n^2]`, digits 1..n.
    target: `[n^2]`, digits 1..n.
  """
  puzzle = np.asarray(puzzle)
  size = math.isqrt(len(puzzle))
  shown = puzzle if answer is None else np.asarray(answer)
  squares = np.ones((size, size, _SIDE, _SIDE, 3))
  for cell in range(size * size):
    square = squares[cell // size, cell % size]
    clue = puzzle[cell] > 0 and puzzle[cell] == shown[cell]
    if clue:
      square[:] = _CLUE
    if target is not None and shown[cell] != np.asarray(target)[cell]:
      square[:] = _WRONG
    if shown[cell]:
      square[_glyph(int(shown[cell]), bool(clue))] = _INK if clue else _PEN
  picture = squares.swapaxes(1, 2).reshape(size * _SIDE, size * _SIDE, 3)
  # Lines between boxes come last, over the thin ones that they cross.
  for colour, half, thick in ((_THIN, 1, False), (_INK, 2, True)):
    for axis, part in enumerate(box):
      lines = picture.swapaxes(0, axis)
      for line in range(0, size + 1, part if thick else 1):
        lines[max(line * _SIDE - half, 0) : line * _SIDE + half] = colour
  return picture


def _glyph(digit, bold):
  """Where a digit puts ink in its cell, bool `[side, side]`."""
  dots = np.array([[c == '1' for c in row] for row in _GLYPHS[digit].split()])
  shape = np.kron(dots, np.ones((_STROKE, _STROKE), bool))
  inside = np.zeros((_SIDE, _SIDE), bool)
  top, left = ((_SIDE - side) // 2 for side in shape.shape)
  inside[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
  if bold:
    inside |= np.roll(inside, 1, axis=1) | np.roll(inside, -1, axis=1)
  return inside
