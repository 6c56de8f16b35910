"""How well is a planted basis found again, by rank, noise and questions?

  python -m recursive_weights.benchmarks.recovery [--picture FILE.png]

40 members' weights `W_i = sum_k c_ik O_k` share K 4 random orthogonal 32 x 32
matrices (`tasks/_planted.py`). Fitted are their answers to n questions each,
with noise of standard deviation s. Prints a JSON line a case, over --draws
problems: relative squared error on questions held out, smallest principal
cosine between the planted span and the one found, share of fits that ended
stationary, each median, least and largest. Baselines: every member's own ridge
regression, with the ridge that is best on the questions held out; the same fit
with the planted coefficients given (`known`), which no fit that has to find
them should beat.

Three sweeps: `threshold` (n from 1 to 8, by ridge; at n = 4 there are
1.25 K d questions, where a basis begins to be told), `rank` (what is fitted, at
n = 8, by noise), `noise` (at n = 8, by ridge). All take half an hour of a core.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from typing import Any

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

SWEEPS = ('threshold', 'rank', 'noise')
PLANTED = 4
RIDGES = (1e-6, 1e-3, 1e-1, 1.0)
RANKS = (1, 2, 3, 4, 5, 6, 8, 12)
# With the ridge that is best at the planted rank.
RANK_NOISES = ((0.05, 1e-3), (0.5, 0.1))
NOISES = (0.01, 0.05, 0.2, 0.5, 1.0)
MOST = 8  # questions a member


@functools.partial(jax.jit, static_argnames=('rank', 'steps'))
def recover(clusters, ridge, key, *, rank: int, steps: int = 300):
  """Coefficients, basis and tangent gradient of many problems at once.

  Begins at the minimum with a strong ridge, in whose valley the planted basis
  lies (`initial.from_stronger_ridge`).
  """

  def one(clusters, key):
    basis_RDV = initial.from_ridge(clusters, rank, key)
    basis_RDV = initial.from_stronger_ridge(clusters, basis_RDV)
    alternating = fit.make(objective.Objective(ridge=ridge), solver='direct')
    state, _ = fit.run(
      alternating,
      clusters,
      alternating.init(clusters, basis_RDV),
      steps=steps,
      tolerance=3e-5,
    )
    return state.coefficients_ER, state.basis_RDV, state.tangent

  draws = clusters.weight_ET.shape[0]
  return jax.vmap(one)(clusters, jax.random.split(key, draws))


def known(clusters, coefficients_ER, ridge) -> jax.Array:
  """The members' weights where their planted coefficients are given."""
  which = objective.make(ridge=ridge)
  width, values = clusters.q_ETD.shape[-1], clusters.a_ETV.shape[-1]
  zero_RDV = jnp.zeros((coefficients_ER.shape[1], width, values))
  basis_RDV = solve.basis_direct(which, clusters, coefficients_ER, zero_RDV)
  return objective.weights(coefficients_ER, basis_RDV)


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


def case(draws: int, *, questions: int, rank: int, noise: float, ridge: float):
  """One line: see the module."""
  problems = [
    _planted.planted(seed, questions=MOST, noise=noise, rank=PLANTED)
    for seed in range(draws)
  ]
  clusters = stacked(problems, questions)
  found = recover(clusters, ridge, jax.random.key(0), rank=rank)
  w_BEDV = jax.vmap(objective.weights)(*found[:2])
  truth = jnp.asarray(np.stack([p.basis_RDV for p in problems]), jnp.float32)
  angle_B = jax.vmap(subspace.cosines)(found[1], truth)[:, -1]
  return {
    'questions': questions,
    'rank': rank,
    'noise': noise,
    'ridge': ridge,
    'draws': draws,
    'error': spread(errors(problems, w_BEDV)),
    'cosine': spread(np.asarray(angle_B)),
    'stationary': float(np.mean(np.asarray(found[2]) <= 3e-5)),
  }


def errors(problems, w_BEDV) -> list[float]:
  return [
    _planted.relative_error(problem, w_EDV)
    for problem, w_EDV in zip(problems, w_BEDV, strict=True)
  ]


def beside(draws: int, *, questions: int, noise: float):
  """One line of the baselines."""
  problems = [
    _planted.planted(seed, questions=MOST, noise=noise, rank=PLANTED)
    for seed in range(draws)
  ]
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
