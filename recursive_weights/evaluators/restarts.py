"""Several noisy attempts at each example, and the one that looks best."""

import itertools

import jax

from recursive_weights import interfaces
from recursive_weights.evaluators import _average
from recursive_weights.interfaces import UserError
from recursive_weights.recursion import restarts


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  max_batches: int | None = None,
  counts: tuple[int, ...] = (1, 4, 16),
  noise: float = 0.3,
  steps: int = 16,
  shared: bool = False,
  select: str = 'halt',
) -> interfaces.Evaluator:
  """Means of `Task.loss` and its metrics of the attempt that is chosen.

  See `recursion.restarts`. The noise is a function of the key, the split and
  the batch; metrics are of the task, never used to choose.

  Args:
    objective: not used: the attempt's last step answers.
    batch_size: rows of a batch.
    splits: splits to measure.
    max_batches: see `accuracy`.
    counts: numbers of attempts, each measured anew.
    noise: standard deviation of what is added to the states.
    steps: of each attempt.
    shared: the attempts share `steps`, so that all counts cost the same.
    select: 'halt' or 'residual', how an attempt is chosen.

  Returns:
    An evaluator whose keys are `SPLIT/METRIC@restartsCOUNT`.

  Raises:
    UserError: the model is no recursion, or an argument is out of range.
  """
  del objective
  if model.recursion is None:
    raise UserError('restarts needs a model that is a recursion over depth')
  _average.check(task, splits, batch_size, max_batches)
  if not counts or min(counts) < 1:
    raise UserError(f'counts must be numbers > 0, got {counts}')
  if steps < 1:
    raise UserError(f'steps must be > 0, got {steps}')
  if shared and any(steps % count for count in counts):
    raise UserError(
      f'counts must divide steps = {steps} where they share them, got {counts}'
    )
  if noise < 0:
    raise UserError(f'noise must be >= 0, got {noise}')
  if select not in restarts.SELECTIONS:
    raise UserError(
      f'select must be one of {restarts.SELECTIONS}, got {select!r}'
    )

  def judge(params, batch, key, count):
    answer = restarts.restarts(
      model.recursion,
      params,
      batch['inputs'],
      key,
      count=count,
      noise=noise,
      steps=steps // count if shared else steps,
      select=select,
    )
    loss_B, metrics_B = task.loss(answer, batch)
    values = {'loss': loss_B, **metrics_B}
    return _average.masked_sums(values, batch['weight']), batch['weight'].sum()

  judge = jax.jit(judge, static_argnums=3)

  def evaluate(params, key):
    result = {}
    for number, split in enumerate(splits):
      for count in counts:
        keys = map(
          jax.random.fold_in,
          itertools.repeat(jax.random.fold_in(key, number)),
          itertools.count(),
        )
        means = _average.over_split(
          lambda batch, count=count, keys=keys: judge(
            params, batch, next(keys), count
          ),
          task,
          split,
          batch_size=batch_size,
          max_batches=max_batches,
        )
        result |= {
          f'{split}/{name}@restarts{count}': float(x)
          for name, x in means.items()
        }
    return result

  return evaluate
