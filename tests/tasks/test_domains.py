"""Text of domains: rows by domain, splits by module, problems and answers."""

import itertools
import json
import re

import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _problems, _splits, domains

NAMES = tuple(domains.FILES)


@pytest.fixture(scope='module')
def task():
  return domains.make(length=16, passages=3, rows=2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two books of 400 modules; every word says its book and module."""
  root = tmp_path_factory.mktemp('books')
  for name in ('physics', 'botany'):
    modules = [
      f'# {name} {i}\n' + ' '.join(f'{name[0]}{i}' for _ in range(12))
      for i in range(400)
    ]
    (root / f'{name}.txt').write_text('\n\n'.join(modules))
  (root / 'manifest.json').write_text(json.dumps({}))
  return str(root)


def books(folder, **fields):
  fields = {'length': 16, 'passages': 3, 'rows': 2} | fields
  return domains.make(path=folder, domains=('PHYSIS', 'botany'), **fields)


def test_a_row_keeps_its_domain_and_goes_on_where_it_was(task):
  batches = [task.batch('train', i, 15) for i in range(3)]
  for batch in batches:
    np.testing.assert_array_equal(batch['inputs']['domain'], np.arange(15) % 7)
  for before, after in itertools.pairwise(batches):
    np.testing.assert_array_equal(
      before['targets'][:, -1], after['inputs']['tokens'][:, 0]
    )


def test_held_out_rows_are_passages_of_rows_that_follow(task):
  batch = task.batch('test', 0, task.spec.sizes['test'])
  assert task.spec.sizes['test'] == 7 * 3 * 2
  np.testing.assert_array_equal(
    batch['inputs']['domain'], np.repeat(np.arange(7), 6)
  )
  tokens_PRT = batch['inputs']['tokens'].reshape(21, 2, 16)
  targets_PRT = batch['targets'].reshape(21, 2, 16)
  np.testing.assert_array_equal(targets_PRT[:, 0, -1], tokens_PRT[:, 1, 0])
  np.testing.assert_array_equal(targets_PRT[..., :-1], tokens_PRT[..., 1:])


def test_the_next_character_is_the_last_target(folder):
  whole, last = books(folder), books(folder, answer='next')
  for split, index in (('train', 3), ('test', 0)):
    a, b = (task.batch(split, index, 6) for task in (whole, last))
    np.testing.assert_array_equal(a['targets'][:, -1], b['targets'])
    np.testing.assert_array_equal(a['inputs']['tokens'], b['inputs']['tokens'])
  assert last.spec.answer == ()


def modules(task, split, rows):
  """Whole words of a split by domain: each names its book and module."""
  batch = task.batch(split, 0, rows)
  found = [set() for _ in task.spec.domains]
  for domain, row in zip(
    batch['inputs']['domain'], batch['inputs']['tokens'], strict=True
  ):
    text = task.text.decode(row)
    found[domain] |= set(re.findall(r'(?<= )[pb]\d+(?= )', text))
  return found


def test_modules_do_not_straddle_splits_and_domains_do_not_mix(folder):
  task = books(folder, passages=20, rows=1)
  seen = {s: modules(task, s, 200) for s in _splits.NAMES}
  for e, letter in enumerate('pb'):
    for split in seen:
      assert seen[split][e] and {word[0] for word in seen[split][e]} == {letter}
    for a, b in itertools.combinations(seen, 2):
      assert not seen[a][e] & seen[b][e]


def answers(domain, pattern):
  texts = _problems.documents(domain, 400, (1, 2, 3), 0)
  found = [re.fullmatch(pattern, text.decode()) for text in texts]
  found = [match for match in found if match]
  assert len(found) > 50
  return [match.groups() for match in found]


def test_problems_are_right():
  for a, b, c, x in answers(
    'LOGOS', r'Solve (\d+)x \+ (\d+) = (\d+)\. x = (\d+)'
  ):
    assert int(a) * int(x) + int(b) == int(c)
  for test, a, b, x in answers(
    'LOGOS', r'if (.*): x = (\d+) else: x = (\d+)\. x is (\d+)'
  ):
    assert x == (a if eval(test) else b)
  for u, a, t, v in answers(
    'PHYSIS', r'With u = (\d+) .*a = (\d+) .*t = (\d+) .*= (\d+)'
  ):
    assert int(u) + int(a) * int(t) == int(v)
  for m, v, e in answers('PHYSIS', r'A mass of (\d+) kg at (\d+) .* (\d+) J'):
    assert 2 * int(e) == int(m) * int(v) ** 2
  for gene, rna in answers('BIOS', r'The gene (\w+) .* RNA (\w+)'):
    assert rna == gene.translate(str.maketrans('ATGC', 'UACG'))
  for share, yes, no, end in answers(
    'NOMOS', r'The bill needs (.*)\. Ayes (\d+), noes (\d+): it is (\w+)'
  ):
    least = {'half': 1 / 2, 'two thirds': 2 / 3}[share]
    assert (end == 'adopted') == (
      int(yes) / (int(yes) + int(no)) > least + 1e-9
    )
  for digits, back in answers('PSYCHE', r'Recall (.*) backwards\. (.*)'):
    assert digits.split() == back.split()[::-1]
  for a, b, c, d, p in answers(
    'OIKOS', r'Demand (\d+) - (\d+)p, supply (\d+) \+ (\d+)p.* p = (\d+)'
  ):
    assert int(a) - int(b) * int(p) == int(c) + int(d) * int(p)
  for first, chain in answers('SOPHIA', r'All (\w+)s are (.*)'):
    verdict = re.search(r'Tam is (a|no) (\w+)\. So Tam is (a|no) (\w+)', chain)
    said, thing, so, other = verdict.groups()
    last = re.findall(r'are (\w+)s\.', 'are ' + chain)[-1]
    expected = (first, last) if said == 'a' else (last, first)
    assert so == said and (thing, other) == expected


def test_problems_differ_and_come_in_all_splits():
  for name in NAMES:
    texts = _problems.documents(name, 500, (1, 2, 3), 0)
    assert len(set(texts)) == 500
    assert texts[:100] == _problems.documents(name, 100, (1, 2, 3), 0)
  task = domains.make(length=16, passages=3, rows=2, problems=500)
  assert set(task.data_hash) == set(_splits.NAMES)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'answer': 'all'}, "answer must be one of .*, got 'all'"),
    ({'length': 1}, 'length must be >= 2, got 1'),
    ({'rows': 0}, 'rows must be > 0, got 0'),
    ({'levels': (4,)}, r'levels must be among 1, 2, 3, got \(4,\)'),
    ({'domains': ('LOGOS', 'LOGOS')}, 'domains must differ'),
    ({'domains': ('chemistry',)}, 'without a path domains must be among'),
    ({'passages': 900}, 'fewer than passages x rows x length'),
    ({'problems': 1100, 'levels': (1,)}, 'fewer than 1100 different problems'),
  ],
)
def test_errors_say_what_to_do(fields, message):
  with pytest.raises(UserError, match=message):
    domains.make(**fields)


def test_a_missing_book_lists_those_there_are(folder):
  with pytest.raises(UserError, match='the folder has: botany, physics'):
    domains.make(path=folder, domains=('chemistry',))


@pytest.mark.parametrize(
  'letter, message',
  [
    ('é', "the text of physics must be printable ASCII .*, got 'é': replace"),
    ('\t', r"got '\\t': replace it in the file"),
  ],
)
def test_other_characters_than_ascii_are_named(tmp_path, letter, message):
  text = '\n\n'.join(f'module {i} of physics' for i in range(400))
  (tmp_path / 'physics.txt').write_text(text + letter)
  with pytest.raises(UserError, match=message):
    domains.make(path=str(tmp_path), domains=('physics',))


def test_a_domain_without_held_out_documents_is_refused(tmp_path):
  (tmp_path / 'physics.txt').write_text('one module alone')
  with pytest.raises(UserError, match=r'of 1 none is in .*: give more'):
    domains.make(path=str(tmp_path), domains=('physics',))


def test_too_many_rows_are_refused(folder):
  task = books(folder)
  with pytest.raises(UserError, match='each of 2 domains, got 1 rows'):
    task.batch('train', 0, 1)
  with pytest.raises(UserError, match='too few for'):
    task.batch('train', 0, 10_000)
