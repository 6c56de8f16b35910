"""Sudoku of sizes 4, 6 and 9, from our generator or from files of puzzles.

Source: G. Wang et al., Hierarchical Reasoning Model, 2025, and A.
Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny Networks, 2025
(arXiv 2510.04871): all cells are answered, given ones too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.plots.sudoku import sudoku_picture
from recursive_weights.tasks import (
  _losses,
  _puzzle_files,
  _splits,
  _sudoku,
  _sudoku_symmetry,
)

# Fewest and most clues of a generated puzzle.
_CLUES = {4: (4, 8), 6: (8, 14), 9: (17, 30)}
_FRESH = 0.02  # of generated puzzles are new, or the split is too small


def make(
  *,
  seed: int = 0,
  size: int = 4,
  loss: str = 'softmax',
  digits: bool = True,
  positions: bool = True,
  clues: tuple[int, ...] = (),
  guesses: int = 0,
  train_size: int = 4096,
  eval_size: int = 512,
  train_path: str = '',
  validation_path: str = '',
  test_path: str = '',
  limits: tuple[int, int, int] = (0, 0, 0),
  check_unique: bool = True,
) -> interfaces.Task:
  """Fill a grid so that rows, columns and boxes hold every digit once.

  Inputs are int32 `[B, n^2]` in reading order: 0 blank, 1..n a given digit, so
  the vocabulary is n + 1. Targets are int32 `[B, n^2]`: digit d is class
  d - 1, for given cells too; the loss is over all cells. Boxes are 2 x 2, 2 x 3
  (two rows, three columns) and 3 x 3.

  Without paths, puzzles are generated: every one has one solution, proven by
  search. Cells are blanked in random order until a number of clues drawn from
  `clues` is left, or none can go. They depend on no seed. A hash decides the
  split, 90 % train, 5 % validation, 5 % test. Of sizes 6 and 9 it is of the
  solution and the same for equivalent grids (other names of digits, order of
  lines, or reflection), so no held-out solution is seen in training in any
  guise; of size 6 it tells 43 classes of grids apart, of which 35, 3 and 5 fall
  to the splits. Size 4 has only two classes (288 grids), so there the hash is
  of the puzzle, and no held-out puzzle is seen in any guise.

  With paths, each split is a CSV with a header and the columns `question` (`.`
  or 0 is blank) and `answer`, in the order of the file, and it is for who made
  the files to keep splits apart. Where an answer is empty the puzzle is solved.

  Metrics: `accuracy`, share of right cells; `puzzle_accuracy`, whether all are;
  `valid`, whether the answer obeys the rules and keeps the clues, found without
  the target. `data_hash` is SHA-256 of the files, or of generated puzzles.

  Args:
    seed: order of the training puzzles.
    size: n: 4, 6 or 9.
    loss: 'softmax' or 'stablemax', see `_losses.cross_entropy`.
    digits: `augment` gives the digits other names, n! ways.
    positions: `augment` exchanges bands and stacks, rows and columns inside
      them, and reflects in the diagonal where boxes are square.
    clues: fewest and most clues of generated puzzles; () for (4, 8), (8, 14) or
      (17, 30) by size. Puzzles with few are harder; below what a grid needs,
      a puzzle keeps as many as it needs.
    guesses: fewest guesses that the proof of a generated puzzle must need, see
      `_sudoku.search`; 0 for any puzzle.
    train_size: number of generated training puzzles; symmetries multiply them.
    eval_size: number of generated puzzles in each held-out split.
    train_path, validation_path, test_path: files; '' for generated ones. The
      first needs both others, a held-out one may stand alone (to evaluate).
    limits: rows to read of each of the three files, the first ones; 0 for all.
    check_unique: prove for puzzles from files that they have one solution;
      without, an answer that obeys the rules and keeps the clues is enough.

  Raises:
    UserError: an argument is out of range; or in a file a length or character
      is wrong, an answer is not one, or a puzzle has none or several (it names
      file and line).
  """
  _splits.check_seed(seed)
  _check_size(size)
  if loss not in _losses.KINDS:
    raise UserError(f'loss must be one of {_losses.KINDS}, got {loss!r}')
  clues = tuple(clues) or _CLUES[size]
  if len(clues) != 2 or not 0 <= clues[0] <= clues[1] <= size * size:
    raise UserError(
      f'clues must be (fewest, most) within [0, {size * size}], got {clues}'
    )
  if guesses < 0:
    raise UserError(f'guesses must be >= 0, got {guesses}')
  if train_size < 1 or eval_size < 1:
    raise UserError(
      f'train_size and eval_size must be > 0, got {train_size} and {eval_size}'
    )
  paths = (train_path, validation_path, test_path)
  _puzzle_files.check(paths, limits)

  counts = (train_size, eval_size, eval_size)
  data, data_hash = {}, {}
  for split, path, limit, count in zip(
    _splits.NAMES, paths, limits, counts, strict=True
  ):
    if path:
      data_hash[split] = _puzzle_files.sha256(path)
      data[split] = _read(path, data_hash[split], size, limit, check_unique)
    else:
      data[split] = _generate(size, clues, guesses, split, count)
      data_hash[split] = _puzzle_files.sha256(data[split])
  sizes: dict[str, int | None] = {k: len(x) for k, (x, _) in data.items()}

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      rows_B = _splits.without_end(seed, sizes[split], index, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    puzzles_BX, solutions_BX = (x[rows_B] for x in data[split])
    return {
      'inputs': puzzles_BX.astype(np.int32),
      'targets': solutions_BX.astype(np.int32) - 1,
      'weight': weight_B,
    }

  def augment(key, batch):
    digit_key, cell_key = jax.random.split(key)
    inputs_BX, targets_BX = batch['inputs'], batch['targets']
    rows = len(inputs_BX)
    if positions:
      cells_BX = _rearranged(cell_key, rows, size)
      inputs_BX = jnp.take_along_axis(inputs_BX, cells_BX, axis=1)
      targets_BX = jnp.take_along_axis(targets_BX, cells_BX, axis=1)
    if digits:
      name_BV = jax.random.uniform(digit_key, (rows, size)).argsort(axis=1)
      name_BV = name_BV.astype(jnp.int32)
      targets_BX = jnp.take_along_axis(name_BV, targets_BX, axis=1)
      inputs_BX = jnp.where(
        inputs_BX > 0,
        1 + jnp.take_along_axis(name_BV, jnp.maximum(inputs_BX - 1, 0), axis=1),
        0,
      )
    return {**batch, 'inputs': inputs_BX, 'targets': targets_BX}

  box = _sudoku.BOXES[size]
  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct((size * size,), jnp.int32),
      answer=(size * size,),
      classes=size,
      sizes=sizes,
      vocabulary=size + 1,
    ),
    batch=batch,
    augment=augment,
    loss=functools.partial(_loss, size, loss),
    picture=lambda example: sudoku_picture(example['inputs'], box),
    drawing=lambda example, answer: sudoku_picture(
      example['inputs'], box, answer + 1, example['targets'] + 1
    ),
    data_hash=data_hash,
  )


def _rearranged(key, count, size):
  """Random rearrangements of cells, int32 `[B, X]`; see `augment`."""
  height, width = _sudoku.BOXES[size]
  row_key, column_key, across_key = jax.random.split(key, 3)

  def lines(key, part):
    """Lines in an order that keeps parts of `part` lines together, `[B, n]`."""
    parts = size // part
    part_key, line_key = jax.random.split(key)
    part_BT = jax.random.uniform(part_key, (count, parts)).argsort(axis=1)
    line_BTT = jax.random.uniform(line_key, (count, parts, part)).argsort(2)
    return (part_BT[:, :, None] * part + line_BTT).reshape(count, size)

  rows_BT, columns_BT = lines(row_key, height), lines(column_key, width)
  cells_BTT = rows_BT[:, :, None] * size + columns_BT[:, None, :]
  if height == width:
    across_B = jax.random.bernoulli(across_key, 0.5, (count,))
    cells_BTT = jnp.where(
      across_B[:, None, None], cells_BTT.swapaxes(1, 2), cells_BTT
    )
  return cells_BTT.reshape(count, size * size).astype(jnp.int32)


def _loss(size, kind, answer, batch):
  """Mean cross-entropy over the cells of logits `[B, n^2, n]`."""
  logits_BXV = answer.astype(jnp.float32)
  targets_BX = batch['targets']
  loss_BX = _losses.cross_entropy(logits_BXV, targets_BX, kind)
  answer_BX = jnp.argmax(logits_BXV, axis=-1)
  right_BX = answer_BX == targets_BX
  return loss_BX.mean(axis=1), {
    'accuracy': right_BX.astype(jnp.float32).mean(axis=1),
    'puzzle_accuracy': right_BX.all(axis=1).astype(jnp.float32),
    'valid': _valid(size, answer_BX, batch['inputs']).astype(jnp.float32),
  }


def _valid(size, answer_BX, inputs_BX):
  """Whether each answer (classes) obeys the rules and keeps the clues."""
  height, width = _sudoku.BOXES[size]
  has_BXV = jax.nn.one_hot(answer_BX, size, dtype=jnp.int32)
  grid = has_BXV.reshape(-1, size, size, size)
  boxes = has_BXV.reshape(
    -1, size // height, height, size // width, width, size
  )
  units = (grid.sum(1), grid.sum(2), boxes.sum((2, 4)))
  fine = [(x == 1).reshape(len(answer_BX), -1).all(axis=1) for x in units]
  kept_BX = (inputs_BX == 0) | (inputs_BX == answer_BX + 1)
  return fine[0] & fine[1] & fine[2] & kept_BX.all(axis=1)


@functools.lru_cache(maxsize=16)
def _generate(size, clues, guesses, split, count):
  """Distinct puzzles of a split and their solutions, uint8 `[B, X]` each."""
  wanted = _splits.NAMES.index(split)
  stream = _splits.generator(0, wanted)
  by_puzzle = size == 4
  share = 0.9 if split == 'train' else 0.05
  pairs_BX = np.zeros((0, 2 * size * size), np.uint8)
  while len(pairs_BX) < count:
    before = len(pairs_BX)
    missing = count - before
    many = min(int(1.2 * missing / share) + 256, 20_000)
    solutions_BX = _sudoku.complete(stream, many, size)
    if not by_puzzle:
      hash_B = _sudoku_symmetry.hash_solutions(solutions_BX)
      # The upper half, since by it each split has several classes of size 6.
      inside_B = _splits.by_hash(hash_B >> np.uint64(32)) == wanted
      solutions_BX = solutions_BX[inside_B][: missing + missing // 8 + 1]
    clues_B = stream.integers(clues[0], clues[1] + 1, len(solutions_BX))
    puzzles_BX = _sudoku.dig(stream, solutions_BX, solutions_BX, clues_B)
    found_BX = np.concatenate([puzzles_BX, solutions_BX], axis=1)
    if guesses:
      hard_B = _sudoku.solve(puzzles_BX)[2] >= guesses
      found_BX, puzzles_BX = found_BX[hard_B], puzzles_BX[hard_B]
    if by_puzzle:
      hash_B = _sudoku_symmetry.hash_puzzles(puzzles_BX)
      found_BX = found_BX[_splits.by_hash(hash_B) == wanted]
    pairs_BX = np.concatenate([pairs_BX, found_BX])
    _, first_B = np.unique(
      pairs_BX[:, : size * size], axis=0, return_index=True
    )
    pairs_BX = pairs_BX[np.sort(first_B)]
    if len(pairs_BX) - before < _FRESH * min(missing, many * share):
      raise UserError(
        f'size={size}, clues={clues} and guesses={guesses} allow too few '
        f'puzzles for {count} in split {split!r}; ask for fewer puzzles, more '
        'clues or fewer guesses'
      )
  puzzles_BX, solutions_BX = np.split(pairs_BX[:count], 2, axis=1)
  return puzzles_BX, solutions_BX


def read(path: str, size: int = 9) -> tuple[np.ndarray, np.ndarray]:
  """Puzzles and solutions of a file, checked, uint8 `[B, X]` each; see `make`.

  Raises:
    UserError: as `make`.
  """
  _check_size(size)
  return _read(path, _puzzle_files.sha256(path), size, 0, True)


def _check_size(size):
  if size not in _sudoku.BOXES:
    raise UserError(f'size must be 4, 6 or 9, got {size}')


@functools.lru_cache(maxsize=16)
def _read(path, digest, size, limit, check_unique):
  """Puzzles and solutions of a file, checked, uint8 `[B, X]` each."""
  del digest  # a file that changed is read again
  rows = _puzzle_files.read(path, limit)
  known = '.123456789'[: size + 1]
  puzzles_BX, solutions_BX = (
    _puzzle_files.characters(
      rows, [x.replace('0', '.') for x in texts], size * size, known, what
    )
    for texts, what in (
      (rows.questions, 'question'),
      ([x or '.' * size * size for x in rows.answers], 'answer'),
    )
  )
  given_B = np.array([bool(x) for x in rows.answers])
  rows.check(
    given_B & ~_sudoku.solved(solutions_BX),
    'answer must hold every digit once in each row, column and box',
  )
  kept_BX = (puzzles_BX == 0) | (puzzles_BX == solutions_BX)
  rows.check(
    given_B & ~kept_BX.all(axis=1), 'answer must keep the digits given'
  )
  asked = np.arange(len(given_B)) if check_unique else np.flatnonzero(~given_B)
  found_BX, number_B, _ = _sudoku.solve(puzzles_BX[asked])
  for number, problem in ((0, 'none'), (2, 'several')):
    wrong_B = np.zeros(len(given_B), bool)
    wrong_B[asked] = number_B == number
    rows.check(wrong_B, f'puzzle must have one solution, got {problem}')
  solutions_BX[asked] = found_BX
  return puzzles_BX, solutions_BX
