"""metrics.jsonl, TensorBoard and tables.

A line of `metrics.jsonl` is `{"step": ..., name: value, ...}`. All values are
functions of (seed, step) alone, except those under `time/`.
"""

import json
import math
import os
import pathlib

from recursive_weights.interfaces import UserError


def read(path: str | pathlib.Path) -> list[dict]:
  """Lines of a metrics file; a last line cut short by a kill is left out."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = []
  for number, text in enumerate(path.read_text().split('\n')):
    if not text:
      continue
    try:
      lines.append(json.loads(text))
    except ValueError as error:
      if number < path.read_text().count('\n'):
        raise UserError(
          f'{path} line {number + 1} is not JSON: mend or remove the line'
        ) from error
  return lines


class Writer:
  """Appends to a workdir's metrics; `history` holds the lines written so far.

  Args:
    workdir: the run's folder.
    step: the step that the run goes on from; later lines are dropped, since
      they will be written again.
    writes: False on the hosts that only listen.
  """

  def __init__(self, workdir: str | pathlib.Path, step: int, writes: bool):
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._board = None
    self._writes = writes
    lines = read(self._path)
    self.history = [line for line in lines if line['step'] <= step]
    if writes and len(lines) != len(self.history):
      # Replace, never truncate: a kill in between loses nothing.
      part = self._path.with_suffix('.part')
      part.write_text(''.join(f'{json.dumps(x)}\n' for x in self.history))
      os.replace(part, self._path)
    elif writes and self._path.exists():
      text = self._path.read_text()
      if text and not text.endswith('\n'):
        self._path.write_text(
          ''.join(f'{json.dumps(x)}\n' for x in self.history)
        )

  def write(self, step: int, values: dict[str, float]) -> None:
    line = {'step': step} | finite(values)
    self.history.append(line)
    if not self._writes:
      return
    with self._path.open('a') as file:
      file.write(json.dumps(line) + '\n')
      file.flush()
      os.fsync(file.fileno())
    self._to_board(step, values)

  def _to_board(self, step, values):
    if self._board is None:
      try:
        from tensorboardX import SummaryWriter
      except ImportError:  # the extra [plots] is not installed
        self._board = False
      else:
        self._board = SummaryWriter(str(self._path.parent / 'tensorboard'))
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._board:
      self._board.close()


def finite(values: dict[str, float]) -> dict[str, float | None]:
  """Values for JSON, which has no NaN and no infinity: None in their place."""
  return {k: v if math.isfinite(v) else None for k, v in values.items()}


def table(values: dict[str, float], title: str = '') -> str:
  """Values by name as aligned text, for people."""
  if not values:
    return title
  width = max(len(name) for name in values)
  rows = [f'  {name:<{width}}  {value:.6g}' for name, value in values.items()]
  return '\n'.join([title, *rows] if title else rows)


def summary(by_seed: list[dict[str, float]]) -> dict[str, float]:
  """One dict of floats from one per seed.

  A single seed's values stay as they are. Several give the mean under the
  metric's name, and its spread (sample standard deviation, `/std`) and each
  member's value (`/seed0`, ...) beside it.
  """
  if len(by_seed) == 1:
    return dict(by_seed[0])
  result = {}
  for name in by_seed[0]:
    values = [member[name] for member in by_seed]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    result[name] = mean
    result[f'{name}/std'] = variance**0.5
    result |= {f'{name}/seed{i}': value for i, value in enumerate(values)}
  return result


def should_stop(
  history: list[dict],
  *,
  metric: str,
  mode: str,
  patience: int,
  target: float = 0.0,
) -> str:
  """Early stopping as a pure function of the metric history.

  Args:
    history: lines of `metrics.jsonl`.
    metric: the metric watched; '' never stops.
    mode: 'max' or 'min'.
    patience: evaluations without a new best after which to stop.
    target: a value of the metric that is enough; 0 for none.

  Returns:
    The reason to stop, '' to go on.
  """
  if not metric:
    return ''
  values = [line[metric] for line in history if metric in line]
  values = [-math.inf if v is None else v for v in values]
  enough = target
  if mode == 'min':
    values = [-v if math.isfinite(v) else v for v in values]
    enough = -target
  if not values:
    return ''
  if target and max(values) >= enough:
    return f'{metric} has reached {target:g}'
  since = len(values) - 1 - values.index(max(values))
  if since < patience:
    return ''
  return f'{metric} has not improved for {since} evaluations'
