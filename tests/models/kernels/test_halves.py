"""A block of fused halves is the plain block; odd sizes fall back to it."""

import chex
import jax
import jax.numpy as jnp
import pytest

from recursive_weights import interfaces
from recursive_weights.models import trm
from recursive_weights.models.kernels import halves
from recursive_weights.models.layers import symmetric_block, trm_block
from tests.pretended_gpu import pretend, without_triton


@pytest.mark.parametrize('kind', ['mixer', 'attention'])
def test_block_of_fused_halves_is_the_plain_block(kind):
  keys = jax.random.split(jax.random.key(0))
  params = trm_block.init(keys[0], kind, tokens=17, width=64, multiple=32)
  shape = (17, 2, 64) if kind == 'mixer' else (2, 17, 64)
  x = jax.random.normal(keys[1], shape)
  fused = halves.make(True, interpret=True)
  options = {'heads': 2, 'turn': trm_block.rotation(17, 32)}
  chex.assert_trees_all_close(
    jax.jit(lambda x: trm_block.apply(params, x, halves=fused, **options))(x),
    trm_block.apply(params, x, **options),
    rtol=2e-5,
    atol=2e-5,
  )


@pytest.mark.parametrize('kind', symmetric_block.KINDS)
def test_symmetric_block_of_fused_halves_is_the_plain_block(kind):
  keys = jax.random.split(jax.random.key(0))
  params = symmetric_block.init(
    keys[0], kind, tokens=16, width=16, pool_width=32, multiple=16
  )
  x_TBVD = jax.random.normal(keys[1], (16, 1, 4, 16))
  fused = halves.make(True, interpret=True)

  def run(halves):
    options = {'box': (2, 2), 'halves': halves}
    return jax.jit(lambda x: symmetric_block.apply(params, x, **options))(
      x_TBVD
    )

  chex.assert_trees_all_close(
    run(fused), run(trm_block.Halves()), rtol=2e-5, atol=2e-5
  )


def test_sizes_that_do_not_fit_run_plain_unless_kernels_are_asked_for(
  monkeypatch,
):
  keys = jax.random.split(jax.random.key(0))
  params = trm_block.init(keys[0], 'mixer', tokens=9, width=12, multiple=8)
  x_TBD = jax.random.normal(keys[1], (9, 1, 12))
  monkeypatch.setattr(halves, 'on_one_hopper', lambda: True)
  chosen = halves.make(interpret=True)
  assert chosen != trm_block.Halves()
  chex.assert_trees_all_equal(
    trm_block.apply(params, x_TBD, halves=chosen),
    trm_block.apply(params, x_TBD),
  )
  asked = halves.make(True, interpret=True)
  with pytest.raises(ValueError, match='got'):
    trm_block.apply(params, x_TBD, halves=asked)


@pytest.mark.parametrize(
  ('families', 'name'),
  [(('cell',), 'cell_half'), (('row', 'cell'), 'constraint_half')],
)
def test_a_constraint_half_takes_the_kernel_of_its_families(
  families, name, monkeypatch
):
  called = []
  for module in ('cell_half', 'constraint_half'):
    monkeypatch.setattr(
      getattr(halves, module),
      'apply',
      lambda params, x, module=module, **options: called.append(module),
    )
  monkeypatch.setattr(halves, 'on_one_hopper', lambda: True)
  params = {'gate': jnp.zeros((16, 16 * len(families)))}
  halves.make(interpret=True).constraint(
    params, jnp.zeros((4, 1, 2, 16)), families=families, box=(2, 2), pool='both'
  )
  assert called == [name]


def test_model_of_fused_halves_has_the_gradient_of_the_plain_model():
  spec = interfaces.Spec(
    inputs=jax.ShapeDtypeStruct((16,), jnp.int32),
    answer=(16,),
    classes=4,
    sizes={},
  )
  inputs_BT = jax.random.randint(jax.random.key(1), (2, 16), 0, 4)

  def gradient(fused):
    model = trm.make(
      spec, width=32, cycles=2, inner=1, layers=1, multiple=16, fused=fused
    )
    params = model.init(jax.random.key(0), inputs_BT)
    carry = model.carry(params, 2)

    def loss(params):
      outputs, _ = model.apply(params, carry, inputs_BT, train=True)
      return (outputs['logits'] ** 2).mean() + outputs['halt'].mean()

    return jax.jit(jax.grad(loss))(params)

  chex.assert_trees_all_close(
    gradient(halves.make(True, interpret=True)),
    gradient(False),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('capability', 'dtype', 'runs'),
  [
    ('9.0', 'bfloat16', True),
    ('9.0', 'float16', False),
    ('9.0', 'float32', False),
    ('8.0', 'bfloat16', False),
    ('7.5', 'bfloat16', False),
    ('6.0', 'float32', False),
  ],
)
def test_a_gpu_runs_kernels_that_are_made_for_it(
  capability, dtype, runs, monkeypatch
):
  kernel, plain = lambda *_, **options: True, lambda *_: False
  monkeypatch.setattr(halves.channel_half, 'apply', kernel)
  monkeypatch.setattr(trm_block, 'channel_half', plain)
  pretend(monkeypatch, capability)
  params = {'gate': jnp.zeros((16, 32))}
  found = halves.make().channel(params, jnp.zeros((4, 1, 16), dtype))
  assert found is runs


def test_kernels_that_a_gpu_cannot_run_are_refused(monkeypatch):
  pretend(monkeypatch, '7.5')
  with pytest.raises(interfaces.UserError, match='got Some GPU'):
    halves.make(True)


def test_a_jax_without_the_kernels_backend_runs_the_plain_halves(monkeypatch):
  pretend(monkeypatch, '9.0')
  assert trm._halves(None) != trm_block.Halves()
  without_triton(monkeypatch)
  assert trm._halves(None) == trm_block.Halves()
  with pytest.raises(interfaces.UserError, match='Triton backend of Pallas'):
    trm._halves(True)


def test_without_a_gpu_halves_are_plain():
  assert not halves.on_one_hopper()
  assert halves.make(False) == trm_block.Halves()


@pytest.mark.parametrize('axis', [None, 'devices'])
def test_kernels_are_for_programs_of_one_device(monkeypatch, axis):
  monkeypatch.setattr(halves.hopper, 'available', lambda: True)
  found = []

  def program(x):
    found.append(halves.on_one_hopper())
    return x

  x = jnp.ones([jax.device_count(), 3])
  (jax.pmap(program, axis_name=axis) if axis else jax.jit(program))(x)
  assert found[0] == bool(axis)
