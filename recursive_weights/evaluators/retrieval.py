"""Where the right answer stands among all answers: Recall@k and MRR."""

import jax
import numpy as np

from recursive_weights import interfaces
from recursive_weights.basis.methods import ranks
from recursive_weights.evaluators import _average, _bootstrap
from recursive_weights.interfaces import UserError


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  max_batches: int | None = None,
  resamples: int = 2000,
) -> interfaces.Evaluator:
  """Recall@1, Recall@5 and mean reciprocal rank over whole splits.

  The rank of the right answer counts answers of at least its score, so a
  model that gives all answers one score finds nothing. Padding rows do not
  count. Intervals hold 95 % of the means of resampled questions.

  Args:
    batch_size: rows of a batch.
    splits: splits to measure.
    max_batches: largest number of batches of a split; None for whole splits.
    resamples: of the bootstrap; 0 for no intervals.

  Returns:
    An evaluator whose keys are `SPLIT/recall_1`, `SPLIT/recall_5`, `SPLIT/mrr`
    and `.../low` and `.../high` of each.

  Raises:
    UserError: a split is unknown, has no end or no examples, or a number is
      out of range.
  """
  _average.check(task, splits, batch_size, max_batches)
  if resamples < 0:
    raise UserError(f'resamples must be >= 0, got {resamples}')

  @jax.jit
  def judge(params, batch):
    carry = model.carry(params, batch_size)
    outputs, _ = model.apply(
      params, carry, batch['inputs'], key=None, train=False
    )
    return ranks(objective.answer(outputs), batch['targets'])

  def evaluate(params, key):
    del key  # the bootstrap's seed is fixed
    found = {}
    for split in splits:
      size = task.spec.sizes[split]
      batches = max_batches or 0
      if size is not None:
        whole = -(-size // batch_size)
        batches = min(whole, max_batches or whole)
      rows = [task.batch(split, i, batch_size) for i in range(batches)]
      rank_B = np.concatenate([judge(params, batch) for batch in rows])
      real_B = np.concatenate([batch['weight'] for batch in rows]) > 0
      for name, value_B in measures(rank_B[real_B]).items():
        found[f'{split}/{name}'] = float(value_B.mean())
        if resamples:
          low, high = _bootstrap.interval(value_B, resamples=resamples)
          found |= {f'{split}/{name}/low': low, f'{split}/{name}/high': high}
    return found

  return evaluate


def measures(rank_B: np.ndarray) -> dict[str, np.ndarray]:
  """Each question's share in Recall@1, Recall@5 and MRR; ranks from 1."""
  rank_B = np.asarray(rank_B, np.float64)
  return {
    'recall_1': (rank_B <= 1).astype(np.float64),
    'recall_5': (rank_B <= 5).astype(np.float64),
    'mrr': 1 / rank_B,
  }
