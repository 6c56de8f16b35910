"""Where a recursion looks, step by step, on a scan or a maze."""

import math
import pathlib

import numpy as np

from recursive_weights.plots import _figure

# Wall, open, start (blue), goal (green).
_MAZE_COLOURS = np.array(
  [[0.20, 0.22, 0.27], [1, 1, 1], [0.0, 0.45, 0.70], [0.0, 0.62, 0.45]]
)


def maze_picture(tokens) -> np.ndarray:
  """Colours of a maze: tokens `[size^2]` to RGB `[size, size, 3]`."""
  side = math.isqrt(len(tokens))
  return _MAZE_COLOURS[np.asarray(tokens)].reshape(side, side, 3)


def strip(
  path,
  image,
  attention_SHT,
  *,
  predictions=None,
  certainty_S=None,
  steps: tuple[int, ...] = (),
  columns: int = 5,
  title: str = 'Attention by step',
) -> pathlib.Path:
  """Writes one panel a step as a PNG: image, attention over it, answer.

  Args:
    path: file to write.
    image: `[h, w]`, larger values more ink, or `[h, w, 3]`, colours in [0, 1].
    attention_SHT: attention `[S, H, T]` over T tokens in reading order of a
      grid with the proportions of the image; averaged over heads. All panels
      share one colour scale.
    predictions: S texts or numbers, the answer after each step.
    certainty_S: certainty of each step, in [0, 1].
    steps: steps to show, counted from 1; `()` for `2 * columns` at even
      distances, the first and the last among them.
    columns: panels in a row.
    title: title of the picture.

  Returns:
    The path.
  """
  image = np.asarray(image)
  maps_SHW = _maps(image, attention_SHT)
  last = len(maps_SHW)
  if not steps:
    shown = min(2 * columns, last)
    steps = tuple(np.linspace(1, last, shown).round().astype(int))
  columns = min(columns, len(steps))
  rows = -(-len(steps) // columns)
  highest = max(maps_SHW[step - 1].max() for step in steps)

  with _figure.style():
    figure = _figure.new(1.75 * columns + 0.9, 2.1 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel()[len(steps) :]:
      axis.axis('off')
    for axis, step in zip(axes.flat, steps, strict=False):
      overlay = _panel(axis, image, maps_SHW[step - 1], highest)
      axis.set_title(_caption(step, predictions, certainty_S))
    bar = figure.colorbar(overlay, ax=axes, shrink=0.8)
    bar.set_label('attention, mean over heads')
    bar.outline.set_visible(False)
    figure.suptitle(title)
    return _figure.save(figure, path)


def film(
  path,
  image,
  attention_SHT,
  *,
  predictions=None,
  certainty_S=None,
  frames_per_second: float = 5.0,
  title: str = 'Attention by step',
) -> pathlib.Path:
  """Writes one frame a step as a GIF that repeats. Arguments as for `strip`.

  Below the image, a line shows the certainty up to the frame's step. The last
  frame stays for a second.
  """
  image = np.asarray(image)
  maps_SHW = _maps(image, attention_SHT)
  with _figure.style():
    from PIL import Image

    frames = []
    for step in range(1, len(maps_SHW) + 1):
      figure = _film_frame(
        image, maps_SHW, step, predictions, certainty_S, title
      )
      frames.append(Image.fromarray(_raster(figure)))
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  pause = round(1000 / frames_per_second)
  frames[0].save(
    path,
    save_all=True,
    append_images=frames[1:],
    duration=[pause] * (len(frames) - 1) + [max(1000, pause)],
    loop=0,
  )
  return path


def _film_frame(image, maps_SHW, step, predictions, certainty_S, title):
  if certainty_S is None:
    figure = _figure.new(3.4, 3.8)
    axis = figure.subplots()
  else:
    figure = _figure.new(3.4, 4.8)
    axis, below = figure.subplots(2, 1, height_ratios=(4, 1))
    seen = np.arange(1, step + 1)
    below.plot(seen, certainty_S[:step])
    below.plot(step, certainty_S[step - 1], 'o', color=_figure.COLOURS[0])
    below.set(
      xlim=(0.5, len(maps_SHW) + 0.5),
      ylim=(-0.05, 1.05),
      xlabel='step',
      ylabel='certainty',
    )
  _panel(axis, image, maps_SHW[step - 1], maps_SHW.max())
  axis.set_title(_caption(step, predictions, certainty_S))
  figure.suptitle(title)
  return figure


def _raster(figure):
  """The figure's pixels, uint8 `[h, w, 3]`."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _maps(image, attention_SHT):
  """Attention averaged over heads, on a grid: `[S, h, w]`."""
  mean_ST = np.asarray(attention_SHT, np.float64).mean(axis=1)
  steps, tokens = mean_ST.shape
  height, width = image.shape[:2]
  tall = round(math.sqrt(tokens * height / width))
  if tall < 1 or tokens % tall or tall * width != tokens // tall * height:
    raise ValueError(
      f'attention over {tokens} tokens must form a grid with the proportions '
      f'of the image, got an image of {height} x {width}'
    )
  return mean_ST.reshape(steps, tall, tokens // tall)


def _panel(axis, image, map_HW, highest):
  """Draws the image as faint ink on paper and the attention over it."""
  from matplotlib.colors import LinearSegmentedColormap, to_rgb

  if image.ndim == 2:
    ink_HW = (image - image.min()) / (np.ptp(image) or 1)
    image = np.repeat(1 - ink_HW[:, :, None], 3, axis=2)
  extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
  axis.set(xticks=[], yticks=[])
  axis.spines[:].set(visible=True, color='#bbbbbb')
  axis.imshow(1 - 0.65 * (1 - image), extent=extent)
  # Only opacity tells how much: what is not looked at stays as it is, and the
  # colour bar on white paper shows the colours of the panels.
  colour = to_rgb(_figure.COLOURS[1])
  shades = LinearSegmentedColormap.from_list(
    'attention', [(*colour, 0.0), (*colour, 0.9)]
  )
  return axis.imshow(
    map_HW,
    cmap=shades,
    vmin=0,
    vmax=highest,
    extent=extent,
    interpolation='nearest',
  )


def _caption(step, predictions, certainty_S):
  lines = [f'step {step}']
  if predictions is not None:
    lines[0] += f': {predictions[step - 1]}'
  if certainty_S is not None:
    lines.append(f'certainty {float(certainty_S[step - 1]):.2f}')
  return '\n'.join(lines)
