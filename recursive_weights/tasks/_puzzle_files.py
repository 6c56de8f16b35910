"""Puzzles and answers from CSV files, with errors that name file and line."""

import csv
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from recursive_weights.interfaces import UserError


class Rows(NamedTuple):
  """What a CSV holds. lines: numbers of the rows' lines, counted from 1."""

  path: str
  lines: list[int]
  questions: list[str]
  answers: list[str]

  def error(self, row: int, problem: str) -> UserError:
    return UserError(f'{self.path}, line {self.lines[row]}: {problem}')

  def check(self, wrong_B: np.ndarray, problem: str) -> None:
    """Raises the error of the first row that is wrong, if any is."""
    if wrong_B.any():
      raise self.error(int(wrong_B.argmax()), problem)


def check(paths: tuple[str, ...], limits: tuple[int, ...]) -> None:
  """Raises `UserError` if training has a file and a held-out split none."""
  if paths[0] and not all(paths):
    raise UserError(
      'with train_path, validation_path and test_path must be given too, got '
      f'{paths}'
    )
  if len(limits) != 3 or min(limits) < 0:
    raise UserError(f'limits must be three numbers >= 0, got {limits}')


def read(path: str, limit: int) -> Rows:
  """The columns `question` and `answer` of a CSV with a header.

  Args:
    path: file.
    limit: number of rows to read, the first ones; 0 for all.

  Raises:
    UserError: the file or a column is missing, or there is no row.
  """
  lines, questions, answers = [], [], []
  try:
    # What spreadsheets save begins with a byte order mark.
    with open(path, newline='', encoding='utf-8-sig') as file:
      reader = csv.reader(file)
      header = [name.strip() for name in next(reader, [])]
      if 'question' not in header or 'answer' not in header:
        raise UserError(
          f'{path}, line 1: columns must include question and answer, got '
          f'{",".join(header) or "nothing"}'
        )
      question, answer = header.index('question'), header.index('answer')
      for row in reader:
        if len(row) != len(header):
          raise UserError(
            f'{path}, line {reader.line_num}: row must have {len(header)} '
            f'columns, got {len(row)}'
          )
        lines.append(reader.line_num)
        questions.append(row[question])
        answers.append(row[answer])
        if len(lines) == limit:
          break
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f'cannot read {path}: {error}') from error
  if not lines:
    raise UserError(f'{path} must have at least one puzzle, got none')
  return Rows(str(path), lines, questions, answers)


def characters(
  rows: Rows, texts: list[str], length: int, known: str, what: str
) -> np.ndarray:
  """Texts as places in `known`, uint8 `[B, length]`.

  Raises:
    UserError: names the first text of another length or with another character.
  """
  for row, text in enumerate(texts):
    if len(text) != length:
      raise rows.error(
        row, f'{what} must have {length} characters, got {len(text)}'
      )
  try:
    codes_BX = np.frombuffer(''.join(texts).encode('latin-1'), np.uint8)
    codes_BX = codes_BX.reshape(len(texts), length)
  except UnicodeEncodeError:
    strange = [any(c not in known for c in text) for text in texts]
    row = strange.index(True)
  else:
    table_V = np.full(256, 255, np.uint8)
    table_V[[ord(c) for c in known]] = np.arange(len(known))
    tokens_BX = table_V[codes_BX]
    wrong_B = (tokens_BX == 255).any(axis=1)
    if not wrong_B.any():
      return tokens_BX
    row = int(wrong_B.argmax())
  character = next(c for c in texts[row] if c not in known)
  raise rows.error(
    row, f'{what} must have characters among {known!r}, got {character!r}'
  )


def sha256(source) -> str:
  """SHA-256 of a file, or of arrays where the data is not from a file."""
  digest = hashlib.sha256()
  if isinstance(source, str):
    try:
      digest.update(pathlib.Path(source).read_bytes())
    except OSError as error:
      raise UserError(f'cannot read {source}: {error.strerror}') from error
    return digest.hexdigest()
  for array in source:
    digest.update(repr((array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
