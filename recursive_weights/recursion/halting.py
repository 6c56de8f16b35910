"""Leaving a recursion early: rows that are sure enough stop being computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Recursion, Tree
from recursive_weights.recursion.unroll import unroll


def early_exit(
  recursion: Recursion,
  *,
  max_steps: int,
  chunk: int = 4,
  answer: str = 'logits',
  certainty: str = 'certainty',
  rule: str = 'certain',
) -> Callable[[Tree, Any, float], tuple[np.ndarray, np.ndarray]]:
  """A function that runs each row only until it is sure.

  A row is finished at its first step whose certainty exceeds the threshold,
  and at `max_steps` in any case. By the rule 'certain' its answer is that of
  its most certain step until then (the first of equals), so a threshold that no
  certainty exceeds gives what all steps and the most certain answer give; by
  the rule 'last' it is that of the step at which it leaves.

  Steps run in chunks. After each, unfinished rows are moved together into the
  next smaller power of two of rows, if they fit: finished rows cost nothing
  from then on, and there are at most log2(batch) programs to compile. What is
  computed is a row's steps rounded up to whole chunks.

  Args:
    recursion: the cell; every leaf of its context and state has rows first.
    max_steps: largest number of steps.
    chunk: steps between two looks at the certainty.
    answer: name of the output that answers, `[B, ...]`.
    certainty: name of the output that says how sure a row is, `[B]`; with a
      halting head, `halt` and a threshold of 0.
    rule: 'certain' or 'last'.

  Returns:
    `(params, inputs, threshold) -> (answers [B, ...], steps [B])`, NumPy
    arrays. It compiles when first called; keep it to call it again.

  Raises:
    ValueError: max_steps or chunk is not positive, or the rule is unknown.
  """
  if max_steps < 1:
    raise ValueError(f'max_steps must be > 0, got {max_steps}')
  if chunk < 1:
    raise ValueError(f'chunk must be > 0, got {chunk}')
  if rule not in ('certain', 'last'):
    raise ValueError(f"rule must be 'certain' or 'last', got {rule!r}")

  def step(weights, context, state, key):
    inner, book, threshold = state['inner'], state['book'], state['threshold']
    inner, outputs = recursion.step(weights, context, inner, key)
    book = _write(book, outputs[answer], outputs[certainty], threshold, rule)
    return {'inner': inner, 'book': book, 'threshold': threshold}, {}

  watched = recursion._replace(step=step)

  @jax.jit
  def begin(params, inputs):
    weights = recursion.prepare(params)
    context = recursion.encode(weights, inputs, None)
    state = recursion.start(weights, context)
    _, outputs = jax.eval_shape(recursion.step, weights, context, state, None)
    rows = outputs[certainty].shape[0]
    book = {
      'row': jnp.arange(rows),
      'answer': jnp.zeros_like(outputs[answer]),
      'sure': jnp.full_like(outputs[certainty], -jnp.inf),
      'steps': jnp.zeros([rows], jnp.int32),
      'done': jnp.zeros([rows], bool),
    }
    return weights, context, state, book

  def advance(weights, context, inner, book, threshold, steps):
    state = {'inner': inner, 'book': book, 'threshold': threshold}
    state, _ = unroll(watched, weights, context, state, steps, hoist=False)
    return state['inner'], state['book']

  advance = jax.jit(advance, static_argnums=5)

  @jax.jit
  def take(rows, valid, context, inner, book):
    """Some rows in a new order; those that only fill up count as done."""
    context, inner, book = jax.tree.map(
      lambda x: x[rows], (context, inner, book)
    )
    return context, inner, book | {'done': ~valid}

  def run(params, inputs, threshold):
    weights, context, inner, book = begin(params, inputs)
    size = book['row'].shape[0]
    answers = np.zeros(book['answer'].shape, book['answer'].dtype)
    steps = np.zeros([size], np.int32)
    valid = np.ones([size], bool)
    threshold = jnp.asarray(threshold, book['sure'].dtype)

    def collect(select):
      rows = np.asarray(book['row'])[select]
      answers[rows] = np.asarray(book['answer'])[select]
      steps[rows] = np.asarray(book['steps'])[select]

    done_steps = 0
    while True:
      now = min(chunk, max_steps - done_steps)
      inner, book = advance(weights, context, inner, book, threshold, now)
      done_steps += now
      live = np.flatnonzero(~np.asarray(book['done']))
      if not live.size or done_steps == max_steps:
        collect(valid)
        return answers, steps
      bucket = 1 << int(live.size - 1).bit_length()
      if bucket >= len(valid):
        continue
      collect(valid & np.asarray(book['done']))
      rows = np.resize(live, bucket)
      valid = np.arange(bucket) < live.size
      context, inner, book = take(rows, valid, context, inner, book)

  return run


def _write(book: dict, answer: Array, sure_B: Array, threshold, rule) -> dict:
  """One step's answers into the book of rows that are not done."""
  live_B = ~book['done']
  better_B = live_B
  if rule == 'certain':
    better_B = live_B & ((sure_B > book['sure']) | (book['steps'] == 0))
  shape = (-1,) + (1,) * (answer.ndim - 1)
  return book | {
    'answer': jnp.where(better_B.reshape(shape), answer, book['answer']),
    'sure': jnp.where(better_B, sure_B, book['sure']),
    'steps': book['steps'] + live_B,
    'done': book['done'] | (live_B & (sure_B > threshold)),
  }
