"""The state of a recurrent layer: sequences, single tokens, commits, a norm.

Wraps the forms of a scan of `recursive_weights.scans` in one pair of functions.
`read` runs a chunk from a state and keeps what `commit` needs to give the state
after any number of its tokens.

With StateNorm every token meets the normalised state of the one before,

  S_t = diag(a_t) N(S_(t-1)) + k_t v_t^T,
  N(S) = gain * S / sqrt(mean of S^2 over a group + 1e-5),

where the entries of a head's state, row by row, form equal groups. It is not
linear in the state, so tokens run one by one, in training as in decoding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree

EPSILON = 1e-5


class Forms(NamedTuple):
  """A scan whose arguments are its tokens, with everything else bound.

  prefill: `(*tokens [B, T, ...], state, fresh, resets) -> (y, pending)`.
  step: `(state, *tokens [B, ...], fresh, resets) -> (y, state)`.
  commit: `(pending, length_B) -> state`.
  """

  prefill: Callable[..., tuple[Array, Any]]
  step: Callable[..., tuple[Array, Array]]
  commit: Callable[..., Array]


def init(
  key: Array, shape: tuple[int, int, int], *, learned: bool, groups: int
) -> dict[str, Array]:
  """What a state brings to a layer's parameters.

  Args:
    shape: `(H, K, V)`.
    learned: `initial [H, K, V]`, the state where a document begins, drawn from
      N(0, 0.01^2); else it is zero.
    groups: `gain [H, K, V]` of StateNorm with so many groups a head; 0 for no
      norm.

  Raises:
    ValueError: the groups do not divide the state.
  """
  heads, keys, values = shape
  params = {}
  if learned:
    # Drawn flat, the same numbers compile ten times faster on a CPU.
    flat = jax.random.normal(key, (heads * keys * values,))
    params['initial'] = 0.01 * flat.reshape(shape)
  if groups < 0 or (groups and keys * values % groups):
    raise ValueError(
      f'state_norm must be >= 0 and divide the {keys * values} entries of a '
      f"head's state, got {groups}"
    )
  if groups:
    params['gain'] = jnp.ones([heads, keys, values])
  return params


def half_lives(half_life: tuple[float, float], count: int) -> Array:
  """Tokens until a half is forgotten, `[count]`, spaced by equal ratios.

  Args:
    half_life: the first and the last of them.

  Raises:
    ValueError: they are not two positive numbers.
  """
  if len(half_life) != 2 or min(half_life) <= 0:
    raise ValueError(
      f'half_life must be () or two numbers > 0, got {half_life}'
    )
  first, last = half_life
  return first * (last / first) ** jnp.linspace(0, 1, count)


def norm(gain_HKV: Array, state_BHKV: Array, groups: int) -> Array:
  """N of the module, float32."""
  flat = state_BHKV.reshape(*state_BHKV.shape[:2], groups, -1)
  square = (flat * flat).mean(-1, keepdims=True)
  flat = flat * jax.lax.rsqrt(square + EPSILON)
  return flat.reshape(state_BHKV.shape) * gain_HKV[None]


def read(
  params: Tree,
  forms: Forms,
  state_BHKV: Array,
  tokens: tuple,
  place_BT: Array,
  *,
  groups: int = 0,
) -> tuple[Array, Tree]:
  """`(y, parts)` of a chunk; a document begins where its place is 0."""
  fresh, resets_BT = params.get('initial'), place_BT == 0

  def one(state, *token_and_reset):
    *token, reset_B = token_and_reset
    if 'gain' in params:
      state = norm(params['gain'], state, groups)
    return forms.step(state, *token, fresh=fresh, resets=reset_B)

  if place_BT.shape[1] == 1:
    y, after = one(state_BHKV, *(x[:, 0] for x in (*tokens, resets_BT)))
    return y[:, None], {'after': after}
  if 'gain' not in params:
    y, pending = forms.prefill(
      *tokens, state=state_BHKV, fresh=fresh, resets=resets_BT
    )
    return y, {'pending': pending}

  def body(state, token):
    y, state = one(state, *token)
    return state, (y, state)

  time_first = (jnp.moveaxis(x, 1, 0) for x in (*tokens, resets_BT))
  _, found = jax.lax.scan(body, state_BHKV, tuple(time_first))
  y, states = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
  return y, {'states': states}


def commit(
  forms: Forms, state_BHKV: Array, parts: Tree, length_B: Array
) -> Array:
  """The state after the first `length_B` tokens of the chunk."""
  keep_B111 = (length_B > 0)[:, None, None, None]
  if 'after' in parts:
    after = parts['after']
  elif 'pending' in parts:
    after = forms.commit(parts['pending'], length_B)
  else:
    index_B = jnp.maximum(length_B - 1, 0)
    after = parts['states'][jnp.arange(len(length_B)), index_B]
  return jnp.where(keep_B111, after, state_BHKV)
