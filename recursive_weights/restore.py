"""Trained weights and their config, from a run or from the package."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recursive_weights import config as config_lib
from recursive_weights.interfaces import Tree, UserError
from recursive_weights.training import checkpoints

# (shapes of the parameters, raw) -> parameters, see `config.raw`.
Load = Callable[[Tree, bool], Tree]

PRETRAINED = pathlib.Path(__file__).parent / 'pretrained'


def workdir(
  path: str | pathlib.Path, *, best: bool = False
) -> tuple[dict[str, Any], Load]:
  """The stored config and a loader of the parameters of a run.

  Args:
    path: a workdir of train.py, or one checkpoint folder in it.
    best: take the best checkpoint by `config.checkpoint.best`.

  Returns:
    The config as plain data, and `load(shapes, raw) -> params`: the average
    (EMA) where there is one and `raw` is not asked for.

  Raises:
    UserError: no such folder, or no checkpoint in it can be used.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f'no folder {str(path)!r}: give a workdir of train.py')
  config = checkpoints.read_config(path)
  if best:
    path = checkpoints.best_folder(
      path, config['checkpoint']['best'], config['checkpoint']['mode']
    )
  has_average = config['training']['ema_decay'] > 0

  def load(shapes, raw):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device),
      shapes,
    )
    items, _ = checkpoints.load(
      path, {'ema' if has_average and not raw else 'params': abstract}
    )
    (params,) = items.values()
    return params

  return config, load


def pretrained(name: str) -> tuple[dict[str, Any], Load]:
  """Like `workdir`, for weights that the package ships in `pretrained/NAME`.

  A folder holds `weights.npz` (arrays by tree path), `config.json` and
  `results.json`.

  Raises:
    UserError: no weights of this name.
  """
  known = sorted(p.parent.name for p in PRETRAINED.glob('*/weights.npz'))
  if name not in known:
    raise UserError(
      f'no pretrained weights {name!r}; there are: {", ".join(known)}'
    )
  folder = PRETRAINED / name
  config = json.loads((folder / 'config.json').read_text())
  return config_lib.complete(config), lambda shapes, raw: read_npz(
    folder / 'weights.npz', shapes
  )


def read_npz(path: pathlib.Path, shapes: Tree) -> Tree:
  """Arrays by tree path from an .npz file (no pickles), checked for shape."""

  def read(key, shape):
    name = jax.tree_util.keystr(key, simple=True, separator='/')
    if name not in stored or stored[name].shape != shape.shape:
      found = stored[name].shape if name in stored else 'nothing'
      raise UserError(
        f'{path}: {name} must be {shape.shape}, found {found}: weights and '
        'config do not belong together'
      )
    return jax.numpy.asarray(stored[name], shape.dtype)

  with np.load(path, allow_pickle=False) as stored:
    return jax.tree_util.tree_map_with_path(read, shapes)


def write_npz(path: pathlib.Path, params: Tree) -> None:
  """Writes what `read_npz` reads."""
  arrays: dict[str, Any] = {
    jax.tree_util.keystr(key, simple=True, separator='/'): np.asarray(leaf)
    for key, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  np.savez(path, **arrays)


def export(
  source: str | pathlib.Path,
  name: str,
  fields: dict[str, Any] | None = None,
  results: dict[str, Any] | None = None,
) -> pathlib.Path:
  """Ships a run's weights as `pretrained/NAME`, float32, for `pretrained`.

  Args:
    source: a workdir of train.py, or one checkpoint folder in it.
    name: of the folder to write.
    fields: changes of the config, by dotted path: where the data of the run is
      not everybody's, or its evaluation too long. `data_hash` stays that of the
      run.
    results: what was measured; None for the run's own `results.json`.

  Returns:
    The folder, with `weights.npz`, `config.json` and `results.json`.
  """
  from recursive_weights import build

  config, load = workdir(source)
  folder = PRETRAINED / name
  folder.mkdir(parents=True, exist_ok=True)
  params = load(build.parameter_shapes(config), config['raw'])
  write_npz(folder / 'weights.npz', params)
  shipped = config_lib.from_data(config)
  shipped.update_from_flattened_dict(fields or {})
  (folder / 'config.json').write_text(
    json.dumps(config_lib.to_data(shipped), indent=2) + '\n'
  )
  if results is None:
    results = json.loads((pathlib.Path(source) / 'results.json').read_text())
  (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  return folder
