"""Digits: fixed stratified split, patches, shifts, loss."""

import builtins

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import digits


def everything(task, split):
  return task.batch(split, 0, task.spec.sizes[split])


def test_splits_share_out_all_scans_once():
  task = digits.make()
  assert task.spec.sizes == {'train': 1257, 'validation': 180, 'test': 360}
  parts = [everything(task, split) for split in task.spec.sizes]
  rows = np.concatenate(
    [
      np.column_stack([part['inputs'][..., 0], part['targets']])
      for part in parts
    ]
  )
  images_BN, labels_B = datasets.load_digits(return_X_y=True)
  wanted = np.column_stack([images_BN / 8 - 1, labels_B])
  chex.assert_trees_all_equal(
    rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.T)].astype(np.float32)
  )
  for part, size in zip(parts, (1257, 180, 360), strict=True):
    share = np.bincount(part['targets'], minlength=10) / size
    np.testing.assert_allclose(share, np.bincount(labels_B) / 1797, atol=0.008)


def test_training_order_passes_over_all_and_ignores_batch_size():
  task = digits.make(seed=3)
  long = task.batch('train', 0, 2 * 1257)['inputs']
  first, second = long[:1257], long[1257:]
  assert not np.array_equal(first, second)
  for one_pass in (first, second):
    assert len(np.unique(one_pass[..., 0], axis=0)) == 1257
  short = [task.batch('train', i, 100)['inputs'] for i in range(25)]
  np.testing.assert_array_equal(np.concatenate(short), long[:2500])


@pytest.mark.parametrize('patch', [1, 2, 4, 8])
def test_patches_in_reading_order(patch):
  batch = digits.make(patch=patch).batch('test', 0, 5)
  images_BHW = digits.make().batch('test', 0, 5)['inputs'].reshape(-1, 8, 8)
  wide = 8 // patch
  for token in range(wide * wide):
    top, left = patch * (token // wide), patch * (token % wide)
    cut = images_BHW[:, top : top + patch, left : left + patch]
    np.testing.assert_array_equal(batch['inputs'][:, token], cut.reshape(5, -1))
  np.testing.assert_array_equal(
    digits.pixels(batch['inputs'], patch), images_BHW
  )
  assert -1 <= batch['inputs'].min() < batch['inputs'].max() <= 1


@pytest.mark.parametrize('patch', [1, 4])
def test_augment_shifts_each_scan(patch):
  task = digits.make(patch=patch, max_shift=1)
  batch = task.batch('train', 0, 64)
  augmented = task.augment(jax.random.key(1), batch)
  before = digits.pixels(batch['inputs'], patch)
  after = np.asarray(digits.pixels(augmented['inputs'], patch))
  padded = np.pad(before, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
  seen = set()
  for b in range(64):
    found = [
      (i, j)
      for i in range(3)
      for j in range(3)
      if np.array_equal(padded[b, i : i + 8, j : j + 8], after[b])
    ]
    assert found
    seen |= set(found)
  assert len(seen) == 9
  chex.assert_trees_all_equal(augmented['targets'], batch['targets'])


def test_no_shift_is_the_identity():
  task = digits.make(max_shift=0)
  batch = task.batch('train', 0, 4)
  chex.assert_trees_all_equal(task.augment(jax.random.key(0), batch), batch)


def test_loss_matches_float64():
  task = digits.make()
  batch = task.batch('test', 0, 32)
  logits = 3 * np.random.default_rng(0).normal(size=(32, 10))
  loss_B, metrics_B = task.loss(jnp.asarray(logits, jnp.float32), batch)
  picked = logits[np.arange(32), batch['targets']]
  wanted = np.log(np.exp(logits).sum(axis=1)) - picked
  np.testing.assert_allclose(loss_B, wanted, rtol=1e-5)
  np.testing.assert_array_equal(
    metrics_B['accuracy'], logits.argmax(axis=1) == batch['targets']
  )


@pytest.mark.parametrize('wrong', [{'patch': 3}, {'max_shift': -1}])
def test_errors_name_the_value(wrong):
  (name, value), *_ = wrong.items()
  with pytest.raises(UserError, match=f'{name} must be .* got {value}'):
    digits.make(**wrong)


def test_missing_scikit_learn_names_the_extra(monkeypatch):
  plain = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('sklearn'):
      raise ImportError(name)
    return plain(name, *args, **kwargs)

  digits._load.cache_clear()
  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(UserError, match=r'\.\[data\]'):
    digits.make()
