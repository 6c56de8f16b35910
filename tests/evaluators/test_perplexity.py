"""Perplexity against one walk over the whole text, and samples of text."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import accuracy, perplexity, samples
from recursive_weights.interfaces import UserError
from recursive_weights.recursion import objective
from recursive_weights.tasks import parity, text
from tests import tiny_decoder

T = 8
LAST = objective.last()


@pytest.fixture(scope='module')
def case(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  documents = [''.join(rng.choice(list('abcd'), 30)) for _ in range(100)]
  path.write_text('\n\n'.join(documents))
  task = text.make(path=str(path), separator='\n\n', length=T)
  model = tiny_decoder.model(task.spec.classes)
  params = model.init(jax.random.key(3), None)
  return task, model, params


def losses(task, model, params, tracks, steps=None, hand_off=True):
  """Loss of every token and the tokens read up to it, by plain loops."""
  rows = task.batch('test', 0, task.spec.sizes['test'])
  count = -(-len(rows['weight']) // tracks)
  losses, contexts = [], []
  run = jax.jit(model.apply, static_argnames=('key', 'train'))
  for track in range(tracks):
    carry, context = model.carry(params, 1), 0
    chunks = range(track * count, min((track + 1) * count, len(rows['weight'])))
    for chunk in list(chunks)[:steps]:
      one = jax.tree.map(lambda x, i=chunk: x[i : i + 1], rows)
      if not hand_off:
        carry, context = model.carry(params, 1), 0
      outputs, carry = run(params, carry, one['inputs'], key=None, train=False)
      logits = np.asarray(outputs['logits'][0, 0], np.float64)
      log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      for t in range(one['length'][0]):
        context = 1 if one['inputs']['resets'][0, t] else context + 1
        losses.append(-log_p[t, one['targets'][0, t]])
        contexts.append(context)
  return np.array(losses), np.array(contexts)


@pytest.mark.parametrize(
  ('tracks', 'fields'),
  [
    (1, {}),
    (5, {'bins': (1, 4, 20)}),
    (5, {'bins': (0, 6, 1000), 'hand_off': False}),
    (4, {'max_batches': 2, 'bins': (3,)}),
  ],
)
def test_perplexity_is_a_walk_over_the_text(case, tracks, fields):
  task, model, params = case
  evaluate = perplexity.make(model, task, LAST, batch_size=tracks, **fields)
  found = evaluate(params, jax.random.key(0))
  loss, context = losses(
    task,
    model,
    params,
    tracks,
    steps=fields.get('max_batches'),
    hand_off=fields.get('hand_off', True),
  )
  mean = loss.mean()
  np.testing.assert_allclose(found['test/loss'], mean, rtol=1e-5)
  np.testing.assert_allclose(found['test/perplexity'], np.exp(mean), rtol=1e-4)
  np.testing.assert_allclose(
    found['test/bits_per_character'], mean / math.log(2), rtol=1e-5
  )
  assert 0 < found['test/accuracy'] < 1
  bins = [*fields.get('bins', ()), 10**9]
  for least, most in itertools.pairwise(bins):
    inside = (context >= least) & (context < most)
    if inside.any():
      np.testing.assert_allclose(
        found[f'test/loss@{least}'], loss[inside].mean(), rtol=1e-5
      )
    else:
      assert math.isnan(found[f'test/loss@{least}'])


def test_without_hand_off_it_is_the_accuracy_evaluator(case):
  """The same means over tokens, the short last row counted for what it is."""
  task, model, params = case
  key = jax.random.key(0)
  plain = accuracy.make(model, task, LAST, batch_size=7)(params, key)
  fresh = perplexity.make(model, task, LAST, batch_size=7, hand_off=False)
  found = fresh(params, key)
  for name, value in plain.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5)
  carried = perplexity.make(model, task, LAST, batch_size=7)(params, key)
  assert abs(carried['test/loss'] - plain['test/loss']) > 1e-4


def test_bytes_are_their_own_unit(case, tmp_path):
  (tmp_path / 'a.txt').write_text('abcd' * 100)
  task = text.make(
    path=str(tmp_path), split_by='position', tokens='bytes', length=T
  )
  model = tiny_decoder.model(task.spec.classes)
  evaluate = perplexity.make(model, task, LAST, batch_size=2)
  found = evaluate(model.init(jax.random.key(0), None), jax.random.key(0))
  assert 'test/bits_per_byte' in found


def test_perplexity_errors(case):
  task, model, _ = case
  with pytest.raises(UserError, match='is a text'):
    perplexity.make(model, parity.make(), LAST, batch_size=2)
  with pytest.raises(UserError, match='held out'):
    perplexity.make(model, task, LAST, batch_size=2, splits=('train',))
  with pytest.raises(UserError, match=r'rising numbers >= 0, got \(4, 2\)'):
    perplexity.make(model, task, LAST, batch_size=2, bins=(4, 2))


def sampler(case, **fields):
  task, model, _ = case
  return samples.make(
    model, task, LAST, batch_size=2, **{'count': 30, 'copies': 3} | fields
  )


def test_samples_are_written_for_people(case, tmp_path):
  _, _, params = case
  # All tokens are as likely, so that texts differ.
  params = params | {'head': jnp.zeros_like(params['head'])}
  evaluate = sampler(
    case, output_dir=str(tmp_path), prompts=('', 'ab'), temperature=1.0
  )
  found = evaluate(params, jax.random.key(1))
  assert set(found) == {'samples/distinct'}
  assert 0 < found['samples/distinct'] <= 1
  texts = (tmp_path / 'samples.txt').read_text().split('\n' + '-' * 40 + '\n')
  assert len(texts) == 6
  assert all(x.startswith('ab') for x in texts[3:])
  assert len(set(texts)) == 6  # copies have their own seeds
  assert all(set(x) <= set('abcd\n') and len(x) <= 33 for x in texts)
  again = evaluate(params, jax.random.key(1))
  assert again == found


def test_repetition_is_counted(case):
  task, _, params = case
  a = int(task.text.encode('a')[0])
  stuck = params | {
    'head': jnp.zeros_like(params['head']).at[:, a].set(1.0),
    'embed': jnp.ones_like(params['embed']),
    'out': jnp.zeros_like(params['out']),
  }
  evaluate = sampler(case, temperature=0.0)
  # Three texts of 30 times the same: 81 runs of four, one of them distinct.
  assert evaluate(stuck, jax.random.key(0)) == {'samples/distinct': 1 / 81}


def test_a_prompt_that_the_text_lacks_is_left_out(case, tmp_path, caplog):
  _, _, params = case
  with caplog.at_level('WARNING', logger='recursive_weights'):
    evaluate = sampler(case, prompts=('', 'aX'), output_dir=str(tmp_path))
  assert "without a prompt: 'aX' cannot be written" in caplog.text
  evaluate(params, jax.random.key(0))
  texts = (tmp_path / 'samples.txt').read_text().split('\n' + '-' * 40 + '\n')
  assert len(texts) == 3


def test_samples_errors(case):
  task, model, _ = case
  with pytest.raises(UserError, match='language model'):
    samples.make(model._replace(decoder=None), task, LAST, batch_size=1)
  with pytest.raises(UserError, match=r"prompts: 'aX' .*'X'.*; 'Y' "):
    sampler(case, prompts=('aX', 'Y'))
  with pytest.raises(UserError, match='prompts'):
    sampler(case, prompts=())
  with pytest.raises(UserError, match='copies and count must be > 0, got 0'):
    sampler(case, copies=0)
