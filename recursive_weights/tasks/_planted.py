"""Clusters whose members' weights are known to share a basis."""

from typing import Literal, NamedTuple

import numpy as np

Coefficients = Literal['gaussian', 'sparse']


class Planted(NamedTuple):
  """A problem and what made it, float64.

  q_ETD, a_ETD: training questions and their answers, with noise.
  test_ETD: questions held out.
  coefficients_ER, basis_RDV, w_EDV: of the truth.
  """

  q_ETD: np.ndarray
  a_ETD: np.ndarray
  test_ETD: np.ndarray
  coefficients_ER: np.ndarray
  basis_RDV: np.ndarray
  w_EDV: np.ndarray


def planted(
  seed: int,
  *,
  members: int = 40,
  questions: int = 4,
  width: int = 32,
  rank: int = 4,
  noise: float = 0.05,
  test: int = 50,
  coefficients: Coefficients = 'gaussian',
  density: float = 0.5,
) -> Planted:
  """`a = q Σ_k c_ik O_k + noise`, O_k random orthogonal matrices.

  Args:
    noise: standard deviation of an entry of the answers; questions have 1.
    coefficients: standard normal, or 'sparse': each kept with probability
      `density`, at least one a member.

  A basis can be told from `members · questions > 1.25 rank · width` questions.

  Raises:
    ValueError: an unknown kind of coefficients.
  """
  if coefficients not in ('gaussian', 'sparse'):
    raise ValueError(
      f"coefficients must be 'gaussian' or 'sparse', got {coefficients!r}"
    )
  draw = np.random.default_rng(np.random.SeedSequence((seed, 7203)))
  basis_RDV = np.linalg.qr(draw.normal(size=(rank, width, width)))[0]
  c_ER = draw.normal(size=(members, rank))
  if coefficients == 'sparse':
    keep_ER = draw.random((members, rank)) < density
    keep_ER[np.arange(members), draw.integers(rank, size=members)] = True
    c_ER = c_ER * keep_ER
  w_EDV = np.einsum('er,rdv->edv', c_ER, basis_RDV)
  q_ETD = draw.normal(size=(members, questions, width))
  a_ETD = q_ETD @ w_EDV + noise * draw.normal(size=q_ETD.shape)
  test_ETD = draw.normal(size=(members, test, width))
  return Planted(q_ETD, a_ETD, test_ETD, c_ER, basis_RDV, w_EDV)


def relative_error(planted: Planted, w_EDV: np.ndarray) -> float:
  """`Σ |q W - q Ŵ|² / Σ |q W|²` over the questions held out."""
  truth = planted.test_ETD @ planted.w_EDV
  found = planted.test_ETD @ np.asarray(w_EDV, np.float64)
  return float(np.sum((truth - found) ** 2) / np.sum(truth**2))
