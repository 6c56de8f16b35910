"""A session goes on to the same text, or is refused with the reason."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.decoding import generate, sampling, sessions
from recursive_weights.interfaces import UserError
from tests import tiny_decoder

V = 7
DECODER = tiny_decoder.decoder
PARAMS = tiny_decoder.init(jax.random.key(0), V)
OTHERS = tiny_decoder.init(jax.random.key(1), V)
WEIGHTS = sessions.fingerprint(PARAMS)
TEXTS = [np.arange(5) % V, np.arange(3) % V]


@functools.cache
def read_by(which):
  params = {'own': PARAMS, 'others': OTHERS}[which]
  stream = generate.start(DECODER, params, jnp.array([8, 9]))
  return generate.read(DECODER, params, stream, *generate.padded(TEXTS))


def begun(params=PARAMS):
  return read_by('own' if params is PARAMS else 'others')


def written(stream, params=PARAMS):
  choose = sampling.make()
  tokens_BT, *_ = generate.write(
    DECODER, params, stream, jnp.array([6, 6]), count=6, choose=choose
  )
  return tokens_BT


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'talk.session'
  sessions.save(path, begun(), weights=WEIGHTS, texts=TEXTS)
  return path


def test_a_loaded_session_is_the_saved_one(path):
  like = jax.eval_shape(begun)
  found = sessions.load(path, like, weights=WEIGHTS)
  chex.assert_trees_all_equal(found, begun())
  chex.assert_trees_all_equal(written(found), written(begun()))
  assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_halves_and_flags_survive(tmp_path):
  stream = begun()._replace(
    logits_BV=jnp.arange(2 * V, dtype=jnp.bfloat16).reshape(2, V) / 3,
    done_B=jnp.array([True, False]),
    cache={'a': jnp.zeros((2, 0)), 'b': {}, 'c': (jnp.ones(2, jnp.int8),)},
  )
  sessions.save(tmp_path / 's', stream, weights='')
  found = sessions.load(tmp_path / 's', stream, weights='')
  chex.assert_trees_all_equal(found, stream)
  chex.assert_trees_all_equal_dtypes(found, stream)


def test_fingerprints_tell_weights_apart():
  assert sessions.fingerprint(jax.tree.map(jnp.copy, PARAMS)) == WEIGHTS
  assert sessions.fingerprint(OTHERS) != WEIGHTS
  renamed = dict(PARAMS)
  renamed['w'] = renamed.pop('q')
  assert sessions.fingerprint(renamed) != WEIGHTS
  nudged = PARAMS | {'q': PARAMS['q'].at[0, 0].add(1e-6)}
  assert sessions.fingerprint(nudged) != WEIGHTS


def test_other_weights_are_refused_and_read_again(path):
  like = jax.eval_shape(begun)
  other = sessions.fingerprint(OTHERS)
  message = f'{other[:12]}, got one of {WEIGHTS[:12]}: .* by --rebuild'
  with pytest.raises(UserError, match=message):
    sessions.load(path, like, weights=other)
  found = sessions.rebuild(path, DECODER, OTHERS)
  chex.assert_trees_all_close(found, begun(OTHERS), atol=1e-5)
  chex.assert_trees_all_equal(
    written(found, OTHERS), written(begun(OTHERS), OTHERS)
  )
  # Both texts begin with token 0: as a boundary, it changes only rounding.
  chex.assert_trees_all_close(
    sessions.rebuild(path, DECODER, OTHERS, boundary=0), found, atol=1e-5
  )
  parted = sessions.rebuild(path, DECODER, OTHERS, boundary=2)
  late = generate.start(DECODER, OTHERS, jnp.array([8, 9]))
  late = generate.read(
    DECODER, OTHERS, late, *generate.padded([x[2:] for x in TEXTS])
  )
  chex.assert_trees_all_close(parted.logits_BV, late.logits_BV, atol=1e-5)
  for row, text in zip(sessions.texts(path), TEXTS, strict=True):
    np.testing.assert_array_equal(row, text)


def test_a_session_without_text_belongs_to_its_weights(tmp_path):
  sessions.save(tmp_path / 's', begun(), weights=WEIGHTS)
  assert sessions.texts(tmp_path / 's') == []
  with pytest.raises(UserError, match='must hold its text'):
    sessions.rebuild(tmp_path / 's', DECODER, OTHERS)


def test_text_of_another_vocabulary_is_not_read_again(path):
  fewer = tiny_decoder.init(jax.random.key(2), 4)
  with pytest.raises(UserError, match='tokens must be < 4, got 4'):
    sessions.rebuild(path, DECODER, fewer)


def test_other_shapes_are_refused(path):
  like = jax.eval_shape(begun)
  wider = like._replace(logits_BV=jax.ShapeDtypeStruct((2, 9), jnp.float32))
  message = r'logits_BV must be float32\[2, 9\], got float32\[2, 7\]'
  with pytest.raises(UserError, match=message):
    sessions.load(path, wider, weights=WEIGHTS)
  more = like._replace(cache=like.cache | {'memory': like.position_B})
  with pytest.raises(UserError, match='has stream/cache/memory'):
    sessions.load(path, more, weights=WEIGHTS)
  fewer = like._replace(cache={})
  with pytest.raises(UserError, match='has no stream/cache/position'):
    sessions.load(path, fewer, weights=WEIGHTS)


def with_version(path, version):
  with np.load(path) as file:
    contents = dict(file)
  about = json.loads(contents['about'].tobytes()) | {'version': version}
  contents['about'] = np.frombuffer(json.dumps(about).encode(), np.uint8)
  with path.open('wb') as file:
    np.savez(file, **contents)


def test_newer_versions_are_refused_and_older_ones_mended(path, monkeypatch):
  like = jax.eval_shape(begun)
  with_version(path, sessions.VERSION + 1)
  with pytest.raises(UserError, match='update this program'):
    sessions.load(path, like, weights=WEIGHTS)
  with_version(path, 0)
  with pytest.raises(UserError, match='got 0'):
    sessions.load(path, like, weights=WEIGHTS)

  def from_zero(arrays, about):
    seeds = arrays['stream/seed_B'] + 1
    return arrays | {'stream/seed_B': seeds}, about

  monkeypatch.setitem(sessions.UPGRADES, 0, from_zero)
  found = sessions.load(path, like, weights=WEIGHTS)
  np.testing.assert_array_equal(found.seed_B, [9, 10])


@pytest.mark.parametrize('keep', [0, 10, 700, -30])
def test_damage_is_told(path, keep):
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match='no session, or damaged'):
    sessions.load(path, jax.eval_shape(begun), weights=WEIGHTS)


@pytest.mark.parametrize('junk', [b'junk', b'\x80\x04junk', b'PK\x03\x04'])
def test_junk_is_not_to_be_loaded_unsafely(tmp_path, junk):
  path = tmp_path / 's'
  path.write_bytes(junk)
  with pytest.raises(UserError, match=r's is no session.*: give') as told:
    sessions.texts(path)
  assert 'pickle' not in str(told.value)
  with pytest.raises(UserError, match=f'cannot read {tmp_path}: Is a dir'):
    sessions.texts(tmp_path)


def test_absence_and_wrong_texts_are_told(tmp_path):
  with pytest.raises(UserError, match='no session'):
    sessions.texts(tmp_path / 'nothing')
  with pytest.raises(ValueError, match=r'\[5, 3\], got \[5, 2\]'):
    sessions.save(
      tmp_path / 's', begun(), weights='', texts=[TEXTS[0], TEXTS[1][:2]]
    )
