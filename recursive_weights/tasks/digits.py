"""Handwritten digits: 1,797 real 8x8 scans, read as a sequence of patches.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
UCI, 1998; the copy that ships inside scikit-learn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _splits

SIDE = 8
_BACKGROUND = -1.0
_HELD_OUT = 540  # two thirds of them for test, one third for validation


def make(
  *, seed: int = 0, patch: int = 1, max_shift: int = 1
) -> interfaces.Task:
  """Classify a scan of a digit.

  Inputs are float32 `[B, (8 / patch)^2, patch^2]`: patches in reading order,
  pixels in reading order inside a patch, scaled to [-1, 1] with background -1.
  Targets are int32 `[B]`.

  The split is fixed and stratified: 1,257 train, 180 validation, 360 test,
  whatever the seed; the seed only orders training. Writers are not labelled
  in the data, so a test digit may be by the hand of a training digit.

  Args:
    seed: order of the training examples.
    patch: side of a patch in pixels: 1, 2, 4 or 8.
    max_shift: `augment` moves each scan by up to this many pixels in each
      direction, uniformly, and fills with background; 0 for none.

  Raises:
    UserError: an argument is out of range, or scikit-learn is missing.
  """
  _splits.check_seed(seed)
  if patch not in (1, 2, 4, 8):
    raise UserError(f'patch must be 1, 2, 4 or 8, got {patch}')
  if not 0 <= max_shift < SIDE:
    raise UserError(f'max_shift must be in [0, {SIDE}), got {max_shift}')

  images_BHW, labels_B, members = _load()
  inputs_BTC = patches(images_BHW, patch)
  sizes: dict[str, int | None] = {
    split: len(rows) for split, rows in members.items()
  }

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      rows_B = _splits.without_end(seed, sizes[split], index, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    rows_B = members[split][rows_B]
    return {
      'inputs': inputs_BTC[rows_B],
      'targets': labels_B[rows_B],
      'weight': weight_B,
    }

  def augment(key, batch):
    if max_shift == 0:
      return batch
    images_BHW = pixels(batch['inputs'], patch)
    shifted_BHW = _shift(key, images_BHW, max_shift)
    return {**batch, 'inputs': patches(shifted_BHW, patch)}

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct(inputs_BTC.shape[1:], jnp.float32),
      answer=(),
      classes=10,
      sizes=sizes,
    ),
    batch=batch,
    augment=augment,
    loss=_loss,
    picture=lambda example: pixels(example['inputs'][None], patch)[0],
  )


def patches(images_BHW, patch: int):
  """Cuts images `[B, H, W]` into patches `[B, T, patch^2]`."""
  batch, height, width = images_BHW.shape
  tall, wide = height // patch, width // patch
  x = images_BHW.reshape(batch, tall, patch, wide, patch)
  return x.swapaxes(2, 3).reshape(batch, tall * wide, patch * patch)


def pixels(inputs_BTC, patch: int):
  """Puts patches `[B, T, patch^2]` together again: images `[B, 8, 8]`."""
  batch, side = inputs_BTC.shape[0], SIDE // patch
  x = inputs_BTC.reshape(batch, side, side, patch, patch)
  return x.swapaxes(2, 3).reshape(batch, SIDE, SIDE)


def _shift(key, images_BHW, max_shift):
  """Moves each image by its own offset."""
  edge = (max_shift, max_shift)
  padded_BHW = jnp.pad(
    images_BHW, ((0, 0), edge, edge), constant_values=_BACKGROUND
  )
  offset_B2 = jax.random.randint(
    key, (images_BHW.shape[0], 2), 0, 2 * max_shift + 1
  )
  return jax.vmap(
    lambda image, offset: jax.lax.dynamic_slice(image, offset, (SIDE, SIDE))
  )(padded_BHW, offset_B2)


def _loss(answer, batch):
  """Cross-entropy of logits `[B, 10]`; metrics: accuracy."""
  logits_BV = answer.astype(jnp.float32)
  targets_B = batch['targets']
  loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BV, targets_B)
  right_B = jnp.argmax(logits_BV, axis=-1) == targets_B
  return loss_B, {'accuracy': right_B.astype(jnp.float32)}


@functools.cache
def _load():
  """Images in [-1, 1], labels, and the fixed rows of each split."""
  try:
    from sklearn import datasets
  except ImportError as error:
    raise UserError(
      'task digits needs scikit-learn, which is not installed; '
      "install the data extra: pip install -e '.[data]'"
    ) from error
  images_BHW, labels_B = datasets.load_digits(return_X_y=True)
  raw_BN = images_BHW.astype(np.uint8)
  labels_B = labels_B.astype(np.int32)

  # Every example at an even spacing of a list sorted by class: each class
  # gives the same share of its scans to each split.
  by_class = np.lexsort((_splits.hash_rows(raw_BN), labels_B))
  total = len(labels_B)
  spaced = np.arange(_HELD_OUT) * total // _HELD_OUT
  held_out = by_class[spaced]
  is_validation = np.arange(_HELD_OUT) % 3 == 2
  members = {
    'train': np.delete(by_class, spaced),
    'validation': held_out[is_validation],
    'test': held_out[~is_validation],
  }
  images_BHW = (raw_BN.astype(np.float32) / 8 - 1).reshape(-1, SIDE, SIDE)
  return images_BHW, labels_B, members
