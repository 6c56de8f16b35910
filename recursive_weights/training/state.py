"""The training state and the pure step that advances it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from recursive_weights.interfaces import Array, Model, Objective, Task, Tree


class State(NamedTuple):
  """Everything that training needs to go on to the same bits.

  params, opt_state: trees. ema: averaged parameters, `{}` where there is no
  EMA. carry: what passes from batch to batch, `{}` for none. step: updates
  done, int32. key: PRNG key data; the keys of a step are a function of it and
  of the step alone. With several seeds every leaf has a leading axis E.
  """

  params: Tree
  opt_state: Tree
  ema: Tree
  carry: Tree
  step: Array
  key: Array


def make_init(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  inputs,
  batch_size: int,
  ema_decay: float,
  keep_carry: bool,
) -> Callable[[Array], State]:
  """`init(seed) -> State`, traceable. `inputs`: shape of a batch's inputs."""

  def init(seed):
    key = jax.random.key(seed)
    params_key, key = jax.random.split(key)
    params = model.init(params_key, inputs)
    return State(
      params=params,
      opt_state=optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params) if ema_decay else {},
      carry=model.carry(params, batch_size) if keep_carry else {},
      step=jnp.zeros([], jnp.int32),
      key=jax.random.key_data(key),
    )

  return init


def make_step(
  model: Model,
  task: Task,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  ema_decay: float = 0.0,
  accumulation: int = 1,
  loss_scale: float = 1.0,
  keep_carry: bool = False,
  axis: str | None = None,
) -> Callable[[State, dict], tuple[State, dict]]:
  """`step(state, batch) -> (state, metrics)`, one update on one batch.

  loss = objective + sum of penalties, mean over the batch; gradients are means
  over `accumulation` micro-batches and, where `axis` names a mapped device
  axis (pmap), over devices. EMA: e <- d e + (1 - d) p with d warmed up as
  min(ema_decay, (1 + t) / (10 + t)), so that short trainings are averaged too.

  Metrics are float32 scalars of this step. Where loss or gradients are not
  finite `metrics['finite']` is 0 and the state comes back as it was.
  """

  def loss_of(params, carry, batch, key):
    outputs, carry = model.apply(
      params, carry, batch['inputs'], key=key, train=True
    )
    score, metrics = objective.score(outputs, task.loss, batch)
    penalties = outputs.get('penalties', {})
    loss = score + sum(penalties.values(), jnp.zeros([], jnp.float32))
    metrics = metrics | {'loss': score} | penalties
    return loss * loss_scale, (metrics, carry)

  gradient = jax.grad(loss_of, has_aux=True)

  def accumulated(params, carry, batch, key):
    if accumulation == 1:
      return gradient(params, carry, batch, key)

    # [B, ...] -> [A, B / A, ...] so that each device keeps its own rows.
    def split(x):
      rows = x.shape[0] // accumulation
      return jnp.swapaxes(x.reshape(rows, accumulation, *x.shape[1:]), 0, 1)

    def join(x):
      return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    def body(total, part):
      carry, batch, index = part
      grads, (metrics, carry) = gradient(
        params, carry, batch, jax.random.fold_in(key, index)
      )
      return jax.tree.map(jnp.add, total, grads), (metrics, carry)

    parts = jax.tree.map(split, (carry, batch))
    total, (metrics, carry) = jax.lax.scan(
      body,
      jax.tree.map(jnp.zeros_like, params),
      (*parts, jnp.arange(accumulation)),
    )
    grads = jax.tree.map(lambda g: g / accumulation, total)
    metrics = jax.tree.map(lambda m: m.mean(0), metrics)
    return grads, (metrics, jax.tree.map(join, carry))

  def step(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    augment_key, model_key = jax.random.split(key)
    if axis is None:
      batch = task.augment(augment_key, batch)
    else:
      # Augment the global batch on every device, then keep this device's rows:
      # the same random numbers as on one device.
      whole = jax.lax.all_gather(batch, axis, tiled=True)
      whole = task.augment(augment_key, whole)
      index = jax.lax.axis_index(axis)
      rows = jax.tree.leaves(batch)[0].shape[0]
      batch = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, index * rows, rows), whole
      )
      model_key = jax.random.fold_in(model_key, index)
    size = batch['weight'].shape[0]
    carry = state.carry if keep_carry else model.carry(state.params, size)
    grads, (metrics, carry) = accumulated(state.params, carry, batch, model_key)
    if axis is not None:
      grads, metrics = jax.lax.pmean((grads, metrics), axis)
    grads = jax.tree.map(lambda g: g / loss_scale, grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if ema_decay:
      t = state.step.astype(jnp.float32)
      decay = jnp.minimum(ema_decay, (1 + t) / (10 + t))
      ema = optax.incremental_update(params, state.ema, 1 - decay)
    else:
      ema = {}
    metrics = metrics | {
      'gradient_norm': norm,
      'learning_rate': schedule(state.step),
    }
    metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    metrics['finite'] = finite.astype(jnp.float32)
    new = State(
      params,
      opt_state,
      ema,
      carry if keep_carry else {},
      state.step + 1,
      state.key,
    )
    # A bad update never lands. The choice sits here, and not in the loop, so
    # that XLA fuses it with the update.
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new, metrics

  return step


def make_dispatch(step: Callable) -> Callable:
  """`dispatch(state, batches, first, count) -> (state, metrics)`.

  Runs `count` steps, the first of them number `first`, on the first rows of
  `batches` ([K, ...] leaves) in one program. A step whose loss or gradient is
  not finite does not advance the state; it ends this dispatch, and later ones
  do nothing, since they find the state at another step than their first.
  `metrics` has a leading axis K; rows that were not run are 0.

  The trip count is an argument and the step stands behind barriers, so XLA
  compiles the same loop body for every K: results do not depend, to the bit,
  on how many steps a dispatch takes.
  """

  def dispatch(state, batches, first, count):
    row = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(step, state, row)[1]
    length = jax.tree.leaves(batches)[0].shape[0]
    empty = jax.tree.map(
      lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes
    )

    def running(loop):
      index, state, _ = loop
      return (index < count) & (state.step == first + index).all()

    def body(loop):
      index, state, buffer = loop
      batch = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
        batches,
      )
      batch, state = jax.lax.optimization_barrier((batch, state))
      state, metrics = jax.lax.optimization_barrier(step(state, batch))
      buffer = jax.tree.map(
        lambda b, m: jax.lax.dynamic_update_index_in_dim(b, m, index, 0),
        buffer,
        metrics,
      )
      return index + 1, state, buffer

    _, state, buffer = jax.lax.while_loop(
      running, body, (jnp.int32(0), state, empty)
    )
    return state, buffer

  return dispatch
