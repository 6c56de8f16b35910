"""Questions and answers by cluster from JSON, JSONL and CSV files."""

import csv
import json
import pathlib
from typing import NamedTuple

import numpy as np

from recursive_weights.interfaces import UserError


class Cluster(NamedTuple):
  """One answer and what asks for it.

  questions: by part, 'train', 'validation', 'test'. vectors: the same, where
  the file holds embeddings, with the answer's under 'answer'; else {}.
  """

  name: str
  answer: str
  questions: dict[str, list[str]]
  vectors: dict[str, list]


class Fields(NamedTuple):
  """Names of a file's fields; `tasks.question_answer.make` says of what."""

  question: str
  answer: str
  cluster: str
  test: str
  split: str
  test_split: str


def read(
  path: str, fields: Fields, where: tuple[str, ...], stored: bool
) -> list[Cluster]:
  """Clusters in order of their first row.

  Args:
    where: `(field, value)` of the rows to take; () for all.
    stored: texts are embeddings, lists of numbers, which the file holds under
      `question`_embeddings and `answer`_embedding.

  Raises:
    UserError: names the row.
  """
  if len(where) not in (0, 2):
    raise UserError(f'where must be (field, value) or (), got {where}')
  found: dict[str, Cluster] = {}
  for number, row in _rows(path):
    if not isinstance(row, dict):
      raise UserError(
        f'{path}, row {number} must be an object of fields, got '
        f'{str(row)[:40]!r}'
      )
    if where and str(row.get(where[0])) != where[1]:
      continue
    _add(found, row, fields, stored, f'{path}, row {number}')
  if not found:
    raise UserError(
      f'{path} has no rows' + (f' with {where[0]} {where[1]!r}' * bool(where))
    )
  return list(found.values())


def _rows(path):
  """(number from 1, row as a dict)."""
  kind = pathlib.Path(path).suffix
  if kind not in ('.json', '.jsonl', '.csv'):
    raise UserError(f'path must end in .json, .jsonl or .csv, got {path!r}')
  try:
    # What spreadsheets save begins with a byte order mark.
    with open(path, newline='', encoding='utf-8-sig') as file:
      if kind == '.csv':
        reader = csv.DictReader(file)
        reader.fieldnames = [x.strip() for x in reader.fieldnames or ()]
        yield from enumerate(reader, 1)
      elif kind == '.json':
        rows = json.load(file)
        if not isinstance(rows, list):
          raise UserError(
            f'{path} must hold a list of rows, got a {type(rows).__name__} in '
            'place of row 1: put rows between [ and ]'
          )
        yield from enumerate(rows, 1)
      else:
        for number, line in enumerate(file, 1):
          if line.strip():
            yield number, _line(line, f'{path}, row {number}')
  except (OSError, ValueError, csv.Error) as error:
    raise UserError(f'cannot read {path}: {error}') from error


def _line(text, place):
  try:
    return json.loads(text)
  except ValueError as error:
    raise UserError(f'{place} must be JSON: {error}') from error


def _add(found, row, fields, stored, place):
  answer = _get(row, fields.answer, place)
  own = fields.cluster or fields.answer
  name = str(_get(row, own, place))
  if fields.answer == own and fields.cluster:
    # The answer is the name of the cluster, as of an intent.
    answer = str(answer).replace('_', ' ')
  part = 'train'
  if fields.split and fields.split in row:
    part = str(row[fields.split])
    part = 'test' if part == fields.test_split else _PARTS.get(part, '')
  if not part:  # of another split
    return
  cluster = found.setdefault(name, Cluster(name, str(answer), _parts(), {}))
  if cluster.answer != str(answer):
    raise UserError(
      f'{place}: a cluster must have one answer, got {str(answer)[:40]!r} and '
      f'{cluster.answer[:40]!r} for {name[:40]!r}'
    )
  texts = {
    part: _list(_get(row, fields.question, place), fields.question, place)
  }
  if fields.test and fields.test in row:
    texts['test'] = _list(row[fields.test], fields.test, place)
  for split, some in texts.items():
    cluster.questions[split] += some
  if not stored:
    return
  vectors = cluster.vectors or cluster.vectors | _parts()
  vectors['answer'] = _get(row, f'{fields.answer}_embedding', place)
  for split, some in texts.items():
    column = fields.test if split == 'test' and fields.test else fields.question
    mine = _get(row, f'{column}_embeddings', place)
    if not isinstance(mine, list) or len(mine) != len(some):
      got = len(mine) if isinstance(mine, list) else type(mine).__name__
      raise UserError(
        f'{place}: {column}_embeddings must be as many as {column}, '
        f'{len(some)}, got {got}'
      )
    vectors[split] += mine
  found[name] = cluster._replace(vectors=vectors)


_PARTS = {
  'train': 'train',
  'val': 'validation',
  'validation': 'validation',
  'dev': 'validation',
}


def matrix(rows: list, what: str) -> np.ndarray:
  """Stored embeddings as float32 `[B, D]`.

  Raises:
    UserError: two dimensions, or a number that is not finite.
  """
  try:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
      raise UserError(
        f'embeddings of {what} must have one dimension, got {lengths}'
      )
    found = np.asarray(rows, np.float32)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'embeddings of {what} must be lists of numbers: {error}'
    ) from error
  if bad := np.flatnonzero(~np.isfinite(found).all(-1)).tolist():
    raise UserError(
      f'embeddings of {what} must be finite, got NaN or inf in rows {bad[:5]}'
    )
  return found


def _get(row, name, place):
  if row.get(name) in (None, ''):
    raise UserError(
      f'{place} must have {name!r}, got the fields {", ".join(map(str, row))}'
    )
  return row[name]


def _list(value, name, place):
  some = [value] if isinstance(value, str) else value
  if not isinstance(some, list) or not all(isinstance(x, str) for x in some):
    raise UserError(
      f'{place}: {name!r} must be a text or a list of texts, got '
      f'{str(value)[:40]!r}'
    )
  return some


def _parts() -> dict[str, list]:
  return {'train': [], 'validation': [], 'test': []}
