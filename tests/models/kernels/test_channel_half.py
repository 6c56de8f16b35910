"""The fused channel half: the values and gradients of the plain one."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from recursive_weights.models.kernels import channel_half, wide_product
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


def value_and_gradients(half, params, x_TBD, g_TBD):
  @jax.jit
  def both(params, x_TBD):
    y_TBD, pull = jax.vjp(half, params, x_TBD)
    return y_TBD, pull(g_TBD)

  return both(params, x_TBD)


@pytest.mark.parametrize('down', [False, True])
@pytest.mark.parametrize('tokens, batch', [(81, 1), (16, 4), (5, 3)])
def test_fused_is_plain_in_float32(tokens, batch, down):
  case = setup(tokens, batch, 32, 96, jnp.float32)
  tiles = TILES._replace(down=down)
  fused = functools.partial(channel_half.apply, tiles=tiles, interpret=True)
  chex.assert_trees_all_close(
    value_and_gradients(fused, *case),
    value_and_gradients(trm_block.channel_half, *case),
    rtol=2e-5,
    atol=2e-5,
  )


def check_as_far_from_float32_as_plain(case, tiles):
  params, x_TBD, g_TBD = case
  exact = value_and_gradients(
    trm_block.channel_half,
    params,
    x_TBD.astype(jnp.float32),
    g_TBD.astype(jnp.float32),
  )
  fused = functools.partial(channel_half.apply, tiles=tiles, interpret=True)

  def distance(half):
    found = value_and_gradients(half, params, x_TBD, g_TBD)
    return jax.tree.map(
      lambda a, b: (
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
      ),
      found,
      exact,
    )

  of_plain = distance(trm_block.channel_half)
  for ours, plain in zip(
    jax.tree.leaves(distance(fused)), jax.tree.leaves(of_plain), strict=True
  ):
    assert ours < 1.2 * plain + 1e-3
    assert ours < 2e-2


@pytest.mark.parametrize('down', [False, True])
def test_fused_in_bfloat16_is_as_far_from_float32_as_plain(down):
  case = setup(16, 4, 64, 96, jnp.bfloat16)
  check_as_far_from_float32_as_plain(case, TILES._replace(down=down))


@pytest.mark.slow
def test_half_by_hopper_kernels_is_as_far_from_float32_as_plain():
  interpret = pytest.importorskip('jax._src.pallas.mosaic_gpu.interpret.params')
  small = wide_product.Tiles(columns=64, stages=2)
  wide = wide_product.Plan(
    gated=small,
    backward=small,
    blocks=2,
    interpret=interpret.InterpretGPUParams(),
  )
  case = setup(16, 8, 128, 64, jnp.bfloat16)
  check_as_far_from_float32_as_plain(case, TILES._replace(wide=wide))


def test_sizes_that_do_not_fit_are_named():
  params, x_TBD, _ = setup(4, 2, 24, 96, jnp.float32)
  with pytest.raises(ValueError, match='got 24 and 96'):
    channel_half.apply(params, x_TBD)
