"""Time and exactness of single halves of Tiny Recursive Models' blocks.

  python -m recursive_weights.benchmarks.trm_halves token channel --tokens 97

prints one JSON line a half and its tiles, plain and fused: forward and forward
with backward, with random inputs, and how far each is from float32. The halves
`constraint` and `cell` are of the cell for Sudoku, whose states are `--width`
wide for each of nine digits. Where a half leaves its norm to the next one, that
is made after it here, which in a step it is not, and x comes normed.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.benchmarks import device
from recursive_weights.benchmarks.trm import (
  HEADS,
  KERNELS,
  POOL_WIDTH,
  flops,
  show,
  tiles_of,
)
from recursive_weights.models.kernels import halves, token_half
from recursive_weights.models.layers import symmetric_block, trm_block

# What the constraint half pools over, whole and in a block that mixes tokens.
FAMILIES = {'constraint': tuple(symmetric_block.FAMILIES), 'cell': ('cell',)}

# Not deferred: what the other tiles of a channel half are for.
MADE_AGAIN = {'wide': {'defer': False}}

# Tiles worth a measurement, as changes to the defaults. Forward and backward
# settings are independent, so one entry tries one of each.
SETTINGS: dict[str, list[dict]] = {
  'token': [
    dict(zip(token_half.Tiles._fields, values, strict=True))
    for values in (
      (64, 32, 4, 3, False, 64, 32, 4, 3, False),
      (64, 32, 4, 3, True, 64, 32, 4, 3, True),
      (128, 32, 8, 3, False, 64, 32, 4, 2, False),
      (128, 32, 8, 3, True, 128, 64, 8, 3, False),
      (64, 16, 4, 3, False, 64, 16, 4, 3, False),
      (64, 32, 4, 2, False, 64, 64, 4, 2, False),
    )
  ],
  'channel': [
    {'wide': None},
    {**MADE_AGAIN, 'down': False},
    {**MADE_AGAIN, 'down': True},
    MADE_AGAIN,
    {**MADE_AGAIN, 'down': False, 'norm_rows': 32, 'norm_warps': 8},
    {**MADE_AGAIN, 'norm_rows': 4},
    {**MADE_AGAIN, 'norm_rows': 16},
    {'wide': {'defer': False, 'backward': {'ahead': True}}},
    {'wide': {'gated': {'ahead': True}}},
    {'wide': {'joined': {'stages': 4}, 'spread': {'stages': 4}}},
    {'wide': {'kept': {'columns': 128, 'stages': 3}}},
    {**MADE_AGAIN, 'down': True, 'down_width': 32, 'down_stages': 4},
  ],
  'attention': [
    {'heads': 1},
    {'heads': 4},
    {'warps': 16, 'back_warps': 4},
    {'warps': 4, 'back_warps': 16},
  ],
  'constraint': [
    {'warps': 8, 'back_warps': 8},
    {'rows': 128, 'warps': 8, 'back_rows': 128, 'back_warps': 8},
    {'stages': 3, 'back_stages': 1},
    {'rows': 32, 'back_rows': 32},
  ],
  'cell': [
    {'warps': 4, 'back_warps': 4},
    {'rows': 64, 'warps': 4, 'back_rows': 64, 'back_warps': 4},
    {'rows': 256, 'back_rows': 32, 'back_warps': 4},
  ],
}


def half_params(name: str, tokens: int, width: int, pool: str, key):
  if name == 'attention':
    return trm_block.attention_init(key, width)
  if name in FAMILIES:
    families = len(FAMILIES[name])
    return symmetric_block.constraint_init(
      key, width, POOL_WIDTH, families, pool
    )
  size = tokens if name == 'token' else width
  multiple = 64 if width < 256 else 256
  return trm_block.swiglu_init(
    key, size, trm_block.inner_width(size, multiple=multiple)
  )


def half_program(
  name: str, tokens: int, width: int, pool: str, tiles=None, *, fused: bool
):
  """`(params, x) -> y`, plain or fused."""
  options: dict = {}
  if name == 'attention':
    turn = trm_block.rotation(tokens, width // HEADS)
    options = {'heads': HEADS, 'turn': turn}
  if name in FAMILIES:
    options = {'families': FAMILIES[name], 'box': (3, 3), 'pool': pool}
  if not fused:
    plain: dict[str, Callable] = {
      'token': trm_block.token_half,
      'channel': trm_block.channel_half,
      'attention': trm_block.attention_half,
    }
    program = plain.get(name, symmetric_block.constraint_half)
    return functools.partial(program, **options)
  made = halves.make(True, **{'over' if name == 'attention' else name: tiles})
  half = getattr(made, 'constraint' if name in FAMILIES else name)
  return lambda params, x: made.settle(half(params, x, **options))


def distances(program, exact, params, x, g) -> list[float]:
  """`|a - b| / |b|` of value, gradient of x and of the parameters."""

  @functools.partial(jax.jit, static_argnums=0)
  def both(program, params, x, g):
    y, pull = jax.vjp(program, params, x)
    dparams, dx = pull(g)
    return y, dx, dparams

  found = both(program, params, x, g)
  with jax.default_matmul_precision('highest'):
    wide = both(exact, params, *(a.astype(jnp.float32) for a in (x, g)))
  result = []
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wide), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    result.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
  return result


def measure_half(
  name: str,
  tokens: int,
  batch: int,
  width: int,
  pool: str,
  dtype: str,
  tiles,
  *,
  repeats: int,
) -> dict:
  """Times of a half alone; `tiles` None for the plain one, {} for defaults."""
  keys = jax.random.split(jax.random.key(0), 3)
  params = half_params(name, tokens, width, pool, keys[0])
  fused = tiles is not None
  if fused:
    tiles = tiles_of(name, tiles)
  program = half_program(name, tokens, width, pool, tiles, fused=fused)
  digits = name in FAMILIES or (name == 'channel' and width < 256)

  def states(batch):
    first = (batch, tokens) if name == 'attention' else (tokens, batch)
    shape = (*first, *((9,) if digits else ()), width)
    return [jax.random.normal(key, shape).astype(dtype) for key in keys[1:]]

  exact = half_program(name, tokens, width, pool, fused=False)
  x, g = states(min(batch, 8))
  line = {'error': max(distances(program, exact, params, x, g))}
  x, g = states(batch)
  forward = jax.jit(program)

  @jax.jit
  def both(params, x, g):
    y, pull = jax.vjp(program, params, x)
    return y, pull(g)

  cell = 'symmetric' if digits else 'mixer'
  cell = 'attention' if name == 'attention' else cell
  work = flops(cell, tokens, batch, width, pool=pool)
  work['cell'] = work.get('constraint', 0.0) / 4
  for kind, run, passes in (
    ('forward', lambda: forward(params, x), 1),
    ('both', lambda: both(params, x, g), 3),
  ):
    times = device.clock(run, repeats=repeats, calls=10)
    line[f'{kind}_ms'] = round(statistics.median(times), 4)
    line[f'{kind}_tflops'] = round(
      passes * work[name] / line[f'{kind}_ms'] / 1e9, 1
    )
  return line


def report(flags) -> None:
  for name, tokens in itertools.product(flags.halves, flags.tokens):
    width = flags.width or (128 if name in FAMILIES else 512)
    settings = [None, {}, *SETTINGS[name][: flags.settings or None]]
    for tiles in settings:
      line = {'half': name, 'tokens': tokens, 'batch': flags.batch}
      line |= {'width': width, 'pool': flags.pool}
      line['tiles'] = 'plain' if tiles is None else tiles
      try:
        line |= measure_half(
          name,
          tokens,
          flags.batch,
          width,
          flags.pool,
          flags.dtype,
          tiles,
          repeats=flags.repeats,
        )
        show(line, flags.peak_tflops, line['both_tflops'])
      except Exception as error:  # A setting may need more than the chip has.
        text = f'{type(error).__name__}: {error}'
        print(json.dumps(line | {'failed': text[:300]}), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('halves', nargs='+', choices=KERNELS)
  parser.add_argument(
    '--settings', type=int, default=0, help='tile settings tried; 0: all'
  )
  parser.add_argument('--width', type=int, default=0, help="0: the recipe's")
  parser.add_argument('--pool', default='both', choices=symmetric_block.POOLS)
  parser.add_argument('--tokens', type=int, nargs='+', default=[81])
  parser.add_argument('--batch', type=int, default=768)
  parser.add_argument('--dtype', default='bfloat16', choices=device.DTYPES)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--peak_tflops', type=float, help="of the device; none: its data sheet's"
  )
  flags = parser.parse_args()
  if flags.peak_tflops is None:
    flags.peak_tflops, _ = device.limits()
  report(flags)


if __name__ == '__main__':
  main()
