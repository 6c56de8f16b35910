"""Transposition: the way back from the way there."""

import jax.numpy as jnp

from recursive_weights.interfaces import Operator, UserError


def make(shape: tuple[int, ...] | None = None) -> Operator:
  """`W2 = W1^T`: the last two axes change places.

  Ties the weights of a decoder to its encoder's, as in autoencoders and in
  U-Nets whose blocks go down and up between the same widths.

  Args:
    shape: the derived shape, if it is to be checked; None for whatever comes.

  Parameters: none.
  Start: the transpose.
  Cost: none that a matrix product would notice.
  """

  def init(key, base):
    del key
    _check(base.shape, shape)
    return {}

  def apply(theta, base):
    del theta
    _check(base.shape, shape)
    return jnp.swapaxes(base, -1, -2)

  return Operator(init, apply)


def count(base_shape, shape=None) -> int:
  """Zero."""
  _check(base_shape, shape)
  return 0


def start(base, shape=None):
  """The transpose."""
  _check(base.shape, shape)
  return jnp.swapaxes(base, -1, -2)


def _check(base_shape, shape):
  if len(base_shape) < 2:
    raise UserError(
      f'transpose needs a base of rank >= 2, got shape {tuple(base_shape)}'
    )
  turned = (*base_shape[:-2], base_shape[-1], base_shape[-2])
  if shape is not None and tuple(shape) != turned:
    raise UserError(
      f'transpose of {tuple(base_shape)} is {turned}, not {tuple(shape)}'
    )
