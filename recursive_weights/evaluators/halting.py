"""How well a model knows when it is done."""

import jax
import jax.numpy as jnp

from recursive_weights import interfaces
from recursive_weights.evaluators import _average, _steps
from recursive_weights.interfaces import UserError


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  max_batches: int | None = None,
  steps: int = 0,
  metric: str = 'puzzle_accuracy',
) -> interfaces.Evaluator:
  """The halting head's judgement of the answers, step by step.

  A row halts at its first step with `halt > 0` (`outputs['halt']` `[S, B]`),
  and after the last step in any case.

  Args:
    objective: not used: every step is judged.
    batch_size: rows of a batch.
    splits: splits to measure.
    max_batches: see `accuracy`.
    steps: number of steps, 0 for the model's own.
    metric: of the task, 1 where the whole answer is right.

  Returns:
    An evaluator with the keys, of every split:
      `SPLIT/halting_accuracy`: how often halt > 0 tells whether the answer is
        right, over rows and steps.
      `SPLIT/halted`: share of rows that halt before the steps are over, or by
        the head at the last one.
      `SPLIT/halted_wrong`: share of rows that halt so, with a wrong answer.
      `SPLIT/halting_steps`: mean steps of a row until it halts.
      `SPLIT/METRIC@halted`: the metric where rows halt.

  Raises:
    UserError: a split is unknown or has no end, or a number is not positive;
      when run, the model has no halting head or the task no such metric.
  """
  del objective
  _average.check(task, splits, batch_size, max_batches)
  if steps < 0:
    raise UserError(f'steps must be >= 0, got {steps}')
  by_step = _steps.judged(model, task, batch_size, steps, 'halting')

  @jax.jit
  def judge(params, batch):
    values = by_step(params, batch)
    if 'halt' not in values:
      raise UserError('halting needs a model with a halting head')
    if metric not in values:
      known = sorted(set(values) - {'loss', 'halt', 'certainty'})
      raise UserError(f'metric must be one of {known}, got {metric!r}')
    stop_SB, right_SB = values['halt'] > 0, values[metric]
    halted_B = stop_SB.any(axis=0)
    last_B = jnp.where(halted_B, stop_SB.argmax(axis=0), len(stop_SB) - 1)
    right_B = jnp.take_along_axis(right_SB, last_B[None], axis=0)[0]
    found = {
      'halting_accuracy': (stop_SB == (right_SB > 0.5)).mean(axis=0),
      'halted': halted_B,
      'halted_wrong': halted_B & (right_B <= 0.5),
      'halting_steps': last_B + 1,
      f'{metric}@halted': right_B,
    }
    return _average.masked_sums(found, batch['weight']), batch['weight'].sum()

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
