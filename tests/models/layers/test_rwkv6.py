"""RWKV-6 layers against loops over tokens in float64, and their start."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.models.layers import matrix_state, rwkv6

B, T, D, HEAD = 2, 11, 12, 4
HEADS = D // HEAD
CASES = {
  'published': {},
  'initial': {'learned_initial': True},
  'grounded': {'grounding': 0.6},
  'learned': {'grounding': 0.6, 'learned_grounding': True},
  'normed': {'state_norm': 2, 'learned_initial': True},
}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def shaken(params):
  stream = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + 0.3 * stream.normal(size=x.shape).astype(np.float32), params
  )


def given():
  """A chunk in which documents begin at 0 and 4, and at 0 and 9."""
  x = np.random.default_rng(1).normal(size=(B, T, D))
  place = np.stack([np.r_[0:4, 0:7], np.r_[0:9, 0:2]]).astype(np.int32)
  return x, place


def double(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def time_loop(p, x_TD, place_T, fields):
  """The equations of the module, a token at a time."""
  alpha = fields.get('grounding', 0.0)
  groups = fields.get('state_norm', 0)
  start = p.get('state', {}).get('initial', np.zeros((HEADS, HEAD, HEAD)))
  first = p.get('first', np.zeros(D))
  outputs = []
  for x, place in zip(x_TD, place_T, strict=True):
    if place == 0:
      before, state = first, start
    elif groups:
      flat = state.reshape(HEADS, groups, -1)
      flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5)
      state = flat.reshape(state.shape) * p['state']['gain']
    d = before - x
    low = np.tanh((x + d * p['mix_x']) @ p['mix_down']).reshape(5, -1)
    w, k, v, r, g = (
      x + d * (p['mix'][i] + low[i] @ p['mix_up'][i]) for i in range(5)
    )
    raw = p['decay'] + np.tanh(w @ p['decay_down']) @ p['decay_up']
    decay = np.exp(-np.exp(raw))
    if alpha:
      own = p['grounding'].get('alpha')
      share = alpha if own is None else sigmoid(own)
      steady = np.exp(-np.exp(p['grounding']['base']))
      decay = share * steady + (1 - share) * decay
    r, k, v = (
      (y @ p[name]).reshape(HEADS, HEAD)
      for y, name in ((r, 'receptance'), (k, 'key'), (v, 'value'))
    )
    written = k[:, :, None] * v[:, None, :]
    o = np.einsum('hk,hkv->hv', r, state + p['bonus'][:, :, None] * written)
    state = decay.reshape(HEADS, HEAD, 1) * state + written
    o = o - o.mean(-1, keepdims=True)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 64e-5)
    o = o.reshape(D) * p['norm']['scale'] + p['norm']['bias']
    gate = g @ p['gate']
    outputs.append((o * gate * sigmoid(gate)) @ p['output'])
    before = x
  return np.stack(outputs)


@pytest.mark.parametrize('name', CASES)
def test_a_time_mix_is_its_equations(name):
  fields = CASES[name]
  init = functools.partial(
    rwkv6.time_init,
    width=D,
    layer=1,
    layers=3,
    head_width=HEAD,
    mix_rank=3,
    decay_rank=5,
    **fields,
  )
  params = shaken(jax.jit(init)(jax.random.key(0)))
  x, place = given()
  expected = [
    time_loop(double(params), *row, fields)
    for row in zip(x, place, strict=True)
  ]
  options = {
    key: value
    for key, value in fields.items()
    if key in ('grounding', 'state_norm')
  }
  found, _ = jax.jit(
    lambda x: rwkv6.time_mix(
      params,
      rwkv6.time_start(B, D, head_width=HEAD),
      x,
      jnp.asarray(place),
      chunk=4,
      **options,
    )
  )(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=2e-5)


def test_a_channel_mix_is_its_equations():
  params = shaken(
    rwkv6.channel_init(jax.random.key(0), D, learned_initial=True)
  )
  x, place = given()
  p = double(params)
  before = np.roll(x, 1, axis=1)
  before[place == 0] = p['first']
  d = before - x
  k = np.maximum((x + d * p['mix_key']) @ p['key'], 0) ** 2
  r = sigmoid((x + d * p['mix_receptance']) @ p['receptance'])
  found, _ = rwkv6.channel_mix(
    params,
    rwkv6.channel_start(B, D),
    jnp.asarray(x, jnp.float32),
    jnp.asarray(place),
  )
  np.testing.assert_allclose(found, r * (k @ p['value']), rtol=1e-4, atol=2e-5)


def test_the_start_is_the_published_one():
  layers, width = 3, 128
  init = jax.vmap(
    lambda key, layer: rwkv6.time_init(
      key, width, layer=layer, layers=layers, head_width=64
    )
  )
  p = jax.jit(init)(jax.random.split(jax.random.key(0), layers), np.arange(3.0))
  i = np.arange(width)
  for layer in range(layers):
    up, down = layer / 2, 1 - layer / 3
    own = jax.tree.map(lambda x, n=layer: np.asarray(x[n]), p)
    wanted = -6 + 5 * (i / (width - 1)) ** (0.7 + 1.3 * up)
    np.testing.assert_allclose(own['decay'], wanted, rtol=1e-4)
    # Mixes of the decay and the value.
    np.testing.assert_allclose(
      own['mix'][0], 1 - (i / width) ** down, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      own['mix'][2], 1 - (i / width) ** down - 0.3 * up, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      own['norm']['scale'], ((1 + layer) / 3) ** 0.7, rtol=1e-5
    )
    bonus = up * (1 - i / (width - 1)) + 0.1 * ((i + 1) % 3 - 1)
    np.testing.assert_allclose(
      own['bonus'], bonus.reshape(2, 64), rtol=1e-4, atol=1e-6
    )
    for name, gain in (('receptance', 1), ('key', 0.1), ('gate', 0.1)):
      np.testing.assert_allclose(
        own[name] @ own[name].T, gain**2 * np.eye(width), atol=1e-5
      )
    for name in ('output', 'mix_down', 'decay_down'):
      assert not own[name].any()
  assert rwkv6.channel_width(768) == 2688
  assert rwkv6.channel_width(100) == 320


def test_half_lives_are_those_asked_for():
  init = functools.partial(
    rwkv6.time_init, width=64, head_width=16, half_life=(2.0, 512.0)
  )
  params = jax.jit(init)(jax.random.key(0))
  decay_D = np.exp(-np.exp(np.asarray(params['decay'], np.float64)))
  half_D = np.log(0.5) / np.log(decay_D)
  np.testing.assert_allclose(half_D, np.geomspace(2, 512, 64), rtol=1e-4)


def test_a_normed_state_has_unit_groups_for_any_size_of_the_state():
  state = jax.random.normal(jax.random.key(0), (B, HEADS, HEAD, HEAD))
  gain = jnp.ones(state.shape[1:])
  found = np.asarray(matrix_state.norm(gain, 100 * state, 4))
  flat = found.reshape(B, HEADS, 4, -1)
  np.testing.assert_allclose((flat**2).mean(-1), 1, rtol=1e-5)
  again = matrix_state.norm(gain, 7 * state, 4)
  np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('part', ['time', 'channel'])
def test_start_factors_matrices_one_at_a_time(part):
  # Batches of them in one program stop a CPU of two cores for ever.
  if part == 'time':
    one = functools.partial(rwkv6.time_init, width=D, head_width=HEAD)
  else:
    one = functools.partial(rwkv6.channel_init, width=D)
  key_EL = jax.random.split(jax.random.key(0), (2, 3))
  all_EL = jax.jit(jax.vmap(jax.vmap(one)))
  program = str(jax.make_jaxpr(all_EL)(key_EL))
  shapes = re.findall(r'f32\[([\d,]+)\] \S+ = qr\[', program)
  assert shapes
  assert all(len(shape.split(',')) == 2 for shape in shapes)
  found = all_EL(key_EL)
  for i in range(2):
    alone = jax.jit(one)(key_EL[i, 0])
    np.testing.assert_array_equal(found['key'][i, 0], alone['key'])
