"""Residual: the base plus a small correction computed from it."""

from typing import Literal

import jax
import jax.numpy as jnp

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator

Kind = Literal['low_rank', 'network']


def make(
  kind: Kind = 'low_rank', rank: int = 8, scale: float = 1.0
) -> Operator:
  """`W2 = W + scale delta(W)`, row by row.

  Args:
    kind: 'low_rank': `delta(W) = W A B` with A `[D, R]`, B `[R, D]`.
      'network': `delta` is a network D -> max(1, D // 4) -> D with GELU.
    rank: R of 'low_rank'.
    scale: fixed factor of the correction.

  Parameters: 'low_rank' `2 D R`; 'network' `2 D h + h + D`, h = max(1, D // 4).
  Start: W (B, or the last layer, is zero).
  Cost: O(F D R), or O(F D h). Bound to the width D, not to the rows.
  Source: examiner-ctm v5.3, delta of SpectralResidualOperator and delta_net of
    RecursiveWeightOperator; low rank as in LoRA (Hu et al. 2021).
  """
  matrix.one_of('kind', kind, ('low_rank', 'network'))
  matrix.positive(rank=rank)

  def init(key, base):
    _, columns = matrix.size(base.shape)
    if kind == 'network':
      return matrix.network_init(key, columns, _hidden(columns), columns)
    a_DR = jax.nn.initializers.lecun_normal()(key, (columns, rank))
    return {'a': a_DR, 'b': jnp.zeros((rank, columns))}

  def apply(theta, base):
    w_FD = matrix.view(base)
    if kind == 'network':
      delta_FD = matrix.network_apply(theta, w_FD)
    else:
      delta_FD = matrix.matmul(w_FD, theta['a'], theta['b'])
    return matrix.restore(w_FD + scale * delta_FD, base)

  return Operator(init, apply)


def count(
  base_shape, kind: Kind = 'low_rank', rank: int = 8, scale: float = 1.0
) -> int:
  """'low_rank' `2 D R`; 'network' `2 D h + h + D`, h = max(1, D // 4)."""
  del scale
  _, columns = matrix.size(base_shape)
  if kind == 'network':
    return matrix.network_count(columns, _hidden(columns), columns)
  return 2 * columns * rank


def _hidden(columns):
  return max(1, columns // 4)
