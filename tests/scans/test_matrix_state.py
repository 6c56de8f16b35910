"""The scans as GPU kernels: where they compile, are chosen and refuse.

Their values and gradients: `test_recurrences`.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.scans import chunks, delta_rule, linear_attention
from recursive_weights.scans.kernels import matrix_state
from tests.pretended_gpu import pretend, without_triton

B, T, H, K, V = 2, 37, 2, 16, 32
RULES = {
  # Module, heads of keys, width of the decays, and what else it takes.
  'gated_linear': (linear_attention, H, K, ()),
  'rwkv6': (linear_attention, H, K, ('bonus_HK',)),
  'gated_delta': (delta_rule, 1, 1, ('beta',)),
  'kimi_delta': (delta_rule, H, K, ('beta',)),
  # What `ssd.scan` passes on: B and C that heads share, one decay a head.
  'ssd': (linear_attention, 1, 1, ()),
}
COVER = ('rwkv6', 'kimi_delta')  # between them every part of the kernels
GATES = {
  'tame': lambda key, shape: -0.05 * jax.random.exponential(key, shape),
  'violent': lambda key, shape: -80 * jax.random.exponential(key, shape),
  'shut': lambda key, shape: jnp.where(
    jax.random.bernoulli(key, 0.2, shape), -jnp.inf, jnp.zeros(shape)
  ),
}


def inputs_of(rule, gates, dtype=jnp.float32, fresh=False):
  _, groups, width, extra = RULES[rule]
  keys = jax.random.split(jax.random.key(0), 7)
  q, k = jax.random.normal(keys[0], (2, B, T, groups, K))
  k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
  v = jax.random.normal(keys[1], (B, T, H, V))
  given = {
    'q': q.astype(dtype),
    'k': k.astype(dtype),
    'v': v.astype(dtype),
    'g': GATES[gates](keys[2], (B, T, H, width)),
    'state': jax.random.normal(keys[3], (B, H, K, V)),
  }
  if fresh:
    given['fresh'] = jax.random.normal(keys[6], (H, K, V))
  if 'beta' in extra:
    given['beta'] = jax.nn.sigmoid(jax.random.normal(keys[4], (B, T, H)))
  if 'bonus_HK' in extra:
    given['bonus_HK'] = jax.random.normal(keys[5], (H, K))
  return given


def flags_of():
  """A reset at a chunk's start, inside one, twice in one; masked tokens."""
  resets, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
  resets[0, [5]] = True
  resets[1, [16, 30, 33]] = True
  mask[0, 35:] = False
  return {'resets': jnp.asarray(resets), 'mask': jnp.asarray(mask)}


@functools.cache
def program(rule, algorithm, lengths=None):
  """Outputs, last state, and gradients of every input; compiled once.

  With lengths, the states of a prefill after so many tokens.
  """
  module, _, width, _ = RULES[rule]

  def total(given, flags):
    given = dict(given)
    g = given.pop('g')
    if width == 1:
      g = g[..., 0]
    args = [given.pop(name) for name in 'qkv'] + [g]
    if 'beta' in given:
      args.append(given.pop('beta'))
    form = module.scan if lengths is None else module.prefill
    y, state = form(*args, **given, **flags, algorithm=algorithm)
    if lengths is not None:
      commit = jax.vmap(module.commit, (None, 0))
      state = commit(state, jnp.asarray(lengths))
    weights = (jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in (y, state))
    sums = ((x * w).sum() for x, w in zip((y, state), weights, strict=True))
    return sum(sums), (y, state)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def distances(found, expected):
  """`|a - b| / (|b| + 0.1)` leaf by leaf; all must be finite."""

  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / (np.linalg.norm(b) + 0.1)

  return jax.tree.map(one, found, expected)


@pytest.mark.long
@pytest.mark.parametrize('rule', COVER)
@pytest.mark.parametrize('gates', ['tame', 'violent', 'shut'])
def test_fused_in_bfloat16_is_as_far_from_float32_as_chunked(rule, gates):
  given, flags = inputs_of(rule, gates, jnp.bfloat16), flags_of()
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
  exact = program(rule, 'recurrent')(wide, flags)
  ours, plain = (
    distances(program(rule, name)(given, flags), exact)
    for name in ('fused', 'chunked')
  )
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    # States are kept and read in 16 bits, which the plain form's are not.
    assert a < 2 * b + 5e-3


@pytest.mark.parametrize('rule', RULES)
def test_kernels_lower_for_a_gpu(rule, monkeypatch):
  pretend(monkeypatch, '9.0')
  given = inputs_of(rule, 'tame', jnp.bfloat16, fresh=True)
  # From jax 0.11 on kernels are lowered for a device of a name, here or not.
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  program.cache_clear()
  try:
    with jax.sharding.use_abstract_mesh(mesh):
      texts = [
        program(rule, 'fused', lengths)
        .trace(given, flags_of())
        .lower(lowering_platforms=('cuda',))
        .as_text()
        for lengths in (None, ((0, 1),))
      ]
  finally:
    program.cache_clear()
  names = ('scan_inside', 'scan_along', 'scan_back', 'scan_inside_back')
  for text in texts:
    assert all(re.search(rf'\b{name}\b', text) for name in names)


@pytest.mark.parametrize('rule', ['rwkv6', 'gated_delta'])
def test_a_prefill_is_not_recurrent(rule):
  with pytest.raises(ValueError, match="got 'recurrent'"):
    program(rule, 'recurrent', ((0, 1),))(inputs_of(rule, 'tame'), flags_of())


def rows_of(dtype, values=16):
  """Checked inputs of linear attention."""
  q, k, v = (jnp.zeros((1, 4, 1, n), dtype) for n in (16, 16, values))
  return chunks.prepare(q, k, v, q, *[None] * 5)


@pytest.mark.parametrize('capability', ['8.0', '9.0', '12.0'])
def test_auto_is_fused_on_one_gpu_where_it_fits(capability, monkeypatch):
  given = rows_of(jnp.bfloat16)
  pretend(monkeypatch, '')  # whatever is here
  assert chunks.resolve('auto', given) == 'chunked'
  assert chunks.resolve('fused', given) == 'fused'
  pretend(monkeypatch, capability)
  assert chunks.resolve('auto', given) == 'fused'
  for dtype in (jnp.float16, jnp.float32):
    assert chunks.resolve('auto', rows_of(dtype)) == 'chunked'
  assert chunks.resolve('auto', rows_of(jnp.bfloat16, 8)) == 'chunked'
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  assert chunks.resolve('auto', given) == 'chunked'


@pytest.mark.parametrize(
  'memory, dtype, fitting, too_wide',
  [
    (101_376, 'bfloat16', (128, 128), (256, 128)),  # L4, RTX
    (101_376, 'float32', (128, 128), (128, 256)),
    (166_912, 'bfloat16', (256, 128), (256, 256)),  # A100
    (166_912, 'float32', (128, 256), (256, 128)),
    (232_448, 'float32', (256, 128), (256, 256)),  # Hopper
  ],
)
def test_states_have_room_on_chip(
  memory, dtype, fitting, too_wide, monkeypatch
):
  def given(keys, values):
    q = jnp.zeros((1, 4, 1, keys), dtype)
    v = jnp.zeros((1, 4, 1, values), dtype)
    return chunks.prepare(q, q, v, q, *[None] * 5)

  takes, refuses = given(*fitting), given(*too_wide)
  pretend(monkeypatch, '9.0')
  monkeypatch.setattr(
    jax.devices()[0], 'shared_memory_per_block_optin', memory, raising=False
  )
  assert matrix_state.fits(takes)
  assert not matrix_state.fits(refuses)


@pytest.mark.parametrize('capability', ['6.0', '7.5', 'gfx942'])
def test_a_gpu_that_cannot_run_kernels_runs_the_plain_form(
  capability, monkeypatch
):
  args = [jnp.ones((1, 4, 1, 16), jnp.bfloat16)] * 3
  args.append(jnp.zeros((1, 4, 1)))
  expected = linear_attention.scan(*args, algorithm='chunked')
  pretend(monkeypatch, capability)
  found = linear_attention.scan(*args, algorithm='auto')
  chex.assert_trees_all_equal(found, expected)
  with pytest.raises(UserError, match=r'8\.0 or more, got Some GPU'):
    linear_attention.scan(*args, algorithm='fused')


def test_a_jax_without_the_kernels_backend_runs_the_plain_form(monkeypatch):
  args = [jnp.ones((1, 4, 1, 16), jnp.bfloat16)] * 3
  args.append(jnp.zeros((1, 4, 1)))
  expected = linear_attention.scan(*args, algorithm='chunked')
  pretend(monkeypatch, '9.0')
  without_triton(monkeypatch)
  found = linear_attention.scan(*args, algorithm='auto')
  chex.assert_trees_all_equal(found, expected)
  with pytest.raises(UserError, match='Triton backend of Pallas'):
    linear_attention.scan(*args, algorithm='fused')


def test_what_does_not_fit_is_named():
  given = inputs_of('gated_linear', 'tame')
  args = [given[name] for name in ('q', 'k', 'v', 'g')]
  args[2] = args[2][..., :24]
  with pytest.raises(ValueError, match='got float32 of 16 and 24'):
    linear_attention.scan(*args, algorithm='fused')
  args[2] = jnp.zeros((B, T, H, V), jnp.float16)
  with pytest.raises(ValueError, match='got float16 of 16 and 32'):
    linear_attention.scan(*args, algorithm='fused')
