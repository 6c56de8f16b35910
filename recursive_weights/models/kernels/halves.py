"""Fused halves of a block in the place of the plain ones."""

import functools

import jax
import jax.numpy as jnp

from recursive_weights.models.kernels import (
  attention,
  cell_half,
  channel_half,
  constraint_half,
  deferred_norm,
  hopper,
  token_half,
)
from recursive_weights.models.layers import symmetric_block, trm_block
from recursive_weights.scans.kernels import check_gpu, on_one_device


def make(
  fused: bool | None = None,
  *,
  token: token_half.Tiles | None = None,
  channel: channel_half.Tiles | None = None,
  over: attention.Tiles | None = None,
  constraint: constraint_half.Tiles | None = None,
  cell: cell_half.Tiles | None = None,
  interpret: bool | None = None,
) -> trm_block.Halves:
  """The programs of a block's halves.

  Args:
    fused: True: kernels, and an error where sizes do not fit them; False: plain
      halves; None: kernels for bfloat16 where sizes fit, on GPUs of the Hopper
      generation, which the tiles are for. A program that the compiler splits
      over several devices keeps the plain halves, which it knows how to split.
    token, channel, over, constraint, cell: tiles of the kernels, `over` of
      attention, `cell` of a constraint half whose only family is 'cell'.
      `channel.wide` is also the plan of attention's products.
    interpret: run the kernels without a GPU, slowly; None: where there is none.

  Returns:
    Programs of which wide ones may hand on a `deferred_norm.Deferred`: the last
    block's result goes through `settle`.

  Raises:
    ValueError: when run: with `fused=True` on sizes that do not fit; with tiles
      by which a kernel would wait for ever.
    UserError: `fused=True` on a GPU that cannot run kernels.
  """
  if fused is False:
    return trm_block.Halves()

  if fused and not interpret:
    check_gpu()
  simulated = interpret or jax.default_backend() != 'gpu'

  def use(fits, x):
    # Tiles of 4-byte numbers would not fit into shared memory, and float16 is
    # not tested.
    narrow = simulated or x.dtype == jnp.bfloat16
    return fused or (fits and narrow and on_one_hopper())

  wide = (channel or channel_half.Tiles()).wide
  settle = functools.partial(deferred_norm.settle, interpret=simulated)

  def defers(x, inner, head=0):
    """Whether a half leaves its norm to those who read it."""
    value = deferred_norm.value_of(x)
    if wide is None or value.dtype.itemsize != 2:
      return False
    on_hopper = not simulated and hopper.available()
    if not (wide.interpret or (on_hopper and use(True, value))):
      return False
    return deferred_norm.fits(x, inner, wide, head)

  def token_program(params, x_TBD):
    x_TBD = settle(x_TBD)
    tokens, hidden = params['gate'].shape
    fits = token_half.fits(tokens, x_TBD.size // tokens, hidden)
    if use(fits, x_TBD):
      return token_half.apply(params, x_TBD, tiles=token, interpret=interpret)
    return trm_block.token_half(params, x_TBD)

  def channel_program(params, x_TBD):
    if defers(x_TBD, params['gate'].shape[1]):
      return deferred_norm.channel_half(params, x_TBD, plan=wide)
    x_TBD = settle(x_TBD)
    if use(channel_half.fits(*params['gate'].shape), x_TBD):
      options = {'tiles': channel, 'interpret': interpret}
      return channel_half.apply(params, x_TBD, **options)
    return trm_block.channel_half(params, x_TBD)

  def attention_program(params, x_BTD, *, heads, turn=None):
    program = trm_block.attention_half
    options = {'heads': heads, 'turn': turn}
    _, tokens, width = deferred_norm.value_of(x_BTD).shape
    fits = attention.fits(tokens, width, heads)
    if fits and defers(x_BTD, width, width // heads):
      options |= {'tiles': over, 'plan': wide, 'interpret': simulated}
      return deferred_norm.attention_half(params, x_BTD, **options)
    x_BTD = settle(x_BTD)
    if use(fits, x_BTD):
      program = attention.apply
      options |= {'tiles': over, 'out_tiles': channel, 'interpret': interpret}
    return program(params, x_BTD, **options)

  def constraint_program(params, x_TBVD, *, families, box, pool):
    x_TBVD = settle(x_TBVD)
    options = {'families': families, 'box': box, 'pool': pool}
    width, hidden = params['gate'].shape
    by_cell = cell_half.fits(width, hidden, families, pool)
    if by_cell and use(by_cell, x_TBVD):
      return cell_half.apply(
        params, x_TBVD, **options, tiles=cell, interpret=interpret
      )
    if use(constraint_half.fits(width, hidden // len(families)), x_TBVD):
      return constraint_half.apply(
        params, x_TBVD, **options, tiles=constraint, interpret=interpret
      )
    return symmetric_block.constraint_half(params, x_TBVD, **options)

  return trm_block.Halves(
    token_program,
    channel_program,
    attention_program,
    constraint_program,
    settle,
  )


def on_one_hopper() -> bool:
  """Whether what is traced runs by itself on a GPU of the Hopper generation."""
  return on_one_device() and hopper.available()
