"""Objectives against loops over rows and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.recursion import objective

STEPS, BATCH, LENGTH, VALUES = 5, 4, 3, 2


def data():
  stream = np.random.default_rng(0)
  logits = stream.normal(size=(STEPS, BATCH, LENGTH, VALUES))
  outputs = {
    'logits': jnp.asarray(logits, jnp.float32),
    'certainty': jnp.asarray(stream.uniform(size=(STEPS, BATCH)), jnp.float32),
  }
  batch = {
    'targets': jnp.asarray(stream.integers(0, VALUES, (BATCH, LENGTH))),
    'weight': jnp.array([1.0, 1.0, 0.0, 1.0]),
  }
  return outputs, batch


def loss(logits_BTV, batch):
  log_p = jax.nn.log_softmax(logits_BTV)
  picked = jnp.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  right = jnp.argmax(logits_BTV, -1) == batch['targets']
  return -picked.mean(-1), {'accuracy': right.mean(-1, dtype=jnp.float32)}


def row(logits_TV, targets_T):
  logits_TV = np.asarray(logits_TV, np.float64)
  total, right = 0.0, 0
  for t, target in enumerate(targets_T):
    p = np.exp(logits_TV[t]) / np.exp(logits_TV[t]).sum()
    total -= np.log(p[target])
    right += np.argmax(logits_TV[t]) == target
  return total / len(targets_T), right / len(targets_T)


def looped(name):
  outputs, batch = data()
  losses, accuracies, steps, answers = [], [], [], []
  for b in range(BATCH):
    rows = [row(outputs['logits'][s, b], batch['targets'][b]) for s in range(5)]
    each = [x[0] for x in rows]
    sure = int(np.argmax(np.asarray(outputs['certainty'])[:, b]))
    chosen = sure if name == 'certainty' else STEPS - 1
    answers.append(outputs['logits'][chosen, b])
    if batch['weight'][b] == 0:
      continue
    losses.append(
      {
        'last': each[-1],
        'every': np.mean(each),
        'certainty': (min(each) + each[sure]) / 2,
      }[name]
    )
    accuracies.append(rows[chosen][1])
    steps.append(chosen + 1)
  return np.mean(losses), np.mean(accuracies), np.mean(steps), answers


@pytest.mark.parametrize('name', ['last', 'every', 'certainty'])
def test_objective_equals_loops(name):
  made = objective.make(name)
  outputs, batch = data()
  value, metrics = jax.jit(lambda o, b: made.score(o, loss, b))(outputs, batch)
  wanted, accuracy, step, answers = looped(name)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], accuracy, rtol=1e-6)
  np.testing.assert_array_equal(made.answer(outputs), np.stack(answers))
  if name == 'certainty':
    np.testing.assert_allclose(metrics['step'], step)


def test_certainty_trains_two_steps_of_a_row():
  made = objective.make('certainty')
  outputs, batch = data()
  gradient = jax.grad(
    lambda x: made.score({**outputs, 'logits': x}, loss, batch)[0]
  )(outputs['logits'])
  used_SB = np.abs(gradient).sum((2, 3)) > 0
  each_SB = np.stack([loss(x, batch)[0] for x in outputs['logits']])
  wanted_SB = np.zeros((STEPS, BATCH), bool)
  for b in (0, 1, 3):
    wanted_SB[np.argmin(each_SB[:, b]), b] = True
    wanted_SB[np.argmax(outputs['certainty'][:, b]), b] = True
  np.testing.assert_array_equal(used_SB, wanted_SB)


@pytest.mark.parametrize('name', ['last', 'every', 'certainty'])
def test_padding_rows_count_nothing(name):
  made = objective.make(name)
  outputs, batch = data()
  wanted = made.score(outputs, loss, batch)
  spoilt = outputs['logits'].at[:, 2].set(jnp.nan)
  found = made.score({**outputs, 'logits': spoilt}, loss, batch)
  np.testing.assert_allclose(found[0], wanted[0])
  for metric, x in wanted[1].items():
    np.testing.assert_allclose(found[1][metric], x)


def test_unknown_names_and_fields():
  with pytest.raises(UserError, match='first'):
    objective.make('first')
  with pytest.raises(UserError, match='last'):
    objective.make('last', steps=3)


def test_halting_judges_the_answer_of_the_last_step():
  """L + weight BCE(sigmoid(halt), right), rows of weight 0 left out."""
  outputs, batch = data()
  halt_SB = np.random.default_rng(1).normal(size=(STEPS, BATCH))
  outputs['halt'] = jnp.asarray(halt_SB, jnp.float32)

  def whole(logits, batch):
    loss_B, metrics_B = loss(logits, batch)
    return loss_B, metrics_B | {'whole': jnp.array([1.0, 0.0, 1.0, 0.0])}

  found = objective.make('halting', weight=0.3, whole='whole')
  value, metrics = found.score(outputs, whole, batch)
  answers, judged, right = [], [], [1.0, 0.0, 1.0, 0.0]
  for b in (0, 1, 3):
    answers.append(row(outputs['logits'][-1, b], batch['targets'][b])[0])
    p = 1 / (1 + np.exp(-halt_SB[-1, b]))
    judged.append(-np.log(p if right[b] else 1 - p))
  np.testing.assert_allclose(
    value, np.mean(answers) + 0.3 * np.mean(judged), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['answer_loss'], np.mean(answers), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['halting_loss'], np.mean(judged), rtol=1e-5
  )
  agree = [(halt_SB[-1, b] > 0) == (right[b] > 0) for b in (0, 1, 3)]
  np.testing.assert_allclose(metrics['halting_accuracy'], np.mean(agree))
  np.testing.assert_array_equal(found.answer(outputs), outputs['logits'][-1])
  with pytest.raises(UserError, match=r"\['accuracy', 'whole'\], got 'all'"):
    objective.make('halting', whole='all').score(outputs, whole, batch)
