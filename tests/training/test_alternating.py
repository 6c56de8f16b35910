"""Alternating steps in the loop: what they tell."""

import jax
import numpy as np
import pytest

from recursive_weights.tasks import question_answer
from recursive_weights.training import alternating


@pytest.mark.slow
@pytest.mark.parametrize('orthonormalise_every', [1, 0])
def test_a_step_tells_the_largest_multiplier(orthonormalise_every):
  task = question_answer.make(
    members=12, width=6, rank=2, train_questions=3, validation_questions=2
  )
  found = {}
  for sparsity in (0.0, 0.3):
    init, make_step = alternating.make(
      task,
      rank=2,
      identity=True,
      ridge=0.1,
      sparsity=sparsity,
      orthonormalise_every=orthonormalise_every,
    )
    state, step = init(0), jax.jit(make_step('data'))
    for index in range(5):
      state, metrics = step(state, task.batch('train', index, 4))
    slope_RDV, basis_RDV = state.opt_state[0], state.params['basis']
    cross_RR = np.einsum('rdv,sdv->rs', slope_RDV, basis_RDV)
    expected_RR = (cross_RR + cross_RR.T) / 2
    if not orthonormalise_every:
      expected_RR = np.diag(np.diag(expected_RR))
    expected = np.abs(expected_RR).max()
    np.testing.assert_allclose(
      metrics['multiplier'], expected, rtol=1e-3, atol=1e-6
    )
    found[sparsity] = float(metrics['multiplier'])
  # Without sparsity the constraints choose among equals.
  assert found[0.0] < 1e-5
  assert found[0.3] > 1e-3
