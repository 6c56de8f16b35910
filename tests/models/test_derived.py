"""Laws of models with derived weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import interfaces
from recursive_weights.derivation import compose, tree
from recursive_weights.derivation.operators import contraction, residual
from recursive_weights.models import ctm, derived

SPEC = interfaces.Spec(
  inputs=jax.ShapeDtypeStruct((4,), jnp.int32),
  answer=(4,),
  classes=2,
  sizes={'train': None},
)
INPUTS = jnp.array([[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1]])


@pytest.fixture(scope='module')
def base():
  return ctm.make(
    SPEC,
    width=16,
    input_width=8,
    heads=2,
    memory=5,
    ticks=3,
    nlm={'hidden': 3, 'layers': 2},
    sync_out=4,
    sync_action=4,
  )


@pytest.fixture(scope='module')
def rules(base):
  shapes = jax.eval_shape(base.init, jax.random.key(0), INPUTS)['nlm']

  def contract(name, shape):
    return contraction.make(shape=shape)

  operator = residual.make(rank=2)
  hidden = shapes['hidden'].shape
  return (
    tree.Rule(
      'w2',
      'nlm/w1',
      'nlm/w2',
      compose.chain(contract('w2', shapes['w2'].shape), operator),
    ),
    tree.Rule(
      'hidden',
      'nlm/w1',
      'nlm/hidden',
      compose.chain(
        contract('hidden', hidden[1:]), compose.iterate(operator, hidden[0])
      ),
    ),
  )


def test_without_rules_it_is_the_base_to_the_bit(base):
  model = derived.wrap(base, ())
  params = base.init(jax.random.key(1), INPUTS)
  expected, _ = jax.jit(base.apply)(params, {}, INPUTS)
  found, _ = jax.jit(model.apply)(params, {}, INPUTS)
  chex.assert_trees_all_equal(found, expected)


def test_it_is_the_base_over_derived_weights(base, rules):
  model = derived.wrap(base, rules)
  stored = model.init(jax.random.key(1), INPUTS)
  assert 'w2' not in stored['nlm'] and 'hidden' not in stored['nlm']
  params = tree.derive(rules, stored)
  # Deriving twice is deriving once.
  chex.assert_trees_all_equal(tree.derive(rules, params), params)
  expected, _ = base.apply(params, {}, INPUTS)
  found, _ = model.apply(stored, {}, INPUTS)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
  # The cell takes the same stored parameters.
  weights = model.recursion.prepare(stored)
  chex.assert_trees_all_close(
    weights, base.recursion.prepare(params), rtol=1e-6
  )


def test_every_stored_parameter_learns(base, rules):
  model = derived.wrap(base, rules)
  stored = model.init(jax.random.key(1), INPUTS)
  # Away from the start, where zero factors hide gradients from each other.
  stored = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), stored
  )

  def loss(stored):
    outputs, _ = model.apply(stored, {}, INPUTS)
    return (outputs['logits'] ** 2).sum()

  grads = jax.jit(jax.grad(loss))(stored)
  chex.assert_tree_all_finite(grads)
  dead = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
    if not np.any(g)
  ]
  # A key bias shifts all scores of a query alike: softmax does not see it.
  assert [d for d in dead if d != 'attention/key/bias'] == []


def test_lipschitz_penalty_enters_training_alone(base, rules):
  model = derived.wrap(base, rules, weight=2.0, bound=0.0)
  stored = model.init(jax.random.key(1), INPUTS)
  key = jax.random.key(3)
  outputs, _ = model.apply(stored, {}, INPUTS, key=key, train=True)
  penalty = float(outputs['penalties']['lipschitz'])
  assert penalty > 0
  doubled = derived.wrap(base, rules, weight=4.0, bound=0.0)
  outputs, _ = doubled.apply(stored, {}, INPUTS, key=key, train=True)
  np.testing.assert_allclose(
    outputs['penalties']['lipschitz'], 2 * penalty, rtol=1e-6
  )
  slack = derived.wrap(base, rules, weight=2.0, bound=1e6)
  outputs, _ = slack.apply(stored, {}, INPUTS, key=key, train=True)
  assert float(outputs['penalties']['lipschitz']) == 0
  outputs, _ = model.apply(stored, {}, INPUTS, key=None, train=False)
  assert 'penalties' not in outputs
