"""A basis found through its rows: fast where questions are few.

For given coefficients the best basis is known, and what is left to minimise
depends on the span of the coefficients alone. With N = E T questions nothing
of size `R D` has to be factored, and the basis is formed once, at the end.

Where the cosine counts, each step minimises a quadratic model of every row's
loss with the same slope (`quadratic`), and is kept where the objective itself
falls.

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
  cosine,
  einsum,
  total_weight,
)
from recursive_weights.interfaces import Array, UserError


class Rows(NamedTuple):
  """Questions as rows, each times the root of its weight.

  inner_NN: `√w q · q' √w'`. a_NV: answers. member_N: whose they are. weight_N:
  w. spread: `M^(-1/2)`, M the penalty on members, `[E, E]` or a number; see
  `run`. cosine: its share, None for 0.
  """

  inner_NN: Array
  a_NV: Array
  member_N: Array
  weight_N: Array
  spread: Array
  cosine: Array | None


class Quadratic(NamedTuple):
  """`Σ_n |scale_n y_n - target_n|²` in place of the rows' losses."""

  scale_N: Array
  target_NV: Array


class Reduced(NamedTuple):
  """What `reduced` finds; y_NV: predictions, times the roots of weights."""

  objective: Array
  gradient_ER: Array
  z_NV: Array
  y_NV: Array


class State(NamedTuple):
  """Where a fit stands; `span_ER` has orthonormal columns, `QᵀQ = I`."""

  span_ER: Array
  model: Quadratic | None
  found: Reduced
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
    clusters.weight_ET.reshape(-1),
    spread,
    jnp.asarray(objective.cosine) if objective.cosine else None,
  )


def quadratic(table: Rows, y_NV: Array) -> Quadratic:
  """A model of the rows' losses with their slope g at y.

    f_n(x) ~ ω_n |x - t_n|²,  t_n = y_n - g_n / (2 ω_n),
    f_n(y) = (1 - λ) |y - √w a|² + λ w (1 - cos(y, a)),
    ω_n = (1 - λ) + 1.25 λ w / (2 |y_n|²)

  The cosine bends by at most `1.155 w / |y|²` (where it is 1/2), so close to y
  the model is no lower than the loss.
  """
  share = 0.0 if table.cosine is None else table.cosine
  slope_NV = jax.grad(lambda y_NV: jnp.sum(_losses(table, y_NV)))(y_NV)
  square_N = jnp.maximum(jnp.sum(y_NV**2, -1), 1e-6)
  bend_N = (1 - share) + 0.625 * share * table.weight_N / square_N
  bend_N = jnp.maximum(bend_N, 1e-6)
  scale_N = jnp.sqrt(bend_N)
  target_NV = y_NV - slope_NV / (2 * bend_N[:, None])
  return Quadratic(scale_N, scale_N[:, None] * target_NV)


def reduced(
  table: Rows, span_ER: Array, model: Quadratic | None = None
) -> Reduced:
  """The least objective that any basis reaches, its slope, and the rows' duals.

    f(Q) = min_G Σ w |q W_i - a|² + |G|² = tr Aᵀ Z,  C = M^(-1/2) Q,
    Z = (P ∘ S + I)^-1 A,  P_nm = c_i(n) · c_i(m),  S = √w q q'ᵀ √w'
    ∂f = -2 (I - Q Qᵀ) M^(-1/2) [Z Zᵀ ∘ S] C

  for orthonormal columns Q. Time `N³ / 3 + 4 N² V`.

  Args:
    model: what the basis minimises instead of the squared error; the objective
      is then that of the rows' losses.

  Returns:
    f, its gradient along the spans `[E, R]`, Z and predictions `[N, V]`.
  """
  inner_NN, target_NV = table.inner_NN, table.a_NV
  if model is not None:
    scale_N, target_NV = model
    inner_NN = scale_N[:, None] * inner_NN * scale_N[None]
  c_ER = _spread(table, span_ER)
  c_NR = c_ER[table.member_N]
  system_NN = einsum('nr,mr->nm', c_NR, c_NR) * inner_NN
  z_NV = _solve(system_NN, target_NV)
  y_NV = target_NV - z_NV
  if model is None:
    value = jnp.sum(target_NV * z_NV)
  else:
    penalty = jnp.sum(z_NV * y_NV)
    y_NV = y_NV / scale_N[:, None]
    value = jnp.sum(_losses(table, y_NV)) + penalty
  weighed_NN = einsum('nv,mv->nm', z_NV, z_NV) * inner_NN
  slope_NR = einsum('nm,mr->nr', weighed_NN, c_NR)
  slope_ER = jax.ops.segment_sum(slope_NR, table.member_N, c_ER.shape[0])
  slope_ER = _spread(table, slope_ER)
  within_RR = einsum('er,es->rs', span_ER, slope_ER)
  slope_ER -= einsum('er,rs->es', span_ER, within_RR)
  return Reduced(value, -2 * slope_ER, z_NV, y_NV)


def initial(table: Rows, members: int, rank: int, ridge: float) -> Array:
  """Leading directions of the members' ridge solutions, `[E, R]`.

  Eigenvectors of the matrix of `<W_i, W_j>`, which is found from rows.
  """
  questions = len(table.member_N) // members
  four = members, questions, members, questions
  each_E = jnp.arange(members)
  own_ETT = table.inner_NN.reshape(four)[each_E, :, each_E]
  a_ETV = table.a_NV.reshape(members, questions, -1)
  z_NV = jax.vmap(_solve)(own_ETT / ridge, a_ETV).reshape(table.a_NV.shape)
  weighed_NN = einsum('nv,mv->nm', z_NV, z_NV) * table.inner_NN
  gram_EE = weighed_NN.reshape(four).sum((1, 3))
  return jnp.linalg.eigh(gram_EE)[1][:, ::-1][:, :rank]


def step(table: Rows, state: State, halvings: int = 8) -> State:
  """One step of L-BFGS along the spans; the objective never rises."""
  optimizer = _optimizer()
  gradient_ER = state.found.gradient_ER
  change_ER, memory = optimizer.update(
    gradient_ER, state.optimizer, state.span_ER
  )
  falls = jnp.sum(change_ER * gradient_ER) < 0
  change_ER = jnp.where(falls, change_ER, -gradient_ER)
  model = _model(table, state.found)

  def attempt(length):
    span_ER = jnp.linalg.qr(state.span_ER + length * change_ER)[0]
    # The same span, by the columns nearest to those before.
    cross_RR = einsum('er,es->rs', span_ER, state.span_ER)
    left_RR, _, right_RR = jnp.linalg.svd(cross_RR)
    span_ER = einsum('er,rs,st->et', span_ER, left_RR, right_RR)
    return span_ER, reduced(table, span_ER, model)

  def going(carry):
    j, (_, found) = carry
    return (j < halvings) & ~(found.objective <= state.found.objective)

  def body(carry):
    j, _ = carry
    return j + 1, attempt(0.25 ** (j + 1.0))

  _, (span_ER, found) = jax.lax.while_loop(going, body, (0, attempt(1.0)))
  new = State(span_ER, model, found, memory, state.step + 1)
  # What the optimizer remembers has led nowhere.
  old = state._replace(
    optimizer=optimizer.init(state.span_ER), step=state.step + 1
  )
  better = found.objective <= state.found.objective
  return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)


def begin(table: Rows, span_ER: Array, square: Reduced | None = None) -> State:
  """The state before the first step; `square` is `reduced` there, if known."""
  found = reduced(table, span_ER) if square is None else square
  model = None
  if table.cosine is not None:  # from where the squared error leads
    model = _model(table, found)
    found = reduced(table, span_ER, model)
  memory = _optimizer().init(span_ER)
  return State(span_ER, model, found, memory, jnp.zeros((), int))


def run(
  objective: Objective,
  clusters: Clusters,
  rank: int,
  *,
  steps: int = 100,
  warm_ridge: float = 0.0,
  warm_steps: int = 30,
  span_ER: Array | None = None,
) -> tuple[Array, Array, Array]:
  """Coefficients and basis, by steps that cost `N³ / 3 + 4 N² V` each.

  Minimises `objective.value`, whose minima those of the alternating fit are.
  The penalty is `tr M C Gram(G) Cᵀ` with `M = ridge I + 2 similarity L`: where
  answers couple members, one without questions gets what its neighbours have.

  Args:
    objective: with a ridge, without sparsity.
    clusters: N = E T rows, padding included; memory `N²`.
    rank: R.
    steps: of L-BFGS; where the cosine counts, after as many of the squared
      error alone.
    warm_ridge: with which to begin where it is larger than the objective's: it
      takes away minima that interpolate where questions hardly suffice.
    warm_steps: steps with it.
    span_ER: where to begin, say coefficients found before; None for `initial`.

  Returns:
    Coefficients `[E, R]`, orthonormal basis `[R, D, V]`, and the objective
    after each of the last `steps`.

  Raises:
    UserError: the rank does not fit, or another objective.
  """
  check(clusters, rank, graph_EE=objective.graph_EE)
  if objective.sparsity or objective.ridge <= 0:
    raise UserError(
      'a fit through rows needs ridge > 0 and sparsity 0, got '
      f'{objective.ridge} and {objective.sparsity}'
    )
  members = clusters.weight_ET.shape[0]
  table = rows(objective, clusters)
  if span_ER is None:
    span_ER = initial(table, members, rank, max(objective.ridge, 1.0))
  elif span_ER.shape != (members, rank):
    raise UserError(f'span_ER must be {(members, rank)}, got {span_ER.shape}')
  else:
    span_ER = jnp.linalg.qr(span_ER)[0]

  if warm_ridge > objective.ridge:
    easy = objective._replace(cosine=0.0, ridge=warm_ridge)
    warm = rows(easy, clusters)
    span_ER = _descend(warm, span_ER, warm_steps)[0].span_ER
  found = None
  if objective.cosine:
    # Short predictions bend the angle so much that steps are short too.
    square, _ = _descend(table._replace(cosine=None), span_ER, steps)
    span_ER, found = square.span_ER, square.found
  state, values_S = _descend(table, span_ER, steps, found)
  c_ER, basis_RDV = primal(clusters, table, state)
  return c_ER, basis_RDV, values_S / total_weight(clusters)


def primal(
  clusters: Clusters, table: Rows, state: State
) -> tuple[Array, Array]:
  """Coefficients and orthonormal basis of the W_i that duals stand for.

  G_k = Σ_n c_i(n)k √w qᵀ z_n
  """
  c_ER = _spread(table, state.span_ER)
  z_NV = state.found.z_NV
  if state.model is not None:
    z_NV = state.model.scale_N[:, None] * z_NV
  # All that costs is this product of matrices, so it has to be one.
  mixed_NR = jnp.sqrt(table.weight_N)[:, None] * c_ER[table.member_N]
  q_ND = clusters.q_ETD.reshape(len(mixed_NR), -1)
  mixed_NRD = mixed_NR[..., None] * q_ND[:, None]
  raw_RDV = einsum('nrd,nv->rdv', mixed_NRD, z_NV)
  basis_RDV = subspace.orthonormalise(raw_RDV)
  back_RR = subspace.inner(raw_RDV, basis_RDV)
  return einsum('er,rs->es', c_ER, back_RR), basis_RDV


@functools.partial(jax.jit, static_argnames='steps')
def _descend(table, span_ER, steps, found=None):
  def body(state, _):
    state = step(table, state)
    return state, state.found.objective

  return jax.lax.scan(body, begin(table, span_ER, found), length=steps)


def _model(table, found):
  return None if table.cosine is None else quadratic(table, found.y_NV)


def _losses(table, y_NV):
  """`(1 - λ) |y - √w a|² + λ w (1 - cos(y, a))` of each row, `[N]`."""
  square_N = jnp.sum((y_NV - table.a_NV) ** 2, -1)
  angle_N = table.weight_N * (1 - cosine(y_NV, table.a_NV))
  return (1 - table.cosine) * square_N + table.cosine * angle_N


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
