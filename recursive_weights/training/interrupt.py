"""Being told to stop, between two dispatches of the training loop."""

import contextlib
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupt:
  """SIGTERM and SIGINT ask the loop to save and leave between dispatches.

  A second SIGINT (Ctrl-C) does not wait: the last checkpoint stays as it is.
  Where `at_once` is set, nothing waits.
  """

  def __init__(self):
    self.reason = ''
    self.at_once = False

  def ask(self, reason: str) -> None:
    self.reason = self.reason or reason

  def now(self) -> bool:
    if jax.process_count() == 1:
      return bool(self.reason)
    # All hosts leave at the same step, whichever was told first.
    told = multihost_utils.process_allgather(np.bool_(bool(self.reason)))
    if told.any():
      self.ask('another host was told to stop')
    return bool(told.any())

  def __enter__(self):
    self._before = {}
    for name in ('SIGTERM', 'SIGINT'):
      number = getattr(signal, name)
      with contextlib.suppress(ValueError):  # not the main thread
        self._before[number] = signal.signal(number, self._signalled)
    return self

  def _signalled(self, number, _):
    name = signal.Signals(number).name
    if self.at_once or name == 'SIGINT' == self.reason:
      raise KeyboardInterrupt
    self.ask(name)

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
