"""Where a recursion looks, step by step: on a scan, a maze or a tape."""

import math
import pathlib

import numpy as np

from recursive_weights.plots import _figure

# Wall, open, start, goal.
_MAZE_COLOURS = np.array(
  [[0.20, 0.22, 0.27], [1, 1, 1], [0.0, 0.45, 0.70], [0.0, 0.62, 0.45]]
)
_PIXELS = 15  # of a side of a square of a maze
_LOOK = _figure.COLOURS[1]
_NEUTRAL = '#444444'
_VERDICT = ('#AA3377', '#00805C')  # wrong, right


def maze_picture(tokens) -> np.ndarray:
  """A maze as a person sees it: tokens `[size^2]` to RGB `[h, h, 3]`.

  The start is a blue disc, the goal a green ring, both on an open square, so
  that they differ by shape too: attention tints all colours.
  """
  side = math.isqrt(len(tokens))
  grid_XX = np.asarray(tokens).reshape(side, side)
  middle = np.arange(_PIXELS) - (_PIXELS - 1) / 2
  radius_NN = np.hypot(middle[:, None], middle[None, :]) / _PIXELS
  square_NN = np.ones_like(radius_NN, bool)
  disc_NN = radius_NN < 0.36
  ring_NN = (0.2 < radius_NN) & (radius_NN < 0.42)
  shapes_VNN = np.stack([square_NN, square_NN, disc_NN, ring_NN])
  inside_XNXN = shapes_VNN[grid_XX].swapaxes(1, 2)[..., None]
  colour_X1X1 = _MAZE_COLOURS[grid_XX][:, None, :, None]
  picture = np.where(inside_XNXN, colour_X1X1, 1.0)
  return picture.reshape(side * _PIXELS, side * _PIXELS, 3)


def strip(
  path,
  image,
  attention_SHT,
  *,
  predictions=None,
  certainty_S=None,
  right=None,
  steps: tuple[int, ...] = (),
  columns: int | None = None,
  title: str = 'Attention by step',
) -> pathlib.Path:
  """Writes one panel a step as a PNG: image, attention over it, answer.

  Args:
    path: file to write.
    image: `[h, w]`, larger values more ink, or `[h, w, 3]`, colours in [0, 1].
      One more than four times as wide as high is a tape: its panels lie below
      one another.
    attention_SHT: attention `[S, H, T]` over T tokens in reading order of a
      grid with the proportions of the image; averaged over heads. All panels
      share one colour scale, from an even share 1 / T (white, as all below) to
      the largest or, if that is more, twice the even share: attention spread
      evenly looks like none.
    predictions: S texts or numbers, the answer after each step.
    certainty_S: certainty of each step, in [0, 1], also the length of a bar
      under the panel.
    right: whether the answers are right. `[S]`, one answer: the caption says
      so. `[S, T]`, one a token: a row of marks under a tape.
    steps: steps to show, counted from 1; `()` for ten at even distances, the
      first and the last among them.
    columns: panels in a row; None for 5, or 1 for a tape.
    title: title of the picture.

  Returns:
    The path.
  """
  image = np.asarray(image)
  maps_SHW = _maps(image, attention_SHT)
  last = len(maps_SHW)
  if not steps:
    steps = tuple(np.linspace(1, last, min(10, last)).round().astype(int))
  tape = _is_tape(image)
  columns = min(columns or (1 if tape else 5), len(steps))
  rows = -(-len(steps) // columns)
  highest = max(maps_SHW[step - 1].max() for step in steps)

  with _figure.style():
    size = (6.4, 0.55) if tape else (1.75, 2.2)
    figure = _figure.new(size[0] * columns + 1.1, size[1] * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel()[len(steps) :]:
      axis.axis('off')
    for axis, step in zip(axes.flat, steps, strict=False):
      scale = _panel(axis, image, maps_SHW[step - 1], highest)
      _describe(axis, step, predictions, certainty_S, right, tape)
    bar = figure.colorbar(scale, ax=axes, shrink=0.8)
    bar.set_label('attention, mean over heads (white: an even share or less)')
    bar.outline.set_visible(False)
    figure.suptitle(title)
    if right is not None and np.ndim(right) == 2:
      figure.supxlabel(
        'under each tape: green where the answer is right, purple where wrong',
        fontsize=8,
      )
    return _figure.save(figure, path)


def film(
  path,
  image,
  attention_SHT,
  *,
  predictions=None,
  certainty_S=None,
  right=None,
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
    frames = [
      _figure.raster(
        _film_frame(
          image, maps_SHW, step, predictions, certainty_S, right, title
        )
      )
      for step in range(1, len(maps_SHW) + 1)
    ]
  pause = round(1000 / frames_per_second)
  return _figure.save_film(path, frames, pause, max(1000, pause))


def _film_frame(image, maps_SHW, step, predictions, certainty_S, right, title):
  tape = _is_tape(image)
  width, height = (5.6, 1.4) if tape else (3.4, 3.9)
  if certainty_S is None:
    figure = _figure.new(width, height)
    axis = figure.subplots()
  else:
    figure = _figure.new(width, height + 1.1)
    shares = (1, 2) if tape else (4, 1)
    axis, below = figure.subplots(2, 1, height_ratios=shares)
    seen = np.arange(1, step + 1)
    below.plot(seen, certainty_S[:step])
    below.plot(step, certainty_S[step - 1], 'o', color=_figure.COLOURS[0])
    below.set(
      xlim=(0.5, len(maps_SHW) + 0.5),
      ylim=(-0.05, 1.05),
      xlabel='step',
      ylabel='certainty',
    )
    below.xaxis.get_major_locator().set_params(integer=True)
  _panel(axis, image, maps_SHW[step - 1], maps_SHW.max())
  _describe(axis, step, predictions, None, right, tape, above=True)
  figure.suptitle(title)
  return figure


def _is_tape(image):
  return image.shape[1] > 4 * image.shape[0]


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
  """Draws the image as ink on paper, tinted where it is looked at.

  Colours multiply, so that neither hides the other. Returns the tint's scale.
  """
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import LinearSegmentedColormap, Normalize

  if image.ndim == 2:
    ink_HW = (image - image.min()) / (np.ptp(image) or 1)
    image = np.repeat(1 - ink_HW[:, :, None], 3, axis=2)
  even = 1 / map_HW.size
  scale = ScalarMappable(
    Normalize(even, max(highest, 2 * even)),
    LinearSegmentedColormap.from_list('', ['w', _LOOK]),
  )
  shape = np.lcm(image.shape[:2], map_HW.shape)
  tint = _enlarge(scale.to_rgba(map_HW)[..., :3], shape)
  axis.set(xticks=[], yticks=[])
  axis.grid(False)
  axis.spines[:].set(visible=True, color='#bbbbbb')
  axis.imshow(
    (1 - 0.5 * (1 - _enlarge(image, shape))) * tint,
    extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
    aspect='auto' if _is_tape(image) else 'equal',
    interpolation='nearest',
  )
  if _is_tape(image):
    edges = np.arange(1, image.shape[1]) - 0.5
    axis.vlines(edges, -0.5, image.shape[0] - 0.5, color='#bbbbbb', lw=0.5)
  return scale


def _enlarge(image, shape):
  """Each pixel `[h, w, 3]` as a block of those of `shape`, its multiple."""
  tall, wide = np.asarray(shape) // image.shape[:2]
  return image.repeat(tall, axis=0).repeat(wide, axis=1)


def _describe(axis, step, predictions, certainty_S, right, tape, above=None):
  """Says beside a panel what is thought at this step, and how surely."""
  text, colour = f'step {step}', _NEUTRAL
  if predictions is not None:
    text += f': {predictions[step - 1]}'
  if right is not None:
    verdict = np.asarray(right)[step - 1]
    if verdict.ndim:
      _marks(axis, verdict)
    else:
      text += ' ✓' if verdict else ' ✗'
      colour = _VERDICT[int(verdict)]
  if certainty_S is not None:
    certainty = float(certainty_S[step - 1])
    text += f'\ncertainty {certainty:.2f}'
    left, width, low = (-0.19, 0.18, -0.1) if tape else (0.0, 1.0, -0.05)
    for share, shade in ((1.0, '#dddddd'), (certainty, _figure.COLOURS[0])):
      axis.plot(
        (left, left + share * width), (low, low), transform=axis.transAxes,
        clip_on=False, lw=3, solid_capstyle='butt', color=shade,
      )  # fmt: skip
  if tape and not above:
    axis.set_ylabel(text, rotation=0, ha='right', va='center', color=colour)
  else:
    axis.set_title(text, color=colour)


def _marks(axis, right_T):
  """A row of cells under a tape, one a token: right or wrong."""
  from matplotlib.colors import ListedColormap

  left, end = axis.get_xlim()
  low = max(axis.get_ylim())
  axis.imshow(
    np.asarray(right_T, float)[None, :],
    cmap=ListedColormap(_VERDICT),
    vmin=0,
    vmax=1,
    extent=(left, end, low + 0.35, low + 0.05),
    aspect='auto',
    interpolation='nearest',
  )
  axis.set_ylim(low + 0.35, -0.5)
