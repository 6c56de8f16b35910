"""How many bases? By the root of the members, or by questions left out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.basis import dual
from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import Objective, predict
from recursive_weights.interfaces import Array, UserError


def square_root(members: int) -> int:
  """`K = √N`, the design's rule of thumb, at least 1.

  Raises:
    UserError: no members.
  """
  if members < 1:
    raise UserError(f'members must be > 0, got {members}')
  return max(round(members**0.5), 1)


def cross_validate(
  objective: Objective,
  clusters: Clusters,
  ranks: Sequence[int],
  key: Array,
  *,
  folds: int = 5,
  steps: int = 30,
) -> dict[int, float]:
  """Mean squared error of questions left out, by number of bases.

  A question is judged by a fit without its fold; where nothing else of its
  cluster is left it is not judged, since no coefficients are known. The best is
  `min(found, key=found.get)`.

  Args:
    objective, steps: see `dual.run`.
    ranks: numbers of bases to try.
    key: of the folds.
    folds: parts of the questions, each left out once.

  Raises:
    UserError: fewer than two folds, no cluster with two questions, or a rank
      that the data cannot hold.
  """
  if folds < 2:
    raise UserError(f'folds must be > 1, got {folds}')
  weight_ET = np.asarray(clusters.weight_ET)
  if not np.any((weight_ET > 0).sum(1) > 1):
    raise UserError(
      'questions left out need others of their cluster, got at most one '
      'question a cluster; take square_root instead'
    )
  # Folds in turn within a cluster, so that each has as many of it as can be.
  order_ET = jax.random.uniform(key, weight_ET.shape) + 2 * (weight_ET <= 0)
  place_ET = np.argsort(np.argsort(np.asarray(order_ET), axis=1), axis=1)
  shift_E = np.cumsum((weight_ET > 0).sum(1))
  fold_ET = (place_ET + shift_E[:, None]) % folds
  found = {}
  for rank in ranks:
    total = count = 0.0
    for fold in range(folds):
      out_ET = (fold_ET == fold) & (weight_ET > 0)
      kept_ET = jnp.asarray(np.where(out_ET, 0, weight_ET))
      c_ER, basis_RDV, _ = dual.run(
        objective, clusters._replace(weight_ET=kept_ET), rank, steps=steps
      )
      p_ETV = predict(clusters.q_ETD, c_ER, basis_RDV)
      square_ET = jnp.sum((p_ETV - clusters.a_ETV) ** 2, -1)
      judged_ET = out_ET & (kept_ET.sum(1, keepdims=True) > 0)
      total += float(jnp.sum(jnp.where(judged_ET, square_ET, 0)))
      count += float(judged_ET.sum())
    found[int(rank)] = total / count
  return found
