"""Mamba-1's kernel: the values and gradients of the recurrence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import UserError
from recursive_weights.scans import selective
from recursive_weights.scans.kernels import selective as kernel
from tests.pretended_gpu import pretend, without_triton

B, T, D, N, CHUNK = 2, 21, 48, 4, 8  # three blocks of channels, three chunks
MEANS = {'open': 0.0, 'tame': -0.05, 'violent': -80.0, 'shut': -1e4}


def inputs_of(gates, fresh, dtype=jnp.float32, width=D, entries=N):
  keys = jax.random.split(jax.random.key(0), 7)
  row, state = (B, T, width), (width, entries)
  given = {
    'x_BTD': jax.random.normal(keys[0], row).astype(dtype),
    'dt_BTD': jax.random.exponential(keys[1], row),
    'a_DN': MEANS[gates] * jax.random.exponential(keys[2], state),
    'b_BTN': jax.random.normal(keys[3], (B, T, entries)).astype(dtype),
    'c_BTN': jax.random.normal(keys[4], (B, T, entries)).astype(dtype),
    'state': jax.random.normal(keys[5], (B, *state)),
  }
  if fresh:
    given['fresh'] = jax.random.normal(keys[6], state)
  return given


def flags():
  """A reset at a chunk's start, inside one, twice in one; masked tokens."""
  resets, mask = np.zeros((B, T), bool), np.ones((B, T), bool)
  resets[0, [8, 11]] = resets[1, [0, 17, 18]] = True
  mask[1, 9:12] = False
  return {'resets': jnp.asarray(resets), 'mask': jnp.asarray(mask)}


@functools.cache
def program(algorithm):
  """Outputs, states (after `lengths` of a prefill), and all gradients."""

  def total(given, lengths=None):
    options = {'algorithm': algorithm, 'chunk': CHUNK, **flags()}
    if lengths is None:
      y, state = selective.scan(**given, **options)
    else:
      y, pending = selective.prefill(**given, **options)
      state = selective.commit(pending, lengths)
    weights = [jnp.sin(1.0 + jnp.arange(x.size)) for x in (y, state)]
    wide = [x.astype(jnp.float32).ravel() for x in (y, state)]
    loss = sum(w @ x for w, x in zip(weights, wide, strict=True))
    return loss, (y, state)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def distances(found, expected):
  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    return np.linalg.norm(a - b) / (np.linalg.norm(b) + 0.1)

  return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize('gates', MEANS)
def test_fused_is_recurrent(gates, fresh):
  given = inputs_of(gates, fresh)
  ours, plain = (program(name)(given) for name in ('fused', 'recurrent'))
  assert distances(ours, plain) < 1e-5
  if fresh:
    assert np.asarray(ours[1]['fresh']).any()


def test_fused_is_recurrent_in_the_largest_programs():
  """Two an example, of 64 channels of 16 entries: 1,024 states in registers."""
  given = inputs_of('tame', True, width=128, entries=16)
  ours, plain = (program(name)(given) for name in ('fused', 'recurrent'))
  assert distances(ours, plain) < 1e-5


def test_a_fused_prefill_commits_any_length():
  """With gradients, through the states that it kept."""
  given = inputs_of('tame', True)
  for lengths in ((0, T), (1, 7), (8, 16)):
    ours, plain = (
      program(name)(given, jnp.asarray(lengths))
      for name in ('fused', 'recurrent')
    )
    assert distances(ours, plain) < 1e-5


def test_one_token_and_values_of_16_bits():
  given = inputs_of('tame', False, jnp.bfloat16)
  one = {k: v[:, :1] if 'T' in k else v for k, v in given.items()}
  for inputs in (one, given):
    ours, plain = (
      selective.scan(**inputs, algorithm=name, chunk=CHUNK)
      for name in ('fused', 'recurrent')
    )
    assert ours[0].dtype == jnp.bfloat16
    assert distances(ours, plain) < 1e-2


def test_sizes_that_do_not_fit_are_named():
  given = inputs_of('tame', False)
  narrow = {k: v[..., :24] if 'D' in k[-3:] else v for k, v in given.items()}
  narrow |= {'a_DN': given['a_DN'][:24], 'state': given['state'][:, :24]}
  with pytest.raises(ValueError, match=r'multiples of 16 .* got 24 and 4'):
    selective.scan(**narrow, algorithm='fused')
  assert kernel.fits(16, 16) and not kernel.fits(16, 12)


@pytest.mark.parametrize('capability', ['8.0', '9.0', '12.0'])
def test_auto_is_fused_on_one_gpu_where_it_fits(capability, monkeypatch):
  def auto(dtype='bfloat16', width=D, entries=N):
    return selective.resolve('auto', jnp.dtype(dtype), width, entries)

  pretend(monkeypatch, '')  # whatever is here
  assert auto() == 'chunked'
  assert selective.resolve('fused', jnp.float32, D, N) == 'fused'
  pretend(monkeypatch, capability)
  for dtype in ('bfloat16', 'float16', 'float32'):
    assert auto(dtype) == 'fused'
  assert auto('float64') == 'chunked'
  for width, entries in ((24, N), (D, 12), (D, 1), (D, 128)):
    assert auto(width=width, entries=entries) == 'chunked'
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  assert auto() == 'chunked'


@pytest.mark.parametrize('form', ['scan', 'prefill'])
def test_what_auto_runs_on_a_gpu(form, monkeypatch):
  given = inputs_of('tame', True)

  def runs_kernel(**options):
    run = functools.partial(getattr(selective, form), **options)
    text = str(jax.make_jaxpr(lambda given: run(**given))(given))
    return 'selective_forward' in text

  pretend(monkeypatch, '9.0')
  assert runs_kernel() and runs_kernel(algorithm='fused')
  assert not runs_kernel(algorithm='chunked')
  pretend(monkeypatch, '7.5')
  assert not runs_kernel()
  with pytest.raises(UserError, match=r'8\.0 or more, got Some GPU'):
    runs_kernel(algorithm='fused')
  pretend(monkeypatch, '9.0')
  without_triton(monkeypatch)
  assert not runs_kernel()
  with pytest.raises(UserError, match='Triton backend of Pallas'):
    runs_kernel(algorithm='fused')


def test_it_lowers_for_a_gpu(monkeypatch):
  pretend(monkeypatch, '9.0')
  given = inputs_of('tame', True)
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  program.cache_clear()
  try:
    with jax.sharding.use_abstract_mesh(mesh):
      text = (
        program('fused')
        .trace(given)
        .lower(lowering_platforms=('cuda',))
        .as_text()
      )
  finally:
    program.cache_clear()
  for name in ('selective_forward', 'selective_backward'):
    assert re.search(rf'\b{name}\b', text)
