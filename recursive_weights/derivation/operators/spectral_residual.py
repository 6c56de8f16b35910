"""Spectral-residual: the document's recommended blend of two operators."""

from recursive_weights.derivation import compose
from recursive_weights.derivation.operators import residual, spectral
from recursive_weights.interfaces import Operator


def make(
  kind: spectral.Kind = 'mlp',
  rank: int = 8,
  degree: int = 3,
  delta_rank: int = 8,
  alpha: float = 0.7,
) -> Operator:
  """`W2 = alpha spectral(W) + (1 - alpha) (W + W A B)`, alpha learned.

  Args:
    kind: see `spectral.make`.
    rank: see `spectral.make`.
    degree: see `spectral.make`.
    delta_rank: rank R of the correction `W A B`.
    alpha: share of the spectral part at the start.

  Parameters: those of the spectral operator + `2 D R` + 1.
  Start: W, whatever alpha.
  Cost: one SVD and O(F D R). Bound to the width D by A and B.
  Source: examiner-ctm v5.3, SpectralResidualOperator. There the network did
    not start as the identity and the correction was dense, so T(W) was no
    start for W2, and T had more parameters than the weight that it replaced.
  """
  return compose.blend(
    spectral.make(kind, rank, degree),
    residual.make('low_rank', delta_rank),
    alpha,
  )


def count(
  base_shape,
  kind: spectral.Kind = 'mlp',
  rank: int = 8,
  degree: int = 3,
  delta_rank: int = 8,
  alpha: float = 0.7,
) -> int:
  """Spectral parameters + `2 D R` + 1."""
  del alpha
  low_rank = residual.count(base_shape, 'low_rank', delta_rank)
  return spectral.count(base_shape, kind, rank, degree) + low_rank + 1
