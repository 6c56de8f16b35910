"""Neuron-level models: each of D neurons has its own small network.

A neuron's network reads the history of its last M pre-activations. Histories
are kept as `[D, M, B]`: then every layer is one batch of D small matrix
products that no transpose precedes, and shifting costs a fiftieth of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree, UserError
from recursive_weights.models.layers import dense

ACTIVATIONS = ('glu', 'relu')


def init(
  key: Array,
  width: int,
  memory: int,
  *,
  hidden: int,
  activation: str = 'glu',
  layers: int = 0,
  norm: bool = False,
) -> Tree:
  """Parameters of D networks M -> H (-> H, `layers` times) -> 1.

  glu: a layer makes 2H values and a gated unit halves them, the output layer
    makes 2 and so does the last gate; every layer is divided by a learned
    scalar temperature (Darlow et al. 2025). Weights U(+-1/sqrt(in + out)).
  relu: no gates, no temperature, weights N(0, 0.02^2).

  With F = 2H, O = 2 (glu) or F = H, O = 1 (relu): `w1 [M, F, D]`, `b1 [F, D]`,
  `hidden [L, H, F, D]`, `hidden_bias [L, F, D]`, `w2 [O, H, D]`, `b2 [O, D]`,
  so that a contraction of w1 over M, reshaped, has the shape of w2. Biases
  start at 0, temperatures at 1. `norm` adds a layer norm over the history.
  """
  gated = activation == 'glu'
  wide, outputs = (2 * hidden, 2) if gated else (hidden, 1)

  def weight(key, shape, fan):
    if gated:
      return dense.uniform(key, shape, 1 / np.sqrt(fan))
    return 0.02 * jax.random.normal(key, shape)

  k1, k2, k3 = jax.random.split(key, 3)
  params = {
    'w1': weight(k1, (memory, wide, width), memory + wide),
    'b1': jnp.zeros([wide, width]),
    'w2': weight(k2, (outputs, hidden, width), hidden + outputs),
    'b2': jnp.zeros([outputs, width]),
  }
  if layers:
    shape = (layers, hidden, wide, width)
    params['hidden'] = weight(k3, shape, hidden + wide)
    params['hidden_bias'] = jnp.zeros([layers, wide, width])
  if gated:
    params['temperature'] = jnp.ones([2 + layers])
  if norm:
    params['norm'] = dense.norm_init(memory)
  return params


def check(*, hidden, activation='glu', layers=0, norm=False) -> None:
  """Raises `UserError` where the arguments of `init` are out of range."""
  if activation not in ACTIVATIONS:
    raise UserError(
      f'nlm.activation must be one of {ACTIVATIONS}, got {activation!r}'
    )
  if hidden < 1:
    raise UserError(f'nlm.hidden must be > 0, got {hidden}')
  if layers < 0:
    raise UserError(f'nlm.layers must be >= 0, got {layers}')
  if norm not in (True, False):
    raise UserError(f'nlm.norm must be True or False, got {norm!r}')


def prepare(params: Tree, *, gate: bool = False) -> Tree:
  """Weights by neuron, temperatures divided in, with D first."""
  cold = 1 / params.get('temperature', jnp.ones([2 + _layers(params)]))
  # An order of axes that the products want: [D, in, out].
  weights = {
    'w1': (params['w1'] * cold[0]).transpose(2, 0, 1),
    'b1': (params['b1'] * cold[0]).T[..., None],
    'w2': (params['w2'] * cold[-1]).transpose(2, 1, 0),
    'b2': (params['b2'] * cold[-1]).T[..., None],
  }
  if 'hidden' in params:
    middle = cold[1:-1, None, None]
    weights['hidden'] = (params['hidden'] * middle[..., None]).transpose(
      0, 3, 1, 2
    )
    weights['hidden_bias'] = (params['hidden_bias'] * middle).swapaxes(1, 2)[
      ..., None
    ]
  if 'norm' in params:
    weights['norm'] = params['norm']
  if gate:
    memory, wide, width = params['w1'].shape
    weights['gate'] = params['w1'].reshape(memory * wide, width).T
  return weights


def push(trace_DMB: Array, pre_BD: Array) -> Array:
  """The history without its oldest slot and with a newest one."""
  newest = pre_BD.T[:, None].astype(trace_DMB.dtype)
  return jnp.concatenate([trace_DMB[:, 1:], newest], axis=1)


def apply(
  weights: Tree,
  trace_DMB: Array,
  z_BD: Array,
  *,
  activation: str,
  dropout: float = 0.0,
  key: Array | None = None,
) -> Array:
  """The next activations `[B, D]` of all neurons.

    h_f = act(sum_m trace_m w1_mf + b1_f),  z = act(sum_h h_h w2_h + b2)

  with act the gated unit or, after hidden layers only, relu.

  Args:
    weights: from `prepare`; with 'gate', slot m of a history is multiplied by
      g_m = mean_f sigmoid(sum_d z_d w1[m, f, d]), one gate per slot and row.
    trace_DMB: histories, the newest in slot M - 1.
    z_BD: activations before this step; only the gate reads them.
    activation: 'glu' or 'relu'.
    dropout: rate on the history and on the last hidden layer.
    key: noise of dropout, or None.
  """
  if 'gate' in weights:
    trace_DMB = trace_DMB * _gate(weights['gate'], z_BD, trace_DMB.shape[1])
  # Saving the hidden values costs more memory traffic than computing them.
  network = jax.checkpoint(
    functools.partial(_network, activation=activation, dropout=dropout)
  )
  rest = {name: x for name, x in weights.items() if name != 'gate'}
  return network(rest, trace_DMB, key).T


def _network(weights, trace_DMB, key, *, activation, dropout):
  dtype = trace_DMB.dtype
  # Cast here, not before the scan: sums of gradients over steps stay float32.
  cast = {k: x.astype(dtype) for k, x in weights.items() if k != 'norm'}
  k1, k2 = (None, None) if key is None else jax.random.split(key)
  if 'norm' in weights:
    trace_DMB = dense.norm(weights['norm'], trace_DMB, axis=1)
  trace_DMB = dense.dropout(trace_DMB, dropout, k1)

  def act(x_DFB):
    if activation == 'glu':
      return dense.glu(x_DFB, 1)
    return jax.nn.relu(x_DFB)

  def layer(x_DMB, weight_DMF, bias_DF1):
    return jnp.einsum('DMB,DMF->DFB', x_DMB, weight_DMF) + bias_DF1

  h_DHB = act(layer(trace_DMB, cast['w1'], cast['b1']))
  if 'hidden' in cast:
    h_DHB, _ = jax.lax.scan(
      lambda h, wb: (act(layer(h, *wb)), None),
      h_DHB,
      (cast['hidden'], cast['hidden_bias']),
    )
  h_DHB = dense.dropout(h_DHB, dropout, k2)
  y_DOB = layer(h_DHB, cast['w2'], cast['b2'])
  if activation == 'glu':
    y_DOB = act(y_DOB)
  return y_DOB[:, 0]


def _gate(weight_DN, z_BD, memory):
  scores_BN = z_BD @ weight_DN.astype(z_BD.dtype)
  scores_BMF = scores_BN.reshape(z_BD.shape[0], memory, -1)
  gate_BM = jax.nn.sigmoid(scores_BMF.astype(jnp.float32)).mean(-1)
  return gate_BM.T[None].astype(z_BD.dtype)


def _layers(params):
  return params['hidden'].shape[0] if 'hidden' in params else 0
