"""Named arrays in safetensors files, with facts about them as text."""

import json
import os
import pathlib

import numpy as np

from recursive_weights.interfaces import UserError


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays by name; bfloat16, which NumPy lacks, as float32.

  Raises:
    UserError: no such file, not safetensors, or the package is missing.
  """
  return _open(path)[0]


def read_facts(path: str | pathlib.Path) -> dict:
  """What `write` was told of the arrays; `{}` for files of other programs.

  Raises:
    UserError: see `read`; `facts` of another program.
  """
  text = _open(path)[1].get('facts', '{}')
  try:
    facts = json.loads(text)
  except ValueError:
    facts = None
  if not isinstance(facts, dict):
    raise UserError(
      f'{path} holds facts of another form, not a JSON object: '
      f'{text[:40]!r}; it is of another program'
    )
  return facts


def write(
  path: str | pathlib.Path, arrays: dict[str, np.ndarray], facts: dict
) -> None:
  """Writes arrays by name and JSON data; a kill leaves the old file or the new.

  Raises:
    UserError: the package is missing.
  """
  path = pathlib.Path(path)
  part = path.with_suffix('.part')
  path.parent.mkdir(parents=True, exist_ok=True)
  contiguous = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
  text = {'facts': json.dumps(facts, sort_keys=True)}
  _package('numpy').save_file(contiguous, str(part), metadata=text)
  os.replace(part, path)


def _open(path):
  if not pathlib.Path(path).is_file():
    raise UserError(f'there is no file {path}')
  package = _package('safe_open')
  try:
    with package(str(path), framework='flax') as file:
      arrays = {name: _plain(file.get_tensor(name)) for name in file.keys()}
      return arrays, file.metadata() or {}
  except Exception as error:  # the package's own type has no public name
    raise UserError(f'cannot read {path} as safetensors: {error}') from error


def _plain(x):
  return np.asarray(x.astype('float32') if x.dtype.name == 'bfloat16' else x)


def _package(name):
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise UserError(
      "safetensors files need the text extra: pip install -e '.[text]'"
    ) from error
  return getattr(safetensors, name)
