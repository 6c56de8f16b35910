"""Questions and clusters that come one after another, without those before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from recursive_weights.basis.objective import einsum
from recursive_weights.basis.subspace import inner
from recursive_weights.interfaces import Array, UserError


class Stream(NamedTuple):
  """What is kept of all questions so far: `E R² + E R` numbers.

  gram_ERR, right_ER: `Σ_t P_tᵀ P_t` and `Σ_t P_tᵀ a` with `P_tk = q G_k`.
  """

  coefficients_ER: Array
  basis_RDV: Array
  gram_ERR: Array
  right_ER: Array


def init(members: int, basis_RDV: Array) -> Stream:
  """No question yet; all coefficients are 0."""
  rank = basis_RDV.shape[0]
  return Stream(
    jnp.zeros((members, rank)),
    basis_RDV,
    jnp.zeros((members, rank, rank)),
    jnp.zeros((members, rank)),
  )


def grow(stream: Stream, more: int) -> Stream:
  """The stream with `more` clusters after its own, which have no question yet.

  As if `init` had been given all of them: what an update does to one member
  depends on the others through the basis alone. Those that were there stay as
  they are, bit for bit.

  Raises:
    UserError: `more` is negative.
  """
  if more < 0:
    raise UserError(f'more must be >= 0, got {more}')
  fresh = init(more, stream.basis_RDV)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), stream, fresh)
  return joined._replace(basis_RDV=stream.basis_RDV)


def update(
  stream: Stream,
  q_BD: Array,
  a_BV: Array,
  member_B: Array,
  *,
  ridge: float,
  strength: float = 0.0,
  forget: float = 1.0,
) -> Stream:
  """The stream after B more questions; rows in any order, any members.

  Coefficients are those of least squares on all questions so far, exactly, as
  long as the basis stays. Where `strength` > 0 the basis moves first, by what
  the new questions ask with all coefficients held:

    ΔG = argmin Σ_b |q (W_i + ΔW_i) - a|² + |ΔG|² / strength,

  by the system of the B rows; no length of step can diverge. Sums of earlier
  questions are then those of an earlier basis: `forget` lets them fade.

  Args:
    member_B: whose questions they are, `0 .. E - 1`.
    ridge: of a member's weight, in units of questions, > 0.
    strength: how far the basis follows new questions; 0 holds it.
    forget: factor of all earlier sums, in (0, 1].

  Raises:
    UserError: a number out of range; where arrays are not traced, a member out
      of range or a row that is not finite.
  """
  if not (ridge > 0 and strength >= 0 and 0 < forget <= 1):
    raise UserError(
      'ridge must be > 0, strength >= 0 and forget in (0, 1], got '
      f'{ridge}, {strength} and {forget}'
    )
  c_ER, basis_RDV, gram_ERR, right_ER = stream
  for name, x in (('q', q_BD), ('a', a_BV)):
    if isinstance(x, jax.core.Tracer):
      continue
    # One such row would be in all later sums.
    if bad := np.flatnonzero(~np.isfinite(x).all(-1)).tolist():
      raise UserError(f'{name} must be finite, got NaN or inf in rows {bad}')
  if not isinstance(member_B, jax.core.Tracer):
    # JAX would take the nearest member, or count from the end.
    out_B = np.asarray(member_B)
    out_B = out_B[(out_B < 0) | (out_B >= len(c_ER))]
    if out_B.size:
      raise UserError(
        f'member must be in 0 .. {len(c_ER) - 1}, got {out_B.tolist()}'
      )
  if strength:
    c_BR = c_ER[member_B]
    seen_BRV = einsum('bd,rdv->brv', q_BD, basis_RDV)
    left_BV = a_BV - einsum('br,brv->bv', c_BR, seen_BRV)
    near_BC = einsum('br,cr->bc', c_BR, c_BR) * einsum('bd,cd->bc', q_BD, q_BD)
    factor = cho_factor(near_BC + jnp.eye(len(q_BD)) / strength)
    z_BV = cho_solve(factor, left_BV)
    basis_RDV = basis_RDV + einsum('bd,br,bv->rdv', q_BD, c_BR, z_BV)
  seen_BRV = einsum('bd,rdv->brv', q_BD, basis_RDV)
  gram_BRR = einsum('brv,bsv->brs', seen_BRV, seen_BRV)
  right_BR = einsum('brv,bv->br', seen_BRV, a_BV)
  gram_ERR = (forget * gram_ERR).at[member_B].add(gram_BRR)
  right_ER = (forget * right_ER).at[member_B].add(right_BR)
  penalty_RR = ridge * inner(basis_RDV, basis_RDV)
  factor = cho_factor(gram_ERR + penalty_RR[None])
  c_ER = cho_solve(factor, right_ER[..., None])[..., 0]
  return Stream(c_ER, basis_RDV, gram_ERR, right_ER)
