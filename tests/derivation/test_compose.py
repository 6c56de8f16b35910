"""Combinators: what they compute, and that scans equal loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import Operator, blend, chain, iterate
from recursive_weights.derivation import compose
from recursive_weights.derivation.operators import (
  contraction,
  polynomial,
  residual,
  spectral,
)
from recursive_weights.interfaces import UserError


def random(shape, seed=0, scale=1.0):
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(scale * draw, jnp.float32)


def perturb(theta, seed=1, scale=0.1):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(scale * generator.normal(size=x.shape), x.dtype),
    theta,
  )


def test_chain_is_composition_in_order():
  first, second = contraction.make(), residual.make(rank=2)
  operator = chain(first, second)
  base = random((5, 3, 8))
  theta = perturb(operator.init(jax.random.key(0), base))
  expected = second.apply(theta['1'], first.apply(theta['0'], base))
  chex.assert_trees_all_equal(operator.apply(theta, base), expected)
  chex.assert_shape(expected, (3, 8))


def test_empty_chain_is_the_identity():
  base = random((3, 4))
  theta = chain().init(jax.random.key(0), base)
  assert not jax.tree.leaves(theta)
  chex.assert_trees_all_equal(chain().apply(theta, base), base)


def test_blend_mixes_by_a_learned_share():
  a, b = polynomial.make(), residual.make(rank=2)
  operator = blend(a, b, alpha=0.25)
  base = random((3, 8))
  theta = perturb(operator.init(jax.random.key(0), base)) | {
    'alpha': jnp.asarray(0.25)
  }
  expected = 0.25 * a.apply(theta['a'], base) + 0.75 * b.apply(theta['b'], base)
  chex.assert_trees_all_close(operator.apply(theta, base), expected, atol=1e-6)
  gradient = jax.grad(lambda t: jnp.sum(operator.apply(t, base)))(theta)
  assert gradient['alpha'] != 0


def test_residual_starts_as_the_identity_for_any_operator():
  double = Operator(lambda key, base: {}, lambda theta, base: 2 * base)
  operator = compose.residual(double)
  base = random((3, 4))
  theta = operator.init(jax.random.key(0), base)
  chex.assert_trees_all_equal(operator.apply(theta, base), base)
  theta['gate'] = jnp.asarray(0.5)
  chex.assert_trees_all_close(operator.apply(theta, base), 2 * base)


@pytest.mark.parametrize('base_first', [False, True])
def test_iterate_equals_the_loop_in_values_and_gradients(base_first):
  cell = blend(spectral.make(kind='odd'), residual.make(rank=2))
  base = random((4, 6), scale=0.3)
  operator = iterate(cell, 4, base_first=base_first)
  theta = perturb(operator.init(jax.random.key(0), base), scale=0.2)
  weights = random((4, 4, 6), 3)

  def loop(theta, base):
    stack = [base] if base_first else []
    while len(stack) < 4:
      base = cell.apply(theta, base)
      stack.append(base)
    return jnp.stack(stack)

  def loss(apply):
    def function(theta, base):
      stack = apply(theta, base)
      return jnp.sum(stack * weights), stack

    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))

  scanned, looped = (
    loss(apply)(theta, base) for apply in (operator.apply, loop)
  )
  chex.assert_shape(scanned[0][1], (4, 4, 6))
  chex.assert_trees_all_close(scanned, looped, rtol=1e-4, atol=1e-5)


def test_iterate_has_the_parameters_of_one_application():
  cell, base = residual.make(rank=2), random((3, 8))
  shapes = [
    jax.eval_shape(iterate(cell, n).init, jax.random.key(0), base)
    for n in (1, 9)
  ]
  chex.assert_trees_all_equal_shapes(*shapes)


def test_iterate_refuses_an_operator_that_changes_the_shape():
  base = random((3, 8))
  with pytest.raises(UserError, match=r'must keep the shape.*\(8,\).*\(3, 8\)'):
    iterate(contraction.make(), 2).init(jax.random.key(0), base)
  with pytest.raises(UserError, match='length must be > 0, got 0'):
    iterate(residual.make(), 0)


def test_deep_recursion_of_the_document():
  """W2 = T(contract(W1)), W3 = T(W2) with one T."""
  cell = spectral.make()
  operator = chain(contraction.make(), iterate(cell, 2))
  base = random((15, 4, 16), scale=0.02)
  theta = perturb(operator.init(jax.random.key(0), base))
  w2, w3 = operator.apply(theta, base)
  contracted = contraction.make().apply(theta['0'], base)
  chex.assert_trees_all_close(w2, cell.apply(theta['1'], contracted), atol=1e-6)
  chex.assert_trees_all_close(w3, cell.apply(theta['1'], w2), atol=1e-6)


def test_operators_on_trees_compose():
  swap = Operator(
    lambda key, base: {'gain': jnp.ones(())},
    lambda theta, base: {
      'a': theta['gain'] * base['b'],
      'b': theta['gain'] * base['a'],
    },
  )
  base = {'a': random((3,)), 'b': random((3,), 1)}
  theta = iterate(swap, 2).init(jax.random.key(0), base)
  stack = iterate(swap, 2).apply(theta, base)
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], stack), base)
  half = blend(swap, chain(), alpha=0.5)
  theta = half.init(jax.random.key(0), base)
  mean = (base['a'] + base['b']) / 2
  chex.assert_trees_all_close(half.apply(theta, base)['a'], mean, atol=1e-6)
