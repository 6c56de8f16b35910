"""Halves that leave their norm: what they stand for, and its gradients."""

import jax
import jax.numpy as jnp
import kernel_laws
import pytest

from recursive_weights.models.kernels import (
  attention,
  channel_half,
  deferred_norm,
  halves,
  hopper,
)
from recursive_weights.models.layers import trm_block
from tests.pretended_gpu import pretend

params = pytest.importorskip('jax._src.pallas.mosaic_gpu.interpret.params')

BATCH, TOKENS, WIDTH, HEADS = 8, 16, 128, 4


def simulated():
  small = hopper.Tiles(columns=64, stages=2, ahead=True)
  plan = hopper.Plan(
    gated=small,
    kept=small,
    joined=small,
    spread=small._replace(sets=1),
    defer=True,
    blocks=2,
    interpret=params.InterpretGPUParams(),
  )
  tiles = channel_half.Tiles(wide=plan)
  return halves.make(
    True, channel=tiles, over=attention.Tiles(heads=2), interpret=True
  )


def case(kind, layers):
  keys = jax.random.split(jax.random.key(0), 4)
  blocks = [
    trm_block.init(key, kind, tokens=TOKENS, width=WIDTH, multiple=64)
    for key in keys[:layers]
  ]
  shape = (BATCH, TOKENS, WIDTH)
  shape = shape if kind == 'attention' else (TOKENS, BATCH, WIDTH)
  x, g = (
    jax.random.normal(key, shape).astype(jnp.bfloat16) for key in keys[2:]
  )
  return blocks, x, g


def network(programs, turns):
  turn = trm_block.rotation(TOKENS, WIDTH // HEADS) if turns else None

  def run(blocks, x):
    for block in blocks:
      x = trm_block.apply(block, x, heads=HEADS, turn=turn, halves=programs)
    return programs.settle(x)

  return run


def check(kind, layers, turns):
  kernel_laws.check_as_far_from_float32_as_plain(
    network(simulated(), turns),
    network(trm_block.Halves(), turns),
    case(kind, layers),
  )


def test_two_blocks_of_attention_are_as_far_from_float32_as_plain():
  check('attention', 2, turns=True)


@pytest.mark.long
@pytest.mark.parametrize(
  'kind, layers, turns', [('attention', 2, False), ('mixer', 1, False)]
)
def test_blocks_are_as_far_from_float32_as_plain(kind, layers, turns):
  check(kind, layers, turns)


def test_a_half_hands_on_what_the_next_one_takes():
  programs = simulated()
  (block,), x, _ = case('attention', 1)
  first = programs.attention(block['attention'], x, heads=HEADS)
  assert isinstance(first, deferred_norm.Deferred)
  plain = trm_block.attention_half(block['attention'], x, heads=HEADS)
  near = {'rtol': 3e-2, 'atol': 3e-2}
  assert jnp.allclose(programs.settle(first), plain, **near)
  # What does not fit whole tiles is settled first.
  odd = trm_block.swiglu_init(jax.random.key(1), WIDTH, 80)
  second = programs.channel(odd, first)
  assert not isinstance(second, deferred_norm.Deferred)
  assert jnp.allclose(second, trm_block.channel_half(odd, plain), **near)


@pytest.mark.parametrize('half', ['token', 'constraint'])
def test_halves_that_norm_themselves_take_what_is_deferred(half, monkeypatch):
  def seen(params, x, **options):
    return x

  for module in ('token_half', 'cell_half', 'constraint_half'):
    monkeypatch.setattr(getattr(halves, module), 'apply', seen)
  value = jax.random.normal(jax.random.key(0), (4, 2, 4, 32))
  x = deferred_norm.Deferred(value, jnp.full((4, 2, 4), 0.5))
  options = {'families': ('cell',), 'box': (2, 2), 'pool': 'both'}
  weights = {'gate': jnp.zeros((32, 16))}
  if half == 'token':
    options, weights = {}, {'gate': jnp.zeros((4, 16))}
  found = getattr(simulated(), half)(weights, x, **options)
  assert jnp.allclose(found, 0.5 * value)


@pytest.mark.parametrize('half', ['attention', 'channel'])
def test_a_half_of_what_is_deferred_has_the_gradient_through_its_norm(half):
  # A scale of a fifth, so that no power of it stands for another one.
  (block,), r, g = case('attention', 1)
  programs, options = (
    simulated(),
    {'heads': HEADS} if half == 'attention' else {},
  )

  def deferred(params, r):
    scale = jax.lax.rsqrt((r.astype(jnp.float32) ** 2).mean(-1) + 1e-5)
    x = deferred_norm.Deferred(r, scale)
    return programs.settle(getattr(programs, half)(params, x, **options))

  def plain(params, r):
    program = getattr(trm_block, f'{half}_half')
    return program(params, trm_block.rms(r), **options)

  kernel_laws.check_as_far_from_float32_as_plain(
    deferred, plain, (block[half], 5 * r, g)
  )


@pytest.mark.parametrize('turns', [False, True])
@pytest.mark.parametrize('scaled', [False, True])
def test_gradients_of_attention_are_turned_back_and_scaled(turns, scaled):
  tokens, half, rows = 17, 16, 3 * 17
  plan = attention.Plan(3, 2, attention.Tiles(heads=2), True)
  turn = trm_block.rotation(tokens, 2 * half) if turns else None
  tables = attention.tables(turn, half, jnp.float32)
  qkv_NE = jax.random.normal(jax.random.key(0), (rows, 12 * half))
  g_ND = jax.random.normal(jax.random.key(1), (rows, 4 * half))
  scale_N = jnp.linspace(0.2, 3, rows) if scaled else None

  def ready(qkv_NE):
    if scaled:
      qkv_NE *= scale_N[:, None]
    return attention.turned(qkv_NE, tables, plan)

  turned_NE, back = jax.vjp(ready, qkv_NE)
  seen_ND, log_HN = attention.forward(turned_NE, plan, keep=True)
  given = turned_NE, seen_ND, log_HN, g_ND, plan
  found = attention.backward(*given, tables, scale_N)
  (expected,) = back(attention.backward(*given))
  assert jnp.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'capability, dtype, rows, deferred',
  [
    ('9.0', 'bfloat16', 128, True),
    ('9.0', 'float16', 128, False),
    ('9.0', 'float32', 128, False),
    ('9.0', 'bfloat16', 96, False),
    ('8.0', 'bfloat16', 128, False),
  ],
)
def test_what_is_deferred_by_default(
  capability, dtype, rows, deferred, monkeypatch
):
  def other(*_, **options):
    return False

  pretend(monkeypatch, capability)
  monkeypatch.setattr(deferred_norm, 'channel_half', lambda *_, **options: True)
  monkeypatch.setattr(channel_half, 'apply', other)
  monkeypatch.setattr(trm_block, 'channel_half', other)
  weights = {'gate': jnp.zeros((512, 1536))}
  x = jnp.zeros((rows, 1, 512), dtype)
  assert halves.make().channel(weights, x) is deferred


def test_settling_has_the_gradient_of_the_norm():
  r_ND, g_ND = jax.random.normal(jax.random.key(0), (2, 24, 48))

  def settled(r_ND):
    scale_N = jax.lax.rsqrt((r_ND**2).mean(1) + 1e-5)
    deferred = deferred_norm.Deferred(r_ND, scale_N)
    return deferred_norm.settle(deferred, interpret=True)

  (found,) = jax.vjp(settled, r_ND)[1](g_ND)
  (expected,) = jax.vjp(trm_block.rms, r_ND)[1](g_ND)
  assert jnp.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_narrow_halves_are_not_deferred():
  plan = hopper.Plan()
  for width, deferred in ((512, True), (256, False)):
    x = jax.ShapeDtypeStruct((97, 768, width), jnp.bfloat16)
    assert deferred_norm.fits(x, 1536, plan) == deferred
  x = jax.ShapeDtypeStruct((97, 768, 512), jnp.bfloat16)
  assert not deferred_norm.fits(x, 1536, plan._replace(defer=False))
  assert not deferred_norm.fits(x, 1500, plan)
