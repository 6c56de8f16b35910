"""The Continuous Thought Machine: neurons with histories that synchronise.

Source: L. Darlow, C. Regan, S. Risi, J. Seely, L. Jones, Continuous Thought
Machines, 2025 (arXiv 2505.05522).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import (
  Array,
  Model,
  Recursion,
  Spec,
  Tree,
  UserError,
)
from recursive_weights.models import (
  ctm_attention,
  ctm_neurons,
  ctm_synapse,
  ctm_sync,
)
from recursive_weights.models.layers import dense
from recursive_weights.recursion.unroll import unroll


def make(
  spec: Spec,
  *,
  width: int = 128,
  input_width: int = 64,
  heads: int = 4,
  memory: int = 15,
  ticks: int = 10,
  nlm: Mapping[str, Any] | None = None,
  synapse_depth: int = 1,
  pairing: str = 'random',
  sync_out: int = 32,
  sync_action: int = 32,
  self_pairs: int = 0,
  position: str = 'learned',
  stem: int = 0,
  vocabulary: int = 0,
  dropout: float = 0.0,
  gate: bool = False,
  remat: bool = False,
  unrolled: int = 1,
  dtype: Any = 'float32',
  seed: int = 0,
) -> Model:
  """A CTM of D neurons that thinks for S ticks.

  With z the activations, A the histories of pre-activations, s the
  synchronisation of neuron pairs (`ctm_sync`), every tick does

    o = attention(query s_action(z_0 .. z_t), keys and values of the inputs)
    a = synapse(o, z),  A = (A without its oldest, a),  z_d = nlm_d(A_d)
    logits = readout(s_out(z_0 .. z_(t+1)))

  and certainty = 1 - entropy(softmax(logits)) / ln V, the mean over positions
  of the answer. z and A start from learned values. Each example starts
  afresh, so the carry is {}.

  Parameters: `features`, `attention` (`ctm_attention`), `synapse`
  (`ctm_synapse`), `nlm` (`ctm_neurons`), `start/z [D]`, `start/trace [D, M]`,
  `sync/out_decay [P]`, `sync/action_decay [P]`, `readout`. The published
  parity-64 model (width 1024, input_width 512, heads 8, memory 25, hidden 16,
  random pairing 32 / 32, position 'rotation', 64 tokens) has 5,719,714.

  Outputs: `logits [S, B, *answer, V]`, `certainty [S, B]`, and, when not
  training, `attention [S, B, H, T]`, `sync_out [S, B, P]`,
  `activation [S, B, D]` (z after each tick). All but activation are float32.

  Args:
    spec: of the task. Inputs are integer tokens `[T]` (anything outside the
      vocabulary is not seen) or float vectors `[T, C]`.
    width: D, number of neurons.
    input_width: I, width of features and attention.
    heads: of attention; divides input_width.
    memory: M, length of a neuron's history.
    ticks: S.
    nlm: `{hidden, activation ('glu' or 'relu'), layers, norm}`, see
      `ctm_neurons.init`; None for `{'hidden': 4}`.
    synapse_depth: 1 for one gated layer, k > 1 for a U-Net of k levels.
    pairing: 'first-last', 'random' or 'random-pairing'.
    sync_out, sync_action: neurons (or, with 'random-pairing', pairs) that are
      synchronised for the answer and for attention.
    self_pairs: of these, pairs of a neuron with itself ('random-pairing').
    position: 'learned', 'rotation' or 'none', see `ctm_attention.init`.
    stem: channels of a convolutional stem on inputs that are a square read
      row by row; 0 for none.
    vocabulary: number of tokens; 0 for as many as the task has.
    dropout: rate on attention, synapses and histories, in training.
    gate: adaptive gate on histories (one gate per slot); without it no part
      of it is in the program.
    remat: keep only states for the backward pass: less memory, more time.
    unrolled: ticks in one body of the compiled loop: 5 is a sixth faster on an
      H100, 1 is faster on CPUs.
    dtype: of the computation. Synchronisation, softmax, norms and certainty
      are float32.
    seed: of the choice of neurons to pair, which is no parameter.

  Raises:
    UserError: an argument is out of range.
  """
  nlm = dict(nlm or {'hidden': 4})
  dtype = jnp.dtype(dtype)
  _check(spec, locals())
  tokens = vocabulary or spec.vocabulary or spec.classes
  length = spec.inputs.shape[0]
  outputs = int(np.prod(spec.answer)) * spec.classes
  activation = nlm.get('activation', 'glu')
  table = ctm_attention.uses_table(
    spec.inputs, tokens, heads, input_width, stem
  )
  pairs = {
    side: ctm_sync.make_pairs(pairing, side, width, count, self_pairs, seed)
    for side, count in (('out', sync_out), ('action', sync_action))
  }

  def init(key, inputs):
    if tuple(inputs.shape[1:]) != tuple(spec.inputs.shape):
      raise UserError(
        f'inputs must be [batch, {spec.inputs.shape}], got {inputs.shape}'
      )
    keys = jax.random.split(key, 6)
    features, attention = ctm_attention.init(
      keys[0],
      spec.inputs,
      tokens,
      input_width,
      pairs['action'].size,
      position,
      stem,
    )
    return {
      'features': features,
      'attention': attention,
      'synapse': ctm_synapse.init(
        keys[1], input_width + width, width, synapse_depth
      ),
      'nlm': ctm_neurons.init(keys[2], width, memory, **nlm),
      'start': {
        'z': dense.uniform(keys[3], (width,), 1 / np.sqrt(width)),
        'trace': dense.uniform(
          keys[4], (width, memory), 1 / np.sqrt(width + memory)
        ),
      },
      'sync': {
        f'{side}_decay': jnp.zeros([pairs[side].size]) for side in pairs
      },
      'readout': dense.init(keys[5], pairs['out'].size, outputs),
    }

  def prepare(params):
    return {
      'attention': ctm_attention.prepare(
        params['features'],
        params['attention'],
        inputs=spec.inputs,
        vocabulary=tokens,
        heads=heads,
        table=table,
        dtype=dtype,
      ),
      'synapse': ctm_synapse.prepare(params['synapse'], dtype),
      'nlm': ctm_neurons.prepare(params['nlm'], gate=gate),
      'start': params['start'],
      'decay': {
        side: ctm_sync.decay(params['sync'][f'{side}_decay']) for side in pairs
      },
      'readout': params['readout'],
    }

  def encode(weights, inputs, key):
    del key
    return ctm_attention.encode(
      weights['attention'], inputs, vocabulary=tokens, heads=heads, dtype=dtype
    )

  def start(weights, context):
    """The state of `tick`: histories are `[D, M, B]`, see `ctm_neurons`."""
    batch = jax.tree.leaves(context)[0].shape[0]
    z_D, trace_DM = weights['start']['z'], weights['start']['trace']
    zeros_BP = jnp.zeros([batch, pairs['action'].size])
    return {
      'z': jnp.broadcast_to(z_D[None], (batch, width)).astype(dtype),
      'trace': jnp.broadcast_to(
        trace_DM[..., None], (width, memory, batch)
      ).astype(dtype),
      'alpha': zeros_BP,
      'beta': zeros_BP,
    }

  def tick(weights, context, state, key):
    k1, k2, k3 = (None,) * 3 if key is None else jax.random.split(key, 3)
    alpha_BP, beta_BP, sync_BP = ctm_sync.accumulate(
      jnp.exp(-weights['decay']['action']),
      state['alpha'],
      state['beta'],
      ctm_sync.product(pairs['action'], state['z']),
    )
    attended_BI, share_BHT = ctm_attention.attend(
      weights['attention'],
      context,
      sync_BP,
      heads=heads,
      length=length,
      dtype=dtype,
      dropout=dropout,
      key=k1,
    )
    joined_BI = jnp.concatenate([attended_BI, state['z']], axis=1)
    pre_BD = ctm_synapse.apply(
      weights['synapse'], joined_BI, dropout=dropout, key=k2
    )
    trace_DMB = ctm_neurons.push(state['trace'], pre_BD)
    z_BD = ctm_neurons.apply(
      weights['nlm'],
      trace_DMB,
      state['z'],
      activation=activation,
      dropout=dropout,
      key=k3,
    )
    state = {'z': z_BD, 'trace': trace_DMB, 'alpha': alpha_BP, 'beta': beta_BP}
    return state, {'activation': z_BD, 'attention': share_BHT}

  def read(weights, sync):
    """Logits and certainty of output synchronisations `[..., P]`."""
    flat = dense.apply(weights['readout'], sync)
    logits = flat.reshape(*sync.shape[:-1], *spec.answer, spec.classes)
    return {
      'logits': logits,
      'certainty': certainty(logits, len(spec.answer)),
      'sync_out': sync,
    }

  core = Recursion(prepare=prepare, encode=encode, start=start, step=tick)

  def apply(params, carry, inputs, *, key=None, train=False):
    weights = prepare(params)
    context = encode(weights, inputs, None)
    first = start(weights, context)
    _, seen = unroll(
      core,
      weights,
      context,
      first,
      ticks,
      key=key if train and dropout else None,
      remat=remat,
      unrolled=unrolled,
      keep=('activation',) if train else None,
    )
    # The answer feeds nothing back, so it is read off all ticks together.
    z_SBD = jnp.concatenate([first['z'][None], seen['activation']])
    products_SBP = ctm_sync.product(pairs['out'], z_SBD)
    sync_SBP = ctm_sync.over_steps(weights['decay']['out'], products_SBP)
    outputs = read(weights, sync_SBP)
    if train:
      outputs.pop('sync_out')
      return outputs, carry
    return outputs | seen, carry

  return Model(
    init=init,
    carry=lambda params, batch_size: {},
    apply=apply,
    recursion=_by_tick(core, read, pairs['out']),
  )


def certainty(logits: Array, positions: int) -> Array:
  """`1 - entropy / ln V` of logits, the mean over the answer's axes."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  entropy = -(jnp.exp(log_p) * log_p).sum(-1) / np.log(logits.shape[-1])
  return 1 - entropy.mean(tuple(range(-positions, 0)))


def _by_tick(core: Recursion, read, pairs: ctm_sync.Pairs) -> Recursion:
  """The recursion with rows first in its state and an answer at each tick."""

  def start(weights, context):
    state = core.start(weights, context)
    product_BP = ctm_sync.product(pairs, state['z'])
    return _rows_first(state) | {
      'out_alpha': product_BP,
      'out_beta': jnp.ones_like(product_BP),
    }

  def step(weights, context, state, key):
    inner = {name: state[name] for name in ('z', 'trace', 'alpha', 'beta')}
    inner, outputs = core.step(weights, context, _rows_last(inner), key)
    alpha_BP, beta_BP, sync_BP = ctm_sync.accumulate(
      jnp.exp(-weights['decay']['out']),
      state['out_alpha'],
      state['out_beta'],
      ctm_sync.product(pairs, inner['z']),
    )
    state = _rows_first(inner) | {'out_alpha': alpha_BP, 'out_beta': beta_BP}
    return state, outputs | read(weights, sync_BP)

  return core._replace(start=start, step=step)


def _rows_first(state: Tree) -> Tree:
  return state | {'trace': jnp.moveaxis(state['trace'], -1, 0)}


def _rows_last(state: Tree) -> Tree:
  return state | {'trace': jnp.moveaxis(state['trace'], 0, -1)}


def _check(spec: Spec, given: dict[str, Any]) -> None:
  positive = (
    'width',
    'input_width',
    'heads',
    'memory',
    'ticks',
    'synapse_depth',
    'unrolled',
  )
  for name in positive:
    if given[name] < 1:
      raise UserError(f'{name} must be > 0, got {given[name]}')
  if given['input_width'] % given['heads']:
    raise UserError(
      f'heads must divide input_width = {given["input_width"]}, got '
      f'{given["heads"]}'
    )
  unknown = sorted(
    set(given['nlm']) - {'hidden', 'activation', 'layers', 'norm'}
  )
  if unknown or 'hidden' not in given['nlm']:
    raise UserError(
      'nlm must have hidden, and may have activation, layers, norm, got '
      f'{sorted(given["nlm"])}'
    )
  ctm_neurons.check(**given['nlm'])
  if given['position'] not in ctm_attention.POSITIONS:
    raise UserError(
      f'position must be one of {ctm_attention.POSITIONS}, got '
      f'{given["position"]!r}'
    )
  if not 0 <= given['dropout'] < 1:
    raise UserError(f'dropout must be in [0, 1), got {given["dropout"]}')
  for name in ('vocabulary', 'seed', 'stem'):
    if given[name] < 0:
      raise UserError(f'{name} must be >= 0, got {given[name]}')
  if spec.classes < 2:
    raise UserError(f'the task must have >= 2 classes, got {spec.classes}')
  integer = jnp.issubdtype(spec.inputs.dtype, jnp.integer)
  if len(spec.inputs.shape) != (1 if integer else 2):
    raise UserError(
      'inputs must be integer tokens [T] or float vectors [T, C], got '
      f'{spec.inputs.dtype}{list(spec.inputs.shape)}'
    )
  length = spec.inputs.shape[0]
  if given['stem'] and math.isqrt(length) ** 2 != length:
    raise UserError(
      'stem must be 0 unless inputs are a square of places, '
      f'got {given["stem"]} for {spec.inputs.dtype}{list(spec.inputs.shape)}'
    )
