"""Dyadic decays are the products they stand for, for gates of any strength."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.scans import chunks, decay

C, K = 8, 3


def given(strength, width=K):
  stream = np.random.default_rng(0)
  gates_CK = -stream.exponential(strength, (C, width))
  resets_C = np.zeros(C, bool)
  resets_C[[3, 5]] = True
  return gates_CK, resets_C


def between(gates_CK, resets_C, first, last):
  """exp(g_first + ... + g_last), 0 across a reset, 1 for no token."""
  rows = slice(first, last + 1)
  return np.exp(gates_CK[rows].sum(0)) * (not resets_C[rows].any())


def matrix(gates_CK, resets_C, exclusive):
  """What reader i keeps of writer j < i, `[C, C, K]`."""
  whole = np.zeros((C, C, gates_CK.shape[1]))
  for i in range(C):
    for j in range(i):
      last = i - 1 if exclusive else i
      whole[i, j] = between(gates_CK, resets_C, j + 1, last)
      whole[i, j] *= not resets_C[i]
  return whole


@functools.partial(jax.jit, static_argnames='exclusive')
def scored(q_CK, k_CK, gates_CK, resets_C, diagonal_C, *, exclusive):
  factors = decay.anchors(gates_CK, resets_C, exclusive=exclusive)
  return decay.scores(q_CK, k_CK, factors, diagonal_C)


@pytest.mark.parametrize('width', [1, K])
@pytest.mark.parametrize('exclusive', [False, True])
@pytest.mark.parametrize('strength', [1e-3, 1.0, 20.0, 1e4])
def test_scores_are_sums_over_keys(width, exclusive, strength):
  gates_CK, resets_C = given(strength, width)
  stream = np.random.default_rng(1)
  q_CK, k_CK = stream.normal(size=(2, C, K))
  diagonal_C = stream.normal(size=C)
  kept_CCK = matrix(gates_CK, resets_C, exclusive)
  expected = (q_CK[:, None] * k_CK[None] * kept_CCK).sum(-1)
  expected += np.diag(diagonal_C)
  actual = scored(
    *(jnp.asarray(x, jnp.float32) for x in (q_CK, k_CK, gates_CK)),
    jnp.asarray(resets_C),
    jnp.asarray(diagonal_C, jnp.float32),
    exclusive=exclusive,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('exclusive', [False, True])
def test_ends_of_a_chunk(exclusive):
  gates_CK, resets_C = given(0.3)
  factors = decay.anchors(
    jnp.asarray(gates_CK, jnp.float32),
    jnp.asarray(resets_C),
    exclusive=exclusive,
    fresh=True,
  )
  read, fresh_read = np.zeros((C, K)), np.zeros((C, K))
  for i in range(C):
    last = i - 1 if exclusive else i
    read[i] = between(gates_CK, resets_C, 0, last) * (not resets_C[i])
    starts = np.flatnonzero(resets_C[: i + 1])
    if starts.size:
      fresh_read[i] = np.exp(gates_CK[starts[-1] : last + 1].sum(0))
  write = np.stack([between(gates_CK, resets_C, j + 1, C) for j in range(C)])
  for actual, expected in (
    (factors.read_CK, read),
    (factors.write_CK, write),
    (factors.whole_K, between(gates_CK, resets_C, 0, C)),
    (factors.fresh_read_CK, fresh_read),
    (factors.fresh_whole_K, np.exp(gates_CK[5:].sum(0))),
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('length', [C, C - 1, 1])
def test_ends_alone_of_any_length(length):
  gates_CK, resets_C = (x[C - length :] for x in given(0.3))
  wide_CK, told_C = jnp.asarray(gates_CK, jnp.float32), jnp.asarray(resets_C)
  found = decay.ends(wide_CK, told_C, fresh=True)
  write = [between(gates_CK, resets_C, j + 1, C) for j in range(length)]
  np.testing.assert_allclose(found.write_CK, write, rtol=1e-5, atol=1e-7)
  whole = between(gates_CK, resets_C, 0, C)
  np.testing.assert_allclose(found.whole_K, whole, rtol=1e-5, atol=1e-7)
  starts = np.flatnonzero(resets_C)
  born = np.exp(gates_CK[starts[-1] :].sum(0)) if starts.size else 0 * whole
  np.testing.assert_allclose(found.fresh_whole_K, born, rtol=1e-5, atol=1e-7)

  def total(wide_CK):
    return sum(x.sum() for x in decay.ends(wide_CK, told_C, fresh=True))

  for gates in (wide_CK, jnp.where(told_C[:, None], -jnp.inf, wide_CK)):
    assert np.isfinite(jax.grad(total)(gates)).all()


def test_a_commit_is_as_large_a_program_for_any_length():
  """Else it compiles for a minute where a text is one chunk."""

  def size(length):
    shapes = (1, 2, 1, 4, 4), (1, 2, 1, length, 4), (1, 2, 1, length)
    states, tokens, flags = (jnp.zeros(shape) for shape in shapes)
    pending = chunks.Pending(
      states, tokens, tokens, tokens, flags > 0, states[0]
    )
    program = jax.make_jaxpr(chunks.commit)(pending, jnp.zeros(2, int))
    return str(program).count(' = ')

  assert size(4096) == size(8)


def test_inverse_of_a_unit_triangle():
  stream = np.random.default_rng(2)
  q_CK, k_CK = stream.normal(size=(2, C, K))
  gates_CK, resets_C = given(0.1)
  factors = decay.anchors(
    jnp.asarray(gates_CK, jnp.float32), jnp.asarray(resets_C)
  )
  below = decay.blocks(
    jnp.asarray(q_CK, jnp.float32), jnp.asarray(k_CK, jnp.float32), factors
  )
  lower_CC = decay.assemble(jnp.zeros(C), below)
  expected = np.linalg.inv(np.eye(C) + np.asarray(lower_CC, np.float64))
  np.testing.assert_allclose(
    decay.inverse(below), expected, rtol=1e-4, atol=1e-4
  )


def test_a_gate_of_minus_infinity_is_a_reset():
  """Forward and backward, beside gates whose inverse would overflow."""
  gates_CK, resets_C = given(1e4)

  def total(gates_CK, resets_C):
    factors = decay.anchors(gates_CK, resets_C)
    ones_CK = jnp.ones((C, K))
    return decay.scores(ones_CK, ones_CK, factors, jnp.ones(C)).sum()

  told = jnp.asarray(resets_C)
  gates_CK = jnp.asarray(gates_CK, jnp.float32)
  silent = jnp.where(told[:, None], -jnp.inf, gates_CK)
  for gates, resets in ((gates_CK, told), (silent, jnp.zeros_like(told))):
    slope = jax.jit(jax.grad(total))(gates, resets)
    assert np.isfinite(slope).all()
    assert not np.any(np.asarray(slope)[resets_C])
  np.testing.assert_array_equal(
    total(gates_CK, told), total(silent, jnp.zeros_like(told))
  )


@pytest.mark.parametrize('width', [1, 32])
def test_leading_axes_are_a_layout(width):
  """Forward and backward, at sizes of a model, for heads that share keys."""
  lead, chunk, keys = (2, 2, 1, 4), 32, 32
  stream = np.random.default_rng(3)
  gates = -stream.exponential(0.1, (*lead, chunk, width)).astype(np.float32)
  q = stream.normal(size=(2, 2, 1, 1, chunk, keys)).astype(np.float32)
  resets = stream.random((2, 2, 1, 1, chunk)) < 0.1

  def total(gates, q, resets):
    factors = decay.anchors(gates, resets, exclusive=True, fresh=True)
    scores = decay.scores(q, q, factors, jnp.ones(gates.shape[:-1]))
    return (scores**2).sum() + sum(
      (x**2).sum() for x in jax.tree.leaves(factors)
    )

  slopes = jax.jit(jax.grad(total, (0, 1)))
  whole = slopes(gates, q, resets)
  each = [
    slopes(gates[i, j, 0], q[i, j, 0], resets[i, j, 0])
    for i in range(2)
    for j in range(2)
  ]
  for found, parts in zip(whole, zip(*each, strict=True), strict=True):
    expected = np.stack(parts).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
