"""Specialists: members by row, the start, growth, counts, gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import build
from recursive_weights.derivation import report
from recursive_weights.interfaces import Model, Spec, UserError
from recursive_weights.models import ctm_neurons, specialists
from recursive_weights.recursion import objective
from recursive_weights.tasks import domains
from tests import tiny_members

NAMES = ('LOGOS', 'BIOS', 'OIKOS')
E = len(NAMES)
CTM = {
  'name': 'ctm',
  'width': 16,
  'input_width': 8,
  'heads': 2,
  'memory': 4,
  'ticks': 2,
  'nlm': {'hidden': 2, 'activation': 'relu'},
  'sync_out': 4,
  'sync_action': 4,
}


def rule(pattern, *, basis=0, layers=True, **operator):
  return {
    'pattern': pattern,
    'layers': layers,
    'basis': basis,
    'operator': {'name': ''} | operator,
  }


SMALL = rule('^norm', layers=False, name='offset')
SCHEMES = {
  'independent': ('independent', {}),
  'centre': ('centre', {}),
  'derived': (
    'derived',
    {
      'large': rule('^large/stack', name='residual', rank=2),
      'past': rule('^large/past', layers=False, name='low_rank', rank=2),
      'small': SMALL,
    },
  ),
  'basis': ('derived', {'large': rule('^large/stack', basis=3)}),
}


@pytest.fixture(scope='module')
def task():
  return domains.make(domains=NAMES, length=8, passages=2, rows=2, problems=200)


def make(task, kind, member=tiny_members.FIELDS, **fields):
  scheme, rules = SCHEMES[kind]
  fields = {'scheme': scheme, 'rules': rules} | fields
  return specialists.make(
    task.spec, member=member, build=tiny_members.build, **fields
  )


def moved(params, seed=0, scale=0.1):
  """Every leaf moved, so that members differ."""
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(scale * draw.normal(size=x.shape), x.dtype),
    params,
  )


def drawn(model, batch):
  """Parameters without compiling `init`."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), batch['inputs'])
  )
  return moved(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), 1)


def logits(model, params, batch):
  size = len(batch['weight'])
  outputs, _ = model.apply(
    params, model.carry(params, size), batch['inputs'], key=None, train=False
  )
  return outputs['logits']


def as_domain(batch, index):
  own = np.full_like(batch['inputs']['domain'], index)
  return batch | {'inputs': batch['inputs'] | {'domain': own}}


@pytest.fixture(scope='module', params=SCHEMES)
def case(request, task):
  """A model, its start, moved parameters, and a batch of rows in disorder."""
  model = make(task, request.param)
  batch = task.batch('train', 0, 7)
  start = jax.jit(lambda: model.init(jax.random.key(0), batch['inputs']))()
  order = np.random.default_rng(0).permutation(7)
  batch = jax.tree.map(lambda x: x[order], batch)
  run = jax.jit(lambda params, batch: logits(model, params, batch))
  return request.param, model, start, moved(start), batch, run


def test_derived_members_begin_as_the_centre(case, task):
  name, _, start, _, batch, run = case
  if name == 'independent':
    pytest.skip('independent members have no centre')
  found = [run(start, as_domain(batch, i)) for i in range(E)]
  chex.assert_trees_all_close(found[0], *found[1:], atol=1e-6)
  centre = make(task, 'centre')
  params = {'centre': start['centre']}
  if name == 'basis':
    shapes = jax.eval_shape(
      lambda: centre.init(jax.random.key(0), batch['inputs'])
    )['centre']
    params['centre'] = jax.tree.map(
      lambda x, s: x[0] if x.shape != s.shape else x, start['centre'], shapes
    )
  plain = jax.jit(lambda params: logits(centre, params, batch))(params)
  chex.assert_trees_all_close(found[0], plain, atol=1e-5)


def test_a_row_is_answered_by_its_member_alone(case):
  """Rows in any order against each member by itself."""
  name, _, _, params, batch, run = case
  found_BTV = run(params, batch)[0]
  for i in range(E):
    alone = specialists.select(params, i)
    rows = batch['inputs']['domain'] == i
    expected_BTV = run(alone, as_domain(batch, 0))[0]
    chex.assert_trees_all_close(found_BTV[rows], expected_BTV[rows], atol=1e-5)
  others_BTV = run(params, as_domain(batch, 1))[0]
  differ = bool((jnp.abs(others_BTV - found_BTV) > 1e-4).any())
  assert differ == (name != 'centre')


def test_a_new_member_leaves_the_others_as_they_are(case):
  name, _, start, params, batch, run = case
  if name == 'centre':
    pytest.skip('the centre has no members')
  more = specialists.grow(params, specialists.select(start, 0))
  chex.assert_trees_all_equal(run(more, batch), run(params, batch))
  if name != 'independent':
    centre = specialists.at_start(params, start)
    chex.assert_trees_all_close(
      run(more, as_domain(batch, E)),
      run(centre, as_domain(batch, 0)),
      atol=1e-6,
    )


def test_a_text_goes_to_those_who_lose_least_on_it(case, task):
  """Members' losses one by one, shares by loops in float64."""
  _, model, _, params, batch, run = case
  size = max(specialists.count(params), 1)

  @jax.jit
  def judge(params, batch):
    return specialists.judge(
      model,
      params,
      batch['inputs'],
      lambda outputs: task.loss(outputs['logits'][0], batch)[0],
    )

  found_EB = judge(params, batch)
  assert found_EB.shape == (size, 7)
  for i in range(size):
    logits_BTV = run(params, as_domain(batch, i))[0]
    expected_B = task.loss(logits_BTV, batch)[0]
    np.testing.assert_allclose(found_EB[i], expected_B, rtol=1e-4)
  loss_EB = 8 * np.asarray(found_EB)
  for k in range(1, size + 1):
    member_KB, log_KB = specialists.route(loss_EB, k)
    assert member_KB.shape == log_KB.shape == (k, 7)
    for b in range(7):
      order = sorted(range(size), key=lambda i, b=b: loss_EB[i, b])
      assert member_KB[:, b].tolist() == order[:k]
      p_E = np.exp(-np.float64(loss_EB[:, b]))
      p_K = (p_E / p_E.sum())[order[:k]]
      np.testing.assert_allclose(np.exp(log_KB[:, b]), p_K, rtol=1e-4)
  for k in (0, size + 1):
    with pytest.raises(UserError, match=f'k must be in 1 .. {size}, got {k}'):
      specialists.route(loss_EB, k)


def test_routing_keeps_what_is_far_behind_and_the_order_of_equals():
  loss_EB = np.array([[900.0, 5.0], [300.0, 5.0], [800.0, 5.0]])
  member_KB, log_KB = specialists.route(loss_EB, 3)
  assert member_KB.T.tolist() == [[1, 2, 0], [0, 1, 2]]
  # A share of exp(-600) is no zero: what follows may speak for that member.
  np.testing.assert_allclose(log_KB[:, 0], [0, -500, -600], atol=1e-4)
  np.testing.assert_allclose(log_KB[:, 1], np.log(1 / 3), rtol=1e-6)


def test_every_parameter_has_a_gradient_and_only_of_its_rows(case, task):
  name, model, _, params, batch, _ = case
  judge = objective.make('last')

  @jax.jit
  def gradient(params, batch):
    def loss(params):
      size = len(batch['weight'])
      outputs, _ = model.apply(
        params,
        model.carry(params, size),
        batch['inputs'],
        key=jax.random.key(1),
        train=True,
      )
      return judge.score(outputs, task.loss, batch)[0]

    return jax.grad(loss)(params)

  found = gradient(params, batch)
  chex.assert_tree_all_finite(found)
  still = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, x in jax.tree_util.tree_leaves_with_path(found)
    if not (x != 0).any()
  ]
  assert still == []
  if name == 'centre':
    return
  only = gradient(params, as_domain(batch, 1))['members']
  for x in jax.tree.leaves(only):
    assert not (x[0] != 0).any() and not (x[2] != 0).any()


def test_the_carry_goes_on_by_row(case):
  """Two halves of a text, the state handed on, are the whole text."""
  name, model, _, params, batch, run = case
  if name != 'derived':
    pytest.skip('one scheme tells: the carry is the same code for all')
  carry, parts = model.carry(params, 7), []
  assert all(x.shape[0] == 7 for x in jax.tree.leaves(carry))
  read = jax.jit(lambda carry, x: model.apply(params, carry, x))
  for half in (slice(0, 4), slice(4, 8)):
    inputs = {
      n: x if n == 'domain' else x[:, half] for n, x in batch['inputs'].items()
    }
    outputs, carry = read(carry, inputs)
    parts.append(outputs['logits'])
  whole = run(params, batch)
  chex.assert_trees_all_close(jnp.concatenate(parts, 2), whole, atol=1e-4)


def test_copies_of_the_centre_are_members_of_their_own(task):
  batch = task.batch('train', 0, 6)
  apart, shared = (make(task, 'derived', apart=a) for a in (True, False))
  params = drawn(apart, batch)
  assert set(params) == {'centres', 'members'}
  runs = [
    jax.jit(lambda params, batch, m=m: logits(m, params, batch))
    for m in (apart, shared)
  ]
  for i in range(E):
    one = {
      'centre': jax.tree.map(lambda x, i=i: x[i], params['centres']),
      'members': params['members'],
    }
    found, expected = (
      run(p, as_domain(batch, i))
      for run, p in zip(runs, (params, one), strict=True)
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_the_counts_are_those_of_the_document():
  """Neuron models of width 128, memory 15, four hidden: 8,832 parameters."""
  neurons = jax.eval_shape(
    lambda key: ctm_neurons.init(key, 128, 15, hidden=4, activation='relu'),
    jax.random.key(0),
  )
  assert report.count(neurons) == 8_832
  text = {
    'tokens': jax.ShapeDtypeStruct((4,), jnp.int32),
    'domain': jax.ShapeDtypeStruct((), jnp.int32),
  }
  spec = Spec(text, (), 5, {}, domains=tuple('abcdefg'))
  member = CTM | {'width': 128, 'memory': 15}
  member['nlm'] = {'hidden': 4, 'activation': 'relu'}

  def count(rules):
    model = specialists.make(
      spec, member=member, build=build.make, scheme='derived', rules=rules
    )
    inputs = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((7, *x.shape), x.dtype), text
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))
    w1 = report.count(shapes['centre']['nlm']['w1'])
    w1 += report.count(shapes['members'].get('nlm_w1', {}))
    return w1, report.count((shapes['centre']['nlm'], shapes['members']))

  w1 = rule('^nlm/w1$', layers=False, name='residual', rank=1)
  biases = rule('^nlm/b', layers=False, name='offset')
  spectral = rule('^nlm/w1$', layers=False, name='spectral', kind='scale')
  assert count({'w1': w1}) == (9_472, 10_624)
  assert (
    count({'w1': w1, 'b2': rule('^nlm/b2$', layers=False, name='offset')})[1]
    == 11_520
  )
  assert count({'w1': spectral, 'biases': biases})[1] == 13_424 < 13_764


def test_a_continuous_thought_machine_specialises(task):
  chars = domains.make(
    domains=NAMES, length=8, passages=2, rows=2, problems=200, answer='next'
  )
  rules = {'w': rule('^nlm/w|kernel$', layers=False, name='residual', rank=1)}
  model = make(chars, 'derived', CTM, rules=rules)
  batch = chars.batch('train', 0, 6)
  params = drawn(model, batch)
  run = jax.jit(lambda x: model.apply(params, {}, x, key=None, train=True)[0])
  mixed, one = (run(x['inputs']) for x in (batch, as_domain(batch, 1)))
  assert mixed['logits'].shape == (2, 6, 97)
  assert mixed['certainty'].shape == (2, 6)
  same_SB = (mixed['logits'] == one['logits']).all(-1)
  own_B = batch['inputs']['domain'] == 1
  np.testing.assert_array_equal(same_SB, np.stack([own_B] * 2))


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'scheme': 'apart'}, "scheme must be one of .*, got 'apart'"),
    ({'rules': {}}, "rules must be given with scheme 'derived'"),
    ({'scheme': 'centre'}, 'rules must be given'),
    ({'rules': {'a': {'pattern': '.'}}}, 'rules.a must have the fields'),
    ({'rules': {'a': rule('none', basis=2)}}, "'none' meets no parameter"),
    ({'rules': {'a': rule('norm', basis=2), 'b': SMALL}}, 'is met by rules'),
    ({'rules': {'a': rule('norm')}}, 'basis > 0 or the name of an operator'),
    (
      {'rules': {'a': rule('norm') | {'operator': {'rank': 2}}}},
      r"rules.a.operator must have a name .*, got \{'rank': 2\}",
    ),
    ({'rules': {'a': rule('(', basis=2)}}, 'no regular expression'),
    ({'scheme': 'independent', 'rules': {}, 'apart': True}, 'apart must be'),
  ],
)
def test_errors_say_what_to_do(task, fields, message):
  with pytest.raises(UserError, match=message):
    make(task, 'derived', **fields)


def test_two_leaves_of_one_name_are_refused(task):
  same = {'a': {'b_c': jnp.zeros(3)}, 'a_b': {'c': jnp.zeros(3)}}
  member = Model(lambda key, inputs: same, None, None)
  with pytest.raises(UserError, match='a/b_c and a_b/c would both be stored'):
    specialists.make(
      task.spec,
      member={'name': 'twins'},
      build=lambda *arguments, **fields: member,
      rules={'a': rule('^a', basis=2, layers=False)},
    )


def test_a_basis_of_zeros_can_learn():
  """Coefficients have a gradient although the leaf is zero."""
  bases = specialists._bases(jax.random.key(0), jnp.zeros((4, 3)), 3)
  assert not (bases[0] != 0).any() and (bases[1:] != 0).all()
  operator = specialists._combination(3)
  theta = operator.init(jax.random.key(0), bases)
  chex.assert_trees_all_equal(operator.apply(theta, bases), bases[0])
  slope = jax.grad(lambda theta: operator.apply(theta, bases).sum())(theta)
  assert (slope['coefficients'][1:] != 0).all()
  large = specialists._bases(jax.random.key(0), jnp.full((99, 99), 5.0), 2)
  np.testing.assert_allclose(large[1].std(), 5, rtol=0.03)


def test_a_task_without_domains_is_refused(task):
  spec = task.spec._replace(domains=())
  with pytest.raises(UserError, match='need a task whose inputs have a domain'):
    specialists.make(spec, member=tiny_members.FIELDS, build=tiny_members.build)
