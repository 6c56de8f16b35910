"""Training by exact fits in turn instead of gradients of the task's loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recursive_weights.basis import clusters as clusters_lib
from recursive_weights.basis import fit as fit_lib
from recursive_weights.basis import initial, lagrangian, methods
from recursive_weights.basis import objective as objective_lib
from recursive_weights.interfaces import Task, UserError
from recursive_weights.training import devices
from recursive_weights.training.state import State


def make(
  task: Task,
  *,
  rank: int,
  identity: bool,
  ridge: float = 1.0,
  cosine: float = 0.0,
  sparsity: float = 0.0,
  similarity: float = 0.0,
  solver: fit_lib.Solver = 'auto',
  orthonormalise_every: int = 1,
  refresh_every: int = 0,
  warm_steps: int = 0,
):
  """`(init, make_step)` of an experiment whose step is one of `basis.fit`.

  Every step sees all training questions of the task, whatever the batch; the
  members are split over the devices, but under pmap, which repeats the fit. Its
  metrics are `loss`, the objective, and those of `fit.make`; `gradient_norm` is
  the tangent gradient, 0 where the Lagrangian is stationary; `multiplier` is
  the largest of those of the basis, which is 0 there without sparsity.

  Args:
    rank, identity: those of the model `shared_basis`.
    ridge, cosine, sparsity, similarity: see `basis.objective.make`; similarity
      is that of the nearest answers.
    solver, orthonormalise_every, refresh_every: see `basis.fit.make`.
    warm_steps: least squares steps with ridge 1 that the start has behind it.

  Raises:
    UserError: the task has neither answers nor pairs, or a field is out of
      range.
  """
  if identity and cosine:
    raise UserError(
      'cosine must be 0 with identity, where what the question leaves of the '
      f'answer is fitted, got {cosine}'
    )
  inputs, size = task.spec.inputs, task.spec.sizes['train']
  pairs = task.answers is None
  flat = len(getattr(inputs, 'shape', ())) == 1
  odd = flat and inputs.shape[0] % 2
  if size is None or not flat or (pairs and (identity or similarity or odd)):
    raise UserError(
      'step alternating needs a task with answers to retrieve, or one with '
      f'pairs as inputs, identity False and similarity 0; got inputs {inputs}, '
      f'identity {identity}, similarity {similarity}'
    )
  batch = task.batch('train', 0, size)
  # The order of the task's seed must not matter.
  order = np.lexsort((*batch['inputs'].T, batch['targets']))
  q_BD, member_B = batch['inputs'][order], batch['targets'][order]
  if pairs:
    q_BD, a_BV = np.split(q_BD, 2, -1)
  else:
    a_BV = np.asarray(task.answers)[member_B]
  clusters = clusters_lib.group(
    q_BD,
    a_BV - q_BD if identity else a_BV,
    member_B,
    task.spec.classes,
    allow_empty=True,
  )
  clusters_lib.check(clusters, rank)
  coupled = {}
  if similarity:
    answers_EV = jnp.asarray(task.answers)
    coupled = {'similarity_EE': methods.answer_graph(answers_EV)}
  objective = objective_lib.make(
    cosine=cosine,
    ridge=ridge,
    sparsity=sparsity,
    similarity=similarity,
    **coupled,
  )
  fit = fit_lib.make(
    objective,
    solver=solver,
    orthonormalise_every=orthonormalise_every,
    refresh_every=refresh_every,
  )

  def pack(state, key):
    return State(
      params={
        'coefficients': state.coefficients_ER,
        'basis': state.basis_RDV,
      },
      opt_state=(
        state.slope_RDV,
        state.objective,
        state.tangent,
        state.optimizer,
      ),
      ema={},
      carry={},
      step=state.step,
      key=key,
    )

  def init(seed):
    key, start_key = jax.random.split(jax.random.key(seed))
    basis_RDV = initial.from_ridge(clusters, rank, start_key)
    if warm_steps:
      basis_RDV = initial.from_stronger_ridge(
        clusters, basis_RDV, steps=warm_steps
      )
    return pack(fit.init(clusters, basis_RDV), jax.random.key_data(key))

  def step(clusters, state):
    inner = fit_lib.State(
      state.params['coefficients'],
      state.params['basis'],
      *state.opt_state,
      state.step,
    )
    inner, found = fit.step(clusters, inner)
    c_ER = inner.coefficients_ER
    basis_RR = lagrangian.multipliers(
      objective,
      clusters,
      c_ER,
      inner.basis_RDV,
      orthonormal=bool(orthonormalise_every),
      # The multipliers of the basis need no slope of the coefficients.
      slopes=(jnp.zeros_like(c_ER), inner.slope_RDV),
    ).basis_RR
    found = {
      'loss': found.pop('objective'),
      'gradient_norm': found.pop('tangent'),
      'multiplier': jnp.max(jnp.abs(basis_RR)),
    } | found
    metrics = {k: jnp.asarray(x, jnp.float32) for k, x in found.items()}
    finite = jnp.isfinite(metrics['loss'])
    metrics['finite'] = finite.astype(jnp.float32)
    new = pack(inner, state.key)
    return jax.tree.map(
      lambda a, b: jnp.where(finite, a, b), new, state
    ), metrics

  def make_step(axis):
    if axis is not None:
      return lambda state, batch: step(clusters, state)
    # Members that no number of devices divides are split as far as they go.
    rows = NamedSharding(devices.make_mesh(), P('data'))

    def split(state, batch):
      del batch
      return step(jax.lax.with_sharding_constraint(clusters, rows), state)

    return split

  return init, make_step
