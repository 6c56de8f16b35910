"""The fused half over cells: the values and gradients of the plain one."""

import functools

import jax
import jax.numpy as jnp
import kernel_laws
import pytest

from recursive_weights.models.kernels import cell_half
from recursive_weights.models.layers import symmetric_block

# Several cells a program: of four digits 4 and 8, of six 2 and 4.
TILES = cell_half.Tiles(rows=16, back_rows=32)


def setup(box, batch, width, pooled, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  digits = box[0] * box[1]
  shape = (digits * digits, batch, digits, width)
  params = symmetric_block.constraint_init(keys[0], width, pooled, 1, 'both')
  x_TBVD = jax.random.normal(keys[1], shape).astype(dtype)
  g_TBVD = jax.random.normal(keys[2], shape).astype(dtype)
  return params, x_TBVD, g_TBVD


def programs(box):
  options = {'families': ('cell',), 'box': box, 'pool': 'both'}
  fused = functools.partial(
    cell_half.apply, tiles=TILES, interpret=True, **options
  )
  return fused, functools.partial(symmetric_block.constraint_half, **options)


# 16 cells a puzzle: whole tiles; 36 and 81: some that are not, and digits that
# are no power of two.
@pytest.mark.parametrize('box, batch', [((2, 2), 2), ((2, 3), 3), ((3, 3), 1)])
def test_fused_is_plain_in_float32(box, batch):
  case = setup(box, batch, 16, 32, jnp.float32)
  kernel_laws.check_is_plain(*programs(box), case)


def test_digits_that_tie_share_the_gradient():
  # So at the start, where all digits of a blank cell are alike.
  params, x_TBVD, g_TBVD = setup((2, 2), 2, 16, 32, jnp.float32)
  x_TBVD = jnp.broadcast_to(x_TBVD[:, :, :1], x_TBVD.shape)
  kernel_laws.check_is_plain(*programs((2, 2)), (params, x_TBVD, g_TBVD))


@pytest.mark.parametrize(
  'change, named',
  [
    ({'families': ('row',)}, "'row'"),
    ({'pool': 'mean'}, "'mean'"),
    ({}, '24'),
  ],
)
def test_what_does_not_fit_is_named(change, named):
  params, x_TBVD, _ = setup((2, 2), 1, 16 if change else 24, 32, jnp.float32)
  with pytest.raises(ValueError, match=named):
    cell_half.apply(params, x_TBVD, **change)
