"""Baselines against their definitions, by loops in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import baselines
from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError

E, T, D = 6, 3, 5
METHODS = {
  'identity': baselines.identity,
  'shared': lambda c: baselines.shared(c, ridge=0.1),
  'pseudo_inverse': baselines.independent,
  'ridge': lambda c: baselines.independent(c, ridge=0.1),
  'gradient': lambda c: baselines.gradient(c, rate=0.1, steps=20),
  'procrustes': baselines.procrustes,
  'laplacian': lambda c: baselines.graph_laplacian(
    c, objective_lib.answer_similarity(c), strength=0.3, ridge=0.1
  ),
  'kernel': lambda c: baselines.kernel(
    c, baselines.independent(c, ridge=0.1), length=2.0
  ),
  'low_rank': lambda c: baselines.low_rank(
    c, baselines.shared(c, ridge=0.1), rank=1, ridge=0.1
  ),
}


def random(seed=0):
  draw = np.random.default_rng(seed)
  weight_ET = np.arange(T)[None] < np.array([1, 2, 3, 3, 2, 1])[:, None]
  q_ETD = draw.normal(size=(E, T, D)) * weight_ET[..., None]
  a_ETD = draw.normal(size=(E, T, D)) * weight_ET[..., None]
  return clusters_lib.Clusters(
    *(jnp.asarray(x, jnp.float32) for x in (q_ETD, a_ETD, weight_ET))
  )


def ragged(clusters):
  q_ETD, a_ETD, weight_ET = (np.asarray(x, np.float64) for x in clusters)
  keep = [weight_ET[i] > 0 for i in range(len(q_ETD))]
  return [(q[k], a[k]) for q, a, k in zip(q_ETD, a_ETD, keep, strict=True)]


@pytest.mark.parametrize('name', METHODS)
def test_padding_changes_nothing(name):
  clusters = random()
  more = clusters_lib.pad(clusters, E + 2, T + 3)
  found = METHODS[name](more)
  chex.assert_tree_all_finite(found)
  chex.assert_trees_all_close(
    found[:E], METHODS[name](clusters), atol=2e-5, rtol=1e-4
  )


def test_ridge_and_pseudo_inverse_are_numpys():
  clusters = random()
  ridge = baselines.independent(clusters, ridge=0.1)
  plain = baselines.independent(clusters)
  for i, (q, a) in enumerate(ragged(clusters)):
    np.testing.assert_allclose(plain[i], np.linalg.pinv(q) @ a, atol=2e-4)
    expected = np.linalg.solve(q.T @ q + 0.1 * np.eye(D), q.T @ a)
    np.testing.assert_allclose(ridge[i], expected, atol=2e-5)


def test_shared_is_ridge_on_all_rows():
  clusters = random()
  q = np.concatenate([q for q, _ in ragged(clusters)])
  a = np.concatenate([a for _, a in ragged(clusters)])
  expected = np.linalg.solve(q.T @ q + 0.1 * np.eye(D), q.T @ a)
  found = METHODS['shared'](clusters)
  np.testing.assert_allclose(found[E - 1], expected, atol=2e-5)


def test_procrustes_takes_the_mean_question_to_the_mean_answer():
  clusters = random()
  found = np.asarray(METHODS['procrustes'](clusters), np.float64)
  for w, (q, a) in zip(found, ragged(clusters), strict=True):
    np.testing.assert_allclose(q.mean(0) @ w, a.mean(0), atol=2e-5)
    size = np.linalg.norm(a.mean(0)) / np.linalg.norm(q.mean(0))
    np.testing.assert_allclose(w @ w.T, size**2 * np.eye(D), atol=2e-4)
    across = np.linalg.svd(np.stack([q.mean(0), a.mean(0)]))[2][2:]
    np.testing.assert_allclose(across @ w, size * across, atol=2e-5)


def coupled(clusters, strength, ridge):
  """All members' normal equations as one dense system, float64."""
  s_EE = np.asarray(objective_lib.answer_similarity(clusters), np.float64)
  graph_EE = np.diag(s_EE.sum(1)) - s_EE
  system = strength * np.kron(graph_EE, np.eye(D)) + ridge * np.eye(E * D)
  right = np.zeros((E * D, D))
  for i, (q, a) in enumerate(ragged(clusters)):
    own = slice(i * D, (i + 1) * D)
    system[own, own] += q.T @ q
    right[own] = q.T @ a
  return np.linalg.solve(system, right).reshape(E, D, D)


# Without coupling the preconditioner is the system; with much it is far off.
@pytest.mark.parametrize(
  ('strength', 'ridge'), [(0.0, 0.1), (0.3, 0.1), (100.0, 0.1), (0.1, 1e-3)]
)
def test_laplacian_solves_the_coupled_system(strength, ridge):
  draws = [random(seed) for seed in (0, 1)]
  both = jax.tree.map(lambda *x: jnp.stack(x), *draws)
  # By the answers' similarity, under jit, and many problems at once.
  found = jax.jit(
    jax.vmap(
      lambda c, s_EE: baselines.graph_laplacian(
        c, s_EE, strength=strength, ridge=ridge
      )
    )
  )(both, jax.vmap(objective_lib.answer_similarity)(both))
  for w_EDV, clusters in zip(found, draws, strict=True):
    expected = coupled(clusters, strength, ridge)
    size = np.abs(expected).max()
    np.testing.assert_allclose(w_EDV, expected, atol=1e-4 * size)


def test_laplacian_keeps_no_matrix_of_all_questions():
  few, many = 4, 64
  clusters = clusters_lib.Clusters(
    *(jax.ShapeDtypeStruct((few, many, n), jnp.float32) for n in (2, 3)),
    jax.ShapeDtypeStruct((few, many), jnp.float32),
  )
  graph = jax.ShapeDtypeStruct((few, few), jnp.float32)
  text = jax.jit(baselines.graph_laplacian).lower(clusters, graph).as_text()
  assert f'{few}x{many}x{many}' in text  # the preconditioner's
  assert f'{few * many}x{few * many}' not in text


def test_gradient_descent_is_autodiffs_on_the_weight():
  clusters = random()
  found = METHODS['gradient'](clusters)
  for i, (q, a) in enumerate(ragged(clusters)):
    q, a = jnp.asarray(q, jnp.float32), jnp.asarray(a, jnp.float32)

    def loss(w, q=q, a=a):
      p = q @ w
      norm = jnp.sqrt(jnp.sum(p**2, -1) * jnp.sum(a**2, -1))
      angle = 1 - jnp.sum(p * a, -1) / norm
      return jnp.mean(0.5 * jnp.sum((p - a) ** 2, -1) + 0.5 * angle)

    # From 0 the angle has no gradient: the first step is the square's.
    w = 0.1 * q.T @ a / len(q)
    for _ in range(19):
      w = w - 0.1 * jax.grad(loss)(w)
    np.testing.assert_allclose(found[i], w, atol=2e-4)


def test_kernel_averages_neighbours():
  clusters = random()
  w_EDV = baselines.independent(clusters, ridge=0.1)
  mean = np.stack([q.mean(0) for q, _ in ragged(clusters)])
  r = np.linalg.norm(mean[:, None] - mean[None], axis=-1)
  s = 5**0.5 * r / 2.0
  k = (1 + s + s**2 / 3) * np.exp(-s)
  k /= k.sum(1, keepdims=True)
  expected = np.einsum('ef,fdv->edv', k, np.float64(w_EDV))
  found = baselines.kernel(clusters, w_EDV, length=2.0)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  near = baselines.kernel(clusters, w_EDV, length=1e-3)
  np.testing.assert_allclose(near, w_EDV, atol=1e-6)


def test_low_rank_is_the_best_adapter_of_its_rank():
  clusters = random()
  start = METHODS['shared'](clusters)
  for rank in (1, D):
    found = baselines.low_rank(clusters, start, rank=rank, ridge=0.1)
    for i, (q, a) in enumerate(ragged(clusters)):
      w = np.float64(start[i])
      # With ridge as further rows this is Eckart and Young's problem.
      rows = np.concatenate([q, 0.1**0.5 * np.eye(D)])
      full = np.linalg.lstsq(
        rows, np.concatenate([a - q @ w, np.zeros((D, D))]), rcond=None
      )[0]
      u, s, v = np.linalg.svd(rows @ full)
      best = (u[:, :rank] * s[:rank]) @ v[:rank]
      expected = w + np.linalg.pinv(rows) @ best
      np.testing.assert_allclose(found[i], expected, atol=2e-4)


def test_bad_settings_are_told():
  clusters = random()
  with pytest.raises(UserError, match='ridge must be > 0, got 0'):
    baselines.shared(clusters, ridge=0)
  with pytest.raises(UserError, match='ridge must be >= 0, got -1'):
    baselines.independent(clusters, ridge=-1)
  with pytest.raises(UserError, match='kind must be one of'):
    baselines.kernel(clusters, baselines.identity(clusters), kind='box')
  with pytest.raises(UserError, match='ridge must be > 0, got nan'):
    baselines.shared(clusters, ridge=np.nan)
  for rank in (0, D + 1):
    with pytest.raises(
      UserError, match=f'rank must be in 1 .. {D}, got {rank}'
    ):
      baselines.low_rank(clusters, jnp.zeros((E, D, D)), rank=rank)
  with pytest.raises(UserError, match=r'of the 6 clusters, got \(7, 7\)'):
    baselines.graph_laplacian(clusters, jnp.ones((E + 1, E + 1)))
  other = clusters._replace(a_ETV=jnp.zeros((E, T, D + 1)))
  with pytest.raises(UserError, match='needs answers of the size'):
    baselines.identity(other)
