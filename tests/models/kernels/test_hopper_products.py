"""The Hopper kernels, run by the simulator of groups, barriers and copies."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from recursive_weights.models.kernels import (
  added_product,
  attention,
  gated_product,
  hopper,
  tiling,
  turned_product,
)
from recursive_weights.models.layers import trm_block

params = pytest.importorskip('jax._src.pallas.mosaic_gpu.interpret.params')

# Blocks that share no whole number of tiles: three tiles for two blocks.
ROWS, WIDTH, HIDDEN = 128, 128, 192


def plan(**changes):
  small = hopper.Tiles(columns=64, stages=2)
  return hopper.Plan(
    gated=small,
    backward=small,
    kept=small,
    joined=small,
    spread=small,
    turned=small,
    blocks=2,
    interpret=params.InterpretGPUParams(),
  )._replace(**changes)


def arrays():
  keys = jax.random.split(jax.random.key(0), 3)
  weights = trm_block.swiglu_init(keys[0], WIDTH, HIDDEN)
  weights = tuple(
    weights[name].astype(jnp.bfloat16) for name in ('gate', 'up', 'down')
  )
  x_ND, dr_ND = (
    jax.random.normal(key, (ROWS, WIDTH)).astype(jnp.bfloat16)
    for key in keys[1:]
  )
  return weights, x_ND, dr_ND


def exact(weights, x_ND, dr_ND):
  wide = [a.astype(jnp.float32) for a in (*weights, x_ND, dr_ND)]
  gate, up, down, x, dr = wide
  return tiling.swiglu_backward(x @ gate, x @ up, dr @ down.T)


def distance(a, b):
  return jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)


@pytest.mark.long
@pytest.mark.parametrize('ahead', [False, True])
def test_gated_unit_of_two_products(ahead):
  weights, x_ND, dr_ND = arrays()
  tiles = hopper.Tiles(columns=64, stages=2, ahead=ahead)
  (found,) = gated_product.gated(*weights[:2], x_ND, plan(gated=tiles))
  assert distance(found, exact(weights, x_ND, dr_ND)[2]) < 3e-3


@pytest.mark.long
@pytest.mark.parametrize('ahead', [False, True])
def test_gradients_of_the_gated_unit(ahead):
  weights, x_ND, dr_ND = arrays()
  tiles = hopper.Tiles(columns=64, stages=2, ahead=ahead)
  both, hidden = gated_product.gated_backward(
    *weights, x_ND, dr_ND, plan(backward=tiles)
  )
  dgate, dup, h = exact(weights, x_ND, dr_ND)
  assert distance(both, jnp.concatenate([dgate, dup], 1)) < 3e-3
  assert distance(hidden, h) < 3e-3


@pytest.mark.parametrize(
  'ahead, width',
  # What runs by default on a Hopper GPU is never left out.
  [(True, 32), pytest.param(False, 64, marks=pytest.mark.long)],
)
def test_gradients_from_products_that_were_kept(ahead, width):
  weights, x_ND, dr_ND = arrays()
  gate, up, down = weights
  tiles = hopper.Tiles(columns=64, width=width, stages=2, ahead=ahead)
  keeps = plan(kept=tiles)
  (alone,) = gated_product.gated(gate, up, x_ND, keeps)
  hidden, both = gated_product.gated(gate, up, x_ND, keeps, keep=True)
  assert (alone == hidden).all()
  wide = (a.astype(jnp.float32) for a in (x_ND, gate, up))
  x, gate, up = wide
  assert distance(both, jnp.concatenate([x @ gate, x @ up], 1)) < 3e-3
  # Three tiles of one block: what is kept lies where the last one lay.
  one = keeps._replace(blocks=1)
  (dboth,) = added_product.kept_backward(down, both, dr_ND, one)
  dgate, dup, h = exact(weights, x_ND, dr_ND)
  assert distance(hidden, h) < 3e-3
  assert distance(dboth, jnp.concatenate([dgate, dup], 1)) < 5e-3


def test_rows_are_scaled_where_they_are_read():
  (gate, up, down), x_ND, dr_ND = arrays()
  scale_N = jnp.linspace(0.5, 2, ROWS)
  keeps = plan()
  hidden, both = gated_product.gated(gate, up, x_ND, keeps, True, scale_N)
  wide = (a.astype(jnp.float32) for a in (gate, up, down, x_ND, dr_ND))
  gate, up, down_FD, x, dr = wide
  x = scale_N[:, None] * x
  assert distance(both, jnp.concatenate([x @ gate, x @ up], 1)) < 3e-3
  u, v = jnp.split(both.astype(jnp.float32), 2, axis=1)
  du, dv, h = tiling.swiglu_backward(u, v, dr @ down_FD.T)
  assert distance(hidden, h) < 5e-3
  dboth, sums_PN = added_product.kept_backward(
    down, both, dr_ND, keeps, scale_N
  )
  expected = scale_N[:, None] * jnp.concatenate([du, dv], 1)
  assert distance(dboth, expected) < 3e-3
  assert sums_PN.shape == (HIDDEN // 64, ROWS)
  chex.assert_trees_all_close(sums_PN.sum(0), (u * du).sum(1), rtol=1e-3)


@pytest.mark.parametrize('sets', [1, 2])
@pytest.mark.parametrize('scaled', [(True,), (False,), (True, False)])
def test_product_and_terms(scaled, sets):
  (_, _, down), a_ND, _ = arrays()
  a_NK = jnp.concatenate([a_ND, a_ND[:, ::-1][:, :64]], 1)
  keys = jax.random.split(jax.random.key(1), len(scaled))
  x_NDs = [
    jax.random.normal(k, (ROWS, WIDTH)).astype(jnp.bfloat16) for k in keys
  ]
  scale_N = jnp.linspace(0.5, 2, ROWS)
  terms = tuple(
    (x, scale_N if s else None) for x, s in zip(x_NDs, scaled, strict=True)
  )
  # Two tiles of one block: terms come where the last results lay.
  one = plan(blocks=1)
  tiles = hopper.Tiles(columns=64, stages=2, ahead=True, sets=sets)
  found, sums_PN = added_product.added(
    a_NK, down, terms, tiles, one, squares=True
  )
  (alone,) = added_product.added(a_NK, down, terms, tiles, one)
  assert (alone == found).all()
  expected = a_NK.astype(jnp.float32) @ down.astype(jnp.float32)
  for x, scale in terms:
    expected += (1 if scale is None else scale[:, None]) * x.astype(jnp.float32)
  assert distance(found, expected) < 3e-3
  chex.assert_trees_all_close(sums_PN.sum(0), (expected**2).sum(1), rtol=1e-3)


@pytest.mark.parametrize('sets', [1, 2])
@pytest.mark.parametrize('count, blocks', [(1, 3), (5, 1)])
def test_fewer_steps_than_stages(count, blocks, sets):
  # Fewer tiles than blocks, and tiles that are all on their way at once.
  (_, _, down), a_ND, _ = arrays()
  a_ND = jnp.concatenate([a_ND] * count)
  a_NK, w_KD, x_ND = a_ND[:, :64], down[:64, :64], a_ND[:, 64:]
  tiles = hopper.Tiles(columns=64, stages=5, ahead=True, sets=sets)
  (found,) = added_product.added(
    a_NK, w_KD, ((x_ND, None),), tiles, plan(blocks=blocks)
  )
  expected = a_NK.astype(jnp.float32) @ w_KD.astype(jnp.float32)
  assert distance(found, expected + x_ND.astype(jnp.float32)) < 3e-3


@pytest.mark.parametrize(
  'wrong', [{'stages': 1, 'ahead': True}, {'stages': 0}, {'sets': 3}]
)
def test_tiles_that_would_wait_for_ever_are_refused(wrong):
  with pytest.raises(ValueError, match='stages must be > 0'):
    hopper.whole(hopper.Tiles(**wrong), 128, 64, 128)


def test_only_whole_tiles_fit():
  whole = hopper.Plan()
  assert gated_product.fits(81 * 768, 512, 1536, whole)
  assert gated_product.fits(97 * 768, 512, 1536, whole)
  assert not gated_product.fits(81, 512, 1536, whole)
  assert not gated_product.fits(81 * 768, 48, 1536, whole)


def test_sizes_that_are_not_whole_tiles_are_named():
  (gate, up, _), x_ND, _ = arrays()
  with pytest.raises(ValueError, match='are not whole'):
    gated_product.gated(gate, up, x_ND[:-1], plan())
  assert not hopper.whole(hopper.Tiles(), 0, 64, 128)


@pytest.mark.parametrize(
  'tokens, turns, scaled, columns, ahead',
  [
    (17, True, True, 64, True),  # places come again within a tile and later
    (97, True, False, 128, False),
    (8, True, True, 128, True),
    (16, False, True, 64, False),
    (16, False, False, 64, True),
  ],
)
def test_turned_queries_and_keys(tokens, turns, scaled, columns, ahead):
  rows, head = 384, 32
  keys = jax.random.split(jax.random.key(0), 2)
  x_ND = jax.random.normal(keys[0], (rows, WIDTH)).astype(jnp.bfloat16)
  qkv_DE = jax.random.normal(keys[1], (WIDTH, 3 * WIDTH)).astype(jnp.bfloat16)
  scale_N = jnp.linspace(0.2, 3, rows) if scaled else None
  turn = trm_block.rotation(tokens, head) if turns else None
  tables = attention.tables(turn, head // 2, jnp.bfloat16)
  tiles = hopper.Tiles(columns=columns, stages=2, ahead=ahead)
  found = turned_product.turned(
    x_ND, qkv_DE, tables, scale_N, head, plan(turned=tiles)
  )
  # Whole examples, since the reference counts places from the first row.
  examples = -(-rows // tokens)
  exact = x_ND.astype(jnp.float32) @ qkv_DE.astype(jnp.float32)
  exact *= jnp.ones((rows, 1)) if scale_N is None else scale_N[:, None]
  padded = jnp.pad(exact, ((0, examples * tokens - rows), (0, 0)))
  heads = attention.Plan(examples, WIDTH // head, attention.Tiles(), True)
  expected = attention.turned(padded, tables, heads)[:rows]
  for a, b in zip(
    jnp.split(found, 3, 1), jnp.split(expected, 3, 1), strict=True
  ):
    assert distance(a, b) < 3e-3


def test_tiles_hold_whole_heads():
  x_ND = jnp.zeros((128, 192), jnp.bfloat16)
  qkv_DE = jnp.zeros((192, 576), jnp.bfloat16)
  with pytest.raises(ValueError, match='do not hold whole heads of 96'):
    turned_product.turned(x_ND, qkv_DE, (), None, 96, plan())
  # Of 96 columns one would have keys and values.
  tiles = hopper.Tiles(columns=96, stages=2)
  with pytest.raises(ValueError, match='are not whole'):
    turned_product.turned(
      x_ND[:, :128],
      qkv_DE[:128, :384],
      (),
      None,
      32,
      plan(turned=tiles),
    )


def test_all_products_lower_for_a_gpu():
  rows, width, hidden = 97 * 768, 512, 1536
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  x, both = shape((rows, width)), shape((rows, 2 * hidden))
  up, down = shape((width, hidden)), shape((hidden, width))
  s = jax.ShapeDtypeStruct((rows,), jnp.float32)
  default = hopper.Plan(blocks=132)

  def joined(h, w, x, s):
    terms = ((x, s),)
    return added_product.added(h, w, terms, default.joined, default, True)

  def spread(d, w, x, s):
    terms = (x, s), (x, s)
    return added_product.added(d, w, terms, default.spread, default)

  def gated(gate, up, x, s):
    return gated_product.gated(gate, up, x, default, True, s)

  def again(gate, up, down, x):
    return gated_product.gated_backward(gate, up, down, x, x, default)

  def kept(down, both, x, s):
    return added_product.kept_backward(down, both, x, default, s)

  def turned(head):
    def program(x, w, t, s):
      return turned_product.turned(x, w, (t, t), s, head, default)

    angles = jax.ShapeDtypeStruct((97, head // 2), jnp.float16)
    return program, (x, shape((width, 3 * width)), angles, s)

  for program, args in (
    *map(turned, (32, 64, 128)),
    (joined, (shape((rows, hidden)), down, x, s)),
    (spread, (both, shape((2 * hidden, width)), x, s)),
    (gated, (up, up, x, s)),
    (again, (up, up, down, x)),
    (kept, (down, both, x, s)),
  ):
    traced = jax.jit(program).trace(*args)
    assert 'mosaic_gpu' in traced.lower(lowering_platforms=('cuda',)).as_text()
