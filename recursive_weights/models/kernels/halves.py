"""Fused halves of a block in the place of the plain ones."""

import jax

from recursive_weights.models.kernels import (
  attention,
  channel_half,
  token_half,
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
    fused: None: on one GPU. A program that is split over several devices by
      the compiler keeps the plain halves, which it knows how to split.
    token, channel, over: tiles of the kernels, `over` of attention.
    interpret: run the kernels without a GPU, slowly; None: where there is none.
  """
  if fused is None:
    fused = jax.default_backend() == 'gpu' and jax.device_count() == 1
  if not fused:
    return trm_block.Halves()

  def token_program(params, x_TBD):
    tokens, hidden = params['gate'].shape
    if not token_half.fits(tokens, x_TBD.size // tokens, hidden):
      return trm_block.token_half(params, x_TBD)
    return token_half.apply(params, x_TBD, tiles=token, interpret=interpret)

  def channel_program(params, x_TBD):
    if not channel_half.fits(*params['gate'].shape):
      return trm_block.channel_half(params, x_TBD)
    return channel_half.apply(params, x_TBD, tiles=channel, interpret=interpret)

  def attention_program(params, x_TBD, *, heads, turn=None):
    program = trm_block.attention_half
    options = {'heads': heads, 'turn': turn}
    if attention.fits(x_TBD.shape[0], x_TBD.shape[-1], heads):
      program = attention.apply
      options |= {'tiles': over, 'interpret': interpret}
    return program(params, x_TBD, **options)

  return trm_block.Halves(token_program, channel_program, attention_program)
