"""The blocks that a hybrid language model stacks, one kind a letter.

  R  rwkv6      x += time_mix(norm x),   x += channel_mix(norm x)
  M  mamba2     x += mamba2(norm x)
  A  attention  x += attention(norm x),  x += mlp(norm x)
  H  hybrid     n = norm x
                x += fuse(time_mix n, mamba2 n),  x += mlp(norm x)

with mlp(x) = gelu(x up) down. Where there is a residual scale gamma, each sum
is `x += gamma * f(norm x)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import (
  causal_attention,
  dense,
  fusion,
  mamba2,
  rwkv6,
  trm_block,
)

LETTERS = {'R': 'rwkv6', 'M': 'mamba2', 'A': 'attention', 'H': 'hybrid'}
NORMS = ('rms', 'layer')


class Kind(NamedTuple):
  """A kind of block.

  init: `(key, layer) -> params`.
  start: `batch_size -> cache`, the batch first in every leaf.
  apply: `(params, cache, x_BTD, place_BT, key, tap) -> (x_BTD, parts)`; `key`
    is for dropout, `tap(y_BTD, part) -> y_BTD` sees what a recurrence puts out.
  commit: `(cache, parts, place_BT, length_B) -> cache`.
  """

  init: Callable[[Array, Any], Tree]
  start: Callable[[int], Tree]
  apply: Callable[..., tuple[Array, Tree]]
  commit: Callable[[Tree, Tree, Array, Array], Tree]


def make(letters: str, **fields) -> dict[str, Kind]:
  """The kinds of these letters by name; `fields`: see `hybrid_lm.make`."""
  known = {'R': _rwkv6, 'M': _mamba2, 'A': _attention, 'H': _hybrid}
  return {LETTERS[a]: known[a](**fields) for a in sorted(set(letters))}


def norm_init(kind: str, width: int) -> dict[str, Array]:
  """`{scale}` for 'rms', `{scale, bias}` for 'layer'.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind not in NORMS:
    raise ValueError(f'norm must be one of {NORMS}, got {kind!r}')
  if kind == 'layer':
    return dense.norm_init(width)
  return {'scale': jnp.ones([width])}


def norm(params: dict[str, Array], x_BTD: Array) -> Array:
  """Over the width, in float32, with epsilon 1e-5; told by its parameters."""
  if 'bias' in params:
    return dense.norm(params, x_BTD)
  scale_D = params['scale'].astype(x_BTD.dtype)
  return trm_block.rms(x_BTD) * scale_D[None, None]


def _time_fields(f):
  return {
    'init': {
      'layers': f['layers'],
      'head_width': f['head_width'],
      'mix_rank': f['mix_rank'],
      'decay_rank': f['decay_rank'],
      'half_life': f['half_life'],
      'grounding': f['grounding'],
      'learned_grounding': f['learned_grounding'],
      'learned_initial': f['initial'] == 'learned',
      'state_norm': f['state_norm'],
    },
    'apply': {
      'grounding': f['grounding'],
      'state_norm': f['state_norm'],
      'algorithm': f['algorithm'],
      'chunk': f['chunk'],
      'precision': f['precision'],
    },
  }


def _ssm_fields(f):
  shape = {
    'expand': f['expand'],
    'head_width': f['head_width'],
    'state_width': f['state_width'],
    'groups': f['groups'],
    'conv_width': f['conv_width'],
  }
  return {
    'init': shape
    | {
      'layers': f['layers'],
      'half_life': f['half_life'],
      'learned_initial': f['initial'] == 'learned',
      'state_norm': f['state_norm'],
    },
    'start': shape,
    'apply': {
      'groups': f['groups'],
      'state_norm': f['state_norm'],
      'algorithm': f['algorithm'],
      'chunk': f['chunk'],
      'precision': f['precision'],
    },
  }


def _residual(f, name, params, x_BTD, y_BTD, key, branch):
  """`x + gamma * y` with dropout of y."""
  if key is not None:
    key = jax.random.fold_in(key, branch)
  y_BTD = dense.dropout(y_BTD, f['dropout'], key)
  if f['gamma']:
    gamma_D = params[name]['gamma'].astype(x_BTD.dtype)
    y_BTD = gamma_D[None, None] * y_BTD
  return x_BTD + y_BTD


def _pre(f):
  """Parameters of one residual branch: the norm before it, its gamma."""
  params = {'norm': norm_init(f['norm'], f['width'])}
  if f['gamma']:
    params['gamma'] = jnp.full([f['width']], f['gamma'], jnp.float32)
  return params


def _mlp_init(key, f):
  up_key, down_key = jax.random.split(key)
  hidden = int(f['expansion'] * f['width'])
  return {
    'up': trm_block.lecun(up_key, f['width'], hidden),
    'down': trm_block.lecun(down_key, hidden, f['width'])
    / np.sqrt(2 * f['layers']),
  }


def _mlp(params, x_BTD):
  up, down = (params[name].astype(x_BTD.dtype) for name in ('up', 'down'))
  return jax.nn.gelu(x_BTD @ up) @ down


def _rwkv6(**f):
  time, width = _time_fields(f), f['width']
  learned = f['initial'] == 'learned'

  def init(key, layer):
    keys = jax.random.split(key)
    return {
      'before_time': _pre(f),
      'time': rwkv6.time_init(keys[0], width, layer=layer, **time['init']),
      'before_channel': _pre(f),
      'channel': rwkv6.channel_init(
        keys[1],
        width,
        layer=layer,
        layers=f['layers'],
        learned_initial=learned,
      ),
    }

  def start(batch_size):
    return {
      'time': rwkv6.time_start(batch_size, width, head_width=f['head_width']),
      'channel': rwkv6.channel_start(batch_size, width),
    }

  def apply(params, cache, x, place, key, tap):
    y, time_parts = rwkv6.time_mix(
      params['time'],
      cache['time'],
      norm(params['before_time']['norm'], x),
      place,
      **time['apply'],
    )
    y = tap(y, 'rwkv6/time')
    x = _residual(f, 'before_time', params, x, y, key, 0)
    y, channel_parts = rwkv6.channel_mix(
      params['channel'],
      cache['channel'],
      norm(params['before_channel']['norm'], x),
      place,
    )
    x = _residual(f, 'before_channel', params, x, y, key, 1)
    return x, {'time': time_parts, 'channel': channel_parts}

  def commit(cache, parts, place, length_B):
    del place
    return {
      'time': rwkv6.time_commit(cache['time'], parts['time'], length_B),
      'channel': rwkv6.channel_commit(
        cache['channel'], parts['channel'], length_B
      ),
    }

  return Kind(init, start, apply, commit)


def _mamba2(**f):
  ssm, width = _ssm_fields(f), f['width']

  def init(key, layer):
    del layer
    return {
      'before_ssm': _pre(f),
      'ssm': mamba2.init(key, width, **ssm['init']),
    }

  def start(batch_size):
    return mamba2.start(batch_size, width, **ssm['start'])

  def apply(params, cache, x, place, key, tap):
    y, parts = mamba2.apply(
      params['ssm'],
      cache,
      norm(params['before_ssm']['norm'], x),
      place,
      **ssm['apply'],
    )
    y = tap(y, 'mamba2')
    return _residual(f, 'before_ssm', params, x, y, key, 0), parts

  def commit(cache, parts, place, length_B):
    del place
    return mamba2.commit(cache, parts, length_B)

  return Kind(init, start, apply, commit)


def _attention(**f):
  width = f['width']

  def init(key, layer):
    del layer
    keys = jax.random.split(key)
    return {
      'before_attention': _pre(f),
      'attention': causal_attention.init(
        keys[0], width, layers=f['layers'], head_width=f['head_width']
      ),
      'before_mlp': _pre(f),
      'mlp': _mlp_init(keys[1], f),
    }

  def start(batch_size):
    return causal_attention.start(
      batch_size,
      width,
      window=f['window'],
      head_width=f['head_width'],
      dtype=f['dtype'],
    )

  def apply(params, cache, x, place, key, tap):
    del tap
    y, parts = causal_attention.apply(
      params['attention'],
      cache,
      norm(params['before_attention']['norm'], x),
      place,
    )
    x = _residual(f, 'before_attention', params, x, y, key, 0)
    y = _mlp(params['mlp'], norm(params['before_mlp']['norm'], x))
    return _residual(f, 'before_mlp', params, x, y, key, 1), parts

  return Kind(init, start, apply, causal_attention.commit)


def _hybrid(**f):
  time, ssm, width = _time_fields(f), _ssm_fields(f), f['width']

  def init(key, layer):
    keys = jax.random.split(key, 4)
    return {
      'before_mix': _pre(f),
      'time': rwkv6.time_init(keys[0], width, layer=layer, **time['init']),
      'ssm': mamba2.init(keys[1], width, **ssm['init']),
      'fusion': fusion.init(keys[2], f['fusion'], width),
      'before_mlp': _pre(f),
      'mlp': _mlp_init(keys[3], f),
    }

  def start(batch_size):
    return {
      'time': rwkv6.time_start(batch_size, width, head_width=f['head_width']),
      'ssm': mamba2.start(batch_size, width, **ssm['start']),
    }

  def apply(params, cache, x, place, key, tap):
    n = norm(params['before_mix']['norm'], x)
    a, time_parts = rwkv6.time_mix(
      params['time'], cache['time'], n, place, **time['apply']
    )
    b, ssm_parts = mamba2.apply(
      params['ssm'], cache['ssm'], n, place, **ssm['apply']
    )
    a, b = tap(a, 'hybrid/time'), tap(b, 'hybrid/ssm')
    y = fusion.apply(params['fusion'], f['fusion'], a, b)
    x = _residual(f, 'before_mix', params, x, y, key, 0)
    y = _mlp(params['mlp'], norm(params['before_mlp']['norm'], x))
    x = _residual(f, 'before_mlp', params, x, y, key, 1)
    return x, {'time': time_parts, 'ssm': ssm_parts}

  def commit(cache, parts, place, length_B):
    del place
    return {
      'time': rwkv6.time_commit(cache['time'], parts['time'], length_B),
      'ssm': mamba2.commit(cache['ssm'], parts['ssm'], length_B),
    }

  return Kind(init, start, apply, commit)
