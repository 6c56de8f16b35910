"""A fitted basis as files: safetensors, and JSON that a person can read."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from recursive_weights.interfaces import UserError
from recursive_weights.io import tensors


class Stored(NamedTuple):
  """names: of the members, as the coefficients stand. facts: any JSON."""

  coefficients_ER: np.ndarray
  basis_RDV: np.ndarray
  names: list[str]
  facts: dict[str, Any]


def check(stored: Stored) -> None:
  """Raises `UserError` where names are not one a member, or shapes disagree."""
  c_ER, basis_RDV = (np.asarray(x) for x in stored[:2])
  if c_ER.ndim != 2 or basis_RDV.ndim != 3 or c_ER.shape[1] != len(basis_RDV):
    raise UserError(
      'coefficients and basis must be [E, R] and [R, D, V], got '
      f'{c_ER.shape} and {basis_RDV.shape}'
    )
  names = stored.names
  got = len(names) if isinstance(names, list | tuple) else repr(names)[:40]
  if got != len(c_ER):
    raise UserError(f'names must be one a member, {len(c_ER)}, got {got}')


def save(folder: str | pathlib.Path, stored: Stored) -> None:
  """Writes `basis.safetensors` and `basis.json` into a folder.

  Raises:
    UserError: names are not one a member, shapes disagree, names or facts are
      not JSON, or the folder cannot be written.
  """
  check(stored)
  c_ER, basis_RDV = (np.asarray(x) for x in stored[:2])
  folder = pathlib.Path(folder)
  about = {
    'members': len(c_ER),
    'rank': len(basis_RDV),
    'width': basis_RDV.shape[1],
    'values': basis_RDV.shape[2],
    'names': list(stored.names),
    'facts': stored.facts,
  }
  try:
    text = json.dumps(about, indent=1) + '\n'
    json.dumps(stored.facts, sort_keys=True)  # as `tensors.write` has them
  except (TypeError, ValueError) as error:
    raise UserError(f'names and facts must be JSON, got {error}') from error
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'basis.json').write_text(text)
  except OSError as error:
    raise UserError(f'cannot write a basis to {folder}: {error}') from error
  arrays = {'coefficients': c_ER, 'basis': basis_RDV}
  tensors.write(folder / 'basis.safetensors', arrays, about)


def load(folder: str | pathlib.Path) -> Stored:
  """What `save` wrote; the JSON file is for people, and not read.

  Raises:
    UserError: no such file, or another program's.
  """
  path = pathlib.Path(folder) / 'basis.safetensors'
  arrays, about = tensors.read(path), tensors.read_facts(path)
  missing = sorted({'coefficients', 'basis'} - set(arrays))
  missing += sorted({'names', 'facts'} - set(about))
  if missing:
    raise UserError(
      f'{path} must be written by `basis.files.save`: it has no '
      f'{", ".join(missing)}'
    )
  stored = Stored(
    arrays['coefficients'], arrays['basis'], about['names'], about['facts']
  )
  try:
    check(stored)
  except UserError as error:
    raise UserError(f'{path} holds no basis: {error}') from error
  return stored
