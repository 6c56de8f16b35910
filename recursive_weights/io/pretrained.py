"""Weights that the package ships: `pretrained/NAME/weights.npz`."""

import pathlib
from typing import Any

import jax
import numpy as np

from recursive_weights.interfaces import Tree, UserError

FOLDER = pathlib.Path(__file__).parents[1] / 'pretrained'


def names() -> list[str]:
  return sorted(path.parent.name for path in FOLDER.glob('*/weights.npz'))


def read(name: str, shapes: Tree) -> Tree:
  """Shipped parameters, see `read_npz`.

  Raises:
    UserError: no weights of this name, or of another shape.
  """
  return read_npz(folder(name) / 'weights.npz', shapes)


def folder(name: str) -> pathlib.Path:
  """Where weights of a name lie, with their `config.json` and `results.json`.

  Raises:
    UserError: no weights of this name.
  """
  if name not in names():
    raise UserError(
      f'no pretrained weights {name!r}; there are: {", ".join(names())}'
    )
  return FOLDER / name


def read_npz(path: pathlib.Path, shapes: Tree) -> Tree:
  """Arrays by tree path from an .npz file (no pickles), checked for shape."""

  def read(key, shape):
    name = _name(key)
    if name not in stored or stored[name].shape != shape.shape:
      found = stored[name].shape if name in stored else 'nothing'
      raise UserError(
        f'{path}: {name} must be {shape.shape}, found {found}: weights and '
        'config do not belong together'
      )
    return jax.numpy.asarray(stored[name], shape.dtype)

  with np.load(path, allow_pickle=False) as stored:
    params = jax.tree_util.tree_map_with_path(read, shapes)
    if others := sorted(set(stored.files) - _names(shapes)):
      raise UserError(
        f'{path} also holds {", ".join(others)}: weights and config do not '
        'belong together'
      )
    return params


def write_npz(path: pathlib.Path, params: Tree) -> None:
  """Writes what `read_npz` reads."""
  arrays: dict[str, Any] = {
    _name(key): np.asarray(leaf)
    for key, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  np.savez(path, **arrays)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _names(tree: Tree) -> set[str]:
  return {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
