"""How good the answer is after each step of a recursion."""

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
  steps: tuple[int, ...] = (),
) -> interfaces.Evaluator:
  """Means of `Task.loss` and its metrics by step, from one forward pass.

  Every step's logits `outputs['logits']` `[S, B, *answer, V]` are judged. Where
  the model reports `outputs['certainty']` `[S, B]`, so are the mean certainty
  and the answer of each row's most certain step (the first of equals).

  Args:
    objective: not used: every step is judged. All evaluators take the same
      arguments.
    batch_size: rows of a batch.
    splits: splits to measure.
    max_batches: largest number of batches of a split; None for whole splits.
    steps: steps to report, counted from 1; `()` for all that the model makes.
      A recursion runs as far as the last of them, also beyond its own steps.

  Returns:
    An evaluator whose keys are `SPLIT/METRIC@STEP`, with METRIC `loss`, those
    of the task, and `certainty`; and `SPLIT/METRIC@certain`.

  Raises:
    UserError: a split is unknown or has no end, or a number is not positive;
      when run, there is no step axis, or a step is beyond the last of a model
      that is no recursion.
  """
  del objective
  _average.check(task, splits, batch_size, max_batches)
  if any(step < 1 for step in steps):
    raise UserError(f'steps must be > 0, got {steps}')

  last = max(steps, default=0)
  by_step = _steps.judged(model, task, batch_size, last, 'depth_sweep')

  @jax.jit
  def judge(params, batch):
    values = by_step(params, batch)
    halt_SB = values.pop('halt', None)
    certainty_SB = values.pop('certainty', None)
    if certainty_SB is not None:
      # Of a halting head the logit, which does not round to 1.
      sure_SB = certainty_SB if halt_SB is None else halt_SB
      best_1B = sure_SB.argmax(axis=0)[None, :]
      values |= {
        f'{name}@certain': jnp.take_along_axis(x_SB, best_1B, axis=0)[0]
        for name, x_SB in values.items()
      }
      values['certainty'] = certainty_SB
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
    result = {}
    for name, mean in means.items():
      if mean.ndim == 0:
        result[name] = float(mean)
        continue
      for step in steps or range(1, len(mean) + 1):
        result[f'{name}@{step}'] = float(mean[step - 1])
    return result

  return evaluate
