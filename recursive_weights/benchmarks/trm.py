"""Time, arithmetic and memory of a training step of Tiny Recursive Models.

  python -m recursive_weights.benchmarks.trm --tokens 81 97 --fused plain fused

prints one JSON line a variant: forward, backward, AdamW and EMA of one
supervision step, with random inputs and the state donated. `flops_compiler`
and `bytes_compiler` are XLA's counts, which count the body of a loop once and
kernels not at all; `flops_formula` and `least_bytes` (a lower bound) are ours.

`--cell symmetric` (by `--mixing` and `--pool`) is the cell for Sudoku, whose
states are `--width` wide for each of nine digits. `benchmarks.trm_halves` times
the halves of a block.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.benchmarks import device
from recursive_weights.models import trm
from recursive_weights.models.kernels import (
  attention,
  cell_half,
  channel_half,
  constraint_half,
  halves,
  token_half,
)
from recursive_weights.models.layers import symmetric_block, trm_block

HEADS, LAYERS, CYCLES, INNER = 8, 2, 3, 6
WIDTHS = {'mixer': 512, 'attention': 512, 'symmetric': 128}
CLASSES = {'mixer': 11, 'attention': 11, 'symmetric': 9}
POOL_WIDTH = 64
PLACES = 81

KERNELS = {
  'token': token_half,
  'channel': channel_half,
  'attention': attention,
  'constraint': constraint_half,
  'cell': cell_half,
}


def tiles_of(name: str, changes: dict):
  """The default tiles of a kernel with some fields changed."""

  def change(value, changes):
    changes = {
      field: change(getattr(value, field), new)
      if isinstance(new, dict)
      else new
      for field, new in changes.items()
    }
    return value._replace(**changes)

  return change(KERNELS[name].Tiles(), changes)


def flops(
  cell: str,
  tokens: int,
  batch: int,
  width: int,
  mixing: str = 'constraints',
  pool: str = 'both',
) -> dict:
  """Multiply-adds count two. Of one call of each half, and `step`, of the
  whole training step.

    E = C + 2 G forward-equivalents, C = T (n + 1) calls of the network, of
    which the G = n + 1 of the last cycle carry a gradient
  """
  inner = trm_block.inner_width
  multiple = 256
  if cell == 'symmetric':
    batch, multiple = batch * CLASSES[cell], 64
  channel = 3 * width * inner(width, multiple=multiple)
  if cell == 'mixer':
    first: dict[str, float] = {'token': 3 * inner(tokens) * width}
  elif cell == 'attention':
    first = {'attention': 4 * width**2 + 2 * tokens * width}
  else:
    # Products whose values are pooled after them; means come first, and small.
    pooled = {'mean': 0, 'both': 0.5, 'max': 1, 'softmax': 2}[pool]
    families = 4 if mixing == 'constraints' else 1
    first = {'constraint': (2 + pooled) * width * families * POOL_WIDTH}
    if mixing == 'tokens':
      first['token'] = 3 * inner(tokens, multiple=multiple) * width
  calls = CYCLES * (INNER + 1) + 2 * (INNER + 1)
  halves = {
    name: 2.0 * batch * tokens * macs
    for name, macs in (first | {'channel': channel}).items()
  }
  return halves | {'step': calls * LAYERS * sum(halves.values())}


def build(cell: str, tokens: int, **fields):
  """The net on a Sudoku: 81 tokens and `tokens - 81` before them."""
  spec = interfaces.Spec(
    inputs=jax.ShapeDtypeStruct((81,), jnp.int32),
    answer=(81,),
    classes=CLASSES[cell],
    sizes={},
  )
  if cell == 'symmetric':
    fields |= {'pool_width': POOL_WIDTH, 'multiple': 64}
  else:
    fields |= {'prefix': tokens - 81}
    del fields['mixing'], fields['pool']
  return trm.make(
    spec,
    cell=cell,
    layers=LAYERS,
    heads=HEADS,
    cycles=CYCLES,
    inner=INNER,
    position='rotation' if cell == 'attention' else 'none',
    **fields,
  )


def make_step(model: interfaces.Model, optimizer, *, parts: int = 1):
  """`(state, batch) -> (state, loss)`, `state = (params, moments, ema, carry)`.

  Cross-entropy of all tokens and half the halting cross-entropy; `parts`
  micro-batches, whose gradients are means.
  """

  def loss_of(params, carry, batch):
    outputs, carry = model.apply(params, carry, batch['inputs'], train=True)
    logits_BTV, halt_B = outputs['logits'][0], outputs['halt'][0]
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits_BTV, batch['targets']
    ).mean()
    right_B = (logits_BTV.argmax(-1) == batch['targets']).all(1)
    halting = optax.sigmoid_binary_cross_entropy(
      halt_B, right_B.astype(jnp.float32)
    ).mean()
    return loss + 0.5 * halting, carry

  gradient = jax.value_and_grad(loss_of, has_aux=True)

  def accumulated(params, carry, batch):
    if parts == 1:
      return gradient(params, carry, batch)

    def body(total, part):
      (value, carry), grads = gradient(params, *part)
      return jax.tree.map(jnp.add, total, (value, grads)), carry

    split = jax.tree.map(
      lambda x: x.reshape(parts, -1, *x.shape[1:]), (carry, batch)
    )
    zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
    total, carry = jax.lax.scan(body, zeros, split)
    value, grads = jax.tree.map(lambda x: x / parts, total)
    carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
    return (value, carry), grads

  def step(state, batch):
    params, moments, ema, carry = state
    (value, carry), grads = accumulated(params, carry, batch)
    updates, moments = optimizer.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    ema = optax.incremental_update(params, ema, 0.001)
    return (params, moments, ema, carry), value

  return step


def measure_step(
  model: interfaces.Model,
  *,
  classes: int,
  batch: int,
  parts: int,
  repeats: int,
  profile: int = 0,
) -> dict:
  """Median time of a training step, and what the compiler says of it.

  `profile`: so many of its kernels are named, with the milliseconds of each.
  """
  optimizer = optax.adamw(1e-4, b2=0.95, weight_decay=1.0)
  stream = np.random.default_rng(0)
  data = {
    name: jnp.asarray(stream.integers(0, classes, (batch, 81)), jnp.int32)
    for name in ('inputs', 'targets')
  }

  def fresh(key):
    params = model.init(key, data['inputs'])
    ema = jax.tree.map(jnp.copy, params)
    return params, optimizer.init(params), ema, model.carry(params, batch)

  state = jax.jit(fresh)(jax.random.key(0))
  started = time.perf_counter()
  step = jax.jit(make_step(model, optimizer, parts=parts), donate_argnums=0)
  compiled = step.lower(state, data).compile()
  compile_s = time.perf_counter() - started
  losses = []

  def training(state):
    """Steps one after the other; the state is donated."""

    def run():
      nonlocal state
      state, value = compiled(state, data)
      losses.append(value)
      return state

    return run

  def again():
    run = training(jax.tree.map(jnp.copy, state))
    device.clock(run, repeats=0, calls=1)

  if profile:
    again()  # what is loaded at first is not the step's
    found = list(device.kernel_ms(again, calls=2).items())[:profile]
    kernels = {name: round(ms, 3) for name, ms in found}
  times = device.clock(training(state), repeats=repeats, calls=3)
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return {
    'ms': round(statistics.median(times), 3),
    'ms_min': round(min(times), 3),
    'losses': [round(float(x), 4) for x in (losses[0], losses[-1])],
    # The compiler counts the body of a loop once, and no kernels.
    'flops_compiler': cost.get('flops'),
    'bytes_compiler': cost.get('bytes accessed'),
    'temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
    'argument_bytes': getattr(memory, 'argument_size_in_bytes', None),
    'peak_bytes': device.peak_bytes(memory),
    'compile_s': round(compile_s, 1),
    **({'kernels': kernels} if profile else {}),
  }


def least_bytes(places: int, width: int, itemsize: int) -> float:
  """Traffic of a step whose halves read and write the state once each."""
  units = CYCLES * (INNER + 1) + 2 * (INNER + 1)
  return 2.0 * 2 * LAYERS * units * itemsize * places * width


def show(line: dict, peak: float, rate: float) -> None:
  line['tflops'] = round(rate, 2)
  if peak:
    line['share_of_peak'] = round(rate / peak, 4)
  print(json.dumps(line), flush=True)


def report(flags) -> None:
  grid = itertools.product(
    flags.cell, flags.tokens, flags.batch, flags.parts, flags.fused
  )
  for cell, tokens, batch, parts, fused in grid:
    width = flags.width or WIDTHS[cell]
    line = {
      'cell': cell,
      'width': width,
      'mixing': flags.mixing,
      'pool': flags.pool,
      'tokens': tokens,
      'batch': batch,
      'parts': parts,
      'fused': fused,
      'dtype': flags.dtype,
      'unrolled': flags.unrolled,
      'remat': flags.remat,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    program = halves.make(fused != 'plain', **TILES)
    if fused == 'token':
      program = trm_block.Halves(token=program.token)
    model = build(
      cell,
      tokens,
      width=width,
      mixing=flags.mixing,
      pool=flags.pool,
      dtype=flags.dtype,
      fused=program,
      unrolled=flags.unrolled,
      remat=flags.remat,
    )
    try:
      line |= measure_step(
        model,
        classes=CLASSES[cell],
        batch=batch,
        parts=parts,
        repeats=flags.repeats,
        profile=flags.profile,
      )
    except Exception as error:
      text = f'{type(error).__name__}: {error}'
      print(json.dumps(line | {'failed': text[:300]}), flush=True)
      continue
    work = flops(cell, tokens, batch, width, flags.mixing, flags.pool)['step']
    places = tokens * batch * (9 if cell == 'symmetric' else 1)
    line['flops_formula'] = work
    line['least_bytes'] = least_bytes(
      places, width, jnp.dtype(flags.dtype).itemsize
    )
    show(line, flags.peak_tflops, work / line['ms'] / 1e9)


# Tiles of whole steps, by `--tiles`.
TILES: dict = {}


def read_tiles(text: str) -> dict:
  """Tiles by the name that `halves.make` has for them.

  Raises:
    argparse.ArgumentTypeError: it is not JSON, or names no kernel or no field.
  """
  try:
    found = {
      'over' if name == 'attention' else name: tiles_of(name, changes)
      for name, changes in json.loads(text).items()
    }
  except (KeyError, ValueError, TypeError, AttributeError) as error:
    raise argparse.ArgumentTypeError(
      f'must be JSON such as {{"token": {{"columns": 64}}}}, by kernel '
      f'({", ".join(KERNELS)}) its fields, got {text!r}: {error}'
    ) from error
  return found


def check_tokens(cells: list[str], tokens: list[int]) -> str:
  """What is wrong with the tokens of whole steps, '' for nothing."""
  for cell, count in itertools.product(cells, tokens):
    if cell == 'symmetric' and count != PLACES:
      return (
        f'--tokens must be {PLACES} with --cell symmetric, whose states are '
        f'the places of a Sudoku alone, got {count}'
      )
    if count < PLACES:
      return f'--tokens must be at least the {PLACES} of a Sudoku, got {count}'
  return ''


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--cell', nargs='+', default=['mixer'], choices=tuple(WIDTHS)
  )
  parser.add_argument('--width', type=int, default=0, help="0: the recipe's")
  parser.add_argument(
    '--mixing', default='constraints', choices=symmetric_block.KINDS
  )
  parser.add_argument('--pool', default='both', choices=symmetric_block.POOLS)
  parser.add_argument('--tokens', type=int, nargs='+', default=[81])
  parser.add_argument('--batch', type=int, nargs='+', default=[768])
  parser.add_argument(
    '--parts', type=int, nargs='+', default=[1], help='micro-batches'
  )
  parser.add_argument(
    '--fused',
    nargs='+',
    default=['plain', 'fused'],
    choices=('plain', 'fused', 'token'),
    help='token: only the token half',
  )
  parser.add_argument(
    '--tiles',
    type=read_tiles,
    default='{}',
    help='JSON: {"token": {"columns": 64}, "channel": {...}}',
  )
  parser.add_argument('--dtype', default='bfloat16', choices=device.DTYPES)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--unrolled', type=int, default=INNER, help='updates of z in a loop body'
  )
  parser.add_argument('--remat', action='store_true')
  parser.add_argument(
    '--profile', type=int, default=0, help='kernels to name, longest first'
  )
  parser.add_argument(
    '--peak_tflops', type=float, help="of the device; none: its data sheet's"
  )
  flags = parser.parse_args()
  if wrong := check_tokens(flags.cell, flags.tokens):
    parser.error(wrong)
  if flags.peak_tflops is None:
    flags.peak_tflops, _ = device.limits()
  TILES.update(flags.tiles)
  report(flags)


if __name__ == '__main__':
  main()
