"""Compress and derive: laws on dict trees and on a user's own Flax model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from recursive_weights import Operator, Rule, chain, compress, derive, iterate
from recursive_weights.derivation import tree
from recursive_weights.derivation.operators import (
  contraction,
  polynomial,
  power,
  residual,
  spectral,
)
from recursive_weights.interfaces import UserError

KEY = jax.random.key(0)


def random(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def perturb(theta, seed=1, scale=0.1):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(scale * generator.normal(size=x.shape), x.dtype),
    theta,
  )


def neuron_level():
  """The four weights of the document at small sizes."""
  return {
    'nlm': {
      'w1': random((5, 3, 8)),
      'b1': random((3, 8), 1),
      'w2': random((3, 8), 2),
    },
    'head': {'w': random((3, 8), 3, jnp.bfloat16)},
  }


W2 = Rule('T', 'nlm/w1', 'nlm/w2', chain(contraction.make(), spectral.make()))


def test_compress_drops_the_target_and_derive_restores_the_tree():
  params = neuron_level()
  stored = compress((W2,), params, KEY)
  assert sorted(tree.names(stored)) == sorted(
    [
      'head/w',
      'nlm/b1',
      'nlm/w1',
      'operators/T/0/logits',
      'operators/T/1/down/bias',
      'operators/T/1/down/kernel',
      'operators/T/1/up/bias',
      'operators/T/1/up/kernel',
    ]
  )
  derived = derive((W2,), stored)
  chex.assert_trees_all_equal_structs(derived, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(derived, params)
  expected = W2.operator.apply(stored['operators']['T'], params['nlm']['w1'])
  chex.assert_trees_all_equal(derived['nlm'].pop('w2'), expected)
  del params['nlm']['w2']
  chex.assert_trees_all_equal(derived, params)


def test_derive_is_pure_and_deriving_twice_is_deriving_once():
  stored = compress((W2,), neuron_level(), KEY)
  before = jax.tree.map(jnp.copy, stored)
  once = derive((W2,), stored)
  chex.assert_trees_all_equal(stored, before)
  chex.assert_trees_all_equal(derive((W2,), stored), once)
  chex.assert_trees_all_equal(derive((W2,), once), once)


def test_without_rules_nothing_changes():
  params = neuron_level()
  assert compress((), params, KEY) is params
  assert derive((), params) is params


def test_rules_chain_through_targets():
  params = {'a': random((4, 6)), 'b': random((4, 6)), 'c': random((4, 6))}
  rules = (
    Rule('first', 'a', 'b', residual.make(rank=2)),
    Rule('second', 'b', 'c', polynomial.make()),
  )
  stored = compress(rules, params, KEY)
  assert set(stored) == {'a', 'operators'}
  stored['operators'] = perturb(stored['operators'])
  derived = derive(rules, stored)
  b = rules[0].operator.apply(stored['operators']['first'], params['a'])
  c = rules[1].operator.apply(stored['operators']['second'], b)
  chex.assert_trees_all_equal(derived, {'a': params['a'], 'b': b, 'c': c})


def test_rules_of_one_name_share_parameters():
  params = {
    'a': random((4, 6)),
    'b': random((4, 6)),
    'x': random((3, 9)),
    'y': random((3, 9)),
  }
  rules = (Rule('T', 'a', 'b', power.make()), Rule('T', 'x', 'y', power.make()))
  stored = compress(rules, params, KEY)
  assert list(stored['operators']) == ['T']
  stored['operators']['T'] = {'alpha': jnp.asarray(0.5)}
  derived = derive(rules, stored)
  for source, target in (('a', 'b'), ('x', 'y')):
    expected = power.make().apply({'alpha': jnp.asarray(0.5)}, params[source])
    chex.assert_trees_all_equal(derived[target], expected)

  def gradient(*targets):
    def loss(stored):
      derived = derive(rules, stored)
      return sum(jnp.sum(derived[target] ** 2) for target in targets)

    return jax.jit(jax.grad(loss))(stored)['operators']['T']['alpha']

  np.testing.assert_allclose(
    gradient('b', 'y'), gradient('b') + gradient('y'), rtol=1e-5
  )


def test_shared_parameters_that_do_not_fit_are_an_error():
  params = {
    'a': random((4, 6)),
    'b': random((4, 6)),
    'x': random((3, 9)),
    'y': random((3, 9)),
  }
  rules = (
    Rule('T', 'a', 'b', residual.make()),
    Rule('T', 'x', 'y', residual.make()),
  )
  with pytest.raises(UserError, match=r"'T'.*does not fit.*'x'.*\[3, 9\]"):
    compress(rules, params, KEY)


def test_another_rule_does_not_change_the_start_of_the_first():
  params = {name: random((4, 6)) for name in 'abc'}
  first = Rule('first', 'a', 'b', residual.make())
  second = Rule('second', 'a', 'c', residual.make())
  alone = compress((first,), params, KEY)['operators']['first']
  together = compress((second, first), params, KEY)['operators']
  chex.assert_trees_all_equal(alone, together['first'])
  assert jnp.any(together['first']['a'] != together['second']['a'])


def test_stack_from_another_leaf():
  """Layers 1..L are T, T², ... of the embedding's weight."""
  cell = residual.make(rank=2)
  params = {'first': random((4, 6)), 'layers': {'w': random((3, 4, 6))}}
  rules = (Rule('T', 'first', 'layers/w', iterate(cell, 3)),)
  stored = compress(rules, params, KEY)
  assert set(stored) == {'first', 'operators'}
  stored['operators'] = perturb(stored['operators'])
  derived = derive(rules, stored)
  chex.assert_trees_all_equal_shapes_and_dtypes(derived, params)
  w = params['first']
  for layer in range(3):
    w = cell.apply(stored['operators']['T'], w)
    chex.assert_trees_all_close(derived['layers']['w'][layer], w, rtol=1e-5)


def test_stack_from_its_own_first_slice():
  """Layer l is T^l of layer 0."""
  cell = residual.make(rank=2)
  params = {'layers': {'w': random((3, 4, 6)), 'b': random((3, 6))}}
  rules = (
    Rule('T', 'layers/w', 'layers/w', iterate(cell, 3, base_first=True)),
  )
  stored = compress(rules, params, KEY)
  chex.assert_shape(stored['layers']['w'], (4, 6))
  stored['operators'] = perturb(stored['operators'])
  derived = derive(rules, stored)
  chex.assert_trees_all_equal_shapes_and_dtypes(derived, params)
  w = params['layers']['w'][0]
  for layer in range(3):
    chex.assert_trees_all_close(derived['layers']['w'][layer], w, rtol=1e-5)
    w = cell.apply(stored['operators']['T'], w)


def test_specialists_from_their_centre_as_whole_trees():
  scale = Operator(
    lambda key, base: {'gain': jnp.ones(())},
    lambda theta, base: jax.tree.map(lambda x: theta['gain'] * x, base),
  )
  centre = {'w': random((3, 4)), 'b': random((4,), 1)}
  params = {'centre': centre, 'logos': centre, 'physis': centre}
  rules = tuple(
    Rule(name, 'centre', name, scale) for name in ('logos', 'physis')
  )
  stored = compress(rules, params, KEY)
  assert set(stored) == {'centre', 'operators'}
  chex.assert_trees_all_equal(derive(rules, stored), params)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(8)(x))
    x = nn.relu(nn.Dense(8)(x))
    return nn.Dense(1)(x)


def test_a_users_flax_model_in_three_lines():
  model = Network()
  x_BD, y_B = random((16, 8)), random((16,), 1)
  variables = model.init(KEY, x_BD)

  rules = (
    Rule(
      'T', 'params/Dense_0/kernel', 'params/Dense_1/kernel', spectral.make()
    ),
  )
  stored = compress(rules, variables, KEY)

  def loss(stored):
    answer_B = model.apply(derive(rules, stored), x_BD)[:, 0]
    return jnp.mean((answer_B - y_B) ** 2)

  chex.assert_trees_all_equal_shapes_and_dtypes(
    derive(rules, stored), variables
  )
  gradient = jax.grad(loss)(stored)
  chex.assert_trees_all_equal_shapes(gradient, stored)
  assert jnp.any(gradient['operators']['T']['up']['kernel'] != 0)

  # The source learns from both layers: its own use and T's.
  def loss_without_derivation(stored):
    constant = jax.lax.stop_gradient(
      derive(rules, stored)['params']['Dense_1']['kernel']
    )
    fixed = Operator(lambda key, base: {}, lambda theta, base: constant)
    return loss_with((rules[0]._replace(operator=fixed),), stored)

  def loss_with(rules, stored):
    answer_B = model.apply(derive(rules, stored), x_BD)[:, 0]
    return jnp.mean((answer_B - y_B) ** 2)

  partial = jax.grad(loss_without_derivation)(stored)
  source = ('params', 'Dense_0', 'kernel')
  whole, part = gradient, partial
  for name in source:
    whole, part = whole[name], part[name]
  assert jnp.linalg.norm(whole - part) > 1e-3 * jnp.linalg.norm(part)

  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(stored, state):
    value, gradient = jax.value_and_grad(loss)(stored)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(stored, updates), state, value

  state, values = optimizer.init(stored), []
  for _ in range(20):
    stored, state, value = step(stored, state)
    values.append(float(value))
  assert values[-1] < values[0]
  chex.assert_tree_all_finite(stored)
  assert 'kernel' not in stored['params']['Dense_1']


def test_compress_and_derive_trace():
  params = neuron_level()
  stored = compress((W2,), params, KEY)
  shapes = jax.eval_shape(lambda p, k: compress((W2,), p, k), params, KEY)
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, stored)
  chex.assert_trees_all_close(
    jax.jit(lambda s: derive((W2,), s))(stored),
    derive((W2,), stored),
    rtol=1e-5,
  )


def test_a_module_with_nothing_left_comes_back():
  params = {'a': {'w': random((3, 4))}, 'b': {'deep': {'w': random((3, 4))}}}
  rules = (Rule('T', 'a/w', 'b/deep/w', polynomial.make()),)
  stored = compress(rules, params, KEY)
  assert set(stored) == {'a', 'operators'}
  chex.assert_trees_all_equal_shapes(derive(rules, stored), params)


SAME = polynomial.make()


@pytest.mark.parametrize(
  'rules, message',
  [
    ([('T', 'x', 'b')], "no 'x' in the tree; there are: a, b, c, half"),
    ([('T', 'a', 'x')], "no 'x' in the tree; there are: a, b, c, half"),
    ([('T', 'a/w', 'b')], "no 'a/w' in the tree"),
    ([('T', 'a', 'b'), ('U', 'b', 'a')], "'T' needs 'a'.*cycle.*: b, a"),
    ([('T', 'b', 'a'), ('U', 'c', 'b')], "'T' needs 'b'.*in order"),
    ([('T', 'a', 'b'), ('U', 'c', 'b')], "two rules derive 'b'"),
  ],
)
def test_paths_that_cannot_be_derived(rules, message):
  params = {
    'a': random((4, 6)),
    'b': random((4, 6)),
    'c': random((2, 3)),
    'half': random((4, 6), dtype=jnp.bfloat16),
  }
  rules = [Rule(*rule, SAME) for rule in rules]
  with pytest.raises(UserError, match=message):
    compress(rules, params, KEY)


def test_wrong_shape_or_type_names_both():
  params = {
    'a': random((4, 6)),
    'c': random((2, 3)),
    'half': random((4, 6), dtype=jnp.bfloat16),
  }
  with pytest.raises(UserError, match=r'float32\[4, 6\].*float32\[2, 3\]'):
    compress([Rule('T', 'a', 'c', SAME)], params, KEY)
  with pytest.raises(UserError, match=r'float32\[4, 6\].*bfloat16\[4, 6\]'):
    compress([Rule('T', 'a', 'half', SAME)], params, KEY)


def test_trees_that_are_not_compressed_by_these_rules():
  params = {'a': random((4, 6)), 'b': random((4, 6)), 'c': random((4, 6))}
  rules = [Rule('T', 'a', 'b', SAME)]
  stored = compress(rules, params, KEY)
  with pytest.raises(UserError, match='compressed already'):
    compress(rules, stored, KEY)
  with pytest.raises(UserError, match=r"'U' has no parameters.*there are: T"):
    derive([Rule('U', 'a', 'b', SAME)], stored)
  with pytest.raises(UserError, match="'b', which is stored too"):
    derive(rules, {**stored, 'b': params['b']})
  with pytest.raises(UserError, match="no 'b' in the tree"):
    derive(rules, {'a': params['a']})
