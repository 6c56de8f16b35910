"""Each half of the fit solves its own problem."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import baselines, initial, solve, subspace
from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import objective as objective_lib

E, T, D, V, R = 12, 4, 5, 6, 3


def problem(seed=0):
  draw = np.random.default_rng(seed)
  weight_ET = np.arange(T)[None] < draw.integers(2, T + 1, E)[:, None]
  arrays = (
    draw.normal(size=(E, T, D)) * weight_ET[..., None],
    draw.normal(size=(E, T, V)) * weight_ET[..., None],
    weight_ET,
    draw.normal(size=(E, R)),
    draw.normal(size=(R, D, V)),
  )
  q, a, w, c, g = (jnp.asarray(x, jnp.float32) for x in arrays)
  return clusters_lib.Clusters(q, a, w), c, g


def similar(clusters, **fields):
  return objective_lib.make(
    similarity=0.2,
    similarity_EE=objective_lib.answer_similarity(clusters),
    **fields,
  )


def test_coefficients_are_numpys_ridge():
  clusters, c_ER, basis_RDV = problem()
  objective = objective_lib.make(ridge=0.1)
  found = solve.coefficients(objective, clusters, c_ER, basis_RDV)
  g = np.float64(basis_RDV)
  gram = np.einsum('rdv,sdv->rs', g, g)
  for i in range(E):
    n = int(clusters.weight_ET[i].sum())
    q, a = (np.float64(x[i, :n]) for x in clusters[:2])
    p = np.stack([(q @ g[k]).ravel() for k in range(R)], 1)
    expected = np.linalg.solve(p.T @ p + 0.1 * gram, p.T @ a.ravel())
    np.testing.assert_allclose(found[i], expected, atol=2e-4)


def test_the_basis_is_numpys_least_squares():
  clusters, c_ER, basis_RDV = problem()
  objective = similar(clusters, ridge=0.1)
  found = basis_RDV + solve.basis_direct(objective, clusters, c_ER, basis_RDV)
  c, graph = np.float64(c_ER), np.float64(objective.graph_EE)
  q, a, w = (np.float64(x) for x in clusters)
  rows, right = [], []
  for i in range(E):
    for t in range(int(w[i].sum())):
      rows.append(np.kron(c[i], q[i, t]))
      right.append(a[i, t])
  rows, right = np.array(rows), np.array(right)
  penalty = 0.1 * c.T @ c + 0.4 * c.T @ graph @ c
  system = rows.T @ rows + np.kron(penalty, np.eye(D))
  expected = np.linalg.solve(system, rows.T @ right).reshape(R, D, V)
  np.testing.assert_allclose(found, expected, atol=5e-4)


def test_direct_equals_conjugate_gradients():
  clusters, c_ER, basis_RDV = problem()
  for objective in (
    objective_lib.make(ridge=0.01),
    similar(clusters, ridge=0.1),
  ):
    arguments = objective, clusters, c_ER, basis_RDV
    chex.assert_trees_all_close(
      solve.basis_cg(*arguments, iterations=200),
      solve.basis_direct(*arguments),
      atol=1e-3,
    )


def test_solved_coefficients_are_stationary():
  clusters, c_ER, basis_RDV = problem()
  # As a fit starts: from where some row points backwards, the angle is slow.
  square = objective_lib.make()
  c_ER = 0.7 * solve.coefficients(square, clusters, c_ER, basis_RDV)
  c_ER += 0.1
  for objective, sweeps, near in (
    (similar(clusters, ridge=0.1), 1, 2e-3),
    # Lengths are judged by float32 values, flat to the root of their rounding.
    (objective_lib.make(cosine=0.5), 40, 2e-3),
    (objective_lib.make(cosine=1.0, ridge=0.0), 40, 2e-3),
  ):
    before = objective_lib.value(objective, clusters, c_ER, basis_RDV)
    found = solve.coefficients(
      objective, clusters, c_ER, basis_RDV, sweeps=sweeps
    )
    slope = objective_lib.gradients(objective, clusters, found, basis_RDV)[0]
    np.testing.assert_allclose(slope, 0.0, atol=near)
    assert objective_lib.value(objective, clusters, found, basis_RDV) < before


def test_sparsity_sets_coefficients_to_zero_and_is_optimal():
  clusters, c_ER, basis_RDV = problem()
  objective = objective_lib.make(ridge=0.0, sparsity=20.0)
  found = solve.coefficients(
    objective, clusters, c_ER, basis_RDV, iterations=2000
  )
  zero = np.asarray(found) == 0
  assert 0.2 < zero.mean() < 0.9
  slope = objective_lib.gradients(objective, clusters, found, basis_RDV)[0]
  slope = np.asarray(slope * objective_lib.total_weight(clusters))
  assert np.all(np.abs(slope[zero]) <= 20.0 + 1e-3)
  expected = -20.0 * np.sign(np.asarray(found)[~zero])
  np.testing.assert_allclose(slope[~zero], expected, atol=5e-2)


def test_orthonormalisation_keeps_the_span_and_finds_dependence():
  _, _, basis_RDV = problem()
  found = subspace.orthonormalise(basis_RDV)
  np.testing.assert_allclose(subspace.inner(found, found), np.eye(R), atol=1e-5)
  np.testing.assert_allclose(subspace.cosines(found, basis_RDV), 1, atol=1e-5)
  twin = basis_RDV.at[2].set(basis_RDV[0] * (1 + 1e-7))
  gram_RR = subspace.inner(*(subspace.orthonormalise(twin),) * 2)
  np.testing.assert_allclose(jnp.trace(gram_RR), 2.0, atol=1e-4)
  np.testing.assert_allclose(gram_RR @ gram_RR, gram_RR, atol=1e-4)


def test_leading_directions_are_those_of_the_svd():
  clusters, _, _ = problem()
  stack = np.asarray(baselines.independent(clusters, ridge=1.0), np.float64)
  stack = stack.reshape(E, -1)
  best = np.linalg.svd(stack)[2][:R]
  found = initial.from_ridge(clusters, R, jax.random.key(0)).reshape(R, -1)
  np.testing.assert_allclose(found @ found.T, np.eye(R), atol=1e-5)
  kept = np.sum((stack @ np.float64(found).T) ** 2)
  assert kept > 0.999 * np.sum((stack @ best.T) ** 2)


def test_gradients_vanish_at_the_pseudo_inverse():
  clusters, _, _ = problem()
  square = objective_lib.make(ridge=0.0)
  norm = initial.gradient_norm
  assert float(norm(square, clusters, ridge=0.0).max()) < 1e-5
  assert float(norm(square, clusters, ridge=1.0).min()) > 1e-2
  np.testing.assert_allclose(norm(square, clusters), 1.0, atol=1e-6)


def test_initial_bases_are_orthonormal_for_every_choice():
  clusters, _, _ = problem()
  key = jax.random.key(0)
  square = objective_lib.make()
  found = [initial.random(key, R, D, V)] + [
    initial.from_gradients(square, clusters, R, key, choice=choice)
    for choice in ('all', 'first', 'most', 'random')
  ]
  for basis_RDV in found:
    gram_RR = subspace.inner(basis_RDV, basis_RDV)
    np.testing.assert_allclose(gram_RR, np.eye(R), atol=1e-4)
  first_RDV = jnp.einsum('rtd,rtv->rdv', clusters.q_ETD[:R], clusters.a_ETV[:R])
  angles = subspace.cosines(found[2], first_RDV)
  np.testing.assert_allclose(angles, 1.0, atol=1e-4)


@pytest.mark.parametrize('cosine', [0.0, 0.5])
def test_members_in_blocks_are_members_at_once(monkeypatch, cosine):
  clusters, c_ER, basis_RDV = problem()
  objective = objective_lib.make(ridge=0.1, cosine=cosine)

  def everything():
    value, slopes = jax.value_and_grad(objective_lib.smooth, argnums=(2, 3))(
      objective, clusters, c_ER, basis_RDV
    )
    p_ETV = objective_lib.predict(clusters.q_ETD, c_ER, basis_RDV)
    found = (
      value,
      slopes,
      objective_lib.basis_slope(objective, clusters, p_ETV, c_ER, basis_RDV),
      solve.solved(objective, clusters, c_ER, basis_RDV, sweeps=2),
      subspace.leading(
        clusters.q_ETD, clusters.a_ETV, R, jax.random.key(0), passes=3
      ),
    )
    square = objective._replace(cosine=0.0), clusters, c_ER, basis_RDV
    return found, solve.basis_direct(*square), solve.basis_cg(*square)

  whole = jax.jit(everything)()
  # Slopes are those of autodiff.
  chex.assert_trees_all_close(whole[0][2], whole[0][1][1], atol=1e-5)
  at = objective, clusters, whole[0][3].coefficients_ER, basis_RDV
  chex.assert_trees_all_close(
    whole[0][3].slope_ER, objective_lib.gradients(*at)[0], atol=1e-5
  )
  # Four blocks of three members.
  monkeypatch.setattr(clusters_lib, '_AT_ONCE', 3 * R * T * V)
  blocks = clusters_lib.blocks(clusters, R * T * V)
  assert blocks.q_ETD.shape == (4, 3, T, D)
  chex.assert_trees_all_close(jax.jit(everything)(), whole, atol=2e-3)


def test_coordinates_undo_a_change_of_basis_and_tell_another_basis():
  _, c_ER, basis_RDV = problem()
  draw = np.random.default_rng(1)
  change_RR = draw.normal(size=(R, R)) + 3 * np.eye(R)
  mixed_RDV = jnp.einsum('rs,sdv->rdv', change_RR, basis_RDV)
  mixed_ER = np.asarray(c_ER) @ np.linalg.inv(change_RR)
  found = subspace.coordinates(mixed_ER, mixed_RDV, basis_RDV)
  np.testing.assert_allclose(found, c_ER, atol=1e-5)

  def error(basis_RDV, onto_RDV):
    found_ER = subspace.coordinates(c_ER, basis_RDV, onto_RDV)
    return float(jnp.sum((found_ER - c_ER) ** 2) / jnp.sum(c_ER**2))

  # By numpy's least squares, of a basis beside it.
  other_RDV = jnp.asarray(draw.normal(size=basis_RDV.shape), jnp.float32)
  m_RR = np.linalg.lstsq(
    np.float64(basis_RDV).reshape(R, -1).T,
    np.float64(other_RDV).reshape(R, -1).T,
  )[0].T
  found = subspace.coordinates(c_ER, other_RDV, basis_RDV)
  np.testing.assert_allclose(found, np.asarray(c_ER) @ m_RR, atol=1e-4)
  assert error(other_RDV, basis_RDV) > 0.5
  # Nothing of it lies in a span at right angles.
  six = subspace.orthonormalise(jnp.concatenate([basis_RDV, other_RDV]))
  np.testing.assert_allclose(error(six[:R], six[R:]), 1.0, atol=1e-5)
  # Fewer matrices than planted leave what they lack.
  fewer = subspace.coordinates(c_ER[:, :2], basis_RDV[:2], basis_RDV)
  expected = np.asarray(c_ER) * (1, 1, 0)
  np.testing.assert_allclose(fewer, expected, atol=1e-5)
