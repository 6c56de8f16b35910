"""The measures of compression on curves whose answer is known."""

import jax.numpy as jnp
import numpy as np

from recursive_weights import compare
from recursive_weights.evaluators import compression


def test_curves_by_seed_or_alone():
  history = [
    {'step': 1, 'train/loss': 2.0},
    {'step': 2, 'validation/loss': 9.0},
    {'step': 3, 'train/loss': 1.0},
  ]
  np.testing.assert_array_equal(
    compression.curves(history, 'train/loss'), [[2.0, 1.0]]
  )
  history = [
    {'step': 1, 'm': 1.5, 'm/std': 0.7, 'm/seed0': 1.0, 'm/seed1': 2.0},
    {'step': 2, 'm': 3.5, 'm/std': 0.7, 'm/seed0': 3.0, 'm/seed1': 4.0},
  ]
  np.testing.assert_array_equal(
    compression.curves(history, 'm'), [[1.0, 3.0], [2.0, 4.0]]
  )


def test_final_and_steps_to_ninety_per_cent():
  steps_N = np.arange(1, 101)
  # Falls linearly from 10 to 0 over 50 steps, then stays.
  curve_N = np.maximum(0, 10 * (1 - (steps_N - 1) / 50))
  curve_EN = np.stack([curve_N, curve_N + 5])
  np.testing.assert_allclose(compression.final(curve_EN), [0, 5])
  found = compression.steps_to(steps_N, curve_EN)
  # 90 % of the fall is at step 46; the running mean of 5 lags by 2.
  np.testing.assert_allclose(found, 48, atol=1)  # rounding at the goal


def test_parameters_counts_elements():
  assert compression.parameters({'a': jnp.ones((2, 3)), 'b': jnp.ones(())}) == 7


def row(name, parameters, losses):
  return {
    'variant': name,
    'parameters': parameters,
    'final_loss': compare.mean_std(losses),
    'final_loss_by_seed': losses,
    'steps_to_90': (10.0, 1.0),
    'latency_ms': 2.0,
    'results': {'test/accuracy': 0.5, 'test/accuracy/std': 0.1},
  }


def test_gaps_are_paired_by_seed():
  rows = [row('a', 100, [1.0, 2.0]), row('b', 80, [1.1, 2.2])]
  for r in rows:
    r |= compare.against(r, rows[0])
  np.testing.assert_allclose(rows[1]['loss_gap_%'], (10.0, 0.0), atol=1e-9)
  np.testing.assert_allclose(rows[1]['parameters_%'], -20)
  text = compare.table(rows)
  assert '| b | 80 | -20.0 % |' in text
  assert '0.5000 ± 0.1000' in text
