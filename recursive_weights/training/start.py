"""Where a run starts from: the one place that decides."""

import pathlib

import jax

from recursive_weights.interfaces import UserError
from recursive_weights.io import pretrained
from recursive_weights.training import checkpoints
from recursive_weights.training.state import State


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
       or those that the package ships under this name, with a new optimizer
       state from step 0;
    4. else scratch.

  Args:
    saved: this workdir's checkpoints.
    init: `() -> State`, placed.
    abstract: shapes, dtypes and shardings of the plain state.
    resume_from, init_from: folders, '' for none; see `io.pretrained` for names.
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
    params, origin = _parameters(init_from, abstract.params)
    ema = jax.tree.map(jax.numpy.copy, params) if state.ema else {}
    return state._replace(params=params, ema=ema), f'init_from, {origin}'
  return state, 'scratch'


def _parameters(source, abstract):
  """A run's average, else its parameters; or those that the package ships."""
  run = (pathlib.Path(source) / 'checkpoints').is_dir()
  if source in pretrained.names() and not run:
    shardings = jax.tree.map(lambda s: s.sharding, abstract)
    return jax.device_put(pretrained.read(source, abstract), shardings), source
  known = ', '.join(pretrained.names())
  _exists('init_from', source, f', nor one of the weights {known}')
  average = checkpoints.read_config(source)['training']['ema_decay'] > 0
  item = 'ema' if average else 'params'
  items, folder = checkpoints.load(source, {item: abstract})
  (params,) = items.values()
  return params, folder


def _exists(field: str, path: str, other: str = '') -> None:
  if not pathlib.Path(path).is_dir():
    raise UserError(f'config.{field} = {path!r} is no folder{other}')
