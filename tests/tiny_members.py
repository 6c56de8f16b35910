"""A language model for tests of members: a running sum and two layers."""

import jax
import jax.numpy as jnp

from recursive_weights import build as build_lib
from recursive_weights.interfaces import Model

FIELDS = {'name': 'tiny'}
D = 6


def model(spec):
  """A language model of a running sum and two layers."""

  def init(key, inputs):
    assert set(inputs) == {'tokens', 'resets'}
    keys = jax.random.split(key, 3)
    return {
      'table': jax.random.normal(keys[0], (spec.classes, D)),
      'large': {
        'past': 0.3 * jax.random.normal(keys[1], (D, D)),
        'stack': 0.3 * jax.random.normal(keys[2], (2, D, D)),
      },
      'norm': jnp.ones(D),
    }

  def carry(params, batch_size):
    return {'sum': jnp.zeros((batch_size, D))}

  def apply(params, carry, inputs, *, key=None, train=False):
    x_BTD = params['table'][inputs['tokens']]
    sum_BTD = carry['sum'][:, None] + jnp.cumsum(x_BTD, axis=1)
    h_BTD = x_BTD + jnp.tanh(sum_BTD @ params['large']['past'])
    for w_DD in params['large']['stack']:
      h_BTD = h_BTD + jnp.tanh(h_BTD @ w_DD)
    logits_BTV = (h_BTD * params['norm'][None, None]) @ params['table'].T
    outputs = {'logits': logits_BTV[None]}
    if train:
      outputs['penalties'] = {'size': (h_BTD**2).mean()}
    return outputs, {'sum': sum_BTD[:, -1]}

  return Model(init, carry, apply)


def build(room, fields, *arguments, **extra):
  if fields['name'] == 'tiny':
    return model(*arguments)
  return build_lib.make(room, fields, *arguments, **extra)
