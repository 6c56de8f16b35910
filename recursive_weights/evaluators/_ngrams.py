"""How well counts of one and two tokens predict a text."""

import numpy as np

from recursive_weights.interfaces import Task


def losses(
  task: Task,
  inputs: np.ndarray,
  targets: np.ndarray,
  batch_size: int,
  most: int = 2_000_000,
) -> tuple[float, float]:
  """Nats a token of the next token by its own frequency, and by the last one's.

    p(b) = (n_b + 1) / (n + V),   p(b | a) = (n_ab + p(b)) / (n_a + 1)

  Args:
    task: a text, whose training split is counted.
    inputs, targets: held-out tokens and those that follow them.
    batch_size: rows of a training batch, as many as the training text has room
      for.
    most: training tokens to count.
  """
  classes = task.spec.classes
  before, after = _pairs(task, batch_size, most)
  single = np.bincount(after, minlength=classes)
  p_V = (single + 1) / (single.sum() + classes)
  pairs, counts = np.unique(before * classes + after, return_counts=True)
  first = np.bincount(before, minlength=classes)
  inputs, targets = inputs.ravel().astype(np.int64), targets.ravel()
  wanted = inputs * classes + targets
  place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
  count = np.where(pairs[place] == wanted, counts[place], 0)
  p = (count + p_V[targets]) / (first[inputs] + 1)
  return float(-np.log(p_V[targets]).mean()), float(-np.log(p).mean())


def _pairs(task, size, most):
  """Neighbours in the training text, at most so many, int64."""
  total = min(task.spec.sizes['train'] * task.spec.answer[0], most)
  before, after, index, seen = [], [], 0, 0
  while seen < total:
    batch = task.batch('train', index, size)
    before.append(batch['inputs']['tokens'].ravel().astype(np.int64))
    after.append(batch['targets'].ravel().astype(np.int64))
    seen += len(before[-1])
    index += 1
  return np.concatenate(before), np.concatenate(after)
