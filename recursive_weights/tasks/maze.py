"""Shortest routes through mazes, answered as a whole list of moves.

Source: L. Darlow et al., Continuous Thought Machines, 2025, section on 2D
mazes: direct prediction of the moves, without a position embedding of the
answer, and a loss on the correct prefix and a few moves more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.plots.attention import maze_picture
from recursive_weights.tasks import _mazes, _splits
from recursive_weights.tasks._mazes import GOAL, START, STAY, WALL

TOKENS = 4  # wall, open, start, goal
MOVES = 5  # up, down, left, right, stay

_ROUNDS = 200  # of rejection, before the mazes are said to be too few


def make(
  *,
  seed: int = 0,
  size: int = 9,
  route: int | None = None,
  branching: float = 0.1,
  loops: float = 0.0,
  lookahead: int | None = 5,
  augmentation: str = 'dihedral',
  eval_size: int = 1024,
) -> interfaces.Task:
  """Give the moves of a shortest route from start to goal.

  Inputs are int32 tokens `[B, size^2]` in reading order: 0 wall, 1 open,
  2 start, 3 goal. Targets are int32 `[B, route]`: 0 up, 1 down, 2 left,
  3 right, then 4 stay to the end. Start and goal are open squares (junction
  or corridor), the goal uniform among those at most `route` moves away, so no
  route is truncated. Where loops make several routes shortest, the target is
  the one whose last moves come first in the order above; `solved` accepts all.

  A hash of the walls that is the same for a maze and its seven mirrored and
  turned versions decides the split, so training sees the held-out mazes in no
  orientation: 90 % train, 5 % validation, 5 % test. Sizes 5 and 7 have too few
  mazes (1 and 28 up to symmetry, without loops), so there the hash is of
  walls, start and goal. Held-out splits do not depend on the seed.

  Metrics: `accuracy`, the share of the route's own moves (not the padding)
  that equal the target's; `solved`, whether the predicted moves walk through
  open squares, are at the goal after the fewest possible moves, and stay.

  Args:
    seed: stream of training mazes.
    size: side of the maze with its outer walls, odd, at least 5.
    route: number of moves in an answer; by default
      `min(5 * size // 2, longest possible)`.
    branching: how often a maze goes on growing from a random earlier cell
      rather than from the newest one, in [0, 1]. 0 is depth-first search: the
      longest routes, but only 481 mazes of size 9 up to symmetry.
    loops: share of the walls between neighbouring cells of the perfect maze
      that is removed, in [0, 1).
    lookahead: the loss counts the correct prefix of an answer and this many
      moves more; None counts all moves.
    augmentation: 'dihedral' turns and mirrors each training maze at random,
      moves with it; 'none'.
    eval_size: number of mazes in each held-out split.

  Raises:
    UserError: an argument is out of range, or a split would be empty.
  """
  _splits.check_seed(seed)
  if size < 5 or size % 2 == 0:
    raise UserError(f'size must be odd and >= 5, got {size}')
  if route is None:
    cells = (size - 1) // 2
    route = min(5 * size // 2, 2 * (cells * cells - 1))
  if route < 1:
    raise UserError(f'route must be > 0, got {route}')
  if not 0 <= branching <= 1:
    raise UserError(f'branching must be in [0, 1], got {branching}')
  if not 0 <= loops < 1:
    raise UserError(f'loops must be in [0, 1), got {loops}')
  if lookahead is not None and lookahead < 1:
    raise UserError(f'lookahead must be > 0 or None, got {lookahead}')
  if augmentation not in ('dihedral', 'none'):
    raise UserError(
      f"augmentation must be 'dihedral' or 'none', got {augmentation!r}"
    )
  if eval_size < 1:
    raise UserError(f'eval_size must be > 0, got {eval_size}')

  carve = functools.partial(
    _mazes.carve, size=size, branching=branching, loops=loops
  )
  draw = functools.partial(_draw, carve=carve, size=size, route=route)
  squares_GX, moves_GV = _mazes.symmetries(size)

  @functools.cache
  def held_out(split):
    return draw(
      split, _splits.generator(0, _splits.NAMES.index(split)), eval_size
    )

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      stream = _splits.generator(seed, _splits.NAMES.index(split), index)
      tokens_BX, moves_BT = draw(split, stream, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(eval_size, index, size)
      tokens_BX, moves_BT = (x[rows_B] for x in held_out(split))
    return {
      'inputs': tokens_BX.astype(np.int32),
      'targets': moves_BT.astype(np.int32),
      'weight': weight_B,
    }

  def augment(key, batch):
    if augmentation == 'none':
      return batch
    tokens_BX, targets_BT = batch['inputs'], batch['targets']
    which_B = jax.random.randint(key, tokens_BX.shape[:1], 0, len(squares_GX))
    squares_BX = jnp.asarray(squares_GX)[which_B]
    moves_BV = jnp.asarray(moves_GV)[which_B]
    return {
      **batch,
      'inputs': jnp.take_along_axis(tokens_BX, squares_BX, axis=1),
      'targets': jnp.take_along_axis(moves_BV, targets_BT, axis=1),
    }

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct((size * size,), jnp.int32),
      answer=(route,),
      classes=MOVES,
      sizes={'train': None, 'validation': eval_size, 'test': eval_size},
      vocabulary=TOKENS,
    ),
    batch=batch,
    augment=augment,
    loss=functools.partial(_loss, size, lookahead),
    picture=lambda example: maze_picture(example['inputs']),
  )


def _loss(size, lookahead, answer, batch):
  """Mean cross-entropy over the counted moves of logits `[B, route, 5]`."""
  logits_BTV = answer.astype(jnp.float32)
  targets_BT = batch['targets']
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, targets_BT
  )
  moves_BT = jnp.argmax(logits_BTV, axis=-1)
  right_BT = (moves_BT == targets_BT).astype(jnp.float32)

  if lookahead is None:
    counted_BT = jnp.ones_like(loss_BT)
  else:
    prefix_B = jnp.cumprod(right_BT, axis=1).sum(axis=1)
    position_1T = jnp.arange(targets_BT.shape[1])[None, :]
    counted_BT = position_1T < prefix_B[:, None] + lookahead
    counted_BT = counted_BT.astype(jnp.float32)

  on_route_BT = (targets_BT != STAY).astype(jnp.float32)
  return (loss_BT * counted_BT).sum(axis=1) / counted_BT.sum(axis=1), {
    'accuracy': (right_BT * on_route_BT).sum(axis=1) / on_route_BT.sum(axis=1),
    'solved': _solved(size, moves_BT, batch).astype(jnp.float32),
  }


def _solved(size, moves_BT, batch):
  """Whether each row of moves is a shortest route, then stays.

  The target only tells how long a shortest route is.
  """
  tokens_BX, targets_BT = batch['inputs'], batch['targets']
  start_B1 = jnp.argmax(tokens_BX == START, axis=1)[:, None]
  length_B1 = (targets_BT != STAY).sum(axis=1, keepdims=True)
  steps_BT = jnp.asarray(_mazes.offsets(size))[moves_BT]
  # The border is wall, so whoever leaves the grid has stood on a wall before.
  square_BT = jnp.clip(
    start_B1 + jnp.cumsum(steps_BT, axis=1), 0, size * size - 1
  )
  token_BT = jnp.take_along_axis(tokens_BX, square_BT, axis=1)
  taken_1T = 1 + jnp.arange(moves_BT.shape[1])[None, :]
  fine_BT = jnp.where(taken_1T < length_B1, token_BT != WALL, token_BT == GOAL)
  return fine_BT.all(axis=1)


def _draw(split, stream, count, *, carve, size, route):
  """`count` mazes of a split: tokens `[B, size^2]` and moves `[B, route]`."""
  wanted = _splits.NAMES.index(split)
  hash_walls = size >= 9
  drawn, missing = [], count
  for _ in range(_ROUNDS):
    # Enough for one round most often, within 2,048 mazes of memory.
    many = missing * 21 if wanted else missing + missing // 8 + 4
    open_BX = carve(stream, min(many, 2048))
    if hash_walls:
      open_BX = open_BX[_mazes.of_split(open_BX, size, wanted)][:missing]
    tokens_BX, moves_BT = _mazes.place(stream, open_BX, size, route)
    if not hash_walls:
      inside_B = _mazes.of_split(tokens_BX, size, wanted)
      tokens_BX = tokens_BX[inside_B][:missing]
      moves_BT = moves_BT[inside_B][:missing]
    drawn.append((tokens_BX, moves_BT))
    missing -= len(tokens_BX)
    if not missing:
      tokens_BX, moves_BT = map(np.concatenate, zip(*drawn, strict=True))
      return tokens_BX, moves_BT
  raise UserError(
    f'size={size} and route={route} allow too few mazes to fill split '
    f'{split!r}; raise size or branching, or lower loops'
  )
