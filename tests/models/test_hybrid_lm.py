"""Laws of hybrid language models: any cut of a text is the text."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import build
from recursive_weights.derivation import compose, tree
from recursive_weights.derivation.operators import residual
from recursive_weights.evaluators import _state_reading
from recursive_weights.interfaces import Spec, UserError
from recursive_weights.models import decoder as decoder_lib
from recursive_weights.models import derived, hybrid_lm
from recursive_weights.models.layers import fusion

VOCABULARY, ROWS, TOKENS = 11, 2, 14
HALF = TOKENS // 2
SMALL = {
  'layers': 2,
  'width': 16,
  'head_width': 8,
  'mix_rank': 4,
  'decay_rank': 4,
  'state_width': 8,
  'window': 5,
  'chunk': 4,
}
CASES = {
  'rwkv6': {'pattern': 'R', 'norm': 'layer', 'embedding_norm': True},
  'mamba2': {'pattern': 'M', 'groups': 2, 'initial': 'zeros', 'tied': False},
  'attention': {'pattern': 'A', 'layers': 3},
  'hybrid': {'pattern': 'H', 'gamma': 0.5, 'grounding': 0.6, 'chunk': 2},
  'mixed': {
    'pattern': 'MA',
    'initial': 'zeros',
    'conv_width': 1,
    'chunk': 2,
  },
  'normed': {
    'pattern': 'H',
    'state_norm': 4,
    'fusion': 'hy',
    'grounding': 0.6,
    'learned_grounding': True,
    'half_life': (2.0, 64.0),
  },
}
# Their layers are in 'hybrid' and 'attention'; `layers/test_state_norm` has the
# state of 'normed'.
LONG = ('mamba2', 'mixed', 'normed')
everywhere = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
    for name in CASES
  ],
)
# Programs run a few times: half the time to compile, the same values.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': '0'}
)


def shaken(params):
  """Away from the start, where zeros hide what depends on what."""
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
    params,
  )


class Problem(NamedTuple):
  """A decoder, its parameters and its programs; few lengths, each compiled.

  run: `(cache, tokens, resets) -> (logits, cache, pending)`.
  """

  decoder: object
  params: object
  fresh: object
  run: object
  commit: object


@functools.cache
def problem(name):
  decoder = hybrid_lm.decoder(VOCABULARY, **(SMALL | CASES[name]))
  params = shaken(jit(decoder.init)(jax.random.key(0)))

  @jit
  def run(cache, tokens_BT, resets_BT):
    x_BTD, pending = decoder.blocks(
      params, cache, decoder.embed(params, tokens_BT), resets_BT=resets_BT
    )
    logits_BTV = decoder.head(params, x_BTD)
    return logits_BTV, decoder.commit(cache, pending), pending

  fresh = decoder.cache(params, ROWS)
  return Problem(decoder, params, fresh, run, jit(decoder.commit))


def text():
  """Documents of 7 and 7 tokens in the first row, of 3, 10 and 1 below."""
  stream = np.random.default_rng(0)
  tokens_BT = stream.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
  resets_BT = np.zeros((ROWS, TOKENS), bool)
  resets_BT[[0, 1, 1], [HALF, 3, 13]] = True
  return tokens_BT, resets_BT


NOTHING = np.zeros((ROWS, TOKENS), bool)


def lengths(*values):
  return np.array(values, np.int32)


def close(found, expected, atol=1e-5):
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=atol)


def cut(array, start, size):
  return array[:, start : start + size]


def same_memory(p, found, expected):
  """Two caches say the same about any text that follows."""
  probe = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS).astype(np.int32)
  probe %= VOCABULARY
  found, expected = (p.run(x, probe, NOTHING) for x in (found, expected))
  close(found[0], expected[0], 2e-5)


@everywhere
def test_any_cut_of_a_text_is_the_text(name):
  """One chunk, two, and token by token, with documents that begin."""
  p = problem(name)
  tokens, resets = text()
  whole, last, _ = p.run(p.fresh, tokens, resets)
  assert whole.dtype == jnp.float32
  chex.assert_shape(whole, (ROWS, TOKENS, VOCABULARY))
  for size in (HALF, 1):
    cache, found = p.fresh, []
    for start in range(0, TOKENS, size):
      logits, cache, _ = p.run(
        cache, cut(tokens, start, size), cut(resets, start, size)
      )
      found.append(logits)
    close(jnp.concatenate(found, axis=1), whole)
    chex.assert_trees_all_equal(cache['position'], last['position'])
    same_memory(p, cache, last)


@everywhere
def test_documents_of_a_row_are_their_separate_runs(name):
  p = problem(name)
  tokens, resets = text()
  whole = p.run(p.fresh, tokens, resets)[0]
  begun = p.run(p.fresh, tokens, NOTHING)[1]
  # A document's own run, also of a cache that has seen something else.
  alone = p.run(p.fresh, cut(tokens, HALF, HALF), cut(NOTHING, 0, HALF))[0]
  close(alone[0], whole[0, HALF:])
  both = p.run(begun, cut(tokens, HALF, HALF), cut(resets, HALF, HALF))[0]
  close(both[0], whole[0, HALF:])
  other = np.roll(tokens, -3, axis=1)
  alone = p.run(p.fresh, other, NOTHING)[0]
  close(alone[1, :10], whole[1, 3:13])
  assert not np.allclose(
    p.run(p.fresh, tokens, NOTHING)[0][0, HALF:], whole[0, HALF:], atol=1e-3
  )


@everywhere
def test_a_commit_of_any_length_is_a_run_of_that_prefix(name):
  p = problem(name)
  tokens, resets = text()
  # From a cache that is not fresh, past the window of attention.
  begun = p.run(p.fresh, tokens, NOTHING)[1]
  prefixes, cache = [begun], begun
  for t in range(TOKENS):
    cache = p.run(cache, cut(tokens, t, 1), cut(resets, t, 1))[1]
    prefixes.append(cache)
  _, last, pending = p.run(begun, tokens, resets)
  for n in range(TOKENS + 1):
    found = p.commit(begun, pending, lengths(n, TOKENS - n))
    expected = jax.tree.map(
      lambda a, b: jnp.stack([a[0], b[1]]), prefixes[n], prefixes[TOKENS - n]
    )
    close(found['recurrent'], expected['recurrent'], 2e-5)
    chex.assert_trees_all_equal(found['position'], expected['position'])
    if n in (2, 9):  # what slots out of sight hold is no matter
      same_memory(p, found, expected)
  everything = p.commit(begun, pending, lengths(TOKENS, TOKENS))
  close(everything, last)


@everywhere
def test_a_commit_of_nothing_changes_no_bit(name):
  p = problem(name)
  tokens, resets = text()
  begun = p.run(p.fresh, tokens, NOTHING)[1]
  for cache in (p.fresh, begun):
    for size in (TOKENS, 1):
      pending = p.run(cache, cut(tokens, 0, size), cut(resets, 0, size))[2]
      found = p.commit(cache, pending, lengths(0, 0))
      chex.assert_trees_all_equal(found, cache)
      found = p.commit(cache, pending, lengths(0, 1))
      first, second = (jax.tree.map(lambda x: x[0], y) for y in (found, cache))
      chex.assert_trees_all_equal(first, second)


@everywhere
def test_rows_do_not_see_one_another_nor_what_comes_later(name):
  p = problem(name)
  tokens, resets = text()
  chex.assert_tree_shape_prefix(p.fresh, (ROWS,))
  assert set(p.fresh) == {'recurrent', 'attention', 'position'}
  plain = p.run(p.fresh, tokens, resets)[0]
  other = tokens.copy()
  other[1] = 0
  other[0, 9:] = (other[0, 9:] + 1) % VOCABULARY
  found = p.run(p.fresh, other, resets)[0]
  close(found[0, :9], plain[0, :9])
  assert not np.allclose(found[0, 9], plain[0, 9], atol=1e-3)


@everywhere
def test_every_parameter_learns_and_a_tap_that_looks_changes_nothing(name):
  p = problem(name)
  tokens, resets = text()
  count = (SMALL | CASES[name])['layers']
  width, parts = SMALL['width'], set()

  def loss(params, weight_LD):
    def tap(layer, x_BTD, part):
      parts.add(part)
      if part:
        return x_BTD
      return x_BTD + weight_LD[layer][None, None]

    x, _ = p.decoder.blocks(
      params,
      p.fresh,
      p.decoder.embed(params, tokens),
      resets_BT=resets,
      tap=tap,
    )
    logits = p.decoder.head(params, x)
    return (logits**2).sum(), logits

  off = jnp.zeros([count, width])
  grads, logits = jit(jax.grad(loss, (0, 1), has_aux=True))(p.params, off)
  close(logits, p.run(p.fresh, tokens, resets)[0])
  chex.assert_tree_all_finite(grads)
  # Every layer of a stack; tokens that do not occur are rows of their own.
  dead = [
    path
    for path, g in zip(
      tree.names(grads[0]), jax.tree.leaves(grads[0]), strict=True
    )
    if path != 'embedding/table'
    and not all(np.any(x) for x in (g if g.ndim > 1 else [g]))
  ]
  assert dead == []
  # The tap met what every recurrence puts out.
  assert parts == {'', *_state_reading.states(p.fresh)}
  # The tap met every layer by its number, and what it returned went on.
  assert all(np.any(x) for x in grads[1])


def test_a_pure_pattern_has_no_parameters_of_another_kind():
  kinds = {'R': 'rwkv6', 'M': 'mamba2', 'A': 'attention', 'H': 'hybrid'}
  shared = {'embedding', 'norm'}
  for letter, name in kinds.items():
    decoder = hybrid_lm.decoder(5, pattern=letter, **SMALL)
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    assert set(params) == shared | {name}
    for x in jax.tree.leaves(params[name]):
      assert x.shape[0] == SMALL['layers'] and x.dtype == jnp.float32
    cache = decoder.cache(None, 3)
    chex.assert_tree_shape_prefix(cache, (3,))
    used = 'attention' if letter == 'A' else 'recurrent'
    empty = 'recurrent' if letter == 'A' else 'attention'
    assert not cache[empty] and set(cache[used]) == {name}
  off = jax.eval_shape(
    hybrid_lm.decoder(5, pattern='H', initial='zeros', **SMALL).init,
    jax.random.key(0),
  )
  words = {word for path in tree.names(off) for word in path.split('/')}
  assert not words & {'gamma', 'gain', 'initial', 'first', 'grounding', 'head'}


def test_patterns_run_as_few_programs():
  plan = hybrid_lm.plan
  assert plan('H' * 12) == [('H', 12)]
  assert plan('RRRM' * 3) == [('RRRM', 3)]
  assert plan('RM' * 4) == [('RM', 4)]
  assert plan('HHHHHHAHHHHH') == [('H', 6), ('A', 1), ('H', 5)]
  assert plan('RRRMMM') == [('R', 3), ('M', 3)]
  for letters in ('A', 'RMRMRA', 'RRMRRMRRAR'):
    assert ''.join(unit * n for unit, n in plan(letters)) == letters


def test_the_order_of_layers_is_that_of_the_pattern():
  """Layers of stacks meet the layers that the pattern names, one by one."""
  fields = SMALL | {'layers': 6}
  scanned = hybrid_lm.decoder(VOCABULARY, pattern='2A1M', **fields)
  params = shaken(jit(scanned.init)(jax.random.key(0)))
  tokens, resets = text()

  def logits(decoder, params):
    x, _ = decoder.blocks(
      params,
      decoder.cache(params, ROWS),
      decoder.embed(params, tokens),
      resets_BT=resets,
    )
    return x

  x = scanned.embed(params, tokens)
  used = {'attention': 0, 'mamba2': 0}
  for letter in 'AAMAAM':
    name = {'A': 'attention', 'M': 'mamba2'}[letter]
    single = hybrid_lm.decoder(
      VOCABULARY, pattern=letter, **(fields | {'layers': 1})
    )
    own = jax.tree.map(lambda w, n=used[name]: w[n : n + 1], params[name])
    used[name] += 1
    x, _ = jit(
      lambda p, x, single=single: single.blocks(
        p, single.cache(p, ROWS), x, resets_BT=resets
      )
    )({name: own}, x)
  close(jit(lambda p: logits(scanned, p))(params), x)


def test_dropout_acts_in_training_alone():
  spec = decoder_lib.text_spec(VOCABULARY)
  tokens, resets = text()
  inputs = {'tokens': tokens, 'resets': resets}
  plain = hybrid_lm.make(spec, pattern='A', **SMALL)
  model = hybrid_lm.make(spec, pattern='A', dropout=0.5, **SMALL)
  params = jit(plain.init)(jax.random.key(0), inputs)

  def logits(model, train):
    def run(key):
      carry = model.carry(params, ROWS)
      outputs, after = model.apply(params, carry, inputs, key=key, train=train)
      chex.assert_trees_all_equal_shapes(after, carry)
      return outputs['logits']

    return jit(run)

  expected = logits(plain, True)(None)
  chex.assert_shape(expected, (1, ROWS, TOKENS, VOCABULARY))
  train, key = logits(model, True), jax.random.key(1)
  close(train(None), expected)
  close(logits(model, False)(key), expected)
  assert not np.allclose(train(key), expected, atol=1e-3)
  chex.assert_trees_all_equal(train(key), train(key))


def test_the_carry_passes_no_gradient_and_remat_changes_nothing():
  params = problem('attention').params
  tokens, resets = text()
  found = []
  for remat in (False, True):
    model = hybrid_lm.make(
      decoder_lib.text_spec(VOCABULARY),
      remat=remat,
      **(SMALL | CASES['attention']),
    )

    def loss(params, model=model):
      carry = model.carry(params, ROWS)
      inputs = {'tokens': tokens, 'resets': resets}
      outputs, carry = model.apply(params, carry, inputs, key=None, train=True)
      held = sum((x**2).sum() for x in jax.tree.leaves(carry['attention']))
      return held, (outputs['logits'] ** 2).sum()

    held = jit(jax.grad(lambda p, f=loss: f(p)[0]))(params)
    assert not any(np.any(x) for x in jax.tree.leaves(held))
    found.append(jit(jax.grad(lambda p, f=loss: f(p)[1]))(params))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-4)


def test_layers_derive_from_the_first_of_their_stack():
  """`recursive.rules` on stacked leaves: layer l is T^l of layer 0."""
  spec = decoder_lib.text_spec(VOCABULARY)
  fields = SMALL | {'pattern': 'A', 'layers': 3}
  base = hybrid_lm.make(spec, **fields)
  path = 'attention/mlp/up'
  operator = compose.iterate(residual.make(rank=2), 3, base_first=True)
  model = derived.wrap(base, (tree.Rule('depth', path, path, operator),))
  tokens, resets = text()
  inputs = {'tokens': tokens, 'resets': resets}
  stored = shaken(jit(model.init)(jax.random.key(0), inputs))
  full = (3, SMALL['width'], 4 * SMALL['width'])
  assert tree.leaf(stored, path).shape == full[1:]

  def logits(model, params):
    return model.apply(params, model.carry(params, ROWS), inputs)[0]['logits']

  params = tree.derive(model.rules, stored)
  assert tree.leaf(params, path).shape == full
  close(
    jit(lambda p: logits(model, p))(stored),
    jit(lambda p: logits(base, p))(params),
  )
  grads = jit(jax.grad(lambda p: (logits(model, p) ** 2).sum()))(stored)
  assert all(np.any(x) for x in jax.tree.leaves(grads['operators']))
  assert model.decoder is base.decoder


def test_a_config_derives_stacked_layers():
  spec = decoder_lib.text_spec(VOCABULARY)
  base = hybrid_lm.make(spec, **(SMALL | {'pattern': 'R', 'layers': 3}))
  shapes = jax.eval_shape(base.init, jax.random.key(0), None)
  path = 'rwkv6/time/value'
  rule = build.build_rule(
    'depth',
    {
      'source': path,
      'target': path,
      'adapter': {'name': ''},
      'operator': {'name': 'residual', 'rank': 2},
      'iterate': True,
    },
    {path: tree.leaf(shapes, path)},
  )
  params = jit(base.init)(jax.random.key(0), None)
  stored = tree.compress((rule,), params, jax.random.key(1))
  derived_stack = tree.leaf(tree.derive((rule,), stored), path)
  # The first layer is the stored one, and T starts as the identity.
  for layer in derived_stack:
    close(layer, tree.leaf(params, path)[0])


@pytest.mark.parametrize('name', fusion.NAMES)
def test_a_fusion_starts_at_its_share(name):
  width = 4
  params = fusion.init(jax.random.key(0), name, width)
  count = {'hy': 2 * width, 'cp': 2 * width**2, 'ws': 1, 'rf': 1}
  wide = 2 * width**2 + width if name.startswith('hgf') else 2 * width + 1
  size = sum(x.size for x in jax.tree.leaves(params))
  assert size == count.get(name, wide)
  a, b = jax.random.normal(jax.random.key(1), (2, 3, 5, width))
  found = fusion.apply(params, name, a, b)

  def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

  kind, _, share = name.partition('_')
  if kind == 'hy':
    expected = 0.7 * rms(a) + 0.3 * rms(b)
  elif kind == 'rf':
    expected = a + 0.3 * b
  elif kind == 'cp':
    kernel = params['kernel']
    expected = jnp.einsum('BTD,DE->BTE', a, kernel[:width]) + jnp.einsum(
      'BTD,DE->BTE', b, kernel[width:]
    )
  elif share or kind == 'ws':
    s = {'mh': 0.3, 'rh': 0.7, 'xm': 0.03, 'xr': 0.97}.get(share, 0.5)
    expected = s * a + (1 - s) * b
  else:
    both = np.concatenate([a, b], -1)
    s = 1 / (1 + np.exp(-(both @ np.asarray(params['kernel']))))
    assert np.abs(s - 0.5).max() < 0.1
    expected = s * a + (1 - s) * b
  close(found, expected)


def test_sizes_are_what_they_are_called():
  for name, vocabulary in (('8m', 97), ('30m', 97), ('125m', 24_576)):
    wanted = int(name[:-1]) * 1_000_000
    found = hybrid_lm.count(vocabulary, **hybrid_lm.SIZES[name])
    assert abs(found / wanted - 1) < 0.05, (name, found)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'pattern': '3R1X'}, 'pattern must be letters of RMAH'),
    ({'pattern': ''}, 'pattern must be letters'),
    ({'pattern': '0R'}, 'pattern must be letters'),
    ({'pattern': 'R3'}, 'pattern must be letters'),
    ({'pattern': '3R1M', 'layers': 6}, 'layers must be a multiple of the 4'),
    ({'anchors': (9,)}, 'anchors must be layers, .* from 0 to 1, got 9'),
    ({'anchors': (1.5,)}, 'anchors must be layers, whole .* got 1.5'),
    ({'anchors': ('1',)}, "anchors must be layers, .* got '1'"),
    ({'head_width': 5}, 'head_width must divide'),
    ({'algorithm': 'quick'}, "algorithm must be one of .* got 'quick'"),
    ({'fusion': 'sum'}, 'fusion must be one of'),
    ({'fusion': 'sum', 'pattern': 'R'}, "fusion must be one of .* got 'sum'"),
    ({'norm': 'batch'}, 'norm must be one of'),
    ({'initial': 'random'}, 'initial must be one of'),
    ({'state_norm': 3}, 'state_norm must'),
    ({'grounding': 1.0}, 'grounding must lie'),
    ({'learned_grounding': True}, 'learned_grounding needs'),
    ({'half_life': (1.0,)}, 'half_life must be'),
    ({'half_life': (1.0, 0.0), 'pattern': 'M'}, 'half_life must be'),
    ({'half_life': (1.0, 9.0), 'pattern': 'A'}, 'needs a layer among RMH'),
    (
      {'learned_grounding': True, 'grounding': 0.5, 'pattern': 'M'},
      "needs a layer among RH, got pattern 'M'",
    ),
    ({'gamma': -1.0}, 'gamma must be'),
    ({'dropout': 1.0}, 'dropout must lie'),
    ({'chunk': 3}, 'chunk must be a power of two'),
    ({'window': 0}, 'window must be > 0'),
    ({'precision': 'most'}, "precision must be one of .* got 'most'"),
  ],
)
def test_what_is_wrong_is_said(fields, message):
  with pytest.raises(UserError, match=message):
    hybrid_lm.decoder(VOCABULARY, **(SMALL | fields))


def test_a_task_that_is_no_text_is_refused():
  spec = Spec(jax.ShapeDtypeStruct((4,), jnp.int32), (4,), 3, {})
  with pytest.raises(UserError, match='inputs tokens and resets'):
    hybrid_lm.make(spec)


def test_kernels_of_the_scans_give_the_same_layers():
  fields = SMALL | {'layers': 1, 'head_width': 16, 'state_width': 16}
  tokens, resets = text()
  params = jit(hybrid_lm.decoder(VOCABULARY, **fields).init)(jax.random.key(0))
  # Blocks that add nothing at the start would hide a difference.
  params = jax.tree.map(lambda x: x + 0.1, params)

  def run(algorithm):
    decoder = hybrid_lm.decoder(VOCABULARY, algorithm=algorithm, **fields)
    cache = decoder.cache(params, ROWS)
    x, pending = decoder.blocks(
      params, cache, decoder.embed(params, tokens), resets_BT=resets
    )
    return x, [decoder.commit(cache, pending, lengths(3, TOKENS))]

  plain, fused = (
    jit(lambda name=name: run(name))() for name in ('chunked', 'fused')
  )
  chex.assert_trees_all_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'pattern', ['H', pytest.param('A', marks=pytest.mark.long)]
)
def test_half_precision_keeps_types_and_most_digits(pattern):
  fields = SMALL | {'pattern': pattern}
  single = hybrid_lm.decoder(VOCABULARY, **fields)
  half = hybrid_lm.decoder(VOCABULARY, dtype='bfloat16', **fields)
  params = jit(single.init)(jax.random.key(0))
  tokens, resets = text()

  def run(decoder):
    cache = decoder.cache(params, ROWS)
    x, pending = decoder.blocks(
      params, cache, decoder.embed(params, tokens), resets_BT=resets
    )
    after = decoder.commit(cache, pending, lengths(3, TOKENS))
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      cache, decoder.commit(cache, pending)
    )
    for x_BL in jax.tree.leaves(after['recurrent']):
      assert x_BL.dtype == jnp.float32
    for x_BL in jax.tree.leaves(after['attention']):
      assert x_BL.dtype == x.dtype
    return decoder.head(params, x)

  expected, found = jit(lambda: run(single))(), jit(lambda: run(half))()
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=0.03 * np.std(expected) * 4)
