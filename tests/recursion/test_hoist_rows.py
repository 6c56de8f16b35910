"""Gradients taken out of the scan, where rows are mapped one by one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Recursion
from recursive_weights.recursion.hoist import Linear, linear
from recursive_weights.recursion.unroll import unroll

B, D, S = 4, 3, 5


def step(weights, context, state, key):
  del key
  state = jnp.tanh(linear(weights, state) + context)
  return state, {'state': state}


CELL = Recursion(
  prepare=lambda params: Linear(params['kernel'], params['bias']),
  encode=lambda weights, inputs, key: inputs,
  start=lambda weights, context: jnp.zeros_like(context),
  step=step,
)


def loss(params, x_BD, target_BD, *, hoist):
  weights = CELL.prepare(params)
  start = CELL.start(weights, x_BD)
  last_BD, _ = unroll(CELL, weights, x_BD, start, S, hoist=hoist)
  return ((last_BD - target_BD) ** 2).sum()


@pytest.mark.parametrize('own', [False, True], ids=['shared', 'own'])
def test_rows_by_vmap_have_the_gradient_of_the_batch(own):
  draw = np.random.default_rng(0)
  x_BD, target_BD = jnp.asarray(draw.normal(size=(2, B, D)), jnp.float32)
  params = {
    'kernel': jnp.asarray(draw.normal(size=(D, D)), jnp.float32),
    'bias': jnp.asarray(draw.normal(size=D), jnp.float32),
  }

  def by_row(params, hoist):
    if own:
      params = jax.tree.map(lambda x: jnp.stack([x] * B), params)

    def row(params, x_D, target_D):
      return loss(params, x_D[None], target_D[None], hoist=hoist)

    axes = (0 if own else None, 0, 0)
    return jax.vmap(row, axes)(params, x_BD, target_BD).sum()

  expected = jax.grad(loss)(params, x_BD, target_BD, hoist=False)
  for hoist in (False, True):
    found = jax.jit(jax.grad(by_row), static_argnums=1)(params, hoist)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
