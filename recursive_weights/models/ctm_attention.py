"""What the neurons look at: features of the inputs, and attention to them.

Everything that no step changes is done once: features, keys and values, and
products of linear maps that follow one another.

Where inputs are few kinds of tokens, a feature depends on (position, token)
alone. Then keys and values are a table of T V rows that all examples share,
each example sees its own T rows through a mask, and the table melts into the
weights around it: attention is `sync @ scores`, a masked softmax, and
`@ values`, without keys and values per example.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import dense
from recursive_weights.recursion.hoist import Linear, linear

POSITIONS = ('learned', 'rotation', 'none')
# A table may have this many times the columns of the projections it replaces.
_TABLE_LIMIT = 4


def uses_table(
  inputs, vocabulary: int, heads: int, input_width: int, stem: int = 0
) -> bool:
  """Whether keys and values are a table; `inputs`: of one example."""
  if stem or not jnp.issubdtype(inputs.dtype, jnp.integer):
    return False
  return heads * inputs.shape[0] * vocabulary <= _TABLE_LIMIT * input_width


def init(
  key: Array,
  inputs,
  vocabulary: int,
  width: int,
  pairs: int,
  position: str,
  stem: int = 0,
) -> tuple[Tree, Tree]:
  """Parameters `features` and `attention`.

  Args:
    inputs: shape and dtype of one example: integer `[T]` or float `[T, C]`.
    vocabulary: number of tokens V.
    width: I, of features, queries, keys and values.
    pairs: P, width of the synchronisation that asks.
    position: 'learned': a vector for each position; 'rotation': a dense layer
      of (-sin, cos) of an angle that goes from 0 to pi over the positions;
      'none'.
    stem: channels of two 3x3 convolutions over the inputs (tokens as one-hot
      vectors), whose T places are then a square read row by row; 0 for none.
  """
  keys = iter(jax.random.split(key, 12))
  features: Tree = {
    'linear': dense.init(next(keys), width, width),
    'norm': dense.norm_init(width),
  }
  integer = jnp.issubdtype(inputs.dtype, jnp.integer)
  if integer and not stem:
    table = jax.random.normal(next(keys), (vocabulary, width))
    features['embedding'] = table
  else:
    channels = stem or inputs.shape[-1]
    features['dense'] = dense.init(next(keys), channels, width)
  if position == 'learned':
    shape = (inputs.shape[0], width)
    features['position'] = 0.5 * jax.random.normal(next(keys), shape)
  elif position == 'rotation':
    features['rotation'] = dense.init(next(keys), 2, width)

  bound = np.sqrt(6 / (4 * width))  # Xavier of the three projections together
  attention = {'sync': dense.init(next(keys), pairs, width)}
  for name in ('query', 'key', 'value'):
    kernel = dense.uniform(next(keys), (width, width), bound)
    attention[name] = {'kernel': kernel, 'bias': jnp.zeros([width])}
  out = dense.init(next(keys), width, width)
  attention['out'] = out | {'bias': jnp.zeros([width])}
  if stem:
    channels = vocabulary if integer else inputs.shape[-1]
    features['stem'] = {
      'first': _convolution(next(keys), channels, stem),
      'second': _convolution(next(keys), stem, stem),
    }
  return features, attention


def _convolution(key, inputs, outputs):
  kernel = dense.uniform(key, (3, 3, inputs, outputs), 1 / np.sqrt(9 * inputs))
  return {'kernel': kernel, 'bias': jnp.zeros([outputs])}


def _stem(params, x_BTC, dtype):
  """`[B, T, C]` to `[B, T, channels]`: SiLU(conv), twice, same size."""
  batch, length, channels = x_BTC.shape
  side = math.isqrt(length)
  x_BXYC = x_BTC.astype(dtype).reshape(batch, side, side, channels)
  for name in ('first', 'second'):
    weights = params[name]
    x_BXYC = jax.lax.conv_general_dilated(
      x_BXYC,
      weights['kernel'].astype(dtype),
      window_strides=(1, 1),
      padding='SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    bias = weights['bias'].astype(dtype)[None, None, None]
    x_BXYC = jax.nn.silu(x_BXYC + bias)
  return x_BXYC.reshape(batch, length, -1)


def tokens(params: Tree, inputs: Array, dtype) -> Array:
  """Features `[..., T, I]`, normalised: `LayerNorm(Linear(x + position))`."""
  if 'embedding' in params:
    x = params['embedding'].astype(dtype)[inputs]
  else:
    x = inputs
    if jnp.issubdtype(x.dtype, jnp.integer):
      vocabulary = params['stem']['first']['kernel'].shape[2]
      x = jax.nn.one_hot(x, vocabulary)
    x = x.astype(dtype)
    if 'stem' in params:
      x = _stem(params['stem'], x, dtype)
    x = dense.apply(params['dense'], x)
  length = x.shape[-2]
  place_TI = None
  if 'position' in params:
    place_TI = params['position']
  elif 'rotation' in params:
    angle_T = np.linspace(0, np.pi, length, dtype=np.float32)
    turned_T2 = np.stack([-np.sin(angle_T), np.cos(angle_T)], axis=-1)
    place_TI = dense.apply(params['rotation'], jnp.asarray(turned_T2))
  if place_TI is not None:
    shape = (1,) * (x.ndim - 2) + place_TI.shape
    x = x + place_TI.reshape(shape).astype(dtype)
  return dense.norm(params['norm'], dense.apply(params['linear'], x))


def prepare(
  features: Tree,
  attention: Tree,
  *,
  inputs,
  vocabulary: int,
  heads: int,
  table: bool,
  dtype,
) -> Tree:
  """Weights of attention with all products of weights done."""
  width = attention['out']['kernel'].shape[0]
  head = width // heads
  sync, query = attention['sync'], attention['query']
  scale = 1 / np.sqrt(head)
  kernel_PI = sync['kernel'] @ query['kernel'] * scale
  bias_I = (sync['bias'] @ query['kernel'] + query['bias']) * scale
  if not table:
    return {
      'features': features,
      'key': attention['key'],
      'value': attention['value'],
      'query': Linear(kernel_PI.astype(dtype), bias_I.astype(dtype)),
      'out': Linear(
        attention['out']['kernel'].astype(dtype),
        attention['out']['bias'].astype(dtype),
      ),
    }

  every_VT = jnp.broadcast_to(
    jnp.arange(vocabulary)[:, None], (vocabulary, inputs.shape[0])
  )
  x_VTI = tokens(features, every_VT, jnp.float32)
  x_NI = x_VTI.swapaxes(0, 1).reshape(-1, width)  # row of (t, v): t V + v
  keys_NHK = dense.apply(attention['key'], x_NI).reshape(-1, heads, head)
  values_NHK = dense.apply(attention['value'], x_NI).reshape(-1, heads, head)
  kernel_PHK = kernel_PI.reshape(-1, heads, head)
  out_HKI = attention['out']['kernel'].reshape(heads, head, width)
  scores_PHN = jnp.einsum('PHK,NHK->PHN', kernel_PHK, keys_NHK)
  bias_HN = jnp.einsum('HK,NHK->HN', bias_I.reshape(heads, head), keys_NHK)
  values_HNI = jnp.einsum('NHK,HKI->HNI', values_NHK, out_HKI)
  return {
    'scores': Linear(
      scores_PHN.reshape(scores_PHN.shape[0], -1).astype(dtype),
      bias_HN.reshape(-1).astype(dtype),
    ),
    'values': Linear(
      values_HNI.reshape(-1, width).astype(dtype),
      attention['out']['bias'].astype(dtype),
    ),
  }


def encode(
  weights: Tree, inputs: Array, *, vocabulary: int, heads: int, dtype
) -> Tree:
  """What attention needs of the inputs: `present`, or `keys` and `values`."""
  if 'scores' in weights:
    one_hot_BTV = inputs[..., None] == jnp.arange(vocabulary)[None, None]
    return {'present': one_hot_BTV.reshape(inputs.shape[0], -1)}
  x_BTI = tokens(weights['features'], inputs, dtype)

  def project(params):
    y_BTI = dense.apply(params, x_BTI)
    return y_BTI.reshape(*y_BTI.shape[:2], heads, -1).swapaxes(1, 2)

  return {'keys': project(weights['key']), 'values': project(weights['value'])}


def attend(
  weights: Tree,
  context: Tree,
  sync_BP: Array,
  *,
  heads: int,
  length: int,
  dtype,
  dropout: float,
  key: Array | None,
) -> tuple[Array, Array]:
  """Attended features `[B, I]` and attention `[B, H, T]` (float32)."""
  batch = sync_BP.shape[0]
  if 'scores' in weights:
    scores = linear(weights['scores'], sync_BP.astype(dtype))
    scores_BHN = scores.reshape(batch, heads, -1).astype(jnp.float32)
    present_B1N = context['present'][:, None]
    share_BHN = jax.nn.softmax(scores_BHN, axis=-1, where=present_B1N)
    mixed_BHN = dense.dropout(share_BHN, dropout, key).astype(dtype)
    out_BI = linear(weights['values'], mixed_BHN.reshape(batch, -1))
    return out_BI, share_BHN.reshape(batch, heads, length, -1).sum(-1)

  query_BHK = linear(weights['query'], sync_BP.astype(dtype))
  query_BHK = query_BHK.reshape(batch, heads, -1)
  scores_BHT = jnp.einsum('BHK,BHTK->BHT', query_BHK, context['keys'])
  share_BHT = jax.nn.softmax(scores_BHT.astype(jnp.float32), axis=-1)
  mixed_BHT = dense.dropout(share_BHT, dropout, key).astype(dtype)
  out_BHK = jnp.einsum('BHT,BHTK->BHK', mixed_BHT, context['values'])
  return linear(weights['out'], out_BHK.reshape(batch, -1)), share_BHT
