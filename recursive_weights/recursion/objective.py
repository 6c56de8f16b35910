"""Which step's answer is trained, and which one answers.

Outputs of a recursion keep the step axis S first: `logits [S, B, *answer, V]`
and, where a recursion knows how sure it is, `certainty [S, B]`.
"""

import jax
import jax.numpy as jnp
import optax

from recursive_weights.interfaces import Objective, UserError


def make(name: str, **fields) -> Objective:
  """The objective of that name: last, every, certainty, halting.

  Raises:
    UserError: unknown name or field.
  """
  known = {
    'last': last,
    'every': every,
    'certainty': certainty,
    'halting': halting,
  }
  if name not in known:
    raise UserError(
      f'objective must be one of {", ".join(sorted(known))}, got {name!r}'
    )
  try:
    return known[name](**fields)
  except TypeError as error:
    raise UserError(f'objective {name}: {error}') from error


def last() -> Objective:
  """The last step's answer is trained and judged."""

  def answer(outputs):
    return outputs['logits'][-1]

  def score(outputs, loss, batch):
    loss_B, metrics_B = loss(answer(outputs), batch)
    return _mean(loss_B, batch), _means(metrics_B, batch)

  return Objective(score=score, answer=answer)


def every() -> Objective:
  """The mean over steps of the loss is trained, the last step answers."""

  def answer(outputs):
    return outputs['logits'][-1]

  def score(outputs, loss, batch):
    loss_SB, metrics_SB = _by_step(outputs, loss, batch)
    metrics_B = {name: x_SB[-1] for name, x_SB in metrics_SB.items()}
    return _mean(loss_SB.mean(0), batch), _means(metrics_B, batch)

  return Objective(score=score, answer=answer)


def certainty() -> Objective:
  """The loss of the Continuous Thought Machine; the surest step answers.

  For each example, with L_s the loss and c_s the certainty of step s,

    L = (L_a + L_b) / 2,  a = argmin_s L_s,  b = argmax_s c_s.

  The first of equal steps counts. Metrics are those of step b, and its number
  `step`, counted from 1.

  Source: L. Darlow et al., Continuous Thought Machines, 2025 (arXiv
  2505.05522), section 3.5.
  """

  def surest(outputs):
    return jnp.argmax(outputs['certainty'], axis=0)

  def answer(outputs):
    return _pick(outputs['logits'], surest(outputs))

  def score(outputs, loss, batch):
    loss_SB, metrics_SB = _by_step(outputs, loss, batch)
    best_B, sure_B = jnp.argmin(loss_SB, axis=0), surest(outputs)
    loss_B = (_pick(loss_SB, best_B) + _pick(loss_SB, sure_B)) / 2
    metrics_B = {name: _pick(x, sure_B) for name, x in metrics_SB.items()}
    metrics_B['step'] = (sure_B + 1).astype(jnp.float32)
    return _mean(loss_B, batch), _means(metrics_B, batch)

  return Objective(score=score, answer=answer)


def halting(
  *, weight: float = 0.5, whole: str = 'puzzle_accuracy'
) -> Objective:
  """The last step's answer, and the halting head's judgement of it.

    L = L_answer + weight BCE(sigmoid(halt), [the whole answer is right])

  for each example, with `halt [S, B]` the logit that the model gives. Metrics
  are the task's, `answer_loss`, `halting_loss`, and `halting_accuracy`: how
  often halt > 0 tells whether the answer is right.

  Args:
    weight: of the halting head's loss.
    whole: the task's metric that is 1 where the whole answer is right, else 0.

  Source: A. Jolicoeur-Martineau, 2025 (arXiv 2510.04871), section 4.6.

  Raises:
    UserError: the weight is negative; when run, the task has no such metric.
  """
  if weight < 0:
    raise UserError(f'objective.weight must be >= 0, got {weight}')

  def answer(outputs):
    return outputs['logits'][-1]

  def score(outputs, loss, batch):
    loss_B, metrics_B = loss(answer(outputs), batch)
    if whole not in metrics_B:
      raise UserError(
        f'objective.whole must be one of the metrics of the task, '
        f'{sorted(metrics_B)}, got {whole!r}'
      )
    halt_B = outputs['halt'][-1].astype(jnp.float32)
    right_B = jax.lax.stop_gradient(metrics_B[whole].astype(jnp.float32))
    halting_B = optax.sigmoid_binary_cross_entropy(halt_B, right_B)
    metrics_B = metrics_B | {
      'answer_loss': loss_B,
      'halting_loss': halting_B,
      'halting_accuracy': (halt_B > 0) == (right_B > 0.5),
    }
    total_B = loss_B.astype(jnp.float32) + weight * halting_B
    return _mean(total_B, batch), _means(metrics_B, batch)

  return Objective(score=score, answer=answer)


def _by_step(outputs, loss, batch):
  return jax.vmap(lambda answer: loss(answer, batch))(outputs['logits'])


def _pick(x_SB, step_B):
  """Row b of step `step_B[b]`; further axes are kept."""
  index = step_B.reshape((1, -1) + (1,) * (x_SB.ndim - 2))
  return jnp.take_along_axis(x_SB, index, axis=0)[0]


def _mean(x_B, batch):
  """Mean over rows by weight; rows of weight 0 count nothing, even if NaN."""
  weight_B = batch['weight'].astype(jnp.float32)
  x_B = jnp.where(weight_B > 0, x_B.astype(jnp.float32), 0.0)
  return (x_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1e-9)


def _means(metrics_B, batch):
  return {name: _mean(x_B, batch) for name, x_B in metrics_B.items()}
