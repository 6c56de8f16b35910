"""The recurrences that scans compute, token by token: what tests hold them to.

Written from the equations, with no code of the package, and run in float64.
Inputs go by the names of the scans' arguments; those with an axis T lose it,
and the T of their name, in a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.scans import (
  delta_rule,
  linear_attention,
  selective,
  ssd,
)

B, G, H, K, V = 2, 1, 2, 4, 3


class Sizes(NamedTuple):
  """Of keys and values, and the channels of Mamba-1."""

  K: int = K
  V: int = V
  D: int = H


SMALL = Sizes()


class Case(NamedTuple):
  """A scan, `inputs(stream, length, mean, sizes)`, `token(state, **token)`.

  The mean is that of log decays. A state has the sizes of these axes.
  """

  module: object
  inputs: object
  token: object
  axes: str = 'KV'

  def state(self, sizes=SMALL):
    heads = (H,) if self.axes == 'KV' else ()
    return *heads, *(getattr(sizes, axis) for axis in self.axes)

  def outputs(self, length, sizes=SMALL):
    own = (H, sizes.V) if self.axes == 'KV' else (sizes.D,)
    return B, length, *own


def decays(stream, mean, shape):
  """Log decays of a mean; for minus infinity those of every kind."""
  if np.isfinite(mean):
    return mean * stream.exponential(size=shape)
  kinds, shares = [0.0, -1e-4, -1e4, -np.inf], [0.3, 0.3, 0.3, 0.1]
  return stream.choice(kinds, shape, p=shares)


def attention_inputs(
  stream, length, mean, sizes, *, whole=False, beta=False, bonus=False
):
  """Heads that decay as a whole share queries and keys."""
  K, V, _ = sizes
  width, groups = ((H,), G) if whole else ((H, K), H)
  q, k = stream.normal(size=(2, B, length, groups, K))
  inputs = {
    'q_BTGK': q,
    'k_BTGK': k / np.linalg.norm(k, axis=-1, keepdims=True),
    'v_BTHV': stream.normal(size=(B, length, H, V)),
    'log_decay': decays(stream, mean, (B, length, *width)),
  }
  if beta:
    inputs['beta_BTH'] = stream.uniform(0.1, 0.9, (B, length, H))
  if bonus:
    inputs['bonus_HK'] = stream.normal(size=(H, K))
  return inputs


def ssd_inputs(stream, length, mean, sizes):
  K, V, _ = sizes
  b, c = stream.normal(size=(2, B, length, G, K))
  return {
    'x_BTHV': stream.normal(size=(B, length, H, V)),
    'dt_BTH': stream.exponential(size=(B, length, H)),
    'a_H': np.maximum(decays(stream, mean, (H,)), -1e4),
    'b_BTGN': b,
    'c_BTGN': c,
  }


def selective_inputs(stream, length, mean, sizes):
  K, _, D = sizes
  b, c = stream.normal(size=(2, B, length, K))
  return {
    'x_BTD': stream.normal(size=(B, length, D)),
    'dt_BTD': stream.exponential(size=(B, length, D)),
    'a_DN': np.maximum(decays(stream, mean, (D, K)), -1e4),
    'b_BTN': b,
    'c_BTN': c,
  }


def heads(x_BGK):
  return jnp.repeat(x_BGK, H // x_BGK.shape[1], axis=1)


def outer(k_BHK, v_BHV):
  return k_BHK[..., :, None] * v_BHV[..., None, :]


def attention_token(state, q_BGK, k_BGK, v_BHV, log_decay, bonus_HK=None):
  written = outer(heads(k_BGK), v_BHV)
  after = jnp.exp(log_decay)[..., None] * state + written
  read = after
  if bonus_HK is not None:
    read = state + bonus_HK[None, :, :, None] * written
  return jnp.einsum('bhk,bhkv->bhv', heads(q_BGK), read), after


def delta_token(state, q_BGK, k_BGK, v_BHV, log_decay, beta_BH):
  if log_decay.ndim == 2:
    log_decay = log_decay[..., None]
  k, beta = heads(k_BGK), beta_BH[..., None, None]
  keep = jnp.eye(k.shape[-1])[None, None] - beta * outer(k, k)
  state = jnp.einsum(
    'bhkl,bhlv->bhkv', keep, jnp.exp(log_decay)[..., None] * state
  )
  state += beta * outer(k, v_BHV)
  return jnp.einsum('bhk,bhkv->bhv', heads(q_BGK), state), state


def ssd_token(state, x_BHV, dt_BH, a_H, b_BGN, c_BGN):
  state = jnp.exp(dt_BH * a_H[None])[..., None, None] * state
  state += outer(heads(b_BGN), dt_BH[..., None] * x_BHV)
  return jnp.einsum('bhn,bhnv->bhv', heads(c_BGN), state), state


def selective_token(state, x_BD, dt_BD, a_DN, b_BN, c_BN):
  state = jnp.exp(dt_BD[..., None] * a_DN[None]) * state
  state += (dt_BD * x_BD)[..., None] * b_BN[:, None]
  return jnp.einsum('bdn,bn->bd', state, c_BN), state


CASES = {
  'gated_linear': Case(linear_attention, attention_inputs, attention_token),
  'rwkv6': Case(
    linear_attention,
    functools.partial(attention_inputs, bonus=True),
    attention_token,
  ),
  'gated_delta': Case(
    delta_rule,
    functools.partial(attention_inputs, whole=True, beta=True),
    delta_token,
  ),
  'kimi_delta': Case(
    delta_rule, functools.partial(attention_inputs, beta=True), delta_token
  ),
  'ssd': Case(ssd, ssd_inputs, ssd_token),
  'selective': Case(selective, selective_inputs, selective_token, 'DK'),
}


def timed(name):
  """Whether an argument has the axis T, its second."""
  return 'T' in name or name == 'log_decay'


def sizes_of(inputs):
  """Of named inputs; of those that a scan has not, the last's."""
  last = {name[-1]: x.shape[-1] for name, x in inputs.items()}
  return Sizes(last.get('K', last.get('N')), last.get('V'), last.get('D'))


def gate(inputs):
  """The argument that decays follow from."""
  (name,) = {'log_decay', 'a_H', 'a_DN'} & set(inputs)
  return name


def given(name, length, mean=-0.05, seed=0, sizes=SMALL):
  """Inputs, and what all scans share: NumPy, float64."""
  stream, case = np.random.default_rng(seed), CASES[name]
  inputs = case.inputs(stream, length, mean, sizes)
  shared = {
    'state': stream.normal(size=(B, *case.state(sizes))),
    'fresh': stream.normal(size=case.state(sizes)),
    'resets': np.zeros((B, length), bool),
    'mask': np.ones((B, length), bool),
  }
  return inputs, shared


def at(inputs, where):
  """Inputs with their axis T, where they have one, cut or indexed."""
  return {n: x[:, where] if timed(n) else x for n, x in inputs.items()}


def token_of(inputs):
  """Inputs of a token by the names that `step` gives them."""
  return {name.replace('T', ''): x for name, x in inputs.items()}


def scan(name, *, state=None, fresh=None, resets, mask, step=None, **inputs):
  """`(y, last state)` in the dtype of what is given.

  By the equations, or by a scan's own `step`, which is told of resets. Resets
  bring in zeros where no fresh state is given, and a row starts from what they
  bring in where no state is.
  """
  case = CASES[name]
  if fresh is None:
    fresh = jnp.zeros(case.state(sizes_of(inputs)), inputs[gate(inputs)].dtype)
  if state is None:
    state = jnp.broadcast_to(fresh[None], (B, *fresh.shape))
  constant = {n: x for n, x in inputs.items() if not timed(n)}
  along = {n: jnp.moveaxis(x, 1, 0) for n, x in inputs.items() if timed(n)}

  def one(state, token):
    reset_B, on_B, inputs = token
    rows = (-1, *[1] * (state.ndim - 1))
    inputs = token_of(inputs | constant)
    if step is not None:
      y, after = step(state, **inputs, resets=reset_B, fresh=fresh)
    else:
      start = jnp.where(reset_B.reshape(rows), fresh[None], state)
      y, after = case.token(start, **inputs)
    state = jnp.where(on_B.reshape(rows), after, state)
    return state, jnp.where(on_B.reshape(rows[: y.ndim]), y, 0.0)

  state, y = jax.lax.scan(one, state, (resets.T, mask.T, along))
  return jnp.moveaxis(y, 0, 1), state


_scan = jax.jit(scan, static_argnames='name')


def loop(name, inputs, shared):
  """`(y, last state)` as float64."""
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, _scan(name, **inputs, **shared))
