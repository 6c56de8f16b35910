"""What happens inside a recursion, step by step."""

import pathlib

import numpy as np

from recursive_weights.plots import _figure


def dynamics(
  path,
  activities: dict,
  *,
  certainty_SB=None,
  accuracy_S=None,
  title: str = 'Dynamics by step',
) -> pathlib.Path:
  """Writes certainty, accuracy and heat maps of activity over steps as a PNG.

  Args:
    path: file to write.
    activities: what one row is ('neuron', 'synchronised pair') to activity of
      one example, `[S, N]`; a map each. Rows are ordered by the step of their
      largest magnitude, so that waves show. The colour scale is symmetric
      about 0 and ends at the 95th percentile of magnitude.
    certainty_SB: certainty of examples by step, `[S, B]`: median, and the band
      from the 10th to the 90th percentile.
    accuracy_S: accuracy by step, `[S]`.
    title: title of the picture.

  Returns:
    The path.
  """
  activities = {k: np.asarray(x, np.float64) for k, x in activities.items()}
  steps = np.arange(1, len(next(iter(activities.values()))) + 1)
  heights = [3.2] * len(activities)
  if certainty_SB is not None or accuracy_S is not None:
    heights.insert(0, 2.0)
  with _figure.style():
    figure = _figure.new(7.0, sum(heights) + 0.4)
    axes = figure.subplots(
      len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    if len(axes) > len(activities):
      _draw_curves(axes[0], steps, certainty_SB, accuracy_S)
    maps = axes[-len(activities) :]
    for axis, (name, activity_SN) in zip(maps, activities.items(), strict=True):
      _draw_map(figure, axis, steps, activity_SN, name)
    maps[-1].set_xlabel('step')
    figure.suptitle(title)
    return _figure.save(figure, path)


def _draw_curves(axis, steps, certainty_SB, accuracy_S):
  if certainty_SB is not None:
    low_S, middle_S, high_S = np.percentile(
      np.asarray(certainty_SB, np.float64), (10, 50, 90), axis=1
    )
    colour = _figure.COLOURS[0]
    axis.plot(steps, middle_S, color=colour, label='certainty, median')
    axis.fill_between(
      steps, low_S, high_S, color=colour, alpha=0.2, lw=0,
      label='certainty, 10 % to 90 %',
    )  # fmt: skip
  if accuracy_S is not None:
    axis.plot(steps, accuracy_S, color=_figure.COLOURS[1], label='accuracy')
  axis.set(ylim=(-0.03, 1.03), ylabel='share', title='Certainty and accuracy')
  axis.legend()


def _draw_map(figure, axis, steps, activity_SN, name):
  order_N = np.lexsort(
    (-np.abs(activity_SN).max(axis=0), np.abs(activity_SN).argmax(axis=0))
  )
  limit = np.percentile(np.abs(activity_SN), 95) or 1.0
  rows = activity_SN.shape[1]
  mesh = axis.imshow(
    activity_SN[:, order_N].T,
    aspect='auto',
    cmap='RdBu_r',
    vmin=-limit,
    vmax=limit,
    interpolation='nearest',
    extent=(steps[0] - 0.5, steps[-1] + 0.5, rows - 0.5, -0.5),
  )
  axis.grid(False)
  axis.set(
    ylabel=f'{name}, by step of its peak',
    title=f'Activity of {rows} {name}s, one example',
  )
  axis.xaxis.get_major_locator().set_params(integer=True)
  bar = figure.colorbar(mesh, ax=axis, extend='both')
  bar.set_label('activity')
  bar.outline.set_visible(False)
