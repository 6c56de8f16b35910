"""The fused token half: the values and gradients of the plain one."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from recursive_weights.models.kernels import tiling, token_half
from recursive_weights.models.layers import trm_block

TILES = token_half.Tiles(columns=32, hidden=16, back_columns=32, back_hidden=32)


def setup(tokens, batch, width, hidden, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  params = trm_block.swiglu_init(keys[0], tokens, hidden)
  x_TBD = jax.random.normal(keys[1], (tokens, batch, width)).astype(dtype)
  g_TBD = jax.random.normal(keys[2], (tokens, batch, width)).astype(dtype)
  return params, x_TBD, g_TBD


def value_and_gradients(half, params, x_TBD, g_TBD):
  @jax.jit
  def both(params, x_TBD):
    y_TBD, pull = jax.vjp(half, params, x_TBD)
    return y_TBD, pull(g_TBD)

  return both(params, x_TBD)


@pytest.mark.parametrize(
  'tokens, batch, width, whole',
  [
    (81, 2, 32, False),
    (97, 1, 48, False),
    (17, 3, 16, True),
    (16, 1, 32, True),
  ],
)
def test_fused_is_plain_in_float32(tokens, batch, width, whole):
  case = setup(tokens, batch, width, 32, jnp.float32)
  tiles = TILES._replace(whole=whole, back_whole=whole)
  fused = functools.partial(token_half.apply, tiles=tiles, interpret=True)
  chex.assert_trees_all_close(
    value_and_gradients(fused, *case),
    value_and_gradients(trm_block.token_half, *case),
    rtol=2e-5,
    atol=2e-5,
  )


def test_fused_in_bfloat16_is_as_far_from_float32_as_plain():
  params, x_TBD, g_TBD = setup(81, 2, 32, 64, jnp.bfloat16)
  exact = value_and_gradients(
    trm_block.token_half,
    params,
    x_TBD.astype(jnp.float32),
    g_TBD.astype(jnp.float32),
  )
  fused = functools.partial(token_half.apply, tiles=TILES, interpret=True)

  def distance(half):
    found = value_and_gradients(half, params, x_TBD, g_TBD)
    return jax.tree.map(
      lambda a, b: (
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
      ),
      found,
      exact,
    )

  of_plain = distance(trm_block.token_half)
  for ours, plain in zip(
    jax.tree.leaves(distance(fused)), jax.tree.leaves(of_plain), strict=True
  ):
    assert ours < 1.2 * plain + 1e-3
    assert ours < 2e-2


def test_pieces_cover_the_tokens_once():
  for tokens in (16, 17, 81, 97, 100, 256):
    pieces = tiling.pieces_of(tokens)
    covered = [t for start, size in pieces for t in range(start, start + size)]
    assert covered == list(range(-(-tokens // 16) * 16))


def test_sizes_that_do_not_fit_are_named():
  params, x_TBD, _ = setup(9, 1, 24, 32, jnp.float32)
  with pytest.raises(ValueError, match='24 and 32'):
    token_half.apply(params, x_TBD)
