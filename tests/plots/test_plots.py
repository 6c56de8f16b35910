"""Pictures are written, and the numbers in them are the ones given."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from recursive_weights.interfaces import UserError
from recursive_weights.plots import (
  answers,
  attention,
  curves,
  dynamics,
  recovery,
  spectra,
)

STEPS = 6
RNG = np.random.default_rng(0)
ATTENTION_SHT = RNG.dirichlet(np.ones(16), (STEPS, 2))
IMAGE_HW = RNG.uniform(-1, 1, (8, 8))
IMAGES_SHW3 = RNG.uniform(size=(STEPS, 40, 60, 3))


def pixels(path):
  with Image.open(path) as picture:
    assert min(picture.size) > 200
    return np.asarray(picture.convert('RGB')).astype(int)


def drawn(path):
  assert pixels(path).std() > 5
  return path


def write_metrics(path, values):
  with open(path, 'w') as file:
    for step, value in values:
      file.write(json.dumps({'step': step, 'test/accuracy': value}) + '\n')
    file.write('{"step": 99, "time/secon')  # a killed run
  return path


def every_plot(folder):
  tokens = RNG.integers(0, 4, 16)
  metrics = write_metrics(folder / 'm.jsonl', [(1, 0.2), (2, 0.4)])
  names = {'predictions': range(STEPS), 'certainty_S': np.linspace(0, 1, STEPS)}
  w_MFD = RNG.normal(size=(3, 4, 5))
  return [
    lambda p: attention.strip(p, IMAGE_HW, ATTENTION_SHT, **names),
    lambda p: attention.strip(p, IMAGE_HW, ATTENTION_SHT, steps=(2,)),
    lambda p: attention.strip(
      p, attention.maze_picture(tokens), ATTENTION_SHT, columns=4
    ),
    lambda p: dynamics.dynamics(
      p,
      {'neuron': RNG.normal(size=(STEPS, 9)), 'pair': np.ones((STEPS, 4))},
      certainty_SB=RNG.uniform(size=(STEPS, 5)),
      accuracy_S=np.linspace(0, 1, STEPS),
    ),
    lambda p: dynamics.dynamics(p, {'neuron': np.zeros((STEPS, 9))}),
    lambda p: spectra.spectra(
      p, w_MFD, (w_MFD.mean(0), w_MFD), derived_names=('a', 'b')
    ),
    lambda p: curves.curves(p, {'a': [metrics]}, metrics=('test/accuracy',)),
    lambda p: answers.strip(
      p, list(IMAGES_SHW3), [f'step {i}' for i in range(6)]
    ),
    lambda p: answers.depth(
      p, {'accuracy': np.linspace(0, 1, 9), 'valid': np.ones(9)}, trained=4
    ),
  ]


@pytest.mark.parametrize('which', range(9))
def test_pictures_are_written_where_asked(tmp_path, which):
  path = tmp_path / 'new' / 'folder' / 'picture.png'
  assert every_plot(tmp_path)[which](path) == path
  drawn(path)


def test_film_has_a_frame_a_step(tmp_path):
  path = attention.film(
    tmp_path / 'a.gif', IMAGE_HW, ATTENTION_SHT,
    certainty_S=np.linspace(0, 1, STEPS), frames_per_second=4,
  )  # fmt: skip
  with Image.open(path) as film:
    assert film.n_frames == STEPS
    assert film.info['loop'] == 0
    lasts = []
    for frame in range(STEPS):
      film.seek(frame)
      lasts.append(film.info['duration'])
  assert lasts == [250] * (STEPS - 1) + [1000]


def test_film_of_answers_has_a_frame_a_step(tmp_path):
  captions = [f'step {i}' for i in range(STEPS)]
  path = answers.film(tmp_path / 'a.gif', list(IMAGES_SHW3), captions)
  with Image.open(path) as film:
    assert film.n_frames == STEPS and film.info['loop'] == 0
    film.seek(STEPS - 1)
    assert film.info['duration'] == 2000


def test_strip_shows_the_steps_asked_for(tmp_path):
  """Each step has its own shade; the strip holds those of its steps alone."""
  shades = 0.1 + 0.15 * np.arange(STEPS)
  images = [np.full((8, 8, 3), shade) for shade in shades]
  for steps, shown in (((), (1, 2, 4, 6)), ((3,), (3,))):
    path = answers.strip(tmp_path / 'a.png', images, [''] * STEPS, steps=steps)
    seen = pixels(path)
    for step, shade in enumerate(shades, 1):
      share = (np.abs(seen - 255 * shade).max(axis=-1) < 2).mean()
      assert (share > 0.05) == (step in shown), step


def test_attention_lands_on_its_square(tmp_path):
  """One attended corner changes the panel there and nowhere else."""
  none, corner = np.zeros((2, 1, 1, 16))
  corner[..., 15] = 1
  blank = np.zeros((8, 8))
  a = pixels(attention.film(tmp_path / 'a.gif', blank, none))
  b = pixels(attention.film(tmp_path / 'b.gif', blank, corner))
  changed = np.argwhere((b - a)[..., 2] < -100)
  top, left = changed.min(axis=0)
  bottom, right = changed.max(axis=0)
  side = bottom - top
  assert side == pytest.approx(right - left, abs=3)
  assert 0.15 < side / a.shape[1] < 0.25
  assert top > 0.6 * a.shape[0] and left > 0.6 * a.shape[1]


@pytest.mark.parametrize('tokens', [15, 32])
def test_attention_must_fit_the_image(tmp_path, tokens):
  with pytest.raises(ValueError, match=f'attention over {tokens} tokens'):
    attention.strip(tmp_path / 'a.png', IMAGE_HW, np.ones((2, 1, tokens)))


def test_singular_values_of_a_stack():
  w_MFD = RNG.normal(size=(3, 4, 5))
  values_R = spectra.singular_values(w_MFD.astype(np.float32))
  flat = w_MFD.reshape(12, 5)
  wanted = np.sqrt(np.linalg.eigvalsh(flat.T @ flat))[::-1]
  np.testing.assert_allclose(values_R, wanted, rtol=1e-5)
  with pytest.raises(ValueError, match='rank >= 2'):
    spectra.singular_values(np.ones(3))


def test_curves_average_the_seeds_that_report_a_step(tmp_path):
  files = [
    write_metrics(tmp_path / 'a', [(10, 0.1), (20, 0.3), (20, 0.5)]),
    write_metrics(tmp_path / 'b', [(10, 0.3), (20, 0.7), (30, 0.9)]),
  ]
  seeds = [curves.read(file, 'test/accuracy') for file in files]
  steps, mean, spread = curves.summary(seeds)
  np.testing.assert_array_equal(steps, [10, 20, 30])
  np.testing.assert_allclose(mean, [0.2, 0.6, 0.9])
  np.testing.assert_allclose(spread, [np.sqrt(0.02), np.sqrt(0.02), 0])


def test_curves_name_what_is_missing(tmp_path):
  file = write_metrics(tmp_path / 'a', [(10, 0.1)])
  with pytest.raises(UserError, match=r"\['test/accuracy'\].*'test/los'"):
    curves.read(file, 'test/los')
  with pytest.raises(UserError, match=r'no metrics at .*nowhere'):
    curves.read(tmp_path / 'nowhere', 'test/loss')


@pytest.mark.parametrize('which', range(9))
def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, which):
  plain = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return plain(name, *args, **kwargs)

  plot = every_plot(tmp_path)[which]
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'\.\[plots\]'):
    plot(tmp_path / 'a.png')


def test_recovery_draws_a_panel_for_each_sweep(tmp_path):
  spread = {'median': 0.1, 'low': 0.05, 'high': 0.3}
  fit = {'error': spread, 'ridge': 0.1, 'noise': 0.2, 'rank': 4, 'questions': 8}
  fit |= {'unfinished': [], 'stalled': []}
  beside = {'known': spread, 'independent': spread, 'noise': 0.2}
  lines = [
    {'sweep': 'rank'} | fit,
    {'sweep': 'rank'} | fit | {'rank': 5},
    {'sweep': 'noise'} | fit,
    {'sweep': 'noise'} | beside,
  ]
  two = recovery.recovery(tmp_path / 'two.png', lines)
  one = recovery.recovery(tmp_path / 'one.png', lines[:2])
  widths = [Image.open(path).size[0] for path in (two, one)]
  assert widths[0] == 2 * widths[1]
  # A point whose steps ran out looks otherwise, not one that only rounds.
  lines[0].update(unfinished=[3], stalled=[3])
  stalled = recovery.recovery(tmp_path / 'stalled.png', lines[:2])
  assert stalled.read_bytes() == one.read_bytes()
  lines[0]['stalled'] = []
  hollow = recovery.recovery(tmp_path / 'hollow.png', lines[:2])
  assert hollow.read_bytes() != one.read_bytes()
