"""Training that hands its state on: what it computes, and how it resumes."""

import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recursive_weights import build
from recursive_weights import config as config_lib
from recursive_weights.recursion import objective
from recursive_weights.tasks import text
from recursive_weights.training import checkpoints, loop, optimizers
from recursive_weights.training.loop import Experiment
from recursive_weights.training.state import make_init, make_step
from tests import tiny_decoder

LAST = objective.last()
CURRICULUM = ((0, 4), (9, 8))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  documents = [''.join(rng.choice(list('abcd'), 50)) for _ in range(80)]
  path.write_text('\n\n'.join(documents))
  return str(path)


def experiment(path, learning_rate=1e-2, **changes):
  """`changes` are fields of the task, or of `training`."""
  config = config_lib.base()
  config.optimizer.learning_rate = learning_rate
  config.training.update(
    steps=20, batch_size=8, report_every=5, evaluate_every=10, keep_carry=True
  )
  config.checkpoint.every = 10
  fields = {'path': path, 'separator': '\n\n', 'length': 16}
  for name, value in changes.items():
    if name in config.training:
      config.training[name] = value
    else:
      fields[name] = value
  data = config_lib.to_data(config)
  train = data['training']
  task = text.make(**fields)
  model = tiny_decoder.model(task.spec.classes)
  inputs = build.example(task, train['batch_size'])
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  optimizer, schedule = optimizers.make(shapes, 20, **data['optimizer'])
  keep = train['keep_carry']
  return Experiment(
    config=data,
    tasks=(task,),
    init=make_init(
      model,
      optimizer,
      inputs=inputs,
      batch_size=train['batch_size'],
      ema_decay=0.0,
      keep_carry=keep,
    ),
    make_step=lambda axis: make_step(
      model,
      task,
      LAST,
      optimizer,
      schedule=schedule,
      keep_carry=keep,
      axis=axis,
    ),
    during={},
    after={},
  )


def final_state(given, workdir):
  shapes = jax.eval_shape(given.init, np.int32(0))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes
  )
  state, _ = checkpoints.load_state(workdir, abstract)
  return jax.tree.map(np.asarray, state)


def stopping(given, after):
  """The experiment, told to stop (SIGTERM) when it fetches batch `after`."""
  clean = given.tasks[0].batch

  def batch(split, index, size):
    if split == 'train' and index == after:
      os.kill(os.getpid(), signal.SIGTERM)
    return clean(split, index, size)

  return given._replace(tasks=(given.tasks[0]._replace(batch=batch),))


@pytest.mark.slow
def test_resuming_hands_the_state_on_to_the_bit(path, tmp_path):
  """Also across phases of a curriculum, and for any steps a dispatch."""
  whole = experiment(path, curriculum=CURRICULUM, steps_per_dispatch=20)
  loop.run(whole, tmp_path / 'whole')
  state = final_state(whole, tmp_path / 'whole')
  # Tokens that every track has read.
  assert int(state.step) == 20
  assert state.carry['position'].tolist() == [9 * 4 + 11 * 8] * 8
  first = experiment(path, curriculum=CURRICULUM, steps_per_dispatch=2)
  assert loop.run(stopping(first, 6), tmp_path / 'cut') == {}
  assert 0 < int(final_state(first, tmp_path / 'cut').step) < 20
  loop.run(experiment(path, curriculum=CURRICULUM), tmp_path / 'cut')
  chex.assert_trees_all_equal(final_state(first, tmp_path / 'cut'), state)


@pytest.fixture(scope='module')
def compiled(path):
  """The step of frozen weights, with hand-off and without."""
  return {
    keep: jax.jit(
      experiment(path, learning_rate=1e-12, keep_carry=keep).make_step(None)
    )
    for keep in (True, False)
  }


def steps(path, compiled, count, keep=True, **changes):
  given = experiment(path, keep_carry=keep, **changes)
  state = jax.jit(given.init)(np.int32(0))
  found = []
  for index in range(count):
    batch = given.tasks[0].batch('train', index, 8)
    state, metrics = compiled[keep](state, batch)
    found.append((state, metrics, batch))
  return found


@jax.jit
def losses(params, carry, inputs, targets_BT):
  model = tiny_decoder.model(params['head'].shape[1])
  outputs, carry = model.apply(params, carry, inputs, key=None)
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    outputs['logits'][0], targets_BT
  )
  return loss_BT, carry


def test_chunks_with_hand_off_are_the_whole_text(path, compiled):
  """With frozen weights, losses are those of one pass over all chunks."""
  found = steps(path, compiled, 6)
  inputs = [batch['inputs'] for *_, batch in found]
  joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *inputs)
  targets_BT = np.concatenate([batch['targets'] for *_, batch in found], axis=1)
  params = found[0][0].params
  fresh = tiny_decoder.cache(params, 8)
  loss_BT, _ = losses(params, fresh, joined, targets_BT)
  by_chunk = loss_BT.reshape(8, 6, 16).mean((0, 2))
  handed = jnp.stack([metrics['loss'] for _, metrics, _ in found])
  chex.assert_trees_all_close(handed, by_chunk, rtol=1e-5)
  alone = steps(path, compiled, 6, keep=False)
  fresh = jnp.stack([metrics['loss'] for _, metrics, _ in alone])
  assert abs(fresh[0] - handed[0]) < 1e-6
  assert (jnp.abs(fresh[1:] - handed[1:]) > 1e-5).all()
  dealt = steps(path, compiled, 6, order='shuffled')
  wrong = jnp.stack([metrics['loss'] for _, metrics, _ in dealt])
  assert (jnp.abs(wrong[1:] - handed[1:]) > 1e-5).all()


def test_a_handed_on_state_passes_no_gradient(path, compiled):
  """The gradient of a step is that with its first state held constant."""
  (first, _, _), (before, _, earlier), (_, metrics, batch) = steps(
    path, compiled, 3
  )

  def loss(params, carry):
    return losses(params, carry, batch['inputs'], batch['targets'])[0].mean()

  def through(params):
    """Without the model's stop: the decoder's own chunks, one after another."""
    inputs, decoder = earlier['inputs'], tiny_decoder.decoder
    x_BTD = decoder.embed(params, inputs['tokens'])
    _, pending = decoder.blocks(
      params, first.carry, x_BTD, resets_BT=inputs['resets']
    )
    return loss(params, decoder.commit(first.carry, pending))

  held = jax.jit(jax.grad(loss))(before.params, before.carry)
  chex.assert_trees_all_close(
    metrics['gradient_norm'], optax.tree.norm(held), rtol=1e-5
  )
  whole = jax.jit(jax.grad(through))(before.params)
  passed = optax.tree.norm(jax.tree.map(jnp.subtract, whole, held))
  assert passed > 1e-3


def test_dispatches_are_cut_where_phases_begin():
  plan = list(loop._plan(3, 30, 8, [10], [0, 7, 12]))
  assert plan == [(3, 4), (7, 3), (10, 2), (12, 8), (20, 8), (28, 2)]
