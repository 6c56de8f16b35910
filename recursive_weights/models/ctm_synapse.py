"""Synapses: how neurons share information before each step."""

import itertools

import jax
import numpy as np

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import dense
from recursive_weights.recursion.hoist import Linear, linear

_NARROWEST = 16


def widths(width: int, depth: int) -> list[int]:
  """Widths of the levels of a U-Net, from D down to 16."""
  return [int(w) for w in np.linspace(width, _NARROWEST, depth)]


def init(key: Array, inputs: int, width: int, depth: int) -> Tree:
  """Depth 1: `linear [I, 2D]` and `norm`; else a U-Net of `depth` levels."""
  if depth == 1:
    return {
      'linear': dense.init(key, inputs, 2 * width),
      'norm': dense.norm_init(width),
    }
  levels = widths(width, depth)
  keys = iter(jax.random.split(key, 2 * depth))

  def block(inputs, outputs):
    linear = dense.init(next(keys), inputs, outputs)
    return {'linear': linear, 'norm': dense.norm_init(outputs)}

  params = {'first': block(inputs, width), 'down': {}, 'up': {}, 'skip': {}}
  for i, (wide, narrow) in enumerate(itertools.pairwise(levels)):
    params['down'][f'level{i}'] = block(wide, narrow)
    params['up'][f'level{i}'] = block(narrow, wide)
    params['skip'][f'level{i}'] = dense.norm_init(wide)
  return params


def prepare(params: Tree, dtype) -> Tree:
  """The same tree with its dense layers as `hoist.Linear` in `dtype`."""
  if 'kernel' in params:
    return Linear(params['kernel'].astype(dtype), params['bias'].astype(dtype))
  return {
    name: prepare(x, dtype) if isinstance(x, dict) else x
    for name, x in params.items()
  }


def apply(weights: Tree, x_BI: Array, *, dropout: float, key) -> Array:
  """Pre-activations `[B, D]` of (attended features, activations) `[B, I]`.

  Depth 1: LayerNorm(GLU(Linear(Dropout(x)))). A U-Net goes down through
  blocks SiLU(LayerNorm(Linear(Dropout(x)))) and up again, with
  LayerNorm(up + down) where levels of one width meet.

  Source: L. Darlow et al., 2025, sections 3.2 and C.1.
  """
  if 'linear' in weights:
    x_BI = dense.dropout(x_BI, dropout, key)
    gated_BD = dense.glu(linear(weights['linear'], x_BI))
    return dense.norm(weights['norm'], gated_BD)

  def block(weights, x, number):
    own = None if key is None else jax.random.fold_in(key, number)
    x = linear(weights['linear'], dense.dropout(x, dropout, own))
    return jax.nn.silu(dense.norm(weights['norm'], x))

  depth = len(weights['down'])
  # The first projection has no dropout.
  x = linear(weights['first']['linear'], x_BI)
  x = jax.nn.silu(dense.norm(weights['first']['norm'], x))
  kept = []
  for i in range(depth):
    kept.append(x)
    x = block(weights['down'][f'level{i}'], x, i)
  for i in reversed(range(depth)):
    x = block(weights['up'][f'level{i}'], x, depth + i)
    x = dense.norm(weights['skip'][f'level{i}'], x + kept[i])
  return x
