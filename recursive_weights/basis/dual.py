"""A basis found through its rows: fast where questions are few.

For given coefficients the best basis is known, and what is left to minimise
depends on the span of the coefficients alone. With N = E T questions nothing
of size `R D` has to be factored, and the basis is formed once, at the end.

Source: G. Golub and V. Pereyra, The differentiation of pseudo-inverses and
nonlinear least squares problems whose variables separate, 1973.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve

from recursive_weights.basis import subspace
from recursive_weights.basis.clusters import Clusters, check
from recursive_weights.basis.objective import (
  Objective,
  einsum,
  total_weight,
)
from recursive_weights.interfaces import Array, UserError


class Rows(NamedTuple):
  """Questions as rows, each times the root of its weight.

  inner_NN: `√w q · q' √w'`. a_NV: answers. member_N: whose they are.
  spread: `M^(-1/2)`, M the penalty on members, `[E, E]` or a number; see `run`.
  """

  inner_NN: Array
  a_NV: Array
  member_N: Array
  spread: Array


class State(NamedTuple):
  """Where a fit stands; `span_ER` has orthonormal columns, `QᵀQ = I`."""

  span_ER: Array
  objective: Array
  gradient_ER: Array
  optimizer: optax.OptState
  step: Array


def rows(objective: Objective, clusters: Clusters) -> Rows:
  """What a fit needs of the clusters."""
  root_ET1 = jnp.sqrt(clusters.weight_ET)[..., None]
  members, questions = clusters.weight_ET.shape
  q_ND = (root_ET1 * clusters.q_ETD).reshape(members * questions, -1)
  spread = jnp.asarray(objective.ridge**-0.5)
  if objective.graph_EE is not None:
    value_E, vector_EE = jnp.linalg.eigh(objective.graph_EE)
    penalty_E = objective.ridge + 2 * objective.similarity * value_E
    spread = einsum('ef,f,gf->eg', vector_EE, penalty_E**-0.5, vector_EE)
  return Rows(
    einsum('nd,md->nm', q_ND, q_ND),
    (root_ET1 * clusters.a_ETV).reshape(members * questions, -1),
    jnp.repeat(jnp.arange(members), questions),
    spread,
  )


def reduced(table: Rows, span_ER: Array) -> tuple[Array, Array, Array]:
  """The least objective that any basis reaches, its slope, and the rows' duals.

    f(Q) = min_G Σ w |q W_i - a|² + |G|² = tr Aᵀ Z,  C = M^(-1/2) Q,
    Z = (P ∘ S + I)^-1 A,  P_nm = c_i(n) · c_i(m),  S = √w q q'ᵀ √w'
    ∂f = -2 (I - Q Qᵀ) M^(-1/2) [Z Zᵀ ∘ S] C

  for orthonormal columns Q. Time `N³ / 3 + 4 N² V`.

  Returns:
    f, its gradient along the spans `[E, R]`, Z `[N, V]`.
  """
  c_ER = _spread(table, span_ER)
  c_NR = c_ER[table.member_N]
  system_NN = einsum('nr,mr->nm', c_NR, c_NR) * table.inner_NN
  z_NV = _solve(system_NN, table.a_NV)
  weighed_NN = einsum('nv,mv->nm', z_NV, z_NV) * table.inner_NN
  slope_NR = einsum('nm,mr->nr', weighed_NN, c_NR)
  slope_ER = jax.ops.segment_sum(slope_NR, table.member_N, c_ER.shape[0])
  slope_ER = _spread(table, slope_ER)
  within_RR = einsum('er,es->rs', span_ER, slope_ER)
  slope_ER -= einsum('er,rs->es', span_ER, within_RR)
  return jnp.sum(table.a_NV * z_NV), -2 * slope_ER, z_NV


def initial(table: Rows, members: int, rank: int, ridge: float) -> Array:
  """Leading directions of the members' ridge solutions, `[E, R]`.

  Eigenvectors of the matrix of `<W_i, W_j>`, which is found from rows.
  """
  same_NN = table.member_N[:, None] == table.member_N[None]
  z_NV = _solve(table.inner_NN * same_NN / ridge, table.a_NV)
  weighed_NN = einsum('nv,mv->nm', z_NV, z_NV) * table.inner_NN
  gram_EN = jax.ops.segment_sum(weighed_NN, table.member_N, members)
  gram_EE = jax.ops.segment_sum(gram_EN.T, table.member_N, members)
  return jnp.linalg.eigh(gram_EE)[1][:, ::-1][:, :rank]


def step(table: Rows, state: State, halvings: int = 8) -> State:
  """One step of L-BFGS along the spans; the objective never rises."""
  optimizer = _optimizer()
  change_ER, memory = optimizer.update(
    state.gradient_ER, state.optimizer, state.span_ER
  )
  falls = jnp.sum(change_ER * state.gradient_ER) < 0
  change_ER = jnp.where(falls, change_ER, -state.gradient_ER)

  def attempt(length):
    span_ER = jnp.linalg.qr(state.span_ER + length * change_ER)[0]
    # The same span, by the columns nearest to those before.
    cross_RR = einsum('er,es->rs', span_ER, state.span_ER)
    left_RR, _, right_RR = jnp.linalg.svd(cross_RR)
    span_ER = einsum('er,rs,st->et', span_ER, left_RR, right_RR)
    value, gradient_ER, _ = reduced(table, span_ER)
    return span_ER, value, gradient_ER

  def going(carry):
    j, (_, value, _) = carry
    return (j < halvings) & ~(value <= state.objective)

  def body(carry):
    j, _ = carry
    return j + 1, attempt(0.25 ** (j + 1.0))

  _, found = jax.lax.while_loop(going, body, (0, attempt(1.0)))
  better = found[1] <= state.objective

  def choose(new, old):
    return jnp.where(better, new, old)

  return State(
    choose(found[0], state.span_ER),
    choose(found[1], state.objective),
    choose(found[2], state.gradient_ER),
    # What the optimizer remembers has led nowhere.
    jax.tree.map(choose, memory, optimizer.init(state.span_ER)),
    state.step + 1,
  )


def begin(table: Rows, span_ER: Array) -> State:
  """The state before the first step."""
  value, gradient_ER, _ = reduced(table, span_ER)
  memory = _optimizer().init(span_ER)
  return State(span_ER, value, gradient_ER, memory, jnp.zeros((), int))


def run(
  objective: Objective,
  clusters: Clusters,
  rank: int,
  *,
  steps: int = 100,
  warm_ridge: float = 0.0,
  warm_steps: int = 30,
) -> tuple[Array, Array, Array]:
  """The basis of least squares, by steps that cost `N³ / 3 + 4 N² V` each.

  Minimises `objective.value`, whose minima those of the alternating fit are.
  The penalty is `tr M C Gram(G) Cᵀ` with `M = ridge I + 2 similarity L`: where
  answers couple members, one without questions gets what its neighbours have.

  Args:
    objective: with a ridge, without cosine and sparsity.
    clusters: N = E T rows, padding included; memory `N²`.
    rank: R.
    steps: of L-BFGS.
    warm_ridge: with which to begin where it is larger than the objective's: it
      takes away minima that interpolate where questions hardly suffice.
    warm_steps: steps with it.

  Returns:
    Coefficients `[E, R]`, orthonormal basis `[R, D, V]`, and the objective
    after each of the last `steps`.

  Raises:
    UserError: the rank does not fit, or another objective.
  """
  check(clusters, rank)
  if objective.cosine or objective.sparsity or objective.ridge <= 0:
    raise UserError(
      'a fit through rows needs ridge > 0, cosine and sparsity 0, got '
      f'{objective.ridge}, {objective.cosine} and {objective.sparsity}'
    )
  members = clusters.weight_ET.shape[0]
  table = rows(objective, clusters)
  span_ER = initial(table, members, rank, max(objective.ridge, 1.0))

  if warm_ridge > objective.ridge:
    warm = rows(objective._replace(ridge=warm_ridge), clusters)
    span_ER = _descend(warm, span_ER, warm_steps)[0].span_ER
  state, values_S = _descend(table, span_ER, steps)
  c_ER, basis_RDV = primal(clusters, table, state.span_ER)
  return c_ER, basis_RDV, values_S / total_weight(clusters)


def primal(
  clusters: Clusters, table: Rows, span_ER: Array
) -> tuple[Array, Array]:
  """Coefficients and orthonormal basis of the W_i that duals stand for.

  G_k = Σ_n c_i(n)k √w qᵀ z_n
  """
  c_ER = _spread(table, span_ER)
  _, _, z_NV = reduced(table, span_ER)
  z_ETV = z_NV.reshape(*clusters.weight_ET.shape, -1)
  z_ETV = jnp.sqrt(clusters.weight_ET)[..., None] * z_ETV
  mixed_ETRV = einsum('er,etv->etrv', c_ER, z_ETV)
  raw_RDV = einsum('etd,etrv->rdv', clusters.q_ETD, mixed_ETRV)
  basis_RDV = subspace.orthonormalise(raw_RDV)
  back_RR = subspace.inner(raw_RDV, basis_RDV)
  return einsum('er,rs->es', c_ER, back_RR), basis_RDV


@functools.partial(jax.jit, static_argnames='steps')
def _descend(table, span_ER, steps):
  def body(state, _):
    state = step(table, state)
    return state, state.objective

  return jax.lax.scan(body, begin(table, span_ER), length=steps)


def _spread(table, x_ER):
  if table.spread.ndim:
    return einsum('ef,fr->er', table.spread, x_ER)
  return table.spread * x_ER


def _solve(system_NN, right_NV):
  """`(system + I)^-1 right`."""
  factor = cho_factor(system_NN + jnp.eye(system_NN.shape[0]))
  return cho_solve(factor, right_NV)


def _optimizer():
  return optax.chain(optax.scale_by_lbfgs(memory_size=10), optax.scale(-1.0))
