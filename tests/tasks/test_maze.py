"""Mazes: routes against a plain search, held-out walls, symmetry, loss."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _mazes, _splits, maze

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
WALL, OPEN, START, GOAL = range(4)


def grid_of(tokens):
  side = int(len(tokens) ** 0.5)
  return np.asarray(tokens).reshape(side, side)


def carve(count, size, branching=0.1, loops=0.0):
  return _mazes.carve(
    _splits.generator(0), count, size, branching=branching, loops=loops
  )


def distances(grid, origin):
  """Breadth-first search, square by square."""
  found, queue = {origin: 0}, collections.deque([origin])
  while queue:
    row, column = queue.popleft()
    for down, right in STEPS:
      there = (row + down, column + right)
      if grid[there] != WALL and there not in found:
        found[there] = found[row, column] + 1
        queue.append(there)
  return found


def where(grid, token):
  ((row, column),) = np.argwhere(grid == token).tolist()
  return row, column


def walk(grid, moves):
  """Squares visited, the start first; None if a wall is in the way."""
  squares = [where(grid, START)]
  for move in moves:
    down, right = (*STEPS, (0, 0))[move]
    squares.append((squares[-1][0] + down, squares[-1][1] + right))
    if grid[squares[-1]] == WALL:
      return None
  return squares


def is_shortest(grid, moves):
  """The plain meaning of `solved`."""
  length = distances(grid, where(grid, START))[where(grid, GOAL)]
  squares = walk(grid, moves)
  return squares is not None and all(
    x == where(grid, GOAL) for x in squares[length:]
  )


def shortest_routes(grid):
  """All of them, as lists of moves."""
  to_goal = distances(grid, where(grid, GOAL))

  def routes(square):
    if to_goal[square] == 0:
      yield []
    for move, (down, right) in enumerate(STEPS):
      there = (square[0] + down, square[1] + right)
      if to_goal.get(there, np.inf) == to_goal[square] - 1:
        for rest in routes(there):
          yield [move, *rest]

  return list(routes(where(grid, START)))


@pytest.mark.parametrize(
  ('size', 'loops'), [(5, 0.0), (9, 0.0), (9, 0.5), (15, 0.1)]
)
def test_routes_are_shortest(size, loops):
  task = maze.make(size=size, loops=loops)
  for split in ('train', 'test'):
    batch = task.batch(split, 0, 50)
    for tokens, moves in zip(batch['inputs'], batch['targets'], strict=True):
      assert is_shortest(grid_of(tokens), moves)
      length = (moves != 4).sum()
      assert 1 <= length <= task.spec.answer[0]
      assert (moves[length:] == 4).all()


@pytest.mark.parametrize('branching', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('size', [5, 7, 9, 21])
def test_perfect_mazes_are_trees(size, branching):
  """All cells hang together by as many passages as a tree has."""
  cells = ((size - 1) // 2) ** 2
  open_BX = carve(40, size, branching=branching)
  assert (open_BX.sum(axis=1) == 2 * cells - 1).all()
  for row in open_BX:
    grid = grid_of(row).astype(int)
    assert grid[1::2, 1::2].all()
    assert not grid[0].any() and not grid[:, -1].any()
    assert len(distances(grid, (1, 1))) == 2 * cells - 1


def test_loops_remove_that_share_of_walls():
  open_BX = carve(400, 9, loops=0.3)
  # 24 walls lie between neighbouring cells, a tree opens 15 of them.
  removed = open_BX.sum(axis=1) - 31
  assert abs(removed.mean() / 9 - 0.3) < 0.03
  assert not open_BX.reshape(-1, 9, 9)[:, ::2, ::2].any()


def test_all_small_mazes_are_drawn():
  """A 3 x 3 grid of cells has 192 spanning trees."""
  open_BX = carve(20_000, 7, branching=0.5)
  assert len(np.unique(open_BX, axis=0)) == 192


def canonical(grid):
  turned = [np.rot90(x, k) for x in (grid, grid.T) for k in range(4)]
  return min(x.tobytes() for x in turned)


@pytest.mark.parametrize(
  ('size', 'loops'), [(5, 0.0), (7, 0.0), (9, 0.0), (9, 0.3)]
)
def test_splits_share_no_maze_in_any_orientation(size, loops):
  task = maze.make(size=size, loops=loops, eval_size=500)
  seen = {}
  for split in ('train', 'validation', 'test'):
    tokens_BX = task.batch(split, 0, 500)['inputs']
    if size >= 9:
      tokens_BX = tokens_BX != WALL
    seen[split] = {canonical(grid_of(x).astype(np.int8)) for x in tokens_BX}
  assert not seen['train'] & (seen['validation'] | seen['test'])
  assert not seen['validation'] & seen['test']


def judge(task, batch, moves_BT):
  return task.loss(jax.nn.one_hot(moves_BT, 5), batch)[1]


def padded(moves, length):
  return list(moves) + [4] * (length - len(moves))


def test_solved_accepts_every_shortest_route():
  task = maze.make(size=7, loops=0.9, seed=2)
  (length,) = task.spec.answer
  batch = task.batch('train', 0, 30)
  routes = [shortest_routes(grid_of(tokens)) for tokens in batch['inputs']]
  assert sum(len(x) > 1 for x in routes) > 5
  row_R = np.repeat(np.arange(30), [len(x) for x in routes])
  moves_RT = np.array([padded(x, length) for some in routes for x in some])
  rows = {name: value[row_R] for name, value in batch.items()}
  assert judge(task, rows, moves_RT)['solved'].all()
  for b in range(30):
    preferred = min(routes[b], key=lambda moves: moves[::-1])
    assert padded(preferred, length) == batch['targets'][b].tolist()


def test_solved_rejects_what_a_plain_walk_rejects():
  task = maze.make(size=7, loops=0.3)
  batch = task.batch('train', 0, 300)
  rng = np.random.default_rng(0)
  moves_BT = batch['targets'].copy()
  # One move changed, or all of them random: some are other shortest routes.
  column_B = rng.integers(0, 5, 300)
  moves_BT[np.arange(300), column_B] = rng.integers(0, 5, 300)
  moves_BT[::10] = rng.integers(0, 5, moves_BT[::10].shape)
  wanted = [
    is_shortest(grid_of(x), m)
    for x, m in zip(batch['inputs'], moves_BT, strict=True)
  ]
  assert 20 < sum(wanted) < 280
  np.testing.assert_array_equal(judge(task, batch, moves_BT)['solved'], wanted)


def test_solved_rejects_detours_and_going_on():
  # S . G in a row, with a way on behind the goal.
  grid = np.zeros((5, 5), np.int32)
  grid[1, 1:4] = START, OPEN, GOAL
  grid[2, 3] = OPEN
  task = maze.make(size=5, route=6)
  right, left, down, up, stay = 3, 2, 1, 0, 4
  cases = {
    (right, right, stay, stay, stay, stay): 1,
    (right, right, down, stay, stay, stay): 0,
    (right, right, down, up, stay, stay): 0,
    (right, left, right, right, stay, stay): 0,
    (stay, right, right, stay, stay, stay): 0,
    (right, stay, stay, stay, stay, stay): 0,
    (down, right, right, up, stay, stay): 0,
    (up, up, up, up, up, up): 0,
  }
  count = len(cases)
  batch = {
    'inputs': np.repeat(grid.reshape(1, 25), count, 0),
    'targets': np.repeat(np.array([padded([right, right], 6)]), count, 0),
    'weight': np.ones(count, np.float32),
  }
  metrics = judge(task, batch, np.array(list(cases)))
  np.testing.assert_array_equal(metrics['solved'], list(cases.values()))


def test_augmented_routes_solve_augmented_mazes():
  task = maze.make(size=9, loops=0.2)
  batch = task.batch('train', 0, 200)
  augmented = jax.device_get(task.augment(jax.random.key(0), batch))
  kinds = collections.Counter()
  for b in range(200):
    before, after = (grid_of(x['inputs'][b]) for x in (batch, augmented))
    turned = [np.rot90(x, k) for x in (before, before.T) for k in range(4)]
    kinds[[np.array_equal(x, after) for x in turned].index(True)] += 1
    assert is_shortest(after, augmented['targets'][b])
  assert len(kinds) == 8
  np.testing.assert_array_equal(
    judge(task, augmented, augmented['targets'])['solved'], np.ones(200)
  )


def test_no_augmentation_is_the_identity():
  task = maze.make(augmentation='none')
  batch = task.batch('train', 0, 4)
  chex.assert_trees_all_equal(task.augment(jax.random.key(0), batch), batch)


@pytest.mark.parametrize('lookahead', [None, 1, 5])
def test_loss_matches_float64(lookahead):
  task = maze.make(size=7, lookahead=lookahead)
  batch = task.batch('train', 0, 40)
  (length,) = task.spec.answer
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(40, length, 5))
  # Right up to a place of its own in each row, so that prefixes differ.
  for b in range(40):
    known = np.arange(rng.integers(0, length + 1))
    logits[b, known, batch['targets'][b, known]] += 6
  loss_B, metrics_B = task.loss(jnp.asarray(logits, jnp.float32), batch)
  for b in range(40):
    targets = batch['targets'][b]
    right = logits[b].argmax(axis=1) == targets
    prefix = 0
    while prefix < length and right[prefix]:
      prefix += 1
    counted = length if lookahead is None else min(length, prefix + lookahead)
    losses = [
      np.log(np.exp(logits[b, t]).sum()) - logits[b, t, targets[t]]
      for t in range(counted)
    ]
    np.testing.assert_allclose(loss_B[b], np.mean(losses), rtol=1e-5)
    own = (targets != 4).sum()
    np.testing.assert_allclose(
      metrics_B['accuracy'][b], right[:own].mean(), rtol=1e-6
    )


def test_route_limits_the_distance():
  batch = maze.make(size=15, route=4).batch('train', 0, 300)
  lengths = (batch['targets'] != 4).sum(axis=1)
  assert set(lengths.tolist()) == {1, 2, 3, 4}


def test_symmetries_form_a_group():
  squares_GX, moves_GV = _mazes.symmetries(5)
  rows = {tuple(x) for x in squares_GX.tolist()}
  assert len(rows) == 8
  for a in squares_GX:
    for b in squares_GX:
      assert tuple(a[b].tolist()) in rows
  assert (np.sort(moves_GV, axis=1) == np.arange(5)[None, :]).all()


@pytest.mark.parametrize(
  'wrong',
  [
    {'size': 8},
    {'size': 3},
    {'route': 0},
    {'branching': 1.5},
    {'loops': 1.0},
    {'lookahead': 0},
    {'augmentation': 'flip'},
    {'eval_size': 0},
  ],
)
def test_errors_name_the_value(wrong):
  (name, value), *_ = wrong.items()
  with pytest.raises(UserError, match=f'{name} must be .* got {value!r}'):
    maze.make(**wrong)
