"""JSON files that a kill cannot break."""

import json
import os
import pathlib
from typing import Any

from recursive_weights.interfaces import UserError


def read(path: str | pathlib.Path) -> Any:
  """What a JSON file holds.

  Raises:
    UserError: there is no such file, or it is not JSON.
  """
  path = pathlib.Path(path)
  try:
    return json.loads(path.read_text())
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except ValueError as error:
    raise UserError(
      f'{path} is not JSON ({error}): mend it, or remove it to make it anew'
    ) from error


def write(path: str | pathlib.Path, data: Any, indent: int = 1) -> None:
  """Writes plain data, whole or not at all; an equal file is left alone."""
  path = pathlib.Path(path)
  text = json.dumps(data, indent=indent) + '\n'
  if path.exists() and path.read_text() == text:
    return
  part = path.with_name(path.name + '.part')
  part.write_text(text)
  os.replace(part, path)
