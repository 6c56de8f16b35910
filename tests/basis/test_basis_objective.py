"""The objective: its terms, its gradient, what padding may not change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError

E, T, D, V, R = 5, 3, 4, 6, 2


def rows(seed=0):
  draw = np.random.default_rng(seed)
  member_B = np.array([0, 1, 1, 2, 2, 2, 3, 4, 4])
  q_BD = draw.normal(size=(len(member_B), D))
  return q_BD, draw.normal(size=(len(member_B), V)), member_B


def point(seed=1):
  draw = np.random.default_rng(seed)
  c_ER, basis_RDV = draw.normal(size=(E, R)), draw.normal(size=(R, D, V))
  return jnp.asarray(c_ER, jnp.float32), jnp.asarray(basis_RDV, jnp.float32)


def full(clusters):
  return objective_lib.make(
    cosine=0.6,
    ridge=0.1,
    sparsity=0.2,
    similarity=0.3,
    similarity_EE=objective_lib.answer_similarity(clusters),
  )


def test_value_is_the_formula_by_loops_in_float64():
  q_BD, a_BV, member_B = rows()
  clusters = clusters_lib.group(q_BD, a_BV, member_B)
  c_ER, basis_RDV = point()
  w = np.einsum('er,rdv->edv', np.float64(c_ER), np.float64(basis_RDV))
  total = 0.0
  for q, a, i in zip(q_BD, a_BV, member_B, strict=True):
    p = q @ w[i]
    angle = 1 - p @ a / np.linalg.norm(p) / np.linalg.norm(a)
    total += 0.4 * np.sum((p - a) ** 2) + 0.6 * angle
  mean = [a_BV[member_B == i].mean(0) for i in range(E)]
  for i in range(E):
    total += 0.1 * np.sum(w[i] ** 2) + 0.2 * np.abs(np.float64(c_ER[i])).sum()
    for j in range(E):
      cosine = mean[i] @ mean[j]
      cosine /= np.linalg.norm(mean[i]) * np.linalg.norm(mean[j])
      if i != j:
        total += 0.3 * max(cosine, 0) * np.sum((w[i] - w[j]) ** 2)
  found = objective_lib.value(full(clusters), clusters, c_ER, basis_RDV)
  np.testing.assert_allclose(found, total / len(member_B), rtol=1e-5)


def test_gradients_are_finite_differences_in_float64():
  with jax.enable_x64(True):
    clusters = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), clusters_lib.group(*rows())
    )
    at = tuple(jnp.asarray(np.float64(x)) for x in point())
    objective = full(clusters)
    found = objective_lib.gradients(objective, clusters, *at)
    for index in range(2):
      flat = np.asarray(at[index]).ravel()
      slopes = np.zeros_like(flat)
      for k in range(flat.size):
        ends = []
        for sign in (1, -1):
          moved = flat.copy()
          moved[k] += sign * 1e-5
          arguments = list(at)
          arguments[index] = jnp.asarray(moved.reshape(at[index].shape))
          ends.append(objective_lib.smooth(objective, clusters, *arguments))
        slopes[k] = (ends[0] - ends[1]) / 2e-5
      np.testing.assert_allclose(
        np.asarray(found[index]).ravel(), slopes, atol=1e-6
      )


def test_the_angle_has_no_gradient_at_perfect_alignment():
  draw = np.random.default_rng(0)
  q_ETD = jnp.asarray(draw.normal(size=(E, T, D)), jnp.float32)
  c_ER, basis_RDV = point()
  a_ETV = objective_lib.predict(q_ETD, 2 * c_ER, basis_RDV)
  clusters = clusters_lib.Clusters(q_ETD, a_ETV, jnp.ones((E, T)))
  objective = objective_lib.make(cosine=1.0, ridge=0.0)
  found = objective_lib.gradients(objective, clusters, c_ER, basis_RDV)
  chex.assert_trees_all_close(
    found, jax.tree.map(jnp.zeros_like, found), atol=1e-6
  )
  zero = jax.tree.map(jnp.zeros_like, clusters)
  chex.assert_tree_all_finite(
    objective_lib.gradients(objective, zero, c_ER, basis_RDV)
  )


def test_a_perfect_prediction_costs_nothing_for_any_number_of_rows():
  c_ER, basis_RDV = point()
  for size in (1, 5):
    q_ETD = jnp.ones((E, size, D)) + jnp.arange(D)[None, None, :]
    a_ETV = objective_lib.predict(q_ETD, c_ER, basis_RDV)
    clusters = clusters_lib.Clusters(q_ETD, a_ETV, jnp.ones((E, size)))
    objective = objective_lib.make(cosine=0.5, ridge=0.0)
    found = objective_lib.value(objective, clusters, c_ER, basis_RDV)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


def test_grouping_keeps_rows_and_their_order():
  q_BD, a_BV, member_B = rows()
  order = np.random.default_rng(3).permutation(len(member_B))
  clusters = clusters_lib.group(q_BD[order], a_BV[order], member_B[order])
  for i in range(E):
    own = [k for k in order if member_B[k] == i]
    n = int(clusters.weight_ET[i].sum())
    assert n == len(own)
    np.testing.assert_allclose(clusters.q_ETD[i, :n], q_BD[own], rtol=1e-6)
    np.testing.assert_allclose(clusters.a_ETV[i, :n], a_BV[own], rtol=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda q, a, m: (q, a, np.where(m == 3, 4, m)), r'none in \[3\]'),
    (lambda q, a, m: (q * np.nan, a, m), 'q must be finite'),
    (lambda q, a, m: (q, a[:-1], m), 'one row a question'),
    (lambda q, a, m: (q[0], a, m), r'must be \[B, D\]'),
    (lambda q, a, m: (q, a, m - 1), 'member must be in'),
    (lambda q, a, m: (q, a, m + 0.5), 'must be integers, got float64'),
    (lambda q, a, m: (q, a, m.astype(str)), 'must be integers, got <U'),
    (lambda q, a, m: (q, a, [[0], [1, 2]]), 'rows of one length'),
    (lambda q, a, m: ([[1.0], [1.0, 2.0]], a, m), 'rows of one length'),
    (lambda q, a, m: (q, [['a']], m), 'must be numbers'),
  ],
)
def test_bad_data_is_told(change, message):
  with pytest.raises(UserError, match=message):
    clusters_lib.group(*change(*rows()))


@pytest.mark.parametrize('rank', [0, E + 1])
def test_a_rank_that_the_data_cannot_hold_is_told(rank):
  with pytest.raises(UserError, match=f'rank must be in 1 .. {E}.*got {rank}'):
    clusters_lib.check(clusters_lib.group(*rows()), rank)


def test_members_without_questions_hold_no_basis():
  clusters = clusters_lib.pad(clusters_lib.group(*rows()), E + 3, T)
  clusters_lib.check(clusters, E)
  with pytest.raises(
    UserError, match=f'rank must be in 1 .. {E} .*got {E + 1}'
  ):
    clusters_lib.check(clusters, E + 1)
  # Traced weights are not known, and no error.
  jax.eval_shape(lambda c: clusters_lib.check(c, E + 1), clusters)


@pytest.mark.parametrize('weight', [np.nan, np.inf, -1.0])
def test_weights_that_are_none_are_told(weight):
  clusters = clusters_lib.group(*rows())
  weight_ET = clusters.weight_ET.at[3, 0].set(weight)
  with pytest.raises(UserError, match=r'>= 0, got others in clusters \[3\]'):
    clusters_lib.check(clusters._replace(weight_ET=weight_ET), R)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'basis_RDV': np.ones((R, D + 1, V))}, r'basis must be \(2, 4, 6\).*5, 6'),
    ({'graph_EE': np.eye(E + 1)}, r'of the 5 clusters, got \(6, 6\)'),
  ],
)
def test_what_is_of_other_sizes_than_the_clusters_is_told(fields, message):
  clusters = clusters_lib.group(*rows())
  basis_RDV = np.ones((R, D, V))
  clusters_lib.check(clusters, R, basis_RDV=basis_RDV, graph_EE=np.eye(E))
  with pytest.raises(UserError, match=message):
    clusters_lib.check(clusters, R, **fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'cosine': 1.5}, 'cosine must be in'),
    ({'ridge': -1.0}, 'ridge must be >= 0 and finite, got -1'),
    ({'cosine': np.nan}, r'cosine must be in \[0, 1\], got nan'),
    ({'ridge': np.nan}, 'ridge must be >= 0 .*got nan'),
    ({'ridge': np.inf}, 'ridge must be >= 0 .*got inf'),
    ({'sparsity': np.nan}, 'sparsity must be >= 0 .*got nan'),
    ({'similarity': -np.nan}, 'similarity must be >= 0 .*got nan'),
    ({'similarity': 1.0}, 'similarity_EE must be given'),
    (
      {'similarity': 1.0, 'similarity_EE': np.ones((2, 3))},
      'must be square',
    ),
    (
      {'similarity': 1.0, 'similarity_EE': -np.ones((2, 2))},
      'similarity_EE must be >= 0 and finite, got -1',
    ),
  ],
)
def test_bad_objectives_are_told(fields, message):
  with pytest.raises(UserError, match=message):
    objective_lib.make(**fields)
