"""Averages over a split, in which padding rows do not count."""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import UserError


def check(task, splits, batch_size, max_batches) -> None:
  """Raises `UserError` where the splits cannot be walked."""
  if batch_size < 1:
    raise UserError(f'batch_size must be > 0, got {batch_size}')
  if max_batches is not None and max_batches < 1:
    raise UserError(f'max_batches must be > 0 or None, got {max_batches}')
  for split in splits:
    if split not in task.spec.sizes:
      raise UserError(
        f'splits must be among {tuple(task.spec.sizes)}, got {split!r}'
      )
    if task.spec.sizes[split] == 0:
      raise UserError(
        f'split {split!r} has no examples: leave it out of the splits to '
        'evaluate, or give the task data that fill it'
      )
    if task.spec.sizes[split] is None and max_batches is None:
      raise UserError(
        f'split {split!r} has no end: give max_batches, got max_batches=None'
      )


def masked_sums(values: dict, weight_B) -> dict:
  """`sum_b weight_b value_b` over the last axis of every value, float32.

  Rows of weight 0 are left out, not multiplied: theirs may be NaN.
  """

  def total(value):
    weight = jnp.broadcast_to(weight_B.astype(jnp.float32), value.shape)
    product = weight * value.astype(jnp.float32)
    return jnp.where(weight > 0, product, 0).sum(axis=-1)

  return {name: total(value) for name, value in values.items()}


def beside(params, carry):
  """The carry where a program leaves it, so that the next one is the same."""
  sharding = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(
      sharding.mesh, jax.sharding.PartitionSpec()
    )
  return jax.device_put(carry, sharding)


def over_split(judge, task, split, *, batch_size, max_batches) -> dict:
  """Weighted means over one split.

  Args:
    judge: `batch -> (sums, weight)` of one batch, each sum an array of any
      shape.

  Returns:
    The same dict with float64 NumPy arrays, NaN where no row has a weight.
  """
  examples = task.spec.sizes[split]
  batches = max_batches
  if examples is not None:
    batches = -(-examples // batch_size)
    if max_batches is not None:
      batches = min(batches, max_batches)

  # The device works on one batch while the host prepares the next.
  results = [judge(task.batch(split, i, batch_size)) for i in range(batches)]
  sums, weights = zip(*jax.device_get(results), strict=True)
  weight = sum(float(x) for x in weights) or float('nan')
  return {
    name: sum(x[name].astype('float64') for x in sums) / weight
    for name in sums[0]
  }


def by_split(judge, task, splits, *, batch_size, max_batches) -> dict:
  """`{SPLIT/NAME: array}` of `over_split` for every split."""
  result: dict = {}
  for split in splits:
    means = over_split(
      judge, task, split, batch_size=batch_size, max_batches=max_batches
    )
    result |= {f'{split}/{name}': mean for name, mean in means.items()}
  return result
