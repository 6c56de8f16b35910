"""Slots against a loop over rows with Python lists."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.recursion import slots as slots_lib

ROWS, MOST, LENGTH = 5, 4, 40


def batches(seed=0):
  rng = np.random.default_rng(seed)
  return [
    {
      'inputs': rng.integers(0, 99, (ROWS, 3)),
      'weight': np.ones(ROWS, np.float32),
    }
    for _ in range(LENGTH)
  ]


def run(slots, halts, least):
  """Every step's rows, carries, step counts and reports."""
  fresh = {'z': jnp.full([ROWS, 2], -1.0)}
  data = batches()
  state = slots.start(
    data[0], fresh, {'right': jax.ShapeDtypeStruct((ROWS,), jnp.float32)}
  )
  found = []
  for step, batch in enumerate(data):
    batch = jax.tree.map(jnp.asarray, batch)
    state = slots.refill(state, batch, fresh, jnp.int32(step))
    chex.assert_tree_shape_prefix(state, (ROWS,))
    found.append(
      {
        'inputs': np.asarray(state['batch']['inputs']),
        'z': np.asarray(state['carry']['z']),
      }
    )
    carry = {'z': state['carry']['z'] + 1}
    right = {'right': jnp.full([ROWS], float(step))}
    drawn = (jnp.asarray(halts[step]), jnp.asarray(least[step]))
    state = slots.advance(state, carry, *drawn, right)
    metrics, weight = slots.report(state)
    found[-1] |= {
      'halted': np.asarray(state['halted']),
      'right': np.asarray(metrics['right']),
      'steps': np.asarray(metrics['steps']),
      'weight': np.asarray(weight),
    }
  return found


@pytest.mark.parametrize('empty_every', [0, 7])
def test_slots_are_a_loop_over_rows(empty_every):
  rng = np.random.default_rng(1)
  halts = rng.normal(size=(LENGTH, ROWS)).astype(np.float32) - 0.5
  least = rng.integers(0, MOST + 1, (LENGTH, ROWS)).astype(np.int32)
  slots = slots_lib.make(steps=MOST, explore=0.5, empty_every=empty_every)
  found = run(slots, halts, least)
  data = batches()
  early = 0
  for b in range(ROWS):
    held, count, last = None, 0, (0.0, 0, 0.0)
    for step in range(LENGTH):
      if empty_every and step % empty_every == 0:
        held, last = None, (0.0, 0, 0.0)
      if held is None:
        held, count = data[step]['inputs'][b], 0
      seen = found[step]
      np.testing.assert_array_equal(seen['inputs'][b], held)
      np.testing.assert_array_equal(seen['z'][b], count - 1)
      count += 1
      may = count >= least[step, b]
      halted = count == MOST or (halts[step, b] > 0 and may)
      assert seen['halted'][b] == halted
      if halted:
        early += count < MOST
        held, last = None, (float(step), count, 1.0)
      assert (seen['right'][b], seen['steps'][b], seen['weight'][b]) == last
  assert early > 10  # both ways to halt were met


def test_exploration():
  slots = slots_lib.make(steps=6, explore=0.25)
  least = np.asarray(slots.explore(jax.random.key(0), 20_000))
  assert set(least) == {0, 2, 3, 4, 5, 6}
  np.testing.assert_allclose((least > 0).mean(), 0.25, atol=0.01)
  np.testing.assert_allclose(
    [(least == m).mean() for m in range(2, 7)], 0.05, atol=0.006
  )
  one = slots_lib.make(steps=1, explore=1.0).explore(jax.random.key(0), 9)
  assert (np.asarray(one) <= 1).all()


@pytest.mark.parametrize(
  'fields', [{'steps': 0}, {'explore': 1.5}, {'empty_every': -1}]
)
def test_arguments_out_of_range(fields):
  with pytest.raises(ValueError, match=next(iter(fields))):
    slots_lib.make(**fields)
