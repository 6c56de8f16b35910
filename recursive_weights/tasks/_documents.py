"""Documents of plain text, and which split each of them belongs to."""

import functools
import hashlib
import pathlib
import sysconfig

import numpy as np

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _splits

SOURCES = ('pydoc', 'library')
SPLIT_BY = ('document', 'position')
SHARES = (0.025, 0.1)


def read(path: str, separator: str) -> list[bytes]:
  """The documents of a text file, or of the .txt files of a folder, by name.

  Args:
    path: file or folder.
    separator: what stands between the documents of a file, a blank line for
      instance; '' where every file is one document. Newlines at the ends of a
      separated document are taken off, and empty documents left out.

  Raises:
    UserError: there is no text.
  """
  root = pathlib.Path(path)
  files = sorted(root.glob('*.txt')) if root.is_dir() else [root]
  try:
    texts = [file.read_bytes() for file in files]
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  if separator:
    between = separator.encode()
    texts = [part.strip(b'\n') for x in texts for part in x.split(between)]
  texts = [text for text in texts if text]
  if not texts:
    raise UserError(
      f'{path} must hold text (a folder: in .txt files), got none'
    )
  return texts


@functools.cache
def shipped(source: str) -> tuple[bytes, ...]:
  """Documents that come with every Python: its language reference, or itself.

  pydoc: the topics of `help()`, 0.7 million characters. library: the top-level
  modules of the standard library, about five million, without those that an
  installation writes (`_sysconfigdata*`, sitecustomize). Both differ a little
  from one version of Python to the next, as `Task.data_hash` tells.

  Raises:
    UserError: the source is unknown.
  """
  if source == 'pydoc':
    from pydoc_data.topics import topics

    return tuple(topics[name].strip().encode() for name in sorted(topics))
  if source == 'library':
    files = sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py'))
    return tuple(
      text
      for file in files
      if not file.name.startswith('_sysconfigdata')
      and file.name != 'sitecustomize.py'
      and (text := file.read_bytes())
    )
  raise UserError(f'source must be one of {SOURCES}, got {source!r}')


def units(document: bytes, tokens: str) -> np.ndarray:
  """Its bytes, or the code points of its UTF-8 characters, uint32 `[T]`.

  Raises:
    UserError: it is no UTF-8.
  """
  if tokens == 'bytes':
    return np.frombuffer(document, np.uint8).astype(np.uint32)
  try:
    text = document.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f"the text is no UTF-8 ({error}): convert it, or choose tokens='bytes'"
    ) from error
  return np.frombuffer(text.encode('utf-32-le'), '<u4').astype(np.uint32)


def split(
  documents: list[bytes],
  rows: list[np.ndarray],
  by: str,
  needed: tuple[str, ...] = _splits.NAMES,
  *,
  even: bool = False,
) -> dict[str, list[np.ndarray]]:
  """Documents by split: about 90 % train, 5 % validation, 5 % test.

  by='document': a hash of a document decides, so copies of it stay together
  and no other text moves it. by='position': of all documents in a row, the
  first nine tenths train and the last twentieth is the test, for texts of few
  documents.

  Args:
    documents: what is hashed.
    rows: the same documents as `units`, what is given out.
    by: 'document' or 'position'.
    needed: splits that must not be empty.
    even: by='document' of texts that differ from one Python to the next and are
      few, so that a split may come out next to empty: a number is hashed with
      each, the first (0 for none) with which validation and test are each two
      documents at least and `SHARES` of the text.

  Raises:
    UserError: a needed split would be empty, or `by` is unknown.
  """
  if by not in SPLIT_BY:
    raise UserError(f'split_by must be one of {SPLIT_BY}, got {by!r}')
  if by == 'document':
    split_B = _by_hash(documents, [len(row) for row in rows], even)
    parts = {
      name: [row for row, s in zip(rows, split_B, strict=True) if s == i]
      for i, name in enumerate(_splits.NAMES)
    }
  else:
    ends = np.cumsum([0, *map(len, rows)])
    total = int(ends[-1])
    edges = [0, total * 9 // 10, total * 19 // 20, total]
    parts = {
      name: _cut(rows, ends, edges[i], edges[i + 1])
      for i, name in enumerate(_splits.NAMES)
    }
  empty = [name for name in needed if not parts[name]]
  if empty and by == 'position':  # what is cut is tokens, however separated
    raise UserError(
      f'the text must fill {", ".join(needed)}, but of its {total} tokens none '
      f'is in {", ".join(empty)}: give a longer one'
    )
  if empty:
    raise UserError(
      f'documents must fill {", ".join(needed)}, but of {len(documents)} none '
      f'is in {", ".join(empty)}: give a separator that makes more of them, or '
      "split_by='position'"
    )
  return parts


def _by_hash(documents, sizes, even):
  """Index into the names of splits for each document, see `split`."""
  digests = [hashlib.sha256(text).digest() for text in documents]

  def hashed(number=0):
    salted = digests
    if number:
      salt = b'%d:' % number
      salted = [hashlib.sha256(salt + digest).digest() for digest in digests]
    digests_BN = np.frombuffer(b''.join(salted), np.uint8)
    digests_BN = digests_BN.reshape(len(documents), -1)
    return _splits.by_hash(_splits.hash_rows(digests_BN))

  def is_even(split_B):
    held_out = [size_B[split_B == i] for i in (1, 2)]
    low, high = (share * size_B.sum() for share in SHARES)
    return all(len(x) > 1 and low <= x.sum() <= high for x in held_out)

  if not even:
    return hashed()
  size_B = np.array(sizes)
  found = (x for x in map(hashed, range(1000)) if is_even(x))
  return next(found, hashed())


def _cut(rows, ends, first, last):
  """What lies at places [first, last) of all rows one after another."""
  parts = (
    row[max(first - begin, 0) : max(last - begin, 0)]
    for row, begin in zip(rows, ends[:-1], strict=True)
  )
  return [part for part in parts if len(part)]
