"""Singular values of a base weight against those of the derived one."""

import pathlib

import numpy as np

from recursive_weights.plots import _figure


def singular_values(weight) -> np.ndarray:
  """Singular values of a weight, largest first, in float64.

  Leading axes are flattened into rows: `[M, F, D]` is read as `[M F, D]`.
  """
  weight = np.asarray(weight, np.float64)
  if weight.ndim < 2:
    raise ValueError(f'weight must have rank >= 2, got shape {weight.shape}')
  flat = weight.reshape(-1, weight.shape[-1])
  return np.linalg.svd(flat, compute_uv=False)


def spectra(
  path,
  base,
  derived,
  *,
  base_name: str = 'W1',
  derived_names: tuple[str, ...] = ('T(W1)',),
  title: str = 'Singular values',
) -> pathlib.Path:
  """Writes two panels as a PNG: values by index, and derived against base.

  Args:
    path: file to write.
    base: base weight, rank >= 2 (see `singular_values`).
    derived: derived weights, one for each name, of any shapes.
    base_name: name of the base.
    derived_names: names of the derived weights.
    title: title of the picture.

  Returns:
    The path.
  """
  base_R = singular_values(base)
  pairs = [
    (name, singular_values(weight))
    for name, weight in zip(derived_names, derived, strict=True)
  ]
  with _figure.style():
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure.new(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    _draw_values(left, base_name, base_R, '#444444', 's')
    right.axline((0, 0), slope=1, color='#444444', lw=1, ls='--')
    right.text(
      0.97, 0.03, 'dashed: unchanged', transform=right.transAxes,
      ha='right', color='#444444',
    )  # fmt: skip
    for i, (name, derived_R) in enumerate(pairs):
      colour = _figure.COLOURS[i % len(_figure.COLOURS)]
      _draw_values(left, name, derived_R, colour, 'o')
      shared = min(len(base_R), len(derived_R))
      right.plot(
        base_R[:shared], derived_R[:shared], 'o', ms=4, color=colour, label=name
      )
    left.set(xlabel='index', ylabel='singular value', title='By index')
    left.set_yscale('log')
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter('{x:g}')
    left.yaxis.set_minor_formatter(NullFormatter())
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    right.set(
      xlabel=f'singular value of {base_name}',
      ylabel='singular value, derived',
      title='Derived against base, by rank',
    )
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.legend(loc='upper left')
    figure.suptitle(title)
    return _figure.save(figure, path)


def _draw_values(axis, name, values_R, colour, marker):
  # Values of rank-deficient weights are rounding noise beyond their rank.
  kept = values_R > values_R[0] * 1e-12
  index = np.arange(1, len(values_R) + 1)
  label = f'{name} (rank {kept.sum()})'
  axis.plot(
    index[kept], values_R[kept], marker=marker, ms=3, lw=1, color=colour,
    label=label,
  )  # fmt: skip
