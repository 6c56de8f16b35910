"""Sudoku: an independent solver, symmetry, splits, rules, files, loss."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import (
  _splits,
  _sudoku,
  _sudoku_symmetry,
  sudoku,
)

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
SIZES = tuple(BOXES)
HARD = (  # of 21 clues, by A. Inkala, 2010
  '005300000800000020070010500400005300010070006003200080060500009004000030'
  '000009700'
)


def stream(number=0):
  return _splits.generator(number)


def cover(puzzle):
  """All solutions up to two, by exact cover with sets: Knuth's Algorithm X."""
  size = int(len(puzzle) ** 0.5)
  height, width = BOXES[size]

  def needs(row, column, digit):
    box = (row // height, column // width)
    places = ('cell', row, column), ('row', row, digit)
    return (*places, ('column', column, digit), ('box', box, digit))

  choices = {
    key: needs(*key) for key in itertools.product(range(size), repeat=3)
  }
  left = {}
  for key, items in choices.items():
    for item in items:
      left.setdefault(item, set()).add(key)

  def take(key):
    removed = []
    for item in choices[key]:
      for other in left[item]:
        for that in choices[other]:
          if that != item:
            left[that].discard(other)
      removed.append(left.pop(item))
    return removed

  def give_back(key, removed):
    for item in reversed(choices[key]):
      left[item] = removed.pop()
      for other in left[item]:
        for that in choices[other]:
          if that != item:
            left[that].add(other)

  def search(chosen):
    if not left:
      grid = np.zeros((size, size), int)
      for row, column, digit in chosen:
        grid[row, column] = digit + 1
      yield grid.ravel()
      return
    item = min(left, key=lambda name: len(left[name]))
    for key in list(left[item]):
      removed = take(key)
      yield from search([*chosen, key])
      give_back(key, removed)

  given = []
  for cell, digit in enumerate(puzzle):
    if digit:
      key = (cell // size, cell % size, int(digit) - 1)
      if any(item not in left for item in choices[key]):
        return []
      take(key)
      given.append(key)
  return list(itertools.islice(search(given), 2))


def obeys(grid):
  """The rules, cell by cell."""
  size = int(len(grid) ** 0.5)
  height, width = BOXES[size]
  seen = set()
  for cell, digit in enumerate(grid):
    row, column = divmod(cell, size)
    box = (row // height, column // width)
    seen |= {('r', row, digit), ('c', column, digit), ('b', *box, digit)}
  return len(seen) == 3 * size * size and set(grid) == set(range(1, size + 1))


def rearrange(grids_BX, rng, digits=True):
  """An equivalent grid, by a loop over the kinds of symmetries."""
  size = int(grids_BX.shape[1] ** 0.5)
  grid = grids_BX.reshape(-1, size, size)
  for axis, part in zip((1, 2), BOXES[size], strict=True):
    order = np.concatenate(
      [i * part + rng.permutation(part) for i in rng.permutation(size // part)]
    )
    grid = np.take(grid, order, axis)
  if size != 6 and rng.random() < 0.5:
    grid = grid.swapaxes(1, 2)
  names = np.concatenate([[0], 1 + rng.permutation(size)])
  return (names[grid] if digits else grid).reshape(grids_BX.shape)


@pytest.mark.parametrize('size', SIZES)
def test_generated_puzzles_have_one_solution(size):
  """By a second solver of another kind."""
  task = sudoku.make(size=size, train_size=40, eval_size=12)
  low, high = sudoku._CLUES[size]
  for split, count in (('train', 40), ('validation', 12), ('test', 12)):
    batch = task.batch(split, 0, count)
    clues_B = (batch['inputs'] > 0).sum(axis=1)
    assert clues_B.min() >= low and clues_B.max() <= high
    rows = zip(batch['inputs'][:12], batch['targets'][:12], strict=True)
    for puzzle, answer in rows:
      (solution,) = cover(puzzle)
      np.testing.assert_array_equal(solution, answer + 1)
      assert obeys(solution)


@pytest.mark.parametrize('size', SIZES)
def test_solvers_agree_on_how_many_solutions(size):
  """Unique puzzles with a clue less or a wrong clue: none, one or several."""
  rng = np.random.default_rng(0)
  solutions_BX = _sudoku.complete(stream(), 30, size)
  puzzles_BX = _sudoku.dig(
    stream(), solutions_BX, solutions_BX, np.zeros(30, int)
  )
  for row, puzzle in enumerate(puzzles_BX):
    cell = rng.choice(np.flatnonzero(puzzle))
    puzzle[cell] = 0 if row % 2 else puzzle[cell] % size + 1
  found_BX, count_B, _ = _sudoku.solve(puzzles_BX)
  assert {0, 2} <= set(count_B.tolist())
  for puzzle, solution, count in zip(
    puzzles_BX, found_BX, count_B, strict=True
  ):
    known = cover(puzzle)
    assert len(known) == count
    if count:
      assert obeys(solution) and (puzzle == solution)[puzzle > 0].all()
    if count == 1:
      np.testing.assert_array_equal(solution, known[0])


def test_minimal_puzzles_have_no_clue_to_spare():
  solutions_BX = _sudoku.complete(stream(), 3, 6)
  for puzzle in _sudoku.dig(
    stream(), solutions_BX, solutions_BX, np.zeros(3, int)
  ):
    for cell in np.flatnonzero(puzzle):
      less = puzzle.copy()
      less[cell] = 0
      assert len(cover(less)) == 2


def test_walks_keep_the_solution_and_the_difficulty():
  solutions_BX = _sudoku.complete(stream(), 8, 9)
  none_B = np.zeros(8, int)
  puzzles_BX = _sudoku.dig(stream(), solutions_BX, solutions_BX, none_B)
  hard_B = _sudoku.solve(puzzles_BX)[2]
  assert (hard_B > 0).any()
  walk_SBX = _sudoku.vicinity(
    stream(1), puzzles_BX, solutions_BX, steps=4, share=0.5
  )
  assert walk_SBX.shape == (4, 8, 81)
  moved = 0
  for near_BX in walk_SBX:
    found_BX, count_B, guesses_B = _sudoku.solve(near_BX)
    assert (count_B == 1).all()
    np.testing.assert_array_equal(found_BX, solutions_BX)
    assert (guesses_B >= 0.5 * hard_B).all()
    moved += (near_BX != puzzles_BX).any(axis=1).sum()
  assert moved > 8
  near = next(
    x for x, y in zip(near_BX, puzzles_BX, strict=True) if (x != y).any()
  )
  for cell in np.flatnonzero(near):
    less = near.copy()
    less[cell] = 0
    assert len(cover(less)) == 2


def test_guesses_rate_a_puzzle_and_not_its_neighbours():
  easy = _sudoku.complete(stream(), 1, 9)
  easy[0, :9] = 0
  hard = np.array([[int(c) for c in HARD]], np.uint8)
  _, count_B, guesses_B = _sudoku.solve(np.concatenate([easy, hard, easy]))
  assert count_B.tolist() == [1, 1, 1]
  assert guesses_B[0] == guesses_B[2] == 0 < 10 < guesses_B[1]
  assert _sudoku.solve(hard)[2][0] == guesses_B[1]


def test_hard_puzzles_can_be_asked_for():
  task = sudoku.make(
    size=9, clues=(17, 17), guesses=2, train_size=30, eval_size=10
  )
  puzzles_BX = task.batch('test', 0, 10)['inputs']
  _, count_B, guesses_B = _sudoku.solve(puzzles_BX)
  assert (count_B == 1).all() and (guesses_B >= 2).all()


def test_an_empty_grid_has_several_solutions():
  found_BX, count_B, _ = _sudoku.solve(np.zeros((1, 81), np.uint8))
  assert count_B[0] == 2 and obeys(found_BX[0])


def test_all_small_grids_are_drawn():
  """There are 288 grids of size 4."""
  grids_BX = _sudoku.complete(stream(), 5000, 4)
  assert len(np.unique(grids_BX, axis=0)) == 288
  assert all(obeys(x) for x in grids_BX[:50])


@pytest.mark.parametrize('size', SIZES)
def test_solved_is_the_rules(size):
  grids_BX = _sudoku.complete(stream(), 60, size)
  rng = np.random.default_rng(0)
  for grid in grids_BX[::2]:  # exchange two cells, or change one
    a, b = rng.choice(size * size, 2, replace=False)
    grid[[a, b]] = grid[[b, a]]
  grids_BX[1, 3] = 0
  wanted = [obeys(x) for x in grids_BX]
  assert 0 < sum(wanted) < 60
  np.testing.assert_array_equal(_sudoku.solved(grids_BX), wanted)


@pytest.mark.parametrize('size', SIZES)
def test_equivalent_grids_share_a_hash(size):
  rng = np.random.default_rng(0)
  grids_BX = _sudoku.complete(stream(), 200, size)
  hash_B = _sudoku_symmetry.hash_solutions(grids_BX)
  for _ in range(10):
    other_BX = rearrange(grids_BX, rng)
    assert not np.array_equal(grids_BX, other_BX)
    np.testing.assert_array_equal(
      _sudoku_symmetry.hash_solutions(other_BX), hash_B
    )
  # There are 2 and 49 classes of sizes 4 and 6; hardly two of size 9 meet.
  classes = len(np.unique(hash_B))
  assert {4: classes == 2, 6: 25 < classes <= 49, 9: classes > 198}[size]


def test_equivalent_small_puzzles_share_a_hash():
  rng = np.random.default_rng(0)
  grids_BX = _sudoku.complete(stream(), 60, 4)
  puzzles_BX = _sudoku.dig(stream(), grids_BX, grids_BX, rng.integers(4, 9, 60))
  hash_B = _sudoku_symmetry.hash_puzzles(puzzles_BX)
  for _ in range(10):
    np.testing.assert_array_equal(
      _sudoku_symmetry.hash_puzzles(rearrange(puzzles_BX, rng)), hash_B
    )
  # Other numbers of clues are never equivalent.
  clues_B = (puzzles_BX > 0).sum(axis=1)
  for value in np.unique(hash_B):
    assert len(set(clues_B[hash_B == value])) == 1
  assert len(np.unique(hash_B)) > 40


def test_all_positions_are_symmetries():
  for size, count in ((4, 128), (6, 3456)):
    cells_GX = _sudoku_symmetry.positions(size)
    assert len(np.unique(cells_GX, axis=0)) == count
    grid = _sudoku.complete(stream(), 1, size)[0]
    assert all(obeys(grid[x]) for x in cells_GX[:: count // 64])


@pytest.mark.parametrize('size', SIZES)
def test_splits_share_no_puzzle_in_any_guise(size):
  task = sudoku.make(size=size, train_size=300, eval_size=40)
  seen = {}
  for split in ('train', 'validation', 'test'):
    batch = task.batch(split, 0, task.spec.sizes[split])
    assert len(np.unique(batch['inputs'], axis=0)) == len(batch['inputs'])
    if size == 4:
      hash_B = _sudoku_symmetry.hash_puzzles(batch['inputs'].astype(np.uint8))
    else:
      hash_B = _sudoku_symmetry.hash_solutions(batch['targets'] + 1)
    seen[split] = set(hash_B.tolist())
  assert not seen['train'] & (seen['validation'] | seen['test'])
  assert not seen['validation'] & seen['test']
  assert size == 4 or len(seen['test']) > 1


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('digits', [True, False])
@pytest.mark.parametrize('positions', [True, False])
def test_augmented_puzzles_keep_their_answers(size, digits, positions):
  task = sudoku.make(
    size=size, train_size=40, eval_size=12, digits=digits, positions=positions
  )
  batch = task.batch('train', 0, 30)
  after = jax.device_get(jax.jit(task.augment)(jax.random.key(0), batch))
  changed = (after['targets'] != batch['targets']).any(axis=1)
  assert changed.mean() > 0.8 if digits or positions else not changed.any()
  for before, puzzle, answer in zip(
    batch['inputs'], after['inputs'], after['targets'], strict=True
  ):
    assert obeys(answer + 1)
    assert (puzzle == answer + 1)[puzzle > 0].all()
    assert (puzzle > 0).sum() == (before > 0).sum()
    if not positions:
      np.testing.assert_array_equal(puzzle > 0, before > 0)
    if not digits:
      np.testing.assert_array_equal(np.sort(puzzle), np.sort(before))
  if digits and positions:
    hashes = [
      _sudoku_symmetry.hash_solutions(x['targets'] + 1) for x in (batch, after)
    ]
    np.testing.assert_array_equal(*hashes)


def test_augmentation_reaches_every_arrangement():
  """All 128 rearrangements of size 4, each about as often as any other."""
  task = sudoku.make(size=4, digits=False)
  count = 12_800
  batch = {
    'inputs': np.tile(np.arange(16, dtype=np.int32), (count, 1)),
    'targets': np.zeros((count, 16), np.int32),
  }
  after_BX = np.asarray(task.augment(jax.random.key(1), batch)['inputs'])
  rows, often = np.unique(after_BX, axis=0, return_counts=True)
  wanted = {tuple(x) for x in _sudoku_symmetry.positions(4).tolist()}
  # Token 0 is a blank here, but it moves like any other.
  assert {tuple(x) for x in rows.tolist()} == wanted
  assert 50 < often.min() and often.max() < 160


@pytest.mark.parametrize('size', SIZES)
def test_metrics_and_loss_by_a_loop(size):
  task = sudoku.make(size=size, train_size=40, eval_size=12, loss='stablemax')
  batch = task.batch('test', 0, 12)
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(12, size * size, size)).astype(np.float32)
  # Right, but for rows 8 to 11; those of 4 to 7 are barely so.
  logits[:8] += 20 * np.eye(size, dtype=np.float32)[batch['targets'][:8]]
  wrong = np.argmin(logits[9], axis=-1)
  logits[9, 0, wrong[0]] += 99
  loss_B, metrics_B = task.loss(jnp.asarray(logits), batch)
  for b in range(12):
    a = logits[b].astype(np.float64)
    s = np.where(a >= 0, a + 1, 1 / (1 - np.minimum(a, 0)))
    p = np.take_along_axis(s, batch['targets'][b][:, None], 1)[:, 0] / s.sum(1)
    np.testing.assert_allclose(loss_B[b], -np.log(p).mean(), rtol=1e-5)
    answer = a.argmax(1)
    right = answer == batch['targets'][b]
    given = batch['inputs'][b]
    fine = obeys(answer + 1) and (given == answer + 1)[given > 0].all()
    np.testing.assert_allclose(
      metrics_B['accuracy'][b], right.mean(), rtol=1e-6
    )
    assert metrics_B['puzzle_accuracy'][b] == right.all()
    assert metrics_B['valid'][b] == fine
  assert metrics_B['valid'].sum() >= 8 > 12 - metrics_B['valid'].sum() > 0


def test_valid_needs_the_clues_and_not_the_target():
  """Another solved grid obeys the rules; it is valid where no clue says no."""
  task = sudoku.make(size=4)
  batch = task.batch('test', 0, 2)
  other = (batch['targets'] + 1) % 4
  answer = jax.nn.one_hot(other, 4)
  assert task.loss(answer, batch)[1]['valid'].tolist() == [0, 0]
  blank = batch | {'inputs': np.zeros_like(batch['inputs'])}
  metrics = task.loss(answer, blank)[1]
  assert metrics['valid'].tolist() == [1, 1]
  assert metrics['puzzle_accuracy'].tolist() == [0, 0]


def test_valid_looks_at_rows_columns_and_boxes():
  """Each grid breaks one kind of rule and keeps the two others."""
  cyclic = np.array([[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]])
  boxes = np.array([[0, 1, 0, 1], [2, 3, 2, 3], [1, 0, 1, 0], [3, 2, 3, 2]])
  fine = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [3, 2, 1, 0]])
  rows = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [0, 1, 2, 3], [2, 3, 0, 1]])
  grids = np.stack([cyclic, boxes, boxes.T, rows, rows.T, fine])
  answers = grids.reshape(-1, 16)
  batch = {'inputs': np.zeros_like(answers), 'targets': answers}
  valid_B = sudoku.make().loss(jax.nn.one_hot(answers, 4), batch)[1]['valid']
  assert valid_B.tolist() == [0, 0, 0, 0, 0, 1]
  assert [obeys(x + 1) for x in answers] == [False] * 5 + [True]


def text(row):
  return ''.join('.' if d == 0 else str(d) for d in row)


def write(path, rows, header='source,question,answer,rating'):
  lines = [header, *(f'here,{q},{a},1' for q, a in rows)]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def pairs():
  solutions_BX = _sudoku.complete(stream(3), 6, 4)
  puzzles_BX = _sudoku.dig(
    stream(3), solutions_BX, solutions_BX, np.zeros(6, int)
  )
  return [
    (text(q), text(a)) for q, a in zip(puzzles_BX, solutions_BX, strict=True)
  ]


def from_files(folder, rows, **fields):
  path = write(folder / 'puzzles.csv', rows)
  paths = dict.fromkeys(('train_path', 'validation_path', 'test_path'), path)
  return sudoku.make(size=4, **(paths | fields))


@pytest.mark.parametrize('check_unique', [True, False])
def test_files_give_their_puzzles_in_order(tmp_path, pairs, check_unique):
  rows = list(pairs)
  rows[1] = (rows[1][0].replace('.', '0'), '')
  task = from_files(tmp_path, rows, limits=(2, 0, 3), check_unique=check_unique)
  assert task.spec.sizes == {'train': 2, 'validation': 6, 'test': 3}
  batch = task.batch('validation', 0, 6)
  for row, (question, answer) in enumerate(pairs):
    assert text(batch['inputs'][row]) == question
    assert text(batch['targets'][row] + 1) == answer


def test_files_saved_by_spreadsheets_are_read(tmp_path, pairs):
  """A byte order mark before a column's name, and blanks around others."""
  path = tmp_path / 'saved.csv'
  rows = [f'{q},{a}' for q, a in pairs]
  path.write_text('\n'.join(['question , answer', *rows]), encoding='utf-8-sig')
  paths = ('train_path', 'validation_path', 'test_path')
  task = sudoku.make(size=4, **dict.fromkeys(paths, str(path)))
  batch = task.batch('test', 0, len(pairs))
  assert [text(row) for row in batch['inputs']] == [q for q, _ in pairs]
  assert [text(row + 1) for row in batch['targets']] == [a for _, a in pairs]


def test_data_hash_is_of_the_data(tmp_path, pairs):
  one = from_files(tmp_path, pairs)
  same = from_files(tmp_path, pairs, seed=4)
  other = from_files(tmp_path, pairs[1:])
  assert one.data_hash == same.data_hash
  assert set(one.data_hash) == {'train', 'validation', 'test'}
  assert one.data_hash['train'] != other.data_hash['train']
  assert other.spec.sizes['train'] == 5  # the file changed and is read again
  made = [sudoku.make(seed=s, digits=bool(s)).data_hash for s in (0, 1)]
  assert made[0] == made[1] != sudoku.make(train_size=50).data_hash


def broken(pairs, kind):
  rows = list(pairs)
  question, answer = rows[2]
  first = next(i for i, c in enumerate(question) if c != '.')
  rows[2] = {
    'short': (question[:-1], answer),
    'character': ('x' + question[1:], answer),
    'unicode': ('½' + question[1:], answer),
    'large digit': ('5' + question[1:], answer),
    'answer': (question, answer[:-1] + '.'),
    'rules': (question, answer[::-1][1:] + answer[0]),
    'clues': (question, answer.translate(str.maketrans('1234', '2341'))),
    'ambiguous': (question[:first] + '.' + question[first + 1 :], answer),
    # The fourth cell sees three digits beside it and the last below it.
    'unsolvable': (answer[:3] + '.' * 4 + answer[3] + '.' * 8, ''),
  }[kind]
  return rows


@pytest.mark.parametrize(
  ('kind', 'problem'),
  [
    ('short', 'question must have 16 characters, got 15'),
    ('character', "question must have characters among '.1234', got 'x'"),
    ('unicode', "question must have characters among '.1234', got '½'"),
    ('large digit', "question must have characters among '.1234', got '5'"),
    ('answer', 'answer must hold every digit once'),
    ('rules', 'answer must hold every digit once'),
    ('clues', 'answer must keep the digits given'),
    ('ambiguous', 'puzzle must have one solution, got several'),
    ('unsolvable', 'puzzle must have one solution, got none'),
  ],
)
def test_bad_rows_are_named(tmp_path, pairs, kind, problem):
  with pytest.raises(UserError) as error:
    from_files(tmp_path, broken(pairs, kind))
  assert f'puzzles.csv, line 4: {problem}' in str(error.value)


def test_uniqueness_is_checked_where_asked(tmp_path, pairs):
  rows = broken(pairs, 'ambiguous')
  assert from_files(tmp_path, rows, check_unique=False).spec.sizes['test'] == 6
  assert from_files(tmp_path, rows, limits=(2, 2, 2)).spec.sizes['test'] == 2


def test_a_test_file_may_stand_alone(tmp_path, pairs):
  """As `eval.py --config.task.test_path=FILE` wants it."""
  whole = from_files(tmp_path, pairs)
  path = str(tmp_path / 'puzzles.csv')
  task = sudoku.make(size=4, train_size=2, eval_size=3, test_path=path)
  assert task.spec.sizes == whole.spec.sizes | {'train': 2, 'validation': 3}
  chex.assert_trees_all_equal(
    task.batch('test', 0, 4), whole.batch('test', 0, 4)
  )


def test_bad_files_are_named(tmp_path, pairs):
  with pytest.raises(UserError, match='cannot read /none'):
    sudoku.make(train_path='/none', validation_path='/none', test_path='/none')
  with pytest.raises(UserError, match='test_path must be given too'):
    sudoku.make(train_path='/none')
  with pytest.raises(UserError, match='at least one puzzle, got none'):
    from_files(tmp_path, [])
  path = tmp_path / 'bad.csv'
  path.write_text('question,solution\n')
  with pytest.raises(UserError, match='line 1: columns must include'):
    sudoku.make(**dict.fromkeys(
      ('train_path', 'validation_path', 'test_path'), str(path)
    ))  # fmt: skip
  path.write_text('question,answer\n12,34\n12\n')
  with pytest.raises(UserError, match='line 3: row must have 2 columns, got 1'):
    sudoku.make(**dict.fromkeys(
      ('train_path', 'validation_path', 'test_path'), str(path)
    ))  # fmt: skip


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'size': 5}, 'size must be 4, 6 or 9, got 5'),
    ({'loss': 'mse'}, "loss must be one of .* got 'mse'"),
    ({'clues': (9, 3)}, r'clues must be .* got \(9, 3\)'),
    ({'guesses': -1}, 'guesses must be >= 0, got -1'),
    ({'guesses': 3}, 'guesses=3 allow too few puzzles'),  # size 4 needs none
    ({'eval_size': 0}, 'eval_size must be > 0, got 4096 and 0'),
    ({'limits': (1, 2)}, r'limits must be three numbers >= 0, got \(1, 2\)'),
    ({'clues': (15, 15), 'eval_size': 9999}, 'too few puzzles'),
  ],
)
def test_errors_name_the_value(wrong, message):
  with pytest.raises(UserError, match=message):
    sudoku.make(**wrong)


def test_drawing_marks_mistakes():
  task = sudoku.make()
  batch = task.batch('test', 0, 1)
  example = {name: x[0] for name, x in batch.items()}
  right = example['targets']
  wrong = right.copy()
  blank = int(np.flatnonzero(example['inputs'] == 0)[0])
  wrong[blank] = (wrong[blank] + 1) % 4
  plain, answered, mistaken = (
    task.picture(example),
    task.drawing(example, right),
    task.drawing(example, wrong),
  )
  assert plain.shape == answered.shape == (128, 128, 3)

  def changed(a, b):
    return np.argwhere((a != b).any(axis=-1)) // 32

  cells = {tuple(x) for x in changed(answered, mistaken).tolist()}
  assert cells == {divmod(blank, 4)}
  blanks = {tuple(x) for x in changed(plain, answered).tolist()}
  assert blanks == {
    divmod(c, 4) for c in np.flatnonzero(example['inputs'] == 0)
  }
