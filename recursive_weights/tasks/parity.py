"""Running parity: after each bit, has the number of ones been odd or even?

Source: L. Darlow et al., Continuous Thought Machines, 2025, section on parity:
there the inputs are +1 and -1 and the target is the sign of the product so
far; here token 0 stands for +1 and token 1 for -1, target 1 for a negative
product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _splits

TOKENS = 2
_ENUMERABLE = 16  # up to this length, splits are lists of all sequences


def make(
  *, seed: int = 0, length: int = 12, eval_size: int = 2048
) -> interfaces.Task:
  """Predict `targets[t] = sum(inputs[:t + 1]) mod 2` at every position.

  Inputs are int32 tokens `[B, T]` in {0, 1}, targets int32 `[B, T]`.

  A hash of the sequence decides its split, so training never sees a sequence
  of the held-out splits: 90 % train, 5 % validation, 5 % test. Held-out splits
  do not depend on the seed. Up to length 16 they are all sequences of the
  split (or `eval_size` of them), else `eval_size` distinct generated ones.

  Args:
    seed: stream of training sequences.
    length: T, at least 2.
    eval_size: largest number of sequences in a held-out split.

  Raises:
    UserError: an argument is out of range.
  """
  _splits.check_seed(seed)
  if length < 2:
    raise UserError(f'length must be >= 2, got {length}')
  if eval_size < 1:
    raise UserError(f'eval_size must be > 0, got {eval_size}')

  if length <= _ENUMERABLE:
    table = functools.partial(_table, length)
    sizes = {s: min(len(table(s)), eval_size) for s in _splits.NAMES[1:]}
  else:
    sizes = {s: eval_size for s in _splits.NAMES[1:]}

  @functools.cache
  def held_out(split):
    if length <= _ENUMERABLE:
      return table(split)[: sizes[split]]
    return _generate_distinct(split, length, eval_size)

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      stream = _splits.generator(seed, _splits.NAMES.index(split), index)
      if length <= _ENUMERABLE:
        bits_BT = stream.choice(table(split), size)
      else:
        bits_BT = _generate(split, stream, length, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(sizes[split], index, size)
      bits_BT = held_out(split)[rows_B]
    inputs_BT = bits_BT.astype(np.int32)
    return {
      'inputs': inputs_BT,
      'targets': np.cumsum(inputs_BT, axis=1, dtype=np.int32) % 2,
      'weight': weight_B,
    }

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct((length,), jnp.int32),
      answer=(length,),
      classes=2,
      sizes={'train': None, **sizes},
    ),
    batch=batch,
    augment=lambda key, batch: batch,
    loss=_loss,
    picture=lambda example: example['inputs'][None, :],
  )


def _loss(answer, batch):
  """Mean cross-entropy over positions of logits `[B, T, 2]`.

  Metrics: accuracy (share of right bits), sequence_accuracy (all bits right).
  """
  logits_BTV = answer.astype(jnp.float32)
  targets_BT = batch['targets']
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, targets_BT
  )
  right_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
  return loss_BT.mean(axis=1), {
    'accuracy': right_BT.astype(jnp.float32).mean(axis=1),
    'sequence_accuracy': right_BT.all(axis=1).astype(jnp.float32),
  }


@functools.lru_cache(maxsize=8)
def _sorted_by_hash(length):
  numbers_B1 = np.arange(2**length)[:, None]
  bits_BT = ((numbers_B1 >> np.arange(length)[None, :]) & 1).astype(np.uint8)
  return bits_BT[np.argsort(_hash(bits_BT), kind='stable')]


def _table(length, split):
  """All sequences of a split. Shares are exact, so none is empty."""
  bits_BT = _sorted_by_hash(length)
  share = max(1, len(bits_BT) // 20)
  edges = [0, len(bits_BT) - 2 * share, len(bits_BT) - share, len(bits_BT)]
  which = _splits.NAMES.index(split)
  return bits_BT[edges[which] : edges[which + 1]]


def _generate(split, stream, length, size):
  """`size` sequences of a split; those of other splits are drawn again."""
  bits_BT = np.empty((0, length), np.uint8)
  while len(bits_BT) < size:
    drawn_BT = _draw(stream, length, size + 16)
    inside_B = _splits.by_hash(_hash(drawn_BT)) == _splits.NAMES.index(split)
    bits_BT = np.concatenate([bits_BT, drawn_BT[inside_B]])
  return bits_BT[:size]


def _generate_distinct(split, length, size):
  stream = _splits.generator(0, _splits.NAMES.index(split))
  bits_BT = np.empty((0, length), np.uint8)
  while len(bits_BT) < size:
    more_BT = _generate(split, stream, length, size)
    bits_BT = np.unique(np.concatenate([bits_BT, more_BT]), axis=0)
  # `unique` sorts, so cutting its result would keep the small numbers only.
  return bits_BT[np.argsort(_hash(bits_BT), kind='stable')[:size]]


def _draw(stream, length, size):
  width = -(-length // 8)
  raw_BN = np.frombuffer(stream.bytes(size * width), np.uint8)
  return np.unpackbits(raw_BN.reshape(size, width), axis=1)[:, :length]


def _hash(bits_BT):
  return _splits.hash_rows(np.packbits(bits_BT, axis=1))
