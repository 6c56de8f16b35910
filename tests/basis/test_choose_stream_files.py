"""Number of bases, updates of a stream, low-rank bases, and files."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.basis import (
  choose,
  dual,
  files,
  low_rank,
  solve,
  stream,
)
from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError
from recursive_weights.io import tensors
from recursive_weights.tasks import _planted

E, T, D, R = 24, 6, 5, 2


def planted(noise=0.1, seed=0):
  found = _planted.planted(
    seed, members=E, questions=T, width=D, rank=R, noise=noise
  )
  arrays = found.q_ETD, found.a_ETD, np.ones((E, T))
  return found, clusters_lib.Clusters(
    *(jnp.asarray(x, jnp.float32) for x in arrays)
  )


def test_cross_validation_finds_the_number_that_was_planted():
  _, clusters = planted()
  objective = objective_lib.make(ridge=1e-2)
  found = choose.cross_validate(
    objective, clusters, (1, 2, 6), jax.random.key(0), folds=3, steps=20
  )
  assert min(found, key=found.get) == R
  # The noise of an answer is what no fit can tell.
  assert 0.01 * D < found[R] < 0.1 * D < found[1]


def test_nothing_is_judged_by_a_fit_that_saw_it():
  _, clusters = planted()
  # Random answers: in-sample error would be well below their variance.
  draw = np.random.default_rng(0)
  noise = clusters._replace(
    a_ETV=jnp.asarray(draw.normal(size=(E, T, D)), jnp.float32)
  )
  found = choose.cross_validate(
    objective_lib.make(ridge=1e-2), noise, (6,), jax.random.key(0), folds=2,
    steps=10,
  )  # fmt: skip
  assert found[6] > D


def test_the_rule_of_thumb_and_errors():
  assert [choose.square_root(n) for n in (1, 18, 100)] == [1, 4, 10]
  _, clusters = planted()
  one = jax.tree.map(lambda x: x[:, :1], clusters)
  objective, key = objective_lib.make(ridge=1.0), jax.random.key(0)
  with pytest.raises(UserError, match='at most one question a cluster'):
    choose.cross_validate(objective, one, (2,), key)
  with pytest.raises(UserError, match='folds must be > 1, got 1'):
    choose.cross_validate(objective, clusters, (2,), key, folds=1)


def test_a_stream_in_any_order_is_the_solution_on_all_questions():
  _, clusters = planted()
  draw = np.random.default_rng(0)
  basis_RDV = jnp.asarray(draw.normal(size=(R, D, D)), jnp.float32)
  objective = objective_lib.make(ridge=0.3)
  zero_ER = jnp.zeros((E, R))
  expected = solve.coefficients(objective, clusters, zero_ER, basis_RDV)
  rows = draw.permutation(E * T)
  state = stream.init(E, basis_RDV)
  update = jax.jit(lambda s, *x: stream.update(s, *x, ridge=0.3))
  for some in np.split(rows, 6):
    member_B = some // T
    state = update(
      state,
      clusters.q_ETD.reshape(-1, D)[some],
      clusters.a_ETV.reshape(-1, D)[some],
      jnp.asarray(member_B),
    )
  np.testing.assert_allclose(state.coefficients_ER, expected, atol=1e-4)
  np.testing.assert_array_equal(state.basis_RDV, basis_RDV)


def test_a_stream_that_grows_is_one_that_began_with_all_clusters():
  _, clusters = planted()
  draw = np.random.default_rng(0)
  basis_RDV = jnp.asarray(draw.normal(size=(R, D, D)), jnp.float32)
  old = E - 7

  @functools.partial(jax.jit, static_argnames='strength')
  def asked(state, members, strength, t=0):
    return stream.update(
      state,
      clusters.q_ETD[members, t],
      clusters.a_ETV[members, t],
      members,
      ridge=0.3,
      strength=strength,
      forget=0.9,
    )

  for strength in (0.0, 0.3):
    small = asked(stream.init(old, basis_RDV), jnp.arange(old), strength)
    grown = stream.grow(small, E - old)
    chex.assert_trees_all_equal(grown.basis_RDV, small.basis_RDV)
    for x, was in zip(grown, small, strict=True):
      np.testing.assert_array_equal(x[: len(was)], was)
    # The new ones are as `init` has them.
    assert len(grown.gram_ERR) == E
    for name in ('coefficients_ER', 'gram_ERR', 'right_ER'):
      assert not np.any(getattr(grown, name)[old:])
    whole = asked(stream.init(E, basis_RDV), jnp.arange(old), strength)
    rows = jnp.asarray(draw.permutation(E))
    found, expected = (asked(x, rows, strength, 1) for x in (grown, whole))
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    if not strength:
      chex.assert_trees_all_equal(found.gram_ERR, expected.gram_ERR)
      chex.assert_trees_all_equal(found.right_ER, expected.right_ER)
  with pytest.raises(UserError, match='more must be >= 0, got -1'):
    stream.grow(grown, -1)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'member_B': [0, 9, -1]}, r'member must be in 0 .. 3, got \[9, -1\]'),
    ({'q_BD': [[1.0], [np.nan], [1.0]]}, r'q must be finite, .*rows \[1\]'),
    ({'a_BV': [[1.0], [1.0], [np.inf]]}, r'a must be finite, .*rows \[2\]'),
    ({'ridge': np.nan}, 'ridge must be > 0'),
  ],
)
def test_rows_that_would_spoil_a_stream_are_told(change, message):
  state = stream.init(4, jnp.ones((1, 1, 1)))
  good = {'q_BD': np.ones((3, 1)), 'a_BV': np.ones((3, 1)), 'ridge': 1.0}
  good['member_B'] = np.arange(3)
  change = {k: np.asarray(x) for k, x in change.items()}
  with pytest.raises(UserError, match=message):
    stream.update(state, **good | change)


def test_a_basis_follows_a_stream():
  truth, clusters = planted(noise=0.02)
  draw = np.random.default_rng(1)
  near = truth.basis_RDV + 0.3 * draw.normal(size=(R, D, D))
  first = stream.init(E, jnp.asarray(near, jnp.float32))
  errors = {}
  for strength in (0.0, 0.3):
    state = first
    update = jax.jit(
      lambda s, *x, strength=strength: stream.update(
        s, *x, ridge=0.01, strength=strength, forget=0.9
      )
    )
    for t in list(range(T)) * 10:
      state = update(
        state, clusters.q_ETD[:, t], clusters.a_ETV[:, t], jnp.arange(E)
      )
    w_EDV = objective_lib.weights(state.coefficients_ER, state.basis_RDV)
    errors[strength] = _planted.relative_error(truth, w_EDV)
  assert errors[0.3] < 0.2 * errors[0.0]


def test_the_step_of_the_basis_is_its_least_squares():
  _, clusters = planted()
  draw = np.random.default_rng(0)
  basis = draw.normal(size=(R, D, D))
  c_ER = jnp.asarray(draw.normal(size=(E, R)), jnp.float32)
  first = stream.init(E, jnp.asarray(basis, jnp.float32))
  first = first._replace(coefficients_ER=c_ER)
  q_BD, a_BV = clusters.q_ETD[:, 0], clusters.a_ETV[:, 0]
  moved = stream.update(
    first, q_BD, a_BV, jnp.arange(E), ridge=1.0, strength=0.5
  )
  rows = np.stack(
    [np.kron(c, q) for c, q in zip(c_ER, np.float64(q_BD), strict=True)]
  )
  left = np.float64(a_BV) - rows @ basis.reshape(R * D, D)
  change = np.linalg.solve(
    rows.T @ rows + 2 * np.eye(R * D), rows.T @ left
  ).reshape(R, D, D)
  np.testing.assert_allclose(moved.basis_RDV, basis + change, atol=1e-4)


def test_full_factors_are_the_basis_and_fewer_are_fitted():
  _, clusters = planted()
  objective = objective_lib.make(ridge=0.1)
  c_ER, basis_RDV, _ = dual.run(objective, clusters, R, steps=20)
  full = low_rank.truncate(c_ER, basis_RDV, D)
  np.testing.assert_allclose(low_rank.basis(full), basis_RDV, atol=1e-5)
  few = low_rank.truncate(c_ER, basis_RDV, 2)
  assert sum(x.size for x in few) == E * R + R * 2 * (D + D)

  def value(factors):
    return objective_lib.value(
      objective, clusters, factors.coefficients_ER, low_rank.basis(factors)
    )

  found = low_rank.fit(objective, clusters, few, steps=30)
  assert value(full) < value(found) < value(few) - 1e-2
  p_ETV = objective_lib.predict(
    clusters.q_ETD, found.coefficients_ER, low_rank.basis(found)
  )
  np.testing.assert_allclose(
    low_rank.predict(clusters.q_ETD, found), p_ETV, atol=1e-4
  )
  with pytest.raises(UserError, match=r'inner_rank must be in 1 .. 5, got 6'):
    low_rank.truncate(c_ER, basis_RDV, 6)
  sparse = objective_lib.make(sparsity=1.0)
  with pytest.raises(UserError, match='sparsity must be 0 here'):
    low_rank.fit(sparse, clusters, few)


def test_files_come_back_and_say_what_they_are(tmp_path):
  pytest.importorskip('safetensors')
  draw = np.random.default_rng(0)
  stored = files.Stored(
    draw.normal(size=(3, R)).astype(np.float32),
    draw.normal(size=(R, D, D)).astype(np.float32),
    ['a', 'b', 'c'],
    {'identity': True, 'encoder': 'minilm'},
  )
  files.save(tmp_path, stored)
  again = files.load(tmp_path)
  chex.assert_trees_all_equal(again[:2], stored[:2])
  assert again[2:] == stored[2:]
  about = json.loads((tmp_path / 'basis.json').read_text())
  assert about['rank'] == R and about['names'] == ['a', 'b', 'c']
  with pytest.raises(UserError, match='names must be one a member, 3, got 1'):
    files.save(tmp_path, stored._replace(names=['a']))
  with pytest.raises(UserError, match='there is no file'):
    files.load(tmp_path / 'none')
  # Nothing that cannot be written takes the place of what was.
  for facts in ({'a': np.float32(1)}, {'a': {1}}, {1: 0, 'a': 0}):
    with pytest.raises(UserError, match='names and facts must be JSON, got'):
      files.save(tmp_path, stored._replace(facts=facts))
  assert files.load(tmp_path)[2:] == stored[2:]
  for folder in ('basis.json', 'basis.json/under'):
    with pytest.raises(UserError, match='cannot write a basis to '):
      files.save(tmp_path / folder, stored)


def test_files_of_other_programs_are_told(tmp_path):
  pytest.importorskip('safetensors')
  arrays = {
    'coefficients': np.ones((3, R), np.float32),
    'basis': np.ones((R, D, D), np.float32),
  }
  names = {'names': ['a', 'b', 'c'], 'facts': {}}
  for held, facts, message in (
    (arrays, {}, 'it has no facts, names'),
    (arrays, {'names': ['a', 'b', 'c']}, 'it has no facts'),
    ({'x': np.ones(2, np.float32)}, names, 'it has no basis, coefficients'),
    (arrays, names | {'names': 7}, 'names must be one a member, 3, got 7'),
    (arrays, names | {'names': ['a']}, 'one a member, 3, got 1'),
    (
      arrays | {'basis': np.ones((3, D, D), np.float32)},
      names,
      r'must be \[E, R\]',
    ),
  ):
    tensors.write(tmp_path / 'basis.safetensors', held, facts)
    with pytest.raises(UserError, match=message) as error:
      files.load(tmp_path)
    assert str(tmp_path) in str(error.value)
