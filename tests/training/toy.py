"""A small experiment for the tests of training: softmax regression, noisy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import config as config_lib
from recursive_weights.interfaces import Model, Objective, Spec, Task
from recursive_weights.training import optimizers
from recursive_weights.training.loop import Experiment
from recursive_weights.training.state import make_init, make_step

WIDTH, CLASSES = 6, 3


def task(seed):
  def batch(split, index, size):
    del split
    sequence = np.random.SeedSequence([seed, index])
    rng = np.random.Generator(np.random.Philox(sequence))
    inputs_BD = rng.normal(size=(size, WIDTH)).astype(np.float32)
    targets_B = inputs_BD[:, :CLASSES].argmax(-1).astype(np.int32)
    weight_B = np.ones(size, np.float32)
    return {'inputs': inputs_BD, 'targets': targets_B, 'weight': weight_B}

  def augment(key, batch):
    noise = 0.1 * jax.random.normal(key, batch['inputs'].shape)
    return batch | {'inputs': batch['inputs'] + noise}

  def loss(answer_BV, batch):
    loss_B = optax.softmax_cross_entropy_with_integer_labels(
      answer_BV, batch['targets']
    )
    return loss_B, {'accuracy': answer_BV.argmax(-1) == batch['targets']}

  inputs = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
  return Task(Spec(inputs, (), CLASSES, {'train': None}), batch, augment, loss)


def model(keep_carry=False):
  def init(key, inputs):
    k1, k2 = jax.random.split(key)
    return {
      'w1': jax.random.normal(k1, (inputs.shape[-1], 16)) / 4,
      'w2': jax.random.normal(k2, (16, CLASSES)) / 4,
      'b': jnp.full(CLASSES, 0.0),  # of a weak type
    }

  def carry(params, batch_size):
    del params
    return {'sum': jnp.zeros((batch_size, 1))} if keep_carry else {}

  def apply(params, carry, inputs, *, key=None, train=False):
    del key, train
    logits_BV = jnp.tanh(inputs @ params['w1']) @ params['w2']
    logits_BV = logits_BV + params['b'][None]
    if keep_carry:
      carry = {'sum': 0.9 * carry['sum'] + inputs.mean(-1, keepdims=True)}
      logits_BV = logits_BV + carry['sum']
    return {'logits': logits_BV[None]}, carry

  return Model(init, carry, apply)


def score(outputs, loss, batch):
  loss_B, metrics_B = loss(outputs['logits'][-1], batch)
  weight_B = batch['weight']

  def mean(x_B):
    return (x_B * weight_B).sum() / weight_B.sum()

  return mean(loss_B), {k: mean(v) for k, v in metrics_B.items()}


objective = Objective(score, lambda outputs: outputs['logits'][-1])


def experiment(keep_carry=False, poison=None, loss=None, **changes):
  """An Experiment; `changes` are config fields, dots written as `__`."""
  config = config_lib.base()
  with config.unlocked():
    config.training.update(
      steps=40, batch_size=16, report_every=5, evaluate_every=10, ema_decay=0.9
    )
    config.training.keep_carry = keep_carry
    config.checkpoint.update(every=10, best='validation/loss', mode='min')
    for name, value in changes.items():
      node = config
      *path, last = name.split('__')
      for part in path:
        node = node[part]
      node[last] = value
  data = config_lib.to_data(config)
  tasks = tuple(task(seed) for seed in config_lib.member_seeds(data))
  if poison is not None:
    clean = tasks[0].batch

    def poisoned(split, index, size):
      batch = clean(split, index, size)
      if index == poison:
        batch['inputs'][0, 0] = np.nan
      return batch

    tasks = (tasks[0]._replace(batch=poisoned),)
  train = data['training']
  network = model(keep_carry)
  inputs = jax.ShapeDtypeStruct((train['batch_size'], WIDTH), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
  optimizer, schedule = optimizers.make(
    shapes, train['steps'], **data['optimizer']
  )

  def validation(params, key):
    del key
    # The same held-out rows for every seed.
    batch = task(99).batch('validation', 0, 64)
    outputs, _ = network.apply(
      params, network.carry(params, 64), batch['inputs']
    )
    value, metrics = score(outputs, tasks[0].loss, batch)
    return {
      'validation/loss': float(value),
      'validation/accuracy': float(metrics['accuracy']),
    }

  return Experiment(
    config=data,
    tasks=tasks,
    init=make_init(
      network,
      optimizer,
      inputs=inputs,
      batch_size=train['batch_size'],
      ema_decay=train['ema_decay'],
      keep_carry=keep_carry,
      with_rate=bool(data['early_stopping']['rules'] or data['rate_factors']),
    ),
    make_step=lambda axis: make_step(
      network,
      tasks[0],
      objective,
      optimizer,
      schedule=schedule,
      ema_decay=train['ema_decay'],
      accumulation=train['accumulation'],
      keep_carry=keep_carry,
      axis=axis,
    ),
    during={'validation': validation},
    after={'validation': validation},
  )
