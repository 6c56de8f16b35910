"""How near is the basis that was found to the one that was planted?"""

import jax
import jax.numpy as jnp

from recursive_weights import interfaces
from recursive_weights.basis import subspace
from recursive_weights.interfaces import UserError


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
) -> interfaces.Evaluator:
  """Spans and coefficients beside those that made the data, `Task.planted`.

  A basis is told up to a change within its span, so spans are compared, and
  coefficients c once they stand on the planted basis, where c° are the planted
  ones (`subspace.cosines`, `subspace.coordinates`):

    cosine@k      cos of the k-th principal angle of the spans, from the least
    coefficients  |c M - c°|² / |c°|²,  G ≈ M O

  Args:
    objective, batch_size: not used: no row is read.

  Returns:
    An evaluator whose keys are `recovery/cosine@1` to that of the smaller span,
    which is the worst and `recovery/least_cosine` too, and
    `recovery/coefficients`.

  Raises:
    UserError: the task has no planted basis, or the model none of its size.
  """
  del objective, batch_size
  if task.planted is None:
    raise UserError(
      'recovery needs a task whose basis is known, such as planted_basis'
    )
  truth = jax.tree.map(jnp.asarray, task.planted)
  example = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), task.spec.inputs
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)
  if 'basis' not in shapes or (
    shapes['basis'].shape[1:] != truth['basis'].shape[1:]
  ):
    raise UserError(
      'recovery needs a model with a basis of matrices '
      f'{truth["basis"].shape[1:]}, such as shared_basis'
    )

  @jax.jit
  def judge(params):
    found = params['coefficients'], params['basis']
    cosine_R = subspace.cosines(params['basis'], truth['basis'])
    c_ER = subspace.coordinates(*found, truth['basis'])
    off = jnp.sum((c_ER - truth['coefficients']) ** 2)
    return cosine_R, off / jnp.sum(truth['coefficients'] ** 2)

  def evaluate(params, key):
    del key
    cosine_R, off = jax.device_get(judge(params))
    by_angle = {f'recovery/cosine@{k}': x for k, x in enumerate(cosine_R, 1)}
    result = by_angle | {
      'recovery/least_cosine': cosine_R[-1],
      'recovery/coefficients': off,
    }
    return {name: float(x) for name, x in result.items()}

  return evaluate
