"""Offset: a weight of its own beside the base, for small leaves."""

import math

import jax.numpy as jnp

from recursive_weights.interfaces import Operator


def make() -> Operator:
  """`W2 = W + D` with D of the shape of W.

  Parameters: those of W. It saves nothing; it is for leaves that many members
    derive from one, where each may have its own, such as biases.
  Start: W (D is zero).
  Cost: O(size of W).
  Source: examiner-ctm v5.3, whose specialists have biases of their own.
  """

  def init(key, base):
    del key
    return {'offset': jnp.zeros(base.shape)}

  def apply(theta, base):
    dtype = jnp.promote_types(base.dtype, jnp.float32)
    return (base.astype(dtype) + theta['offset']).astype(base.dtype)

  return Operator(init, apply)


def count(base_shape) -> int:
  """The size of the base."""
  return math.prod(base_shape)
