"""Which token comes next: pure functions of logits and keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, UserError


def make(
  *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Callable[[Array, Array], Array]:
  """`choose(key_B, logits_BV) -> token_B`, int32.

  p = softmax(logits / temperature) over the `top_k` likeliest tokens, and of
  those over the likeliest that together reach `top_p`.

  Args:
    temperature: 0 takes the likeliest token, the first of equals.
    top_k: 0 for all tokens.
    top_p: 1 for all tokens.

  Raises:
    UserError: an argument is out of range.
  """
  if not temperature >= 0:
    raise UserError(f'temperature must be >= 0, got {temperature}')
  if top_k < 0:
    raise UserError(f'top_k must be >= 0, got {top_k}')
  if not 0 <= top_p <= 1:
    raise UserError(f'top_p must lie in [0, 1], got {top_p}')

  def choose(key_B, logits_BV):
    logits_BV = logits_BV.astype(jnp.float32)
    if temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k:
      logits_BV = keep_largest(logits_BV, top_k)
    if top_p < 1:
      logits_BV = keep_share(logits_BV, top_p)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

  return choose


def keep_largest(logits: Array, count: int) -> Array:
  """Logits `[..., V]` with all but the `count` largest at minus infinity.

  Of equal ones the first are kept, so exactly `count` are.
  """
  return jnp.where(_rank(logits) < count, logits, -jnp.inf)


def keep_share(logits: Array, share: float) -> Array:
  """Logits `[..., V]` of the smallest set of likeliest tokens with p >= share.

  A token stays where those before it, in order of likelihood, have less than
  `share`; the first always stays. The others are minus infinity.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
  upto = jnp.cumsum(p, axis=-1)
  before = jnp.concatenate(
    [jnp.zeros_like(p[..., :1]), upto[..., :-1]], axis=-1
  )
  count = jnp.maximum((before < share).sum(axis=-1, keepdims=True), 1)
  return jnp.where(_rank(logits) < count, logits, -jnp.inf)


def keys(seed_B: Array, position_B: Array) -> Array:
  """A key for each row, a function of its seed and its position alone.

  So what a row says depends neither on the rows beside it nor on how its text
  was cut into calls.
  """

  def one(seed, position):
    return jax.random.fold_in(jax.random.key(seed), position)

  return jax.vmap(one)(seed_B, position_B)


def _rank(logits: Array) -> Array:
  """Place of every token in order of likelihood, from 0."""
  order = jnp.argsort(-logits, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1)
