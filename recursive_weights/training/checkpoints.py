"""Checkpoints by orbax: whole, checked, with the config beside the weights.

`WORKDIR/checkpoints/STEP/` holds

  params/, ema/, carry/, rate/, rest/
                         arrays: parameters, their average, what passes from
                         batch to batch, the factor on the learning rate where
                         there is one, and optimizer state, step and key
  config/config.json     the whole config, readable
  about/about.json       step, metrics, and a digest of every array

Saves are asynchronous and atomic: a folder gets its name when all is written.
A checkpoint whose digest, tree or config is not what it should be is refused
with the reason, and the one before it is used. Slots that the next step empties
(`training.slots.empty_every`) are not saved; they come back as zeros.
"""

import contextlib
import json
import logging
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

from recursive_weights import config as config_lib
from recursive_weights.interfaces import Tree, UserError
from recursive_weights.training.state import State

_log = logging.getLogger(__name__)

# What makes two runs the same experiment. The rest (devices, intervals,
# length, time limit) may change between a run and its continuation.
IDENTITY = (
  'seed',
  'num_seeds',
  'rate_factors',
  'dtype',
  'task',
  'data_hash',
  'model',
  'recursive',
  'objective',
  'step',
  'optimizer',
  'federation',
  'training.batch_size',
  'training.accumulation',
  'training.ema_decay',
  'training.keep_carry',
  'training.slots',
)

# Parts of those that only say how the same is computed, up to rounding.
EXECUTION = ('model.unrolled', 'model.remat', 'model.algorithm')

# Parts that only say where the data lie, where `data_hash` says which they are.
PLACES = (
  'task.path',
  'task.train_path',
  'task.validation_path',
  'task.test_path',
  'task.eval_path',
  'task.cache',
)


def differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
  """Lines 'field: ours here, theirs there' where two JSON configs differ."""
  lines = []
  for name in sorted(set(ours) | set(theirs)):
    a, b = ours.get(name, '<none>'), theirs.get(name, '<none>')
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f'{prefix}{name}.')
    elif a != b:
      lines.append(f'{prefix}{name}: {a!r} here, {b!r} there')
  return lines


def foreign(ours: dict, theirs: dict) -> list[str]:
  """Differences in the fields that make two runs the same experiment."""
  ours, theirs = config_lib.complete(ours), config_lib.complete(theirs)
  known = ours['data_hash'] and ours['data_hash'] == theirs['data_hash']
  free = EXECUTION + (PLACES if known else ())
  return [
    line
    for line in differences(ours, theirs)
    if any(line.startswith((f'{field}:', f'{field}.')) for field in IDENTITY)
    and not line.startswith(tuple(f'{field}:' for field in free))
  ]


def digest(tree: Tree) -> dict[str, str] | None:
  """CRC-32 of every leaf by path; None where another host has a part of it."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if not all(leaf.is_fully_addressable for _, leaf in leaves):
    return None
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{zlib.crc32(np.ascontiguousarray(leaf).tobytes()):08x}'
    )
    for path, leaf in leaves
  }


# Fields of a state that are items of their own.
_OWN = ('params', 'ema', 'carry', 'rate')


def _items(state: State) -> dict[str, Tree]:
  own = {name: getattr(state, name) for name in _OWN}
  rest = state._replace(params={}, ema={}, carry={})._asdict()
  del rest['rate']
  return own | {'rest': rest}


def _state(items: dict[str, Tree]) -> State:
  own = {name: items[name] for name in _OWN}
  return State(**(items['rest'] | own))


# Bytes at which a file of arrays is closed; what is on its way may follow, so
# that files stay below 16 MiB, which is what some places take at most.
FILE = 8 * 2**20


class Refused(Exception):
  """A checkpoint that cannot be used, and why."""


class _Best(keeping.PreservationPolicy):
  """Preserves the checkpoint with the best score, the newest of equals.

  orbax forgets metrics from one life of a run to the next, `scores` does not.
  """

  def __init__(self, scores: dict[int, float], mode: str):
    self._scores = scores
    self._sign = 1 if mode == 'max' else -1

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [c.step for c in checkpoints if c.step in self._scores]
    best = max(
      steps, key=lambda s: (self._sign * self._scores[s], s), default=None
    )
    return [c.step == best for c in checkpoints]


class Checkpoints(NamedTuple):
  """A folder of checkpoints; `manager` owns its threads: `close` it.

  scores: by step, the value of the metric `best` of every checkpoint.
  """

  folder: pathlib.Path
  manager: ocp.CheckpointManager
  config: dict[str, Any]
  best: str
  scores: dict[int, float]

  def save(
    self, state: State, metrics: dict[str, float], emptied: bool = False
  ) -> None:
    """Begins to save; returns once the state is copied off the device.

    Args:
      state: the plain state.
      metrics: of this step, for the best checkpoint.
      emptied: the next step reads nothing of the carry: it is not saved.
    """
    step = int(np.ravel(np.asarray(state.step))[0])
    if step in self.manager.all_steps():
      return
    if emptied:
      state = state._replace(carry={})
    items = {k: v for k, v in _items(state).items() if jax.tree.leaves(v)}
    about = {
      'step': step,
      'emptied': emptied,
      'metrics': metrics,
      'items': sorted(items),
      'digest': {name: digest(item) for name, item in items.items()},
    }
    # A CPU array may be written while the next step reuses its donated
    # buffer, so the writer gets a copy.
    items = jax.tree.map(jnp.copy, items)
    self.scores.pop(step, None)
    if self.best in metrics:
      self.scores[step] = metrics[self.best]
    self.manager.save(
      step,
      args=ocp.args.Composite(
        config=ocp.args.JsonSave(self.config),
        about=ocp.args.JsonSave(about),
        **{
          name: ocp.args.PyTreeSave(item, ocdbt_target_data_file_size=FILE)
          for name, item in items.items()
        },
      ),
    )

  def steps(self) -> list[int]:
    return sorted(self.manager.all_steps())

  def path(self, step: int) -> pathlib.Path:
    return self.folder / str(step)

  def restore(self, step: int, abstract: State) -> State:
    """The state saved at `step`, placed as `abstract`'s shardings say.

    Raises:
      Refused: torn, foreign, or of another shape; the message says which.
    """
    return _state(_restore(self.path(step), _items(abstract), self.config))

  def restore_newest(self, abstract: State) -> State | None:
    """The newest intact checkpoint, None where there is no checkpoint at all.

    Refused ones are moved aside to `refused/STEP`, so that the run can save
    that step again and nothing is lost.

    Raises:
      UserError: there are checkpoints, and every one of them is refused.
    """
    reasons = []
    for step in reversed(self.steps()):
      try:
        state = self.restore(step, abstract)
      except Refused as refusal:
        reasons.append(f'{self.path(step)} is refused: {refusal}')
        _log.warning('%s', reasons[-1])
        continue
      if reasons:
        if jax.process_index() == 0:
          self._move_aside([s for s in self.steps() if s > step])
        if jax.process_count() > 1:
          multihost_utils.sync_global_devices('refused checkpoints are moved')
        self.manager.reload()
      return state
    if reasons:
      raise UserError(
        'no usable checkpoint. '
        + '; '.join(reasons)
        + '. Choose another --workdir, or remove the folder to start afresh.'
      )
    return None

  def _move_aside(self, steps: list[int]) -> None:
    for bad in steps:
      target = self.folder.parent / 'refused' / str(bad)
      target.parent.mkdir(exist_ok=True)
      while target.exists():
        target = target.with_name(target.name + '-again')
      self.path(bad).rename(target)
      _log.warning('%s is moved to %s', self.path(bad), target)

  def wait(self) -> None:
    self.manager.wait_until_finished()

  def close(self) -> None:
    self.manager.close()


def open_folder(
  workdir: str | pathlib.Path,
  config: dict[str, Any],
  *,
  keep: int = 2,
  best: str = '',
  mode: str = 'max',
) -> Checkpoints:
  """Opens `workdir/checkpoints`.

  Args:
    workdir: the run's folder.
    config: the resolved config as JSON data.
    keep: how many newest checkpoints stay.
    best: name of the metric whose best checkpoint stays too, '' for none.
    mode: 'max' or 'min': which value of `best` is best.
  """
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'workdir {workdir} cannot be made: {error}') from error
  scores = _scores(folder, best) if best else {}
  policies: list = [keeping.LatestN(keep)]
  if best:
    policies.append(_Best(scores, mode))
  manager = ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=keeping.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    ),
    item_handlers={
      'config': ocp.JsonCheckpointHandler('config.json'),
      'about': ocp.JsonCheckpointHandler('about.json'),
      'params': ocp.PyTreeCheckpointHandler(),
      'ema': ocp.PyTreeCheckpointHandler(),
      'carry': ocp.PyTreeCheckpointHandler(),
      'rate': ocp.PyTreeCheckpointHandler(),
      'rest': ocp.PyTreeCheckpointHandler(),
    },
  )
  return Checkpoints(folder, manager, config, best, scores)


def _read_json(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise Refused(f'{path.name} cannot be read ({error})') from error


def _scores(folder: pathlib.Path, best: str) -> dict[int, float]:
  """Metric `best` by step, of the intact checkpoints that have it."""
  scores = {}
  for path in folder.glob('*'):
    if not path.name.isdigit():
      continue
    with contextlib.suppress(Refused):
      metrics = _read_json(path / 'about' / 'about.json')['metrics']
      if best in metrics:
        scores[int(path.name)] = metrics[best]
  return scores


def _restore(
  path: pathlib.Path, abstract: dict[str, Tree], config: dict | None
) -> dict[str, Tree]:
  about = _read_json(path / 'about' / 'about.json')
  if config is not None:
    lines = foreign(config, _read_json(path / 'config' / 'config.json'))
    if lines:
      raise Refused('its config is another one: ' + '; '.join(lines))
  items = {}
  for name, tree in abstract.items():
    if not jax.tree.leaves(tree):
      items[name] = tree
      continue
    if name == 'carry' and about.get('emptied'):
      # As `recursion.slots` begins: all is zero, and every slot takes a row.
      items[name] = _full(tree, 0) | {'halted': _full(tree['halted'], 1)}
      continue
    if name == 'rate' and name not in about['items']:
      items[name] = _full(tree, 1)  # the run had no rules until now
      continue
    if name not in about['items']:
      raise Refused(f'it holds no {name}')
    try:
      with ocp.StandardCheckpointer() as reader:
        item = reader.restore(path / name, tree)
    except Exception as error:  # orbax and tensorstore raise many kinds
      reason = str(error).strip().split('\n')[0][:300]
      raise Refused(f'{name} cannot be read ({reason})') from error
    found, stated = digest(item), about['digest'][name]
    if found is not None and stated is not None and found != stated:
      bad = [k for k in stated if found.get(k) != stated[k]]
      raise Refused(f'{name} is damaged: {", ".join(bad[:5]) or "tree"}')
    items[name] = item
  return items


def _full(abstract: Tree, value: float) -> Tree:
  def make():
    return jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), abstract)

  shardings = jax.tree.map(lambda s: s.sharding, abstract)
  return jax.jit(make, out_shardings=shardings)()


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
  """The config stored in a checkpoint folder or a workdir.

  Raises:
    UserError: there is none.
  """
  path = pathlib.Path(path)
  for candidate in (path / 'config' / 'config.json', path / 'config.json'):
    if candidate.exists():
      try:
        return config_lib.complete(json.loads(candidate.read_text()))
      except ValueError as error:
        raise UserError(f'{candidate} is not JSON ({error})') from error
  raise UserError(f'no config.json in {path}: is it a workdir of train.py?')


def folders(workdir: str | pathlib.Path) -> list[pathlib.Path]:
  """A workdir's checkpoint folders, newest first.

  Raises:
    UserError: there is none.
  """
  path = pathlib.Path(workdir).absolute()
  if (path / 'about').is_dir():  # one checkpoint, not a workdir
    return [path]
  found = [p for p in (path / 'checkpoints').glob('*') if p.name.isdigit()]
  if not found:
    raise UserError(
      f'no checkpoint in {path}: train.py saves them in WORKDIR/checkpoints'
    )
  return sorted(found, key=lambda p: -int(p.name))


def load(
  path: str | pathlib.Path, abstract: dict[str, Tree]
) -> tuple[dict[str, Tree], pathlib.Path]:
  """Items of the newest intact checkpoint in a workdir or checkpoint folder.

  Args:
    path: workdir, or one checkpoint's folder.
    abstract: shapes (and shardings) by item: 'params', 'ema', 'carry', 'rest'.

  Raises:
    UserError: no checkpoint can be used; the message gives each one's reason.
  """
  reasons = []
  for folder in folders(path):
    try:
      return _restore(folder, abstract, None), folder
    except Refused as refusal:
      reasons.append(f'{folder} is refused: {refusal}')
      _log.warning('%s', reasons[-1])
  raise UserError('; '.join(reasons))


def best_folder(workdir: str | pathlib.Path, best: str, mode: str):
  """The checkpoint folder with the best value of metric `best`.

  Raises:
    UserError: no checkpoint, no metric, or no checkpoint that has it.
  """
  parent = folders(workdir)[0].parent
  if not best:
    raise UserError(
      f"the run in {workdir} chose no best checkpoint (checkpoint.best is ''): "
      'leave out --best for the newest one, or give one of '
      f'{parent}/STEP as --workdir'
    )
  scores = _scores(parent, best)
  if not scores:
    raise UserError(f'no checkpoint in {workdir} has the metric {best!r}')
  sign = 1 if mode == 'max' else -1
  return parent / str(max(scores, key=lambda s: (sign * scores[s], s)))


def load_state(
  path: str | pathlib.Path, abstract: State
) -> tuple[State, pathlib.Path]:
  """The whole training state of another run's newest intact checkpoint."""
  items, folder = load(path, _items(abstract))
  return _state(items), folder
