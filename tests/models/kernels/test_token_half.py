"""The fused token half: the values and gradients of the plain one."""

import functools

import jax
import jax.numpy as jnp
import kernel_laws
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
  kernel_laws.check_is_plain(fused, trm_block.token_half, case)


@pytest.mark.long
def test_fused_in_bfloat16_is_as_far_from_float32_as_plain():
  case = setup(81, 2, 32, 64, jnp.bfloat16)
  fused = functools.partial(token_half.apply, tiles=TILES, interpret=True)
  kernel_laws.check_as_far_from_float32_as_plain(
    fused, trm_block.token_half, case
  )


def test_pieces_cover_the_tokens_once():
  for tokens in (16, 17, 81, 97, 100, 256):
    pieces = tiling.pieces_of(tokens)
    covered = [t for start, size in pieces for t in range(start, start + size)]
    assert covered == list(range(-(-tokens // 16) * 16))


def test_sizes_that_do_not_fit_are_named():
  params, x_TBD, _ = setup(9, 1, 24, 32, jnp.float32)
  with pytest.raises(ValueError, match='24 and 32'):
    token_half.apply(params, x_TBD)
