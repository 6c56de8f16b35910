"""Recursive networks in JAX: more out of fewer weights.

A recursive network applies a function again to its own result. There are four
kinds of recursion, and one room for each:

  derivation/  over weights: W2 = T(W1), Wn = T^(n-1)(W1)
  recursion/   over depth: ticks, latent cycles, halting, by `lax.scan`
  scans/       over time: state-space models, linear attention
  basis/       over optimisation: W_i = sum_k a_ik G_k

`models` are built from these rooms, `tasks` know no models, `evaluators` see a
model and a task, `training` sees contracts (`interfaces`), `build` sees all.

Dimension key. Names of arrays of rank two or more end in these letters, and
einsum strings use them:

  B batch            T time or tokens      D width (neurons)
  F hidden width     H heads               K key width
  V values, classes  L layers              S recursion step (tick)
  N state size       M memory length       P neuron pairs
  R rank or bases    C chunk               E experts, members or seeds
"""

from recursive_weights.derivation.compose import blend, chain, iterate
from recursive_weights.derivation.tree import Rule, compress, derive
from recursive_weights.interfaces import Operator

__all__ = [
  'Operator',
  'Rule',
  'blend',
  'chain',
  'compress',
  'derive',
  'iterate',
]

__version__ = '0.1.0'
