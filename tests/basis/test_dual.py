"""The fit through rows is the fit of the basis: same value, same minimum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import baselines, dual, lagrangian, solve
from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import fit as fit_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError

E, T, D, V, R, RIDGE = 9, 3, 6, 5, 2, 0.3


def problem(seed=0):
  draw = np.random.default_rng(seed)
  weight_ET = np.arange(T)[None] < draw.integers(1, T + 1, E)[:, None]
  weight_ET = weight_ET * draw.uniform(0.5, 2, (E, T))
  arrays = draw.normal(size=(E, T, D)), draw.normal(size=(E, T, V)), weight_ET
  clusters = clusters_lib.Clusters(
    *(jnp.asarray(x, jnp.float32) for x in arrays)
  )
  c_ER = np.linalg.qr(draw.normal(size=(E, R)))[0]
  return clusters, jnp.asarray(c_ER, jnp.float32)


def which(name, clusters):
  if name == 'plain':
    return objective_lib.make(ridge=RIDGE)
  similar_EE = objective_lib.answer_similarity(clusters)
  return objective_lib.make(
    ridge=RIDGE, similarity=0.2, similarity_EE=similar_EE
  )


both = pytest.mark.parametrize('name', ['plain', 'similar'])


@both
def test_the_reduced_value_is_that_of_the_best_basis(name):
  clusters, span_ER = problem()
  objective = which(name, clusters)
  table = dual.rows(objective, clusters)
  state = dual.begin(table, span_ER)
  found = state.found.objective
  c_ER, _ = dual.primal(clusters, table, state)
  rows, right = [], []
  for i in range(E):
    for t in range(T):
      root = float(clusters.weight_ET[i, t]) ** 0.5
      rows.append(np.kron(np.float64(c_ER[i]), clusters.q_ETD[i, t]) * root)
      right.append(np.float64(clusters.a_ETV[i, t]) * root)
  x, a = np.array(rows), np.array(right)
  c = np.float64(c_ER)
  penalty = RIDGE * c.T @ c
  if name == 'similar':
    penalty += 0.4 * c.T @ np.float64(objective.graph_EE) @ c
  penalty = np.kron(penalty, np.eye(D))
  g = np.linalg.solve(x.T @ x + penalty, x.T @ a)
  expected = np.sum((x @ g - a) ** 2) + np.sum(g * (penalty @ g))
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  # And what `primal` forms has that value.
  at = dual.primal(clusters, table, state)
  value = objective_lib.value(objective, clusters, *at)
  total = objective_lib.total_weight(clusters)
  np.testing.assert_allclose(value * total, expected, rtol=1e-4)


@both
def test_the_slope_is_that_of_autodiff_along_the_spans(name):
  clusters, span_ER = problem()
  table = dual.rows(which(name, clusters), clusters)
  slope_ER = dual.reduced(table, span_ER).gradient_ER

  def value(x_ER):
    return dual.reduced(table, jnp.linalg.qr(x_ER)[0]).objective

  np.testing.assert_allclose(slope_ER, jax.grad(value)(span_ER), atol=1e-3)
  assert jnp.abs(slope_ER).max() > 0.1


@both
def test_its_minimum_is_one_of_the_alternating_fit(name):
  clusters, _ = problem()
  objective = which(name, clusters)
  c_ER, basis_RDV, values_S = jax.jit(
    lambda c: dual.run(objective, c, R, steps=60, warm_ridge=1.0, warm_steps=5)
  )(clusters)
  assert np.all(np.diff(values_S) <= 0)
  value = objective_lib.value(objective, clusters, c_ER, basis_RDV)
  np.testing.assert_allclose(value, values_S[-1], rtol=1e-4)
  fit = fit_lib.make(objective)
  state = fit.init(clusters, basis_RDV)
  state, metrics = fit_lib.run(fit, clusters, state, steps=20)
  assert metrics['objective'][-1] > value * (1 - 2e-4)
  assert metrics['tangent'][0] < 5e-3
  np.testing.assert_allclose(
    jnp.einsum('rdv,sdv->rs', basis_RDV, basis_RDV), np.eye(R), atol=1e-4
  )


@pytest.mark.parametrize(
  'cosine', [0.5, pytest.param(0.9, marks=pytest.mark.long)]
)
def test_with_the_cosine_it_ends_where_autodiff_finds_no_slope(cosine):
  clusters, _ = problem()
  objective = objective_lib.make(ridge=RIDGE, cosine=cosine)
  c_ER, basis_RDV, values_S = jax.jit(
    lambda c: dual.run(objective, c, R, steps=150, warm_ridge=1.0)
  )(clusters)
  assert np.all(np.diff(values_S) <= 0)
  value = objective_lib.value(objective, clusters, c_ER, basis_RDV)
  np.testing.assert_allclose(value, values_S[-1], rtol=1e-4)
  found = lagrangian.multipliers(objective, clusters, c_ER, basis_RDV)
  assert lagrangian.tangent(objective, clusters, c_ER, found) < 5e-3
  # As low as the alternating fit comes from the same squared error's minimum.
  square = objective._replace(cosine=0.0)
  start = dual.run(square, clusters, R, steps=60, warm_ridge=1.0)[1]
  fit = fit_lib.make(objective)
  metrics = fit_lib.run(fit, clusters, fit.init(clusters, start), steps=40)[1]
  assert values_S[-1] < metrics['objective'][-1] * 1.002


def test_it_begins_where_it_is_told():
  clusters, span_ER = problem()
  objective = which('plain', clusters)
  c_ER, _, values_S = dual.run(objective, clusters, R, steps=60)
  # In any coordinates: a fit goes on where one has ended.
  c_ER = c_ER @ jnp.array([[2.0, 1.0], [0.0, 3.0]])
  again_S = dual.run(objective, clusters, R, steps=2, span_ER=c_ER)[2]
  np.testing.assert_allclose(again_S, values_S[-1], rtol=1e-4)
  # No step at all is the best basis of these coefficients.
  found = dual.run(objective, clusters, R, steps=0, span_ER=span_ER)
  value = objective_lib.value(objective, clusters, *found[:2])
  table = dual.rows(objective, clusters)
  reached = dual.reduced(table, span_ER).objective
  total = objective_lib.total_weight(clusters)
  np.testing.assert_allclose(value, reached / total, rtol=1e-4)
  assert values_S[-1] < value
  with pytest.raises(
    UserError, match=r'span_ER must be \(9, 2\), got \(2, 2\)'
  ):
    dual.run(objective, clusters, R, span_ER=c_ER[:2])


def test_the_start_is_that_of_the_members_own_solutions():
  clusters, _ = problem()
  table = dual.rows(which('plain', clusters), clusters)
  w_EDV = baselines.independent(clusters, ridge=0.7)
  gram_EE = jnp.einsum('edv,fdv->ef', w_EDV, w_EDV)
  expected_ER = np.linalg.eigh(np.float64(gram_EE))[1][:, ::-1][:, :R]
  found_ER = dual.initial(table, E, R, 0.7)
  np.testing.assert_allclose(
    found_ER @ found_ER.T, expected_ER @ expected_ER.T, atol=1e-4
  )


def test_padding_changes_nothing():
  clusters, _ = problem()
  run = lambda c: dual.run(which('plain', c), c, R, steps=8)  # noqa: E731
  c_ER, basis_RDV, values_S = run(clusters)
  more = run(clusters_lib.pad(clusters, E + 2, T + 1))
  np.testing.assert_allclose(more[2], values_S, rtol=1e-3)
  w_EDV = objective_lib.weights(c_ER, basis_RDV)
  found = objective_lib.weights(more[0], more[1])
  np.testing.assert_allclose(found[:E], w_EDV, atol=2e-2)
  np.testing.assert_allclose(found[E:], 0, atol=1e-5)


def test_coupled_members_without_questions_get_a_weight():
  clusters, _ = problem()
  empty = clusters._replace(weight_ET=clusters.weight_ET.at[0].set(0))
  objective = which('similar', clusters)
  c_ER, basis_RDV, _ = dual.run(objective, empty, R, steps=20)
  w_EDV = objective_lib.weights(c_ER, basis_RDV)
  # The weight of least penalty: the mean of those of its neighbours, shrunk.
  graph_EE = objective.graph_EE
  pull_EE = RIDGE * jnp.eye(E) + 0.4 * graph_EE
  rest = -jnp.einsum('e,edv->dv', pull_EE[0, 1:], w_EDV[1:]) / pull_EE[0, 0]
  np.testing.assert_allclose(w_EDV[0], rest, atol=1e-3)
  assert jnp.abs(w_EDV[0]).max() > 1e-3


def test_the_basis_through_rows_is_the_direct_one():
  clusters, c_ER = problem()
  draw = np.random.default_rng(3)
  basis_RDV = jnp.asarray(draw.normal(size=(R, D, V)), jnp.float32)
  similar = objective_lib.answer_similarity(clusters)
  for objective in (
    objective_lib.make(ridge=0.1),
    objective_lib.make(ridge=0.1, similarity=0.2, similarity_EE=similar),
  ):
    at = objective, clusters, c_ER, basis_RDV
    chex.assert_trees_all_close(
      solve.basis_dual(*at), solve.basis_direct(*at), atol=2e-3
    )


def test_bad_settings_are_told():
  clusters, _ = problem()
  for fields in ({'ridge': 0.0}, {'sparsity': 1.0}):
    with pytest.raises(UserError, match='needs ridge > 0 and sparsity 0'):
      dual.run(objective_lib.make(**fields), clusters, R)
  with pytest.raises(UserError, match='rank must be in 1'):
    dual.run(which('plain', clusters), clusters, E + 1)
