"""Optimizers against NumPy float64, and the laws of parameter groups."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.training import optimizers

PARAMS = {
  'a': {'w': jnp.ones((3, 2)), 'b': jnp.full(2, 0.5)},
  'c': jnp.linspace(-1.0, 1.0, 4),
}
SCHEDULE = {'name': 'constant', 'warmup_steps': 0, 'final_fraction': 0.0}


def group(pattern, **fields):
  return {
    'pattern': pattern,
    'lr_scale': 1.0,
    'weight_decay': 0.0,
    'frozen': False,
  } | fields


def build(groups, **fields):
  return optimizers.make(
    PARAMS,
    10,
    **({'schedule': SCHEDULE, 'groups': groups, 'clip_norm': 0.0} | fields),
  )[0]


def train(optimizer, grads):
  params, state = PARAMS, optimizer.init(PARAMS)
  for g in grads:
    updates, state = optimizer.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def gradients(count, scale=1.0):
  rng = np.random.default_rng(0)
  return [
    jax.tree.map(
      lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32),
      PARAMS,
    )
    for _ in range(count)
  ]


def test_adam_atan2_against_numpy_float64():
  """p <- p (1 - lr wd) - lr / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))."""
  lr, decay, b1, b2 = 0.1, 0.3, 0.9, 0.95
  grads = gradients(5)
  found = train(
    build(
      {'all': group('.*', weight_decay=decay)},
      name='adam_atan2',
      learning_rate=lr,
      b1=b1,
      b2=b2,
    ),
    grads,
  )
  for name in ('a/w', 'a/b', 'c'):

    def leaf(tree, name=name):
      for part in name.split('/'):
        tree = tree[part]
      return np.asarray(tree, np.float64)

    p = leaf(PARAMS)
    m = v = np.zeros_like(p)
    for t, g in enumerate(map(leaf, grads), 1):
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      step = np.arctan2(m, np.sqrt(v / (1 - b2**t))) / (1 - b1**t)
      p = p * (1 - lr * decay) - lr * step
    np.testing.assert_allclose(leaf(found), p, rtol=2e-6, atol=1e-6)


def test_adam_atan2_does_not_see_the_scale_of_gradients():
  optimizer = build({'all': group('.*')}, name='adam_atan2')
  chex.assert_trees_all_close(
    train(optimizer, gradients(3)),
    train(optimizer, gradients(3, scale=1e-6)),
    rtol=1e-5,
  )


def test_groups_freeze_scale_and_decay():
  groups = {
    'frozen': group('a/w', frozen=True),
    'slow': group('a/b', lr_scale=0.1),
    'decayed': group('^c', weight_decay=0.5),
  }
  optimizer = build(groups, name='sgd', b1=0.0, learning_rate=0.1)
  (g,) = gradients(1)
  found = train(optimizer, [g])
  chex.assert_trees_all_equal(found['a']['w'], PARAMS['a']['w'])
  chex.assert_trees_all_close(
    found['a']['b'], PARAMS['a']['b'] - 0.01 * g['a']['b'], rtol=1e-6
  )
  chex.assert_trees_all_close(
    found['c'], PARAMS['c'] - 0.1 * (g['c'] + 0.5 * PARAMS['c']), rtol=1e-6
  )


def test_frozen_gradients_do_not_count_for_clipping():
  groups = {'frozen': group('^c', frozen=True), 'rest': group('a/')}
  optimizer = build(
    groups, name='sgd', b1=0.0, learning_rate=1.0, clip_norm=0.5
  )
  (g,) = gradients(1)
  loud = g | {'c': 1e6 * g['c']}
  chex.assert_trees_all_equal(train(optimizer, [g]), train(optimizer, [loud]))


def test_all_errors_come_at_once():
  with pytest.raises(UserError) as error:
    build(
      {'x': group('a/')},
      name='lion',
      learning_rate=0.0,
      b1=1.0,
      schedule=SCHEDULE | {'warmup_steps': 11},
    )
  for part in ('learning_rate', 'b1', 'lion', 'warmup_steps', 'c is in 0'):
    assert part in str(error.value)


def test_every_leaf_has_one_group_and_every_pattern_a_leaf():
  with pytest.raises(UserError) as error:
    build({'x': group('a/'), 'y': group('w'), 'z': group('nothing')})
  text = str(error.value)
  assert "a/w is in 2 groups ['x', 'y']" in text
  assert 'c is in 0 groups' in text
  assert "'nothing' meets no parameter" in text


def test_schedules():
  cosine = optimizers.schedule(
    2.0, 110, name='cosine', warmup_steps=10, final_fraction=0.1
  )
  np.testing.assert_allclose(cosine(0), 0.2, rtol=1e-6)
  np.testing.assert_allclose(cosine(9), 2.0, rtol=1e-6)
  np.testing.assert_allclose(cosine(60), 2.0 * 0.55, rtol=1e-5)
  np.testing.assert_allclose(cosine(110), 0.2, rtol=1e-5)
  linear = optimizers.schedule(1.0, 10, name='linear')
  np.testing.assert_allclose(linear(5), 0.5, rtol=1e-6)
  with pytest.raises(UserError, match='warmup_steps'):
    optimizers.schedule(1.0, 10, warmup_steps=11)
  with pytest.raises(UserError, match='sine'):
    optimizers.schedule(1.0, 10, name='sine')


def test_clipping_bounds_the_update():
  optimizer = build(
    {'all': group('.*')}, name='sgd', b1=0.0, learning_rate=1.0, clip_norm=0.5
  )
  found = train(optimizer, gradients(1, scale=100.0))
  moved = jax.tree.map(lambda a, b: a - b, found, PARAMS)
  np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-5)


def test_moments_in_bfloat16_follow_those_in_float32():
  groups = {'all': group('.*')}
  for name in ('adamw', 'adam_atan2'):
    fields = {'name': name, 'learning_rate': 0.01, 'b2': 0.95}
    half = build(groups, moments='bfloat16', **fields)
    dtypes = {x.dtype.name for x in jax.tree.leaves(half.init(PARAMS))}
    assert dtypes == {'int32', 'bfloat16'}
    grads = gradients(20)
    full = train(build(groups, **fields), grads)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), full, PARAMS)
    error = jax.tree.map(
      lambda a, b: jnp.abs(a - b).max(), train(half, grads), full
    )
    for a, b in zip(*map(jax.tree.leaves, (error, moved)), strict=True):
      assert 0 < a < 0.02 * b
  with pytest.raises(UserError, match='needs b1 and b2'):
    build(groups, moments='bfloat16')
  with pytest.raises(UserError, match="got 'float8'"):
    build(groups, moments='float8')


def test_sign_rows_move_the_rows_of_the_batch_alone():
  """p <- p (1 - lr wd) - lr sign(g), where a row has a gradient."""
  groups = {
    'table': group('a/w', sign=True, weight_decay=0.5, lr_scale=2.0),
    'rest': group('a/b|^c'),
  }
  optimizer = build(groups, name='adamw', learning_rate=0.1, b2=0.95)
  (g,) = gradients(1)
  g['a']['w'] = g['a']['w'].at[1].set(0.0).at[2, 0].set(0.0)
  found = train(optimizer, [g, g])['a']['w']
  wanted = np.asarray(PARAMS['a']['w'], np.float64)
  for _ in range(2):
    step = np.sign(np.asarray(g['a']['w'])) + 0.5 * wanted
    step[1] = 0
    wanted = wanted - 0.2 * step
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  # It keeps no moments, and the average leaves it and frozen leaves alone.
  states = jax.tree.leaves(optimizer.init(PARAMS))
  assert sum(x.size for x in states) < 2 * 6 + 8
  mask = optimizers.averaged(groups | {'table': group('a/w', frozen=True)})
  assert mask(PARAMS) == {'a': {'w': False, 'b': True}, 'c': True}
  assert not optimizers.averaged(groups)(PARAMS)['a']['w']
