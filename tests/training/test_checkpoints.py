"""Checkpoints: exact, kept as told, refused where torn or foreign."""

import json

import chex
import jax
import numpy as np
import pytest
import toy

from recursive_weights import restore
from recursive_weights.interfaces import UserError
from recursive_weights.training import checkpoints, loop


@pytest.fixture
def run(tmp_path):
  experiment = toy.experiment(checkpoint__keep=3, checkpoint__best='')
  loop.run(experiment, tmp_path)
  shapes = jax.eval_shape(experiment.init, np.int32(0))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes
  )
  saved = checkpoints.open_folder(tmp_path, experiment.config, keep=3)
  yield saved, abstract
  saved.close()


def truncate(folder):
  """Cuts a checkpoint's files of array data in half."""
  for path in (folder / 'params' / 'd').iterdir():
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_keeps_the_newest_and_the_best(tmp_path):
  experiment = toy.experiment(checkpoint__every=5, training__evaluate_every=5)
  loop.run(experiment, tmp_path)
  saved = checkpoints.open_folder(
    tmp_path, experiment.config, best='validation/loss', mode='min'
  )
  scores = {}
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    line = json.loads(line)
    scores[line['step']] = line['validation/loss']
  best = min(scores, key=scores.__getitem__)
  assert saved.steps() == sorted({35, 40, best})
  folder = checkpoints.best_folder(tmp_path, 'validation/loss', 'min')
  assert folder.name == str(best)
  saved.close()


def test_the_best_stays_when_the_run_goes_on(tmp_path):
  experiment = toy.experiment()
  state = jax.jit(experiment.init)(np.int32(0))
  for lives in ((1, 2), (3, 4, 5)):
    saved = checkpoints.open_folder(
      tmp_path, experiment.config, keep=1, best='score'
    )
    for step in lives:
      saved.save(
        state._replace(step=jax.numpy.int32(step)), {'score': 1 / step}
      )
    saved.wait()
    assert saved.steps() == [1, lives[-1]]
    saved.close()


def test_restoring_what_was_saved_changes_nothing(run, tmp_path):
  saved, abstract = run
  state = saved.restore(30, abstract)
  again = saved.restore(30, abstract)
  chex.assert_trees_all_equal(state, again)
  assert json.loads(
    (saved.path(30) / 'config' / 'config.json').read_text()
  ) == json.loads((tmp_path / 'config.json').read_text())


@pytest.mark.parametrize('harm', ['truncate', 'bits', 'about'])
def test_torn_is_refused_and_the_one_before_is_used(run, harm, caplog):
  saved, abstract = run
  folder = saved.path(40)
  if harm == 'truncate':
    truncate(folder)
  elif harm == 'about':
    (folder / 'about' / 'about.json').write_text('{"st')
  else:
    about = json.loads((folder / 'about' / 'about.json').read_text())
    about['digest']['params']['w1'] = '00000000'
    (folder / 'about' / 'about.json').write_text(json.dumps(about))
  state = saved.restore_newest(abstract)
  assert int(state.step) == 30
  assert 'refused' in caplog.text
  # Moved aside, not removed; step 40 can be saved again.
  assert (saved.folder.parent / 'refused' / '40').is_dir()
  saved.save(state._replace(step=np.int32(40) + 0 * state.step), {})
  saved.wait()
  assert 40 in saved.steps()


def test_foreign_is_refused(run):
  saved, abstract = run
  path = saved.path(40) / 'config' / 'config.json'
  config = json.loads(path.read_text())
  config['model']['width'] = 99
  path.write_text(json.dumps(config))
  with pytest.raises(checkpoints.Refused, match=r'model\.width'):
    saved.restore(40, abstract)
  assert int(saved.restore_newest(abstract).step) == 30


def test_a_run_goes_on_where_its_data_have_moved(tmp_path):
  def go_on(path, digest, steps):
    experiment = toy.experiment(training__steps=steps)
    task = {'name': 'toy', 'path': path}
    config = experiment.config | {'task': task, 'data_hash': {'train': digest}}
    loop.run(experiment._replace(config=config), tmp_path)
    return json.loads((tmp_path / 'config.json').read_text())['task']['path']

  assert go_on('/here', 'a', 20) == '/here'
  caught = tmp_path / 'metrics.jsonl'
  before = caught.read_text()
  assert go_on('/there', 'a', 30) == '/there'
  # It went on, it did not start again: what was reported stands.
  assert caught.read_text().startswith(before) and caught.read_text() != before
  with pytest.raises(UserError, match=r"data_hash\.train: 'b' here, 'a' there"):
    go_on('/there', 'b', 40)


def test_a_cache_may_lie_elsewhere():
  ours, theirs = (
    toy.experiment().config
    | {'task': {'name': 'toy', 'cache': place}, 'data_hash': {'train': 'a'}}
    for place in ('runs/embeddings', '/tmp/embeddings')
  )
  assert checkpoints.differences(ours, theirs)
  assert not checkpoints.foreign(ours, theirs)


def test_another_shape_is_refused(run):
  saved, abstract = run
  wide = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      (*s.shape[:-1], 2 * s.shape[-1]) if s.shape else (),
      s.dtype,
      sharding=s.sharding,
    ),
    abstract,
  )
  with pytest.raises(checkpoints.Refused):
    saved.restore(40, wide)


def test_nothing_usable_is_an_error_not_a_fresh_start(run):
  saved, abstract = run
  for step in saved.steps():
    truncate(saved.path(step))
  with pytest.raises(UserError, match='no usable checkpoint'):
    saved.restore_newest(abstract)


def test_a_run_without_a_best_checkpoint_says_so(run, tmp_path):
  with pytest.raises(UserError, match=r'chose no best .*: leave out --best'):
    restore.workdir(tmp_path, best=True)
  with pytest.raises(UserError, match="has the metric 'hope'"):
    checkpoints.best_folder(tmp_path, 'hope', 'max')


def test_no_checkpoint_says_so(tmp_path):
  with pytest.raises(UserError, match='no checkpoint in'):
    checkpoints.load(tmp_path, {})
  with pytest.raises(UserError, match=r'no config\.json'):
    checkpoints.read_config(tmp_path)
