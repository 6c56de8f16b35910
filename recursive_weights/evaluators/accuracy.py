"""How good the answer is: the loss and every metric of the task, by split."""

import jax

from recursive_weights import interfaces
from recursive_weights.evaluators import _average


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  max_batches: int | None = None,
) -> interfaces.Evaluator:
  """Means of `Task.loss` and its metrics over whole splits.

  `mean = sum_b weight_b value_b / sum_b weight_b`, so padding rows do not
  count. The answer is `objective.answer(outputs)`; the model runs without
  noise and from a fresh carry. Parameters may be sharded or not.

  Args:
    batch_size: rows of a batch.
    splits: splits to measure.
    max_batches: largest number of batches of a split; None for whole splits,
      which a split without end does not have.

  Returns:
    An evaluator whose keys are `SPLIT/loss` and `SPLIT/METRIC`.

  Raises:
    UserError: a split is unknown or has no end, or a number is not positive.
  """
  _average.check(task, splits, batch_size, max_batches)

  @jax.jit
  def judge(params, batch):
    carry = model.carry(params, batch_size)
    outputs, _ = model.apply(
      params, carry, batch['inputs'], key=None, train=False
    )
    loss_B, metrics_B = task.loss(objective.answer(outputs), batch)
    values = {'loss': loss_B, **metrics_B}
    return _average.masked_sums(values, batch['weight']), batch['weight'].sum()

  def evaluate(params, key):
    del key  # nothing here is random
    means = _average.by_split(
      lambda batch: judge(params, batch),
      task,
      splits,
      batch_size=batch_size,
      max_batches=max_batches,
    )
    return {name: float(mean) for name, mean in means.items()}

  return evaluate
