"""One process to a workdir."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from recursive_weights.interfaces import UserError

if sys.platform != 'win32':
  import fcntl


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps others from training in a folder; the system ends it with us.

  Raises:
    UserError: another process trains there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / '.lock', 'a') as file:
    try:
      if sys.platform != 'win32':
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'another process trains in {folder}: wait for it, stop it, or choose '
        'another --workdir'
      ) from error
    except OSError:
      pass  # A mounted drive without locks: no worse than before.
    yield
