"""Questions and answers by cluster, padded and masked."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree, UserError

# Numbers that members' intermediates may take at once: 64 MiB of float32.
_AT_ONCE = 2**24


class Clusters(NamedTuple):
  """E clusters of at most T questions.

  q_ETD: questions, one a row; a row predicts `q W_i`.
  a_ETV: answers; V = D where both live in one space.
  weight_ET: how much a row counts; 0 is padding. With weights 1 every question
    counts the same, with `1 / n_i` every cluster does.
  """

  q_ETD: Array
  a_ETV: Array
  weight_ET: Array


def group(
  q_BD, a_BV, member_B, size: int | None = None, *, allow_empty: bool = False
) -> Clusters:
  """Clusters from rows and the number of each row's cluster.

  Args:
    q_BD, a_BV: embeddings of questions and answers, finite.
    member_B: integers `0 .. E - 1`; rows of a cluster keep their order.
    size: E; None for `max(member_B) + 1`.
    allow_empty: clusters may have no question.

  Raises:
    UserError: no numbers, shapes disagree, a number is not finite, a member is
      no integer, out of range or has no question.
  """
  try:
    q_BD, a_BV = np.asarray(q_BD, np.float32), np.asarray(a_BV, np.float32)
    member_B = np.asarray(member_B)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'q, a and member must be numbers, rows of one length, got {error}'
    ) from error
  if q_BD.ndim != 2 or a_BV.ndim != 2 or member_B.ndim != 1:
    raise UserError(
      'q, a and member must be [B, D], [B, V] and [B], got '
      f'{q_BD.shape}, {a_BV.shape} and {member_B.shape}'
    )
  if not len(q_BD) == len(a_BV) == len(member_B) > 0:
    raise UserError(
      'q, a and member must have one row a question, at least one, got '
      f'{len(q_BD)}, {len(a_BV)} and {len(member_B)}'
    )
  if member_B.dtype.kind not in 'iu':
    raise UserError(f'member must be integers, got {member_B.dtype}')
  member_B = member_B.astype(np.int64)  # NumPy counts no unsigned ones
  for name, x in (('q', q_BD), ('a', a_BV)):
    if bad := np.flatnonzero(~np.isfinite(x).all(-1)).tolist():
      raise UserError(f'{name} must be finite, got NaN or inf in rows {bad}')
  size = int(member_B.max()) + 1 if size is None else size
  if member_B.min() < 0 or member_B.max() >= size:
    raise UserError(
      f'member must be in 0 .. {size - 1}, got {member_B.min()} to '
      f'{member_B.max()}'
    )
  count_E = np.bincount(member_B, minlength=size)
  empty = np.flatnonzero(count_E == 0).tolist()
  if empty and not allow_empty:
    raise UserError(
      f'every cluster must have a question, got none in {empty}; leave them out'
    )
  order_B = np.argsort(member_B, kind='stable')
  row_B = member_B[order_B]
  start_E = np.cumsum(count_E) - count_E
  slot_B = np.arange(len(row_B)) - start_E[row_B]

  def place(x_B):
    shape = (size, int(count_E.max()), *x_B.shape[1:])
    out = np.zeros(shape, np.float32)
    out[row_B, slot_B] = x_B[order_B]
    return jnp.asarray(out)

  return Clusters(
    place(q_BD), place(a_BV), place(np.ones(len(row_B), np.float32))
  )


def pad(clusters: Clusters, members: int, questions: int) -> Clusters:
  """More members and rows, all of weight 0 (so that devices divide them)."""
  has_members, has_questions = clusters.weight_ET.shape
  if members < has_members or questions < has_questions:
    raise UserError(
      f'padding must not cut: at least {has_members} members and '
      f'{has_questions} questions, got {members} and {questions}'
    )
  more = (members - has_members, questions - has_questions)

  def widen(x):
    widths = [(0, n) for n in more] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths)

  return jax.tree.map(widen, clusters)


def blocks(trees: Tree, each: int) -> Tree:
  """Leaves `[E, ...]` as `[blocks, members, ...]`, filled up with zeros.

  A block takes every n-th member, so that members spread over devices stay
  where they are.

  Args:
    each: numbers that a member needs while it is worked on.
  """
  size = jax.tree.leaves(trees)[0].shape[0]
  count = max(1, -(-size * each // _AT_ONCE))
  members = -(-size // count)

  def split(x):
    fill = [(0, members * count - size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, fill).reshape(members, count, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, trees)


def by_block(function: Callable[..., Tree], each: int, *trees: Tree) -> Tree:
  """`function(*trees)`, members `[E, ...]` in blocks, so memory has a bound.

  Gradients work blocks out again instead of keeping them. For `each` see
  `blocks`.
  """
  size = jax.tree.leaves(trees)[0].shape[0]
  if size * each <= _AT_ONCE:
    return function(*trees)
  remade = jax.checkpoint(lambda block: function(*block))
  found = jax.lax.map(remade, blocks(trees, each))

  def join(x):
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:size]

  return jax.tree.map(join, found)


def check(
  clusters: Clusters,
  rank: int,
  *,
  basis_RDV: Array | None = None,
  graph_EE: Array | None = None,
) -> None:
  """Shapes agree and can hold `rank` bases.

  Args:
    basis_RDV: where a fit starts, if it is given.
    graph_EE: of an objective that couples members.

  Raises:
    UserError: with the shapes; where weights are not traced, one is negative or
      not finite. Clusters without weight hold no basis.
  """
  q, a, weight = (x.shape for x in clusters)
  if len(q) != 3 or len(a) != 3 or q[:2] != a[:2] or q[:2] != weight:
    raise UserError(
      f'clusters must be [E, T, D], [E, T, V] and [E, T], got {q}, {a}, '
      f'{weight}'
    )
  members = q[0]
  if not isinstance(clusters.weight_ET, jax.core.Tracer):
    weight_ET = np.asarray(clusters.weight_ET)
    good_ET = np.isfinite(weight_ET) & (weight_ET >= 0)
    if bad := np.flatnonzero(~good_ET.all(-1)).tolist():
      raise UserError(
        f'weights must be finite and >= 0, got others in clusters {bad}'
      )
    members = int((weight_ET > 0).any(-1).sum())
  limit = min(members, q[2] * a[2])
  if not 0 < rank <= limit:
    raise UserError(
      f'rank must be in 1 .. {limit} (clusters with a question, or entries of '
      f'a weight), got {rank}'
    )
  if basis_RDV is not None and basis_RDV.shape != (rank, q[2], a[2]):
    raise UserError(
      f'the basis must be {(rank, q[2], a[2])}, as questions and answers are, '
      f'got {basis_RDV.shape}'
    )
  if graph_EE is not None and graph_EE.shape != (q[0], q[0]):
    raise UserError(
      f'similarity_EE must be of the {q[0]} clusters, got {graph_EE.shape}'
    )
