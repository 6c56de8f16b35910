r"""Time and memory of the scans over time, in every form that models use.

  python -m recursive_weights.benchmarks.scans --kernel kimi_delta --length 4096

prints one JSON line a kernel, algorithm and size, of random inputs with gates
near those of trained models. A scan's line has `forward`, `forward_backward`
and, where the algorithm has one, `prefill`: forward from a state, with the
state at the end of every text, as text is read. Algorithm `step` is one token
from a state, as text is written: one line for all lengths and chunks. Kernels
of matrix states (`fused`) have a chunk of their own, which is printed.

On a CPU every call is waited for, which is most of a small step's time.
Elsewhere ten are started and the last is waited for (`calls`, in every line):
the device works on one while the host starts the next, as in training, and
results of all but the last are dropped at once. A time is the mean of such
calls; `ms` is the median of `--repeats` of them, `ms_min` the least.

Memory is by the compiler's count, of one call: temporaries, and with arguments
and outputs the peak. Arithmetic is that of the recurrence token by token,
traffic that of inputs, outputs and their gradients once each. The share of the
roofline is the larger of the shares of the device's arithmetic and bandwidth
that these come to: 1 where no program could be faster.
Flags give the two of a device that is not known here, such as a CPU.

  python -m recursive_weights.benchmarks.scans --kernel kimi_delta rwkv6 \
      --algorithm chunked fused step --dtype bfloat16 --batch 8 \
      --length 4096 16384 --heads 16
"""

import argparse
import functools
import itertools
import json
import statistics
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.benchmarks import device
from recursive_weights.interfaces import UserError
from recursive_weights.scans import (
  chunks,
  delta_rule,
  linear_attention,
  selective,
  ssd,
)
from recursive_weights.scans.kernels import stateless

KERNELS = (
  'gated_linear',
  'rwkv6',
  'gated_delta',
  'kimi_delta',
  'ssd',
  'selective',
)


GRID = ('kernel', 'dtype', 'algorithm', 'chunk', 'batch', 'length', 'heads')
SIZES = ('batch', 'length', 'heads', 'groups', 'key_width', 'value_width')
STEP, FUSED = 'step', 'fused'
# Of one case of a grid, whose others go on.
FAILURES = (UserError, ValueError, jax.errors.JaxRuntimeError)
IN_FLIGHT = 10  # calls, where the device works while the host goes on


def build(kernel: str, size: argparse.Namespace, dtype: str):
  """`(forms, inputs, shared)` of a kernel.

  `forms` has its `scan`, `prefill`, `step` and `commit`; all inputs have
  gradients, those at the indices `shared` no axis of time.
  """
  b, t, h, k, v = (
    size.batch,
    size.length,
    size.heads,
    size.key_width,
    size.value_width,
  )
  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  def gates(*shape):
    return -size.gate * jax.random.exponential(next(keys), shape)

  def narrow(*arrays):
    return [x.astype(dtype) for x in arrays]

  if kernel in ('ssd', 'selective'):
    if kernel == 'ssd':
      x, dt, a = normal(b, t, h, v), -gates(b, t, h), -jnp.ones(h)
      maps = (normal(b, t, size.groups, k), normal(b, t, size.groups, k))
    else:
      x, dt, a = normal(b, t, h * v), -gates(b, t, h * v), -jnp.ones((h * v, k))
      maps = (normal(b, t, k), normal(b, t, k))
    module = ssd if kernel == 'ssd' else selective
    return module, [*narrow(x), dt, a, *narrow(*maps)], (2,)
  q, key, value = normal(b, t, h, k), normal(b, t, h, k), normal(b, t, h, v)
  q, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, key))
  rows = narrow(q, key, value)
  if kernel == 'gated_linear':
    return linear_attention, [*rows, gates(b, t, h, k)], ()
  if kernel == 'rwkv6':
    names = ('scan', 'prefill', STEP)
    forms = {
      name: _with_bonus(getattr(linear_attention, name)) for name in names
    }
    forms['commit'] = linear_attention.commit
    inputs = [*rows, gates(b, t, h, k), normal(h, k)]
    return types.SimpleNamespace(**forms), inputs, (4,)
  decays = gates(b, t, h) if kernel == 'gated_delta' else gates(b, t, h, k)
  return delta_rule, [*rows, decays, jax.nn.sigmoid(normal(b, t, h))], ()


def _with_bonus(form):
  def call(*inputs, **options):
    *others, bonus_HK = inputs
    return form(*others, bonus_HK=bonus_HK, **options)

  return call


def cases(size: argparse.Namespace) -> dict:
  """`(function, arguments)` of every form that a line times, by name."""
  forms, inputs, shared = build(size.kernel, size, size.dtype)
  _, like = jax.eval_shape(
    functools.partial(forms.scan, algorithm='recurrent'), *inputs
  )
  state = jax.random.normal(jax.random.key(1), like.shape, like.dtype)
  if size.algorithm == STEP:
    token = [x if i in shared else x[:, 0] for i, x in enumerate(inputs)]
    return {STEP: (forms.step, [state, *token])}
  options = {'algorithm': size.algorithm, 'chunk': size.chunk}
  if size.kernel != 'selective':
    options['precision'] = size.precision
  forward = functools.partial(forms.scan, **options)

  def total(inputs):
    y, state = forward(*inputs)
    return y.astype(jnp.float32).sum() + state.sum()

  def prefill(length_B, state, *inputs):
    y, pending = forms.prefill(*inputs, state=state, **options)
    return y, forms.commit(pending, length_B)

  found = {
    'forward': (forward, inputs),
    'forward_backward': (jax.value_and_grad(total), [inputs]),
  }
  if size.algorithm in chunks.PREFILLS or size.kernel == 'selective':
    length_B = jnp.full(size.batch, size.length)
    found['prefill'] = prefill, [length_B, state, *inputs]
  return found


def grid(flags: argparse.Namespace) -> list[argparse.Namespace]:
  """What every line is of: `flags` with one value of each of GRID."""
  rows = itertools.product(*(getattr(flags, name) for name in GRID))
  sizes = [dict(zip(GRID, row, strict=True)) for row in rows]
  for size in sizes:
    if size['algorithm'] == STEP:
      size |= {'chunk': None, 'length': 1}
    elif size['algorithm'] == FUSED and size['kernel'] != 'selective':
      size['chunk'] = stateless.CHUNK
  once = {tuple(size.values()): size for size in sizes}
  return [argparse.Namespace(**vars(flags) | size) for size in once.values()]


def measure(function, inputs: list, *, repeats: int, calls: int) -> dict:
  """Median time of a call, and the memory that the compiler plans."""
  started = time.perf_counter()
  compiled = jax.jit(function).lower(*inputs).compile()
  compile_s = time.perf_counter() - started
  times = device.clock(lambda: compiled(*inputs), repeats=repeats, calls=calls)
  memory = compiled.memory_analysis()
  return {
    'ms': round(statistics.median(times), 3),
    'ms_min': round(min(times), 3),
    'temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
    'peak_bytes': device.peak_bytes(memory),
    'compile_s': round(compile_s, 1),
  }


def roof(flags: argparse.Namespace, dtype: str) -> dict:
  """What the device can do at most, 0 where unknown; flags go first."""
  tflops, bandwidth = device.limits(jnp.dtype(dtype).itemsize)
  return {
    'peak_gb_per_s': flags.bandwidth or bandwidth,
    'peak_tflops': flags.peak or tflops,
  }


def rates(size, arguments, function, ms: float, most) -> dict:
  """Arithmetic and least traffic of a call, and what they come to a second."""
  outputs = jax.eval_shape(function, *arguments)
  backward = isinstance(arguments[0], list)
  moved = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, outputs))
  )
  # A state of K V entries is read and written by two products a token, three
  # in the delta rule; backward costs twice as much again.
  products = 3 if size.kernel.endswith('delta') else 2
  tokens = size.batch * size.length * size.heads
  work = 2.0 * products * tokens * size.key_width * size.value_width
  work *= 3 if backward else 1
  found = {'tflops': work / ms / 1e9, 'gb_per_s': moved / ms / 1e6}
  limits = {key: most[f'peak_{key}'] for key in found}
  shares = [found[key] / limit for key, limit in limits.items() if limit]
  if shares:
    found['share_of_roofline'] = max(shares)
  return {key: float(f'{x:.4g}') for key, x in found.items()}


def check_sizes(flags: argparse.Namespace) -> str:
  """What is wrong with the sizes of inputs, '' for nothing."""
  for name in SIZES:
    least = np.min(getattr(flags, name))
    if least < 1:
      return f'--{name} must be > 0, got {least}'
  odd = [heads for heads in flags.heads if heads % flags.groups]
  if 'ssd' in flags.kernel and odd:
    return (
      f'--groups must divide --heads with --kernel ssd, got {flags.groups} for '
      f'{odd[0]}: give one that does, or leave out ssd'
    )
  return ''


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--kernel', nargs='+', default=list(KERNELS), choices=KERNELS
  )
  parser.add_argument(
    '--algorithm',
    nargs='+',
    default=[*chunks.ALGORITHMS, STEP],
    choices=(*chunks.ALGORITHMS, FUSED, STEP),
  )
  parser.add_argument('--chunk', type=int, nargs='+', default=[64])
  parser.add_argument(
    '--dtype', nargs='+', default=['float32'], choices=device.DTYPES
  )
  parser.add_argument('--batch', type=int, nargs='+', default=[1])
  parser.add_argument('--length', type=int, nargs='+', default=[1024])
  parser.add_argument('--heads', type=int, nargs='+', default=[4])
  parser.add_argument(
    '--groups', type=int, default=1, help='of input and output maps of ssd'
  )
  parser.add_argument(
    '--key_width', type=int, default=128, help='entries a channel of selective'
  )
  parser.add_argument('--value_width', type=int, default=128)
  parser.add_argument(
    '--gate', type=float, default=0.05, help='mean of minus the log decay'
  )
  parser.add_argument('--precision', default='highest')
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument(
    '--calls', type=int, help='in flight; 1 on a CPU and 10 elsewhere'
  )
  parser.add_argument(
    '--bandwidth', type=float, help="the device's, GB/s, if not known"
  )
  parser.add_argument(
    '--peak', type=float, help="the device's arithmetic, TFLOP/s, if not known"
  )
  flags = parser.parse_args()
  alone = jax.default_backend() == 'cpu'
  if flags.calls is None:
    flags.calls = 1 if alone else IN_FLIGHT
  if flags.calls < 1:
    parser.error(f'--calls must be > 0, got {flags.calls}')
  if wrong := check_sizes(flags):
    parser.error(wrong)
  for size in grid(flags):
    line = {name: getattr(size, name) for name in GRID}
    line |= {
      'key_width': size.key_width,
      'value_width': size.value_width,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
      'calls': size.calls,
    }
    most = roof(size, size.dtype)
    line |= {key: x for key, x in most.items() if x}
    try:
      forms = cases(size)
    except FAILURES as error:
      print(json.dumps(line | {'failed': str(error)[:300]}), flush=True)
      continue
    for name, (function, arguments) in forms.items():
      try:
        found = measure(
          function, arguments, repeats=size.repeats, calls=size.calls
        )
      except FAILURES as error:
        line[f'{name}_failed'] = str(error)[:300]
        continue
      found |= rates(size, arguments, function, found['ms'], most)
      line |= {f'{name}_{key}': value for key, value in found.items()}
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
