"""The fused channel half: the values and gradients of the plain one."""

import functools

import jax
import jax.numpy as jnp
import kernel_laws
import pytest

from recursive_weights.models.kernels import channel_half, hopper
from recursive_weights.models.layers import trm_block

TILES = channel_half.Tiles(
  rows=32,
  hidden=32,
  width=16,
  back_rows=16,
  back_hidden=32,
  back_width=32,
  down_rows=32,
  down_width=32,
)


def setup(tokens, batch, width, hidden, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  params = trm_block.swiglu_init(keys[0], width, hidden)
  x_TBD = jax.random.normal(keys[1], (tokens, batch, width)).astype(dtype)
  g_TBD = jax.random.normal(keys[2], (tokens, batch, width)).astype(dtype)
  return params, x_TBD, g_TBD


@pytest.mark.parametrize('down', [False, True])
@pytest.mark.parametrize(
  'tokens, batch, width', [(81, 1, 32), (16, 4, 32), (5, 3, 48)]
)
def test_fused_is_plain_in_float32(tokens, batch, width, down):
  case = setup(tokens, batch, width, 96, jnp.float32)
  tiles = TILES._replace(down=down)
  fused = functools.partial(channel_half.apply, tiles=tiles, interpret=True)
  kernel_laws.check_is_plain(fused, trm_block.channel_half, case)


def check_rounding(case, tiles):
  fused = functools.partial(channel_half.apply, tiles=tiles, interpret=True)
  kernel_laws.check_as_far_from_float32_as_plain(
    fused, trm_block.channel_half, case
  )


@pytest.mark.long
@pytest.mark.parametrize('down', [False, True])
def test_fused_in_bfloat16_is_as_far_from_float32_as_plain(down):
  case = setup(16, 4, 64, 96, jnp.bfloat16)
  check_rounding(case, TILES._replace(down=down))


@pytest.mark.long
def test_half_by_hopper_kernels_is_as_far_from_float32_as_plain():
  interpret = pytest.importorskip('jax._src.pallas.mosaic_gpu.interpret.params')
  small = hopper.Tiles(columns=64, stages=2)
  wide = hopper.Plan(
    gated=small,
    backward=small,
    blocks=2,
    interpret=interpret.InterpretGPUParams(),
  )
  case = setup(16, 8, 128, 64, jnp.bfloat16)
  check_rounding(case, TILES._replace(wide=wide))


def test_sizes_that_do_not_fit_are_named():
  params, x_TBD, _ = setup(4, 2, 24, 96, jnp.float32)
  with pytest.raises(ValueError, match='got 24 and 96'):
    channel_half.apply(params, x_TBD)
