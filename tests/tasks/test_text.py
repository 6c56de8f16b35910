"""Text in tracks: what follows what, where it resets, and what a loss is of."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hybrid_lm
from recursive_weights import build, config
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _documents, text

WORDS = 'the quick brown fox jumps over a lazy dog and sleeps'.split()


def documents(count=60, seed=0):
  rng = np.random.default_rng(seed)
  return [
    ' '.join([f'({i})', *rng.choice(WORDS, rng.integers(3, 20))])
    for i in range(count)
  ]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  file = tmp_path_factory.mktemp('text') / 'text.txt'
  file.write_text('\n\n'.join(documents()))
  return str(file)


def make(where, **fields):
  return text.make(**{'path': where, 'separator': '\n\n', 'length': 8} | fields)


def walk(task, size, steps):
  """Inputs and targets of every track, `[B, steps T]`."""
  batches = [task.batch('train', i, size) for i in range(steps)]
  return [
    np.concatenate([pick(batch) for batch in batches], axis=1)
    for pick in (
      lambda b: b['inputs']['tokens'],
      lambda b: b['targets'],
      lambda b: b['inputs']['resets'],
    )
  ]


def test_tracks_go_on_where_they_were(path):
  task = make(path)
  inputs_BT, targets_BT, _ = walk(task, 3, 40)
  np.testing.assert_array_equal(inputs_BT[:, 1:], targets_BT[:, :-1])


def test_a_pass_reads_every_training_document_once(path):
  """Also across the seam, whole, with the boundary before and after."""
  task = make(path)
  inputs_BT, *_ = walk(task, 3, 400)
  parts = [
    task.text.decode(document)
    for row in inputs_BT
    for document in np.split(row, np.flatnonzero(row == text.BOUNDARY))[1:-1]
  ]
  seen = {x: parts.count(x) for x in set(parts)}
  held = []
  for split in ('validation', 'test'):
    batch = task.batch(split, 0, task.spec.sizes[split])
    row = batch['inputs']['tokens'].reshape(-1)
    held += [
      task.text.decode(x)
      for x in np.split(row, np.flatnonzero(row == text.BOUNDARY))[1:]
    ]
  assert not set(seen) & set(held)
  trained = [x for x in documents() if x in seen]
  assert sorted(seen) == sorted(trained)
  assert 40 <= len(trained) < 60 and len(trained) + len(set(held)) >= 60
  # 400 chunks of 8 in 3 tracks are several passes: all as often, up to ends.
  assert max(seen.values()) - min(seen.values()) <= 4


def test_the_ring_has_its_length_and_comes_round(path):
  task = make(path)
  whole = walk(task, 1, 1000)[0][0]
  period = next(
    p
    for p in range(8, len(whole) // 2)
    if (whole[p : 2 * p] == whole[:p]).all()
  )
  assert -(-period // 8) == task.spec.sizes['train']
  # Any number of tracks reads the same ring, from equally spaced places.
  inputs_BT, *_ = walk(task, 4, 30)
  for b, row in enumerate(inputs_BT):
    first = b * period // 4
    np.testing.assert_array_equal(row, np.roll(whole[:period], -first)[:240])


def test_resets_are_at_boundaries_alone(path):
  task = make(path)
  inputs_BT, _, resets_BT = walk(task, 3, 100)
  np.testing.assert_array_equal(resets_BT, inputs_BT == text.BOUNDARY)
  assert 0 < resets_BT.mean() < 0.2


def test_held_out_text_is_read_once_in_order(path):
  task = make(path)
  for split in ('validation', 'test'):
    batch = task.batch(split, 0, task.spec.sizes[split])
    on = np.arange(8)[None] < batch['length'][:, None]
    inputs, targets = batch['inputs']['tokens'][on], batch['targets'][on]
    assert inputs[0] == text.BOUNDARY and targets[-1] == text.BOUNDARY
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    np.testing.assert_allclose(batch['weight'], batch['length'] / 8)
    assert on[:-1].all() and len(inputs) == batch['weight'].sum() * 8


@pytest.mark.parametrize('size', [2, 5])
def test_a_curriculum_changes_lengths_and_nothing_else(path, size):
  plain = make(path, length=4)
  grown = make(path, length=4, curriculum=((0, 2), (3, 5), (4, 7)))
  assert grown.spec.phases == (
    (0, {'length': 2}),
    (3, {'length': 5}),
    (4, {'length': 7}),
  )
  lengths = [
    grown.batch('train', i, size)['targets'].shape[1] for i in range(6)
  ]
  assert lengths == [2, 2, 2, 5, 7, 7]
  for a, b in zip(walk(grown, size, 6), walk(plain, size, 7), strict=True):
    np.testing.assert_array_equal(a[:, :25], b[:, :25])


def test_shuffled_batches_hold_the_same_chunks_in_other_rows(path):
  plain, dealt = make(path), make(path, order='shuffled')
  moved = 0
  for index in range(5):
    a = plain.batch('train', index, 6)['inputs']['tokens']
    b = dealt.batch('train', index, 6)['inputs']['tokens']
    moved += (a != b).any(1).sum()
    np.testing.assert_array_equal(np.unique(a, axis=0), np.unique(b, axis=0))
  assert moved > 10


@pytest.mark.parametrize('size', [2, 3, 6])
def test_no_row_of_shuffled_batches_goes_on_with_its_own_text(path, size):
  task, tracks = make(path, order='shuffled'), make(path)
  batches, plain = (
    [x.batch('train', i, size) for i in range(2 * size + 1)]
    for x in (task, tracks)
  )

  def text_of(row, index):
    tokens = batches[index]['inputs']['tokens'][row]
    same = (plain[index]['inputs']['tokens'] == tokens[None]).all(1)
    assert same.sum() == 1
    return int(same.argmax())

  for index in range(2 * size):
    for row in range(size):
      assert text_of(row, index) != text_of(row, index + 1)
  with pytest.raises(UserError, match=r'batch_size must be > 1 .*, got 1'):
    task.batch('train', 0, 1)


def test_split_by_position_keeps_the_order(tmp_path):
  whole = ''.join(documents())
  (tmp_path / 'one.txt').write_text(whole)
  with pytest.raises(UserError, match='split_by'):
    text.make(path=str(tmp_path / 'one.txt'))
  task = text.make(
    path=str(tmp_path / 'one.txt'), split_by='position', length=8
  )
  parts = {
    split: task.text.decode(
      np.concatenate(
        [
          x[:n]
          for x, n in zip(
            *(
              task.batch(split, 0, task.spec.sizes[split])[k]
              for k in ('targets', 'length')
            ),
            strict=True,
          )
        ]
      )
    )
    for split in ('validation', 'test')
  }
  assert whole.endswith(parts['validation'] + parts['test'])
  assert abs(len(parts['test']) - len(whole) / 20) <= 1


def test_loss_is_the_mean_over_tokens(path):
  task = make(path)
  size = task.spec.sizes['test']
  batch = task.batch('test', 0, size)
  classes = task.spec.classes
  rng = np.random.default_rng(0)
  answer = rng.normal(size=(size, 8, classes)).astype(np.float32)
  loss_B, metrics_B = task.loss(jnp.asarray(answer), batch)
  logits = answer.astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  own = np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  on = np.arange(8)[None] < batch['length'][:, None]
  assert not on.all()
  weight_B = batch['weight']
  np.testing.assert_allclose(
    (loss_B * weight_B).sum() / weight_B.sum(), -own[on].mean(), rtol=1e-6
  )
  right = answer.argmax(-1) == batch['targets']
  np.testing.assert_allclose(
    (metrics_B['accuracy'] * weight_B).sum() / weight_B.sum(),
    right[on].mean(),
    rtol=1e-6,
  )


@pytest.mark.parametrize('tokens', ['characters', 'bytes'])
def test_text_survives_tokens(tmp_path, tokens):
  odd = 'naïve 北京 🦊\r\n\t'
  (tmp_path / 'a.txt').write_bytes(odd.encode())
  (tmp_path / 'b.txt').write_text('plain')
  task = text.make(path=str(tmp_path), split_by='position', tokens=tokens)
  found = task.text.encode(odd)
  assert found.dtype == np.int32 and found.min() > text.BOUNDARY
  assert found.max() < task.spec.classes
  assert task.text.decode(found) == odd
  assert task.text.decode([0, *found, 0]) == odd
  assert len(task.text.encode('')) == 0
  assert len(found) == (
    len(odd) if tokens == 'characters' else len(odd.encode())
  )


def test_another_test_file_keeps_the_vocabulary(path, tmp_path):
  other = tmp_path / 'other.txt'
  other.write_text('a fox\n\na dog')
  task, plain = make(path, test_path=str(other)), make(path)
  assert task.spec.classes == plain.spec.classes
  batch = task.batch('test', 0, task.spec.sizes['test'])
  shown = task.text.decode(batch['inputs']['tokens'].reshape(-1)[:12])
  assert shown == 'a foxa dog'
  assert task.data_hash['test'] != plain.data_hash['test']
  assert task.data_hash['train'] == plain.data_hash['train']
  # The text itself then needs no part for the test.
  tested = plain.batch('test', 0, plain.spec.sizes['test'])['inputs']['tokens']
  held = np.split(tested.reshape(-1), np.flatnonzero(tested == text.BOUNDARY))
  held = {task.text.decode(x) for x in held[1:]}
  rest = tmp_path / 'rest.txt'
  rest.write_text('\n\n'.join(x for x in documents() if x not in held))
  with pytest.raises(UserError, match='none is in test'):
    make(str(rest))
  found = make(str(rest), test_path=str(other))
  assert found.spec.sizes['train'] == task.spec.sizes['train']
  assert found.spec.sizes['test'] == 2
  other.write_text('a FOX')
  with pytest.raises(UserError, match="'F'"):
    make(path, test_path=str(other))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'length': 1}, 'length must be >= 2, got 1'),
    ({'tokens': 'words'}, "got 'words'"),
    ({'order': 'random'}, "got 'random'"),
    ({'split_by': 'page'}, "got 'page'"),
    ({'path': '/nowhere/at/all'}, 'cannot read /nowhere'),
    ({'curriculum': ((1, 4),)}, r'rise from 0, got \(1,\)'),
    ({'curriculum': ((0, 4), (0, 8))}, 'rise from 0'),
    ({'curriculum': (4, 8)}, r'\(\(step, length\), \.\.\.\), .* got \(4, 8\)'),
    ({'curriculum': ((0, 4, 8),)}, r'step, length\), .* got \(\(0, 4, 8\),\)'),
    ({'curriculum': ((0, 'a'),)}, r"step, length\), .* got \(\(0, 'a'\),\)"),
    ({'curriculum': 4}, r'step, length\), .* got 4'),
    ({'curriculum': ((0, 0),)}, 'lengths of the curriculum must be > 0, got 0'),
  ],
)
def test_errors_name_the_rule(path, fields, message):
  with pytest.raises(UserError, match=message):
    make(path, **fields)


def test_sources_and_short_texts(path, tmp_path):
  with pytest.raises(UserError, match="'web'"):
    text.make(source='web')
  with pytest.raises(UserError, match=r'got 500 x 8: make one'):
    make(path).batch('train', 0, 500)
  with pytest.raises(UserError, match='got none'):
    text.make(path=str(tmp_path))
  (tmp_path / 'x.txt').write_text('a fox')
  with pytest.raises(UserError, match=r'its 5 tokens none .*: give a longer'):
    text.make(path=str(tmp_path), split_by='position')
  (tmp_path / 'x.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match="tokens='bytes'"):
    text.make(path=str(tmp_path), split_by='position')


def test_a_text_too_short_to_train_may_be_evaluated(tmp_path):
  (tmp_path / 'x.txt').write_text('The quick brown fox')
  made = hybrid_lm.get_config('smoke,attention,bytes')
  made.task.update(path=str(tmp_path), split_by='position')
  data = config.to_data(made)
  with pytest.raises(UserError, match='config: batch_size x length must be'):
    build.build(data)
  assert 'perplexity' in build.build(data, trains=False).after
  # Nor need a phase be possible that training does not come to.
  made.task.update(path='', curriculum=((0, 8), (6, 10**6)))
  build.build(config.to_data(made))


def test_the_library_is_what_python_ships(tmp_path, monkeypatch):
  """Not what an installation has written beside it."""
  for name in ('a', 'z', 'sitecustomize', '_sysconfigdata__linux', '_sys'):
    (tmp_path / f'{name}.py').write_text(name)
  monkeypatch.setattr(
    _documents.sysconfig, 'get_path', lambda name: str(tmp_path)
  )
  assert _documents.shipped.__wrapped__('library') == (b'_sys', b'a', b'z')


def test_library_is_larger_text():
  task = text.make(source='library', length=64, tokens='bytes')
  batch = task.batch('train', 3, 2)
  chex.assert_shape(batch['targets'], (2, 64))
  assert 'def ' in task.text.decode(walk(task, 1, 400)[0][0])


def shares(documents):
  rows = [_documents.units(x, 'bytes') for x in documents]
  parts = _documents.split(documents, rows, 'document', even=True)
  total = sum(map(len, rows))
  return parts, [sum(map(len, parts[name])) / total for name in parts]


@pytest.mark.parametrize('source', _documents.SOURCES)
def test_shipped_text_has_held_out_splits_of_any_python(source):
  parts, found = shares(list(_documents.shipped(source)))
  low, high = _documents.SHARES
  assert low <= min(found[1:]) and max(found[1:]) <= high
  assert min(map(len, parts.values())) >= 2


def test_few_documents_are_hashed_until_their_splits_are_even():
  """Copies stay together, and the order of documents does not matter."""
  rng = np.random.default_rng(0)
  documents = [rng.bytes(int(n)) for n in rng.integers(100, 900, 60)]
  documents[7] = documents[3]
  parts, found = shares(documents)
  assert 0.025 <= min(found[1:]) and max(found[1:]) <= 0.1
  again, _ = shares(documents[::-1])
  for name, rows in parts.items():
    given = sorted(row.tobytes() for row in rows)
    assert given == sorted(row.tobytes() for row in again[name])
    copies = [row.astype(np.uint8).tobytes() for row in rows]
    assert copies.count(documents[3]) in (0, 2)
