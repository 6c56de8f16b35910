"""A causal language model for tests: one gated linear attention."""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Decoder
from recursive_weights.models.decoder import from_decoder
from recursive_weights.scans import linear_attention

WIDTH, HEADS, KEYS = 12, 2, 4


def init(key, classes):
  names = ('embed', 'q', 'k', 'v', 'gate', 'out', 'head', 'initial')
  keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
  flat = HEADS * KEYS
  shapes = {name: (WIDTH, flat) for name in ('q', 'k', 'v', 'gate')}
  shapes |= {'embed': (classes, WIDTH), 'head': (WIDTH, classes)}
  shapes |= {'out': (flat, WIDTH), 'initial': (HEADS, KEYS, KEYS)}
  scales = {'embed': 1.0, 'initial': 0.5, 'head': 0.5}
  return {
    name: scales.get(name, 0.3) * jax.random.normal(keys[name], shapes[name])
    for name in names
  }


def embed(params, tokens_BT):
  return params['embed'][tokens_BT]


def blocks(params, cache, x_BTD, *, resets_BT=None, tap=None, key=None):
  del key
  batch, length = x_BTD.shape[:2]

  def heads(name):
    return (x_BTD @ params[name]).reshape(batch, length, HEADS, KEYS)

  fresh_B = cache['position'] == 0
  state = jnp.where(
    fresh_B[:, None, None, None], params['initial'][None], cache['recurrent']
  )
  y_BTHV, pending = linear_attention.prefill(
    heads('q'),
    heads('k'),
    heads('v'),
    jax.nn.log_sigmoid(heads('gate') + 2.0),
    state=state,
    fresh=params['initial'],
    resets=resets_BT,
    chunk=4,
  )
  x_BTD = x_BTD + y_BTHV.reshape(batch, length, -1) @ params['out']
  x_BTD = x_BTD if tap is None else tap(0, x_BTD, '')
  return x_BTD, {'pending': pending, 'length': jnp.int32(length)}


def head(params, x_BTD):
  return x_BTD @ params['head']


def cache(params, batch_size):
  del params
  return {
    'recurrent': jnp.zeros((batch_size, HEADS, KEYS, KEYS)),
    'attention': {},
    'position': jnp.zeros(batch_size, jnp.int32),
  }


def commit(cache, pending, length_B=None):
  if length_B is None:
    length_B = jnp.full_like(cache['position'], pending['length'])
  state = linear_attention.commit(pending['pending'], length_B)
  on_B = (length_B > 0)[:, None, None, None]
  return {
    'recurrent': jnp.where(on_B, state, cache['recurrent']),
    'attention': {},
    'position': cache['position'] + length_B,
  }


decoder = Decoder(embed, blocks, head, cache, commit)


def model(classes):
  return from_decoder(decoder._replace(init=lambda key: init(key, classes)))
