"""The latent recursion against loops, and what carries a gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.recursion import latent

SHAPE = (3, 2, 4)


def net(weights, u):
  return jnp.tanh(u @ weights['w'] + weights['b'][None, None])


def problem(states=2):
  keys = jax.random.split(jax.random.key(0), 5)
  weights = {
    'w': jax.random.normal(keys[0], (4, 4)) / 2,
    'b': jax.random.normal(keys[1], (4,)),
  }
  x = jax.random.normal(keys[2], SHAPE)
  state = {
    'y': jax.random.normal(keys[3], SHAPE),
    'z': jax.random.normal(keys[4], SHAPE),
  }
  return weights, x, state if states == 2 else {'z': state['z']}


def by_loops(weights, x, state, cycles, inner, stop):
  """`stop(state, cycle, update)` is applied before every update."""
  y, z = state.get('y'), state['z']
  for t in range(cycles):
    for i in range(inner if y is not None else inner + 1):
      y, z = stop((y, z), t, i)
      z = net(weights, z + x if y is None else z + y + x)
    if y is not None:
      y, z = stop((y, z), t, inner)
      y = net(weights, y + z)
  return {'z': z} if y is None else {'y': y, 'z': z}


def total(state):
  return sum((x * jnp.arange(4.0)[None, None]).sum() for x in state.values())


@pytest.mark.parametrize('states', [1, 2])
@pytest.mark.parametrize('unrolled', [1, 2, 9])
@pytest.mark.parametrize('cycles, inner', [(1, 3), (3, 2), (2, 0)])
def test_equals_loops(states, unrolled, cycles, inner):
  weights, x, state = problem(states)
  for gradient in latent.GRADIENTS:
    found = latent.supervision_step(
      net, weights, x, state, cycles=cycles, inner=inner, gradient=gradient,
      unrolled=unrolled,
    )  # fmt: skip
    wanted = by_loops(weights, x, state, cycles, inner, lambda s, t, i: s)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


def gradients(states, cycles, inner, **fields):
  weights, x, state = problem(states)

  def loss(weights, x, state):
    return total(
      latent.supervision_step(
        net, weights, x, state, cycles=cycles, inner=inner, **fields
      )
    )

  return jax.grad(loss, argnums=(0, 1, 2))(weights, x, state)


@pytest.mark.parametrize('states', [1, 2])
@pytest.mark.parametrize('unrolled', [1, 9])
@pytest.mark.parametrize('remat', [False, True])
def test_the_gradient_is_that_of_the_last_cycle(states, unrolled, remat):
  """The one with the early cycles' result fed in as a constant."""
  weights, x, state = problem(states)
  found = gradients(states, 3, 2, unrolled=unrolled, remat=remat)
  prefix = latent.supervision_step(net, weights, x, state, cycles=2, inner=2)

  def last(weights, x):
    return total(
      latent.supervision_step(net, weights, x, prefix, cycles=1, inner=2)
    )

  wanted = jax.grad(last, argnums=(0, 1))(weights, x)
  chex.assert_trees_all_close(found[:2], wanted, rtol=1e-5, atol=1e-6)
  assert all((x == 0).all() for x in jax.tree.leaves(found[2]))
  # A stop before the early cycles alone leaks a cycle: another gradient.
  leaky = jax.grad(
    lambda w, x: total(
      by_loops(
        w, x, state, 3, 2,
        lambda s, t, i: jax.lax.stop_gradient(s) if i == 0 and t < 2 else s,
      )
    ),
    argnums=(0, 1),
  )(weights, x)  # fmt: skip
  assert not np.allclose(found[0]['w'], leaky[0]['w'], rtol=1e-2)
  assert not np.allclose(found[1], leaky[1], rtol=1e-2)


@pytest.mark.parametrize('states', [1, 2])
def test_the_other_gradients(states):
  weights, x, state = problem(states)
  last = 2 if states == 1 else 1  # number of the last update of z

  def one_step(s, t, i):
    return jax.lax.stop_gradient(s) if (t, i) <= (2, last) else s

  for name, stop in (('update', one_step), ('all', lambda s, t, i: s)):
    found = gradients(states, 3, 2, gradient=name)

    def loss(weights, x, stop=stop):
      return total(by_loops(weights, x, state, 3, 2, stop))

    wanted = jax.grad(loss, argnums=(0, 1))(weights, x)
    chex.assert_trees_all_close(found[:2], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'fields', [{'cycles': 0}, {'inner': -1}, {'gradient': 'half'}]
)
def test_arguments_out_of_range(fields):
  with pytest.raises(ValueError, match='must be'):
    latent.supervision_step(net, *problem(), **fields)
