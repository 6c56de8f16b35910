"""Laws that every file in derivation/operators obeys, found by name."""

import functools
import importlib
import inspect
import pkgutil
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.derivation import operators
from recursive_weights.interfaces import UserError

MODULES = {
  info.name: importlib.import_module(f'{operators.__name__}.{info.name}')
  for info in pkgutil.iter_modules(operators.__path__)
}
SHAPES = {'wide': (4, 128), 'memory': (15, 4, 32), 'square': (12, 12)}


def variants():
  """Each operator with its defaults and with every other `kind`."""
  for name, module in MODULES.items():
    hint = typing.get_type_hints(module.make).get('kind')
    for kind in typing.get_args(hint) or ('',):
      yield pytest.param(module, kind, id=f'{name}-{kind}'.rstrip('-'))


def kind_argument(kind):
  return {'kind': kind} if kind else {}


every_operator = pytest.mark.parametrize('module, kind', list(variants()))
every_shape = pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)


def weight(shape, seed=0, scale=0.02):
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(scale * draw, jnp.float32)


def perturb(theta, seed=1, scale=0.1):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(scale * generator.normal(size=x.shape), x.dtype),
    theta,
  )


def degenerate(shape):
  rows, columns = int(np.prod(shape[:-1])), shape[-1]
  generator = np.random.default_rng(3)
  small = min(rows, columns)
  u, _ = np.linalg.qr(generator.normal(size=(rows, small)))
  v, _ = np.linalg.qr(generator.normal(size=(columns, small)))
  values = np.repeat(np.arange(1, small + 1), 2)[:small]
  cases = {
    'zero': np.zeros((rows, columns)),
    'repeated': u * values @ v.T,
    'equal': u @ v.T,
    'rank one': np.outer(u[:, 0], v[:, 0]),
    'deficient': u * np.where(np.arange(small) < 2, 1.0, 0.0) @ v.T,
  }
  return {
    name: jnp.asarray(w.reshape(shape), jnp.float32)
    for name, w in cases.items()
  }


@functools.cache
def compiled(module, kind, shape):
  """The operator, its jitted `apply`, and jitted gradients.

  The gradients are those of a fixed random functional of T(W).
  """
  operator = module.make(**kind_argument(kind))

  def loss(theta, base):
    derived = operator.apply(theta, base)
    return jnp.sum(derived * weight(derived.shape, 7, 1.0))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return operator, jax.jit(operator.apply), gradients


@every_operator
def test_every_argument_has_a_default(module, kind):
  del kind
  for function in (module.make, module.count):
    parameters = list(inspect.signature(function).parameters.values())
    if function is module.count:
      parameters = parameters[1:]
    assert all(p.default is not p.empty for p in parameters)
  assert set(inspect.signature(module.make).parameters) == set(
    list(inspect.signature(module.count).parameters)[1:]
  )


@every_operator
@every_shape
def test_start_is_the_base_or_what_start_states(module, kind, shape):
  operator, apply, _ = compiled(module, kind, shape)
  base = weight(shape)
  theta = operator.init(jax.random.key(0), base)
  derived = apply(theta, base)
  stated = base
  if hasattr(module, 'start'):
    stated = module.start(base, **kind_argument(kind))
  chex.assert_equal_shape([derived, stated])
  error = jnp.linalg.norm(derived - stated) / jnp.linalg.norm(stated)
  assert error <= 1e-6


@every_operator
@every_shape
def test_count_is_the_size_of_the_tree(module, kind, shape):
  base = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = module.make(**kind_argument(kind)).init
  theta = jax.eval_shape(init, jax.random.key(0), base)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(theta))
  size = sum(x.size for x in jax.tree.leaves(theta))
  assert size == module.count(shape, **kind_argument(kind))


@every_operator
@every_shape
def test_gradients_are_finite_also_for_degenerate_bases(module, kind, shape):
  operator, _, gradients = compiled(module, kind, shape)
  theta = operator.init(jax.random.key(0), weight(shape))
  bases = {'random': weight(shape), **degenerate(shape)}
  for name, base in bases.items():
    for parameters in (theta, perturb(theta)):
      assert all(
        np.isfinite(x).all()
        for x in jax.tree.leaves(gradients(parameters, base))
      ), name


@every_operator
@every_shape
def test_every_parameter_learns(module, kind, shape):
  operator, _, gradients = compiled(module, kind, shape)
  base = weight(shape)
  theta = perturb(operator.init(jax.random.key(0), base))
  gradient, to_base = gradients(theta, base)
  for leaf in jax.tree.leaves(gradient):
    # Elementwise: a parameter that never acts would be counted in vain.
    assert jnp.mean(leaf != 0) > 0.99
  assert jnp.any(to_base != 0)


@every_operator
@every_shape
def test_jit_and_vmap_change_nothing(module, kind, shape):
  operator, apply, _ = compiled(module, kind, shape)
  bases = [weight(shape, seed) for seed in (0, 5)]
  thetas = [
    perturb(operator.init(jax.random.key(0), base), seed)
    for seed, base in enumerate(bases)
  ]
  jitted = [apply(t, w) for t, w in zip(thetas, bases, strict=True)]
  eager = operator.apply(thetas[0], bases[0])
  chex.assert_trees_all_close(eager, jitted[0], atol=2e-6)
  stack = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
  batched = jax.jit(jax.vmap(operator.apply))(stack, jnp.stack(bases))
  chex.assert_trees_all_close(list(batched), jitted, atol=2e-6)


@every_operator
def test_not_finite_in_not_finite_out(module, kind):
  operator = module.make(**kind_argument(kind))
  theta = operator.init(jax.random.key(0), weight((4, 16)))
  for bad in (np.nan, np.inf):
    base = weight((4, 16)).at[1, 2].set(bad)
    assert not np.isfinite(operator.apply(theta, base)).all()


@every_operator
def test_half_precision_base_keeps_its_type(module, kind):
  operator = module.make(**kind_argument(kind))
  base = weight((4, 16)).astype(jnp.bfloat16)
  theta = operator.init(jax.random.key(0), base)
  chex.assert_type(jax.tree.leaves(theta), jnp.float32)
  derived = operator.apply(theta, base)
  assert derived.dtype == jnp.bfloat16
  if not hasattr(module, 'start'):
    chex.assert_trees_all_equal(derived, base)


@pytest.mark.parametrize(
  'name, arguments',
  [
    ('contraction', {'kind': 'softmax'}),
    ('contraction', {'kind': 'linear'}),
    ('spectral', {'kind': 'mlp', 'rank': 8}),
    ('spectral', {'kind': 'scale', 'rank': 8}),
    ('spectral', {'kind': 'odd'}),
    ('power', {}),
    ('polynomial', {}),
    ('fourier', {'modes': 6}),
  ],
)
def test_parameters_of_one_width_fit_another(name, arguments):
  operator = MODULES[name].make(**arguments)
  small, large = weight((15, 2, 24), 1), weight((15, 4, 32), 2)
  theta = perturb(operator.init(jax.random.key(0), small))
  chex.assert_trees_all_equal_shapes(
    theta, operator.init(jax.random.key(0), large)
  )
  derived = operator.apply(theta, large)
  start = operator.apply(operator.init(jax.random.key(0), large), large)
  assert np.isfinite(derived).all()
  assert jnp.linalg.norm(derived - start) > 1e-3 * jnp.linalg.norm(start)


@pytest.mark.parametrize('kind', ['mlp', 'scale'])
def test_spectral_parameters_fit_where_fewer_values_exist(kind):
  spectral = MODULES['spectral']
  operator = spectral.make(kind=kind, rank=8)
  theta = perturb(operator.init(jax.random.key(0), weight((16, 16))))
  derived = operator.apply(theta, weight((3, 16)))
  assert np.isfinite(derived).all()


@pytest.mark.parametrize(
  'name, arguments, message',
  [
    ('spectral', {'rank': -1}, 'rank must be > 0, got -1'),
    ('spectral', {'kind': 'x'}, "kind must be one of .* got 'x'"),
    ('linear', {'bottleneck': 0}, 'bottleneck must be > 0, got 0'),
    ('flow', {'steps': 0}, 'steps must be > 0, got 0'),
    ('polynomial', {'degree': 0}, 'degree must be > 0, got 0'),
    ('fourier', {'modes': 0}, 'modes must be > 0, got 0'),
  ],
)
def test_errors_name_value_and_rule(name, arguments, message):
  with pytest.raises(UserError, match=message):
    MODULES[name].make(**arguments)


def test_flow_without_diffrax_names_the_extra(monkeypatch):
  monkeypatch.setitem(importlib.sys.modules, 'diffrax', None)
  with pytest.raises(UserError, match=r'\[flow\]'):
    MODULES['flow'].make()
