"""Shortest paths through mazes, answered as a picture: every square again.

Source: G. Wang et al., Hierarchical Reasoning Model, 2025, and A.
Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny Networks, 2025
(arXiv 2510.04871): 30 x 30 mazes whose shortest path is longer than 110.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.plots.maze import path_picture
from recursive_weights.tasks import _losses, _mazes, _puzzle_files, _splits
from recursive_weights.tasks._mazes import GOAL, OPEN, PATH, START

TOKENS = 4  # wall, open, start, goal; PATH is a class only
_CHARACTERS = '# SGo'

_FRESH = 0.02  # of generated mazes are long enough, or they are too rare


def make(
  *,
  seed: int = 0,
  size: int = 10,
  min_path: int = 0,
  branching: float = 0.1,
  loops: float = 0.0,
  loss: str = 'softmax',
  augmentation: str = 'dihedral',
  train_size: int = 1000,
  eval_size: int = 256,
  train_path: str = '',
  validation_path: str = '',
  test_path: str = '',
  limits: tuple[int, int, int] = (0, 0, 0),
) -> interfaces.Task:
  """Draw a shortest path from start to goal into a maze.

  Inputs are int32 tokens `[B, size^2]` in reading order: 0 wall, 1 open,
  2 start, 3 goal. Targets are int32 `[B, size^2]`: the same, with 4 on the open
  squares of a shortest path. The loss is over all squares.

  Without paths, mazes are generated. They depend on no seed. They are perfect
  mazes with an outer wall, of which even sizes keep two sides; start and goal
  are open squares at least `min_path` moves apart. A hash of the walls that is
  the same for a maze and its seven mirrored and turned versions decides the
  split: 90 % train, 5 % validation, 5 % test.

  With paths, each split is a CSV with a header and the columns `question` (`#`
  wall, space open, S, G) and `answer` (the same with `o` on the path), in the
  order of the file, and it is for who made the files to keep splits apart.

  Metrics: `accuracy`, share of right squares; `puzzle_accuracy`, whether all
  are; `valid`, whether the answer is the maze with a shortest path, which need
  not be the target's where several are shortest. `data_hash` is SHA-256 of the
  files, or of generated mazes.

  Args:
    seed: order of the training mazes.
    size: side of the maze, at least 10 where generated.
    min_path: fewest moves from start to goal of generated mazes; 0 for
      `110 size^2 / 900`, which is 110 of size 30.
    branching, loops: see `tasks.maze`.
    loss: 'softmax' or 'stablemax', see `_losses.cross_entropy`.
    augmentation: 'dihedral' turns and mirrors each training maze at random;
      'none'.
    train_size, eval_size: numbers of generated mazes.
    train_path, validation_path, test_path: files; '' for generated ones. The
      first needs both others, a held-out one may stand alone (to evaluate).
    limits: rows to read of each of the three files, the first ones; 0 for all.

  Raises:
    UserError: an argument is out of range; or in a file a length or character
      is wrong, a maze has no path, or an answer is no shortest path (it names
      file and line).
  """
  _splits.check_seed(seed)
  if size < 2 or (size < 10 and not train_path):
    raise UserError(f'size must be >= 10, got {size}')
  if loss not in _losses.KINDS:
    raise UserError(f'loss must be one of {_losses.KINDS}, got {loss!r}')
  if min_path < 0:
    raise UserError(f'min_path must be >= 0, got {min_path}')
  if not 0 <= branching <= 1:
    raise UserError(f'branching must be in [0, 1], got {branching}')
  if not 0 <= loops < 1:
    raise UserError(f'loops must be in [0, 1), got {loops}')
  if augmentation not in ('dihedral', 'none'):
    raise UserError(
      f"augmentation must be 'dihedral' or 'none', got {augmentation!r}"
    )
  if train_size < 1 or eval_size < 1:
    raise UserError(
      f'train_size and eval_size must be > 0, got {train_size} and {eval_size}'
    )
  paths = (train_path, validation_path, test_path)
  _puzzle_files.check(paths, limits)
  counts = (train_size, eval_size, eval_size)
  fewest = min_path or 110 * size * size // 900
  data, data_hash = {}, {}
  for split, path, limit, count in zip(
    _splits.NAMES, paths, limits, counts, strict=True
  ):
    if path:
      data_hash[split] = _puzzle_files.sha256(path)
      data[split] = _read(path, data_hash[split], size, limit)
    else:
      data[split] = _generate(split, count, size, fewest, branching, loops)
      data_hash[split] = _puzzle_files.sha256(data[split])
  sizes: dict[str, int | None] = {k: len(x) for k, (x, _) in data.items()}
  squares_GX, _ = _mazes.symmetries(size)

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      rows_B = _splits.without_end(seed, sizes[split], index, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    tokens_BX, answers_BX = (x[rows_B] for x in data[split])
    return {
      'inputs': tokens_BX.astype(np.int32),
      'targets': answers_BX.astype(np.int32),
      'weight': weight_B,
    }

  def augment(key, batch):
    if augmentation == 'none':
      return batch
    rows = len(batch['inputs'])
    which_B = jax.random.randint(key, (rows,), 0, len(squares_GX))
    squares_BX = jnp.asarray(squares_GX)[which_B]
    return batch | {
      name: jnp.take_along_axis(batch[name], squares_BX, axis=1)
      for name in ('inputs', 'targets')
    }

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct((size * size,), jnp.int32),
      answer=(size * size,),
      classes=TOKENS + 1,
      sizes=sizes,
    ),
    batch=batch,
    augment=augment,
    loss=functools.partial(_loss, size, loss),
    picture=lambda example: path_picture(example['inputs']),
    drawing=lambda example, answer: path_picture(
      example['inputs'], answer, example['targets']
    ),
    data_hash=data_hash,
  )


def _loss(size, kind, answer, batch):
  """Mean cross-entropy over the squares of logits `[B, size^2, 5]`."""
  logits_BXV = answer.astype(jnp.float32)
  targets_BX = batch['targets']
  loss_BX = _losses.cross_entropy(logits_BXV, targets_BX, kind)
  answer_BX = jnp.argmax(logits_BXV, axis=-1)
  right_BX = answer_BX == targets_BX
  length_B = (targets_BX == PATH).sum(axis=1)
  valid_B = _is_path(jnp, size, answer_BX, batch['inputs'], length_B)
  return loss_BX.mean(axis=1), {
    'accuracy': right_BX.astype(jnp.float32).mean(axis=1),
    'puzzle_accuracy': right_BX.all(axis=1).astype(jnp.float32),
    'valid': valid_B.astype(jnp.float32),
  }


def _is_path(xp, size, answer_BX, tokens_BX, length_B):
  """Whether an answer is its maze with a path of `length_B` squares.

  Start, goal and path are a path if start and goal have one neighbour among
  them and every other square two: more squares could only form rings beside
  it. A shortest path has no short cut, so that holds for all of them, and as
  long as a shortest one there is no ring.

  Args:
    xp: numpy or jax.numpy.
  """
  path_BX = answer_BX == PATH
  kept_BX = xp.where(path_BX, tokens_BX == OPEN, answer_BX == tokens_BX)
  ends_BX = (tokens_BX == START) | (tokens_BX == GOAL)
  on = (path_BX | ends_BX).reshape(-1, size, size)
  beside = xp.pad(on, ((0, 0), (1, 1), (1, 1))).astype(xp.int32)
  neighbours_BX = (
    beside[:, 2:, 1:-1]
    + beside[:, :-2, 1:-1]
    + beside[:, 1:-1, 2:]
    + beside[:, 1:-1, :-2]
  ).reshape(answer_BX.shape)
  wanted_BX = xp.where(ends_BX, 1, 2)
  fine_BX = ~on.reshape(answer_BX.shape) | (neighbours_BX == wanted_BX)
  return (
    kept_BX.all(axis=1)
    & fine_BX.all(axis=1)
    & (path_BX.sum(axis=1) == length_B)
  )


@functools.lru_cache(maxsize=16)
def _generate(split, count, size, min_path, branching, loops):
  """Mazes of a split and their answers, uint8 `[B, size^2]` each."""
  wanted = _splits.NAMES.index(split)
  stream = _splits.generator(0, wanted)
  share = 0.9 if split == 'train' else 0.05
  side = size + 2 - (size % 2 == 0)  # with an outer wall all around
  inside = np.arange(side * side).reshape(side, side)
  inside = inside[1 : size + 1, 1 : size + 1].ravel()
  found, missing = [], count
  while missing > 0:
    many = min(int(1.2 * missing / share) + 64, 1024)
    open_BX = _mazes.carve(stream, many, side, branching=branching, loops=loops)
    open_BX = open_BX[_mazes.of_split(open_BX, side, wanted)]
    tokens_BX, answers_BX = _mazes.draw_path(stream, open_BX, side, min_path)
    found.append((tokens_BX[:, inside], answers_BX[:, inside]))
    missing -= len(tokens_BX)
    if len(tokens_BX) < _FRESH * many * share:
      raise UserError(
        f'min_path must be shorter: hardly a maze of size={size} with '
        f'branching={branching} and loops={loops} has one, got {min_path}'
      )
  tokens_BX, answers_BX = map(np.concatenate, zip(*found, strict=True))
  return tokens_BX[:count], answers_BX[:count]


@functools.lru_cache(maxsize=16)
def _read(path, digest, size, limit):
  """Mazes and answers of a file, checked, uint8 `[B, size^2]` each."""
  del digest  # a file that changed is read again
  rows = _puzzle_files.read(path, limit)
  for row, text in enumerate(rows.questions):
    if len(text) != size * size and math.isqrt(len(text)) ** 2 == len(text):
      side = math.isqrt(len(text))
      raise rows.error(
        row, f'maze must be {size} x {size} (task.size), got {side} x {side}'
      )
  tokens_BX = _puzzle_files.characters(
    rows, rows.questions, size * size, _CHARACTERS[:TOKENS], 'question'
  )
  answers_BX = _puzzle_files.characters(
    rows, rows.answers, size * size, _CHARACTERS, 'answer'
  )
  for token, name in ((START, 'S'), (GOAL, 'G')):
    number_B = (tokens_BX == token).sum(axis=1)
    rows.check(number_B != 1, f'maze must have one {name}')

  walled_BX = np.pad(
    tokens_BX.reshape(-1, size, size), ((0, 0), (1, 1), (1, 1))
  ).reshape(len(tokens_BX), -1)  # token 0 is a wall
  length_B = _mazes.shortest(walled_BX, size + 2)
  rows.check(length_B < 0, 'maze must have a path from S to G')
  fine_B = _is_path(np, size, answers_BX, tokens_BX, length_B - 1)
  rows.check(
    ~fine_B, 'answer must be the maze with o on the squares of a shortest path'
  )
  return tokens_BX, answers_BX
