"""Fused halves of a block in the place of the plain ones."""

import jax

from recursive_weights.models.kernels import (
  attention,
  channel_half,
  token_half,
  wide_product,
)
from recursive_weights.models.layers import trm_block


def make(
  fused: bool | None = None,
  *,
  token: token_half.Tiles | None = None,
  channel: channel_half.Tiles | None = None,
  over: attention.Tiles | None = None,
  interpret: bool | None = None,
) -> trm_block.Halves:
  """The programs of a block's halves, each plain where its sizes do not fit.

  Args:
    fused: None: on one GPU of the Hopper generation, which the tiles are for. A
      program that the compiler splits over several devices keeps the plain
      halves, which it knows how to split.
    token, channel, over: tiles of the kernels, `over` of attention.
    interpret: run the kernels without a GPU, slowly; None: where there is none.
  """
  if fused is None:
    fused = jax.device_count() == 1 and wide_product.available()
  if not fused:
    return trm_block.Halves()

  simulated = interpret or jax.default_backend() != 'gpu'

  def narrow(x_TBD):
    # Tiles of 4-byte numbers would not fit into shared memory.
    return simulated or x_TBD.dtype.itemsize == 2

  def token_program(params, x_TBD):
    tokens, hidden = params['gate'].shape
    fits = token_half.fits(tokens, x_TBD.size // tokens, hidden)
    if fits and narrow(x_TBD):
      return token_half.apply(params, x_TBD, tiles=token, interpret=interpret)
    return trm_block.token_half(params, x_TBD)

  def channel_program(params, x_TBD):
    if channel_half.fits(*params['gate'].shape) and narrow(x_TBD):
      options = {'tiles': channel, 'interpret': interpret}
      return channel_half.apply(params, x_TBD, **options)
    return trm_block.channel_half(params, x_TBD)

  def attention_program(params, x_TBD, *, heads, turn=None):
    program = trm_block.attention_half
    options = {'heads': heads, 'turn': turn}
    fits = attention.fits(x_TBD.shape[0], x_TBD.shape[-1], heads)
    if fits and narrow(x_TBD):
      program = attention.apply
      options |= {'tiles': over, 'interpret': interpret}
    return program(params, x_TBD, **options)

  return trm_block.Halves(token_program, channel_program, attention_program)
