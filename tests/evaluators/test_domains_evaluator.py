"""Members on domains and routing, against loops over rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import _centroids, domains
from recursive_weights.interfaces import Model, UserError
from recursive_weights.recursion import objective
from recursive_weights.tasks import domains as domains_task
from recursive_weights.tasks import parity

NAMES = ('LOGOS', 'BIOS', 'PSYCHE')
E, T, ROWS, PASSAGES = 3, 8, 4, 5
LAST = objective.make('last')


@pytest.fixture(scope='module')
def task():
  return domains_task.make(
    domains=NAMES, length=T, passages=PASSAGES, rows=ROWS, problems=400
  )


def unigrams():
  """A model whose member i says how often characters are: `[E, V]`."""

  def apply(params, carry, inputs, *, key=None, train=False):
    table_BV = params['members']['table'][inputs['domain']]
    logits_BTV = jnp.tile(table_BV[:, None], (1, T, 1))
    return {'logits': logits_BTV[None]}, carry

  return Model(None, lambda params, size: {}, apply)


def counted(task):
  batch = task.batch('train', 0, 300)
  table_EV = np.full((E, task.spec.classes), 0.5)
  for domain, row in zip(
    batch['inputs']['domain'], batch['targets'], strict=True
  ):
    np.add.at(table_EV[domain], row, 1)
  logits_EV = np.log(table_EV / table_EV.sum(1, keepdims=True))
  return {'members': {'table': jnp.asarray(logits_EV, jnp.float32)}}


def evaluate(task, params, **fields):
  fields = {'batch_size': 7, 'top_k': (1, 3), 'known': 300} | fields
  made = domains.make(unigrams(), task, LAST, **fields)
  return made(params, jax.random.key(0))


def test_the_matrix_and_routing_are_those_of_loops(task, tmp_path):
  params = counted(task)
  found = evaluate(task, params, output_dir=str(tmp_path))
  rows = task.batch('test', 0, task.spec.sizes['test'])
  logits_EV = np.asarray(params['members']['table'], np.float64)
  loss_EN = np.array(
    [[-logits_EV[e][row].mean() for row in rows['targets']] for e in range(E)]
  )
  domain_N = rows['inputs']['domain']
  matrix_EE = np.array(
    [[loss_EN[e, domain_N == d].mean() for d in range(E)] for e in range(E)]
  )
  np.testing.assert_allclose(found['test/loss'], matrix_EE.diagonal().mean())
  np.testing.assert_allclose(found['test/all'], matrix_EE.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    found['test/margin'],
    matrix_EE.mean() - matrix_EE.diagonal().mean(),
    rtol=1e-5,
  )
  for e, name in enumerate(NAMES):
    np.testing.assert_allclose(
      found[f'test/loss/{name}'], matrix_EE[e, e], rtol=1e-6
    )
  stored = json.loads((tmp_path / 'domains.json').read_text())
  np.testing.assert_allclose(stored['loss'], matrix_EE, atol=1e-4)

  right, losses, mixtures = [], [], []
  for first in range(0, len(domain_N), ROWS):
    seen_E = T * loss_EN[:, first : first + 2].sum(1)
    left_E = T * loss_EN[:, first + 2 : first + 4].sum(1)
    chosen = int(np.argmin(seen_E))
    right.append(chosen == domain_N[first])
    losses.append(left_E[chosen] / (2 * T))
    p_E = np.exp(seen_E.min() - seen_E)
    mixtures.append(-np.log((p_E / p_E.sum()) @ np.exp(-left_E)) / (2 * T))
  np.testing.assert_allclose(found['router/top@1'], np.mean(right))
  np.testing.assert_allclose(found['router/loss'], np.mean(losses), rtol=1e-6)
  np.testing.assert_allclose(
    found['router/mixture_loss'], np.mean(mixtures), rtol=1e-6
  )
  assert found['router/top@3'] == 1
  assert found['parameters'] == logits_EV.size
  assert found['parameters/member'] == task.spec.classes


def test_the_centre_is_judged_without_its_members(task):
  table_EV = counted(task)['members']['table']

  def init(key, inputs):
    del key, inputs
    return {'centre': {'base': table_EV[0]}, 'members': {'table': 0 * table_EV}}

  def apply(params, carry, inputs, *, key=None, train=False):
    table_BV = params['members']['table'][inputs['domain']]
    logits_BV = params['centre']['base'][None] + table_BV
    return {'logits': jnp.tile(logits_BV[None, :, None], (1, 1, T, 1))}, carry

  model = Model(init, lambda params, size: {}, apply)
  params = init(None, None)
  params['members'] = {'table': table_EV - table_EV[:1]}
  options = {'batch_size': 7, 'top_k': (1,), 'known': 300}
  found = domains.make(model, task, LAST, **options)(params, jax.random.key(0))
  alone = {'members': {'table': jnp.tile(table_EV[:1], (E, 1))}}
  centre = evaluate(task, alone)
  for name in NAMES:
    np.testing.assert_allclose(
      found[f'test/centre_loss/{name}'], centre[f'test/loss/{name}'], rtol=1e-5
    )
  np.testing.assert_allclose(
    found['test/centre_loss'], centre['test/loss'], rtol=1e-5
  )
  np.testing.assert_allclose(
    found['test/loss'], evaluate(task, counted(task))['test/loss'], rtol=1e-5
  )


def test_members_that_know_their_domain_are_told_from_those_that_do_not(task):
  good = evaluate(task, counted(task))
  assert good['test/margin_low'] > 0.1 and good['test/least_margin'] > 3
  assert good['router/top@1'] > 0.8
  same = jax.tree.map(lambda x: jnp.tile(x[:1], (E, 1)), counted(task))
  bad = evaluate(task, same)
  assert abs(bad['test/margin']) < 1e-6
  np.testing.assert_allclose(bad['router/top@1'], 1 / E)
  swapped = jax.tree.map(lambda x: x[::-1], counted(task))
  assert evaluate(task, swapped)['test/least_margin'] < -3


def test_centroids_tell_texts_by_what_only_one_domain_says():
  known = [
    [f'the {word} is {word}' for _ in range(3)] for word in ('apple', 'atom')
  ]
  for kind in _centroids.FEATURES:
    share_BE = _centroids.shares(['an atom is', 'apple is the'], known, kind)
    np.testing.assert_allclose(share_BE.sum(1), 1, rtol=1e-6)
    assert share_BE.argmax(1).tolist() == [1, 0]
  blank_BE = _centroids.shares(['zzz'], known, 'words')
  np.testing.assert_allclose(blank_BE, 0.5)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'split': 'train'}, "split must be validation or test, got 'train'"),
    ({'passage': 3}, 'passage must be even and divide the 20 rows'),
    ({'known': 2}, 'known = 2: a batch must have a row of each of 3 domains'),
    ({'known': 10**6}, 'known = 1000000: the training text of LOGOS has'),
    ({'top_k': (4,)}, r'top_k must lie in \[1, 3\], got \(4,\)'),
  ],
)
def test_errors_say_what_to_do(task, fields, message):
  with pytest.raises(UserError, match=message):
    domains.make(unigrams(), task, LAST, batch_size=4, **fields)


def test_a_task_without_domains_is_refused():
  with pytest.raises(UserError, match='needs a task of text with domains'):
    domains.make(unigrams(), parity.make(), LAST, batch_size=4)
