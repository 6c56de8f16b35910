"""Language modelling: which character, or byte, comes next?

A text is one row of documents with a boundary token before each. The boundary
begins a document, so the state of a model is reset there, and it ends the one
before it, so a model learns to stop.
"""

import bisect

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _documents, _losses, _puzzle_files, _splits

BOUNDARY = 0
TOKENS = ('characters', 'bytes')
ORDERS = ('tracks', 'shuffled')


def make(
  *,
  seed: int = 0,
  path: str = '',
  test_path: str = '',
  source: str = 'pydoc',
  separator: str = '',
  split_by: str = 'document',
  tokens: str = 'characters',
  length: int = 128,
  curriculum: tuple = (),
  order: str = 'tracks',
) -> interfaces.Task:
  """Predict `targets[t] = tokens[t + 1]`; the loss is in nats a token.

  Inputs are `tokens`, int32 `[B, T]`, and `resets`, bool `[B, T]`, True at
  boundaries, where a document begins. Targets are int32 `[B, T]`.

  The N training tokens are read as a ring by B tracks, track b from b N / B on,
  and `batch('train', i, B)` holds chunk i of every track: a carried state goes
  on where it was. The ring's seam is a boundary, so a reset. The seed orders
  the documents and turns the ring.

  Held-out splits do not depend on the seed. Their rows are consecutive chunks
  of one row of documents, so a batch goes across rows, not along them:
  `evaluators.perplexity` carries the state, `evaluators.accuracy` does not. The
  last row may be short: `length_B` of its tokens count, and its weight is
  `length_B / T`, so that weighted means are means over tokens.

  Args:
    seed: order of training.
    path: text file, or folder of .txt files; '' for what Python ships.
    test_path: another file or folder for the test split; '' for a part of the
      same text.
    source: of the shipped text, 'pydoc' or 'library' (`_documents.shipped`).
    separator: between the documents of a file (`_documents.read`).
    split_by: 'document' or 'position' (`_documents.split`).
    tokens: 'characters' (those that occur in the text) or 'bytes'.
    length: T, tokens a chunk, at least 2.
    curriculum: `((first step, T), ...)`, lengths of training chunks, the first
      from step 0; () for `length` throughout.
    order: 'tracks', or 'shuffled' for a control in which tracks move on by a
      row with every batch, so that a carried state is that of another text.

  Raises:
    UserError: an argument is out of range, a file cannot be read, or a
      character of the test file does not occur in the text; by `batch`, the
      training text is too short for as many tracks, or one row is shuffled.
  """
  _splits.check_seed(seed)
  _check(tokens, length, curriculum, order)
  documents = list(
    _documents.read(path, separator) if path else _documents.shipped(source)
  )
  rows = [_documents.units(text, tokens) for text in documents]
  known = np.arange(256, dtype=np.uint32)
  if tokens == 'characters':
    known = np.unique(np.concatenate(rows))
  needed = _splits.NAMES[:2] if test_path else _splits.NAMES
  even = not path
  parts = _documents.split(documents, rows, split_by, needed, even=even)
  if test_path:
    others = _documents.read(test_path, separator)
    parts['test'] = [_documents.units(text, tokens) for text in others]

  generator = _splits.generator(seed, _splits.NAMES.index('train'))
  order_L = generator.permutation(len(parts['train']))
  streams = {name: stream(parts[name], known) for name in parts}
  ring = stream([parts['train'][i] for i in order_L], known)
  ring = np.roll(ring, -int(generator.integers(len(ring))))
  sizes: dict[str, int | None] = {
    name: -(-len(x) // length) for name, x in streams.items()
  }
  phases = tuple(curriculum) or ((0, length),)

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      return training(index, size)
    rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    first_B = rows_B * length
    left_B = np.minimum(len(streams[split]) - first_B, length)
    return chunks(streams[split], first_B, length) | {
      'length': left_B.astype(np.int32),
      'weight': (weight_B * left_B / length).astype(np.float32),
    }

  def training(index, size):
    offset, chunk = _place(phases, index)
    if len(ring) // size < chunk:
      raise UserError(
        f'batch_size x length must be at most the {len(ring)} tokens of the '
        f'training text, got {size} x {chunk}: make one of them smaller'
      )
    first_B = np.arange(size) * len(ring) // size
    if order == 'shuffled':
      if size < 2:
        raise UserError(
          f"batch_size must be > 1 with order 'shuffled', got {size}: one row "
          'has no other text'
        )
      first_B = np.roll(first_B, index % size)
    return chunks(ring, first_B + offset, chunk) | {
      'length': np.full(size, chunk, np.int32),
      'weight': np.ones(size, np.float32),
    }

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs={
        'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
        'resets': jax.ShapeDtypeStruct((length,), jnp.bool_),
      },
      answer=(length,),
      classes=len(known) + 1,
      sizes=sizes,
      phases=tuple((first, {'length': size}) for first, size in curriculum),
    ),
    batch=batch,
    augment=lambda key, batch: batch,
    loss=loss,
    data_hash={
      name: _puzzle_files.sha256([x, known]) for name, x in streams.items()
    },
    text=reader(known, tokens),
  )


def _check(tokens, length, curriculum, order):
  if tokens not in TOKENS:
    raise UserError(f'tokens must be one of {TOKENS}, got {tokens!r}')
  if order not in ORDERS:
    raise UserError(f'order must be one of {ORDERS}, got {order!r}')
  if length < 2:
    raise UserError(f'length must be >= 2, got {length}')
  if not isinstance(curriculum, (tuple, list)) or not all(
    map(_is_phase, curriculum)
  ):
    raise UserError(
      'curriculum must be ((step, length), ...), whole numbers such as '
      f'((0, 64), (1000, 128)), got {curriculum!r}'
    )
  steps = [first for first, _ in curriculum]
  if curriculum and (steps[0] != 0 or steps != sorted(set(steps))):
    raise UserError(
      f'steps of the curriculum must rise from 0, got {tuple(steps)}'
    )
  short = [size for _, size in curriculum if size < 1]
  if short:
    raise UserError(f'lengths of the curriculum must be > 0, got {short[0]}')


def _is_phase(entry):
  return (
    isinstance(entry, (tuple, list))
    and len(entry) == 2
    and all(isinstance(x, (int, np.integer)) for x in entry)
  )


def _place(phases, index):
  """Tokens of a track before its chunk `index`, and that chunk's length."""
  steps = [first for first, _ in phases]
  current = bisect.bisect_right(steps, index) - 1
  ends = [*steps[1 : current + 1], index]
  offset = sum(
    (end - first) * size
    for end, (first, size) in zip(ends, phases[: current + 1], strict=True)
  )
  return offset, phases[current][1]


def chunks(ring, first_B, length):
  """Chunks of a ring of tokens, and what comes after each token."""
  place_BT = (first_B[:, None] + np.arange(length + 1)[None]) % len(ring)
  tokens_BT = ring[place_BT].astype(np.int32)
  inputs_BT = tokens_BT[:, :-1]
  return {
    'inputs': {'tokens': inputs_BT, 'resets': inputs_BT == BOUNDARY},
    'targets': tokens_BT[:, 1:],
  }


def stream(rows, known):
  """All documents one after another, a boundary before each."""
  parts = []
  for row in rows:
    parts += [np.zeros(1, np.int64), _tokens(row, known)]
  return np.concatenate(parts).astype(np.min_scalar_type(len(known)))


def _tokens(units, known):
  """Places in `known`, counted from 1."""
  place = np.minimum(np.searchsorted(known, units), len(known) - 1)
  strange = known[place] != units
  if strange.any():
    raise UserError(
      'a text must have characters that occur in the text of path, got '
      f'{chr(int(units[strange.argmax()]))!r}: leave it out, or use '
      "tokens='bytes'"
    )
  return place + 1


def reader(known, tokens):
  def encode(text):
    return _tokens(_documents.units(text.encode(), tokens), known).astype(
      np.int32
    )

  def decode(tokens_T):
    tokens_T = np.asarray(tokens_T)
    units = known[tokens_T[tokens_T != BOUNDARY] - 1]
    if tokens == 'bytes':
      return units.astype(np.uint8).tobytes().decode(errors='replace')
    return units.astype('<u4').tobytes().decode('utf-32-le')

  unit = {'characters': 'character', 'bytes': 'byte'}[tokens]
  return interfaces.Text(encode, decode, BOUNDARY, unit)


def loss(answer, batch):
  """Mean cross-entropy of logits `[B, T, V]` over the tokens that count.

  Metrics: accuracy, the share of tokens that were the likeliest.
  """
  targets_BT = batch['targets']
  on_BT = jnp.arange(targets_BT.shape[1])[None] < batch['length'][:, None]
  count_B = jnp.maximum(batch['length'], 1).astype(jnp.float32)

  def mean(x_BT):
    return jnp.where(on_BT, x_BT, 0.0).sum(axis=1) / count_B

  right_BT = jnp.argmax(answer, axis=-1) == targets_BT
  return mean(_losses.cross_entropy(answer, targets_BT)), {
    'accuracy': mean(right_BT.astype(jnp.float32))
  }
