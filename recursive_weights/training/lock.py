"""One process to a workdir."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator

from recursive_weights.interfaces import UserError

if sys.platform != 'win32':
  import fcntl

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps others from training in a folder; the system ends it with us.

  Raises:
    UserError: another process trains there, or the folder cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / '.lock', 'a')
  except OSError as error:
    raise UserError(f'workdir {folder} cannot be made: {error}') from error
  with file:
    try:
      if sys.platform == 'win32':
        raise OSError('no locks on Windows')
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'another process trains in {folder}: wait for it, stop it, or choose '
        'another --workdir'
      ) from error
    except OSError as error:  # as some mounted drives
      _log.warning(
        'start no second run in %s: it has no lock, %s', folder, error
      )
    yield
