"""Training curves of several runs, seeds of one kind taken together."""

import contextlib
import json
import pathlib

import numpy as np

from recursive_weights.interfaces import UserError
from recursive_weights.plots import _figure


def read(path, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of one metric from a `metrics.jsonl`.

  Lines without the metric, or where it was not finite (null), are left out; a
  line broken off at the end of a killed run too. Of equal steps the last one
  counts.

  Raises:
    UserError: the file is missing or no line has the metric.
  """
  values = {
    report['step']: float(report[metric])
    for report in _reports(path)
    if report.get(metric) is not None
  }
  if not values:
    raise UserError(
      f'metric must be one of {names(path)} in {path}, got {metric!r}'
    )
  steps = sorted(values)
  return np.array(steps), np.array([values[step] for step in steps])


def names(path) -> list[str]:
  """The metrics in a `metrics.jsonl`. Errors as for `read`."""
  found = set().union(*(report.keys() for report in _reports(path)))
  return sorted(found - {'step'})


def _reports(path):
  path = pathlib.Path(path)
  try:
    lines = path.read_text().splitlines()
  except OSError as error:
    raise UserError(f'no metrics at {path}: {error.strerror}') from error
  reports = []
  for line in lines:
    with contextlib.suppress(json.JSONDecodeError):
      reports.append(json.loads(line))
  return reports


def curves(
  path,
  runs: dict[str, list],
  *,
  metrics: tuple[str, ...] = ('train/loss', 'test/accuracy'),
  log: tuple[str, ...] = (),
  title: str = 'Training',
) -> pathlib.Path:
  """Writes one panel a metric as a PNG: mean over seeds, band, single seeds.

  At each step the mean is over the seeds that report it, and the band is the
  standard deviation between them (n - 1) to both sides.

  Args:
    path: file to write.
    runs: name of a kind of run to the `metrics.jsonl` of its seeds.
    metrics: metrics to draw.
    log: those of `metrics` whose axis is logarithmic.
    title: title of the picture.

  Returns:
    The path.

  Raises:
    UserError: a file is missing, or a metric is in none of its lines.
  """
  with _figure.style():
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    figure = _figure.new(4.2 * columns, 3.0 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(metrics) :]:
      axis.axis('off')
    for axis, metric in zip(axes, metrics, strict=False):
      for i, (name, files) in enumerate(runs.items()):
        colour = _figure.COLOURS[i % len(_figure.COLOURS)]
        _draw(axis, name, [read(file, metric) for file in files], colour)
      axis.set(xlabel='step', ylabel=metric, title=metric)
      if metric in log:
        axis.set_yscale('log')
    axes[0].legend()
    figure.suptitle(title)
    return _figure.save(figure, path)


def summary(seeds: list[tuple[np.ndarray, np.ndarray]]):
  """Steps, mean and standard deviation over the seeds that report a step."""
  by_step: dict[int, list[float]] = {}
  for seed_steps, values in seeds:
    for step, value in zip(seed_steps, values, strict=True):
      by_step.setdefault(int(step), []).append(value)
  steps = sorted(by_step)
  mean = [np.mean(by_step[step]) for step in steps]
  spread = [
    np.std(by_step[step], ddof=1) if len(by_step[step]) > 1 else 0.0
    for step in steps
  ]
  return np.array(steps), np.array(mean), np.array(spread)


def _draw(axis, name, seeds, colour):
  steps, mean, spread = summary(seeds)
  count = f'{len(seeds)} seed{"s" if len(seeds) > 1 else ""}'
  axis.plot(steps, mean, color=colour, label=f'{name} ({count})')
  if len(seeds) > 1:
    axis.fill_between(
      steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0
    )
    for seed_steps, values in seeds:
      axis.plot(seed_steps, values, color=colour, lw=0.5, alpha=0.5)
