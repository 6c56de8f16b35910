"""Optimizers, schedules and parameter groups, by optax.

A parameter group is a regular expression on tree paths (`nlm/w1`) with its own
learning rate scale, weight decay, or none of either (frozen). Every leaf
belongs to exactly one group and every pattern meets at least one leaf, so a
renamed parameter cannot slip silently into the wrong group.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from recursive_weights.interfaces import Array, Tree, UserError


class AdamAtan2State(NamedTuple):
  step: Array
  m: Tree
  v: Tree


def scale_by_adam_atan2(
  b1: float = 0.9, b2: float = 0.95
) -> optax.GradientTransformation:
  """Adam with atan2 in place of the division: scale-free, without epsilon.

  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
  u = atan2(m, sqrt(v / (1 - b2^t))) / (1 - b1^t).

  The first moment's bias is corrected through the step size, not inside atan2;
  there are no constants a and b. Source: Everett et al. 2024
  (arXiv 2407.05872), as in the optimizer that Tiny Recursive Models use.
  """

  def init(params):
    return AdamAtan2State(
      jnp.zeros([], jnp.int32),
      jax.tree.map(jnp.zeros_like, params),
      jax.tree.map(jnp.zeros_like, params),
    )

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.step)
    t = count.astype(jnp.float32)
    m = optax.tree.update_moment(grads, state.m, b1, 1)
    v = optax.tree.update_moment(grads, state.v, b2, 2)
    c1, c2 = 1 - b1**t, 1 - b2**t
    updates = jax.tree.map(
      lambda m, v: jnp.arctan2(m, jnp.sqrt(v / c2)) / c1, m, v
    )
    return updates, AdamAtan2State(count, m, v)

  return optax.GradientTransformation(init, update)


def stored_as(
  dtype, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The same with the float32 arrays of its state kept in another dtype.

  The state is read as float32, and rounded to nearest where it is written, so
  a moment moves only where an update changes it by more than half a unit of
  the last place, 1/512 of it in bfloat16.
  """

  def cast(tree, old, new):
    return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)

  def init(params):
    return cast(transformation.init(params), jnp.float32, dtype)

  def update(grads, state, params=None):
    state = cast(state, dtype, jnp.float32)
    updates, state = transformation.update(grads, state, params)
    return updates, cast(state, jnp.float32, dtype)

  return optax.GradientTransformation(init, update)


def sign_rows(
  rate: optax.Schedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """Sign descent on the rows of a table that a batch has used.

  p <- p (1 - lr weight_decay) - lr sign(g) for rows with a gradient; the other
  rows neither move nor decay. It keeps no moments. For embeddings of which a
  batch sees few, as of puzzle identities.

  Source: G. Wang et al., Hierarchical Reasoning Model, 2025 (arXiv
  2506.21734), where gradients of a table's rows are summed before the sign.
  """

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

  def update(grads, state, params):
    lr = rate(state.count)

    def row_wise(g, p):
      axes = tuple(range(1, g.ndim))
      used = (g != 0).any(axes, keepdims=True)
      return jnp.where(used, -lr * (jnp.sign(g) + weight_decay * p), 0.0)

    updates = jax.tree.map(row_wise, grads, params)
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count)

  return optax.GradientTransformation(init, update)


def schedule(
  learning_rate: float,
  steps: int,
  *,
  name: str = 'cosine',
  warmup_steps: int = 0,
  final_fraction: float = 0.0,
) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then `name`.

  Args:
    learning_rate: the peak.
    steps: length of the training, warm-up included.
    name: 'constant', 'cosine' or 'linear' (to `final_fraction` of the peak).
    warmup_steps: steps from 0 to the peak.
    final_fraction: the last learning rate over the peak.
  """
  if warmup_steps < 0 or warmup_steps > steps:
    raise UserError(
      f'optimizer.schedule.warmup_steps must lie in [0, training.steps = '
      f'{steps}], got {warmup_steps}'
    )
  rest = max(steps - warmup_steps, 1)
  if name == 'constant':
    tail = optax.constant_schedule(learning_rate)
  elif name == 'cosine':
    tail = optax.cosine_decay_schedule(learning_rate, rest, final_fraction)
  elif name == 'linear':
    tail = optax.linear_schedule(
      learning_rate, final_fraction * learning_rate, rest
    )
  else:
    raise UserError(
      f"optimizer.schedule.name must be 'constant', 'cosine' or 'linear', "
      f'got {name!r}'
    )
  if not warmup_steps:
    return tail
  # The first update already moves: step 0 has 1 / warmup_steps of the peak.
  warmup = optax.linear_schedule(
    learning_rate / warmup_steps, learning_rate, max(warmup_steps - 1, 1)
  )
  return optax.join_schedules([warmup, tail], [warmup_steps])


def path_names(tree: Tree) -> list[str]:
  """Names of a tree's leaves, such as 'nlm/w1', in leaf order."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def label(params: Tree, patterns: dict[str, str]) -> Tree:
  """The tree of group names: each leaf's one group by `re.search`.

  Raises:
    UserError: lists every leaf with no group or several, and every pattern
      that meets no leaf.
  """
  names = path_names(params)
  for group, pattern in patterns.items():
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(
        f'optimizer.groups.{group}.pattern {pattern!r} is no regular '
        f'expression: {error}'
      ) from error
  hits = {
    name: [g for g, pattern in patterns.items() if re.search(pattern, name)]
    for name in names
  }
  errors = [
    f'{name} is in {len(groups)} groups {groups}, must be in exactly one'
    for name, groups in hits.items()
    if len(groups) != 1
  ]
  errors += [
    f'group {g!r} with pattern {pattern!r} meets no parameter'
    for g, pattern in patterns.items()
    if not any(g in groups for groups in hits.values())
  ]
  if errors:
    raise UserError(
      'optimizer.groups: '
      + '; '.join(errors)
      + f'. Parameters: {", ".join(names)}'
    )
  structure = jax.tree.structure(params)
  return jax.tree.unflatten(structure, [hits[name][0] for name in names])


def averaged(groups: dict) -> Callable[[Tree], Tree]:
  """`params -> {True where the EMA averages a leaf}`.

  Frozen leaves, which are exact, and tables that move by rows (`sign`), most
  of which are at rest, are copied instead.
  """

  def mask(params):
    labels = label(params, {g: f['pattern'] for g, f in groups.items()})
    return jax.tree.map(
      lambda g: not (groups[g].get('frozen') or groups[g].get('sign')), labels
    )

  return mask


def make(
  params: Tree,
  steps: int,
  *,
  name: str = 'adamw',
  learning_rate: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float = 1.0,
  moments: str = 'float32',
  schedule: dict,
  groups: dict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The gradient transformation and its schedule (for the log).

  Args:
    params: the tree to train, or its shapes.
    steps: length of the training.
    name: 'adamw', 'adam_atan2' (`eps` unused) or 'sgd' (`b1` is momentum).
    learning_rate: peak learning rate.
    b1, b2, eps: moments.
    clip_norm: bound on the global gradient norm; 0 turns clipping off.
    moments: dtype that moments are kept in, 'float32' or 'bfloat16'. The
      latter halves their memory and needs b1 and b2 up to 0.99: see
      `stored_as`.
    schedule: arguments of `schedule`.
    groups: by group name `{pattern, lr_scale, weight_decay, frozen, sign}`;
      decay is decoupled: p <- p (1 - lr weight_decay); `sign` makes it
      `sign_rows`.

  Raises:
    UserError: every argument that is out of range, and errors of `schedule` and
      `label`, in one message.
  """
  errors = []
  if learning_rate <= 0:
    errors.append(f'optimizer.learning_rate must be > 0, got {learning_rate}')
  if clip_norm < 0:
    errors.append(f'optimizer.clip_norm must be >= 0, got {clip_norm}')
  for field, beta in (('b1', b1), ('b2', b2)):
    if not 0 <= beta < 1:
      errors.append(f'optimizer.{field} must lie in [0, 1), got {beta}')
  if moments not in ('float32', 'bfloat16'):
    errors.append(
      f"optimizer.moments must be 'float32' or 'bfloat16', got {moments!r}"
    )
  if moments == 'bfloat16' and max(b1, b2) > 0.99:
    errors.append(
      "optimizer.moments 'bfloat16' needs b1 and b2 <= 0.99, else a moment "
      f'rounds back to where it was; got {b1} and {b2}'
    )
  known = {
    'adamw': lambda: optax.scale_by_adam(b1, b2, eps),
    'adam_atan2': lambda: scale_by_adam_atan2(b1, b2),
    'sgd': lambda: optax.trace(b1),
  }
  if name not in known:
    errors.append(
      f'optimizer.name must be one of {sorted(known)}, got {name!r}'
    )
  patterns = {g: fields['pattern'] for g, fields in groups.items()}
  try:
    rate = _schedule(learning_rate, steps, **schedule)
  except UserError as error:
    errors.append(str(error))
  try:
    labels = label(params, patterns)
  except UserError as error:
    errors.append(str(error))
  if errors:
    raise UserError('; '.join(errors))

  def group(pattern, lr_scale=1.0, weight_decay=0.0, frozen=False, sign=False):
    del pattern
    if frozen:
      return optax.set_to_zero()
    if sign:
      return sign_rows(lambda t: lr_scale * rate(t), weight_decay)
    parts = [known[name]()]
    if moments != 'float32':
      parts = [stored_as(jnp.dtype(moments), *parts)]
    if weight_decay:
      parts.append(optax.add_decayed_weights(weight_decay))
    parts.append(optax.scale_by_learning_rate(lambda t: lr_scale * rate(t)))
    return optax.chain(*parts)

  still = {g for g, fields in groups.items() if fields.get('frozen')}
  parts = []
  if still:  # what never moves must not scale the others' updates
    frozen = jax.tree.map(lambda g: g in still, labels)
    parts.append(optax.masked(optax.set_to_zero(), frozen))
  if clip_norm:
    parts.append(optax.clip_by_global_norm(clip_norm))
  parts.append(
    optax.partition({g: group(**f) for g, f in groups.items()}, labels)
  )
  return optax.chain(*parts), rate


_schedule = schedule  # `make` has a keyword of the same name.
