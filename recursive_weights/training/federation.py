"""Members trained apart, each with its own copy of the centre, agree on it.

Every so often copies of the centre are mixed; operators never are, so what a
member has learnt about its domain stays. How far copies have drifted, and how
much each counts, is logged.

Source: examiner-ctm v5.3, Fed-HIRE. There the centre was copied over whole
specialists, which wiped them at each synchronisation, and weights were
accuracies on different domains.
"""

import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import (
  Array,
  Model,
  Objective,
  Task,
  Tree,
  UserError,
)
from recursive_weights.models import specialists
from recursive_weights.training import metrics
from recursive_weights.training.state import State

TOPOLOGIES = ('hub', 'ring')


def make(
  model: Model,
  task: Task,
  objective: Objective,
  *,
  every: int,
  topology: str,
  rate: float,
  temperature: float,
  batches: int,
  batch_size: int,
  output_dir: str = '',
) -> tuple[int, Callable[[State], State]]:
  """`(every, f)` for `Experiment.every`, where f synchronises a state.

  Copies of the centre, without operators, are judged on validation rows of all
  domains, the same for all; see `shares` and `mixing` for what follows.
  Parameters and their average are mixed alike; moments stay as they are.

  Args:
    model: `models.specialists` with `apart`.
    every: steps between synchronisations.
    topology, rate: see `mixing`.
    temperature: see `shares`.
    batches, batch_size: their product is the number of validation rows.
    output_dir: `federation.jsonl` is written there, nothing where ''. A line
      has step, loss, share and drift by domain.

  Raises:
    UserError: an argument is out of range, the model has no copies, or there
      are fewer rows than domains.
  """
  check(every, topology, rate, temperature, batches)
  example = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), task.spec.inputs
  )
  shapes = jax.eval_shape(
    lambda key: model.init(key, example), jax.random.key(0)
  )
  if not isinstance(shapes, dict) or 'centres' not in shapes:
    raise UserError(
      'federation needs members with copies of the centre: model specialists '
      'with apart=True'
    )
  names = task.spec.domains
  joined = spaced(task, batches * batch_size)

  @jax.jit
  def judge(params):
    # Of this only operators are used, which begin as the identity.
    start = model.init(jax.random.key(0), joined['inputs'])
    centres = specialists.at_start(params, start)

    def one(index):
      own = joined['inputs']['domain']
      inputs = joined['inputs'] | {'domain': jnp.full_like(own, index)}
      outputs, _ = model.apply(
        centres, model.carry(centres, len(own)), inputs, key=None, train=False
      )
      loss_B, _ = task.loss(objective.answer(outputs), joined)
      weight_B = joined['weight']
      return (loss_B * weight_B).sum() / weight_B.sum()

    return jax.lax.map(one, jnp.arange(len(names)))

  def synchronised(state):
    judged = state.ema or state.params
    loss_E = np.asarray(judge(judged))
    share_E = shares(loss_E, temperature)
    matrix_EE = mixing(share_E, topology, rate)
    if output_dir and jax.process_index() == 0:
      line = {'step': int(state.step)}
      for name, values_E in (
        ('loss', loss_E),
        ('share', share_E),
        ('drift', np.asarray(drift(state.params))),
      ):
        pairs = zip(names, values_E, strict=True)
        line |= metrics.finite({f'{name}/{n}': float(x) for n, x in pairs})
      _log(pathlib.Path(output_dir) / 'federation.jsonl', line)
    params, ema = (
      synchronise(tree, matrix_EE) if tree else tree
      for tree in (state.params, state.ema)
    )
    return state._replace(params=params, ema=ema)

  return every, synchronised


def spaced(task: Task, count: int) -> Tree:
  """A batch of validation rows, evenly spaced, so some are of every domain.

  Raises:
    UserError: there are fewer than domains.
  """
  total = task.spec.sizes['validation'] or 0
  domains = len(task.spec.domains)
  if count < domains:
    raise UserError(
      f'federation.batches must give a row to each of {domains} domains, got '
      f'{count} rows: make batches or batch_size larger'
    )
  row_B = np.arange(min(count, total)) * total // min(count, total)
  batch = task.batch('validation', 0, total)
  return jax.tree.map(lambda x: x[row_B], batch)


def check(every, topology, rate, temperature, batches) -> None:
  """Raises `UserError` where an argument is out of range."""
  if every < 1 or batches < 1:
    raise UserError(
      f'federation needs every > 0 and batches > 0, got {every} and {batches}'
    )
  if topology not in TOPOLOGIES:
    raise UserError(
      f'federation.topology must be one of {TOPOLOGIES}, got {topology!r}'
    )
  if not 0 <= rate <= 1:
    raise UserError(f'federation.rate must lie in [0, 1], got {rate}')
  if temperature <= 0:
    raise UserError(f'federation.temperature must be > 0, got {temperature}')


def shares(loss_E: np.ndarray, temperature: float) -> np.ndarray:
  """`softmax(-loss / temperature)`, float64 `[E]`; 0 where it is not finite.

  So a member that is gone, or has diverged, neither gives nor takes.
  """
  loss_E = np.asarray(loss_E, np.float64)
  here_E = np.isfinite(loss_E)
  if not here_E.any():
    raise UserError('no member has a finite loss: nothing to synchronise')
  above_E = np.where(here_E, loss_E, np.inf) - loss_E[here_E].min()
  weight_E = np.exp(-above_E / temperature)
  return weight_E / weight_E.sum()


def mixing(share_E: np.ndarray, topology: str, rate: float) -> np.ndarray:
  """`M [E, E]` of `C_i <- sum_j M_ij C_j`; rows sum to 1.

    hub   C_i <- (1 - rate) C_i + rate sum_j share_j C_j
    ring  C_i <- (1 - rate) C_i + rate (C_before + C_after) / 2

  Of members with share 0 nobody takes, and they keep what they have; the ring
  closes over them.
  """
  size = len(share_E)
  here = np.flatnonzero(share_E > 0)
  matrix_EE = np.eye(size)
  matrix_EE[here, here] = 1 - rate
  for place, i in enumerate(here):
    if topology == 'hub':
      matrix_EE[i] += rate * share_E
    else:
      for j in (here[place - 1], here[(place + 1) % len(here)]):
        matrix_EE[i, j] += rate / 2
  return matrix_EE


def synchronise(params: Tree, matrix_EE: np.ndarray) -> Tree:
  """Copies of the centre mixed by `mixing`; members' operators as they were."""
  absent_E = np.asarray(matrix_EE).diagonal() == 1

  def mix(x_E):
    # A copy of NaNs has weight 0, and 0 times NaN is NaN.
    seen_E = jnp.where(_column(absent_E, x_E), 0, x_E)
    mixed_E = jnp.tensordot(
      jnp.asarray(matrix_EE, x_E.dtype), seen_E, 1, precision='highest'
    )
    return jnp.where(_column(absent_E, x_E), x_E, mixed_E)

  return params | {'centres': jax.tree.map(mix, params['centres'])}


def aggregate(params: Tree, share_E: np.ndarray) -> Tree:
  """One member: the centre by shares, and, apart from it, operators by shares.

  What a newcomer begins with, by `specialists.grow`.
  """
  matrix_1E = jnp.asarray(share_E, jnp.float32)[None]

  def mean(x_E):
    return jnp.tensordot(matrix_1E, x_E, 1, precision='highest')

  return params | {
    part: jax.tree.map(mean, params[part])
    for part in specialists.BY_MEMBER
    if part in params
  }


def drift(params: Tree) -> Array:
  """`|C_i - mean_j C_j| / |mean_j C_j|` of every copy of the centre, `[E]`."""
  leaves = jax.tree.leaves(params['centres'])
  flat_EN = jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], 1)
  mean_1N = flat_EN.mean(0, keepdims=True)
  return jnp.linalg.norm(flat_EN - mean_1N, axis=1) / jnp.linalg.norm(mean_1N)


def rejoin(state: State, index: int, saved: State) -> State:
  """A member back with what it had: centre, operators, average and moments.

  Args:
    index: of the member.
    saved: a state that has it, such as an earlier checkpoint. The others stay
      as they are in `state`, bit for bit.
  """

  def back(path, now, then):
    names = {getattr(part, 'key', None) for part in path}
    if not names & set(specialists.BY_MEMBER):
      return now
    return now.at[index].set(then[index])

  return jax.tree_util.tree_map_with_path(back, state, saved)


def _column(x_E, like):
  return jnp.asarray(x_E).reshape(-1, *(1,) * (like.ndim - 1))


def _log(path, line):
  """Adds a line; lines of this step and later ones are written again."""
  kept = [x for x in metrics.read(path) if x['step'] < line['step']]
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix('.part')
  part.write_text(''.join(f'{json.dumps(x)}\n' for x in [*kept, line]))
  os.replace(part, path)
