"""The training state and the pure step that advances it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from recursive_weights.interfaces import (
  Array,
  Model,
  Objective,
  Slots,
  Task,
  Tree,
)
from recursive_weights.training import tables as tables_lib


class State(NamedTuple):
  """Everything that training needs to go on to the same bits.

  params, opt_state: trees. ema: averaged parameters, `{}` where there is no
  EMA. carry: what passes from batch to batch, the model's own or that of the
  slots, `{}` for none. step: updates done, int32. key: PRNG key data; the keys
  of a step are a function of it and of the step alone. rate: `{'factor'}` on
  the learning rate, float32, which plateaus cut and which may differ between
  members; () where neither is asked for.
  With several seeds every leaf has a leading axis E.
  """

  params: Tree
  opt_state: Tree
  ema: Tree
  carry: Tree
  step: Array
  key: Array
  rate: Tree = ()


def make_init(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  inputs,
  batch_size: int,
  ema_decay: float,
  keep_carry: bool,
  first_slots: Callable[[Tree], Tree] | None = None,
  with_rate: bool = False,
) -> Callable[[Array], State]:
  """`init(seed) -> State`, traceable.

  Args:
    model, optimizer, ema_decay, keep_carry: see `make_step`.
    inputs: shape of a batch's inputs.
    batch_size: rows of a batch.
    first_slots: `params -> slots`, where there are slots (`empty_slots`).
    with_rate: the state has a factor on the learning rate, 1 at the start.
  """

  def init(seed):
    key = jax.random.key(seed)
    params_key, key = jax.random.split(key)
    params = model.init(params_key, inputs)
    carry = {}
    if first_slots is not None:
      carry = first_slots(params)
    elif keep_carry:
      carry = model.carry(params, batch_size)
    state = State(
      params=params,
      opt_state=optimizer.init(params),
      ema=jax.tree.map(jnp.copy, params) if ema_decay else {},
      carry=carry,
      step=jnp.zeros([], jnp.int32),
      key=jax.random.key_data(key),
      rate={'factor': jnp.ones([], jnp.float32)} if with_rate else (),
    )
    # Weak types would come back as strong ones, and the step compile again.
    return jax.tree.map(lambda x: x.astype(x.dtype), state)

  return init


def empty_slots(
  model: Model, task: Task, objective: Objective, slots: Slots, batch: Tree
) -> Callable[[Tree], Tree]:
  """`params -> slots` before the first step; `batch`: shapes of a batch."""
  size = batch['weight'].shape[0]
  # What slots hold is augmented.
  batch = jax.eval_shape(task.augment, jax.random.key(0), batch)

  def first(params):
    batches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    carry = model.carry(params, size)

    def metrics(params, carry, batch):
      outputs, _ = model.apply(
        params, carry, batch['inputs'], key=None, train=True
      )
      return _judge(task, objective, outputs, batch)

    shapes = jax.eval_shape(metrics, params, carry, batches)
    return slots.start(batches, carry, shapes)

  return first


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
  slots: Slots | None = None,
  averaged: Callable[[Tree], Tree] | None = None,
  tables: Mapping[str, str] | None = None,
  axis: str | None = None,
) -> Callable[[State, dict], tuple[State, dict]]:
  """`step(state, batch) -> (state, metrics)`, one update on one batch.

  loss = objective + sum of penalties, mean over the batch; gradients are means
  over `accumulation` micro-batches and, where `axis` names a mapped device
  axis (pmap), over devices. EMA: e <- d e + (1 - d) p with d warmed up as
  min(ema_decay, (1 + t) / (10 + t)), so that short trainings are averaged too.
  Leaves that `averaged(params)` names False are copied instead. Of `tables`
  (`Model.tables`, where the optimizer moves rows alone) only the rows of the
  batch have a gradient.

  With `slots` (`recursion.slots`) the rows trained on are those that the slots
  hold, after the halted ones have taken theirs of the batch, and the model goes
  on from their carry. Loss and the objective's own metrics are those of all
  rows; the task's metrics count a slot's answer where it halted, and are means
  over the slots' latest finished examples (0 before there is one), as is
  `steps`, the steps that they took. `halted` is the share that now halts.

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
    judged = {}
    if slots is not None:
      judged = {
        'halt': outputs['halt'][-1],
        'metrics': _judge(task, objective, outputs, batch),
      }
    return loss * loss_scale, (metrics, (carry, judged))

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
      grads, aux = gradient(
        params, carry, batch, jax.random.fold_in(key, index)
      )
      return jax.tree.map(jnp.add, total, grads), aux

    parts = jax.tree.map(split, (carry, batch))
    total, (metrics, by_row) = jax.lax.scan(
      body,
      jax.tree.map(jnp.zeros_like, params),
      (*parts, jnp.arange(accumulation)),
    )
    grads = jax.tree.map(lambda g: g / accumulation, total)
    metrics = jax.tree.map(lambda m: m.mean(0), metrics)
    return grads, (metrics, jax.tree.map(join, by_row))

  def explored(key, size):
    """Of this device's rows. `key` is the same on every device."""
    if axis is None:
      return slots.explore(key, size)
    least_B = slots.explore(key, size * jax.lax.axis_size(axis))
    index = jax.lax.axis_index(axis)
    return jax.lax.dynamic_slice_in_dim(least_B, index * size, size)

  def step(state, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    augment_key, model_key = jax.random.split(key)
    slots_key = jax.random.fold_in(key, 2)  # `split` took 0 and 1
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
    held = {}
    if slots is not None:
      fresh = model.carry(state.params, size)
      held = slots.refill(state.carry, batch, fresh, state.step)
      batch, carry = held['batch'], held['carry']
    elif keep_carry:
      carry = state.carry
    else:
      carry = model.carry(state.params, size)
    params, inputs, numbers = tables_lib.named(
      tables or {}, state.params, batch['inputs']
    )
    batch = batch | {'inputs': inputs}
    grads, (metrics, (carry, judged)) = accumulated(
      params, carry, batch, model_key
    )
    if slots is not None:
      least_B = explored(slots_key, size)
      carry = slots.advance(
        held, carry, judged['halt'], least_B, judged['metrics']
      )
      metrics = metrics | {'halted': carry['halted'].mean()}
    if axis is not None:
      of_all, numbers = tables_lib.gathered(grads, numbers, axis)
      grads, metrics = jax.lax.pmean((grads, metrics), axis)
      grads = tables_lib.replaced(grads, of_all)
    grads = tables_lib.summed(grads, numbers)
    # The state with the rows of this step in the place of tables.
    taken = tables_lib.rows(state.params, numbers)
    old = state._replace(
      params=tables_lib.replaced(state.params, taken),
      ema=tables_lib.replaced(state.ema, taken),
    )
    if slots is not None:
      metrics = metrics | _finished(slots, carry, axis)
    grads = jax.tree.map(lambda g: g / loss_scale, grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
    rate = schedule(state.step)
    if state.rate:
      # Updates are proportional to the learning rate, weight decay included.
      updates = jax.tree.map(lambda u: state.rate['factor'] * u, updates)
      rate = state.rate['factor'] * rate
    params = optax.apply_updates(old.params, updates)
    if ema_decay:
      t = state.step.astype(jnp.float32)
      decay = jnp.minimum(ema_decay, (1 + t) / (10 + t))
      ema = optax.incremental_update(params, old.ema, 1 - decay)
      if averaged is not None:
        ema = jax.tree.map(
          lambda mean, p, moves: mean if moves else p,
          ema,
          params,
          averaged(params),
        )
    else:
      ema = {}
    metrics = metrics | {
      'gradient_norm': norm,
      'learning_rate': rate,
    }
    metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
    metrics['finite'] = finite.astype(jnp.float32)
    new = State(
      params,
      opt_state,
      ema,
      carry if keep_carry or slots is not None else {},
      state.step + 1,
      state.key,
      state.rate,
    )
    # A bad update never lands. The choice sits here, and not in the loop, so
    # that XLA fuses it with the update.
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    moves = {table: jnp.where(finite, updates[table], 0) for table in numbers}
    after = tables_lib.added(state.params, numbers, moves)
    return new._replace(
      params=tables_lib.replaced(new.params, after),
      ema=tables_lib.replaced(new.ema, after),
    ), metrics

  return step


def _judge(task, objective, outputs, batch):
  """The task's metrics of every row's answer, float32 `[B]`."""
  _, metrics_B = task.loss(objective.answer(outputs), batch)
  return {name: x.astype(jnp.float32) for name, x in metrics_B.items()}


def _finished(slots, held, axis):
  """Means of metrics over the slots' latest finished examples."""
  metrics_B, weight_B = slots.report(held)
  sums = {
    name: jnp.where(weight_B > 0, x_B * weight_B, 0.0).sum()
    for name, x_B in metrics_B.items()
  }
  total = weight_B.sum()
  if axis is not None:
    sums, total = jax.lax.psum((sums, total), axis)
  return {name: x / jnp.maximum(total, 1e-9) for name, x in sums.items()}


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
  step = jax.jit(step, inline=True)  # traced once: for its shapes, in the loop

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
