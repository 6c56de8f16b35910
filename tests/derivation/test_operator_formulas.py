"""Operators without an SVD against their formulas in NumPy, float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from recursive_weights.derivation.operators import (
  contraction,
  flow,
  fourier,
  linear,
  polynomial,
  residual,
  spectral_residual,
)
from recursive_weights.interfaces import UserError


def random(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def drawn(operator, base, scale=0.3):
  """Random parameters in float64 of the operator's structure."""
  theta = operator.init(jax.random.key(0), jnp.asarray(base, jnp.float32))
  generator = np.random.default_rng(1)
  return jax.tree.map(lambda x: scale * generator.normal(size=x.shape), theta)


def check(operator, theta, base, expected, atol=2e-5):
  derived = operator.apply(single(theta), jnp.asarray(base, jnp.float32))
  np.testing.assert_allclose(derived, expected, atol=atol)


def gelu_network(theta, x):
  h = x @ theta['down']['kernel'] + theta['down']['bias']
  h = h * (1 + special.erf(h / math.sqrt(2))) / 2
  return h @ theta['up']['kernel'] + theta['up']['bias']


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('kind', ['softmax', 'linear'])
@pytest.mark.parametrize(
  'base_shape, shape, rows',
  [
    ((15, 4, 8), None, 1),
    ((15, 6, 8), (2, 3, 8), 1),
    ((15, 4, 8), (3, 4, 8), 3),
    ((5, 4, 8), (9, 4, 8), 9),
    ((15, 4, 8), (12, 8), 3),
    ((6, 8), (8,), 1),
  ],
)
def test_contraction(kind, base_shape, shape, rows):
  operator = contraction.make(kind=kind, shape=shape)
  base = random(base_shape)
  theta = drawn(operator, base)
  (a,) = jax.tree.leaves(theta)
  assert a.shape == (rows, base_shape[0])
  assert contraction.count(base_shape, kind=kind, shape=shape) == a.size
  a = softmax(a) if kind == 'softmax' else a
  expected = np.tensordot(a, base, axes=1).reshape(shape or base_shape[1:])
  check(operator, theta, base, expected)
  start = operator.init(jax.random.key(0), base)
  np.testing.assert_allclose(
    operator.apply(start, jnp.asarray(base, jnp.float32)),
    contraction.start(jnp.asarray(base, jnp.float32), kind=kind, shape=shape),
    atol=1e-6,
  )


@pytest.mark.parametrize('kind', ['softmax', 'linear'])
def test_contraction_starts_as_the_mean_or_with_rows_apart(kind):
  base = jnp.asarray(random((15, 4, 8)), jnp.float32)
  operator = contraction.make(kind=kind)
  start = operator.apply(operator.init(jax.random.key(0), base), base)
  np.testing.assert_allclose(start, base.mean(axis=0), atol=1e-6)
  for rows in (2, 4, 40):
    operator = contraction.make(kind=kind, shape=(rows, 4, 8))
    start = operator.apply(operator.init(jax.random.key(0), base), base)
    flat = start.reshape(rows, -1)
    distances = jnp.linalg.norm(flat[:, None, :] - flat[None, :, :], axis=-1)
    assert jnp.min(distances + 10 * jnp.eye(rows)) > 0.1
    ends = (base[jnp.array([0, -1])] + base.mean(axis=0)[None]) / 2
    np.testing.assert_allclose(start[jnp.array([0, -1])], ends, atol=1e-6)


def test_contraction_errors_name_both_shapes():
  base = jnp.zeros((15, 4, 8))
  with pytest.raises(
    UserError, match=r'\(15, 4, 8\).*\(5, 8\).*multiple of 32'
  ):
    contraction.make(shape=(5, 8)).init(jax.random.key(0), base)
  with pytest.raises(UserError, match='more than one slot'):
    contraction.make(shape=(2, 4, 8)).init(jax.random.key(0), base[:1])


def test_linear():
  base = random((3, 2, 5))
  operator = linear.make(bottleneck=4)
  theta = drawn(operator, base)
  expected = base + gelu_network(theta, base.reshape(-1)).reshape(base.shape)
  check(operator, theta, base, expected)


def test_residual_low_rank():
  base = random((3, 2, 5))
  operator = residual.make(rank=2, scale=0.5)
  theta = drawn(operator, base)
  check(operator, theta, base, base + 0.5 * base @ theta['a'] @ theta['b'])


def test_residual_network():
  base = random((3, 2, 8))
  operator = residual.make(kind='network', scale=0.5)
  theta = drawn(operator, base)
  assert theta['down']['kernel'].shape == (8, 2)
  check(operator, theta, base, base + 0.5 * gelu_network(theta, base))


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_polynomial_of_square_matrices(scale):
  base = scale * random((2, 5, 5))
  a = np.array([0.3, 0.9, -0.5, 0.2, 0.4])
  expected = []
  for w in base:
    b = np.sum(np.linalg.svd(w, compute_uv=False) ** 8) ** 0.125
    powers = [np.linalg.matrix_power(w / b, k) for k in range(5)]
    expected.append(b * sum(c * p for c, p in zip(a, powers, strict=True)))
  operator = polynomial.make(degree=4)
  check(operator, {'coefficients': a}, base, np.stack(expected), 1e-5 * scale)


@pytest.mark.parametrize('shape', [(4, 7), (9, 3), (2, 3, 8)])
def test_polynomial_of_other_matrices_is_an_odd_spectral_function(shape):
  base = random(shape)
  a = np.array([0.9, -0.5, 0.2, 0.4])
  w = base.reshape(-1, shape[-1])
  u, s, v = np.linalg.svd(w, full_matrices=False)
  x = s / np.sum(s**8) ** 0.125
  f = s * sum(c * x ** (2 * k) for k, c in enumerate(a))
  expected = (u * f @ v).reshape(shape)
  check(polynomial.make(), {'coefficients': a}, base, expected)


def test_high_powers_do_not_explode():
  base = jnp.asarray(100 * random((16, 16)), jnp.float32)
  theta = {'coefficients': jnp.ones(65)}
  derived = polynomial.make(degree=64).apply(theta, base)
  largest = jnp.linalg.norm(base, 2)
  assert jnp.linalg.norm(derived, 2) <= 65 * 16**0.125 * largest


def expected_filter(w, theta, axis):
  """Circular convolution with the impulse response, term by term."""
  n = w.shape[axis]
  real, imag = np.ones(n // 2 + 1), np.zeros(n // 2 + 1)
  real[: len(theta['real'])] = theta['real']
  imag[1 : 1 + len(theta['imag'])] = theta['imag']
  response = np.zeros(n)
  for j in range(n):
    for k in range(n // 2 + 1):
      twice = 1 if k == 0 or 2 * k == n else 2
      phase = 2 * np.pi * j * k / n
      response[j] += (
        twice * (real[k] * np.cos(phase) - imag[k] * np.sin(phase)) / n
      )
  rolled = [response[j] * np.roll(w, j, axis=axis) for j in range(n)]
  return sum(rolled)


@pytest.mark.parametrize('kind', ['columns', 'rows', 'both'])
@pytest.mark.parametrize('modes', [None, 1, 3])
@pytest.mark.parametrize('shape', [(2, 3, 8), (5, 7)])
def test_fourier_is_a_circular_convolution(kind, modes, shape):
  base = random(shape)
  operator = fourier.make(kind=kind, modes=modes)
  theta = drawn(operator, base)
  expected = base.reshape(-1, shape[-1])
  for name, axis in (('columns', 1), ('rows', 0)):
    if kind in (name, 'both'):
      expected = expected_filter(expected, theta[name], axis)
  check(operator, theta, base, expected.reshape(shape))


@pytest.mark.parametrize('steps', [3, 4])
def test_flow_matches_an_integration_in_float64(steps):
  base = random((3, 2, 6))
  operator = flow.make(hidden=5, steps=steps)
  theta = drawn(operator, base, scale=0.5)

  def field(t, flat):
    w = flat.reshape(-1, 6)
    time = np.full((w.shape[0], 1), t)
    return gelu_network(theta, np.concatenate([w, time], -1)).reshape(-1)

  solution = integrate.solve_ivp(
    field, (0, 1), base.reshape(-1), rtol=1e-10, atol=1e-10
  )
  expected = solution.y[:, -1].reshape(base.shape)
  assert np.linalg.norm(expected - base) > 0.5
  check(operator, theta, base, expected, 5e-5)


@pytest.mark.parametrize('alpha', [0.0, 0.3, 0.7, 1.0])
def test_spectral_residual_starts_as_the_identity_whatever_alpha(alpha):
  base = jnp.asarray(0.02 * random((4, 32)), jnp.float32)
  operator = spectral_residual.make(alpha=alpha)
  theta = operator.init(jax.random.key(0), base)
  np.testing.assert_array_equal(operator.apply(theta, base), base)
  np.testing.assert_allclose(theta['alpha'], alpha, rtol=1e-6)
