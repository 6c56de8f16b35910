"""What leaving a recursion early saves, and what it costs in answers."""

import time

import jax
import numpy as np

from recursive_weights import interfaces
from recursive_weights.evaluators import _average
from recursive_weights.interfaces import UserError
from recursive_weights.recursion import halting

_NEVER = float('inf')


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  thresholds: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99),
  chunk: int = 4,
  metric: str = 'accuracy',
  rule: str = 'certain',
  max_batches: int | None = None,
) -> interfaces.Evaluator:
  """Accuracy, steps and wall clock with rows that stop when certain.

  See `halting.early_exit`. A threshold is chosen on the validation split: the
  lowest at which the metric is no lower there than that of all steps, or none
  (nothing stops early) if all are worse. So the saving on other splits is one
  at equal accuracy, chosen without looking at them.

  Args:
    objective: its answer is that of all steps.
    batch_size: rows of a batch.
    splits: splits to measure.
    thresholds: of the certainty.
    chunk: steps between two looks at the certainty.
    metric: of the task, larger is better.
    rule: 'certain' where the surest step answers, 'last' where the last does.
    max_batches: see `accuracy`.

  Returns:
    An evaluator with the keys, of every split, `SPLIT/METRIC@all`,
    `SPLIT/METRIC@THRESHOLD` and `SPLIT/steps@THRESHOLD` (mean steps of a row)
    for each threshold, `SPLIT/threshold` (the chosen one, inf for none),
    `SPLIT/METRIC@chosen`, `SPLIT/steps@chosen`, and the seconds that the
    split's answers take, compiled before and the faster of two passes:
    `time/SPLIT/all`, `time/SPLIT/chosen`, `time/SPLIT/saved` (the share).

  Raises:
    UserError: the model is no recursion, or an argument is out of range.
  """
  if model.recursion is None:
    raise UserError('early_exit needs a model that is a recursion over depth')
  if not thresholds:
    raise UserError('thresholds must name at least one, got ()')
  if rule not in ('certain', 'last'):
    raise UserError(f"rule must be 'certain' or 'last', got {rule!r}")
  _average.check(task, ('validation', *splits), batch_size, max_batches)
  limits = {'batch_size': batch_size, 'max_batches': max_batches}

  @jax.jit
  def all_steps(params, inputs):
    carry = model.carry(params, batch_size)
    outputs, _ = model.apply(params, carry, inputs, key=None, train=False)
    return objective.answer(outputs)

  @jax.jit
  def judge(answer, steps_B, batch):
    _, metrics_B = task.loss(answer, batch)
    if metric not in metrics_B:
      raise UserError(
        f'metric must be one of {sorted(metrics_B)}, got {metric!r}'
      )
    values = {metric: metrics_B[metric], 'steps': steps_B}
    return _average.masked_sums(values, batch['weight']), batch['weight'].sum()

  def evaluate(params, key):
    del key  # nothing here is random
    inputs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype),
      task.spec.inputs,
    )
    outputs, _ = jax.eval_shape(
      lambda p, x: model.apply(
        p, model.carry(p, batch_size), x, key=None, train=False
      ),
      params,
      inputs,
    )
    total = outputs['certainty'].shape[0]
    leave = halting.early_exit(
      model.recursion, max_steps=total, chunk=chunk, rule=rule
    )
    every_B = np.full(batch_size, total, np.int32)

    def answer(inputs, threshold):
      if threshold is None:
        return np.asarray(all_steps(params, inputs)), every_B
      return leave(params, inputs, threshold)

    def means(split, threshold):
      def of_batch(batch):
        found, steps_B = answer(batch['inputs'], threshold)
        return judge(found, steps_B, batch)

      return _average.over_split(of_batch, task, split, **limits)

    def seconds(split, threshold):
      spent = [0.0, 0.0]

      def of_batch(batch, turn):
        started = time.perf_counter()
        found, steps_B = answer(batch['inputs'], threshold)
        spent[turn] += time.perf_counter() - started
        return judge(found, steps_B, batch)

      for turn in range(2):
        _average.over_split(
          lambda batch, turn=turn: of_batch(batch, turn), task, split, **limits
        )
      return min(spent)

    bar = means('validation', None)[metric]
    chosen = _NEVER
    for threshold in sorted(thresholds):
      if means('validation', threshold)[metric] >= bar:
        chosen = threshold
        break

    result = {}
    for split in splits:
      result[f'{split}/{metric}@all'] = float(means(split, None)[metric])
      result[f'{split}/threshold'] = float(chosen)
      named = {f'{x:g}': x for x in thresholds} | {'chosen': chosen}
      for name, threshold in named.items():
        values = means(split, threshold)
        result[f'{split}/{metric}@{name}'] = float(values[metric])
        result[f'{split}/steps@{name}'] = float(values['steps'])
      full, early = seconds(split, None), seconds(split, chosen)
      result[f'time/{split}/all'] = full
      result[f'time/{split}/chosen'] = early
      result[f'time/{split}/saved'] = 1 - early / full
    return result

  return evaluate
