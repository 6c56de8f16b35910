"""Clusters from files: fields, splits by question or cluster, and errors."""

import csv
import json

import chex
import numpy as np
import pytest

from recursive_weights.basis import methods
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import question_answer

ROWS = [
  {
    'id': f'c{i}',
    'kind': 'odd' if i % 2 else 'even',
    'answer': f'answer number {i} of a kind',
    'questions': [f'question {i} {word}' for word in 'abcdef'],
    'test_questions': [f'other {i} {word}' for word in 'xy'],
  }
  for i in range(8)
]


def write(path, rows):
  if path.suffix == '.jsonl':
    path.write_text('\n'.join(json.dumps(row) for row in rows))
  elif path.suffix == '.json':
    path.write_text(json.dumps(rows))
  else:
    with path.open('w', newline='') as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  return str(path)


def make(path, **fields):
  return question_answer.make(path=path, encoder='hash', **fields)


def rows_of(task, split):
  """Inputs as a set of tuples, and targets."""
  batch = task.batch(split, 0, task.spec.sizes[split])
  keys = [tuple(np.round(x, 5).tolist()) for x in batch['inputs']]
  return dict(zip(keys, batch['targets'].tolist(), strict=True))


@pytest.mark.parametrize('kind', ['json', 'jsonl'])
def test_splits_share_no_question_and_cover_the_file(tmp_path, kind):
  path = write(tmp_path / f'a.{kind}', ROWS)
  task = make(path, train_questions=3, validation_questions=2)
  assert task.spec.sizes == {'train': 24, 'validation': 16, 'test': 16}
  assert task.spec.classes == 8
  found = {split: rows_of(task, split) for split in task.spec.sizes}
  keys = [key for rows in found.values() for key in rows]
  assert len(set(keys)) == len(keys)
  for i, row in enumerate(ROWS):
    for text in row['test_questions']:
      key = tuple(np.round(question_answer.hashed([text])[0], 5).tolist())
      assert found['test'][key] == i
  np.testing.assert_allclose(
    task.answers, question_answer.hashed([row['answer'] for row in ROWS])
  )


def test_more_training_questions_keep_those_before(tmp_path):
  path = write(tmp_path / 'a.jsonl', ROWS)
  few, more = (
    make(path, train_questions=n, validation_questions=2) for n in (1, 4)
  )
  assert rows_of(few, 'train').items() <= rows_of(more, 'train').items()
  chex.assert_trees_all_equal(
    few.batch('validation', 0, 16), more.batch('validation', 0, 16)
  )
  other = make(path, train_questions=1, split_seed=1)
  assert rows_of(few, 'train') != rows_of(other, 'train')


def test_one_question_a_row_with_splits(tmp_path):
  rows = [
    {'split': split, 'intent': f'ask_{i}', 'text': f'{split} text {j} of {i}'}
    for i in range(3)
    for j, split in enumerate(['train', 'train', 'val', 'test', 'other'])
  ]
  rows.append({'split': 'other', 'intent': 'none', 'text': 'of no use'})
  fields = {'question': 'text', 'answer': 'intent', 'cluster': 'intent'}
  for kind, encoding in (
    ('csv', 'utf-8'), ('csv', 'utf-8-sig'), ('jsonl', 'utf-8')
  ):  # fmt: skip
    path = tmp_path / f'b.{kind}'
    write(path, rows)
    path.write_text(path.read_text(), encoding)  # a spreadsheet's has a mark
    task = make(str(path), test='', **fields)
    assert task.spec.sizes == {'train': 6, 'validation': 3, 'test': 3}
    names = question_answer.hashed(['ask 0', 'ask 1', 'ask 2'])
    np.testing.assert_allclose(task.answers, names)


def test_transfer_holds_whole_clusters_out(tmp_path):
  path = write(tmp_path / 'a.jsonl', ROWS)
  task = make(path, transfer=True)
  members = [set(rows_of(task, split).values()) for split in task.spec.sizes]
  assert sorted(i for some in members for i in some) == list(range(8))
  assert [len(some) for some in members] == [4, 2, 2]
  assert task.spec.sizes['test'] == 16
  # Settings that one seed chose have not seen another's test questions.
  other = make(path, transfer=True, split_seed=1)
  assert rows_of(other, 'test') == rows_of(task, 'test')
  assert rows_of(other, 'train') != rows_of(task, 'train')


def test_without_test_questions_a_quarter_is_held_out(tmp_path):
  rows = [
    {k: x for k, x in row.items() if k != 'test_questions'} for row in ROWS
  ]
  task = make(write(tmp_path / 'a.json', rows), validation_questions=0)
  assert task.spec.sizes == {'train': 40, 'validation': 0, 'test': 8}


def test_where_takes_some_rows(tmp_path):
  path = write(tmp_path / 'a.jsonl', ROWS)
  assert make(path, where=('kind', 'odd')).spec.classes == 4
  with pytest.raises(UserError, match="no rows with kind 'none'"):
    make(path, where=('kind', 'none'))


def test_the_hash_names_texts_and_splits(tmp_path):
  path = write(tmp_path / 'a.jsonl', ROWS)
  first, again = (make(path, train_questions=2).data_hash for _ in range(2))
  assert first == again
  other = make(path, train_questions=3).data_hash
  assert other['train'] != first['train'] and other['test'] == first['test']


def stored(**changes):
  rows = [
    {
      'answer': f'{i}',
      'answer_embedding': [1.0, i],
      'questions': ['a', 'b'],
      'questions_embeddings': [[1.0, 2.0], [i, 0.0]],
      'test_questions': ['c'],
      'test_questions_embeddings': [[3.0, i]],
    }
    for i in range(3)
  ]
  rows[1] |= changes
  return rows


def test_stored_embeddings_are_taken_as_they_are(tmp_path):
  path = write(tmp_path / 'a.jsonl', stored())
  task = question_answer.make(path=path, encoder='stored')
  np.testing.assert_array_equal(task.answers, [[1, 0], [1, 1], [1, 2]])
  test = task.batch('test', 0, 3)
  np.testing.assert_array_equal(test['inputs'], [[3, 0], [3, 1], [3, 2]])
  np.testing.assert_array_equal(test['targets'], [0, 1, 2])


def test_other_embeddings_of_the_same_texts_are_other_data(tmp_path):
  paths = (
    write(tmp_path / 'a.jsonl', stored()),
    write(tmp_path / 'b.jsonl', stored(answer_embedding=[1.0, 7.0])),
  )
  first, other = (
    question_answer.make(path=path, encoder='stored').data_hash
    for path in paths
  )
  assert set(first.values()).isdisjoint(other.values())


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    (
      stored(questions_embeddings=[[1.0], [1.0, 2.0]]),
      r'one dimension, got \[',
    ),
    (stored(questions_embeddings=[[1.0, np.nan]] * 2), 'must be finite'),
    (stored(questions_embeddings=[[1.0, 2.0]]), r'row 2: .* as many as'),
    (stored(questions_embeddings=3.0), r'row 2: .* as many as .* got float'),
    (stored(answer_embedding=None), "must have 'answer_embedding'"),
  ],
)
def test_bad_embeddings_are_told(tmp_path, rows, message):
  path = write(tmp_path / 'a.jsonl', rows)
  with pytest.raises(UserError, match=message):
    question_answer.make(path=path, encoder='stored')


def test_bad_files_are_told(tmp_path):
  empty = [*ROWS, ROWS[0] | {'id': 'z', 'answer': 'lonely', 'questions': []}]
  for rows, message in (
    (empty, 'a question to train on, got none in 1, such as .lonely'),
    ([{'answer': 'a'}], "row 1 must have 'questions', got the fields answer"),
  ):
    with pytest.raises(UserError, match=message):
      make(write(tmp_path / 'a.jsonl', rows))
  two = [ROWS[0], ROWS[0] | {'answer': 'another'}]
  with pytest.raises(UserError, match='row 2: a cluster must have one answer'):
    make(write(tmp_path / 'a.jsonl', two), cluster='id')
  with pytest.raises(UserError, match='must end in'):
    make(write(tmp_path / 'a.jsonl', ROWS).replace('jsonl', 'txt'))
  with pytest.raises(UserError, match='cannot read'):
    make(str(tmp_path / 'none.jsonl'))
  with pytest.raises(UserError, match=r"encoder must be .* got 'bert'"):
    question_answer.make(path=str(tmp_path / 'a.jsonl'), encoder='bert')
  with pytest.raises(UserError, match='train_questions must be >= 0, got -1'):
    question_answer.make(train_questions=-1)


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('a.jsonl', '{"answer": "a", "questions": "q"}\n[1]', 'row 2 must be an'),
    ('a.jsonl', '{"answer": "a", "questions": "q"}\n{', 'row 2 must be JSON'),
    ('a.json', '["text"]', "row 1 must be an object of fields, got 'text'"),
    ('a.json', '{"rows": []}', 'a list of rows, got a dict in place of row 1'),
    (
      'a.json',
      '[{"answer": "a", "questions": "q", "test_questions": null}]',
      "row 1: 'test_questions' must be a text or a list of texts, got 'None'",
    ),
    (
      'a.json',
      '[{"answer": "a", "questions": [1, 2]}]',
      r"row 1: 'questions' must be a text or a list .* got '\[1, 2\]'",
    ),
  ],
)
def test_rows_of_another_form_are_told(tmp_path, name, text, message):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    make(str(path))


def test_planted_clusters_are_near_their_own_questions_not_answers():
  task = question_answer.make()
  test = task.batch('test', 0, task.spec.sizes['test'])
  by_answer = methods.ranks(test['inputs'] @ task.answers.T, test['targets'])
  assert np.mean(np.asarray(by_answer) == 1) < 0.2
  train = rows_of(task, 'train')
  keys = np.array(list(train))
  near = np.array(list(train.values()))[(test['inputs'] @ keys.T).argmax(1)]
  assert np.mean(near == test['targets']) > 0.95


def test_a_score_that_is_no_number_finds_nothing():
  scores_BE = np.array([[0.5, 0.1, 0.2], [0.5, np.nan, 0.2], [np.nan] * 3])
  targets_B = np.array([0, 1, 2])
  _, metrics = question_answer.loss(scores_BE, {'targets': targets_B})
  np.testing.assert_array_equal(metrics['recall_1'], [1, 0, 0])
  np.testing.assert_allclose(metrics['mrr'], [1, 1 / 3, 1 / 3], rtol=1e-6)


def test_fields_of_a_file_need_one():
  for fields in (
    {'transfer': True},
    {'limit': 3},
    {'where': ('a', 'b')},
    {'question': 'text'},
    {'test': ''},
    {'encoder': 'hash'},
    {'folder': 'weights'},
  ):
    name = next(iter(fields))
    with pytest.raises(UserError, match=f'{name} must be unset.*give path'):
      question_answer.make(**fields)
  with pytest.raises(UserError, match=r"encoder must be .* got 'bert'"):
    question_answer.make(encoder='bert')
