"""Held-out text that measures of states read."""

import itertools

import numpy as np

from recursive_weights.interfaces import Task, Text, UserError


def windows(task: Task, split: str, rows: int, tokens: int) -> np.ndarray:
  """Pieces of documents, `[rows, tokens + 1]`, spread over a split.

  Raises:
    UserError: see `_stream`; or no document is so long.
  """
  stream, resets = _stream(task, split)
  begins = np.flatnonzero(resets)
  ends = [*begins[1:], len(stream)]
  first = [
    place
    for begin, end in zip(begins, ends, strict=True)
    for place in range(begin, end - tokens, tokens)
  ]
  if len(first) < 2:
    longest = max(e - b for b, e in zip(begins, ends, strict=True))
    raise UserError(
      f'tokens must be so few that documents of {split} have two pieces of '
      f'them and one more token, got {tokens}: the longest has {longest}. '
      'Choose a smaller multiple of 2 chunks (chunk may be smaller too), or '
      'longer documents'
    )
  rows = min(rows, len(first))
  chosen = [first[i * len(first) // rows] for i in range(rows)]
  return np.stack([stream[i : i + tokens + 1] for i in chosen]).astype(np.int32)


def _stream(task, split):
  """All tokens of a split in a row, and where documents begin.

  Raises:
    UserError: rows are not parts of one text that begins with a document.
  """
  held = task.batch(split, 0, task.spec.sizes[split])
  targets, resets = held['targets'], held['inputs'].get('resets')
  wrong = ''
  if targets.ndim != 2 or resets is None:
    wrong = f'targets {list(targets.shape)} and resets {resets is not None}'
  elif not resets[0, 0]:
    wrong = 'a first token that begins no document'
  elif (targets[:-1, -1] != held['inputs']['tokens'][1:, 0]).any():
    wrong = 'rows of which one does not go on where the one before it ended'
  if wrong:
    raise UserError(
      'state_gates needs a task whose held-out rows are one text, [B, T] with '
      f'resets where a document begins, got {wrong} in {split}: use tasks.text'
    )
  on_BT = np.arange(targets.shape[1])[None] < held['length'][:, None]
  return held['inputs']['tokens'][on_BT], resets[on_BT]


def one_boundary(task: Task, text: Text, split: str) -> bool:
  """Whether the boundary is one token of the V, and stands for nothing else.

  That is, held-out documents begin where it stands, and nowhere else.
  """
  stream, resets = _stream(task, split)
  inside = 0 <= text.boundary < task.spec.classes
  return inside and np.array_equal(stream == text.boundary, resets)


def survives(text: Text, tokens: np.ndarray) -> bool:
  """Whether a piece of a document is the same after decoding and encoding.

  Where tokens are bytes it may begin and end inside a character, of which up to
  three bytes are then not counted.
  """
  tokens = tokens[tokens != text.boundary]
  for cut in itertools.product(range(4), repeat=2):
    body = tokens[cut[0] : len(tokens) - cut[1]]
    if np.array_equal(text.encode(text.decode(body)), body):
      return True
  return False
