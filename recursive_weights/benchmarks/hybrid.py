"""Training and decoding speed of hybrid language models, and their memory.

  python -m recursive_weights.benchmarks.hybrid --pattern H R M A --batch 8

prints one JSON line a pattern: parameters, tokens a second of a training step
(forward, backward, AdamW, the state handed on), of reading and of writing
token by token, the memory that the compiler plans, compile times.

  python -m recursive_weights.benchmarks.hybrid --tokens 1024 4096 16384 65536

prints for each pattern, reading in chunks and writing one by one, what a
process of its own holds after so many tokens: bytes of the cache, of all live
arrays, what the compiler plans for a call, the largest resident memory so far;
and the speed. In `results/hybrid_cpu.jsonl` those lines were taken on a machine
that did other work too, so they are without `tokens_per_second`; the last four
(`--pattern H R M A --layers 3 --width 96 --batch 8 --rows 8`) had a core to
themselves.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recursive_weights.benchmarks import device
from recursive_weights.interfaces import UserError
from recursive_weights.models import hybrid_lm
from recursive_weights.models.decoder import text_spec


def median_seconds(call, given, repeats: int) -> float:
  """Median over calls, each of which gets what the one before returned."""
  times = []
  for _ in range(2 + repeats):
    started = time.perf_counter()
    given = jax.block_until_ready(call(given))
    times.append(time.perf_counter() - started)
  return statistics.median(times[2:])


def compiled(function, given):
  started = time.perf_counter()
  program = jax.jit(function, donate_argnums=0).lower(given).compile()
  return program, round(time.perf_counter() - started, 1)


def programs(model, vocabulary: int, flags: argparse.Namespace) -> dict:
  """`{name: (function, what it takes and returns, tokens of a call)}`."""
  key = jax.random.key(0)
  params = jax.jit(model.init, static_argnums=1)(key, None)
  shape = (flags.batch, flags.length)
  tokens_BT = jax.random.randint(key, shape, 0, vocabulary)
  inputs = {'tokens': tokens_BT, 'resets': jnp.zeros(shape, bool)}
  optimizer = optax.adamw(1e-4)
  decoder = model.decoder

  def train(given):
    params, state, carry = given

    def loss(params):
      outputs, after = model.apply(params, carry, inputs, key=None, train=True)
      logits_BTV = outputs['logits'][0, :, :-1]
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV, tokens_BT[:, 1:]
      )
      return losses.mean(), after

    grads, after = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, after

  def read(given):
    params, cache = given
    _, pending = decoder.blocks(params, cache, decoder.embed(params, tokens_BT))
    return params, decoder.commit(cache, pending)

  def write(given):
    params, cache, tokens_B1 = given

    def one(carry, _):
      cache, tokens_B1 = carry
      x, pending = decoder.blocks(
        params, cache, decoder.embed(params, tokens_B1)
      )
      tokens_B1 = decoder.head(params, x).argmax(-1).astype(jnp.int32)
      return (decoder.commit(cache, pending), tokens_B1), None

    (cache, tokens_B1), _ = jax.lax.scan(
      one, (cache, tokens_B1), None, length=flags.written
    )
    return params, cache, tokens_B1

  def fresh(rows):
    # Every program gives its arguments away, so each has its own.
    return jax.tree.map(jnp.copy, params), decoder.cache(params, rows)

  own, cache = fresh(flags.batch)
  training = (own, optimizer.init(own), cache)
  own, cache = fresh(flags.rows)
  tokens_B1 = jnp.zeros((flags.rows, 1), jnp.int32)
  return {
    'train': (train, training, flags.batch * flags.length),
    'read': (read, fresh(flags.batch), flags.batch * flags.length),
    'write': (write, (own, cache, tokens_B1), flags.rows * flags.written),
  }


def grown(
  fields: dict, flags: argparse.Namespace, name: str
) -> list[dict[str, Any]]:
  """Memory and speed of this process after more and more tokens."""
  model = hybrid_lm.make(text_spec(flags.vocabulary), **fields)
  function, given, each = programs(model, flags.vocabulary, flags)[name]
  program, _ = compiled(function, given)
  given = jax.block_until_ready(program(given))
  memory = program.memory_analysis()
  calls, lines = 1, []
  for tokens in sorted(flags.tokens):
    started, before = time.perf_counter(), calls
    while calls * each < tokens:
      given = program(given)
      calls += 1
    jax.block_until_ready(given)
    seconds = time.perf_counter() - started
    done = (calls - before) * each
    lines.append(
      {
        'program': name,
        'tokens': int(given[1]['position'][0]),
        'tokens_per_second': round(done / seconds, 1) if done else None,
        'cache_bytes': sum(x.nbytes for x in jax.tree.leaves(given[1])),
        'live_bytes': sum(x.nbytes for x in jax.live_arrays()),
        'temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
        'peak_rss_kib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
      }
    )
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pattern', nargs='+', default=['H', 'R', 'M', 'A'])
  parser.add_argument(
    '--size', default='', choices=['', *hybrid_lm.SIZES], help='a named size'
  )
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--width', type=int, default=128)
  parser.add_argument('--head_width', type=int, default=32)
  parser.add_argument('--window', type=int, default=128)
  parser.add_argument('--chunk', type=int, default=32)
  parser.add_argument('--initial', default='learned')
  parser.add_argument(
    '--remat', action=argparse.BooleanOptionalAction, default=True
  )
  parser.add_argument('--dtype', default='float32', choices=device.DTYPES)
  parser.add_argument('--precision', default='highest')
  parser.add_argument('--vocabulary', type=int, default=97)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--rows', type=int, default=1, help='texts written')
  parser.add_argument('--written', type=int, default=64, help='tokens written')
  parser.add_argument('--repeats', type=int, default=5)
  programs_known = ['train', 'read', 'write']
  parser.add_argument(
    '--program', nargs='+', default=programs_known, choices=programs_known
  )
  parser.add_argument(
    '--tokens',
    type=int,
    nargs='+',
    default=[],
    help='memory after so many tokens of reading and writing, batch of one',
  )
  flags = parser.parse_args()
  shared = ('window', 'chunk', 'initial', 'remat', 'dtype', 'precision')
  models = []
  for pattern in flags.pattern:
    fields = {name: getattr(flags, name) for name in shared}
    sizes: dict[str, Any] = {
      name: getattr(flags, name) for name in ('layers', 'width', 'head_width')
    }
    if flags.size:
      sizes = hybrid_lm.SIZES[flags.size]
    fields |= sizes | {'pattern': pattern}
    # All of them before one is measured, which takes minutes.
    try:
      model = hybrid_lm.make(text_spec(flags.vocabulary), **fields)
    except UserError as error:
      parser.error(str(error))
    models.append((fields, model))
  for fields, model in models:
    line = fields | {
      'vocabulary': flags.vocabulary,
      'parameters': hybrid_lm.count(flags.vocabulary, **fields),
      'batch': flags.batch,
      'length': flags.length,
      'rows': flags.rows,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    if flags.tokens:
      flags.batch = flags.rows = line['batch'] = line['rows'] = 1
      for name in ('read', 'write'):
        with multiprocessing.get_context('spawn').Pool(1) as pool:
          for found in pool.apply(grown, (fields, flags, name)):
            print(json.dumps(line | found), flush=True)
      continue
    every = programs(model, flags.vocabulary, flags)
    for name in flags.program:
      function, given, tokens = every[name]
      program, compile_s = compiled(function, given)
      memory = program.memory_analysis()
      seconds = median_seconds(program, given, flags.repeats)
      line |= {
        f'{name}_tokens_per_second': round(tokens / seconds, 1),
        f'{name}_temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
        f'{name}_peak_bytes': device.peak_bytes(memory),
        f'{name}_compile_s': compile_s,
      }
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
