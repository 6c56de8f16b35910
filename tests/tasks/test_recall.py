"""Stories of recall: what they say, where the answer stands, who may see it."""

import re

import chex
import jax
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import recall, text


def rows(task, split='train', index=0, size=40):
  """Each row's whole words, and its answer, as text."""
  batch = task.batch(split, index, size)
  first_B1 = batch['inputs']['tokens'][:, :1]
  whole_BT = np.concatenate([first_B1, batch['targets']], axis=1)
  return [
    (task.text.decode(row_T), task.text.decode(row_T[1:][on_T]))
    for row_T, on_T in zip(whole_BT, batch['answer'], strict=True)
  ]


@pytest.fixture(scope='module')
def both():
  return recall.make(distances=(0, 5, 64))


def test_the_answer_is_what_the_text_says(both):
  """By reading the story again; and it stands at the end of the row."""
  seen = set()
  for split in ('train', 'validation', 'test'):
    for words, answer in rows(both, split):
      assert words.endswith('? ' + answer)
      code = re.search(r'the code is (\d{5})\. ', words)
      if code:
        assert answer == code[1]
      else:
        asked = re.search(r'who has the (\w+)\?', words)[1]
        holder = re.findall(rf'(\w+) has the {asked}\. ', words)
        assert len(holder) == 1
        (move,) = re.findall(rf'(\w+) gives the {asked} to (\w+)\. ', words)
        assert move == (holder[0], answer) and answer != holder[0]
      seen.add('passkey' if code else 'tracking')
  assert seen == set(recall.KINDS)


def test_codes_have_the_lengths_asked_for():
  task = recall.make(kinds=('passkey',), digits=(3, 12), length=120)
  answers = [answer for _, answer in rows(task)]
  assert {len(answer) for answer in answers} == {3, 12}
  with pytest.raises(UserError, match='length must be at least 120'):
    recall.make(kinds=('passkey',), digits=(3, 12), length=119)


def test_rows_are_one_document_with_the_distance_asked_for(both):
  found = set()
  batch = both.batch('train', 3, 60)
  resets_BT = batch['inputs']['resets']
  assert resets_BT[:, 0].all() and not resets_BT[:, 1:].any()
  for words, _ in rows(both, index=3, size=60):
    fact = re.search(
      r'(the code is \d{5}|gives the \w+ to \w+)\. (?!\w+ gives)', words
    )
    question = re.search(r'(what is|who has) the \w+\? ', words)
    found.add(question.start() - fact.end())
  assert found == {0, 5, 64}


def test_no_held_out_fact_is_trained_on(both):
  def facts(pairs):
    codes = (re.search(r'the code is (\d{5})', words) for words, _ in pairs)
    return {code[1] for code in codes if code}

  trained = set().union(*(facts(rows(both, index=i)) for i in range(20)))
  held = [facts(rows(both, s, 0, 256)) for s in ('validation', 'test')]
  assert len(trained) > 300 and min(map(len, held)) > 90
  assert not trained & (held[0] | held[1]) and not held[0] & held[1]


def test_guessing_is_worth_what_the_module_says():
  """All eight people as often; the last receiver is right half of the time."""
  stream = np.random.default_rng(0)
  stories = [recall.draw('tracking', stream, 'train') for _ in range(1000)]
  answers = [story.answer for story in stories]
  counts = [answers.count(name) for name in recall.PEOPLE]
  assert min(counts) > 85 and max(counts) < 165
  assert 0.45 < np.mean([s.last == s.answer for s in stories]) < 0.55
  codes = [recall.draw('passkey', stream, 'test').answer for _ in range(200)]
  digits = ''.join(codes)
  assert 70 < min(map(digits.count, '0123456789'))


def test_filler_has_its_length_and_whole_sentences():
  stream = np.random.default_rng(1)
  for length in (0, 1, 7, 300):
    words = recall.filler(stream, length)
    assert len(words) == length and not re.search(r'\d', words)
    assert not length or words.endswith('. '[-length:])


def test_loss_weighs_the_answer(both):
  """Against sums by hand."""
  batch = both.batch('test', 0, 6)
  shape = (6, *both.spec.answer, both.spec.classes)
  logits = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  loss_B, metrics_B = both.loss(logits, batch)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row in range(6):
    on_T, target_T = batch['answer'][row], batch['targets'][row]
    ce_T = -log_p[row, np.arange(len(target_T)), target_T]
    expected = (ce_T[on_T].mean() + 0.1 * ce_T[~on_T].mean()) / 1.1
    np.testing.assert_allclose(loss_B[row], expected, rtol=1e-5)
    right = logits[row].argmax(-1)[on_T] == target_T[on_T]
    np.testing.assert_allclose(metrics_B['accuracy'][row], right.mean())
    assert metrics_B['answer_accuracy'][row] == right.all()


def test_mixed_rows_are_tracks_of_the_text():
  task = recall.make(share=0.5, length=112, distances=(4,))
  plain = text.make(length=112)
  for index in (0, 3):
    mixed, tracks = (
      task.batch('train', index, 8),
      plain.batch('train', index, 4),
    )
    for name in ('inputs', 'targets'):
      jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[:4], b),
        mixed[name],
        tracks[name],
      )
  logits = np.zeros((8, 112, task.spec.classes), np.float32)
  loss_B, _ = task.loss(logits, mixed)
  np.testing.assert_allclose(loss_B, np.log(task.spec.classes), rtol=1e-5)
  assert task.text.decode(plain.text.encode('def f(x): 3')) == 'def f(x): 3'


def test_stories_of_bytes_are_the_same_whatever_the_text(tmp_path):
  """So weights read what they learned under any Python, whose text differs."""
  path = tmp_path / 'a.txt'
  path.write_text('\n\n'.join(f'{i} \N{SNOWMAN} zzz' for i in range(99)))
  here, there = (
    recall.make(tokens='bytes', kinds=('passkey',), length=120, **fields)
    for fields in ({}, {'path': str(path), 'separator': '\n\n'})
  )
  assert here.spec.classes == there.spec.classes == 257
  for split in ('train', 'test'):
    chex.assert_trees_all_equal(
      here.batch(split, 1, 4), there.batch(split, 1, 4)
    )
  assert re.search(r'the code is (\d{5})\. ', rows(here)[0][0])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'kinds': ('poem',)}, r"kinds must be among .*'poem'"),
    ({'kinds': ()}, r'kinds must be among .* got \(\)'),
    ({'distances': ()}, r'distances must be numbers >= 0, got \(\)'),
    ({'distances': (-1,)}, r'distances must be numbers >= 0, got \(-1,\)'),
    ({'length': 100}, r'length must be at least 170 for a distance of 64'),
    ({'rest': -0.5}, 'rest must be >= 0, got -0.5'),
    ({'digits': ()}, r'digits must be numbers > 0, got \(\)'),
    ({'share': 1.0}, r'share must lie in \[0, 1\), got 1.0'),
    ({'eval_size': 0}, 'eval_size must be > 0, got 0'),
    ({'digits': (2, 16)}, "got 100 of 2 among '0123456789': make codes longer"),
    ({'symbols': '00'}, "symbols must be two different .*, got '00'"),
    (
      {'symbols': 'abcd\N{SNOWMAN}'},
      'symbols must be of characters of the text',
    ),
  ],
)
def test_bad_arguments_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    recall.make(**fields)


def test_a_text_without_digits_has_codes_of_letters(tmp_path):
  path = tmp_path / 'a.txt'
  letters = 'abcdefghijklmnopqrstuvwxyz .?'
  path.write_text('\n\n'.join(letters + ' ' + 'ab' * i for i in range(99)))
  fields = {'path': str(path), 'separator': '\n\n', 'kinds': ('passkey',)}
  with pytest.raises(UserError, match=r'symbols must be .*abcdefghij'):
    recall.make(**fields)
  task = recall.make(symbols='abcdefghij', **fields)
  for words, answer in rows(task):
    assert re.search(r'the code is ([a-j]{5})', words)[1] == answer
