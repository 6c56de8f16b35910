"""An answer that emerges step by step, as a strip and as a film."""

import pathlib

import numpy as np

from recursive_weights.plots import _figure


def strip(
  path,
  images,
  captions,
  *,
  steps: tuple[int, ...] = (),
  columns: int | None = None,
  title: str = 'Answer by step',
) -> pathlib.Path:
  """Writes one panel a step as a PNG.

  Args:
    path: file to write.
    images: S pictures `[h, w, 3]`, colours in [0, 1], the answer after each
      step.
    captions: S texts.
    steps: steps to show, counted from 1; `()` for the first ones, 1, 2, 4, 8,
      ..., and the last.
    columns: panels in a row; None for up to five, fewer where they are
      wide.
    title: title of the picture.

  Returns:
    The path.
  """
  last = len(images)
  if not steps:
    steps = tuple(sorted({2**i for i in range(last.bit_length())} | {last}))
  height, width = images[0].shape[:2]
  if columns is None:
    most = max(1, round(5 * min(1.0, height / width)))
    columns = -(-len(steps) // -(-len(steps) // most))
  columns = min(columns, len(steps))
  rows = -(-len(steps) // columns)
  panel = 2.6 * max(1.0, width / height) ** 0.5
  with _figure.style():
    size = (panel * columns, (panel * height / width + 0.35) * rows + 0.4)
    figure = _figure.new(*size)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(steps) :]:
      axis.axis('off')
    for axis, step in zip(axes, steps, strict=False):
      _show(axis, images[step - 1], captions[step - 1])
    figure.suptitle(title)
    return _figure.save(figure, path)


def film(
  path,
  images,
  captions,
  *,
  frames_per_second: float = 4.0,
  title: str = 'Answer by step',
) -> pathlib.Path:
  """Writes one frame a step as a GIF that repeats. Arguments as for `strip`.

  The last frame stays for two seconds.
  """
  height, width = images[0].shape[:2]
  frames = []
  with _figure.style():
    for image, caption in zip(images, captions, strict=True):
      side = 3.6 * max(1.0, width / height) ** 0.5
      figure = _figure.new(side, side * height / width + 0.7)
      _show(figure.subplots(), image, caption)
      figure.suptitle(title)
      frames.append(_figure.raster(figure))
  pause = round(1000 / frames_per_second)
  return _figure.save_film(path, frames, pause, max(2000, pause))


def depth(
  path,
  values: dict[str, np.ndarray],
  *,
  trained: int = 0,
  title: str = 'Thinking longer',
) -> pathlib.Path:
  """Writes shares by number of steps as a PNG, steps on a logarithmic axis.

  Args:
    path: file to write.
    values: name of a share to its values, `[S]`.
    trained: number of steps in training, marked; 0 for none.
    title: title of the picture.

  Returns:
    The path.
  """
  with _figure.style():
    figure = _figure.new(5.2, 3.4)
    axis = figure.subplots()
    for name, value_S in values.items():
      axis.plot(1 + np.arange(len(value_S)), value_S, 'o-', ms=3, label=name)
    if trained:
      axis.axvline(trained, color='#888888', ls='--', label='in training')
    last = max(len(x) for x in values.values())
    ticks = [2**i for i in range(last.bit_length()) if 2**i <= last]
    axis.set_xscale('log', base=2)
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.set(xlabel='steps', ylabel='share', ylim=(-0.03, 1.03))
    axis.legend()
    figure.suptitle(title)
    return _figure.save(figure, path)


def _show(axis, image, caption):
  axis.set(xticks=[], yticks=[])
  axis.grid(False)
  axis.spines[:].set(visible=True, color='#bbbbbb')
  axis.imshow(image, interpolation='antialiased')
  axis.set_title(caption)
