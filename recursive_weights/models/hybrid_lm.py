"""A language model of recurrent layers: RWKV-6, Mamba-2, both, and attention.

A pattern names the layers. Layers of a kind keep their weights in one stack
`[L, ...]`; where the pattern repeats, `lax.scan` runs it, so the program does
not grow with the depth, and a rule of `derivation` on a stack derives all its
layers.

Source: GroundThink (the block of parallel RWKV-6 and Mamba-2, its fusions,
grounding, StateNorm and residual scale, attention anchors); B. Peng et al. 2024
(arXiv 2404.05892); T. Dao and A. Gu 2024 (arXiv 2405.21060).
"""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Decoder, Model, Spec, UserError
from recursive_weights.models import hybrid_blocks
from recursive_weights.models.decoder import from_decoder, text_spec
from recursive_weights.models.layers import fusion as fusion_lib
from recursive_weights.models.layers import past, trm_block

INITIAL = ('learned', 'zeros')
ALGORITHMS = ('auto', 'chunked', 'fused')
PRECISIONS = ('default', 'high', 'highest')

# Sizes with pattern 'H', by the number of parameters at a vocabulary of 97
# characters (`8m`, `30m`) and of 24,576 byte pairs (`125m`).
SIZES: dict[str, dict[str, Any]] = {
  '8m': {'width': 256, 'layers': 6, 'expansion': 3.0, 'head_width': 32},
  '30m': {'width': 384, 'layers': 12, 'expansion': 2.0, 'head_width': 32},
  '125m': {'width': 768, 'layers': 12, 'expansion': 1.5, 'head_width': 64},
}


def make(
  spec: Spec,
  *,
  pattern: str = 'H',
  layers: int = 12,
  anchors: tuple[int, ...] = (),
  width: int = 384,
  head_width: int = 64,
  mix_rank: int = 32,
  decay_rank: int = 64,
  half_life: tuple[float, float] | tuple[()] = (),
  grounding: float = 0.0,
  learned_grounding: bool = False,
  state_width: int = 64,
  expand: int = 2,
  groups: int = 1,
  conv_width: int = 4,
  window: int = 256,
  expansion: float = 4.0,
  fusion: str = 'gf_mh',
  norm: str = 'rms',
  gamma: float = 0.0,
  state_norm: int = 0,
  initial: str = 'learned',
  tied: bool = True,
  embedding_norm: bool = False,
  dropout: float = 0.0,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
  remat: bool = True,
  dtype: Any = 'float32',
) -> Model:
  """The model, its cache as carry; see `decoder.from_decoder`.

  Parameters: `embedding/table [V, D]`, a stack for each kind of layer there is
  (`rwkv6`, `mamba2`, `attention`, `hybrid`), `norm` and, where not tied,
  `head [D, V]`. Nothing that is off has any.

  The published RWKV-6 is `pattern='R'` with norm 'layer', embedding_norm, not
  tied, initial 'zeros'; the published Mamba-2 is `pattern='M'` with initial
  'zeros' (and tied or not).

  Args:
    spec: of the task: inputs `tokens` and `resets` `[T]`, V classes.
    pattern: letters of `hybrid_blocks`, each with a count before it where it
      repeats, such as '3R1M'; the whole repeats up to `layers`.
    layers: a multiple of the pattern's length.
    anchors: numbers of layers, from 0, that are attention instead.
    width: D.
    head_width: K of RWKV-6's and attention's heads, P of Mamba-2's.
    mix_rank, decay_rank, grounding, learned_grounding: of the time mix, see
      `rwkv6.time_init`.
    half_life: of every state at the start, from the first to the last channel
      of the time mix and head of Mamba-2; () for the published ones.
    state_width, expand, groups, conv_width: of Mamba-2, see `mamba2.init`.
    window: M, tokens that attention sees, the own one included.
    expansion: hidden width of the mlp over D.
    fusion: of 'H', see `layers.fusion`.
    norm: 'rms' or 'layer'.
    gamma: the learned residual scale at the start; 0 for none.
    state_norm: groups of StateNorm in each head; 0 for none.
    initial: 'learned' states, or 'zeros', before a document.
    tied: the head is the transposed embedding.
    embedding_norm: a norm after the embedding, which then starts tiny.
    dropout: of what layers add, in training.
    algorithm: of the scans, 'auto', 'chunked' or 'fused', see `scans`.
    chunk: tokens a chunk of the scans, a power of two: 32 on a CPU, 64 else.
    precision: of float32 products in the scans, one of `PRECISIONS`.
    remat: layers run again in the backward pass: a quarter of the memory, and
      on a CPU no slower, as what scans keep is much.
    dtype: of hidden states; recurrent states, decays, norms, softmax and
      logits are float32.

  Raises:
    UserError: an argument is out of range or used by no layer, or the task is
      not about text.
  """
  dtype = jnp.dtype(dtype)
  fields = dict(locals())
  _check(spec, fields)
  letters = _layers(pattern, layers, anchors)
  for name, users in (('half_life', 'RMH'), ('learned_grounding', 'RH')):
    if fields[name] and not set(letters) & set(users):
      raise UserError(
        f'{name} = {fields[name]} needs a layer among {users}, got pattern '
        f'{pattern!r}: leave it out'
      )
  kinds = hybrid_blocks.make(letters, **fields)
  segments = plan(letters)
  vocabulary = spec.classes

  def init(key):
    keys = jax.random.split(key, layers + 2)
    small = 1e-4 if embedding_norm else 0.02
    draw = jax.random.uniform if embedding_norm else jax.random.normal
    table_VD = draw(keys[-1], (vocabulary, width))
    if embedding_norm:
      table_VD = 2 * table_VD - 1
    params = {'embedding': {'table': small * table_VD}}
    if embedding_norm:
      params['embedding']['norm'] = hybrid_blocks.norm_init(norm, width)
    for letter, name in hybrid_blocks.LETTERS.items():
      where = np.flatnonzero(np.array(list(letters)) == letter)
      if len(where):
        params[name] = jax.vmap(kinds[name].init)(
          keys[where], where.astype(np.float32)
        )
    params['norm'] = hybrid_blocks.norm_init(norm, width)
    if not tied:
      params['head'] = 0.5 * trm_block.lecun(keys[-2], width, vocabulary)
    return params

  def embed(params, tokens_BT):
    x_BTD = params['embedding']['table'][tokens_BT].astype(dtype)
    if embedding_norm:
      x_BTD = hybrid_blocks.norm(params['embedding']['norm'], x_BTD)
    return x_BTD

  def head(params, x_BTD):
    x_BTD = hybrid_blocks.norm(params['norm'], x_BTD)
    kernel_DV = params['embedding']['table'].T if tied else params['head']
    return jnp.matmul(
      x_BTD, kernel_DV.astype(dtype), preferred_element_type=jnp.float32
    )

  def cache(params, batch_size):
    del params
    found = {
      name: _repeat(kinds[name].start(batch_size), letters.count(letter))
      for letter, name in hybrid_blocks.LETTERS.items()
      if name in kinds
    }
    return _as_cache(found, jnp.zeros([batch_size], jnp.int32))

  def blocks(params, cache, x_BTD, *, resets_BT=None, tap=None, key=None):
    batch, length = x_BTD.shape[:2]
    place_BT = past.places(cache['position'], length, resets_BT)
    all_B = jnp.full([batch], length, jnp.int32)
    caches = _by_layer(cache)

    def unit(letters, first, x_BTD, stacks, index):
      """One period of the pattern: layers `first + index * period`, ..."""
      found = {name: [] for name in stacks}
      for j, letter in enumerate(letters):
        name = hybrid_blocks.LETTERS[letter]
        kind = kinds[name]
        weights, state = _index(stacks[name], len(found[name]))
        layer = first + index * len(letters) + j

        def see(y_BTD, part, layer=layer):
          return y_BTD if tap is None else tap(layer, y_BTD, part)

        layer_key = None if key is None else jax.random.fold_in(key, layer)
        x_BTD, parts = kind.apply(
          weights, state, x_BTD, place_BT, layer_key, see
        )
        whole = kind.commit(state, parts, place_BT, all_B)
        found[name].append((whole, parts))
        x_BTD = see(x_BTD, '')
      return x_BTD, {
        name: jax.tree.map(lambda *x: jnp.stack(x), *trees)
        for name, trees in found.items()
      }

    used = collections.Counter()
    found = collections.defaultdict(list)
    first = 0
    for unit_letters, repeats in segments:
      stacks = {}
      for letter, count in collections.Counter(unit_letters).items():
        name = hybrid_blocks.LETTERS[letter]
        start = used[name]
        used[name] += repeats * count
        stacks[name] = _periods(
          (params[name], caches[name]), start, repeats, count
        )
      run = functools.partial(unit, unit_letters, first)
      if remat:
        run = jax.checkpoint(run)

      def body(x_BTD, row, run=run):
        stacks, index = row
        return run(x_BTD, stacks, index)

      x_BTD, out = jax.lax.scan(
        body, x_BTD, (stacks, jnp.arange(repeats, dtype=jnp.int32))
      )
      first += repeats * len(unit_letters)
      for name, tree in out.items():
        found[name].append(_flat(tree))
    joined = {
      name: jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
      for name, trees in found.items()
    }
    whole = _swap({name: tree[0] for name, tree in joined.items()})
    position_B = past.advance(cache['position'], place_BT, all_B)
    return x_BTD, {
      'whole': _as_cache(whole, position_B),
      'parts': {name: tree[1] for name, tree in joined.items()},
      'place': place_BT,
    }

  def commit(cache, pending, length_B=None):
    if length_B is None:
      return pending['whole']
    place_BT, caches = pending['place'], _by_layer(cache)
    after = {
      name: jax.vmap(kinds[name].commit, (0, 0, None, None))(
        caches[name], parts, place_BT, length_B
      )
      for name, parts in pending['parts'].items()
    }
    position_B = past.advance(cache['position'], place_BT, length_B)
    return _as_cache(_swap(after), position_B)

  try:  # Layers check their own sizes.
    jax.eval_shape(init, jax.random.key(0))
  except ValueError as error:
    raise UserError(str(error)) from error
  return from_decoder(Decoder(embed, blocks, head, cache, commit, init))


def decoder(vocabulary: int, **fields) -> Decoder:
  """The decoder alone, of V tokens; `fields` are those of `make`."""
  found = make(text_spec(vocabulary), **fields).decoder
  assert found is not None
  return found


def count(vocabulary: int, **fields) -> int:
  """Number of parameters of such a model, without making one."""
  init = make(text_spec(vocabulary), **fields).init
  shapes = jax.eval_shape(init, jax.random.key(0), None)
  return sum(x.size for x in jax.tree.leaves(shapes))


def plan(letters: str) -> list[tuple[str, int]]:
  """`[(period, repeats), ...]`: the layers as few programs.

  From the bottom up, each time what covers most layers by repeating.
  """
  segments = []
  while letters:
    best = (letters[0], 1)
    for size in range(1, len(letters) // 2 + 1):
      period, repeats = letters[:size], 1
      while letters.startswith(period, repeats * size):
        repeats += 1
      if repeats > 1 and repeats * size > len(best[0]) * best[1]:
        best = (period, repeats)
    segments.append(best)
    letters = letters[len(best[0]) * best[1] :]
  return segments


def _layers(pattern, layers, anchors):
  """The letter of every layer."""
  known = ''.join(hybrid_blocks.LETTERS)
  period = ''.join(
    letter * int(count or 1)
    for count, letter in re.findall(r'(\d*)([^\d])', pattern)
  )
  unknown = sorted(set(period) - set(known))
  if not period or unknown or re.search(r'\d$|(?<!\d)0+[^\d]', pattern):
    raise UserError(
      f'pattern must be letters of {known}, each with a count > 0 before it '
      f"or none, such as '3R1M', got {pattern!r}"
    )
  if layers < 1 or layers % len(period):
    raise UserError(
      f'layers must be a multiple of the {len(period)} layers of pattern '
      f'{pattern!r}, got {layers}'
    )
  letters = list(period * (layers // len(period)))
  for anchor in anchors:
    whole = isinstance(anchor, (int, np.integer))
    if not whole or not 0 <= anchor < layers:
      raise UserError(
        f'anchors must be layers, whole numbers from 0 to {layers - 1}, got '
        f'{anchor!r}'
      )
    letters[anchor] = 'A'
  return ''.join(letters)


def _repeat(tree, count):
  """Every leaf `[B, ...]` as `[B, count, ...]`."""
  return jax.tree.map(lambda x: jnp.repeat(x[:, None], count, axis=1), tree)


def _index(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


def _periods(tree, start, repeats, count):
  """Layers of a stack from `start` on as `[repeats, count, ...]`."""
  end = start + repeats * count
  return jax.tree.map(
    lambda x: x[start:end].reshape(repeats, count, *x.shape[1:]), tree
  )


def _flat(tree):
  """`[repeats, count, ...]` as layers of a stack."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
  )


def _swap(tree):
  """Rows first to layers first, and back."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _by_layer(cache):
  """The stacks of a cache by kind, layers first."""
  return _swap(cache['recurrent'] | cache['attention'])


def _as_cache(stacks, position_B):
  attention = {n: x for n, x in stacks.items() if n == 'attention'}
  return {
    'recurrent': {n: x for n, x in stacks.items() if n not in attention},
    'attention': attention,
    'position': position_B,
  }


def _check(spec: Spec, given: dict[str, Any]) -> None:
  inputs = spec.inputs if isinstance(spec.inputs, dict) else {}
  if set(inputs) != {'tokens', 'resets'}:
    raise UserError(
      'the task must have inputs tokens and resets, got '
      f'{sorted(inputs) or spec.inputs}'
    )
  for name in ('width', 'mix_rank', 'decay_rank', 'window'):
    if given[name] < 1:
      raise UserError(f'{name} must be > 0, got {given[name]}')
  chunk = given['chunk']
  if chunk < 2 or chunk & (chunk - 1):
    raise UserError(f'chunk must be a power of two > 1, got {chunk}')
  if given['expansion'] <= 0:
    raise UserError(f'expansion must be > 0, got {given["expansion"]}')
  if given['gamma'] < 0:
    raise UserError(f'gamma must be >= 0 (0: none), got {given["gamma"]}')
  if not 0 <= given['dropout'] < 1:
    raise UserError(f'dropout must lie in [0, 1), got {given["dropout"]}')
  if given['initial'] not in INITIAL:
    raise UserError(
      f'initial must be one of {INITIAL}, got {given["initial"]!r}'
    )
  if given['fusion'] not in fusion_lib.NAMES:
    raise UserError(
      f'fusion must be one of {fusion_lib.NAMES}, got {given["fusion"]!r}'
    )
  if given['precision'] not in PRECISIONS:
    raise UserError(
      f'precision must be one of {PRECISIONS}, got {given["precision"]!r}'
    )
  if given['algorithm'] not in ALGORITHMS:
    raise UserError(
      f'algorithm must be one of {ALGORITHMS}, got {given["algorithm"]!r}'
    )
  if given['learned_grounding'] and not given['grounding']:
    raise UserError(
      'learned_grounding needs grounding > 0, where alpha starts, got 0'
    )
