"""Spans and coefficients against SciPy's angles and NumPy's least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from recursive_weights.evaluators import recovery
from recursive_weights.interfaces import UserError
from recursive_weights.models import shared_basis
from recursive_weights.tasks import parity, planted_basis

E, D, R = 12, 4, 3


@pytest.fixture(scope='module', params=['gaussian', 'sparse'])
def task(request):
  return planted_basis.make(
    members=E, questions=2, width=D, rank=R, coefficients=request.param
  )


def evaluate(task, c_ER, basis_RDV):
  model = shared_basis.make(task.spec, rank=len(basis_RDV), identity=False)
  params = {'coefficients': c_ER, 'basis': basis_RDV}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  measure = recovery.make(model, task, None, batch_size=1)
  return measure(params, jax.random.key(0))


def test_a_task_tells_what_made_it(task):
  """Without noise its answers are those of the planted weights."""
  task = planted_basis.make(members=E, questions=2, width=D, rank=R, noise=0.0)
  w_EDV = np.einsum('er,rdv->edv', *task.planted.values())
  batch = task.batch('test', 0, 20)
  q_BD, a_BV = np.split(batch['inputs'], 2, -1)
  found_BV = np.einsum('bd,bdv->bv', q_BD, w_EDV[batch['targets']])
  np.testing.assert_allclose(found_BV, a_BV, atol=1e-5)


def test_another_basis_of_the_same_span_is_the_planted_one(task):
  draw = np.random.default_rng(0)
  turn_RR = draw.normal(size=(R, R)) + 2 * np.eye(R)
  c_ER, basis_RDV = task.planted['coefficients'], task.planted['basis']
  found = evaluate(
    task,
    c_ER @ np.linalg.inv(turn_RR),
    np.einsum('rs,sdv->rdv', turn_RR, basis_RDV),
  )
  assert list(found) == [
    *(f'recovery/cosine@{k}' for k in range(1, R + 1)),
    'recovery/least_cosine',
    'recovery/coefficients',
  ]
  assert found['recovery/least_cosine'] == pytest.approx(1, abs=1e-5)
  assert found['recovery/coefficients'] < 1e-9


@pytest.mark.parametrize('rank', [R - 1, R, R + 2])
def test_angles_are_scipys_and_coefficients_numpys(task, rank):
  draw = np.random.default_rng(rank)
  basis_RDV = draw.normal(size=(rank, D, D))
  basis_RDV[: R - 1] += 2 * task.planted['basis'][: R - 1]
  c_ER = draw.normal(size=(E, rank))
  found = evaluate(task, c_ER, basis_RDV)
  flat = basis_RDV.reshape(rank, -1).T
  truth = np.float64(task.planted['basis']).reshape(R, -1).T
  expected = np.sort(np.cos(subspace_angles(flat, truth)))[::-1]
  assert len(expected) == min(rank, R)
  for k, x in enumerate(expected, 1):
    assert found[f'recovery/cosine@{k}'] == pytest.approx(x, abs=1e-5)
  assert found['recovery/least_cosine'] == pytest.approx(expected[-1], abs=1e-5)
  on_ER = np.linalg.lstsq(truth, flat @ c_ER.T, rcond=None)[0].T
  planted_ER = task.planted['coefficients']
  off = np.sum((on_ER - planted_ER) ** 2) / np.sum(planted_ER**2)
  assert found['recovery/coefficients'] == pytest.approx(off, rel=1e-4)


def test_what_has_no_basis_is_told(task):
  model = shared_basis.make(task.spec, rank=R, identity=False)
  with pytest.raises(UserError, match='a task whose basis is known'):
    recovery.make(model, parity.make(), None, batch_size=1)
  for shapes in ({}, {'basis': jnp.zeros((R, D, D + 1))}):
    other = model._replace(init=lambda key, inputs, x=shapes: x)
    with pytest.raises(UserError, match=r'a basis of matrices \(4, 4\)'):
      recovery.make(other, task, None, batch_size=1)
