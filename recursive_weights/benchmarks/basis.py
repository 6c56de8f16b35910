"""Time of fitting a shared basis, against loops over clusters in NumPy.

  python -m recursive_weights.benchmarks.basis

prints one JSON line a case: seconds of an iteration (median; wall and processor
time) and of all of them, the loss that they reach, seconds before the first one
(`setup_s`: the start, sums over questions, compiling), and on how many threads.
`loops` is the algorithm as it was proposed, cluster by cluster, with the
gradient of its loss corrected; `alternating` is `basis.fit`, `rows` is
`basis.dual`, whose iterations leave the basis unformed. Data are planted. All
stop at a loss of --target, `alternating` also where its tangent gradient is
below --tolerance.

With a --target, `total_s` is the whole fit, from the data to coefficients and
basis, compiling and the test of the loss left out: the median of --repeats, of
as many iterations as it took. The loops take the --rate, of those given, that
comes there soonest; `rows` the fewest steps of `dual.run`, none included, from
its own start (`ridge`) or from the leading columns of a random matrix, as the
loops begin with random bases.

Lines of `alternating` say how many bytes the data, the state and the
temporaries of a step take by the compiler's count. `peak_bytes` is the most
that the process had resident, `before_bytes` what it was when the data had been
made: one algorithm a process.
"""

import argparse
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import dual, initial
from recursive_weights.basis import fit as fit_lib
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import UserError

ALGORITHMS = ('loops', 'alternating', 'rows')
# What NumPy's and XLA's libraries read.
THREADS = (
  'OMP_NUM_THREADS',
  'OPENBLAS_NUM_THREADS',
  'MKL_NUM_THREADS',
  'NPROC',
  'XLA_FLAGS',
)


class Run(NamedTuple):
  """What an algorithm did.

  setup_s: before the first iteration. times: wall and processor seconds of
  each. again: the whole fit once more, compiled; None where it is not timed.
  """

  setup_s: float
  times: list[tuple[float, float]]
  losses: list[float]
  again: Callable[[], Any] | None
  more: dict[str, Any]


def problem(size: argparse.Namespace) -> clusters_lib.Clusters:
  """Clusters whose weights share random orthogonal matrices, float32.

  Questions and answers have norm about 1, as embeddings have.
  """
  draw = np.random.default_rng(0)
  shape = size.members, size.questions, size.width
  q_ETD = draw.normal(size=shape).astype(np.float32) * size.width**-0.5
  c_ER = draw.normal(size=(size.members, size.rank)) * size.rank**-0.5
  a_ETD = 0.05 * draw.normal(size=shape) * size.width**-0.5
  for k in range(size.rank):
    o_DD = np.linalg.qr(draw.normal(size=(size.width, size.width)))[0]
    a_ETD += c_ER[:, k, None, None] * (q_ETD @ o_DD)
  return clusters_lib.Clusters(
    jnp.asarray(q_ETD),
    jnp.asarray(a_ETD, jnp.float32),
    jnp.ones(shape[:2]),
  )


def gradient(w_DV, q_TD, a_TV, cosine):
  """Of `mean_t (1 - λ) |p - a|² + λ (1 - cos(p, a))`, p = q W."""
  p_TV = q_TD @ w_DV
  slope_TV = 2 * (1 - cosine) * (p_TV - a_TV)
  if cosine:
    p_T1 = np.linalg.norm(p_TV, axis=1, keepdims=True) + 1e-8
    a_T1 = np.linalg.norm(a_TV, axis=1, keepdims=True) + 1e-8
    p_unit, a_unit = p_TV / p_T1, a_TV / a_T1
    angle = (p_unit * a_unit).sum(1, keepdims=True)
    slope_TV = slope_TV - cosine * (a_unit - angle * p_unit) / p_T1
  return q_TD.T @ slope_TV / len(q_TD)


def loops_iteration(pairs, basis, rate, cosine):
  """Coefficients by least squares, then a gradient step of the basis."""
  coefficients = []
  total = [np.zeros_like(g) for g in basis]
  for q, a in pairs:
    p = np.column_stack([(q @ g).ravel() for g in basis])
    c = np.linalg.lstsq(p, a.ravel(), rcond=None)[0]
    coefficients.append(c)
    w = sum(c[k] * basis[k] for k in range(len(basis)))
    slope = gradient(w, q, a, cosine)
    for k in range(len(basis)):
      total[k] += c[k] * slope
  basis = [g - rate * t for g, t in zip(basis, total, strict=True)]
  return coefficients, basis


def gram_schmidt(basis):
  """Orthonormal matrices, those that depend on others left out."""
  found: list = []
  for g in basis:
    for other in found:
      g = g - np.sum(g * other) * other
    norm = np.linalg.norm(g)
    if norm > 1e-8:
      found.append(g / norm)
  return found


def predicted(pairs, coefficients, basis) -> np.ndarray:
  """What the loops predict, `[E, T, V]`."""
  found = []
  for c, (q, _) in zip(coefficients, pairs, strict=True):
    found.append(q @ sum(c[k] * basis[k] for k in range(len(basis))))
  return np.stack(found)


def loops(clusters, size) -> Run:
  """The run of the best rate: soonest at the target (of equals the last)."""
  runs: list[Run] = []
  most = size.iterations
  for rate in size.rate:
    runs.append(loops_at(clusters, size, rate, most))
    if reached(runs[-1], size):
      most = len(runs[-1].losses)

  def order(run):
    if reached(run, size):
      return 0, len(run.losses)
    return 1, *np.nan_to_num(run.losses[-1:], nan=np.inf)

  return min(reversed(runs), key=order)


def reached(run, size) -> bool:
  return bool(run.losses) and run.losses[-1] <= size.target


def loops_at(clusters, size, rate, iterations) -> Run:
  q_ETD, a_ETV = (np.asarray(x) for x in clusters[:2])
  first_RDV = np.asarray(start(size))

  def begin():
    pairs = list(zip(q_ETD, a_ETV, strict=True))
    return pairs, gram_schmidt(list(first_RDV))

  def iterate(pairs, basis, index):
    found, basis = loops_iteration(pairs, basis, rate, size.cosine)
    return found, gram_schmidt(basis) if index % 10 == 9 else basis

  begun = clock()
  pairs, basis = begin()
  setup = since(begun)[0]
  times, losses = [], []
  for index in range(iterations):
    before, begun = basis, clock()
    found, basis = iterate(pairs, basis, index)
    times.append(since(begun))
    losses.append(loss(size, clusters, predicted(pairs, found, before)))
    if losses[-1] <= size.target:
      break

  def again():
    pairs, basis = begin()
    for index in range(len(times)):
      before = basis
      found, basis = iterate(pairs, basis, index)
    return found, before

  return Run(setup, times, losses, again, {'rate': rate, 'rates': size.rate})


def alternating(clusters, size) -> Run:
  first_RDV = jax.block_until_ready(start(size))
  begun = clock()
  fit = fit_lib.make(
    objective_lib.make(ridge=size.ridge, cosine=size.cosine),
    sweeps=1,
    solver=size.solver,
    direct_limit=size.direct_limit,
    iterations=size.inner,
  )
  begin = jax.jit(fit.init).lower(clusters, first_RDV).compile()
  state = begin(clusters, first_RDV)
  step = jax.jit(fit.step).lower(clusters, state).compile()
  if size.repeats:  # the first call is slower
    jax.block_until_ready(step(clusters, state))
  setup = since(begun)[0]
  times, losses = [], []
  for _ in range(size.iterations):
    begun = clock()
    state, _ = jax.block_until_ready(step(clusters, state))
    times.append(since(begun))
    p_ETV = objective_lib.predict(
      clusters.q_ETD, state.coefficients_ER, state.basis_RDV
    )
    losses.append(loss(size, clusters, p_ETV))
    if state.tangent <= size.tolerance or losses[-1] <= size.target:
      break

  def again():
    state = begin(clusters, first_RDV)
    for _ in times:
      state, _ = step(clusters, state)
    return jax.block_until_ready(state)

  memory = step.memory_analysis()
  more = {
    'solver': size.solver,
    'inner': size.inner,
    'objective': float(state.objective),
    'tangent': float(state.tangent),
    'data_bytes': sum(x.nbytes for x in clusters),
    'state_bytes': sum(x.nbytes for x in jax.tree.leaves(state)),
    'temporary_bytes': memory.temp_size_in_bytes if memory else None,
  }
  return Run(setup, times, losses, again, more)


def rows(clusters, size) -> Run:
  """To a target by `dual.run`, whole; else step by step."""
  objective = objective_lib.make(ridge=size.ridge, cosine=size.cosine)
  span_ER = None
  if size.start == 'random':
    span_ER = jax.random.normal(jax.random.key(1), (size.members, size.rank))
  if not size.target:
    return rows_steps(clusters, size, objective, span_ER)
  begun = clock()
  losses: list[float] = []
  for steps in range(size.iterations + 1):
    program = jax.jit(
      lambda clusters, steps=steps: dual.run(
        objective, clusters, size.rank, steps=steps, span_ER=span_ER
      )[:2]
    )
    again = functools.partial(program.lower(clusters).compile(), clusters)
    p_ETV = objective_lib.predict(clusters.q_ETD, *again())
    losses.append(loss(size, clusters, p_ETV))
    if losses[-1] <= size.target:
      break
  more = {'start': size.start, 'steps': steps}
  return Run(
    since(begun)[0],
    [],
    losses,
    lambda: jax.block_until_ready(again()),
    more,
  )


def rows_steps(clusters, size, objective, span_ER) -> Run:
  begun = clock()
  table = dual.rows(objective, clusters)
  if span_ER is None:
    span_ER = dual.initial(table, size.members, size.rank, max(size.ridge, 1.0))
  plain = dual.rows(objective._replace(cosine=0.0), clusters)
  # By the squared error alone first, see `dual.run`.
  warm = size.warm if size.cosine else 0
  phases = [(0, plain), (warm, table)] if warm else [(0, table)]
  programs = {}
  for first, of in phases:
    begin = jax.jit(dual.begin).lower(of, span_ER).compile()
    state = begin(of, span_ER)
    step = jax.jit(dual.step).lower(of, state).compile()
    jax.block_until_ready(step(of, state))  # the first call is slower
    programs[first] = of, begin, step
  setup = since(begun)[0]
  times, losses = [], []
  for index in range(size.iterations):
    begun = clock()
    if index in programs:
      of, begin, step = programs[index]
      state = begin(of, state.span_ER if index else span_ER)
    state = jax.block_until_ready(step(of, state))
    times.append(since(begun))
    p_ETV = state.found.y_NV.reshape(clusters.a_ETV.shape)  # weights are 1
    losses.append(loss(size, clusters, p_ETV))
  total = objective_lib.total_weight(clusters)
  more = {
    'start': size.start,
    'objective': float(state.found.objective / total),
  }
  return Run(setup, times, losses, None, more)


def start(size):
  """A random basis: the same for both that start from one."""
  return initial.random(jax.random.key(0), size.rank, size.width, size.width)


def loss(size, clusters, p_ETV) -> float:
  """`(1 - λ) |p - a|² + λ (1 - cos(p, a))`, mean over questions."""
  which = objective_lib.make(cosine=size.cosine, ridge=0.0)
  row_ET = objective_lib.rows(which, jnp.asarray(p_ETV), clusters.a_ETV)
  return float(jnp.mean(row_ET))


def clock():
  return time.perf_counter(), time.process_time()


def since(begun):
  return tuple(b - a for a, b in zip(begun, clock(), strict=True))


def peak() -> int:
  """The most bytes that this process had resident."""
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most if sys.platform == 'darwin' else 1024 * most


def threads() -> dict:
  """Processors that this process may use, and what the environment says."""
  known = getattr(os, 'sched_getaffinity', None)
  found: dict = {'processors': len(known(0)) if known else os.cpu_count()}
  return found | {
    name: os.environ[name] for name in THREADS if name in os.environ
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--algorithm', nargs='+', default=list(ALGORITHMS), choices=ALGORITHMS
  )
  parser.add_argument('--members', type=int, default=100)
  parser.add_argument('--questions', type=int, default=3, help='a cluster')
  parser.add_argument('--width', type=int, default=384)
  parser.add_argument('--rank', type=int, default=8)
  parser.add_argument('--ridge', type=float, default=1e-2)
  parser.add_argument('--cosine', type=float, default=0.0)
  parser.add_argument(
    '--rate', type=float, nargs='+', default=[0.01], help='of the loops'
  )
  parser.add_argument('--solver', default='auto', help='of alternating')
  parser.add_argument('--inner', type=int, default=100, help='iterations of cg')
  parser.add_argument('--start', default='ridge', choices=('ridge', 'random'))
  parser.add_argument('--iterations', type=int, default=20)
  parser.add_argument('--warm', type=int, default=20, help='of rows')
  parser.add_argument('--direct_limit', type=int, default=4096)
  parser.add_argument('--tolerance', type=float, default=0.0)
  parser.add_argument('--target', type=float, default=0.0, help='of the loss')
  parser.add_argument(
    '--repeats', type=int, default=5, help='0: calls nothing twice'
  )
  size = parser.parse_args()
  for name in ('members', 'questions', 'width', 'rank'):
    if getattr(size, name) < 1:
      parser.error(f'--{name} must be > 0, got {getattr(size, name)}')
  clusters = jax.block_until_ready(problem(size))
  before = peak()
  for name in size.algorithm:
    try:
      clusters_lib.check(clusters, size.rank)
      run = globals()[name](clusters, size)
    except UserError as error:
      parser.error(str(error))
    line = {
      'algorithm': name,
      'solver': None,
      'members': size.members,
      'questions': size.questions,
      'width': size.width,
      'rank': size.rank,
      'cosine': size.cosine,
      'ridge': None if name == 'loops' else size.ridge,
      'target': size.target,
      'loss': run.losses[-1] if run.losses else None,
      'setup_s': round(run.setup_s, 5),
    }
    if run.times:
      wall, processor = np.median(np.array(run.times), 0)
      line |= {
        'iterations': len(run.times),
        'iteration_s': round(float(wall), 5),
        'iteration_cpu_s': round(float(processor), 5),
        'iterations_s': round(sum(wall for wall, _ in run.times), 4),
      }
    if size.target and size.repeats and run.again:
      times = []
      for _ in range(size.repeats):
        begun = clock()
        run.again()
        times.append(since(begun))
      wall, processor = np.median(np.array(times), 0)
      line |= {'total_s': round(float(wall), 5)}
      line |= {'total_cpu_s': round(float(processor), 5)}
    line |= run.more | {
      'before_bytes': before,
      'peak_bytes': peak(),
      'device': jax.devices()[0].device_kind,
      'threads': threads(),
    }
    print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
