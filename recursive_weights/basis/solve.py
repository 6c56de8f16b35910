"""One half of the fit while the other is held: coefficients, or basis."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.sparse.linalg import cg

from recursive_weights.basis.clusters import Clusters, blocks, by_block
from recursive_weights.basis.objective import (
  Objective,
  answer_slope,
  coupling,
  einsum,
  gradients,
  rows,
  smooth,
  total_weight,
)
from recursive_weights.basis.subspace import inner
from recursive_weights.interfaces import Array

# Added to a system's diagonal, as a share of its mean: directions that the
# data do not tell are left where they are.
_DAMP = 1e-6
_TINY = 1e-20


class Solved(NamedTuple):
  """Coefficients, what they predict, and `∂L/∂C` of `smooth` there."""

  coefficients_ER: Array
  predicted_ETV: Array
  slope_ER: Array


def coefficients(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
  *,
  sweeps: int = 1,
  iterations: int = 100,
) -> Array:
  """Coefficients of all members at once, `[E, R]`; the objective never rises.

    (Σ_t P_tᵀ P_t + ridge Gram) Δc_i = -½ ∂L/∂c_i,  P_tk = q_it G_k

  For the squared error one sweep is exact (ridge least squares). The cosine
  enters by Gauss and Newton, `1 - cos = ½ |p/|p| - a/|a||²`, with the length
  of the step chosen member by member. Answer similarity couples the members:
  conjugate gradients. Sparsity: proximal gradient steps on the same quadratic.

  Args:
    sweeps: Gauss-Newton steps; more than one matters where the cosine counts.
    iterations: of conjugate or proximal gradients.
  """
  return solved(
    objective,
    clusters,
    coefficients_ER,
    basis_RDV,
    sweeps=sweeps,
    iterations=iterations,
  ).coefficients_ER


def solved(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
  *,
  sweeps: int = 1,
  iterations: int = 100,
) -> Solved:
  """`coefficients`, with what they predict and the slope that is left.

  All of it from one product of questions and bases, time `E T R D V`.
  """
  gram_RR = inner(basis_RDV, basis_RDV)

  def some(c_ER, clusters):
    seen_ETRV = einsum('etd,rdv->etrv', clusters.q_ETD, basis_RDV)

    def sweep(_, c_ER):
      slope_ER = _slope(objective, clusters, c_ER, seen_ETRV, gram_RR)[1]
      curve_ERR = _curvature(objective, clusters, c_ER, seen_ETRV, gram_RR)
      step_ER = _direction(
        objective, c_ER, slope_ER, curve_ERR, gram_RR, iterations
      )
      if objective.cosine == 0:
        return c_ER + step_ER
      return _shorten(objective, clusters, c_ER, step_ER, seen_ETRV, gram_RR)

    if sweeps == 1:
      c_ER = sweep(0, c_ER)
    else:
      c_ER = jax.lax.fori_loop(0, sweeps, sweep, c_ER)
    return Solved(c_ER, *_slope(objective, clusters, c_ER, seen_ETRV, gram_RR))

  if objective.graph_EE is None:
    rank, _, values = basis_RDV.shape
    each = rank * clusters.weight_ET.shape[1] * values
    found = by_block(some, each, coefficients_ER, clusters)
  else:  # couples all members, and is as large as their number squared
    found = some(coefficients_ER, clusters)
  return found._replace(slope_ER=found.slope_ER / total_weight(clusters))


def basis_direct(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """The change of basis that minimises the squared error, `[R, D, V]`.

    (Σ_it w c_i c_iᵀ ⊗ qᵀ q + Cᵀ(ridge I + 2 similarity L)C ⊗ I) ΔG = -½ ∂L/∂G

  by Cholesky: memory `2 (R D)²`, time `E T (R D)² + (R D)³ / 3`. Exact where
  `objective.cosine` is 0. Solved for the change, not for G, so that what the
  data do not tell stays as it was, and rounding is corrected at the next step.
  """
  c_ER, (q_ETD, _, weight_ET) = coefficients_ER, clusters
  rank, width, values = basis_RDV.shape

  def add(system, block):
    c_ER, q_ETD, weight_ET = block
    mixed_ETRD = einsum('er,etd->etrd', c_ER, q_ETD)
    more = einsum('etrd,et,etsf->rdsf', mixed_ETRD, weight_ET, mixed_ETRD)
    return system + more, None

  system, _ = jax.lax.scan(
    add,
    jnp.zeros((rank, width, rank, width)),
    blocks((c_ER, q_ETD, weight_ET), rank * weight_ET.shape[1] * width),
  )
  # `[R, D, S, F]` += `[R, S] ⊗ I`.
  eye = jnp.eye(width)[None, :, None, :]
  system += coupling(objective, c_ER)[:, None, :, None] * eye
  system = system.reshape(rank * width, -1)
  _, gradient_RDV = gradients(objective, clusters, c_ER, basis_RDV)
  right = -0.5 * total_weight(clusters) * gradient_RDV
  damp = _damping(objective, clusters, c_ER)
  factor = cho_factor(system + damp * jnp.eye(rank * width))
  flat = cho_solve(factor, right.reshape(rank * width, values))
  return flat.reshape(basis_RDV.shape)


def basis_dual(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
) -> Array:
  """As `basis_direct`, by the system of rows: time `N³ / 3 + N R D V`, N = E T.

    G = L^-1 Xᵀ (X L^-1 Xᵀ + I)^-1 A,  X = rows √w c_i ⊗ q,
    L = Cᵀ(ridge I + 2 similarity L_S)C + damping

  For fewer questions than `R D`. Without a ridge what the data do not tell
  goes to 0 instead of staying.
  """
  c_ER, (q_ETD, a_ETV, weight_ET) = coefficients_ER, clusters
  rank = basis_RDV.shape[0]
  root_ET1 = jnp.sqrt(weight_ET)[..., None]
  damp = _damping(objective, clusters, c_ER)
  factor = cho_factor(coupling(objective, c_ER) + damp * jnp.eye(rank))
  solved_RE = cho_solve(factor, c_ER.T)
  q_ND = (root_ET1 * q_ETD).reshape(-1, q_ETD.shape[-1])
  a_NV = (root_ET1 * a_ETV).reshape(-1, a_ETV.shape[-1])
  member_N = jnp.repeat(jnp.arange(c_ER.shape[0]), weight_ET.shape[1])
  near_EE = einsum('er,rf->ef', c_ER, solved_RE)
  system_NN = near_EE[member_N][:, member_N] * einsum('nd,md->nm', q_ND, q_ND)
  system_NN += jnp.eye(len(member_N))
  z_NV = cho_solve(cho_factor(system_NN), a_NV)
  z_ETV = root_ET1 * z_NV.reshape(a_ETV.shape)
  mixed_ETRV = einsum('re,etv->etrv', solved_RE, z_ETV)
  return einsum('etd,etrv->rdv', q_ETD, mixed_ETRV) - basis_RDV


def basis_cg(
  objective: Objective,
  clusters: Clusters,
  coefficients_ER: Array,
  basis_RDV: Array,
  *,
  iterations: int = 100,
  tolerance: float = 1e-6,
) -> Array:
  """As `basis_direct`, matrix-free: memory `E T (D + V) + R D V`.

  Conjugate gradients on the Hessian of the objective, with the preconditioner
  `(Σ w c cᵀ) ⊗ (Σ w qᵀq / Σ w)`, exact where coefficients and questions are
  independent.
  """
  c_ER, (q_ETD, _, weight_ET) = coefficients_ER, clusters
  total = total_weight(clusters)
  damp = _damping(objective, clusters, c_ER)
  slope = jax.grad(smooth, argnums=3)
  gradient_RDV = slope(objective, clusters, c_ER, basis_RDV)
  # Of a quadratic function without its linear part, so Hessian times x.
  still = clusters._replace(a_ETV=jnp.zeros_like(clusters.a_ETV))
  left_RR = einsum('et,er,es->rs', weight_ET, c_ER, c_ER)
  right_DD = einsum('et,etd,etf->df', weight_ET, q_ETD, q_ETD) / total
  ridge = objective.ridge * c_ER.shape[0] / total
  left, right = _factor(left_RR), _factor(right_DD, ridge, 1e-3)

  def precondition(x_RDV):
    x_RDV = cho_solve(left, x_RDV.reshape(x_RDV.shape[0], -1)).reshape(
      x_RDV.shape
    )
    return jax.vmap(lambda x_DV: cho_solve(right, x_DV))(x_RDV)

  return cg(
    lambda x: 0.5 * total * slope(objective, still, c_ER, x) + damp * x,
    -0.5 * total * gradient_RDV,
    tol=tolerance,
    maxiter=iterations,
    M=precondition,
  )[0]


@functools.partial(jax.jit, static_argnames=('loss', 'steps'))
def minimise(loss, params, arguments: tuple, steps: int):
  """`params` after L-BFGS on `loss(params, *arguments)`, with line search.

  Args:
    loss: a function of a module, so that one program serves all arguments.
  """
  optimizer = optax.lbfgs()

  def value(params):
    return loss(params, *arguments)

  slope = optax.value_and_grad_from_state(value)

  def body(carry, _):
    params, state = carry
    found, gradient = slope(params, state=state)
    updates, state = optimizer.update(
      gradient, state, params, value=found, grad=gradient, value_fn=value
    )
    return (optax.apply_updates(params, updates), state), None

  first = params, optimizer.init(params)
  return jax.lax.scan(body, first, length=steps)[0][0]


def _slope(objective, clusters, c_ER, seen_ETRV, gram_RR):
  """What is predicted, and `∂/∂C` of `smooth` times the total weight."""
  p_ETV = einsum('er,etrv->etv', c_ER, seen_ETRV)
  slope_ETV = answer_slope(objective, clusters, p_ETV)
  pull_ER = 2 * objective.ridge * c_ER
  if objective.graph_EE is not None:
    coupled_ER = einsum('ef,fr->er', objective.graph_EE, c_ER)
    pull_ER += 4 * objective.similarity * coupled_ER
  slope_ER = einsum('etrv,etv->er', seen_ETRV, slope_ETV)
  return p_ETV, slope_ER + einsum('er,rs->es', pull_ER, gram_RR)


def _direction(objective, c_ER, slope_ER, curve_ERR, gram_RR, iterations):
  """Minimiser of the quadratic model at `c_ER`, less `c_ER`."""
  factor = _factor(curve_ERR)
  graph_EE, pull = objective.graph_EE, 4 * objective.similarity

  def curve(x_ER):
    out_ER = einsum('ers,es->er', curve_ERR, x_ER)
    if graph_EE is not None:
      out_ER += pull * einsum('ef,fs,rs->er', graph_EE, x_ER, gram_RR)
    return out_ER

  if objective.sparsity:
    # A graph's Laplacian is at most twice its degrees.
    bound_E = jnp.linalg.eigvalsh(curve_ERR)[:, -1]
    if graph_EE is not None:
      top = jnp.linalg.eigvalsh(gram_RR)[-1]
      bound_E += 2 * pull * top * jnp.diagonal(graph_EE)
    rate_E1 = 1 / jnp.maximum(bound_E, _TINY)[:, None]
    limit_E1 = rate_E1 * objective.sparsity

    def proximal(_, x_ER):
      x_ER = x_ER - rate_E1 * (slope_ER + curve(x_ER - c_ER))
      return jnp.sign(x_ER) * jnp.maximum(jnp.abs(x_ER) - limit_E1, 0)

    return jax.lax.fori_loop(0, iterations, proximal, c_ER) - c_ER
  if graph_EE is None:
    return _batch_solve(factor, -slope_ER)
  degree_E11 = jnp.diagonal(graph_EE)[:, None, None]
  factor = _factor(curve_ERR + pull * degree_E11 * gram_RR[None])
  return cg(
    curve,
    -slope_ER,
    tol=1e-6,
    maxiter=iterations,
    M=lambda x_ER: _batch_solve(factor, x_ER),
  )[0]


def _curvature(objective, clusters, c_ER, seen_ETRV, gram_RR):
  """Gauss-Newton matrix of each member's coefficients, `[E, R, R]`."""
  share, weight_ET = objective.cosine, clusters.weight_ET
  square_ET = 2 * (1 - share) * weight_ET
  curve_ERR = 2 * objective.ridge * gram_RR[None]
  if share:
    p_ETV = einsum('er,etrv->etv', c_ER, seen_ETRV)
    length_ET = jnp.maximum(jnp.sum(p_ETV**2, -1), 1e-12)
    angle_ET = share * weight_ET / length_ET
    square_ET += angle_ET
    along_ETR = einsum('etrv,etv->etr', seen_ETRV, p_ETV)
    curve_ERR -= einsum(
      'et,etr,ets->ers', angle_ET / length_ET, along_ETR, along_ETR
    )
  return curve_ERR + einsum(
    'et,etrv,etsv->ers', square_ET, seen_ETRV, seen_ETRV
  )


def _shorten(objective, clusters, c_ER, step_ER, seen_ETRV, gram_RR):
  """The best of the steps `2^-j`, j = 0..9, and none; by member if free."""
  p_ETV = einsum('er,etrv->etv', c_ER, seen_ETRV)
  change_ETV = einsum('er,etrv->etv', step_ER, seen_ETRV)

  def judge(length):
    x_ER = c_ER + length * step_ER
    row_ET = rows(objective, p_ETV + length * change_ETV, clusters.a_ETV)
    value_E = jnp.sum(clusters.weight_ET * row_ET, -1)
    value_E += objective.ridge * einsum('er,rs,es->e', x_ER, gram_RR, x_ER)
    value_E += objective.sparsity * jnp.abs(x_ER).sum(-1)
    if objective.graph_EE is None:
      return value_E
    whole = value_E.sum() + 2 * objective.similarity * einsum(
      'er,ef,fs,rs->', x_ER, objective.graph_EE, x_ER, gram_RR
    )
    return jnp.broadcast_to(whole, value_E.shape)

  lengths_S = jnp.append(0.0, 0.5 ** jnp.arange(10))
  value_SE = jax.lax.map(judge, lengths_S)
  value_SE = jnp.where(jnp.isfinite(value_SE), value_SE, jnp.inf)
  return c_ER + lengths_S[jnp.argmin(value_SE, 0)][:, None] * step_ER


def _damping(objective, clusters, c_ER):
  """`_DAMP` of the mean diagonal of the basis' system."""
  q_ETD, _, weight_ET = clusters
  square_E = jnp.sum(c_ER**2, -1)
  trace = einsum('e,et,etd,etd->', square_E, weight_ET, q_ETD, q_ETD)
  size = c_ER.shape[1] * q_ETD.shape[2]
  penalty = jnp.trace(coupling(objective, c_ER)) / c_ER.shape[1]
  return _DAMP * (trace / size + penalty) + _TINY


def _factor(system, extra=0.0, damp=_DAMP):
  """Cholesky factor of a (batch of a) damped system."""
  size = system.shape[-1]
  mean = jnp.trace(system, axis1=-2, axis2=-1) / size
  shift = (damp * mean + extra + _TINY)[..., None, None]
  eye = jnp.eye(size).reshape((1,) * (system.ndim - 2) + (size, size))
  return cho_factor(system + shift * eye)


def _batch_solve(factor, x_ER):
  return cho_solve((factor[0], factor[1]), x_ER[..., None])[..., 0]
