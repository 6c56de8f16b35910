"""Several attempts of a recursion from noisy states; the best-looking answers.

A recursion that has lost its way from one start often finds it from another.
No attempt is compared with the right answer: either the recursion itself says
which one it believes, or the one that has come to rest is taken.

Source: noise on the latent states with selection by the halting head, and
restarts with selection by the residual, are follow-ups of Tiny Recursive
Models (arXiv 2605.19943, 2605.21488).
"""

from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Recursion, Tree
from recursive_weights.recursion.unroll import unroll

SELECTIONS = ('halt', 'residual')


def restarts(
  recursion: Recursion,
  params: Tree,
  inputs: Any,
  key: Array,
  *,
  count: int,
  noise: float,
  steps: int,
  select: str = 'halt',
  answer: str = 'logits',
  sure: str = 'halt',
) -> Array:
  """Each row's answer from the best of `count` attempts, `[B, ...]`.

  The first attempt is the plain recursion; the others start from its start
  plus N(0, noise^2) on every entry of the state. An attempt's answer is that of
  its last step. Attempts run one after the other, in the memory of one.

  Args:
    recursion: the cell, rows first in every leaf of its state.
    params, inputs: of the recursion.
    key: of the noise.
    count: number of attempts.
    noise: standard deviation.
    steps: of each attempt.
    select: 'halt' takes the attempt with the largest output `sure` `[B]` at
      its last step; 'residual' that with the smallest `residual` of its last
      step. The first of equals.
    answer, sure: names of the outputs.

  Raises:
    ValueError: an argument is out of range.
  """
  if count < 1:
    raise ValueError(f'count must be > 0, got {count}')
  if steps < 1:
    raise ValueError(f'steps must be > 0, got {steps}')
  if noise < 0:
    raise ValueError(f'noise must be >= 0, got {noise}')
  if select not in SELECTIONS:
    raise ValueError(f'select must be one of {SELECTIONS}, got {select!r}')
  weights = recursion.prepare(params)
  context = recursion.encode(weights, inputs, None)
  origin = recursion.start(weights, context)

  def attempt(number):
    state = _perturbed(
      origin, jax.random.fold_in(key, number), jnp.where(number > 0, noise, 0.0)
    )
    if steps > 1:
      state, _ = unroll(
        recursion, weights, context, state, steps - 1, keep=(), hoist=False
      )
    last, outputs = recursion.step(weights, context, state, None)
    if select == 'halt':
      return outputs[answer], outputs[sure].astype(jnp.float32)
    return outputs[answer], -residual(state, last)

  def body(best, number):
    found, score_B = attempt(number)
    better_B = score_B > best[1]
    shape = better_B.shape + (1,) * (found.ndim - 1)
    return (
      jnp.where(better_B.reshape(shape), found, best[0]),
      jnp.where(better_B, score_B, best[1]),
    ), None

  (found, _), _ = jax.lax.scan(
    body, attempt(jnp.int32(0)), 1 + jnp.arange(count - 1)
  )
  return found


def residual(before: Tree, after: Tree) -> Array:
  """`||after - before|| / ||after||` of every row, float32 `[B]`.

  Norms are over all floating leaves together.
  """

  def square(tree):
    return sum(
      (x.astype(jnp.float32) ** 2).reshape(x.shape[0], -1).sum(1)
      for x in jax.tree.leaves(tree)
      if jnp.issubdtype(x.dtype, jnp.floating)
    )

  def difference(a, b):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      return a
    return a.astype(jnp.float32) - b.astype(jnp.float32)

  moved = jax.tree.map(difference, after, before)
  return jnp.sqrt(square(moved) / jnp.maximum(square(after), 1e-30))


def _perturbed(state, key, noise):
  leaves, structure = jax.tree.flatten(state)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(
    structure,
    [
      x
      if not jnp.issubdtype(x.dtype, jnp.floating)
      else x + (noise * jax.random.normal(k, x.shape)).astype(x.dtype)
      for x, k in zip(leaves, keys, strict=True)
    ],
  )
