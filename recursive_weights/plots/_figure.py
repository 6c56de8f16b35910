"""One look for all pictures, without pyplot's global state."""

import pathlib

import numpy as np

from recursive_weights.interfaces import UserError

# Okabe and Ito, 2008: told apart by every kind of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')

_STYLE = {
  'axes.grid': True,
  'axes.prop_cycle': None,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlesize': 10,
  'figure.titlesize': 12,
  'font.size': 9,
  'grid.alpha': 0.3,
  'legend.frameon': False,
}


def style():
  """A context in which figures get the common look.

  Raises:
    UserError: matplotlib is missing.
  """
  try:
    import matplotlib as mpl
  except ImportError as error:
    raise UserError(
      'plots need matplotlib, which is not installed; '
      "install the plots extra: pip install -e '.[plots]'"
    ) from error
  cycle = mpl.cycler(color=COLOURS)
  return mpl.rc_context({**_STYLE, 'axes.prop_cycle': cycle})


def new(width: float, height: float):
  """An empty figure of this size in inches, whose axes do not overlap."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained')


def save(figure, path) -> pathlib.Path:
  """Writes the figure, makes its folder where needed, returns its path."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  return path


def raster(figure) -> np.ndarray:
  """The figure's pixels, uint8 `[h, w, 3]`."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_film(path, frames: list, pause: int, last: int) -> pathlib.Path:
  """Writes frames `[h, w, 3]` as a GIF that repeats, returns its path.

  Args:
    pause: milliseconds of each frame but the last.
    last: milliseconds of the last one.
  """
  from PIL import Image

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  images = [Image.fromarray(frame) for frame in frames]
  images[0].save(
    path,
    save_all=True,
    append_images=images[1:],
    duration=[pause] * (len(images) - 1) + [last],
    loop=0,
  )
  return path
