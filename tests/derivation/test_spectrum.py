"""Spectral operators against NumPy in float64: values and gradients."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from recursive_weights.derivation import spectrum
from recursive_weights.derivation.operators import power, spectral

COEFFICIENTS = (0.4, -0.3, 0.5)
ALPHA = 0.6


def np_bound(w):
  return np.sum(np.linalg.svd(w, compute_uv=False) ** 8) ** 0.125


def np_apply(f, w):
  u, s, v = np.linalg.svd(w, full_matrices=False)
  return u * f(s) @ v


def np_odd(w):
  b = np_bound(w)
  terms = enumerate(COEFFICIENTS, start=1)
  c = [(j, c) for j, c in terms]
  return np_apply(
    lambda s: s * (1 + sum(c * (s / b) ** (2 * j) for j, c in c)), w
  )


def np_power(w, delta=1e-3):
  b = np_bound(w)
  power = (ALPHA - 1) / 2

  def f(s):
    return s * (((s / b) ** 2 + delta**2) / (1 + delta**2)) ** power

  return np_apply(f, w)


def np_network(theta, x):
  h = x @ theta['down']['kernel'] + theta['down']['bias']
  h = h * (1 + special.erf(h / math.sqrt(2))) / 2
  return h @ theta['up']['kernel'] + theta['up']['bias']


def np_mlp(theta, w):
  k = theta['up']['bias'].shape[0]

  def f(s):
    return np.concatenate([s[:k] + np_network(theta, s[:k]), s[k:]])

  return np_apply(f, w)


def np_scale(theta, w):
  k = theta['scale'].shape[0]
  gain = np.log1p(np.exp(theta['scale'] + math.log(math.e - 1)))

  def f(s):
    return np.concatenate([gain * s[:k] + theta['shift'], s[k:]])

  return np_apply(f, w)


def finite_differences(function, w, h=1e-6):
  gradient = np.zeros_like(w)
  for index in np.ndindex(w.shape):
    step = np.zeros_like(w)
    step[index] = h
    gradient[index] = (function(w + step) - function(w - step)) / (2 * h)
  return gradient


def check(operator, theta, reference, w, tolerance=1e-3, rounding=2e-6):
  """Value and gradient of <C, T(W)>, relative to the largest entry."""
  c = np.random.default_rng(9).normal(size=w.shape)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(base):
    derived = operator.apply(theta, base)
    return jnp.sum(derived * jnp.asarray(c, jnp.float32)), derived

  ours, value = gradient(jnp.asarray(w, jnp.float32))
  np.testing.assert_allclose(value, reference(w), atol=rounding)
  theirs = finite_differences(lambda x: np.sum(c * reference(x)), w)
  np.testing.assert_allclose(
    ours, theirs, atol=tolerance * np.abs(theirs).max()
  )


def with_values(values, rows, columns, seed=0):
  generator = np.random.default_rng(seed)
  n = len(values)
  u, _ = np.linalg.qr(generator.normal(size=(rows, n)))
  v, _ = np.linalg.qr(generator.normal(size=(columns, n)))
  return u * np.asarray(values) @ v.T


SPECTRA = {
  'gaps': (2.0, 1.5, 0.9, 0.3),
  'tie': (2.0, 1.2, 1.2, 0.3),
  'top tie': (2.0, 2.0, 0.9, 0.3),
  'all equal': (1.0, 1.0, 1.0, 1.0),
  'near tie': (2.0, 1.2004, 1.2, 0.3),
  'tie and zeros': (1.5, 1.5, 0.0, 0.0),
  'rank one': (1.0, 0.0, 0.0, 0.0),
}
every_spectrum = pytest.mark.parametrize(
  'values', SPECTRA.values(), ids=SPECTRA
)
every_shape = pytest.mark.parametrize('shape', [(4, 7), (6, 4), (4, 4)])


@every_spectrum
@every_shape
def test_odd_function_matches_finite_differences(values, shape):
  theta = {'coefficients': jnp.asarray(COEFFICIENTS)}
  w = with_values(values, *shape)
  check(spectral.make(kind='odd'), theta, np_odd, w)


@every_spectrum
def test_odd_function_at_the_scale_of_an_initial_weight(values):
  theta = {'coefficients': jnp.asarray(COEFFICIENTS)}
  w = with_values(values, 4, 6)
  operator = spectral.make(kind='odd')
  c = jnp.asarray(np.random.default_rng(9).normal(size=w.shape), jnp.float32)
  gradient = jax.jit(
    jax.grad(lambda base: jnp.sum(operator.apply(theta, base) * c))
  )
  base = jnp.asarray(w, jnp.float32)
  # T(c W) = c T(W), so the gradient does not depend on the unit.
  np.testing.assert_allclose(gradient(1e-4 * base), gradient(base), atol=2e-4)


@pytest.mark.parametrize(
  'values',
  [
    SPECTRA[name]
    for name in ('gaps', 'tie', 'top tie', 'all equal', 'near tie')
  ],
)
@every_shape
def test_power_matches_finite_differences(values, shape):
  theta = {'alpha': jnp.asarray(ALPHA)}
  check(power.make(), theta, np_power, with_values(values, *shape))


def test_power_at_zero_values_has_the_slope_of_its_floor():
  theta = {'alpha': jnp.asarray(ALPHA)}
  w = with_values((1.0, 0.5, 0.0), 3, 5)
  # Steps far below the floor of 1e-3, where the function is linear.
  check(power.make(), theta, np_power, w, tolerance=5e-3)


def test_power_of_a_positive_definite_matrix_is_the_matrix_power():
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
  values = np.array([2.0, 1.5, 1.0, 0.7, 0.5])
  w = q * values @ q.T
  for alpha in (0.5, 2.0, -1.0):
    ours = power.make().apply(
      {'alpha': jnp.asarray(alpha)}, jnp.asarray(w, jnp.float32)
    )
    theirs = np_bound(w) ** (1 - alpha) * (q * values**alpha @ q.T)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def random_theta(operator, w, scale=0.3):
  generator = np.random.default_rng(4)
  theta = operator.init(jax.random.key(0), jnp.asarray(w, jnp.float32))
  theta = jax.tree.map(lambda x: scale * generator.normal(size=x.shape), theta)
  single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), theta)
  return single, jax.tree.map(lambda x: np.asarray(x, np.float64), single)


@pytest.mark.parametrize('kind', ['mlp', 'scale'])
@pytest.mark.parametrize('rank', [2, 8])
@pytest.mark.parametrize(
  'values',
  [(2.0, 1.5, 0.9, 0.3), (0.3, 0.2, 0.1, 0.05), (1.0, 0.9985, 0.5, 0.4)],
)
@every_shape
def test_functions_of_order_match_finite_differences(kind, rank, values, shape):
  operator = spectral.make(kind=kind, rank=rank)
  w = with_values(values, *shape)
  single, double = random_theta(operator, w)
  reference = np_mlp if kind == 'mlp' else np_scale
  # A gap of 1.5e-3 amplifies the rounding of W and its SVD by its inverse.
  check(operator, single, functools.partial(reference, double), w, 2e-3, 1e-4)


@pytest.mark.parametrize('kind', ['mlp', 'scale', 'odd'])
def test_parameters_match_finite_differences(kind):
  operator = spectral.make(kind=kind)
  w = with_values((2.0, 1.5, 0.9, 0.3), 4, 6)
  single, double = random_theta(operator, w)
  c = np.random.default_rng(9).normal(size=w.shape)
  base, c32 = jnp.asarray(w, jnp.float32), jnp.asarray(c, jnp.float32)
  gradient = jax.jit(jax.grad(lambda t: jnp.sum(operator.apply(t, base) * c32)))
  ours = gradient(single)

  def np_odd_theta(theta, w):
    b = np_bound(w)
    terms = list(enumerate(theta['coefficients'], start=1))
    return np_apply(
      lambda s: s * (1 + sum(c * (s / b) ** (2 * j) for j, c in terms)), w
    )

  reference = {'mlp': np_mlp, 'scale': np_scale, 'odd': np_odd_theta}[kind]
  leaves, structure = jax.tree.flatten(double)
  for i, (leaf, gradient) in enumerate(
    zip(leaves, jax.tree.leaves(ours), strict=True)
  ):

    def function(x, i=i):
      changed = [*leaves[:i], x, *leaves[i + 1 :]]
      return np.sum(c * reference(jax.tree.unflatten(structure, changed), w))

    theirs = finite_differences(function, leaf)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-3, atol=1e-4)


def test_bound_is_smooth_and_above_the_largest_value():
  for values, shape in [((2.0, 2.0, 0.5), (3, 8)), ((1e-3, 1e-4), (9, 2))]:
    w = with_values(values, *shape)
    base = jnp.asarray(w, jnp.float32)
    bound = spectrum.bound(base)
    assert values[0] <= bound * (1 + 1e-6)
    assert bound <= len(values) ** 0.125 * values[0] * (1 + 1e-6)
    np.testing.assert_allclose(bound, np_bound(w), rtol=1e-6)
    theirs = finite_differences(np_bound, w, 1e-6 * values[0])
    np.testing.assert_allclose(
      jax.jit(jax.grad(spectrum.bound))(base), theirs, atol=1e-4
    )


def test_forward_and_reverse_mode_agree():
  operator = spectral.make(kind='odd')
  theta = {'coefficients': jnp.asarray(COEFFICIENTS)}
  base = jnp.asarray(with_values((2.0, 1.2, 1.2, 0.3), 4, 6), jnp.float32)
  apply = functools.partial(operator.apply, theta)
  chex.assert_trees_all_close(
    jax.jit(jax.jacfwd(apply))(base),
    jax.jit(jax.jacrev(apply))(base),
    atol=1e-5,
  )


def test_at_a_tie_a_function_of_order_has_a_bounded_gradient():
  operator = spectral.make(kind='scale')
  base = jnp.asarray(with_values((1.0, 1.0, 0.5, 0.5), 4, 6), jnp.float32)
  theta = {
    'scale': jnp.asarray([0.5, -0.5, 0.2, 0.0]),
    'shift': jnp.asarray([0.1, 0.2, 0.0, 0.3]),
  }
  gradient = jax.grad(lambda w: jnp.sum(operator.apply(theta, w) ** 2))(base)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  'operator',
  [
    *(spectral.make(kind=kind) for kind in ('mlp', 'scale', 'odd')),
    power.make(),
  ],
)
def test_a_failed_decomposition_is_seen(operator, monkeypatch):
  base = jnp.asarray(with_values((2.0, 1.0), 4, 6), jnp.float32)
  theta = operator.init(jax.random.key(0), base)
  # One bad entry spoils every singular value, not only its own place.
  for bad in (np.nan, np.inf):
    assert np.isnan(operator.apply(theta, base.at[0, 0].set(bad))).all()

  def failing(w_FD, full_matrices):
    shapes = [(4, 4), (4,), (4, 6)]
    return tuple(jnp.full(shape, jnp.nan) for shape in shapes)

  monkeypatch.setattr(jnp.linalg, 'svd', failing)
  assert np.isnan(operator.apply(theta, base)).all()
