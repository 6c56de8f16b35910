"""Synchronisation against loops; what a member has learnt stays its own."""

import dataclasses
import functools
import importlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recursive_weights import build, config
from recursive_weights.interfaces import UserError
from recursive_weights.models import specialists
from recursive_weights.recursion import objective
from recursive_weights.tasks import domains
from recursive_weights.training import checkpoints, federation
from recursive_weights.training import state as state_lib
from tests import tiny_members

NAMES = ('LOGOS', 'BIOS', 'PSYCHE')
E = len(NAMES)
SIZE = 12
LAST = objective.make('last')
SHARE = np.array([0.5, 0.2, 0.3])


@dataclasses.dataclass
class Case:
  task: object
  model: object
  start: object
  trained: object
  step: object
  folder: object
  together: object = None


def synchroniser(case, topology='hub', rate=1.0, folder=''):
  _, function = federation.make(
    case.model,
    case.task,
    LAST,
    every=20,
    topology=topology,
    rate=rate,
    temperature=0.1,
    batches=2,
    batch_size=SIZE,
    output_dir=str(folder),
  )
  return function


@pytest.fixture(scope='module')
def case(tmp_path_factory):
  """Members trained apart for 120 steps, synchronised at every 20th."""
  task = domains.make(domains=NAMES, length=8, passages=4, rows=2, problems=400)
  operator = {'name': 'residual', 'kind': 'low_rank', 'rank': 2}
  rules = {
    'stack': {
      'pattern': '^large',
      'layers': False,
      'basis': 0,
      'operator': operator,
    },
    'table': {
      'pattern': '^table',
      'layers': False,
      'basis': 0,
      'operator': {'name': 'low_rank', 'rank': 2},
    },
  }
  model = specialists.make(
    task.spec,
    member=tiny_members.FIELDS,
    build=tiny_members.build,
    rules=rules,
    apart=True,
  )
  inputs = task.batch('train', 0, SIZE)['inputs']
  optimizer = optax.adam(1e-2)
  init = state_lib.make_init(
    model,
    optimizer,
    inputs=inputs,
    batch_size=SIZE,
    ema_decay=0.9,
    keep_carry=False,
  )
  step = jax.jit(
    state_lib.make_step(
      model,
      task,
      LAST,
      optimizer,
      schedule=lambda t: jnp.float32(1e-2),
      ema_decay=0.9,
    )
  )
  start = jax.jit(init)(0)
  case = Case(task, model, start, start, step, tmp_path_factory.mktemp('run'))
  case.together = synchroniser(case, folder=case.folder)
  state = start
  for index in range(120):
    state, _ = step(state, task.batch('train', index, SIZE))
    if index % 20 == 19:
      state = case.together(state)
  case.trained = state
  return case


def test_every_domain_is_judged(case):
  """Held-out rows lie domain by domain: the first ones are of one alone."""
  total = case.task.spec.sizes['validation']
  for count in (E, 6, 10, total, 10 * total):
    rows = federation.spaced(case.task, count)['inputs']['domain']
    assert len(rows) == min(count, total)
    counts = np.bincount(rows, minlength=E)
    assert counts.min() > 0 and counts.max() - counts.min() <= 1
  with pytest.raises(UserError, match='a row to each of 3 domains, got 2 rows'):
    federation.spaced(case.task, E - 1)


def test_copies_are_judged_on_those_rows(case):
  """Against each copy by itself on all validation rows."""
  params, ema = (moved(case.start.params, seed) for seed in (1, 2))
  state = case.trained._replace(params=params, ema=ema, step=jnp.int32(200))
  case.together(state)
  path = case.folder / 'federation.jsonl'
  line = json.loads(path.read_text().splitlines()[-1])
  centres = specialists.at_start(state.ema, case.start.params)
  batch = case.task.batch('validation', 0, case.task.spec.sizes['validation'])
  read = reader(case.model, len(batch['weight']))
  for index, name in enumerate(NAMES):
    own = np.full_like(batch['inputs']['domain'], index)
    outputs, _ = read(centres, batch['inputs'] | {'domain': own})
    loss_B, _ = case.task.loss(LAST.answer(outputs), batch)
    np.testing.assert_allclose(line[f'loss/{name}'], loss_B.mean(), rtol=1e-5)


def moved(tree, seed=0):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), tree
  )


@pytest.mark.parametrize('rate', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('topology', federation.TOPOLOGIES)
def test_mixing_is_the_sum_by_loops(case, topology, rate):
  params = moved(case.start.params)
  matrix_EE = federation.mixing(SHARE, topology, rate)
  np.testing.assert_allclose(matrix_EE.sum(1), 1)
  found = federation.synchronise(params, matrix_EE)
  chex.assert_trees_all_equal(found['members'], params['members'])
  old, new = (
    np.asarray(tree['centres']['large']['past'], np.float64)
    for tree in (params, found)
  )
  for i in range(E):
    mean = sum(SHARE[j] * old[j] for j in range(E))
    if topology == 'ring':
      mean = (old[(i - 1) % E] + old[(i + 1) % E]) / 2
    expected = (1 - rate) * old[i] + rate * mean
    np.testing.assert_allclose(new[i], expected, atol=1e-6)


def test_a_hub_at_rate_1_ends_drift_and_a_ring_keeps_the_mean(case):
  params = moved(case.start.params)
  assert (federation.drift(params) > 0.1).all()
  hub = federation.synchronise(params, federation.mixing(SHARE, 'hub', 1.0))
  np.testing.assert_allclose(federation.drift(hub), 0, atol=1e-6)
  ring = federation.synchronise(params, federation.mixing(SHARE, 'ring', 0.2))
  mean = [
    jax.tree.map(lambda x: x.mean(0), tree['centres'])
    for tree in (params, ring)
  ]
  chex.assert_trees_all_close(*mean, atol=1e-6)
  assert (federation.drift(ring) < federation.drift(params)).all()


@pytest.mark.parametrize('topology', federation.TOPOLOGIES)
def test_who_is_gone_neither_gives_nor_takes(case, topology):
  params = moved(case.start.params)
  lost = params | {
    'centres': jax.tree.map(lambda x: x.at[1].set(jnp.nan), params['centres'])
  }
  share_E = federation.shares(np.array([1.0, np.nan, 1.2]), 0.5)
  assert share_E[1] == 0 and np.isclose(share_E.sum(), 1)
  found = federation.synchronise(
    lost, federation.mixing(share_E, topology, 0.5)
  )
  two = jax.tree.map(lambda x: x[np.array([0, 2])], params)
  expected = federation.synchronise(
    two, federation.mixing(share_E[[0, 2]], topology, 0.5)
  )
  rest = jax.tree.map(lambda x: x[np.array([0, 2])], found)
  chex.assert_trees_all_close(rest, expected, atol=1e-6)
  assert jnp.isnan(found['centres']['norm'][1]).all()


def test_shares_grow_with_validation():
  share_E = federation.shares(np.array([2.0, 1.9, 2.3]), 0.1)
  np.testing.assert_allclose(share_E.sum(), 1)
  np.testing.assert_allclose(share_E[1] / share_E[0], np.e)
  with pytest.raises(UserError, match='no member has a finite loss'):
    federation.shares(np.array([np.nan]), 0.1)


@functools.cache
def reader(model, rows):
  return jax.jit(
    lambda params, inputs: model.apply(
      params, model.carry(params, rows), inputs
    )
  )


def own_losses(case, params):
  """Mean loss of the validation rows of every domain by its own member."""
  batch = case.task.batch('validation', 0, case.task.spec.sizes['validation'])
  read = reader(case.model, len(batch['weight']))
  outputs, _ = read(params, batch['inputs'])
  loss_B, _ = case.task.loss(LAST.answer(outputs), batch)
  return np.asarray(loss_B).reshape(E, -1).mean(1)


def test_after_a_synchronisation_specialists_still_beat_the_centre(case):
  params = case.trained.params
  np.testing.assert_allclose(federation.drift(params), 0, atol=1e-6)
  centre = specialists.at_start(params, case.start.params)
  own_E, centre_E = own_losses(case, params), own_losses(case, centre)
  start_E = own_losses(case, case.start.params)
  assert (own_E < centre_E - 0.02).all()
  assert (own_E < start_E - 0.5).all()


def test_operators_and_moments_stay_and_the_average_goes_along(case):
  state, _ = case.step(case.trained, case.task.batch('train', 200, SIZE))
  found = case.together(state)
  for before, after in ((state.params, found.params), (state.ema, found.ema)):
    chex.assert_trees_all_equal(before['members'], after['members'])
    assert (np.asarray(federation.drift(before)) > 1e-4).all()
    np.testing.assert_allclose(federation.drift(after), 0, atol=1e-6)
  chex.assert_trees_all_equal(state.opt_state, found.opt_state)
  chex.assert_trees_all_equal(state.step, found.step)


def without(state, index):
  """A member's weights, average and moments are gone."""

  def killed(path, x):
    names = {getattr(part, 'key', None) for part in path}
    gone = names & set(specialists.BY_MEMBER)
    return x.at[index].set(jnp.nan) if gone else x

  return jax.tree_util.tree_map_with_path(killed, state)


def test_who_rejoins_has_lost_nothing_and_the_others_stay(case):
  saved = case.trained
  state, _ = case.step(saved, case.task.batch('train', 300, SIZE))

  back = federation.rejoin(without(state, 1), 1, saved)
  others = np.array([0, 2])
  for part in specialists.BY_MEMBER:
    for name in ('params', 'ema'):
      now, then, was = (getattr(x, name)[part] for x in (back, saved, state))
      chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1], now), jax.tree.map(lambda x: x[1], then)
      )
      chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[others], now),
        jax.tree.map(lambda x: x[others], was),
      )
  moments = [x.opt_state[0].mu['members'] for x in (back, saved)]
  chex.assert_trees_all_equal(
    *(jax.tree.map(lambda x: x[1], m) for m in moments)
  )
  after, metrics = case.step(back, case.task.batch('train', 301, SIZE))
  assert metrics['finite'] == 1
  chex.assert_tree_all_finite(after.params)


@pytest.fixture(scope='module')
def stored(case):
  """Members whose centres have drifted apart, and their checkpoint on disk."""
  state = case.trained
  for index in range(120, 125):
    state, _ = case.step(state, case.task.batch('train', index, SIZE))
  saved = checkpoints.open_folder(case.folder, {'name': 'tiny'})
  saved.save(state, {})
  saved.wait()
  saved.close()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  found, folder = checkpoints.load_state(case.folder, abstract)
  assert folder.name == '125' and (folder / 'params').is_dir()
  assert (federation.drift(found.params) > 1e-3).all()
  return state, found


def test_who_comes_back_from_a_checkpoint_was_never_away(case, stored):
  """Lost between two synchronisations: what follows has the same bits."""
  state, saved = stored
  back = federation.rejoin(without(state, 1), 1, saved)
  found, expected = case.together(back), case.together(state)
  chex.assert_trees_all_equal(found, expected)
  np.testing.assert_array_equal(
    own_losses(case, found.params), own_losses(case, expected.params)
  )


def test_who_misses_a_synchronisation_comes_back_with_its_operators(
  case, stored
):
  state, saved = stored
  lost = case.together(without(state, 1))
  assert jnp.isnan(lost.params['centres']['norm'][1]).all()
  back = case.together(federation.rejoin(lost, 1, saved))
  never = case.together(case.together(state))
  for found, expected in ((back.params, never.params), (back.ema, never.ema)):
    chex.assert_trees_all_equal(found['members'], expected['members'])
    np.testing.assert_allclose(federation.drift(found), 0, atol=1e-6)
  chex.assert_trees_all_equal(back.opt_state, never.opt_state)
  # Shares of the centre differ by one round, what members know does not.
  found_E, never_E = (own_losses(case, x.params) for x in (back, never))
  np.testing.assert_allclose(found_E, never_E, atol=0.02)
  centre = specialists.at_start(back.params, case.start.params)
  assert found_E[1] < own_losses(case, centre)[1] - 0.02


def test_a_newcomer_begins_with_the_mean_of_both(case):
  params = moved(case.start.params)
  new = federation.aggregate(params, SHARE)
  for part in specialists.BY_MEMBER:
    expected = jax.tree.map(
      lambda x: np.einsum('e,e...->...', SHARE, np.asarray(x, np.float64))[
        None
      ],
      params[part],
    )
    chex.assert_trees_all_close(new[part], expected, atol=1e-5)
  assert specialists.count(specialists.grow(params, new)) == E + 1


def test_the_log_has_a_line_a_synchronisation(case):
  path = case.folder / 'federation.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [x['step'] for x in lines[:6]] == [20, 40, 60, 80, 100, 120]
  for line in lines:
    assert np.isclose(sum(line[f'share/{name}'] for name in NAMES), 1)
    assert all(line[f'drift/{name}'] > 0 for name in NAMES)
  # Going on from an earlier step writes its lines again.
  again = case.trained._replace(step=jnp.int32(80))
  case.together(again)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [20, 40, 60, 80]


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'topology': 'star'}, "topology must be one of .* got 'star'"),
    ({'rate': 1.5}, r'rate must lie in \[0, 1\], got 1.5'),
    ({'temperature': 0.0}, 'temperature must be > 0, got 0.0'),
    ({'batches': 0}, 'batches > 0, got 20 and 0'),
  ],
)
def test_errors_say_what_to_do(fields, message):
  known = {'every': 20, 'topology': 'hub', 'rate': 1.0, 'temperature': 0.1}
  with pytest.raises(UserError, match=message):
    federation.check(**(known | {'batches': 1} | fields))


def test_build_synchronises_copies_alone_and_is_off_by_default():
  module = importlib.import_module('configs.specialists_lm')
  fields = config.to_data(module.get_config('smoke,hub'))
  ((every, _),) = build.build(fields).every
  assert every == fields['federation']['every']
  off = config.to_data(module.get_config('smoke'))
  assert build.build(off).every == ()
  with pytest.raises(UserError, match='copies of the centre'):
    build.build(off | {'federation': fields['federation']})
  with pytest.raises(UserError, match='num_seeds = 1, got 2'):
    build.build(fields | {'num_seeds': 2})
