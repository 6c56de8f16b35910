"""How well is a planted basis found again, by rank, noise and questions?

  python -m recursive_weights.benchmarks.recovery [--picture FILE.png]

40 members' weights `W_i = sum_k c_ik O_k` share K 4 random orthogonal 32 x 32
matrices (`tasks/_planted.py`). Fitted are their answers to n questions each,
with noise of standard deviation s. Prints a JSON line a case, over --draws
problems: relative squared error on questions held out, and of the coefficients
once they stand on the planted basis (`subspace.coordinates`), smallest
principal cosine between the planted span and the one found, tangent gradient,
steps taken, each median, least and largest; share of fits that ended
stationary, which draws did not before their 300 steps ran out (`unfinished`),
and in which of these no length of step lowered the objective any more, which is
rounding (`stalled`). Baselines: every member's own ridge regression, with the
ridge that is best on the questions held out; the same fit with the planted
coefficients given (`known`), which no fit that has to find them should beat.

Six sweeps: `threshold` (n from 1 to 8, by ridge; at n = 4 there are
1.25 K d questions, where a basis begins to be told), `rank` (what is fitted, at
n = 8, by noise), `noise` (at n = 8, by ridge), `start` (initial bases, at n = 4
and 8, with 300 steps and with 3000; and how large the members' gradients are
where the proposal takes them, by those at 0), `interval` (steps between
orthonormalisations and between refreshes, 0 is never, at n = 8 by start, K as
planted and 2), `sparse` (planted coefficients of which three in eight are 0,
beside Gaussian ones, at n = 4 and 8). The first three take four minutes of a
core.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.basis import (
  baselines,
  fit,
  initial,
  objective,
  solve,
  subspace,
)
from recursive_weights.basis.clusters import Clusters
from recursive_weights.tasks import _planted

PICTURED = ('threshold', 'rank', 'noise')
SWEEPS = (*PICTURED, 'start', 'interval', 'sparse')
PLANTED = 4
RIDGES = (1e-6, 1e-3, 1e-1, 1.0)
RANKS = (1, 2, 3, 4, 5, 6, 8, 12)
# With the ridge that is best at the planted rank.
RANK_NOISES = ((0.05, 1e-3), (0.5, 0.1))
NOISES = (0.01, 0.05, 0.2, 0.5, 1.0)
MOST = 8  # questions a member
# `proposed` is at the pseudo-inverse, the others at 0.
STARTS = ('stronger', 'ridge', 'all', 'first', 'proposed', 'random')
# Orthonormalised, refreshed every so many steps; the proposal's are 10, 0.
INTERVALS = ((0, 0), (1, 0), (10, 0), (1, 1), (1, 5), (1, 20))
TOLERANCE = 3e-5


def begin(name: str, clusters, rank: int, key) -> jax.Array:
  """The initial basis of one of `STARTS`."""
  if name == 'random':
    width, values = clusters.q_ETD.shape[-1], clusters.a_ETV.shape[-1]
    return initial.random(key, rank, width, values)
  if name in ('ridge', 'stronger'):
    basis_RDV = initial.from_ridge(clusters, rank, key)
    if name == 'ridge':
      return basis_RDV
    return initial.from_stronger_ridge(clusters, basis_RDV)
  gradients = functools.partial(
    initial.from_gradients, objective.make(), clusters, rank, key
  )
  if name == 'all':
    return gradients()
  return gradients(ridge=None if name == 'first' else 0.0, choice='first')


@functools.partial(
  jax.jit,
  static_argnames=(
    'rank',
    'limit',
    'start',
    'orthonormalise_every',
    'refresh_every',
  ),
)
def recover(
  clusters,
  ridge,
  key,
  *,
  rank: int,
  limit: int = 300,
  start: str = 'stronger',
  orthonormalise_every: int = 1,
  refresh_every: int = 0,
) -> tuple[fit.State, jax.Array]:
  """The last states of many problems, and the lengths of their last steps.

  Begins at the minimum with a strong ridge, in whose valley the planted basis
  lies (`initial.from_stronger_ridge`), where `start` names no other.
  """

  def one(problem):
    clusters, key = problem
    basis_RDV = begin(start, clusters, rank, key)
    alternating = fit.make(
      objective.Objective(ridge=ridge),
      solver='direct',
      orthonormalise_every=orthonormalise_every,
      refresh_every=refresh_every,
    )
    state, metrics = fit.run(
      alternating,
      clusters,
      alternating.init(clusters, basis_RDV),
      steps=limit,
      tolerance=TOLERANCE,
    )
    return state, metrics['length'][-1]

  draws = clusters.weight_ET.shape[0]
  # In turn, so that each ends with its own last step.
  return jax.lax.map(one, (clusters, jax.random.split(key, draws)))


def known(clusters, coefficients_ER, ridge) -> jax.Array:
  """The members' weights where their planted coefficients are given."""
  which = objective.make(ridge=ridge)
  width, values = clusters.q_ETD.shape[-1], clusters.a_ETV.shape[-1]
  zero_RDV = jnp.zeros((coefficients_ER.shape[1], width, values))
  basis_RDV = solve.basis_direct(which, clusters, coefficients_ER, zero_RDV)
  return objective.weights(coefficients_ER, basis_RDV)


def drawn(
  draws: int, noise: float, planted: _planted.Coefficients = 'gaussian'
) -> list[_planted.Planted]:
  """The problems of a line, each with `MOST` questions a member."""
  return [
    _planted.planted(
      seed, questions=MOST, noise=noise, rank=PLANTED, coefficients=planted
    )
    for seed in range(draws)
  ]


def stacked(problems: list[_planted.Planted], questions: int) -> Clusters:
  """Clusters of all draws; rows after the first `questions` count nothing."""
  q, a = (
    jnp.asarray(np.stack([getattr(p, name) for p in problems]), jnp.float32)
    for name in ('q_ETD', 'a_ETD')
  )
  weight = jnp.broadcast_to(jnp.arange(q.shape[2]) < questions, q.shape[:3])
  return Clusters(q, a, weight.astype(jnp.float32))


def spread(values) -> dict[str, float]:
  return {
    name: float(f'{f(values):.4g}')
    for name, f in (('median', np.median), ('low', np.min), ('high', np.max))
  }


def case(
  draws: int,
  *,
  questions: int,
  rank: int,
  noise: float,
  ridge: float,
  planted: _planted.Coefficients = 'gaussian',
  **fields,
):
  """One line: see the module; `fields` are those of `recover`."""
  problems = drawn(draws, noise, planted)
  clusters = stacked(problems, questions)
  found, length_B = recover(
    clusters, ridge, jax.random.key(0), rank=rank, **fields
  )
  c_BER, basis_BRDV = found.coefficients_ER, found.basis_RDV
  w_BEDV = jax.vmap(objective.weights)(c_BER, basis_BRDV)
  truth = jnp.asarray(np.stack([p.basis_RDV for p in problems]), jnp.float32)
  angle_B = jax.vmap(subspace.cosines)(basis_BRDV, truth)[:, -1]
  on_BER = jax.vmap(subspace.coordinates)(c_BER, basis_BRDV, truth)
  planted_BER = np.stack([p.coefficients_ER for p in problems])
  off_B = np.sum((np.asarray(on_BER) - planted_BER) ** 2, (1, 2))
  open_B = np.asarray(found.tangent) > TOLERANCE
  stalled_B = open_B & (np.asarray(length_B) == 0)
  return fields | {
    'questions': questions,
    'rank': rank,
    'noise': noise,
    'ridge': ridge,
    'draws': draws,
    'error': spread(errors(problems, w_BEDV)),
    'coefficients': spread(off_B / np.sum(planted_BER**2, (1, 2))),
    'cosine': spread(np.asarray(angle_B)),
    'tangent': spread(np.asarray(found.tangent)),
    'steps': spread(np.asarray(found.step)),
    'stationary': float(np.mean(~open_B)),
    'unfinished': np.flatnonzero(open_B).tolist(),
    'stalled': np.flatnonzero(stalled_B).tolist(),
  }


def errors(problems, w_BEDV) -> list[float]:
  return [
    _planted.relative_error(problem, w_EDV)
    for problem, w_EDV in zip(problems, w_BEDV, strict=True)
  ]


def beside(
  draws: int,
  *,
  questions: int,
  noise: float,
  planted: _planted.Coefficients = 'gaussian',
):
  """One line of the baselines."""
  problems = drawn(draws, noise, planted)
  clusters = stacked(problems, questions)
  c_BER = jnp.asarray(
    np.stack([p.coefficients_ER for p in problems]), jnp.float32
  )

  def independent(ridge):
    own = functools.partial(baselines.independent, ridge=ridge)
    return errors(problems, jax.vmap(own)(clusters))

  def given(ridge):
    return errors(
      problems,
      jax.vmap(functools.partial(known, ridge=ridge))(clusters, c_BER),
    )

  return {
    'questions': questions,
    'noise': noise,
    'draws': draws,
    'independent': spread(
      min(map(independent, (1e-3, 0.1, 1.0, 10.0)), key=np.median)
    ),
    'known': spread(min(map(given, (1e-4, 1e-3, 1e-2, 0.1)), key=np.median)),
  }


def gradient(draws: int, *, questions: int, noise: float):
  """One line: members' gradients at the pseudo-inverse, by those at 0."""
  problems = drawn(draws, noise)
  norm = functools.partial(
    initial.gradient_norm, objective.make(ridge=0.0), ridge=0.0
  )
  norm_BE = jax.vmap(norm)(stacked(problems, questions))
  return {
    'questions': questions,
    'noise': noise,
    'draws': draws,
    'gradient': spread(np.asarray(norm_BE)),
  }


def sweep(name: str, draws: int) -> Iterator[dict]:
  """Lines of one sweep."""
  at: dict[str, Any] = {
    'questions': MOST,
    'rank': PLANTED,
    'noise': 0.05,
    'ridge': 1e-3,
  }
  if name == 'threshold':
    for questions in range(1, MOST + 1):
      yield beside(draws, questions=questions, noise=0.05)
      for ridge in RIDGES:
        yield case(draws, **at | {'questions': questions, 'ridge': ridge})
  elif name == 'rank':
    for noise, ridge in RANK_NOISES:
      for rank in RANKS:
        yield case(draws, **at | {'rank': rank, 'noise': noise, 'ridge': ridge})
  elif name == 'start':
    for questions in (4, MOST):
      yield gradient(draws, questions=questions, noise=0.05)
      for start in STARTS:
        for limit in (300, 3000):
          fields = {'start': start, 'limit': limit}
          yield case(draws, **at | fields | {'questions': questions})
  elif name == 'interval':
    for rank in (PLANTED, 2):
      for start in ('ridge', 'random'):
        for every, refresh in INTERVALS:
          fields = {
            'rank': rank,
            'start': start,
            'orthonormalise_every': every,
            'refresh_every': refresh,
          }
          yield case(draws, **at | fields)
  elif name == 'sparse':
    for questions in (4, MOST):
      for kind in get_args(_planted.Coefficients):
        by = {'planted': kind}
        found = beside(draws, questions=questions, noise=0.05, planted=kind)
        yield by | found
        yield by | case(draws, **at | by | {'questions': questions})
  else:
    for noise in NOISES:
      yield beside(draws, questions=MOST, noise=noise)
      for ridge in RIDGES[1:]:
        yield case(draws, **at | {'noise': noise, 'ridge': ridge})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sweep', nargs='+', default=SWEEPS, choices=SWEEPS)
  parser.add_argument('--draws', type=int, default=10)
  parser.add_argument('--picture', default='', help='a PNG of the sweeps')
  flags = parser.parse_args()
  if flags.picture and not set(flags.sweep) & set(PICTURED):
    parser.error(f'--picture shows {", ".join(PICTURED)}, got no such --sweep')
  lines = []
  for name in flags.sweep:
    for line in sweep(name, flags.draws):
      lines.append({'sweep': name} | line)
      print(json.dumps(lines[-1]), flush=True)
  if flags.picture:
    from recursive_weights.plots import recovery

    recovery.recovery(flags.picture, lines)


if __name__ == '__main__':
  main()
