"""Which examples a split holds, and in which order they come.

Examples are assigned to splits by a hash of their content, so that no seed,
no batch size and no version of NumPy's generators moves one from the test
split into training.
"""

import functools

import numpy as np

from recursive_weights.interfaces import UserError

NAMES = ('train', 'validation', 'test')

# Percent of all possible examples; generated tasks divide by hash modulo 100.
_FIRST_HELD_OUT = {'train': 0, 'validation': 90, 'test': 95}


def check(split: str) -> None:
  """Raises `UserError` if `split` is none of `NAMES`."""
  if split not in NAMES:
    raise UserError(f'split must be one of {NAMES}, got {split!r}')


def check_seed(seed: int) -> None:
  """Raises `UserError` if `seed` starts no generator."""
  if seed < 0:
    raise UserError(f'seed must be >= 0, got {seed}')


def generator(seed: int, *path: int) -> np.random.Generator:
  """A Philox generator that is a pure function of the seed and the path."""
  sequence = np.random.SeedSequence(seed, spawn_key=path)
  return np.random.Generator(np.random.Philox(sequence))


def hash_rows(rows_BN: np.ndarray) -> np.ndarray:
  """64-bit hash of each row of bytes: `h <- mix(h XOR word)`, word by word.

  `mix` is the finaliser of splitmix64 (Steele, Lea and Flood, 2014). Rows of
  different lengths start from different h.

  Args:
    rows_BN: uint8 `[B, N]`.

  Returns:
    uint64 `[B]`.
  """
  length = rows_BN.shape[1]
  padded_BN = np.pad(rows_BN, ((0, 0), (0, -length % 8)))
  words_BN = np.ascontiguousarray(padded_BN).view('<u8')
  hash_B = np.full(len(rows_BN), length, np.uint64)
  for word_B in words_BN.T:
    hash_B = _mix(hash_B ^ word_B)
  return hash_B


def _mix(x: np.ndarray) -> np.ndarray:
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def by_hash(hash_B: np.ndarray) -> np.ndarray:
  """Index into `NAMES` for each hash: 90 % train, 5 % validation, 5 % test."""
  percent_B = (hash_B % np.uint64(100)).astype(np.int64)
  edges = [_FIRST_HELD_OUT['validation'], _FIRST_HELD_OUT['test']]
  return np.digitize(percent_B, edges)


def in_order(examples: int, index: int, size: int):
  """Rows of batch `index` of a split that is covered once, and their weight.

  Returns:
    `(rows_B, weight_B)`; rows past the end repeat row 0 with weight 0.

  Raises:
    ValueError: `index` is not in `[0, ceil(examples / size))`.
  """
  batches = -(-examples // size)
  if not 0 <= index < batches:
    raise ValueError(
      f'index must be in [0, {batches}) for {examples} examples in batches '
      f'of {size}, got {index}'
    )
  rows_B = np.arange(index * size, (index + 1) * size)
  inside_B = rows_B < examples
  return np.where(inside_B, rows_B, 0), inside_B.astype(np.float32)


def without_end(seed: int, examples: int, index: int, size: int) -> np.ndarray:
  """Rows of batch `index` of an endless seeded order.

  Every pass over the examples is its own permutation and batches run across
  passes, so the order of examples does not depend on the batch size.
  """
  position_B = np.arange(index * size, (index + 1) * size)
  epoch_B, place_B = np.divmod(position_B, examples)
  rows_B = np.empty(size, np.int64)
  for epoch in np.unique(epoch_B):
    order = _permutation(seed, int(epoch), examples)
    inside_B = epoch_B == epoch
    rows_B[inside_B] = order[place_B[inside_B]]
  return rows_B


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
  return generator(seed, NAMES.index('train'), epoch).permutation(examples)
