"""Time, arithmetic and memory of a training step of the CTM.

  python -m recursive_weights.benchmarks.ctm --ticks 10 --batch 64

prints one JSON line a case: forward, backward and AdamW of the certainty loss,
with random inputs and the state donated. Times are of whole steps, each
waited for.
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
from recursive_weights.derivation import compose, tree
from recursive_weights.derivation.operators import (
  contraction,
  spectral_residual,
)
from recursive_weights.models import ctm, derived
from recursive_weights.recursion import objective as objectives

CASES = {
  'parity64': {
    'length': 64,
    'width': 1024,
    'input_width': 512,
    'heads': 8,
    'memory': 25,
    'hidden': 16,
    'sync': 32,
  },
  'parity12': {
    'length': 12,
    'width': 128,
    'input_width': 64,
    'heads': 4,
    'memory': 15,
    'hidden': 4,
    'sync': 32,
  },
}


def build(
  case: str, ticks: int, dtype: str, *, remat: bool = False, unrolled: int = 1
):
  """The spec and the model of a case."""
  size = CASES[case]
  spec = interfaces.Spec(
    inputs=jax.ShapeDtypeStruct((size['length'],), jnp.int32),
    answer=(size['length'],),
    classes=2,
    sizes={},
  )
  model = ctm.make(
    spec,
    width=size['width'],
    input_width=size['input_width'],
    heads=size['heads'],
    memory=size['memory'],
    ticks=ticks,
    nlm={'hidden': size['hidden'], 'activation': 'glu'},
    pairing='random',
    sync_out=size['sync'],
    sync_action=size['sync'],
    position='rotation',
    remat=remat,
    unrolled=unrolled,
    dtype=dtype,
  )
  return spec, model


def derive(spec: interfaces.Spec, model: interfaces.Model):
  """The model with W2 = T(contract(W1)) in its neurons."""
  inputs = jax.ShapeDtypeStruct((1, *spec.inputs.shape), spec.inputs.dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  operator = compose.chain(
    contraction.make(kind='softmax', shape=shapes['nlm']['w2'].shape),
    spectral_residual.make(),
  )
  rule = tree.Rule('T', 'nlm/w1', 'nlm/w2', operator)
  return derived.wrap(model, (rule,))


def published_flops(case: str, ticks: int, batch: int) -> float:
  """FLOPs of a training step by the published equations.

  Two per multiply-add and three passes (forward, gradients of inputs and of
  weights); features, keys and values once per example, not once per tick.
  """
  size = CASES[case]
  tokens, d, i = size['length'], size['width'], size['input_width']
  pairs = size['sync'] * (size['sync'] + 1) // 2
  once = 3 * tokens * i * i
  query = pairs * i + i * i
  attention = 2 * tokens * i + i * i
  synapse = (i + d) * 2 * d
  neurons = d * 2 * size['hidden'] * (size['memory'] + 1)
  readout = pairs * tokens * 2
  tick = query + attention + synapse + neurons + readout
  return 2.0 * 3 * batch * (once + ticks * tick)


def random_batch(spec: interfaces.Spec, batch: int) -> dict:
  stream = np.random.default_rng(0)
  inputs = stream.integers(0, 2, (batch, *spec.inputs.shape)).astype(np.int32)
  return {
    'inputs': inputs,
    'targets': np.cumsum(inputs, axis=1, dtype=np.int32) % 2,
    'weight': np.ones(batch, np.float32),
  }


def loss_of(logits_BTV, batch):
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV.astype(jnp.float32), batch['targets']
  )
  return loss_BT.mean(axis=1), {}


def make_step(model: interfaces.Model, optimizer):
  """`(state, batch) -> (state, loss)` with `state = (params, moments)`."""
  objective = objectives.make('certainty')

  def loss(params, batch):
    outputs, _ = model.apply(params, {}, batch['inputs'], key=None, train=True)
    return objective.score(outputs, loss_of, batch)[0]

  def step(state, batch):
    params, moments = state
    value, gradient = jax.value_and_grad(loss)(params, batch)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  return step


def measure(
  model: interfaces.Model, spec: interfaces.Spec, *, batch: int, repeats: int
) -> dict:
  """Median time of a training step, and what the compiler says of it."""
  optimizer = optax.adamw(1e-4)
  data = random_batch(spec, batch)

  def fresh(key):
    params = model.init(key, jnp.asarray(data['inputs']))
    return params, optimizer.init(params)

  state = jax.jit(fresh)(jax.random.key(0))
  data = jax.device_put(data)
  started = time.perf_counter()
  step = jax.jit(make_step(model, optimizer), donate_argnums=0)
  compiled = step.lower(state, data).compile()
  compile_s = time.perf_counter() - started
  times, value = [], jnp.zeros([])
  for _ in range(3 + repeats):
    started = time.perf_counter()
    state, value = jax.block_until_ready(compiled(state, data))
    times.append(1e3 * (time.perf_counter() - started))
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return {
    'ms': round(statistics.median(times[3:]), 3),
    'ms_min': round(min(times[3:]), 3),
    'loss': round(float(value), 5),
    'parameters': sum(x.size for x in jax.tree.leaves(state[0])),
    # The compiler counts the body of a loop once.
    'flops_compiler': cost.get('flops'),
    'temporary_bytes': getattr(memory, 'temp_size_in_bytes', None),
    'argument_bytes': getattr(memory, 'argument_size_in_bytes', None),
    'peak_bytes': device.peak_bytes(memory),
    'compile_s': round(compile_s, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--case', nargs='+', default=['parity64'], choices=CASES)
  parser.add_argument('--ticks', type=int, nargs='+', default=[10])
  parser.add_argument('--batch', type=int, nargs='+', default=[64])
  parser.add_argument(
    '--dtype', nargs='+', default=['float32'], choices=device.DTYPES
  )
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument(
    '--unrolled',
    type=int,
    default=1 if jax.default_backend() == 'cpu' else 5,
    help='ticks in one body of the compiled loop',
  )
  parser.add_argument(
    '--nlm',
    nargs='+',
    default=['independent'],
    choices=('independent', 'derived'),
    help='second weights of the neurons: their own, or T(contract(W1))',
  )
  parser.add_argument('--remat', action='store_true')
  parser.add_argument(
    '--peak_tflops', type=float, help="of the device; none: its data sheet's"
  )
  flags = parser.parse_args()
  if flags.peak_tflops is None:
    flags.peak_tflops, _ = device.limits()
  grid = itertools.product(
    flags.case, flags.ticks, flags.batch, flags.dtype, flags.nlm
  )
  for case, ticks, batch, dtype, nlm in grid:
    spec, model = build(
      case, ticks, dtype, remat=flags.remat, unrolled=flags.unrolled
    )
    if nlm == 'derived':
      model = derive(spec, model)
    flops = published_flops(case, ticks, batch)
    line = {
      'case': case,
      'ticks': ticks,
      'batch': batch,
      'dtype': dtype,
      'nlm': nlm,
      'unrolled': flags.unrolled,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
      **measure(model, spec, batch=batch, repeats=flags.repeats),
      'flops_formula': flops,
    }
    rate = flops / line['ms'] / 1e9
    line['tflops'] = round(rate, 4)
    if flags.peak_tflops:
      line['share_of_peak'] = round(rate / flags.peak_tflops, 4)
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
