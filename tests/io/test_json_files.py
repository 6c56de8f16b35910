"""Tables survive a kill, and broken ones are named."""

import os

import pytest

from recursive_weights import command
from recursive_weights.interfaces import UserError
from recursive_weights.io import json_files


def test_what_is_written_is_read(tmp_path):
  path, data = tmp_path / 'table.json', [{'a': 1.5, 'b': [1, None, 'x']}]
  json_files.write(path, data)
  assert json_files.read(path) == data
  before = path.stat().st_mtime_ns
  json_files.write(path, data)
  assert path.stat().st_mtime_ns == before
  assert os.listdir(tmp_path) == ['table.json']


def test_a_kill_before_the_end_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'table.json'
  json_files.write(path, 'old')
  monkeypatch.setattr(os, 'replace', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    json_files.write(path, 'new')
  assert json_files.read(path) == 'old'


def test_broken_files_are_named(tmp_path):
  path = tmp_path / 'table.json'
  with pytest.raises(UserError, match=r'cannot read .*table\.json'):
    json_files.read(path)
  path.write_text('[{')
  with pytest.raises(UserError, match=r'table\.json is not JSON'):
    json_files.read(path)


def test_flags_of_numbers():
  assert command.numbers('n', ['1', '20'], int) == [1, 20]
  assert command.numbers('rates', ['5e-4'], float) == [5e-4]
  for texts, kind in (
    *((['1', 'x'], int), (['1.5'], int), (['-1'], float)),
    *((['1', text], float) for text in ('nan', 'inf', '1e999')),
  ):
    with pytest.raises(UserError, match='--n must be finite numbers >= 0 of'):
      command.numbers('n', texts, kind)
