"""How well a planted basis is found again, by questions, rank and noise."""

import pathlib

from recursive_weights.plots import _figure

GREY = '#444444'


def recovery(path, lines: list[dict], *, title: str = '') -> pathlib.Path:
  """Writes a panel for each sweep of `benchmarks.recovery` as a PNG.

  Points are medians over draws, bars reach from the least to the largest; a
  point is hollow where the steps of some draw ran out while longer ones would
  have lowered its objective.

  Args:
    path: file to write.
    lines: what the benchmark prints.
    title: title of the picture.

  Returns:
    The path.
  """
  panels = {
    'threshold': ('questions', 'questions a member', 'by questions, ridge'),
    'rank': ('rank', 'rank fitted', 'by rank, noise'),
    'noise': ('noise', 'noise', 'by noise, ridge'),
  }
  found = [name for name in panels if any(x['sweep'] == name for x in lines)]
  ridges = sorted({line['ridge'] for line in lines if 'ridge' in line})
  with _figure.style():
    figure = _figure.new(3.6 * len(found), 3.4)
    for axis, name in zip(
      figure.subplots(1, len(found), squeeze=False)[0], found, strict=True
    ):
      key, label, heading = panels[name]
      some = [line for line in lines if line['sweep'] == name]
      _draw(axis, key, some, 'noise' if name == 'rank' else 'ridge', ridges)
      axis.set(
        yscale='log',
        xscale='log' if name == 'noise' else 'linear',
        xlabel=label,
        ylabel='relative squared error, held out',
        title=heading,
      )
      axis.legend(fontsize=7)
    note = 'hollow: steps ran out'
    figure.suptitle(title or f'A planted basis found again ({note})')
    return _figure.save(figure, path)


def _draw(axis, key, lines, other, ridges):
  """Fits by `key`, a line for each value of `other`, and what stands beside."""
  fits = [line for line in lines if 'error' in line]
  values = sorted({line[other] for line in fits})
  for value in values:
    some = [line for line in fits if line[other] == value]
    place = (ridges if other == 'ridge' else values).index(value)
    colour = _figure.COLOURS[place % len(_figure.COLOURS)]
    label = f'{other} {value:g}'
    look = {'color': colour, 'marker': 'o'}
    _bars(axis, key, some, 'error', label, **look)
    open_ = [line for line in some if line['unfinished'] != line['stalled']]
    axis.plot(
      [line[key] for line in open_],
      [line['error']['median'] for line in open_],
      ls='',
      mfc='white',
      ms=3,
      zorder=3,
      **look,
    )
  for label, style in (('independent', '--'), ('known', ':')):
    some = [line for line in lines if label in line]
    if some:
      text = 'ridge, each for itself' if label == 'independent' else label
      _bars(axis, key, some, label, text, color=GREY, ls=style)


def _bars(axis, key, lines, field, label, **look):
  x = [line[key] for line in lines]
  middle = [line[field]['median'] for line in lines]
  low = [line[field]['median'] - line[field]['low'] for line in lines]
  high = [line[field]['high'] - line[field]['median'] for line in lines]
  axis.errorbar(
    x, middle, [low, high], label=label, ms=3, lw=1, capsize=2, **look
  )
