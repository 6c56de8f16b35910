"""Trained weights and their config, from a run or from the package."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from recursive_weights import config as config_lib
from recursive_weights.interfaces import Tree, UserError
from recursive_weights.io import json_files
from recursive_weights.io import pretrained as pretrained_lib
from recursive_weights.training import checkpoints

# (shapes of the parameters, raw) -> parameters, see `config.raw`.
Load = Callable[[Tree, bool], Tree]


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
  config = json_files.read(pretrained_lib.folder(name) / 'config.json')
  return config_lib.complete(config), lambda shapes, raw: pretrained_lib.read(
    name, shapes
  )


def export(
  source: str | pathlib.Path,
  name: str,
  fields: dict[str, Any] | None = None,
  results: dict[str, Any] | None = None,
  dtype: str = 'float32',
) -> pathlib.Path:
  """Ships a run's weights as `pretrained/NAME`, for `pretrained`.

  Args:
    source: a workdir of train.py, or one checkpoint folder in it.
    name: of the folder to write.
    fields: changes of the config, by dotted path: where the data of the run is
      not everybody's, or its evaluation too long. `data_hash` stays that of the
      run.
    results: what was measured; None for the run's own `results.json`.
    dtype: that they are stored in; float16 keeps large models small, and three
      bits more of a weight than bfloat16.

  Returns:
    The folder, with `weights.npz`, `config.json` and `results.json`.
  """
  from recursive_weights import build

  config, load = workdir(source)
  folder = pretrained_lib.FOLDER / name
  folder.mkdir(parents=True, exist_ok=True)
  params = load(build.parameter_shapes(config), config['raw'])
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  pretrained_lib.write_npz(folder / 'weights.npz', params)
  shipped = config_lib.from_data(config)
  shipped.update_from_flattened_dict(fields or {})
  json_files.write(folder / 'config.json', config_lib.to_data(shipped), 2)
  if results is None:
    results = json_files.read(pathlib.Path(source) / 'results.json')
  json_files.write(folder / 'results.json', results, 2)
  return folder
