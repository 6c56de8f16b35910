"""The model of a shared basis: identity at the start, and both trainings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import basis_synthetic
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError
from recursive_weights.models import shared_basis
from recursive_weights.tasks import digits, planted_basis, question_answer
from recursive_weights.training import alternating, devices


@pytest.fixture(scope='module')
def task():
  return question_answer.make(
    members=12, width=6, rank=2, train_questions=3, validation_questions=2
  )


def test_at_the_start_it_is_the_similarity_of_question_and_answer(task):
  model = shared_basis.make(task.spec, answers=task.answers, rank=2, rule='dot')
  params = model.init(jax.random.key(0), None)
  q_BD = task.batch('test', 0, 4)['inputs']
  outputs, carry = model.apply(params, {}, q_BD, key=None, train=False)
  chex.assert_shape(outputs['logits'], (1, 4, 12))
  assert carry == {}
  np.testing.assert_allclose(
    outputs['logits'][0], 10 * q_BD @ task.answers.T, rtol=1e-5, atol=1e-5
  )
  sizes = jax.tree.map(jnp.size, params)
  assert sizes == {'coefficients': 12 * 2, 'basis': 2 * 6 * 6}


@pytest.mark.slow
def test_alternating_steps_lower_the_objective_of_their_own_parameters(task):
  init, make_step = alternating.make(
    task, rank=2, identity=True, ridge=0.1, similarity=0.05
  )
  state = init(0)
  step = jax.jit(make_step(None))
  values = []
  for index in range(4):
    state, metrics = step(state, task.batch('train', index, 4))
    values.append(float(metrics['loss']))
    assert metrics['finite'] == 1 and metrics['gradient_norm'] >= 0
  assert np.all(np.diff(values) <= 0) and values[-1] < values[0]
  assert state.step == 4
  # What it fits is what questions leave of answers.
  batch = task.batch('train', 0, task.spec.sizes['train'])
  w_EDV = objective_lib.weights(
    state.params['coefficients'], state.params['basis']
  )
  q_BD, member_B = batch['inputs'], batch['targets']
  found = q_BD + np.einsum('bd,bdv->bv', q_BD, np.asarray(w_EDV)[member_B])
  error = np.mean(np.sum((found - task.answers[member_B]) ** 2, -1))
  start = np.mean(np.sum((q_BD - task.answers[member_B]) ** 2, -1))
  assert error < 0.7 * start
  assert error < values[-1] < start


@pytest.mark.slow
def test_members_are_split_over_devices(task):
  """Twelve over eight, to the numbers of one that does all."""
  init, make_step = alternating.make(task, rank=2, identity=True)
  batch = task.batch('train', 0, 4)
  mesh = devices.make_mesh()
  state = jax.device_put(init(0), NamedSharding(mesh, P()))
  split = jax.jit(make_step(None)).lower(state, batch).compile()
  assert 'all-reduce' in split.as_text()
  one, many = (
    jax.jit(make_step('data'))(state, batch)[0],
    split(state, batch)[0],
  )
  chex.assert_trees_all_close(one.params, many.params, rtol=1e-3, atol=1e-4)


def test_the_order_of_the_data_does_not_matter(task):
  other = question_answer.make(
    seed=5, members=12, width=6, rank=2, train_questions=3,
    validation_questions=2,
  )  # fmt: skip
  states = [
    alternating.make(x, rank=2, identity=True)[0](0) for x in (task, other)
  ]
  chex.assert_trees_all_equal(*(state.params for state in states))


def test_bad_settings_are_told(task):
  for fields, message in (
    ({'rule': 'routed'}, "rule must be one of .* got 'routed'"),
    ({'rank': 0}, r'rank must be in 1 .. 12 .*got 0'),
    ({'rank': 13}, r'rank must be in 1 .. 12 \(members.*got 13'),
    ({'temperature': 0.0}, 'temperature must be > 0, got 0'),
    ({'dtype': jnp.bfloat16}, "dtype must be 'float32' here, got bfloat16"),
    ({'answers': task.answers[:, :3]}, 'identity needs answers of the size'),
    ({'answers': None}, 'needs pairs as inputs, and identity False'),
  ):
    with pytest.raises(UserError, match=message):
      shared_basis.make(task.spec, **({'answers': task.answers} | fields))
  pairs = planted_basis.make(members=4, questions=2, width=3, rank=2).spec
  for rule in ('dot', 'cosine'):
    with pytest.raises(UserError, match=f"must be 'distance' .* got '{rule}'"):
      shared_basis.make(pairs, rule=rule, identity=False)
  vector = task.spec.inputs
  for inputs in (
    {'tokens': vector, 'puzzle': vector},
    jax.ShapeDtypeStruct((2, 6), jnp.float32),
  ):
    with pytest.raises(UserError, match='inputs must be one vector an example'):
      shared_basis.make(task.spec._replace(inputs=inputs), answers=task.answers)
  with pytest.raises(UserError, match='or one with pairs as inputs'):
    alternating.make(digits.make(), rank=2, identity=True)
  with pytest.raises(UserError, match='cosine must be 0 with identity'):
    alternating.make(task, rank=2, identity=True, cosine=0.5)
  with pytest.raises(UserError, match='rank must be in 1'):
    alternating.make(task, rank=13, identity=True)


def test_one_rank_is_chosen():
  assert basis_synthetic.get_config('few,rank2').model.rank == 2
  with pytest.raises(UserError, match='choose one of rank2, rank8'):
    basis_synthetic.get_config('rank2,rank8')


@pytest.mark.slow
def test_members_are_told_by_pairs_once_the_basis_is_found():
  task = planted_basis.make(members=20, questions=5, width=6, rank=2)
  model = shared_basis.make(task.spec, rank=2, identity=False)
  init, make_step = alternating.make(
    task, rank=2, identity=False, ridge=1e-3, warm_steps=10
  )
  state, step = init(0), jax.jit(make_step(None))
  for index in range(30):
    state, _ = step(state, task.batch('train', index, 4))
  batch = task.batch('test', 0, task.spec.sizes['test'])
  outputs, _ = model.apply(state.params, {}, batch['inputs'])
  scores_BE = np.asarray(outputs['logits'][-1])
  assert np.mean(scores_BE.argmax(1) == batch['targets']) > 0.9
  # By loops over members.
  w_EDV = np.einsum(
    'er,rdv->edv',
    np.float64(state.params['coefficients']),
    np.float64(state.params['basis']),
  )
  q, a = np.split(np.float64(batch['inputs'][3]), 2)
  expected = [-np.sum((q @ w - a) ** 2) / 0.1 for w in w_EDV]
  np.testing.assert_allclose(scores_BE[3], expected, rtol=1e-3, atol=1e-2)
