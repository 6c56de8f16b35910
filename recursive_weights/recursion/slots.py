"""Deep supervision: one optimizer step after every step of a recursion.

A slot holds one example, already augmented, and the model's carry for it.
Each training step goes on from the carry by one step of the recursion. When
the halting head says that the answer is right, or after the largest number of
steps, the slot has halted, and at the next training step it takes the row that
is then offered, and starts afresh. Rows offered to the other slots are not
used.

Source: A. Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny
Networks, 2025 (arXiv 2510.04871), section 2.4; adaptive computation with
exploration from G. Wang et al., 2025 (arXiv 2506.21734).
"""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Slots


def make(
  *, steps: int = 16, explore: float = 0.1, empty_every: int = 0
) -> Slots:
  """Slots that halt at `halt > 0` or after `steps`, whichever is first.

  At every training step a row draws m ~ U{2, ..., steps} with probability
  `explore`, and does not halt then before its step m. The published code draws
  at every step too; one draw for an example would hold that share of them for
  half of `steps`.

  Args:
    steps: largest number of recursion steps of an example.
    explore: probability of a least number of steps, of a row and step.
    empty_every: every so many training steps all slots are emptied, whatever
      they hold, so that a checkpoint of such a step needs none of them; 0 for
      never.

  Raises:
    ValueError: an argument is out of range.
  """
  if steps < 1:
    raise ValueError(f'steps must be > 0, got {steps}')
  if not 0 <= explore <= 1:
    raise ValueError(f'explore must lie in [0, 1], got {explore}')
  if empty_every < 0:
    raise ValueError(f'empty_every must be >= 0, got {empty_every}')

  def start(batch, carry, metrics):
    size = batch['weight'].shape[0]
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), (batch, carry, metrics)
    )
    return {
      'batch': zeros[0],
      'carry': zeros[1],
      'steps': jnp.zeros([size], jnp.int32),
      'halted': jnp.ones([size], bool),
      'finished': {
        'metrics': zeros[2],
        'steps': jnp.zeros([size], jnp.int32),  # 0: nothing has finished
        'weight': jnp.zeros([size], jnp.float32),
      },
    }

  def refill(slots, batch, fresh_carry, step):
    halted_B = slots['halted']
    finished = slots['finished']
    if empty_every:
      empty = step % empty_every == 0
      halted_B = halted_B | empty
      finished = jax.tree.map(
        lambda x: jnp.where(empty, jnp.zeros_like(x), x), finished
      )
    new = {'batch': batch, 'carry': fresh_carry}
    old = {name: slots[name] for name in new}
    kept = jax.tree.map(lambda a, b: _rows(halted_B, a, b), new, old)
    return (
      slots
      | kept
      | {
        'steps': jnp.where(halted_B, 0, slots['steps']),
        'halted': jnp.zeros_like(halted_B),
        'finished': finished,
      }
    )

  def explored(key, size):
    which, number = jax.random.split(key)
    least_B = jax.random.randint(number, [size], min(2, steps), steps + 1)
    explores_B = jax.random.bernoulli(which, explore, [size])
    return jnp.where(explores_B, least_B, 0)

  def advance(slots, carry, halt_B, least_B, metrics):
    steps_B = slots['steps'] + 1
    halted_B = (halt_B > 0) & (steps_B >= least_B)
    halted_B = halted_B | (steps_B >= steps)
    now = {
      'metrics': metrics,
      'steps': steps_B,
      'weight': slots['batch']['weight'].astype(jnp.float32),
    }
    return slots | {
      'carry': carry,
      'steps': steps_B,
      'halted': halted_B,
      'finished': jax.tree.map(
        lambda a, b: _rows(halted_B, a, b), now, slots['finished']
      ),
    }

  def report(slots):
    finished = slots['finished']
    steps_B = finished['steps']
    weight_B = jnp.where(steps_B > 0, finished['weight'], 0.0)
    metrics = finished['metrics'] | {'steps': steps_B.astype(jnp.float32)}
    return metrics, weight_B

  return Slots(start, refill, explored, advance, report)


def _rows(which_B, new, old):
  """Rows of `new` where `which_B`, else of `old`."""
  shape = which_B.shape + (1,) * (new.ndim - 1)
  return jnp.where(which_B.reshape(shape), new, old)
