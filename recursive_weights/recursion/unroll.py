"""Recursion over depth: the one `lax.scan` over a `Recursion`'s steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Model, Recursion, Tree
from recursive_weights.recursion import hoist as hoisting


def unroll(
  recursion: Recursion,
  weights: Tree,
  context: Tree,
  state: Tree,
  steps: int,
  *,
  key: Array | None = None,
  first: int = 0,
  remat: bool = False,
  frozen: int = 0,
  keep: tuple[str, ...] | None = None,
  hoist: bool = True,
  unrolled: int = 1,
) -> tuple[Tree, dict[str, Array]]:
  """`state_s, outputs_s = step(weights, context, state_(s-1))` for S steps.

  Args:
    recursion: only its `step` is used.
    weights: from `recursion.prepare`.
    context: from `recursion.encode`.
    state: from `recursion.start`, or of an earlier call.
    steps: S.
    key: noise of the steps, or None; step s gets `fold_in(key, first + s)`.
    first: number of the first step, where a recursion is run in pieces.
    remat: keep only the states for the backward pass and run steps again.
    frozen: this many first steps take part in no gradient: the gradient is the
      one with their last state fed in as a constant.
    keep: names of the outputs to stack; None for all.
    hoist: gradients of `hoist.Linear` weights are taken out of the backward
      scan: same values up to the order of summation, less memory traffic.
    unrolled: steps in one body of the compiled loop. On a GPU 5 saves copies
      between them; more takes longer to compile.

  Returns:
    The last state, and the kept outputs with the step axis S first.

  Raises:
    ValueError: steps < 1, frozen not in [0, steps), an unknown name in keep.
  """
  if steps < 1:
    raise ValueError(f'steps must be > 0, got {steps}')
  if not 0 <= frozen < steps:
    raise ValueError(f'frozen must be in [0, {steps}), got {frozen}')

  def run(weights, context, state, first, steps, hoist):
    taps = []
    if hoist:
      batch = jax.tree.leaves(context)[0].shape[0]
      weights, taps = hoisting.expose(weights, steps, batch, (context, state))

    def one_step(context, state, index, taps):
      tapped = hoisting.attach(weights, taps) if hoist else weights
      step_key = None if key is None else jax.random.fold_in(key, index)
      state, outputs = recursion.step(tapped, context, state, step_key)
      return state, _select(outputs, keep)

    if remat:
      one_step = jax.checkpoint(one_step)

    def body(state, scanned):
      return one_step(context, state, *scanned)

    numbers_S = first + jnp.arange(steps)
    return jax.lax.scan(
      body, state, (numbers_S, taps), unroll=min(unrolled, steps)
    )

  if not frozen:
    return run(weights, context, state, first, steps, hoist)
  prefix = jax.lax.stop_gradient(
    run(*jax.lax.stop_gradient((weights, context, state)), first, frozen, False)
  )
  state, outputs = run(
    weights, context, prefix[0], first + frozen, steps - frozen, hoist
  )
  return state, jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), prefix[1], outputs
  )


def from_recursion(
  recursion: Recursion,
  init: Callable[[Array, Any], Tree],
  steps: int,
  *,
  remat: bool = False,
  frozen: int = 0,
  keep: tuple[str, ...] | None = None,
  hoist: bool = True,
  unrolled: int = 1,
) -> Model:
  """A model that runs a recursion from its start for S steps.

  Its outputs are those of every step, `[S, B, ...]`; nothing passes from batch
  to batch.

  Args:
    recursion: the cell.
    init: `(key, inputs) -> params`.
    steps, remat, frozen, keep, hoist, unrolled: see `unroll`.
  """

  def apply(params, carry, inputs, *, key=None, train=False):
    del train
    encode_key, step_key = (
      (None, None) if key is None else jax.random.split(key)
    )
    weights = recursion.prepare(params)
    context = recursion.encode(weights, inputs, encode_key)
    _, outputs = unroll(
      recursion,
      weights,
      context,
      recursion.start(weights, context),
      steps,
      key=step_key,
      remat=remat,
      frozen=frozen,
      keep=keep,
      hoist=hoist,
      unrolled=unrolled,
    )
    return outputs, carry

  return Model(
    init=init,
    carry=lambda params, batch_size: {},
    apply=apply,
    recursion=recursion,
  )


def _select(outputs, keep):
  if keep is None:
    return outputs
  unknown = sorted(set(keep) - set(outputs))
  if unknown:
    raise ValueError(
      f'keep must name outputs among {sorted(outputs)}, got {unknown}'
    )
  return {name: outputs[name] for name in keep}
