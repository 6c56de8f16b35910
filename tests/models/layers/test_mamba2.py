"""A Mamba-2 layer against a loop over tokens in float64, and its start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.models.layers import mamba2

B, T, D = 2, 11, 6
SIZES = {'expand': 2, 'head_width': 3, 'state_width': 5, 'groups': 2}
HEADS, INNER, STATE = 4, 12, 5


def silu(x):
  return x / (1 + np.exp(-x))


def loop(p, u_TD, place_T, taps, norm_groups):
  """The equations of the module, a token at a time."""
  start = p.get('state', {}).get('initial', np.zeros((HEADS, STATE, 3)))
  first = p.get('first', np.zeros((taps - 1, p['conv']['bias'].size)))
  outputs = []
  for u, place in zip(u_TD, place_T, strict=True):
    if place == 0:
      window, state = list(first), start
    elif norm_groups:
      flat = state.reshape(HEADS, norm_groups, -1)
      flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5)
      state = flat.reshape(state.shape) * p['state']['gain']
    z, now, dt = np.split(u @ p['in'], [INNER, -HEADS])
    window = [*window, now][-taps:]
    mixed = silu(
      (np.stack(window) * p['conv']['kernel']).sum(0) + p['conv']['bias']
    )
    window = window[1:] if taps > 1 else []
    x, b, c = np.split(mixed, [INNER, INNER + 2 * STATE])
    x = x.reshape(HEADS, 3)
    b, c = (np.repeat(y.reshape(2, STATE), 2, axis=0) for y in (b, c))
    dt = np.log1p(np.exp(dt + p['dt_bias']))
    keep = np.exp(-dt * np.exp(p['a_log']))
    state = keep[:, None, None] * state + (
      dt[:, None, None] * b[:, :, None] * x[:, None, :]
    )
    y = np.einsum('hnv,hn->hv', state, c) + p['skip'][:, None] * x
    y = (y.reshape(INNER) * silu(z)).reshape(2, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    outputs.append((y.reshape(INNER) * p['norm']) @ p['out'])
  return np.stack(outputs)


@pytest.mark.parametrize(
  'taps, learned, norm_groups', [(4, False, 0), (4, True, 5), (1, True, 0)]
)
def test_a_layer_is_its_equations(taps, learned, norm_groups):
  init = functools.partial(
    mamba2.init,
    width=D,
    conv_width=taps,
    learned_initial=learned,
    state_norm=norm_groups,
    **SIZES,
  )
  params = jax.jit(init)(jax.random.key(0))
  stream = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.3 * stream.normal(size=x.shape).astype(np.float32), params
  )
  u = stream.normal(size=(B, T, D))
  place = np.stack([np.r_[0:4, 0:7], np.r_[0:9, 0:2]]).astype(np.int32)
  double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = [
    loop(double, *row, taps, norm_groups) for row in zip(u, place, strict=True)
  ]
  found, _ = jax.jit(
    lambda u: mamba2.apply(
      params,
      mamba2.start(B, D, conv_width=taps, **SIZES),
      u,
      jnp.asarray(place),
      groups=2,
      state_norm=norm_groups,
      chunk=4,
    )
  )(jnp.asarray(u, jnp.float32))
  np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=2e-5)


def test_steps_and_decays_start_where_they_were_published():
  init = functools.partial(mamba2.init, width=64, head_width=1)
  params = jax.jit(init)(jax.random.key(0))
  dt = np.log1p(np.exp(np.asarray(params['dt_bias'], np.float64)))
  assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
  assert np.median(dt) == pytest.approx(1e-2, rel=0.5)
  a = np.exp(np.asarray(params['a_log']))
  assert a.min() >= 1 and a.max() <= 16
  np.testing.assert_array_equal(params['skip'], 1)


def test_half_lives_are_those_asked_for():
  """Of what a state keeps over tokens that write nothing."""
  init = functools.partial(mamba2.init, width=D, half_life=(2.0, 512.0))
  params = jax.jit(functools.partial(init, **SIZES))(jax.random.key(0))
  a = np.exp(np.asarray(params['a_log']))
  assert a.min() >= 1 and a.max() <= 16 and len(np.unique(a)) == HEADS
  params['conv']['bias'] *= 0
  cache = mamba2.start(1, D, **SIZES)
  cache['state'] += 1.0
  place_BT = 1 + jnp.arange(8, dtype=jnp.int32)[None]

  @jax.jit
  def after(length_B):
    x_BTD = jnp.zeros([1, 8, D])
    _, parts = mamba2.apply(params, cache, x_BTD, place_BT, groups=2, chunk=4)
    return mamba2.commit(cache, parts, length_B)['state'][0]

  for count in (2, 8):
    kept = after(jnp.array([count]))
    wanted_H = 0.5 ** (count / np.geomspace(2, 512, HEADS))
    np.testing.assert_allclose(
      kept, np.broadcast_to(wanted_H[:, None, None], kept.shape), rtol=1e-5
    )


def test_the_gate_of_the_convolution_is_silu_for_any_input():
  x = jnp.array([-1e4, -200.0, -88.0, -3.0, 0.0, 2.0, 90.0, 1e4])

  def both(f):
    return jax.jit(jax.vmap(jax.value_and_grad(f)))(x)

  found, expected = both(mamba2._silu), both(jax.nn.silu)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-30)
