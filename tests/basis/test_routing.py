"""Scores by every rule against loops, and methods that share one contract."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import baselines, dual, methods, routing, solve
from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError

E, T, D, B, R = 6, 2, 5, 4, 2


def problem(seed=0, empty=()):
  draw = np.random.default_rng(seed)
  a_EV = np.float32(routing.unit(draw.normal(size=(E, D))))
  member_B = np.repeat([i for i in range(E) if i not in empty], T)
  q_BD = np.float32(routing.unit(draw.normal(size=(len(member_B), D))))
  clusters = clusters_lib.group(
    q_BD, a_EV[member_B], member_B, E, allow_empty=True
  )
  new_BD = np.float32(routing.unit(draw.normal(size=(B, D))))
  return clusters, jnp.asarray(a_EV), jnp.asarray(new_BD)


def cosine(x, y):
  return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def test_scores_are_their_formulas():
  clusters, a_EV, q_BD = problem()
  draw = np.random.default_rng(1)
  w_EDV = jnp.asarray(draw.normal(size=(E, D, D)), jnp.float32)
  centroid_ED = routing.centroids(clusters, a_EV)
  np.testing.assert_allclose(centroid_ED, clusters.q_ETD.mean(1), atol=1e-6)
  found = routing.scores(q_BD, w_EDV, a_EV, centroid_ED, temperatures=(0.3,))
  q, w, a, c = (np.float64(x) for x in (q_BD, w_EDV, a_EV, centroid_ED))
  for b in range(B):
    near = np.exp([cosine(q[b], c[i]) / 0.3 for i in range(E)])
    near /= near.sum()
    mixed = sum(near[i] * q[b] @ w[i] for i in range(E))
    heads = sum(near[i] * a[i] for i in range(E))
    multi_head = routing.multi_head(q_BD, a_EV, centroid_ED, 0.3)
    for i in range(E):
      p = q[b] @ w[i]
      expected = {
        'dot': p @ a[i],
        'cosine': cosine(p, a[i]),
        'distance': -np.sum((p - a[i]) ** 2),
        'routed@0.3': cosine(mixed, a[i]),
      }
      for rule, value in expected.items():
        np.testing.assert_allclose(found[rule][b, i], value, atol=2e-5)
      np.testing.assert_allclose(
        multi_head[b, i], cosine(heads, a[i]), atol=2e-5
      )


@pytest.mark.parametrize('identity', [True, False])
def test_a_basis_is_scored_without_its_weights(identity):
  _, a_EV, q_BD = problem()
  draw = np.random.default_rng(1)
  c_ER = jnp.asarray(draw.normal(size=(E, R)), jnp.float32)
  basis_RDV = jnp.asarray(draw.normal(size=(R, D, D)), jnp.float32)
  w_EDV = objective_lib.weights(c_ER, basis_RDV)
  if identity:
    w_EDV += jnp.eye(D)[None]
  dense = routing.scores(q_BD, w_EDV, a_EV, a_EV, temperatures=())
  found = routing.basis_scores(q_BD, c_ER, basis_RDV, a_EV, identity=identity)
  chex.assert_trees_all_close(found, dense, rtol=1e-4, atol=1e-4)


def test_members_without_questions_take_after_similar_answers():
  clusters, a_EV, _ = problem(empty=(1, 4))
  draw = np.random.default_rng(2)
  w_EDV = jnp.asarray(draw.normal(size=(E, D, D)), jnp.float32)
  found = routing.extend(w_EDV, clusters, a_EV, 0.5)
  full = [0, 2, 3, 5]
  np.testing.assert_array_equal(found[np.array(full)], w_EDV[np.array(full)])
  share = np.exp([float(a_EV[1] @ a_EV[j]) / 0.5 for j in full])
  share /= share.sum()
  expected = sum(s * w_EDV[j] for s, j in zip(share, full, strict=True))
  np.testing.assert_allclose(found[1], expected, atol=1e-5)
  near = routing.extend(w_EDV, clusters, a_EV, 1e-3)[1]
  closest = full[int(np.argmax([float(a_EV[1] @ a_EV[j]) for j in full]))]
  np.testing.assert_allclose(near, w_EDV[closest], atol=1e-5)


@pytest.mark.parametrize('name', methods.METHODS)
def test_every_method_scores_every_answer(name):
  clusters, a_EV, q_BD = problem()
  method = methods.METHODS[name]
  settings = dict(method.grid[-1])
  if 'rank' in settings:
    settings['rank'] = 2
  scores = method.fit(clusters, a_EV, **settings)(q_BD)
  assert scores
  chex.assert_tree_all_finite(scores)
  for scores_BE in scores.values():
    chex.assert_shape(scores_BE, (B, E))
  # One question's scores do not depend on the others'.
  alone = method.fit(clusters, a_EV, **settings)(q_BD[2:3])
  for rule, scores_BE in scores.items():
    np.testing.assert_allclose(alone[rule][0], scores_BE[2], atol=1e-4)


@pytest.mark.parametrize('name', methods.METHODS)
def test_every_method_takes_clusters_without_questions(name):
  clusters, a_EV, q_BD = problem(empty=(1, 4))
  method = methods.METHODS[name]
  settings = dict(method.grid[0])
  if 'rank' in settings:
    settings['rank'] = 2
  if name in methods.EXTENDED:
    settings['neighbours'] = 0.1
  scores = method.fit(clusters, a_EV, **settings)(q_BD)
  chex.assert_tree_all_finite(scores)
  if name != 'multi_head':
    rule = next(iter(scores))
    assert np.ptp(scores[rule][:, 1]) > 1e-4


def test_parameters_are_the_sizes_of_what_is_kept():
  clusters, a_EV, _ = problem()
  sizes = methods.Sizes(E, E * T, D, D)

  def count(name, rule='dot', **settings):
    return methods.parameters(name, sizes, settings, rule)

  means_ED = routing.centroids(clusters, a_EV)
  assert count('identity') == 0
  assert count('identity', 'routed@0.1') == means_ED.size
  for name in ('centroid', 'multi_head'):
    assert count(name) == means_ED.size
  assert count('nearest_question') == clusters.q_ETD.size
  # The members' weights are one.
  w_EDV = baselines.shared(clusters)
  assert count('shared') == w_EDV[0].size and not np.any(w_EDV - w_EDV[:1])
  w_EDV = baselines.independent(clusters)
  for name in ('pseudo_inverse', 'ridge', 'gradient', 'procrustes', 'kernel'):
    assert count(name) == w_EDV.size
  w_EDV = methods.coupled(clusters, a_EV, strength=0.1, ridge=0.1)
  assert count('laplacian') == w_EDV.size
  # As many factors as what is added to the shared weight has ranks.
  w_EDV = methods.adapter(clusters, a_EV, rank=1, ridge=0.1, shared=0.3)
  rest_EDV = np.asarray(w_EDV - baselines.shared(clusters, ridge=0.3))
  left, _, right = np.linalg.svd(rest_EDV, full_matrices=False)
  rank = int(np.linalg.matrix_rank(rest_EDV, tol=1e-5).max())
  factors = left[..., :rank].size + right[:, :rank].size
  assert count('low_rank', rank=rank) == rest_EDV[0].size + factors
  assert rank == 1
  objective = objective_lib.make(ridge=0.1)
  c_ER, basis_RDV, _ = jax.eval_shape(
    lambda: dual.run(objective, clusters, R, steps=2)
  )
  assert count('basis', rank=R) == c_ER.size + basis_RDV.size
  # No more bases than members.
  assert count('basis', rank=2 * E) == count('basis', rank=E)
  problem_of = clusters, a_EV, 0.1, 1.0
  u_ED = jax.eval_shape(
    lambda: solve.minimise(methods._classifier_loss, a_EV, problem_of, 2)
  )
  assert count('classifier', temperature=0.1, pull=1.0) == u_ED.size
  for name, method in methods.METHODS.items():
    assert all(count(name, **settings) >= 0 for settings in method.grid)


def test_the_base_is_what_training_adds_to():
  clusters, a_EV, q_BD = problem()
  fit = methods.METHODS['ridge'].fit
  found = fit(clusters, a_EV, base='identity', ridge=1e6)(q_BD)
  np.testing.assert_allclose(found['dot'], q_BD @ a_EV.T, atol=1e-4)
  with pytest.raises(UserError, match=r"base must be one of .* got 'mean'"):
    fit(clusters, a_EV, base='mean')


def test_the_choice_is_the_best_of_the_grid():
  clusters, a_EV, q_BD = problem()
  targets_B = jnp.arange(B)
  method = methods.METHODS['ridge']
  settings, rule, best = methods.choose(method, clusters, a_EV, q_BD, targets_B)
  found = {}
  for one in method.grid:
    for name, scores_BE in method.fit(clusters, a_EV, **one)(q_BD).items():
      order = np.argsort(-np.asarray(scores_BE), axis=1)
      place = [list(order[b]).index(b) + 1 for b in range(B)]
      found[(*one.values(), name)] = np.mean(1 / np.array(place))
  assert max(found.values()) == pytest.approx(best)
  assert found[(*settings.values(), rule)] == pytest.approx(best)


def test_equal_scores_find_nothing():
  ranks = methods.ranks(jnp.zeros((2, E)), jnp.array([0, 3]))
  np.testing.assert_array_equal(ranks, [E, E])
  nothing = methods.ranks(jnp.full((1, E), jnp.nan), jnp.array([0]))
  np.testing.assert_array_equal(nothing, [E])


def test_the_graph_of_answers_is_symmetric_and_near():
  draw = np.random.default_rng(0)
  a_EV = jnp.asarray(draw.normal(size=(12, 4)), jnp.float32)
  s_EE = methods.answer_graph(a_EV, neighbours=2)
  np.testing.assert_allclose(s_EE, s_EE.T, atol=1e-6)
  np.testing.assert_allclose(s_EE.sum(1).mean(), 1, rtol=1e-5)
  assert np.all(np.diagonal(s_EE) == 0)
  assert 2 <= np.count_nonzero(s_EE, axis=1).mean() <= 4


def test_the_classifier_starts_from_answers_and_learns():
  clusters, a_EV, _ = problem()
  fit = methods.METHODS['classifier'].fit
  q_BD, member_B = clusters.q_ETD.reshape(-1, D), jnp.repeat(jnp.arange(E), T)
  still = fit(clusters, a_EV, temperature=0.1, pull=1e6)(q_BD)
  np.testing.assert_allclose(still['dot'], q_BD @ a_EV.T, atol=1e-3)
  learnt = fit(clusters, a_EV, temperature=0.1, pull=0.01)(q_BD)
  assert np.all(methods.ranks(learnt['dot'], member_B) == 1)
  assert not np.all(methods.ranks(still['dot'], member_B) == 1)


def test_bad_temperatures_are_told():
  clusters, a_EV, q_BD = problem()
  with pytest.raises(UserError, match='temperature must be > 0, got 0'):
    routing.shares(q_BD, a_EV, 0)
  with pytest.raises(UserError, match='temperature must be > 0, got -1'):
    routing.extend(jnp.zeros((E, D, D)), clusters, a_EV, -1)


def test_scores_have_finite_slopes_at_zero():
  _, a_EV, q_BD = problem()

  def total(c_ER, basis_RDV):
    found = routing.basis_scores(q_BD, c_ER, basis_RDV, a_EV, identity=False)
    return sum(x.sum() for x in found.values())

  slopes = jax.grad(total, argnums=(0, 1))(
    jnp.zeros((E, R)), jnp.ones((R, D, D))
  )
  chex.assert_tree_all_finite(slopes)
