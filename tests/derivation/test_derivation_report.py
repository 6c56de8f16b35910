"""Counts, savings, Lipschitz constants and spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import Operator, Rule, chain, compress, iterate
from recursive_weights.derivation import report
from recursive_weights.derivation.operators import (
  contraction,
  fourier,
  linear,
  polynomial,
  power,
  residual,
  spectral,
  spectral_residual,
)

KEY = jax.random.key(0)


def random(shape, seed=0, scale=1.0):
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(scale * draw, jnp.float32)


def document():
  """The neuron-level model of the document: M = 15, F = 4, D = 128."""
  shapes = {'w1': (15, 4, 128), 'b1': (4, 128), 'w2': (4, 128), 'b2': (128,)}
  return {name: jnp.zeros(shape) for name, shape in shapes.items()}


# 15 weights contract W1; the number is what T adds to them.
OPERATORS = {
  'contraction': (chain(), 0),
  'power': (power.make(), 1),
  'odd': (spectral.make(kind='odd'), 3),
  'scale': (spectral.make(kind='scale'), 8),
  'polynomial': (polynomial.make(), 4),
  'mlp': (spectral.make(kind='mlp'), 4 * 8 + 8 + 8 * 4 + 4),
  'fourier': (fourier.make(), 128),
  'low rank': (residual.make(), 2 * 128 * 8),
  'network': (residual.make(kind='network'), 128 * 32 + 32 + 32 * 128 + 128),
  'spectral residual': (spectral_residual.make(), 76 + 2048 + 1),
  'linear': (linear.make(), 2 * 512 * 32 + 32 + 512),
}


@pytest.mark.parametrize('operator, added', OPERATORS.values(), ids=OPERATORS)
def test_arithmetic_of_the_document(operator, added):
  params = document()
  rules = (Rule('T', 'w1', 'w2', chain(contraction.make(), operator)),)
  stored = jax.eval_shape(lambda p: compress(rules, p, KEY), params)
  result = report.savings(rules, params, stored)
  assert result['independent'] == 7_680 + 512 + 512 + 128 == 8_832
  assert result['stored'] == 8_832 - 512 + 15 + added
  np.testing.assert_allclose(result['saved'], (497 - added) / 8_832)
  np.testing.assert_allclose(result['touched'], 512 / 8_832)
  # W2 is 5.8 % of the model: nothing that derives it alone can save more.
  assert result['saved'] < result['touched']
  assert (result['saved'] > 0) == (added < 497)
  assert (
    sum(row['stored'] for row in result['parts'].values()) == (result['stored'])
  )


def test_specialists_save_what_the_document_hoped_for():
  centre = {'w1': jnp.zeros((15, 4, 128)), 'b1': jnp.zeros((4, 128))}
  names = [f'specialist_{i}' for i in range(7)]
  params = {name: dict(centre) for name in ('centre', *names)}
  rules = tuple(
    Rule(name, 'centre/w1', f'{name}/w1', spectral.make(kind='scale'))
    for name in names
  )
  stored = jax.eval_shape(lambda p: compress(rules, p, KEY), params)
  result = report.savings(rules, params, stored, depth=1)
  assert result['stored'] == 7_680 + 8 * 512 + 7 * 16
  assert result['parts']['specialist_3'] == {
    'independent': 8_192,
    'stored': 512,
  }
  assert result['parts']['operators'] == {'independent': 0, 'stored': 112}
  assert 0.8 < result['saved'] < result['touched']


def test_a_stack_counts_its_stored_slice():
  params = {'w': jnp.zeros((5, 4, 6))}
  cell = iterate(power.make(), 5, base_first=True)
  rules = (Rule('T', 'w', 'w', cell),)
  result = report.savings(rules, params, compress(rules, params, KEY))
  assert result['stored'] == 24 + 1
  np.testing.assert_allclose(result['touched'], 96 / 120)


def test_table_reads_like_the_savings():
  params = document()
  rules = (Rule('T', 'w1', 'w2', chain(contraction.make(), power.make())),)
  text = report.table(rules, params, compress(rules, params, KEY))
  lines = text.splitlines()
  assert lines[0].split() == ['part', 'independent', 'stored', 'saved']
  rows = {line.split()[0]: line.split()[1:] for line in lines}
  assert rows['w1'] == ['7,680', '7,680', '0.0', '%']
  assert rows['w2'] == ['512', '0', '100.0', '%']
  assert rows['operators/T/0/logits'] == ['0', '15']
  assert rows['total'] == ['8,832', '8,336', '5.6', '%']
  assert lines[-1] == 'derivation touches 5.8 % of the weights'
  assert all(len(line) <= 80 for line in lines)


def scaled(gain):
  return Operator(lambda key, base: {}, lambda theta, base: gain * base)


@pytest.mark.parametrize('gain', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('scale', [0.001, 0.01, 1.0])
def test_lipschitz_constant_of_a_multiple_is_its_factor(gain, scale):
  # The document's formula would give about sqrt(512) = 23 times this.
  base = random((4, 128), scale=0.02)
  value = report.lipschitz(scaled(gain), {}, base, KEY, scale)
  np.testing.assert_allclose(value, gain, rtol=1e-3)
  penalty = report.lipschitz_penalty(scaled(gain), {}, base, KEY, scale)
  np.testing.assert_allclose(penalty, max(0, gain - 1), atol=3e-3)
  loose = report.lipschitz_penalty(
    scaled(gain), {}, base, KEY, scale, bound=2.5
  )
  np.testing.assert_allclose(loose, max(0, gain - 2.5), atol=3e-3)


def test_lipschitz_of_trees_and_constant_operators():
  base = {'a': random((3, 4)), 'b': random((5,), 1)}
  both = Operator(
    lambda key, base: {}, lambda t, base: jax.tree.map(lambda x: 2 * x, base)
  )
  np.testing.assert_allclose(
    report.lipschitz(both, {}, base, KEY), 2, rtol=1e-3
  )
  w = random((3, 4))
  value, gradient = jax.value_and_grad(
    lambda w: report.lipschitz(scaled(0.0), {}, w, KEY)
  )(w)
  assert value < 1e-6 and np.isfinite(gradient).all()


def test_penalty_trains_an_operator_towards_its_bound():
  operator, base = residual.make(rank=2), random((4, 8))
  theta = operator.init(KEY, base)
  theta = jax.tree.map(lambda x: x + random(x.shape, 3), theta)
  penalty = jax.jit(
    jax.value_and_grad(
      lambda t: report.lipschitz_penalty(operator, t, base, KEY)
    )
  )
  before, _ = penalty(theta)
  for _ in range(50):
    _, gradient = penalty(theta)
    theta = jax.tree.map(lambda x, g: x - 0.05 * g, theta, gradient)
  after, _ = penalty(theta)
  assert before > 0.5 and after < 0.5 * before


def test_spectra():
  w1 = random((5, 3, 4))
  result = report.spectra(w1, 2 * w1)
  expected = np.linalg.svd(np.asarray(w1).reshape(15, 4), compute_uv=False)
  np.testing.assert_allclose(result['base'], expected, rtol=1e-5)
  np.testing.assert_allclose(result['derived'], 2 * expected, rtol=1e-5)


def test_import_stays_light():
  import subprocess
  import sys

  program = (
    'import sys, recursive_weights;'
    "print([m for m in ('diffrax', 'optax', 'flax', 'orbax', 'chex')"
    ' if m in sys.modules])'
  )
  answer = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert answer.stdout.strip() == '[]'
