"""Fused attention: the values and gradients of the plain one."""

import functools

import chex
import jax
import jax.numpy as jnp
import kernel_laws
import pytest

from recursive_weights.models.kernels import attention
from recursive_weights.models.layers import trm_block


def setup(tokens, batch, width, heads, turns, dtype, each=1):
  keys = jax.random.split(jax.random.key(0), 3)
  params = trm_block.attention_init(keys[0], width)
  x_BTD = jax.random.normal(keys[1], (batch, tokens, width)).astype(dtype)
  g_BTD = jax.random.normal(keys[2], (batch, tokens, width)).astype(dtype)
  turn = trm_block.rotation(tokens, width // heads) if turns else None
  options = {'heads': heads, 'turn': turn}
  tiles = attention.Tiles(heads=each)
  fused = functools.partial(
    attention.apply, tiles=tiles, interpret=True, **options
  )
  plain = functools.partial(trm_block.attention_half, **options)
  return fused, plain, (params, x_BTD, g_BTD)


@pytest.mark.parametrize(
  'tokens, batch, turns, each',
  [(97, 2, True, 1), (81, 2, False, 2), (17, 3, False, 1), (16, 1, True, 8)],
)
def test_fused_is_plain_in_float32(tokens, batch, turns, each):
  fused, plain, case = setup(tokens, batch, 64, 2, turns, jnp.float32, each)
  kernel_laws.check_is_plain(fused, plain, case)


def test_programs_of_some_heads():
  fused, plain, case = setup(17, 2, 192, 6, True, jnp.float32, each=4)
  kernel_laws.check_is_plain(fused, plain, case)


def test_scores_far_below_zero_have_finite_gradients():
  fused, plain, (params, x_BTD, g_BTD) = setup(17, 2, 64, 2, False, jnp.float32)
  q, _, v = jnp.split(params['qkv'], 3, axis=1)
  params = params | {'qkv': jnp.concatenate([10 * q, -10 * q, v], 1)}
  x_BTD = jnp.broadcast_to(x_BTD[:, :1], x_BTD.shape) + 0.1 * x_BTD
  found, expected = (
    kernel_laws.value_and_gradients(half, params, x_BTD, g_BTD)
    for half in (fused, plain)
  )
  # Such scores round more; infinite or not is what is asked here.
  chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.long
def test_fused_in_bfloat16_is_as_far_from_float32_as_plain():
  fused, plain, case = setup(33, 2, 64, 2, True, jnp.bfloat16)
  kernel_laws.check_as_far_from_float32_as_plain(fused, plain, case)


def test_sizes_that_do_not_fit_are_named():
  fused, _, (params, x_BTD, _) = setup(9, 1, 48, 2, False, jnp.float32)
  with pytest.raises(ValueError, match='9 tokens, 2 heads of 24'):
    fused(params, x_BTD)
