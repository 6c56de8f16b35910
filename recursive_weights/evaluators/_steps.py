"""What a model answers after each step, judged inside the recursion."""

from collections.abc import Callable

import jax

from recursive_weights.interfaces import Model, Task, UserError
from recursive_weights.recursion.unroll import unroll

_SAID = ('certainty', 'halt')  # what a model says of its answer, `[S, B]`


def judged(
  model: Model, task: Task, batch_size: int, steps: int, who: str
) -> Callable:
  """`(params, batch) -> {name: x_SB}`: loss, metrics, certainty, halt by step.

  With `steps` a model that is a recursion runs that many, however many it was
  trained with, and each answer is judged where it is made, so that no stack of
  logits is kept. Else the steps are those that `apply` makes.

  Args:
    batch_size: rows of a batch.
    steps: number of steps, 0 for the model's own.
    who: name of the evaluator, for errors.

  Raises:
    UserError: when run, there is no step axis, or there are too few steps.
  """

  def judge(outputs, batch):
    loss_B, metrics_B = task.loss(outputs['logits'], batch)
    said = {name: outputs[name] for name in _SAID if name in outputs}
    return {'loss': loss_B, **metrics_B, **said}

  def recursive(params, batch):
    recursion = model.recursion

    def step(weights, context, state, key):
      state, outputs = recursion.step(weights, context['inner'], state, key)
      return state, judge(outputs, context['batch'])

    weights = recursion.prepare(params)
    context = recursion.encode(weights, batch['inputs'], None)
    _, values = unroll(
      recursion._replace(step=step),
      weights,
      {'inner': context, 'batch': batch},
      recursion.start(weights, context),
      steps,
      hoist=False,
    )
    return values

  def run(params, batch):
    if steps and model.recursion is not None:
      return recursive(params, batch)
    outputs, _ = model.apply(
      params,
      model.carry(params, batch_size),
      batch['inputs'],
      key=None,
      train=False,
    )
    shape = outputs['logits'].shape
    wanted = 3 + len(task.spec.answer)
    if len(shape) != wanted:
      raise UserError(
        f'{who} needs logits with a step axis first (rank {wanted}), got shape '
        f'{shape}; use the accuracy evaluator'
      )
    if steps > shape[0]:
      raise UserError(
        f'steps must be <= {shape[0]}, the steps of the model, got {steps}'
      )
    by_step = {k: outputs[k] for k in ('logits', *_SAID) if k in outputs}
    return jax.vmap(lambda x: judge(x, batch))(by_step)

  return run
