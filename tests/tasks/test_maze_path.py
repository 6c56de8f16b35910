"""Mazes answered as pictures: a plain search, symmetry, splits, files."""

import collections

import jax
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import maze_path

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
WALL, OPEN, START, GOAL, PATH = range(5)
SMALL = {'train_size': 60, 'eval_size': 30}


def grid_of(row):
  side = int(len(row) ** 0.5)
  return np.asarray(row).reshape(side, side)


def distances(grid, origin):
  """Breadth-first search, square by square."""
  found, queue = {origin: 0}, collections.deque([origin])
  while queue:
    row, column = queue.popleft()
    for down, right in STEPS:
      there = (row + down, column + right)
      inside = min(there) >= 0 and max(there) < len(grid)
      if inside and grid[there] != WALL and there not in found:
        found[there] = found[row, column] + 1
        queue.append(there)
  return found


def where(grid, token):
  ((row, column),) = np.argwhere(grid == token).tolist()
  return row, column


def is_valid(tokens, answer):
  """By walking: from the start along the path, never back, to the goal."""
  grid, drawn = grid_of(tokens), grid_of(answer)
  if not np.array_equal(np.where(drawn == PATH, OPEN, drawn), grid):
    return False
  left = {tuple(x) for x in np.argwhere(drawn == PATH).tolist()}
  here, goal, walked = where(grid, START), where(grid, GOAL), 0
  while here != goal:
    around = [(here[0] + d, here[1] + r) for d, r in STEPS]
    there = [x for x in around if x in left or (x == goal and not left)]
    if len(there) != 1:
      return False
    (here,) = there
    left.discard(here)
    walked += 1
  return walked == distances(grid, where(grid, START))[goal]


def judge(task, batch, answers):
  return task.loss(jax.nn.one_hot(answers, 5), batch)[1]


@pytest.mark.parametrize(
  ('size', 'loops'), [(10, 0.0), (11, 0.0), (12, 0.4), (30, 0.0)]
)
def test_targets_are_shortest_paths(size, loops):
  task = maze_path.make(size=size, loops=loops, min_path=size, **SMALL)
  for split in ('train', 'test'):
    batch = task.batch(split, 0, 30)
    for tokens, answer in zip(batch['inputs'], batch['targets'], strict=True):
      assert is_valid(tokens, answer)
      assert (answer == PATH).sum() + 1 >= size
  walls = (grid_of(batch['inputs'][0]) == WALL).mean()
  assert 0.2 < walls < 0.6


def test_paths_of_size_30_are_as_long_as_published():
  batch = maze_path.make(size=30, **SMALL).batch('train', 0, 60)
  assert ((batch['targets'] == PATH).sum(axis=1) + 1).min() >= 110


def test_valid_is_what_a_walk_says():
  task = maze_path.make(size=10, loops=0.5, min_path=6, **SMALL)
  batch = task.batch('train', 0, 60)
  rng = np.random.default_rng(0)
  answers = batch['targets'].copy()
  for row in range(0, 60, 2):  # a square or two changed at random
    for square in rng.choice(100, rng.integers(1, 3), replace=False):
      answers[row, square] = rng.integers(0, 5)
  wanted = [
    is_valid(x, a) for x, a in zip(batch['inputs'], answers, strict=True)
  ]
  assert 30 <= sum(wanted) < 60
  np.testing.assert_array_equal(judge(task, batch, answers)['valid'], wanted)


def maze_of(*lines):
  return np.array([['# SGo'.index(c) for c in line] for line in lines]).ravel()


def test_other_shortest_paths_are_valid_and_not_equal():
  cases = {
    ('Soo', '  o', '  G'): (1, 1),
    ('S  ', 'o  ', 'ooG'): (1, 0),
    ('So ', ' oo', '  G'): (1, 0),
    ('S  ', '   ', '  G'): (0, 0),
    ('Soo', 'o o', 'ooG'): (0, 0),  # both ways at once
    ('So ', 'o o', ' oG'): (0, 0),  # not connected
    ('Soo', '  o', ' oG'): (0, 0),  # a square too many
    ('Soo', '# o', '  G'): (0, 0),  # a wall built
  }
  answers = np.array([maze_of(*lines) for lines in cases], np.int32)
  count = len(answers)
  batch = {
    'inputs': np.tile(maze_of('S  ', '   ', '  G'), (count, 1)),
    'targets': np.tile(maze_of('Soo', '  o', '  G'), (count, 1)),
  }
  # A loss is made for a size; files may have any.
  metrics = jax.device_get(
    maze_path._loss(3, 'softmax', jax.nn.one_hot(answers, 5), batch)[1]
  )
  for row, (valid, equal) in enumerate(cases.values()):
    assert metrics['valid'][row] == valid, row
    assert metrics['puzzle_accuracy'][row] == equal, row


@pytest.mark.parametrize(
  'lines',
  [
    ('SoooG', '     ', ' ooo ', ' o o ', ' ooo '),  # a ring beside the path
    ('S   G', 'ooooo', '     ', '     ', '     '),  # a detour
  ],
)
def test_more_squares_than_a_shortest_path_are_none(lines):
  batch = {
    'inputs': maze_of('S   G', *['     '] * 4)[None],
    'targets': maze_of('SoooG', *['     '] * 4)[None],
  }
  answer = jax.nn.one_hot(maze_of(*lines)[None], 5)
  metrics = maze_path._loss(5, 'softmax', answer, batch)[1]
  assert metrics['valid'].tolist() == [0]


def test_augmented_mazes_are_turned_with_their_answers():
  task = maze_path.make(**SMALL)
  batch = task.batch('train', 0, 60)
  after = jax.device_get(task.augment(jax.random.key(0), batch))
  kinds = collections.Counter()
  for row in range(60):
    turned = [
      [np.rot90(x, k) for x in (grid, grid.T) for k in range(4)]
      for grid in (grid_of(batch[n][row]) for n in ('inputs', 'targets'))
    ]
    same = [
      np.array_equal(a, grid_of(after['inputs'][row]))
      and np.array_equal(b, grid_of(after['targets'][row]))
      for a, b in zip(*turned, strict=True)
    ]
    kinds[same.index(True)] += 1
  assert len(kinds) == 8
  assert judge(task, after, after['targets'])['valid'].all()


def canonical(row):
  grid = (grid_of(row) == WALL).astype(np.int8)
  turned = [np.rot90(x, k) for x in (grid, grid.T) for k in range(4)]
  return min(x.tobytes() for x in turned)


@pytest.mark.parametrize('size', [10, 11])
def test_splits_share_no_maze_in_any_orientation(size):
  task = maze_path.make(size=size, train_size=400, eval_size=100)
  seen = {
    split: {canonical(x) for x in task.batch(split, 0, count)['inputs']}
    for split, count in task.spec.sizes.items()
  }
  assert not seen['train'] & (seen['validation'] | seen['test'])
  assert not seen['validation'] & seen['test']


def text(row):
  return ''.join('# SGo'[c] for c in row)


@pytest.fixture(scope='module')
def pairs():
  batch = maze_path.make(**SMALL).batch('test', 0, 5)
  return [
    (text(q), text(a))
    for q, a in zip(batch['inputs'], batch['targets'], strict=True)
  ]


def from_files(folder, rows, **fields):
  path = folder / 'mazes.csv'
  lines = ['source,question,answer,rating']
  lines += [f'here,{q},{a},1' for q, a in rows]
  path.write_text('\n'.join(lines) + '\n')
  paths = ('train_path', 'validation_path', 'test_path')
  return maze_path.make(**(dict.fromkeys(paths, str(path)) | fields))


def test_files_give_their_mazes_in_order(tmp_path, pairs):
  task = from_files(tmp_path, pairs, limits=(2, 0, 1))
  assert task.spec.sizes == {'train': 2, 'validation': 5, 'test': 1}
  batch = task.batch('validation', 0, 5)
  read = [
    (text(q), text(a))
    for q, a in zip(batch['inputs'], batch['targets'], strict=True)
  ]
  assert read == pairs
  assert task.data_hash != from_files(tmp_path, pairs[1:]).data_hash


def broken(pairs, kind):
  rows = list(pairs)
  question, answer = rows[2]
  step = answer.index('o')
  rows[2] = {
    'short': (question[:-1], answer),
    'size': (question[:81], answer[:81]),
    'character': ('x' + question[1:], answer),
    'no start': (question.replace('S', ' '), answer),
    'two goals': (question.replace(' ', 'G', 1), answer),
    'no path': tuple(
      x[:step] + '#' + x[step + 1 :] for x in (question, answer)
    ),
    'answer': (question, answer[:step] + ' ' + answer[step + 1 :]),
    'another maze': (question, pairs[1][1]),
  }[kind]
  return rows


@pytest.mark.parametrize(
  ('kind', 'problem'),
  [
    ('short', 'question must have 100 characters, got 99'),
    ('size', r'maze must be 10 x 10 (task.size), got 9 x 9'),
    ('character', "question must have characters among '# SG', got 'x'"),
    ('no start', 'maze must have one S'),
    ('two goals', 'maze must have one G'),
    ('no path', 'maze must have a path from S to G'),
    ('answer', 'answer must be the maze with o on'),
    ('another maze', 'answer must be the maze with o on'),
  ],
)
def test_bad_rows_are_named(tmp_path, pairs, kind, problem):
  with pytest.raises(UserError) as error:
    from_files(tmp_path, broken(pairs, kind))
  assert f'mazes.csv, line 4: {problem}' in str(error.value)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'size': 9}, 'size must be >= 10, got 9'),
    ({'loss': 'mse'}, "loss must be one of .* got 'mse'"),
    ({'min_path': -1}, 'min_path must be >= 0, got -1'),
    ({'min_path': 99}, 'min_path must be shorter: .* got 99'),
    ({'branching': 2}, r'branching must be in \[0, 1\], got 2'),
    ({'loops': 1.0}, r'loops must be in \[0, 1\), got 1.0'),
    ({'augmentation': 'flip'}, "augmentation must be .* got 'flip'"),
    ({'train_size': 0}, 'train_size and eval_size must be > 0, got 0'),
  ],
)
def test_errors_name_the_value(wrong, message):
  with pytest.raises(UserError, match=message):
    maze_path.make(**wrong)


def test_drawing_marks_mistakes():
  task = maze_path.make(**SMALL)
  batch = task.batch('test', 0, 1)
  example = {name: x[0] for name, x in batch.items()}
  right = example['targets']
  path = np.flatnonzero(right == PATH)
  wrong = right.copy()
  wrong[path[0]] = OPEN
  wall = int(np.flatnonzero(right == WALL)[0])
  wrong[wall] = OPEN
  pictures = [
    task.picture(example),
    task.drawing(example, right),
    task.drawing(example, wrong),
  ]
  side = len(pictures[0]) // 10

  def changed(a, b):
    found = np.argwhere((a != b).any(axis=-1)) // side
    return {10 * row + column for row, column in found.tolist()}

  assert changed(*pictures[:2]) == set(path.tolist())
  assert changed(*pictures[1:]) == {int(path[0]), wall}
