"""Text of several domains: which character comes next, and where?

Source: examiner-ctm v5.3, the seven pillars. Real text: textbooks of OpenStax,
Rice University, CC BY 4.0, one file a domain with a blank line between modules.
"""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import (
  _documents,
  _losses,
  _problems,
  _puzzle_files,
  _splits,
  text,
)

# What a domain is read from where `path` is given; another name is a file's.
FILES = {
  'LOGOS': 'statistics',
  'PHYSIS': 'physics',
  'BIOS': 'anatomy_physiology',
  'NOMOS': 'political_science',
  'PSYCHE': 'psychology',
  'SOPHIA': 'philosophy',
  'OIKOS': 'economics',
}
ANSWERS = ('sequence', 'next')
# Newline and printable ASCII: the same tokens whatever the domains.
ALPHABET = np.array([10, *range(32, 127)], np.uint32)


def make(
  *,
  seed: int = 0,
  path: str = '',
  domains: tuple[str, ...] = (),
  answer: str = 'sequence',
  length: int = 64,
  passages: int = 8,
  rows: int = 4,
  levels: tuple[int, ...] = (1, 2, 3),
  problems: int = 2000,
) -> interfaces.Task:
  """Predict characters of passages whose domain is told.

  Inputs are `tokens`, int32 `[B, T]`, and `domain`, int32 `[B]`, a place in
  `spec.domains`. Row b of a training batch is of domain b modulo E, and every
  domain is read as a ring by the rows that it has, so a row's domain stays the
  same from batch to batch. Answers are

    sequence  every next character: targets int32 `[B, T]`, and `resets`, bool
              `[B, T]`, among the inputs, as in `tasks.text`
    next      the character after the T: targets int32 `[B]`

  A document (a module of a textbook, a problem) belongs to the split that its
  hash says, so no module straddles. Held-out splits are `passages` passages of
  every domain, evenly spaced over its held-out text, of `rows` chunks in a row
  each: row r is of domain r // (passages rows). They do not depend on the seed.

  Args:
    seed: order of the training text.
    path: folder with `FILES`; '' for problems that are generated.
    domains: names, those of `FILES` or of files; () for the seven.
    answer: one of `ANSWERS`.
    length: T.
    passages, rows: of a domain in a held-out split.
    levels: of the problems, among 1, 2, 3.
    problems: number of them in a domain, all splits together.

  Raises:
    UserError: an argument is out of range, a file is missing or has characters
      other than ASCII, or a domain has too little held-out text; by `batch`,
      there are fewer rows than domains, or too many for the training text.
  """
  _splits.check_seed(seed)
  _check(answer, length, passages, rows, levels, problems)
  names = domains or tuple(FILES)
  if len(set(names)) != len(names):
    raise UserError(f'domains must differ, got {names}')
  parts = {name: _read(path, name, tuple(levels), problems) for name in names}
  held = {
    split: np.stack(
      [
        _held_out(parts[name], name, split, length, passages, rows)
        for name in names
      ]
    )
    for split in _splits.NAMES[1:]
  }
  rings = [_ring(seed, e, parts[name]) for e, name in enumerate(names)]
  sizes: dict[str, int | None] = {
    'train': sum(len(ring) // length for ring in rings)
  }
  sizes |= {split: len(names) * passages * rows for split in held}

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      if size < len(names):
        raise UserError(
          f'a batch must have a row of each of {len(names)} domains, got '
          f'{size} rows: make batch_size larger'
        )
      tokens_BT, domain_B = training(index, size)
      weight_B = np.ones(size, np.float32)
    else:
      row_B, weight_B = _splits.in_order(sizes[split], index, size)
      domain_B, place_B = np.divmod(row_B, passages * rows)
      tokens_BT = held[split][domain_B, place_B]
    inputs = {'tokens': tokens_BT[:, :-1], 'domain': domain_B.astype(np.int32)}
    if answer == 'next':
      return {
        'inputs': inputs,
        'targets': tokens_BT[:, -1],
        'weight': weight_B,
      }
    inputs['resets'] = inputs['tokens'] == text.BOUNDARY
    return {
      'inputs': inputs,
      'targets': tokens_BT[:, 1:],
      'length': np.full(size, length, np.int32),
      'weight': weight_B,
    }

  def training(index, size):
    domain_B = np.arange(size) % len(names)
    tokens_BT = np.empty((size, length + 1), np.int32)
    for e, ring in enumerate(rings):
      tracks = int((domain_B == e).sum())
      if tracks and len(ring) // tracks <= length:
        raise UserError(
          f'the training text of {names[e]} has {len(ring)} tokens, too few '
          f'for {tracks} rows of {length}: make batch_size or length smaller'
        )
      first_B = np.arange(tracks) * len(ring) // max(tracks, 1)
      chunk = text.chunks(ring, first_B + index * length, length)
      tokens_BT[domain_B == e, :-1] = chunk['inputs']['tokens']
      tokens_BT[domain_B == e, 1:] = chunk['targets']
    return tokens_BT, domain_B

  inputs = {
    'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
    'domain': jax.ShapeDtypeStruct((), jnp.int32),
  }
  if answer == 'sequence':
    inputs['resets'] = jax.ShapeDtypeStruct((length,), jnp.bool_)
  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=inputs,
      answer=(length,) if answer == 'sequence' else (),
      classes=len(ALPHABET) + 1,
      sizes=sizes,
      domains=names,
    ),
    batch=batch,
    augment=lambda key, batch: batch,
    loss=text.loss if answer == 'sequence' else _loss,
    data_hash=_hashes(parts, names),
    text=text.reader(ALPHABET, 'characters'),
  )


def _check(answer, length, passages, rows, levels, problems):
  if answer not in ANSWERS:
    raise UserError(f'answer must be one of {ANSWERS}, got {answer!r}')
  if length < 2:
    raise UserError(f'length must be >= 2, got {length}')
  for name, value in (
    ('passages', passages),
    ('rows', rows),
    ('problems', problems),
  ):
    if value < 1:
      raise UserError(f'{name} must be > 0, got {value}')
  if not levels or set(levels) - {1, 2, 3}:
    raise UserError(f'levels must be among 1, 2, 3, got {tuple(levels)}')


def _read(path, name, levels, problems):
  """A domain's documents by split, as code points."""
  if path:
    file = pathlib.Path(path) / f'{FILES.get(name, name)}.txt'
    if not file.is_file():
      known = sorted(x.stem for x in pathlib.Path(path).glob('*.txt'))
      raise UserError(
        f'no file {file} for domain {name!r}; the folder has: '
        f'{", ".join(known) or "no .txt files"}'
      )
    found = _documents.read(str(file), '\n\n')
  elif name in _problems.DOMAINS:
    found = list(_problems.documents(name, problems, levels, 0))
  else:
    raise UserError(
      f'without a path domains must be among {tuple(_problems.DOMAINS)}, got '
      f'{name!r}'
    )
  units = [_ascii(document, name) for document in found]
  parts = _documents.split(found, units, 'document', needed=())
  empty = [split for split in _splits.NAMES if not parts[split]]
  if empty:
    raise UserError(
      f'documents of {name} must fill {", ".join(_splits.NAMES)}, but of '
      f'{len(found)} none is in {", ".join(empty)}: give more of them '
      '(problems, or blank lines in the file)'
    )
  return parts


def _ascii(document, name):
  """Its characters as code points."""
  units = np.frombuffer(document, np.uint8).astype(np.uint32)
  strange = np.flatnonzero(~np.isin(units, ALPHABET))
  if len(strange):
    found = document[strange[0] :].decode(errors='replace')[0]
    raise UserError(
      f'the text of {name} must be printable ASCII and newlines, got '
      f'{found!r}: replace it in the file'
    )
  return units


def _ring(seed, index, parts):
  """The training text of a domain in a seeded order, turned."""
  draw = _splits.generator(seed, _splits.NAMES.index('train'), index)
  order = draw.permutation(len(parts['train']))
  ring = text.stream([parts['train'][i] for i in order], ALPHABET)
  return np.roll(ring, -int(draw.integers(len(ring))))


def _held_out(parts, name, split, length, passages, rows):
  """`[passages rows, T + 1]` tokens, evenly spaced over a domain's text."""
  stream = text.stream(parts[split], ALPHABET).astype(np.int32)
  span = rows * length + 1
  if len(stream) < passages * span:
    raise UserError(
      f'the {split} text of {name} has {len(stream)} tokens, fewer than '
      f'passages x rows x length = {passages} x {rows} x {length}: make one of '
      'them smaller'
    )
  first_P = np.linspace(0, len(stream) - span, passages).astype(np.int64)
  first_PR = first_P[:, None] + length * np.arange(rows)[None]
  place = first_PR.reshape(-1, 1) + np.arange(length + 1)[None]
  return stream[place]


def _hashes(parts, names):
  """Of every split's documents, in the order of the domains."""
  return {
    split: hashlib.sha256(
      ''.join(
        _puzzle_files.sha256([text.stream(parts[name][split], ALPHABET)])
        for name in names
      ).encode()
    ).hexdigest()
    for split in _splits.NAMES
  }


def _loss(answer, batch):
  """Cross-entropy of logits `[B, V]`; metrics: accuracy."""
  right_B = jnp.argmax(answer, axis=-1) == batch['targets']
  return _losses.cross_entropy(answer, batch['targets']), {
    'accuracy': right_B.astype(jnp.float32)
  }
