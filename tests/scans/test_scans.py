"""A scan packed, masked, by prefills and in 16 bits is one scan.

`test_recurrences` holds the forms themselves to their recurrence.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.scans import chunks, selective
from tests.scans import recurrences
from tests.scans.recurrences import CASES, B, H, V, at, loop, timed

T = 13
CHUNK = 4
TOLERANCE = 1e-5
# Programs run once or twice: half the time to compile, the same values.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': '0'}
)
everywhere = pytest.mark.parametrize('name', CASES)


def given(name, mean=-0.05, seed=0):
  return recurrences.given(name, T, mean, seed)


def device(tree):
  return jax.tree.map(
    lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32), tree
  )


def scan(name, inputs, shared, **kwargs):
  return CASES[name].module.scan(**inputs, **shared, **kwargs)


@functools.cache
def program(name, dtype='float32'):
  """Compiled once: outputs, last state, and gradients of all real inputs."""

  def total(real, flags, weights):
    inputs, shared = real
    options = {'algorithm': 'chunked', 'chunk': CHUNK}
    y, state = scan(name, inputs, shared | flags, **options)
    assert y.dtype == dtype
    assert state.dtype == jnp.float32
    return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

  return jit(jax.value_and_grad(total, has_aux=True))


def parts_of(shared):
  """What has a gradient, what has none, and weights of a scalar loss."""
  flags = {'resets': shared['resets'], 'mask': shared['mask']}
  real = {'state': shared['state'], 'fresh': shared['fresh']}
  stream = np.random.default_rng(7)
  y_shape = (B, T, H, V) if shared['state'].ndim == 4 else (B, T, H)
  weights = [stream.normal(size=x) for x in (y_shape, shared['state'].shape)]
  return device(real), device(flags), device(weights)


def run(name, inputs, shared, dtype='float32'):
  real, flags, weights = parts_of(shared)
  inputs = {key: x.astype(dtype) for key, x in device(inputs).items()}
  (_, outputs), gradients = program(name, dtype)((inputs, real), flags, weights)
  return outputs, gradients


def close(actual, expected, tolerance=TOLERANCE):
  """||actual - expected|| <= tolerance (||expected|| + 0.1), leaf by leaf."""
  chex.assert_tree_all_finite(actual)
  chex.assert_trees_all_equal_shapes(actual, expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b)
    assert error <= tolerance * (np.linalg.norm(b) + 0.1), error


def texts(shared):
  """Two layouts: resets at a chunk's start, inside one, and twice in one."""
  shared['resets'][0, [4, 9]] = True
  shared['resets'][1, [0, 5, 6, 12]] = True
  shared['mask'][0, 11:] = False
  shared['mask'][1, :2] = False
  return shared


@pytest.mark.parametrize('name', ['rwkv6', 'kimi_delta', 'ssd'])
def test_members_in_one_program(name):
  """Gradients under vmap: one axis more, at which XLA's programs crashed."""
  members = [given(name, seed=seed) for seed in (0, 1)]
  alone = []
  for inputs, shared in members:
    real, flags, weights = parts_of(texts(shared))
    alone.append(((device(inputs), real), flags, weights))
  both = jax.tree.map(lambda *x: jnp.stack(x), *alone)
  each = jax.vmap(program(name).__wrapped__)
  found = jax.jit(each)(*both)
  expected = [program(name)(*member) for member in alone]
  expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
  close(found[0][1], expected[0][1])
  close(found[1], expected[1])


@everywhere
def test_packed_texts_are_separate_runs(name):
  inputs, shared = given(name, -8.0)
  shared['state'][:] = shared['fresh']
  shared['resets'][:, 6] = True
  packed, _ = run(name, inputs, shared)
  shared['resets'][:] = False
  # The second text at the start of a row, and nothing after it.
  inputs = {
    key: np.roll(x, -6, axis=1) if timed(key) else x
    for key, x in inputs.items()
  }
  shared['mask'][:, T - 6 :] = False
  alone, _ = run(name, inputs, shared)
  close((packed[0][:, 6:], packed[1]), (alone[0][:, : T - 6], alone[1]), 1e-5)


@everywhere
def test_masked_tokens_are_not_there(name):
  """Even where they hold nothing that could be computed with."""
  inputs, shared = given(name)
  flags = {key: shared[key][:, :9] for key in ('resets', 'mask')}
  y_short, state_short = loop(name, at(inputs, slice(9)), shared | flags)
  shared['mask'][0, 9:] = False
  for key, x in inputs.items():
    if timed(key):
      x[0, 9:] = np.nan
  (y, state), gradients = run(name, inputs, shared)
  chex.assert_tree_all_finite((y, state, gradients))
  assert not np.any(np.asarray(y)[0, 9:])
  close((y[0, :9], state[0]), (y_short[0], state_short[0]), 1e-5)


@pytest.mark.parametrize(
  ('name', 'algorithm'),
  [*((name, 'chunked') for name in CASES), ('selective', 'recurrent')],
)
def test_commit_is_a_shorter_run(name, algorithm):
  """The state after any number of tokens, its own for each row."""
  case = CASES[name]
  inputs, shared = given(name)
  shared['resets'][0, [4, 9]] = True
  shared['resets'][1, [0, 5, 6, 12]] = True
  expected = loop(name, inputs, shared)[0]

  @jit
  def prefill(inputs, shared):
    options = {'algorithm': algorithm, 'chunk': CHUNK}
    return case.module.prefill(**inputs, **shared, **options)

  y, pending = prefill(*device((inputs, shared)))
  close(y, expected)
  commit = jit(case.module.commit)
  for length in range(T + 1):
    lengths = np.array([length, T - length])
    masked = {**shared, 'mask': np.arange(T)[None] < lengths[:, None]}
    state = loop(name, inputs, masked)[1]
    close(commit(pending, jnp.asarray(lengths)), state)


@pytest.mark.parametrize(
  ('platform', 'algorithm'),
  [('cpu', 'recurrent'), ('gpu', 'chunked'), ('tpu', 'chunked')],
)
@pytest.mark.parametrize('form', ['scan', 'prefill'])
def test_mamba_1_chooses_by_the_device(form, platform, algorithm, monkeypatch):
  inputs = device(given('selective')[0])

  def program(**options):
    """The operations that it runs."""
    run = functools.partial(getattr(selective, form), **options)
    return str(jax.make_jaxpr(lambda inputs: run(**inputs))(inputs))

  named = {name: program(algorithm=name) for name in chunks.ALGORITHMS}
  assert named['chunked'] != named['recurrent']
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert program() == program(algorithm='auto') == named[algorithm]


@everywhere
@pytest.mark.parametrize('algorithm', ['chunked', 'recurrent', 'fused'])
def test_no_tokens_leave_the_state(name, algorithm):
  sizes = recurrences.Sizes(K=16, V=32, D=48)  # such as kernels take
  inputs, shared = recurrences.given(name, 0, sizes=sizes)
  y, state = jit(functools.partial(scan, name, algorithm=algorithm))(
    *device((inputs, shared))
  )
  assert y.shape[:2] == (B, 0)
  close(state, shared['state'], 1e-6)


@everywhere
def test_bfloat16_keeps_a_float32_state(name):
  """Operands of 8 bits of mantissa: 2 % of the norm of values and gradients."""
  inputs, shared = given(name)
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), device(inputs)
  )
  expected = run(name, rounded, shared)
  actual = run(name, rounded, shared, 'bfloat16')
  slopes = actual[1][0].values()
  assert all(x.dtype == jnp.bfloat16 for x in slopes)
  close(actual, expected, 2e-2)


@everywhere
@pytest.mark.parametrize('algorithm', ['chunked', 'recurrent'])
def test_lowers_for_tpu(name, algorithm):
  inputs, shared = device(given(name))

  def total(inputs, state):
    y, state = scan(
      name, inputs, {'state': state}, algorithm=algorithm, chunk=CHUNK
    )
    return y.sum() + state.sum()

  exported = jax.export.export(
    jax.jit(jax.grad(total)), platforms=['tpu', 'cuda']
  )(inputs, shared['state'])
  assert exported.platforms == ('tpu', 'cuda')


@everywhere
def test_wrong_arguments_are_named(name):
  inputs, shared = device(given(name))
  with pytest.raises(ValueError, match='algorithm must be in'):
    scan(name, inputs, {}, algorithm='fast')
  with pytest.raises(ValueError, match='chunk must be a power of two'):
    scan(name, inputs, {}, chunk=48)
  with pytest.raises(ValueError, match='state must be'):
    scan(name, inputs, {'state': shared['state'][:, :1]})
  with pytest.raises(ValueError, match='resets must be bool'):
    scan(name, inputs, {'resets': shared['resets'][:, 1:]})
