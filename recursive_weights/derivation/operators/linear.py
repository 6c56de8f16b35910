"""Linear: a bottleneck network that sees all of the base at once."""

import math

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator


def make(bottleneck: int = 32) -> Operator:
  """`W2 = W + up(gelu(down(flatten W)))`.

  Args:
    bottleneck: width of the hidden layer, b.

  Parameters: `2 N b + b + N` for a base of N weights: more than the weights
    that it derives, whatever b. It pays only when several leaves share it.
  Start: W (the last layer is zero).
  Cost: O(N b). Bound to the shape of the base.
  Source: examiner-ctm v5.3, LinearOperator; the residual is ours.
  """
  matrix.positive(bottleneck=bottleneck)

  def init(key, base):
    size = math.prod(base.shape)
    return matrix.network_init(key, size, bottleneck, size)

  def apply(theta, base):
    w_FD = matrix.view(base)
    delta = matrix.network_apply(theta, w_FD.reshape(1, -1))
    return matrix.restore(w_FD + delta.reshape(w_FD.shape), base)

  return Operator(init, apply)


def count(base_shape, bottleneck: int = 32) -> int:
  """`2 N b + b + N`."""
  size = math.prod(base_shape)
  return matrix.network_count(size, bottleneck, size)
