"""The alternating fit: it descends, recovers, stops, and ignores layout."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import fit as fit_lib
from recursive_weights.basis import initial, lagrangian
from recursive_weights.basis import objective as objective_lib
from recursive_weights.benchmarks import basis as benchmark
from recursive_weights.benchmarks import recovery
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _planted

E, T, D, R = 16, 4, 6, 2


def small(seed=0, noise=0.1):
  problem = _planted.planted(
    seed, members=E, questions=T, width=D, rank=R, noise=noise
  )
  arrays = problem.q_ETD, problem.a_ETD, np.ones((E, T))
  return clusters_lib.Clusters(*(jnp.asarray(x, jnp.float32) for x in arrays))


def start(clusters, rank=R):
  width, values = clusters.q_ETD.shape[-1], clusters.a_ETV.shape[-1]
  return initial.random(jax.random.key(1), rank, width, values)


def objective(name, clusters):
  similarity_EE = objective_lib.answer_similarity(clusters)
  fields = {
    'square': {'ridge': 1e-3},
    'cosine': {'cosine': 0.7, 'ridge': 1e-3},
    'sparse': {'sparsity': 0.2},
    'similar': {'similarity': 0.01, 'similarity_EE': similarity_EE},
    'all': {
      'cosine': 0.5,
      'sparsity': 0.1,
      'similarity': 0.01,
      'similarity_EE': similarity_EE,
    },
  }
  return objective_lib.make(**fields[name])


def fitted(fit, clusters, steps, basis_RDV=None, tolerance=0.0):
  def both(clusters, basis_RDV):
    state = fit.init(clusters, basis_RDV)
    return state, fit_lib.run(
      fit, clusters, state, steps=steps, tolerance=tolerance
    )

  basis_RDV = start(clusters) if basis_RDV is None else basis_RDV
  first, (state, metrics) = jax.jit(both)(clusters, basis_RDV)
  return first, state, metrics


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('square', {}),
    ('square', {'solver': 'cg', 'orthonormalise_every': 3}),
    ('square', {'solver': 'dual'}),
    ('square', {'solver': 'gradient', 'orthonormalise_every': 0}),
    ('cosine', {'refresh_every': 4}),
    ('sparse', {}),
    ('similar', {}),
    ('all', {'orthonormalise_every': 4}),
  ],
)
def test_the_objective_never_rises(name, fields):
  clusters = small()
  which = objective(name, clusters)
  first, state, metrics = fitted(fit_lib.make(which, **fields), clusters, 12)
  values = np.append(first.objective, metrics['objective'])
  assert np.all(np.diff(values) <= 0)
  assert values[-1] < 0.9 * values[0]
  # What is reported belongs to what is returned.
  again = objective_lib.value(
    which, clusters, state.coefficients_ER, state.basis_RDV
  )
  np.testing.assert_allclose(again, values[-1], rtol=1e-5)
  norms = jnp.sum(state.basis_RDV**2, (1, 2))
  np.testing.assert_allclose(norms, 1.0, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'tolerance'), [('square', 1e-4), ('cosine', 2e-3)]
)
def test_it_stops_where_the_lagrangian_is_stationary(name, tolerance):
  clusters = small()
  which = objective(name, clusters)
  fit = fit_lib.make(which)
  _, state, metrics = fitted(fit, clusters, 200, tolerance=tolerance)
  assert state.tangent < tolerance
  assert state.step < 200
  assert metrics['tangent'][state.step - 2] > tolerance
  at = state.coefficients_ER, state.basis_RDV
  found = lagrangian.multipliers(which, clusters, *at)
  # Constraints that only choose among equal bases pull at nothing.
  np.testing.assert_allclose(found.basis_RR, 0.0, atol=1e-2)
  slope_EDV = -lagrangian.weight_multipliers(which, clusters, *at)
  onto_ER = jnp.einsum('edv,rdv->er', slope_EDV, state.basis_RDV)
  np.testing.assert_allclose(onto_ER, found.tangent_ER, atol=1e-4)
  # A member's own gradient is not zero: the basis holds it there.
  assert jnp.abs(slope_EDV).max() > 10 * jnp.abs(onto_ER).max()


def test_orthonormalising_changes_no_members_weight():
  clusters = small()
  which = objective('square', clusters)
  results = []
  for every in (0, 1, 5):
    fit = fit_lib.make(which, orthonormalise_every=every)
    _, state, _ = fitted(fit, clusters, 5)
    results.append(
      objective_lib.weights(state.coefficients_ER, state.basis_RDV)
    )
  chex.assert_trees_all_close(results[0], results[1], atol=2e-3)
  chex.assert_trees_all_close(results[0], results[2], atol=2e-3)


def test_direct_and_matrix_free_fits_agree():
  clusters = small()
  which = objective('square', clusters)
  values = [
    fitted(fit_lib.make(which, solver=solver), clusters, 10)[2]['objective']
    for solver in ('direct', 'cg')
  ]
  np.testing.assert_allclose(*values, rtol=1e-3)


@pytest.mark.parametrize('name', ['square', 'cosine'])
def test_padding_changes_nothing(name):
  clusters = small()
  fit = fit_lib.make(objective(name, clusters))
  _, plain, _ = fitted(fit, clusters, 4)
  more = clusters_lib.pad(clusters, E + 3, T + 2)
  _, padded, _ = fitted(fit, more, 4)
  np.testing.assert_allclose(plain.objective, padded.objective, rtol=1e-3)
  chex.assert_trees_all_close(
    padded.coefficients_ER[:E] @ padded.basis_RDV.reshape(R, -1),
    plain.coefficients_ER @ plain.basis_RDV.reshape(R, -1),
    atol=1e-2,
  )
  np.testing.assert_allclose(padded.coefficients_ER[E:], 0.0, atol=1e-6)


@pytest.mark.parametrize('name', ['square', 'cosine'])
def test_eight_devices_give_what_one_gives(name):
  clusters = small()
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = NamedSharding(mesh, PartitionSpec('data'))
  fit = fit_lib.make(objective(name, clusters))
  _, one, _ = fitted(fit, clusters, 4)
  _, many, _ = fitted(fit, jax.device_put(clusters, split), 4)
  assert len(many.coefficients_ER.sharding.device_set) == 8
  np.testing.assert_allclose(one.objective, many.objective, rtol=1e-3)
  chex.assert_trees_all_close(
    one.coefficients_ER @ one.basis_RDV.reshape(R, -1),
    many.coefficients_ER @ many.basis_RDV.reshape(R, -1),
    atol=1e-2,
  )


def test_the_loop_and_the_scan_are_one():
  clusters = small()
  fit = fit_lib.make(objective('square', clusters))
  first, scanned, _ = fitted(fit, clusters, 3)
  step = jax.jit(fit.step)
  state = first
  for _ in range(3):
    state, _ = step(clusters, state)
  chex.assert_trees_all_close(state, scanned, atol=1e-3)
  assert state.step == 3


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'solver': 'newton'}, "got 'newton'"),
    ({'sweeps': 0}, 'sweeps must be >= 1, got 0'),
    ({'refresh_every': -1}, 'refresh_every must be >= 0, got -1'),
  ],
)
def test_bad_settings_are_told(fields, message):
  with pytest.raises(UserError, match=message):
    fit_lib.make(objective_lib.make(), **fields)
  with pytest.raises(UserError, match='cosine must be 0'):
    fit_lib.make(objective_lib.make(cosine=0.5), solver='cg')
  with pytest.raises(UserError, match='rank must be in'):
    clusters = small()
    fit_lib.make(objective_lib.make()).init(clusters, start(clusters, E + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('planted', 'draws', 'questions', 'error', 'angle'),
  [
    ('gaussian', 3, 4, 6e-3, 0.99),
    # Less signal and the same noise: `known` has twice the error too.
    ('sparse', 3, 8, 1.2e-3, 0.998),
    pytest.param('gaussian', 10, 8, 6e-4, 0.999, marks=pytest.mark.long),
  ],
)
def test_a_planted_basis_is_recovered(planted, draws, questions, error, angle):
  drawn = {'questions': questions, 'noise': 0.05, 'planted': planted}
  found = recovery.case(draws, rank=4, ridge=1e-3, **drawn)
  assert found['error']['median'] <= error
  assert found['cosine']['median'] >= angle
  assert found['coefficients']['high'] < found['error']['low']
  assert found['stationary'] == 1 and found['unfinished'] == []
  # Not the median alone: no draw ends in a minimum that interpolates.
  assert found['error']['high'] <= 2 * error
  beside = recovery.beside(draws, **drawn)
  assert beside['known']['median'] < found['error']['median']
  assert beside['independent']['median'] > 0.7


def test_sparse_coefficients_are_as_sparse_as_they_say():
  full = _planted.planted(0, members=4000, width=2, rank=4)
  assert np.all(full.coefficients_ER != 0)
  for density in (0.0, 0.5):
    problem = _planted.planted(
      0, members=4000, width=2, rank=4, coefficients='sparse', density=density
    )
    kept_ER = problem.coefficients_ER != 0
    # One of four is kept whatever happens to the others.
    assert kept_ER.any(1).all()
    share = (1 + 3 * density) / 4
    np.testing.assert_allclose(kept_ER.mean(0), share, atol=0.03)
    own_EDV = np.einsum(
      'er,rdv->edv', problem.coefficients_ER, problem.basis_RDV
    )
    np.testing.assert_allclose(problem.w_EDV, own_EDV, atol=1e-12)
  with pytest.raises(ValueError, match="'gaussian' or 'sparse', got 'few'"):
    _planted.planted(0, coefficients='few')


@pytest.mark.slow
def test_a_recovery_that_ends_too_early_says_so():
  case = functools.partial(
    recovery.case, 2, questions=4, rank=4, noise=0.05, ridge=1e-3
  )
  good = case(start='first', limit=3)
  bad = case(start='proposed', limit=3)
  for found in (good, bad):
    assert found['stationary'] == 0 and found['unfinished'] == [0, 1]
    assert found['stalled'] == []
    assert found['steps'] == {'median': 3, 'low': 3, 'high': 3}
  # Where the proposal takes them the gradients are rounding.
  gradient = recovery.gradient(2, questions=4, noise=0.05)['gradient']
  assert gradient['high'] < 1e-5
  assert good['error']['high'] < bad['error']['low']


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--rank 9 --members 3', 'rank must be in 1 .. 3 '),
    ('--rank 0', '--rank must be > 0, got 0'),
    ('--solver x --algorithm alternating', "got 'x'"),
  ],
)
def test_a_benchmark_tells_what_it_cannot_time(
  monkeypatch, capsys, flags, message
):
  small = 'basis --members 3 --width 2 --rank 2 '
  monkeypatch.setattr('sys.argv', [*small.split(), *flags.split()])
  with pytest.raises(SystemExit, match='2'):
    benchmark.main()
  assert message in capsys.readouterr().err
