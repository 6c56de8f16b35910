"""A language model of two recurrences side by side, for tests of its states.

Layers of `hybrid/time` and `hybrid/ssm`: S_t = diag(a_t) S_(t-1) + k_t v_t^T
with a_t = sigmoid(x W + b), read by q_t and normalised. Slow and plain.
"""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Decoder
from recursive_weights.models.decoder import from_decoder

LAYERS, WIDTH, HEADS, KEYS = 2, 24, 2, 6
COMPONENTS = ('time', 'ssm')


def init(key, classes):
  keys = iter(jax.random.split(key, 20))

  def draw(*shape, scale=0.3):
    flat = jax.random.normal(next(keys), (classes * 1000,))
    size = 1
    for n in shape:
      size *= n
    return scale * flat[:size].reshape(shape)

  inner = HEADS * KEYS
  part = {
    name: {
      **{w: draw(LAYERS, WIDTH, inner) for w in ('query', 'key', 'value')},
      'decay': draw(LAYERS, WIDTH, inner, scale=0.1),
      # Half-lives from 3 to 30 tokens.
      'decay_bias': jnp.tile(jnp.linspace(1.4, 3.8, inner)[None], (LAYERS, 1)),
      'out': draw(LAYERS, inner, WIDTH),
    }
    for name in COMPONENTS
  }
  return {
    'embedding': draw(classes, WIDTH, scale=1.0),
    'hybrid': part,
    'head': draw(WIDTH, classes, scale=0.05),
  }


def _mix(weights, state, x_BTD):
  batch, length = x_BTD.shape[:2]

  def heads(y_BTD):
    return y_BTD.reshape(batch, length, HEADS, KEYS)

  q, k, v = (heads(x_BTD @ weights[w]) for w in ('query', 'key', 'value'))
  bias = weights['decay_bias'][None, None]
  a = heads(jax.nn.sigmoid(x_BTD @ weights['decay'] + bias))

  def token(state, row):
    q, k, v, a = row
    state = a[..., None] * state + k[..., None] * v[..., None, :]
    return state, (jnp.einsum('BHKV,BHK->BHV', state, q), state)

  rows = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (q, k, v, a))
  _, (o, states) = jax.lax.scan(token, state, rows)
  o = jnp.moveaxis(o, 0, 1)
  o = o * jax.lax.rsqrt((o * o).mean(-1, keepdims=True) + 1e-3)
  return o.reshape(batch, length, -1) @ weights['out'], states


def blocks(params, cache, x_BTD, *, resets_BT=None, tap=None, key=None):
  """Without resets inside a chunk: the rows of these tests have none."""
  del resets_BT, key
  before = jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 0), cache['recurrent']['hybrid']
  )
  see = tap or (lambda layer, y_BTD, part: y_BTD)

  def layer(x_BTD, row):
    weights, before, index = row
    y, states = 0.0, {}
    n = x_BTD * jax.lax.rsqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-5)
    for name in COMPONENTS:
      y_BTD, states[name] = _mix(weights[name], before[name]['state'], n)
      y = y + see(index, y_BTD, f'hybrid/{name}')
    return see(index, x_BTD + y, ''), states

  x_BTD, states = jax.lax.scan(
    layer, x_BTD, (params['hybrid'], before, jnp.arange(LAYERS))
  )
  return x_BTD, states  # [L, T, B, H, K, V]


def cache(params, batch_size):
  del params
  state = jnp.zeros((batch_size, LAYERS, HEADS, KEYS, KEYS))
  return {
    'recurrent': {'hybrid': {name: {'state': state} for name in COMPONENTS}},
    'attention': {},
    'position': jnp.zeros(batch_size, jnp.int32),
  }


def commit(cache, pending, length_B=None):
  length = pending['time'].shape[1]
  if length_B is None:
    length_B = jnp.full_like(cache['position'], length)
  rows = jnp.arange(len(length_B))
  part = {
    name: {'state': states[:, length_B - 1, rows].swapaxes(0, 1)}
    for name, states in pending.items()
  }
  return {
    'recurrent': {'hybrid': part},
    'attention': {},
    'position': cache['position'] + length_B,
  }


decoder = Decoder(
  embed=lambda params, tokens_BT: params['embedding'][tokens_BT],
  blocks=blocks,
  head=lambda params, x_BTD: x_BTD @ params['head'],
  cache=cache,
  commit=commit,
)


def model(classes):
  return from_decoder(decoder._replace(init=lambda key: init(key, classes)))
