"""Every scan is one recurrence, whatever form it is run in.

The reference is a loop over tokens in NumPy and float64, written from the
equations. The recurrent form equals it, the chunked form equals the recurrent
one in values and gradients, pieces equal the whole.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.scans import (
  delta_rule,
  linear_attention,
  selective,
  ssd,
)

B, T, G, H, K, V = 2, 13, 1, 2, 4, 3
CHUNK = 4
TOLERANCE = 1e-5
# Programs run once or twice: half the time to compile, the same values.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': '0'}
)


class Case(NamedTuple):
  """A scan with its inputs, in the order of its arguments.

  inputs: `(stream, gates) -> arrays`; `gates(shape)` are log decays.
  timed: which of them have the axis T.
  token: `(state_B.., *inputs of a token) -> (y, state)` in NumPy.
  state: shape of one row's state.
  extra: keyword arguments of scan, prefill and step.
  """

  module: object
  inputs: object
  timed: tuple
  token: object
  state: tuple
  extra: object = lambda: {}


def heads(x_BGK):
  return np.repeat(x_BGK, H // x_BGK.shape[1], axis=1)


def attention_inputs(shape_of_gates, groups=H, beta=False):
  def inputs(stream, gates):
    q, k = stream.normal(size=(2, B, T, groups, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = stream.normal(size=(B, T, H, V))
    strength = [stream.uniform(0.1, 0.9, (B, T, H))] if beta else []
    return [q, k, v, gates((B, T, *shape_of_gates)), *strength]

  return inputs


def attention_token(state, q, k, v, g, bonus=None):
  g = g if g.ndim == 3 else g[..., None]
  written = np.einsum('bhk,bhv->bhkv', heads(k), v)
  after = np.exp(g)[..., None] * state + written
  read = after
  if bonus is not None:
    read = state + bonus[None, :, :, None] * written
  return np.einsum('bhk,bhkv->bhv', heads(q), read), after


def delta_token(state, q, k, v, g, beta):
  g = g if g.ndim == 3 else g[..., None]
  k = heads(k)
  eye = np.eye(K)[None, None]
  keep = eye - beta[..., None, None] * k[..., :, None] * k[..., None, :]
  state = keep @ (np.exp(g)[..., None] * state)
  state = state + beta[..., None, None] * k[..., :, None] * v[..., None, :]
  return np.einsum('bhk,bhkv->bhv', heads(q), state), state


def ssd_inputs(stream, gates):
  x = stream.normal(size=(B, T, H, V))
  b, c = stream.normal(size=(2, B, T, G, K))
  a = np.array([-1.0, -2.0])
  return [x, np.minimum(-gates((B, T, H)), 1e4), a, b, c]


def ssd_token(state, x, dt, a, b, c):
  state = np.exp(dt * a)[..., None, None] * state + np.einsum(
    'bh,bhn,bhv->bhnv', dt, heads(b), x
  )
  return np.einsum('bhn,bhnv->bhv', heads(c), state), state


def selective_inputs(stream, gates):
  x = stream.normal(size=(B, T, H))
  b, c = stream.normal(size=(2, B, T, K))
  a = -np.exp(stream.normal(size=(H, K)))
  return [x, np.minimum(-gates((B, T, H)), 1e4), a, b, c]


def selective_token(state, x, dt, a, b, c):
  state = np.exp(dt[..., None] * a[None]) * state
  state = state + (dt * x)[..., None] * b[:, None]
  return np.einsum('bdn,bn->bd', state, c), state


BONUS = np.linspace(-1, 1, H * K).reshape(H, K)
MATRIX = (H, K, V)
CASES = {
  'gated_linear': Case(
    linear_attention,
    attention_inputs((H, K)),
    (True,) * 4,
    attention_token,
    MATRIX,
  ),
  'rwkv6': Case(
    linear_attention,
    attention_inputs((H, K)),
    (True,) * 4,
    functools.partial(attention_token, bonus=BONUS),
    MATRIX,
    lambda: {'bonus_HK': jnp.asarray(BONUS, jnp.float32)},
  ),
  'gated_delta': Case(
    delta_rule,
    attention_inputs((H,), groups=G, beta=True),
    (True,) * 5,
    delta_token,
    MATRIX,
  ),
  'kimi_delta': Case(
    delta_rule,
    attention_inputs((H, K), beta=True),
    (True,) * 5,
    delta_token,
    MATRIX,
  ),
  'ssd': Case(
    ssd, ssd_inputs, (True, True, False, True, True), ssd_token, MATRIX
  ),
  'selective': Case(
    selective,
    selective_inputs,
    (True, True, False, True, True),
    selective_token,
    (H, K),
  ),
}

GATES = {
  'open': lambda stream, shape: np.zeros(shape),
  'tame': lambda stream, shape: -stream.exponential(0.05, shape),
  'strong': lambda stream, shape: -stream.exponential(8.0, shape),
  'violent': lambda stream, shape: -stream.exponential(80.0, shape),
  'extreme': lambda stream, shape: stream.choice(
    [0.0, -1e-4, -1e4, -np.inf], shape, p=[0.3, 0.3, 0.3, 0.1]
  ),
}

everywhere = pytest.mark.parametrize('name', CASES)


def given(name, gates='tame', seed=0):
  """Inputs and what all scans share, NumPy float64."""
  stream = np.random.default_rng(seed)
  case = CASES[name]
  inputs = case.inputs(stream, lambda shape: GATES[gates](stream, shape))
  resets, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
  shared = {
    'state': stream.normal(size=(B, *case.state)),
    'fresh': stream.normal(size=case.state),
    'resets': resets,
    'mask': mask,
  }
  return inputs, shared


def cut(name, inputs, where):
  """Inputs with their axis T, where they have one, cut or indexed."""
  timed = CASES[name].timed
  return [x[:, where] if t else x for x, t in zip(inputs, timed, strict=True)]


def device(tree):
  return jax.tree.map(
    lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32), tree
  )


def loop(name, inputs, shared):
  """The recurrence by its equations: tokens one by one in float64."""
  case = CASES[name]
  state, seen = shared['state'], []
  for t in range(shared['resets'].shape[1]):
    rows = (slice(None), *([None] * len(case.state)))
    on, reset = shared['mask'][:, t][rows], shared['resets'][:, t][rows]
    token = cut(name, inputs, t)
    start = np.where(reset, shared['fresh'][None], state)
    y, after = case.token(start, *token)
    state = np.where(on, after, state)
    seen.append(np.where(on[(..., *([0] * (state.ndim - y.ndim)))], y, 0.0))
  return np.stack(seen, axis=1), state


def scan(name, inputs, shared, **kwargs):
  case = CASES[name]
  return case.module.scan(*inputs, **shared, **case.extra(), **kwargs)


@functools.cache
def forms(name, algorithm, dtype='float32'):
  """Compiled once: outputs, last state, and gradients of all real inputs."""

  def total(real, flags, weights):
    inputs, shared = real
    y, state = scan(
      *(name, inputs, shared | flags), algorithm=algorithm, chunk=CHUNK
    )
    assert y.dtype == dtype
    assert state.dtype == jnp.float32
    return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

  return jit(jax.value_and_grad(total, has_aux=True))


def parts_of(shared):
  """What has a gradient, what has none, and weights of a scalar loss."""
  flags = {'resets': shared['resets'], 'mask': shared['mask']}
  real = {'state': shared['state'], 'fresh': shared['fresh']}
  stream = np.random.default_rng(7)
  y_shape = (B, T, H, V) if shared['state'].ndim == 4 else (B, T, H)
  weights = [stream.normal(size=x) for x in (y_shape, shared['state'].shape)]
  return device(real), device(flags), device(weights)


def run(name, algorithm, inputs, shared, dtype='float32'):
  real, flags, weights = parts_of(shared)
  inputs = [x.astype(dtype) for x in device(inputs)]
  (_, outputs), gradients = forms(name, algorithm, dtype)(
    (inputs, real), flags, weights
  )
  return outputs, gradients


def close(actual, expected, tolerance=TOLERANCE):
  """||actual - expected|| <= tolerance (||expected|| + 0.1), leaf by leaf."""
  chex.assert_tree_all_finite(actual)
  chex.assert_trees_all_equal_shapes(actual, expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b)
    assert error <= tolerance * (np.linalg.norm(b) + 0.1), error


def texts(shared):
  """Two layouts: resets at a chunk's start, inside one, and twice in one."""
  shared['resets'][0, [4, 9]] = True
  shared['resets'][1, [0, 5, 6, 12]] = True
  shared['mask'][0, 11:] = False
  shared['mask'][1, :2] = False
  return shared


@everywhere
@pytest.mark.parametrize('gates', GATES)
def test_recurrent_is_the_equation(name, gates):
  inputs, shared = given(name, gates)
  outputs, _ = run(name, 'recurrent', inputs, texts(shared))
  close(outputs, loop(name, inputs, shared), 1e-5)


@everywhere
@pytest.mark.parametrize('gates', GATES)
@pytest.mark.parametrize('several', [False, True])
def test_chunked_is_recurrent(name, gates, several):
  inputs, shared = given(name, gates)
  if several:
    texts(shared)
  expected = run(name, 'recurrent', inputs, shared)
  close(run(name, 'chunked', inputs, shared), expected)


@pytest.mark.parametrize('name', ['rwkv6', 'kimi_delta', 'ssd'])
def test_members_in_one_program(name):
  """Gradients under vmap: one axis more, at which XLA's programs crashed."""
  members = [given(name, seed=seed) for seed in (0, 1)]
  alone = []
  for inputs, shared in members:
    real, flags, weights = parts_of(texts(shared))
    alone.append(((device(inputs), real), flags, weights))
  both = jax.tree.map(lambda *x: jnp.stack(x), *alone)
  each = jax.vmap(forms(name, 'chunked').__wrapped__)
  found = jax.jit(each)(*both)
  expected = [forms(name, 'chunked')(*member) for member in alone]
  expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
  close(found[0][1], expected[0][1])
  close(found[1], expected[1])


@pytest.mark.parametrize(
  'name', ['gated_linear', 'rwkv6', 'gated_delta', 'kimi_delta']
)
def test_gate_of_a_reset_has_no_gradient(name):
  """Where resets bring in zeros, what decays at them is of no matter."""
  inputs, shared = given(name)
  shared['fresh'] *= 0
  shared['resets'][:, 6] = True
  for algorithm in ('chunked', 'recurrent'):
    gate = run(name, algorithm, inputs, shared)[1][0][3]
    assert not np.any(np.asarray(gate)[:, 6])
    assert np.any(np.asarray(gate)[:, 7])


@everywhere
def test_halves_are_the_whole(name, algorithm='chunked'):
  inputs, shared = given(name, 'tame')
  texts(shared)
  expected = run(name, algorithm, inputs, shared)

  def total(real, flags, weights):
    inputs, shared = real
    state, seen = shared['state'], []
    for part in (slice(0, 6), slice(6, T)):
      some = cut(name, inputs, part)
      y, state = scan(
        *(name, some),
        {
          'state': state,
          'fresh': shared['fresh'],
          'resets': flags['resets'][:, part],
          'mask': flags['mask'][:, part],
        },
        algorithm=algorithm,
        chunk=CHUNK,
      )
      seen.append(y)
    y = jnp.concatenate(seen, axis=1)
    return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

  real, flags, weights = parts_of(shared)
  (_, outputs), gradients = jit(jax.value_and_grad(total, has_aux=True))(
    (device(inputs), real), flags, weights
  )
  close((outputs, gradients), expected)


@everywhere
def test_packed_texts_are_separate_runs(name):
  inputs, shared = given(name, 'strong')
  shared['state'][:] = shared['fresh']
  shared['resets'][:, 6] = True
  packed, _ = run(name, 'chunked', inputs, shared)
  shared['resets'][:] = False
  # The second text at the start of a row, and nothing after it.
  for rows in inputs:
    if rows.shape[:2] == (B, T):
      rows[:] = np.roll(rows, -6, axis=1)
  shared['mask'][:, T - 6 :] = False
  alone, _ = run(name, 'chunked', inputs, shared)
  close((packed[0][:, 6:], packed[1]), (alone[0][:, : T - 6], alone[1]), 1e-5)


@everywhere
def test_masked_tokens_are_not_there(name):
  """Even where they hold nothing that could be computed with."""
  inputs, shared = given(name)
  y_short, state_short = loop(
    name,
    cut(name, inputs, slice(9)),
    {**shared, 'resets': shared['resets'][:, :9]},
  )
  shared['mask'][0, 9:] = False
  for rows in inputs:
    if rows.shape[:2] == (B, T):
      rows[0, 9:] = np.nan
  (y, state), gradients = run(name, 'chunked', inputs, shared)
  chex.assert_tree_all_finite((y, state, gradients))
  assert not np.any(np.asarray(y)[0, 9:])
  close((y[0, :9], state[0]), (y_short[0], state_short[0]), 1e-5)


@everywhere
def test_steps_are_the_scan(name):
  case = CASES[name]
  inputs, shared = given(name)
  texts(shared)
  shared['mask'][:] = True
  expected, _ = run(name, 'chunked', inputs, shared)
  inputs, shared = device((inputs, shared))

  @jit
  def one(state, token, resets):
    return case.module.step(
      state, *token, resets=resets, fresh=shared['fresh'], **case.extra()
    )

  state, seen = shared['state'], []
  for t in range(T):
    token = cut(name, inputs, t)
    y, state = one(state, token, shared['resets'][:, t])
    seen.append(y)
  close((jnp.stack(seen, axis=1), state), expected)


@everywhere
def test_commit_is_a_shorter_run(name):
  """The state after any number of tokens, its own for each row."""
  case = CASES[name]
  inputs, shared = given(name)
  shared['resets'][0, [4, 9]] = True
  shared['resets'][1, [0, 5, 6, 12]] = True
  expected = loop(name, inputs, shared)[0]

  @jit
  def prefill(inputs, shared):
    return case.module.prefill(*inputs, **shared, **case.extra(), chunk=CHUNK)

  y, pending = prefill(*device((inputs, shared)))
  close(y, expected)
  commit = jit(case.module.commit)
  for length in range(T + 1):
    lengths = np.array([length, T - length])
    masked = {**shared, 'mask': np.arange(T)[None] < lengths[:, None]}
    state = loop(name, inputs, masked)[1]
    close(commit(pending, jnp.asarray(lengths)), state)


@everywhere
@pytest.mark.parametrize('algorithm', ['chunked', 'recurrent'])
@pytest.mark.parametrize('length', [0, 1])
def test_short_lengths(name, algorithm, length):
  inputs, shared = given(name)
  some = cut(name, inputs, slice(length))
  shared['resets'], shared['mask'] = (
    shared[key][:, :length] for key in ('resets', 'mask')
  )
  y, state = jit(functools.partial(scan, name, algorithm=algorithm))(
    *device((some, shared))
  )
  if not length:
    assert y.shape[:2] == (B, 0)
    close(state, shared['state'], 1e-6)
    return
  close((y, state), loop(name, some, shared), 1e-5)


@everywhere
def test_bfloat16_keeps_a_float32_state(name):
  """Operands of 8 bits of mantissa: 2 % of the norm of values and gradients."""
  inputs, shared = given(name)
  rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in device(inputs)]
  expected = run(name, 'chunked', rounded, shared)
  actual = run(name, 'chunked', rounded, shared, 'bfloat16')
  assert all(x.dtype == jnp.bfloat16 for x in actual[1][0][0])
  close(actual, expected, 2e-2)


@everywhere
@pytest.mark.parametrize('algorithm', ['chunked', 'recurrent'])
def test_lowers_for_tpu(name, algorithm):
  inputs, shared = device(given(name))

  def total(inputs, state):
    y, state = scan(
      name, inputs, {'state': state}, algorithm=algorithm, chunk=CHUNK
    )
    return y.sum() + state.sum()

  exported = jax.export.export(
    jax.jit(jax.grad(total)), platforms=['tpu', 'cuda']
  )(inputs, shared['state'])
  assert exported.platforms == ('tpu', 'cuda')


@everywhere
def test_wrong_arguments_are_named(name):
  inputs, shared = device(given(name))
  with pytest.raises(ValueError, match='algorithm must be in'):
    scan(name, inputs, {}, algorithm='fast')
  with pytest.raises(ValueError, match='chunk must be a power of two'):
    scan(name, inputs, {}, chunk=48)
  with pytest.raises(ValueError, match='state must be'):
    scan(name, inputs, {'state': shared['state'][:, :1]})
  with pytest.raises(ValueError, match='resets must be bool'):
    scan(name, inputs, {'resets': shared['resets'][:, 1:]})
