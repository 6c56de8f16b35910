"""Placements put the state where their programs leave it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.training import devices
from recursive_weights.training.state import State


@pytest.mark.parametrize('strategy', devices.STRATEGIES)
def test_a_second_dispatch_finds_the_state_where_the_first_did(strategy):
  """Else it would compile the whole step once more."""
  rows = 2 * jax.device_count()
  placement = devices.make(strategy, batch_size=rows, min_size=1)
  plain = State(
    params={'w': jnp.ones([8, 3])},
    opt_state={},
    ema={},
    carry={'h': jnp.zeros([rows, 3])},
    step=jnp.int32(0),
    key=jnp.zeros([2], jnp.uint32),
  )

  def make_step(axis):
    def step(state, batch):
      total = batch['x'].sum()
      if axis is not None:
        total = jax.lax.psum(total, axis)
      state = state._replace(
        params=jax.tree.map(lambda w: w + total, state.params),
        carry={'h': state.carry['h'] + batch['x']},
        step=state.step + 1,
      )
      return state, {'loss': total}

    return step

  dispatch = placement.compile(make_step)
  batches = placement.batches({'x': np.ones([2, rows, 3], np.float32)})
  first = placement.scatter(plain)
  before = [x.sharding for x in jax.tree.leaves(first)]
  second, _ = dispatch(first, batches, np.int32(0), np.int32(1))
  leaves = jax.tree.leaves(second)
  for was, x in zip(before, leaves, strict=True):
    assert was.is_equivalent_to(x.sharding, x.ndim)
  back = placement.gather(second)
  assert int(back.step) == 1
  np.testing.assert_array_equal(back.params['w'], 1 + 3.0 * rows)
