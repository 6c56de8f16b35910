"""The fused constraint half: the values and gradients of the plain one."""

import functools

import jax
import jax.numpy as jnp
import kernel_laws
import pytest

from recursive_weights.models.kernels import constraint_half
from recursive_weights.models.layers import symmetric_block

TILES = constraint_half.Tiles(rows=16, back_rows=32)


def setup(box, batch, width, families, pool, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  digits = box[0] * box[1]
  shape = (digits * digits, batch, digits, width)
  params = symmetric_block.constraint_init(
    keys[0], width, 16, len(families), pool
  )
  x_TBVD = jax.random.normal(keys[1], shape).astype(dtype)
  g_TBVD = jax.random.normal(keys[2], shape).astype(dtype)
  return params, x_TBVD, g_TBVD


def programs(**options):
  fused = functools.partial(
    constraint_half.apply, tiles=TILES, interpret=True, **options
  )
  return fused, functools.partial(symmetric_block.constraint_half, **options)


@pytest.mark.parametrize(
  'box, families, pool',
  [
    ((2, 2), ('row', 'column', 'box', 'cell'), 'both'),
    ((2, 3), ('row', 'column', 'box', 'cell'), 'mean'),
    ((3, 2), ('column', 'box'), 'softmax'),
    ((2, 2), ('cell',), 'max'),
  ],
)
def test_fused_is_plain_in_float32(box, families, pool):
  case = setup(box, 3, 16, families, pool, jnp.float32)
  options = {'families': families, 'box': box, 'pool': pool}
  kernel_laws.check_is_plain(*programs(**options), case)


@pytest.mark.long
def test_fused_in_bfloat16_is_as_far_from_float32_as_plain():
  # Means: the member that is largest may be another one after rounding.
  families = tuple(symmetric_block.FAMILIES)
  case = setup((2, 2), 4, 32, families, 'mean', jnp.bfloat16)
  options = {'families': families, 'box': (2, 2), 'pool': 'mean'}
  kernel_laws.check_as_far_from_float32_as_plain(*programs(**options), case)


def test_sizes_that_do_not_fit_are_named():
  params, x_TBVD, _ = setup((2, 2), 1, 24, ('row',), 'mean', jnp.float32)
  with pytest.raises(ValueError, match='got 24, 16'):
    constraint_half.apply(
      params, x_TBVD, families=('row',), box=(2, 2), pool='mean'
    )
