"""Running parity: targets by a loop, disjoint splits, loss in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import parity


def rows_of(array_BT):
  return {tuple(row) for row in array_BT.tolist()}


def everything(task, split):
  return task.batch(split, 0, task.spec.sizes[split])['inputs']


@pytest.mark.parametrize('length', [3, 12, 70])
def test_targets_by_a_loop(length):
  for split in ('train', 'test'):
    task = parity.make(length=length)
    batch = task.batch(split, 0, min(8, task.spec.sizes[split] or 8))
    for bits, targets in zip(batch['inputs'], batch['targets'], strict=True):
      product = 1
      for bit, target in zip(bits, targets, strict=True):
        product *= -1 if bit else 1
        assert target == (product < 0)


def test_length_12_exhaustively():
  """The splits of all 4,096 sequences are disjoint and leave none out."""
  task = parity.make(length=12)
  held_out = [rows_of(everything(task, s)) for s in ('validation', 'test')]
  assert [len(x) for x in held_out] == [204, 204]
  train = rows_of(task.batch('train', 0, 100_000)['inputs'])
  assert len(train) == 4096 - 408
  assert not train & (held_out[0] | held_out[1])
  assert not held_out[0] & held_out[1]


@pytest.mark.parametrize('length', [2, 3, 5])
def test_short_lengths_have_no_empty_split(length):
  task = parity.make(length=length)
  parts = [rows_of(everything(task, s)) for s in ('validation', 'test')]
  parts.append(rows_of(task.batch('train', 0, 2000)['inputs']))
  assert sum(map(len, parts)) == len(set.union(*parts)) == 2**length
  assert all(parts)


@pytest.mark.parametrize('length', [17, 64, 100])
def test_long_lengths_hold_out_distinct_sequences(length):
  task = parity.make(length=length, eval_size=300)
  parts = [rows_of(everything(task, s)) for s in ('validation', 'test')]
  assert [len(x) for x in parts] == [300, 300]
  parts.append(rows_of(task.batch('train', 0, 20_000)['inputs']))
  assert sum(map(len, parts)) == len(set.union(*parts))
  mean = everything(task, 'test').mean(axis=0)
  np.testing.assert_allclose(mean, 0.5, atol=0.15)


def test_eval_size_caps_short_lengths():
  assert parity.make(length=16, eval_size=50).spec.sizes['test'] == 50
  few = everything(parity.make(length=16, eval_size=50), 'test')
  many = everything(parity.make(length=16, eval_size=90), 'test')
  np.testing.assert_array_equal(few, many[:50])


def test_training_bits_are_fair():
  bits_BT = parity.make(length=64).batch('train', 0, 4000)['inputs']
  np.testing.assert_allclose(bits_BT.mean(axis=0), 0.5, atol=0.04)
  correlation = np.corrcoef(bits_BT.T) - np.eye(64)
  assert np.abs(correlation).max() < 0.1


def test_loss_matches_float64():
  task = parity.make(length=6)
  batch = task.batch('train', 0, 16)
  logits = np.random.default_rng(0).normal(size=(16, 6, 2))
  loss_B, metrics_B = task.loss(jnp.asarray(logits, jnp.float32), batch)
  for b in range(16):
    losses, right = [], []
    for t in range(6):
      target = batch['targets'][b, t]
      losses.append(np.log(np.exp(logits[b, t]).sum()) - logits[b, t, target])
      right.append(logits[b, t].argmax() == target)
    np.testing.assert_allclose(loss_B[b], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics_B['accuracy'][b], np.mean(right))
    assert metrics_B['sequence_accuracy'][b] == all(right)


@pytest.mark.parametrize('wrong', [{'length': 1}, {'eval_size': 0}])
def test_errors_name_the_value(wrong):
  (name, value), *_ = wrong.items()
  with pytest.raises(UserError, match=f'{name} must be .* got {value}'):
    parity.make(**wrong)
