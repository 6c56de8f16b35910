"""Contraction: weighted sums over the leading (memory) axis of the base."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator, UserError

Kind = Literal['softmax', 'linear']


def make(
  kind: Kind = 'softmax',
  shape: tuple[int, ...] | None = None,
  normalised: bool = False,
) -> Operator:
  """`W2[i] = Σ_m A[i, m] W1[m]`, for a base `[M, ...]`.

  Args:
    kind: 'softmax': each row of A is a softmax of learned logits, so W2 is a
      mean of the slots. 'linear': A itself is learned.
    shape: the derived shape; None is `base.shape[1:]`. Its size must be a
      multiple n of the size of one slot; A has n rows, and the sums are
      reshaped. From `[M, F, D]`: `[O, H, D]` with O H = F takes one row,
      `[H, F, D]` takes H rows.
    normalised: divide each row of A by its Euclidean norm. A mean of M
      independent slots has 1 / sqrt(M) of their deviation, which starts a
      derived weight too small to learn; a row of norm 1 keeps theirs.

  Parameters: n M.
  Start: one row: the mean over M (times sqrt(M), normalised). More rows: row i
    is half the mean and half the base, interpolated at slot
    `i (M - 1) / (n - 1)`, so that no two learn the same (needs M > 1); over
    its norm, normalised.
  Cost: O(n size(base)). Does not depend on the widths of the slots.
  Source: examiner-ctm v5.3, ContractionOperator.
  """
  matrix.one_of('kind', kind, ('softmax', 'linear'))

  def init(key, base):
    del key
    start_OM = _start(*_sizes(base.shape, shape))
    return (
      {'logits': jnp.log(start_OM)}
      if kind == 'softmax'
      else {'weights': start_OM}
    )

  def apply(theta, base):
    _sizes(base.shape, shape)
    if kind == 'softmax':
      a_OM = jax.nn.softmax(theta['logits'], axis=-1)
    else:
      a_OM = theta['weights']
    return _contract(a_OM, base, shape, normalised)

  return Operator(init, apply)


def count(
  base_shape, kind: Kind = 'softmax', shape=None, normalised=False
) -> int:
  """`n M`."""
  del kind, normalised
  return math.prod(_sizes(base_shape, shape))


def start(base, kind: Kind = 'softmax', shape=None, normalised=False):
  """The mean over M (one row), or mean and interpolation in equal parts."""
  del kind
  a_OM = _start(*_sizes(base.shape, shape))
  return _contract(a_OM, base, shape, normalised)


def _sizes(base_shape, shape):
  if not base_shape:
    raise UserError('contraction needs a base with a leading axis')
  memory, slot = base_shape[0], math.prod(base_shape[1:])
  if shape is None:
    return 1, memory
  rows, rest = divmod(math.prod(shape), slot)
  if rest or not rows:
    raise UserError(
      f'contraction from {tuple(base_shape)}: the size of shape'
      f' {tuple(shape)} must be a multiple of {slot}, the size of'
      f' {tuple(base_shape[1:])}'
    )
  if rows > 1 and memory == 1:
    raise UserError(
      f'contraction to {rows} rows needs more than one slot to tell them apart,'
      f' got the base {tuple(base_shape)}'
    )
  return rows, memory


def _start(rows, memory):
  mean_OM = jnp.full((rows, memory), 1 / memory)
  if rows == 1:
    return mean_OM
  place_O1 = jnp.linspace(0, memory - 1, rows)[:, None]
  slot_1M = jnp.arange(memory, dtype=jnp.float32)[None, :]
  return (mean_OM + jnp.maximum(0, 1 - jnp.abs(slot_1M - place_O1))) / 2


def _contract(a_OM, base, shape, normalised):
  if normalised:
    a_OM = a_OM / jnp.sqrt((a_OM**2).sum(-1, keepdims=True) + 1e-12)
  slots = base.reshape(base.shape[0], -1)
  slots = slots.astype(jnp.promote_types(base.dtype, jnp.float32))
  derived = matrix.matmul(a_OM, slots).astype(base.dtype)
  return derived.reshape(base.shape[1:] if shape is None else shape)
