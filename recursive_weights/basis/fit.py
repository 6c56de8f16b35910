"""Coefficients and basis in turn: recursion over optimisation."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recursive_weights.basis import lagrangian, solve, subspace
from recursive_weights.basis.clusters import Clusters, check
from recursive_weights.basis.objective import (
  Objective,
  basis_slope,
  value_at,
)
from recursive_weights.interfaces import Array, Metrics, UserError

Solver = Literal['auto', 'direct', 'dual', 'cg', 'gradient']


class State(NamedTuple):
  """Where a fit stands: all that a checkpoint needs.

  slope_RDV: ∂L/∂G of the smooth terms.
  """

  coefficients_ER: Array
  basis_RDV: Array
  slope_RDV: Array
  objective: Array
  tangent: Array
  optimizer: Any
  step: Array


class _Point(NamedTuple):
  """Coefficients solved for at a basis; see `solve.Solved`."""

  solved: solve.Solved
  basis_RDV: Array
  objective: Array


class Fit(NamedTuple):
  """A fit of one objective.

  init: `(clusters, basis_RDV) -> State`; coefficients are solved for.
  step: `(clusters, state) -> (state, metrics)`: the loop's step, and the body
    of a scan. Metrics: `objective`; `tangent`, see `lagrangian`; `length`, of
    the step of the basis, 0 where none lowered the objective; `rank`, how many
    bases are independent.
  """

  init: Callable[[Clusters, Array], State]
  step: Callable[[Clusters, State], tuple[State, Metrics]]


def make(
  objective: Objective,
  *,
  solver: Solver = 'auto',
  direct_limit: int = 4096,
  iterations: int = 100,
  sweeps: int = 3,
  orthonormalise_every: int = 1,
  refresh_every: int = 0,
  optimizer: optax.GradientTransformation | None = None,
  halvings: int = 12,
) -> Fit:
  """The alternating fit of `W_i = Σ_k c_ik G_k`.

  A step proposes a basis, brings it back to norm 1 (or to an orthonormal one),
  solves for the coefficients again, and halves its length until the objective
  falls; else everything stays. So the objective never rises, and what is
  reported belongs to the coefficients that are reported.

  Args:
    objective: from `objective.make`.
    solver: of the basis. 'direct', 'dual' and 'cg' are exact least squares, for
      the squared error alone; 'gradient' follows `optimizer`; 'auto' takes
      'gradient' where the cosine counts, 'dual' where questions are fewer than
      half of R D and there is a ridge, else 'direct' up to `direct_limit`.
    direct_limit: largest R D, or number of questions, for a Cholesky factor.
    iterations: of conjugate and proximal gradients.
    sweeps: Gauss-Newton steps of the coefficients where the cosine counts.
    orthonormalise_every: steps between orthonormalisations; 0 is never. Norms
      are 1 after every step.
    refresh_every: steps between attempts to put the leading direction of the
      members' gradients in the place of the basis used least; 0 is never.
    optimizer: of 'gradient'; None for L-BFGS.
    halvings: of the length, before a step is given up.

  Without sparsity the objective depends on the W_i alone: no choice of bases
  within their span, and no orthonormalisation, changes it.

  Source: UnifyWeaver, Smoothing Basis for Multi-Cluster Projection, 2025, as
  proposed with a gradient step on the basis, at a fixed rate.

  Raises:
    UserError: a field out of range; least squares asked of the cosine.
  """
  if solver not in ('auto', 'direct', 'dual', 'cg', 'gradient'):
    raise UserError(
      f'solver must be one of auto, direct, dual, cg, gradient, got {solver!r}'
    )
  if objective.cosine and solver in ('direct', 'dual', 'cg'):
    raise UserError(
      f'solver {solver} is exact least squares, so cosine must be 0, got '
      f"{objective.cosine}; take 'gradient'"
    )
  for name, x, least in (
    ('direct_limit', direct_limit, 0),
    ('iterations', iterations, 1),
    ('sweeps', sweeps, 1),
    ('orthonormalise_every', orthonormalise_every, 0),
    ('refresh_every', refresh_every, 0),
    ('halvings', halvings, 0),
  ):
    if x < least:
      raise UserError(f'{name} must be >= {least}, got {x}')
  if solver == 'auto' and objective.cosine:
    solver = 'gradient'
  if optimizer is None:
    optimizer = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0))
  sweeps = sweeps if objective.cosine else 1

  def resolve(clusters, c_ER, basis_RDV):
    solved = solve.solved(
      objective,
      clusters,
      c_ER,
      basis_RDV,
      sweeps=sweeps,
      iterations=iterations,
    )
    c_ER, p_ETV, _ = solved
    gram_RR = subspace.inner(basis_RDV, basis_RDV)
    reached = value_at(objective, clusters, p_ETV, c_ER, gram_RR)
    return _Point(solved, basis_RDV, reached)

  def settle(clusters, point, optimizer, step):
    """The state at a point."""
    c_ER, p_ETV, slope_ER = point.solved
    basis_RDV = point.basis_RDV
    slope_RDV = basis_slope(objective, clusters, p_ETV, c_ER, basis_RDV)
    found = lagrangian.multipliers(
      objective,
      clusters,
      c_ER,
      basis_RDV,
      orthonormal=bool(orthonormalise_every),
      slopes=(slope_ER, slope_RDV),
    )
    tangent = lagrangian.tangent(objective, clusters, c_ER, found)
    return State(
      c_ER, basis_RDV, slope_RDV, point.objective, tangent, optimizer, step
    )

  def init(clusters, basis_RDV):
    check(
      clusters,
      basis_RDV.shape[0],
      basis_RDV=basis_RDV,
      graph_EE=objective.graph_EE,
    )
    retract = subspace.normalise
    if orthonormalise_every:
      retract = subspace.orthonormalise
    basis_RDV = retract(basis_RDV)
    zero_ER = jnp.zeros((clusters.q_ETD.shape[0], basis_RDV.shape[0]))
    # The cosine has no gradient at 0.
    square = objective._replace(cosine=0.0, sparsity=0.0)
    c_ER = solve.coefficients(
      square, clusters, zero_ER, basis_RDV, iterations=iterations
    )
    return settle(
      clusters,
      resolve(clusters, c_ER, basis_RDV),
      optimizer.init(basis_RDV) if solver == 'gradient' else (),
      jnp.zeros((), jnp.int32),
    )

  def propose(clusters, state):
    c_ER, basis_RDV = state.coefficients_ER, state.basis_RDV
    rank, width, _ = basis_RDV.shape
    if solver == 'gradient':
      # At the solved coefficients this is the gradient of their minimum.
      slope_RDV = state.slope_RDV
      change_RDV, new = optimizer.update(slope_RDV, state.optimizer, basis_RDV)
      falls = jnp.sum(change_RDV * slope_RDV) < 0
      return jnp.where(falls, change_RDV, -slope_RDV), new
    questions = clusters.weight_ET.size
    few = 2 * questions < rank * width and questions <= direct_limit
    if solver == 'dual' or (solver == 'auto' and few and objective.ridge):
      return solve.basis_dual(objective, clusters, c_ER, basis_RDV), ()
    direct = rank * width <= direct_limit
    if solver == 'direct' or (solver == 'auto' and direct):
      return solve.basis_direct(objective, clusters, c_ER, basis_RDV), ()
    return solve.basis_cg(
      objective, clusters, c_ER, basis_RDV, iterations=iterations
    ), ()

  def descend(clusters, state, change_RDV, due):
    """The first length `2^-j` at which the objective falls."""

    def attempt(length):
      moved_RDV = state.basis_RDV + length * change_RDV
      basis_RDV = jax.lax.cond(
        due, subspace.orthonormalise, subspace.normalise, moved_RDV
      )
      # Start where the change of basis alone leaves the members' weights.
      back_RR = subspace.inner(state.basis_RDV, basis_RDV)
      return resolve(clusters, state.coefficients_ER @ back_RR, basis_RDV)

    def going(carry):
      j, point = carry
      return (j <= halvings) & ~(point.objective <= state.objective)

    def body(carry):
      j, _ = carry
      return j + 1, attempt(0.5 ** (j + 1.0))

    j, point = jax.lax.while_loop(
      going, body, (jnp.zeros((), jnp.int32), attempt(1.0))
    )
    return point, jnp.where(j <= halvings, 0.5**j, 0.0)

  def refresh(clusters, state):
    """Puts the leading direction of the gradients where least is used."""
    fresh_DV = _residual_direction(objective, clusters, state)
    weakest = jnp.argmin(jnp.sum(state.coefficients_ER**2, 0))
    basis_RDV = subspace.normalise(state.basis_RDV.at[weakest].set(fresh_DV))
    if orthonormalise_every:
      basis_RDV = subspace.orthonormalise(basis_RDV)
    point = resolve(clusters, state.coefficients_ER, basis_RDV)
    return _better(state, settle(clusters, point, state.optimizer, state.step))

  def step(clusters, state):
    change_RDV, new = propose(clusters, state)
    due = jnp.asarray(False)
    if orthonormalise_every:
      due = (state.step + 1) % orthonormalise_every == 0
    point, length = descend(clusters, state, change_RDV, due)
    if solver == 'gradient':
      # What the optimizer remembers has led nowhere.
      fresh = optimizer.init(state.basis_RDV)
      new = jax.tree.map(
        lambda a, b: jnp.where(length > 0, a, b),
        new,
        fresh,
      )
    state = _better(state, settle(clusters, point, new, state.step))
    state = state._replace(optimizer=new)
    if refresh_every:
      state = jax.lax.cond(
        (state.step + 1) % refresh_every == 0,
        lambda s: refresh(clusters, s),
        lambda s: s,
        state,
      )
    state = state._replace(step=state.step + 1)
    return state, _metrics(state, length)

  return Fit(init, step)


def run(
  fit: Fit,
  clusters: Clusters,
  state: State,
  *,
  steps: int,
  tolerance: float = 0.0,
) -> tuple[State, Metrics]:
  """`fit.step` until the tangent gradient is below `tolerance`, by `lax.scan`.

  Returns:
    The state, and metrics `[steps]`; after the end they repeat the last ones.
  """

  def body(carry, _):
    state, metrics = jax.lax.cond(
      carry[0].tangent > tolerance,
      lambda carry: fit.step(clusters, carry[0]),
      lambda carry: carry,
      carry,
    )
    return (state, metrics), metrics

  first = state, _metrics(state, jnp.zeros(()))
  (state, _), metrics = jax.lax.scan(body, first, length=steps)
  return state, metrics


def _residual_direction(objective, clusters, state):
  slope_ETV = lagrangian.slope(
    objective, clusters, state.coefficients_ER, state.basis_RDV
  )
  key = jax.random.fold_in(jax.random.key(0), state.step)
  return subspace.leading(clusters.q_ETD, slope_ETV, 1, key, passes=5)[0]


def _metrics(state, length):
  gram_RR = subspace.inner(state.basis_RDV, state.basis_RDV)
  return {
    'objective': state.objective,
    'tangent': state.tangent,
    'length': length,
    'rank': jnp.sum(jnp.linalg.eigvalsh(gram_RR) > 1e-3),
  }


def _better(state, found):
  """`found` where its objective is no higher, else `state`."""
  better = found.objective <= state.objective
  return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, state)
