"""`unroll` is the loop that it replaces, in values and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Recursion
from recursive_weights.recursion.hoist import Linear, linear
from recursive_weights.recursion.unroll import from_recursion, unroll

BATCH, WIDTH, STEPS = 3, 4, 5


def toy(rate=0.0):
  """A recurrent network with an input and, with a key, noise."""

  def prepare(params):
    return {
      'mix': Linear(params['mix'] @ params['mix'], params['bias']),
      'read': Linear(params['read']),
      'start': params['start'],
    }

  def encode(weights, inputs, key):
    del weights, key
    return {'x': jnp.tanh(inputs)}

  def start(weights, context):
    return jnp.broadcast_to(weights['start'][None], context['x'].shape)

  def step(weights, context, state, key):
    state = jnp.tanh(linear(weights['mix'], state) + context['x'])
    if key is not None:
      state = state + rate * jax.random.normal(key, state.shape)
    read = linear(weights['read'], state)
    return state, {'read': read, 'norm': (state**2).sum(-1)}

  return Recursion(prepare, encode, start, step)


def init(key, inputs):
  del inputs
  k1, k2, k3, k4 = jax.random.split(key, 4)
  return {
    'mix': jax.random.normal(k1, (WIDTH, WIDTH)) / 2,
    'bias': jax.random.normal(k2, (WIDTH,)),
    'read': jax.random.normal(k3, (WIDTH, 2)),
    'start': jax.random.normal(k4, (WIDTH,)),
  }


def given():
  inputs = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
  return init(jax.random.key(0), inputs), inputs


def loop(recursion, params, inputs, steps, key=None):
  weights = recursion.prepare(params)
  context = recursion.encode(weights, inputs, None)
  state = recursion.start(weights, context)
  seen = []
  for s in range(steps):
    own = None if key is None else jax.random.fold_in(key, s)
    state, outputs = recursion.step(weights, context, state, own)
    seen.append(outputs)
  return state, jax.tree.map(lambda *x: jnp.stack(x), *seen)


def scan(recursion, params, inputs, steps, **kwargs):
  weights = recursion.prepare(params)
  context = recursion.encode(weights, inputs, None)
  state = recursion.start(weights, context)
  return unroll(recursion, weights, context, state, steps, **kwargs)


def scored(function):
  """Value and gradients of something that reads every output of every step."""

  def score(params, inputs):
    state, outputs = function(params, inputs)
    weight = jnp.arange(1.0, 1 + outputs['read'].size)
    value = (outputs['read'] * weight.reshape(outputs['read'].shape)).sum()
    return value + (outputs['norm'] ** 2).sum() + state.sum(), outputs

  run = jax.jit(jax.value_and_grad(score, argnums=(0, 1), has_aux=True))
  return run(*given())


@pytest.mark.parametrize('key', [None, jax.random.key(7)])
@pytest.mark.parametrize(
  'kwargs',
  [
    {'hoist': False},
    {'hoist': True},
    {'hoist': True, 'remat': True},
    {'hoist': True, 'unrolled': 2},
  ],
)
def test_scan_equals_loop_in_values_and_gradients(kwargs, key):
  recursion = toy(rate=0.1)
  wanted = scored(lambda p, x: loop(recursion, p, x, STEPS, key))
  found = scored(lambda p, x: scan(recursion, p, x, STEPS, key=key, **kwargs))
  chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=1e-5)


def test_hoisted_gradients_are_sums_outside_the_loop():
  """The body of the backward scan gives no array of the weights' shape."""
  params, inputs = given()

  def shapes_given(hoist):
    def loss(params):
      return scan(toy(), params, inputs, STEPS, hoist=hoist)[1]['read'].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    bodies = [
      e.params['jaxpr'] for e in jaxpr.eqns if e.primitive.name == 'scan'
    ]
    # Some versions of jax close a body over its constants, others do not.
    bodies = [getattr(body, 'jaxpr', body) for body in bodies]
    return [v.aval.shape for body in bodies for v in body.outvars]

  assert (WIDTH, WIDTH) in shapes_given(False)
  assert (WIDTH, WIDTH) not in shapes_given(True)


@pytest.mark.parametrize('hoist', [False, True])
def test_hoisting_under_vmap(hoist):
  recursion = toy()
  _, inputs = given()
  params_E = jax.vmap(init, (0, None))(jax.random.split(jax.random.key(3)), 0)

  def gradient(params):
    def loss(params):
      outputs = scan(recursion, params, inputs, STEPS, hoist=hoist)[1]
      return (outputs['read'] ** 2).sum()

    return jax.grad(loss)(params)

  found = jax.vmap(gradient)(params_E)
  one = gradient(jax.tree.map(lambda x: x[1], params_E))
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[1], found), one, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('frozen', [1, 3])
def test_frozen_prefix_is_fed_in_as_a_constant(frozen):
  recursion = toy()
  params, inputs = given()

  def later(outputs):
    return (outputs['read'][frozen:] ** 2).sum()

  def whole(params, inputs):
    return later(scan(recursion, params, inputs, STEPS, frozen=frozen)[1])

  constant, prefix = loop(recursion, params, inputs, frozen)

  def fed(params, inputs):
    weights = recursion.prepare(params)
    context = recursion.encode(weights, inputs, None)
    _, outputs = unroll(
      recursion, weights, context, constant, STEPS - frozen, first=frozen
    )
    return (outputs['read'] ** 2).sum()

  found = jax.value_and_grad(whole, argnums=(0, 1))(params, inputs)
  wanted = jax.value_and_grad(fed, argnums=(0, 1))(params, inputs)
  chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
  free = jax.grad(lambda p: later(scan(recursion, p, inputs, STEPS)[1]))(params)
  assert np.abs(free['start']).max() > 0
  np.testing.assert_array_equal(found[1][0]['start'], 0)

  # Outputs of the prefix are there, without gradient.
  outputs = scan(recursion, params, inputs, STEPS, frozen=frozen)[1]
  np.testing.assert_allclose(
    outputs['read'][:frozen], prefix['read'], rtol=1e-5
  )
  early = jax.grad(
    lambda p: scan(recursion, p, inputs, STEPS, frozen=frozen)[1]['read'][
      :frozen
    ].sum()
  )(params)
  assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(early))


def test_pieces_equal_the_whole():
  recursion = toy(rate=0.1)
  params, inputs = given()
  key = jax.random.key(5)
  state, wanted = scan(recursion, params, inputs, STEPS, key=key)
  weights = recursion.prepare(params)
  context = recursion.encode(weights, inputs, None)
  half = recursion.start(weights, context)
  seen = []
  for first, steps in ((0, 2), (2, 3)):
    half, outputs = unroll(
      recursion, weights, context, half, steps, key=key, first=first
    )
    seen.append(outputs)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
  chex.assert_trees_all_close((half, joined), (state, wanted), rtol=1e-5)


def test_kept_outputs_alone_are_stacked():
  recursion = toy()
  params, inputs = given()
  model = from_recursion(recursion, init, STEPS, keep=('norm',))
  outputs, carry = model.apply(params, {}, inputs, key=None, train=True)
  assert carry == {} and set(outputs) == {'norm'}
  chex.assert_shape(outputs['norm'], (STEPS, BATCH))
  with pytest.raises(ValueError, match='keep'):
    scan(recursion, params, inputs, STEPS, keep=('nothing',))


def test_model_of_a_recursion():
  recursion = toy()
  params, inputs = given()
  model = from_recursion(recursion, init, STEPS)
  assert model.recursion is recursion
  assert model.carry(params, BATCH) == {}
  chex.assert_trees_all_equal(model.init(jax.random.key(0), inputs), params)
  outputs, _ = model.apply(params, {}, inputs, key=None, train=False)
  wanted = loop(recursion, params, inputs, STEPS)[1]
  chex.assert_trees_all_close(outputs, wanted, rtol=1e-5)


@pytest.mark.parametrize(
  ('steps', 'frozen'), [(0, 0), (3, 3), (3, -1)], ids=str
)
def test_numbers_out_of_range(steps, frozen):
  with pytest.raises(ValueError, match='got'):
    scan(toy(), *given(), steps, frozen=frozen)
