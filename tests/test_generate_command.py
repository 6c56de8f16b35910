"""A run's language model goes on with a text, as a user runs it."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import ctm_parity, hybrid_lm
from recursive_weights import build, config, generate
from recursive_weights.decoding import sessions
from recursive_weights.decoding.generate import Stream
from recursive_weights.interfaces import UserError
from recursive_weights.io import json_files
from recursive_weights.training import checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def run_of(made, workdir, seed=0):
  """A workdir as train.py leaves it, before the first step."""
  experiment = build.build(config.to_data(made))
  saved = checkpoints.open_folder(workdir, experiment.config)
  saved.save(jax.jit(experiment.init)(np.int32(seed)), {})
  saved.close()
  json_files.write(workdir / 'config.json', experiment.config)
  return str(workdir)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  made = hybrid_lm.get_config('smoke,attention,bytes')
  return run_of(made, tmp_path_factory.mktemp('run'))


def program(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'recursive_weights.generate', *arguments],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


def written(*arguments, **fields):
  return ''.join(generate.write(*arguments, **fields))


def test_pieces_are_one_text_and_a_session_goes_on_with_it(workdir, tmp_path):
  """Also over blocks that end within a character of several bytes."""
  path = str(tmp_path / 'talk')
  whole = written(workdir, prompt='The ', count=50)
  first = written(workdir, prompt='The ', count=30, session=path)
  rest = written(workdir, count=20, session=path)
  assert whole.startswith('The ')
  (text,) = sessions.texts(path)
  assert len(text) == 1 + 4 + 50 and text[0] == 0
  task = build.build_task(json_files.read(f'{workdir}/config.json'), 0)
  assert task.text.decode(text) == whole
  if not first.endswith('\ufffd'):
    assert first + rest == whole
  # What is added is read after all of that.
  written(workdir, prompt='é', count=1, session=path, temperature=0.0)
  (longer,) = sessions.texts(path)
  np.testing.assert_array_equal(longer[: len(text)], text)
  assert longer[len(text) : -1].tolist() == task.text.encode('é').tolist()


def test_other_weights_read_a_session_again(workdir, tmp_path):
  """Where they are asked to; they then write as if they had read it first."""
  made = hybrid_lm.get_config('smoke,attention,bytes')
  other, path = run_of(made, tmp_path, seed=1), str(tmp_path / 'talk')
  prompt = 'The "for" '
  assert written(workdir, prompt=prompt, count=0, session=path) == prompt
  with pytest.raises(UserError, match='read its text again by --rebuild'):
    written(other, count=20, session=path)
  process = program(f'--workdir={other}', f'--session={path}', '--count=20')
  assert process.returncode == 2 and '--rebuild' in process.stderr
  process = program(
    *(f'--workdir={other}', f'--session={path}', '--count=20', '--rebuild')
  )
  assert process.returncode == 0, process.stderr
  flags = {'temperature': 0.8, 'top_p': 0.95}  # as the program has them
  whole = written(other, prompt=prompt, count=20, **flags)
  assert prompt + process.stdout.removesuffix('\n') == whole
  # It is theirs now.
  written(other, count=1, session=path)


def test_what_cannot_be_written_is_said(workdir, tmp_path):
  path = str(tmp_path / 'talk')
  none = np.zeros(1, np.int32)
  sessions.save(path, Stream({}, *[none] * 4), weights='those of another run')
  made = hybrid_lm.get_config('smoke,attention')
  other = run_of(made, tmp_path / 'other', seed=1)
  for arguments, fields, message in (
    (['nowhere'], {}, "no folder 'nowhere'"),
    ([workdir], {'session': '/nowhere/talk'}, "no folder '/nowhere'"),
    ([workdir], {'top_p': 2.0}, r'top_p must lie in \[0, 1\], got 2.0'),
    ([workdir, ['--config.nothing=1']], {}, 'config.nothing is no field'),
    ([other], {'prompt': '\N{SNOWMAN}'}, "occur in the text of path, got '☃'"),
    ([other], {'session': path}, 'the state must be of these weights'),
    ([other], {'session': path, 'rebuild': True}, 'must hold its text to be'),
    ([other], {'session': path + 's', 'rebuild': True}, 'no session'),
    ([other], {'rebuild': True}, 'give --session=FILE'),
  ):
    with pytest.raises(UserError, match=message):
      written(*arguments, **fields)
  parity = run_of(ctm_parity.get_config('smoke'), tmp_path / 'parity')
  with pytest.raises(UserError, match='must be a run of a language model'):
    written(parity)


def test_the_program_needs_a_run():
  process = program('--prompt=The ')
  assert process.returncode == 2 and process.stdout == ''
  assert process.stderr == 'error: give --workdir\n'
