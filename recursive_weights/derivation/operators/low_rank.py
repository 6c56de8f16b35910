"""Low rank: an adapter beside the base, which does not look at it."""

import jax
import jax.numpy as jnp

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator


def make(rank: int = 8) -> Operator:
  """`W2 = W + A B` with A `[F, R]`, B `[R, D]`.

  Unlike `residual` the correction is learnt from nothing: it does not turn or
  scale what W already does.

  Args:
    rank: R.

  Parameters: `R (F + D)`.
  Start: W (B is zero).
  Cost: O(F D R). Bound to the shape of the matrix view.
  Source: E. Hu et al., LoRA, 2021 (arXiv 2106.09685).
  """
  matrix.positive(rank=rank)

  def init(key, base):
    rows, columns = matrix.size(base.shape)
    a_FR = jax.nn.initializers.lecun_normal()(key, (rows, rank))
    return {'a': a_FR, 'b': jnp.zeros((rank, columns))}

  def apply(theta, base):
    delta_FD = matrix.matmul(theta['a'], theta['b'])
    return matrix.restore(matrix.view(base) + delta_FD, base)

  return Operator(init, apply)


def count(base_shape, rank: int = 8) -> int:
  """`R (F + D)`."""
  return rank * sum(matrix.size(base_shape))
