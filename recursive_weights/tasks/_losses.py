"""Cross-entropy of class logits, by softmax or by stable-max, in float32."""

import jax.numpy as jnp
import optax

from recursive_weights.interfaces import Array, UserError

KINDS = ('softmax', 'stablemax')


def cross_entropy(
  logits: Array, targets: Array, kind: str = 'softmax'
) -> Array:
  """`-log p[target]` for every place, in nats.

  softmax: p = exp(a) / sum exp(a). stablemax: p = s(a) / sum s(a) with
  s(a) = a + 1 for a >= 0 and 1 / (1 - a) below, which grows linearly, so that
  logits need not grow without end where all training answers are right.

  Args:
    logits: `[..., V]`.
    targets: integers `[...]` in [0, V).
    kind: 'softmax' or 'stablemax'.

  Returns:
    float32 `[...]`.

  Raises:
    UserError: the kind is unknown.

  Source: L. Prieto et al., Grokking at the Edge of Numerical Stability, 2025
  (arXiv 2501.04697).
  """
  logits = logits.astype(jnp.float32)
  if kind == 'softmax':
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  if kind != 'stablemax':
    raise UserError(f'loss must be one of {KINDS}, got {kind!r}')
  above, below = jnp.maximum(logits, 0), jnp.maximum(-logits, 0)
  # log s(a); of the two terms one is zero. At a = 0 each has half the slope.
  log_s = jnp.log1p(above) - jnp.log1p(below)
  total = ((1 + above) / (1 + below)).sum(-1)
  own = jnp.take_along_axis(log_s, targets[..., None], axis=-1)[..., 0]
  return jnp.log(total) - own
