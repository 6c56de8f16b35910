"""Where a run starts from: the one place that decides."""

import logging
import pathlib

import jax

from recursive_weights.interfaces import UserError
from recursive_weights.training import checkpoints
from recursive_weights.training.state import State

_log = logging.getLogger(__name__)


def start(
  saved: checkpoints.Checkpoints,
  init,
  abstract: State,
  *,
  resume_from: str,
  init_from: str,
) -> tuple[State, str]:
  """The state to begin with, and where it comes from (a line for the log).

  In this order:
    1. this workdir's newest intact checkpoint: the run goes on;
    2. else `resume_from`, a workdir or checkpoint of another run: its whole
       state, step included, under this run's config;
    3. else `init_from`: that run's parameters only (the EMA where it has one),
       with a new optimizer state from step 0;
    4. else scratch.

  Args:
    saved: this workdir's checkpoints.
    init: `() -> State`, placed.
    abstract: shapes, dtypes and shardings of the plain state.
    resume_from, init_from: folders, '' for none.
  """
  state = saved.restore_newest(abstract)
  if state is not None:
    return state, f'this workdir, {saved.folder}'
  if resume_from:
    _exists('resume_from', resume_from)
    state, folder = checkpoints.load_state(resume_from, abstract)
    return state, f'resume_from, {folder}'
  state = init()
  if init_from:
    _exists('init_from', init_from)
    try:
      items, folder = checkpoints.load(init_from, {'ema': abstract.params})
    except UserError:
      _log.info('init_from: %s holds no usable EMA', init_from)
      items, folder = checkpoints.load(init_from, {'params': abstract.params})
    (params,) = items.values()
    ema = jax.tree.map(jax.numpy.copy, params) if state.ema else {}
    return state._replace(params=params, ema=ema), f'init_from, {folder}'
  return state, 'scratch'


def _exists(field: str, path: str) -> None:
  if not pathlib.Path(path).is_dir():
    raise UserError(f'config.{field} = {path!r} is no folder')
