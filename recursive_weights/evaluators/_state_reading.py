"""Reading a text with a decoder so that its recurrent states can be measured.

A component is a recurrent state of a cache, a leaf `[B, L, H, K, V]`, named by
its path; parameters under the same path are its own.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Decoder, Tree

# What decides how long a state remembers, and when. A gate of outputs does not.
DECIDES = re.compile(r'decay|dt_bias|a_log|delta|beta|grounding')
OUTPUTS = ('out', 'output')
STRENGTH = 0.1  # of a perturbation, in units of the state's own size


class Reader(NamedTuple):
  """Compiled programs on derived weights; S segments of T tokens each.

  read: `(params, cache, tokens_SBT, targets_SBT) -> (cache, found)`: the state
    `before` and `after` the last token of each segment by component,
    `[S, B, L, H, K, V]`, and `loss`, `top` (the largest probability), `choice`
    (its token) and `entropy` of every prediction, `[S, B, T]`; entropy is that
    of the tokens other than the one just read, whose logit in a model with a
    tied head starts at .02 D, so grows with the width.
  fade: `(params, cache, tokens_RT) -> {component: [1 + T, L, B, H]}`, cache and
    tokens as `pushed` gives them: how far a perturbation of one component of
    one layer moves that state after 0, 1, ... T tokens.
  gradients: `(params, cache, tokens_BT, targets_BT) -> (norms, hidden)`: norms
    of the gradient of the mean loss by parameter path, and by part of a layer
    (a component's output, and '' for what stands after the layer) 1 where a
    layer has it, the variance over tokens and the mean square, means over
    channels: `[L, 3]`.
  """

  read: Callable
  fade: Callable
  gradients: Callable


def states(cache: Tree) -> dict[str, Any]:
  """The recurrent states of a cache by component."""
  return {
    _name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache['recurrent'])
    if leaf.ndim == 5
  }


def with_states(cache: Tree, changed: dict[str, Any]) -> Tree:
  """The cache with the states of some components changed."""
  recurrent = jax.tree_util.tree_map_with_path(
    lambda path, leaf: changed.get(_name(path), leaf), cache['recurrent']
  )
  return cache | {'recurrent': recurrent}


def part(params: Tree, component: str) -> Tree:
  """A component's own parameters; {} where there are none of its path."""
  for name in component.split('/'):
    params = params.get(name, {})
  return params


def silenced(params: Tree, component: str, layer: int | None = None) -> Tree:
  """The weights with what a component puts out at 0, in one layer or in all.

  Its last projection, a stack `out` or `output`, becomes zero there.
  """

  def zero(path, leaf):
    name = _name(path)
    if not name.startswith(f'{component}/') or name.split('/')[-1] not in (
      OUTPUTS
    ):
      return leaf
    return jnp.zeros_like(leaf) if layer is None else leaf.at[layer].set(0.0)

  return jax.tree_util.tree_map_with_path(zero, params)


def make(decoder: Decoder) -> Reader:
  """The programs of a decoder."""
  return Reader(
    *(
      jax.jit(functools.partial(function, decoder))
      for function in (_read, _fade, _gradients)
    )
  )


def _read(decoder, params, cache, tokens_SBT, targets_SBT):
  def segment(cache, row):
    tokens_BT, targets_BT = row
    x_BTD = decoder.embed(params, tokens_BT)
    x_BTD, pending = decoder.blocks(params, cache, x_BTD)
    log_p = jax.nn.log_softmax(decoder.head(params, x_BTD), axis=-1)
    read_BTV = jax.nn.one_hot(tokens_BT, log_p.shape[-1], dtype=bool)
    others = jax.nn.log_softmax(jnp.where(read_BTV, -1e30, log_p), axis=-1)
    batch, length = tokens_BT.shape
    last_but_one_B = jnp.full([batch], length - 1, jnp.int32)
    before = decoder.commit(cache, pending, last_but_one_B)
    after = decoder.commit(cache, pending)
    return after, {
      'before': states(before),
      'after': states(after),
      'loss': _of(-log_p, targets_BT),
      'top': jnp.exp(log_p.max(-1)),
      'choice': log_p.argmax(-1),
      'entropy': -(jnp.exp(others) * others).sum(-1),
    }

  return jax.lax.scan(segment, cache, (tokens_SBT, targets_SBT))


def pushed(
  cache: Tree, tokens_BT: np.ndarray, random: np.random.Generator
) -> tuple[Tree, np.ndarray]:
  """Rows for `Reader.fade`: B as they are, B for each component and layer.

  In those, that component of that layer is perturbed by Gaussian noise, the
  same for all texts, so that what differs is what they make of it.

  Args:
    cache: of B rows, NumPy arrays.
    tokens_BT: what they read next.
    random: draws the noise.
  """
  found = states(cache)
  count = 1 + sum(x.shape[1] for x in found.values())
  changed, first = {}, 1
  for name, state in found.items():
    noise = random.standard_normal(state.shape[1:], np.float32)
    size = np.sqrt(np.square(state).mean((-2, -1), keepdims=True)) + 1e-6
    rows = np.stack([state] * count)
    for layer in range(state.shape[1]):
      rows[first, :, layer] += STRENGTH * size[:, layer] * noise[layer]
      first += 1
    changed[name] = rows.reshape(-1, *state.shape[1:])
  tiled = jax.tree.map(lambda x: np.concatenate([x] * count), cache)
  return with_states(tiled, changed), np.concatenate([tokens_BT] * count)


def _fade(decoder, params, cache, tokens_RT):
  found = states(cache)
  count = 1 + sum(x.shape[1] for x in found.values())

  def distances(cache):
    result, first = {}, 1
    for name, state in states(cache).items():
      layers = state.shape[1]
      rows = state.reshape(count, -1, *state.shape[1:])
      own = jnp.einsum('lblhkv->lbhkv', rows[first : first + layers])
      apart = own - jnp.swapaxes(rows[0], 0, 1)
      result[name] = jnp.sqrt((apart * apart).sum((-2, -1)))
      first += layers
    return result

  def token(cache, tokens_R):
    x_BTD = decoder.embed(params, tokens_R[:, None])
    _, pending = decoder.blocks(params, cache, x_BTD)
    cache = decoder.commit(cache, pending)
    return cache, distances(cache)

  _, later = jax.lax.scan(token, cache, tokens_RT.T)
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a[None], b]), distances(cache), later
  )


def _gradients(decoder, params, cache, tokens_BT, targets_BT):
  # At least the number of layers; rows that no layer has stay 0.
  stacks = jax.tree.leaves((cache['recurrent'], cache['attention']))
  most = sum(x.shape[1] for x in stacks if x.ndim > 1)

  def loss(params, rows):
    x_BTD, _ = decoder.blocks(
      params,
      cache,
      decoder.embed(params, tokens_BT),
      tap=lambda layer, x_BTD, part: _noted(x_BTD, rows[part][layer]),
    )
    log_p = jax.nn.log_softmax(decoder.head(params, x_BTD), axis=-1)
    return _of(-log_p, targets_BT).mean()

  rows = {part: jnp.zeros([most, 3]) for part in ('', *states(cache))}
  grads, noted = jax.grad(loss, (0, 1))(params, rows)
  norms = {
    _name(path): jnp.sqrt((g * g).sum())
    for path, g in jax.tree_util.tree_leaves_with_path(grads)
  }
  return norms, noted


@jax.custom_vjp
def _noted(x_BTD, row):
  """x itself; the cotangent of `row` is 1, variance and mean square.

  Layers run inside a scan, of which nothing but a gradient comes out.
  """
  del row
  return x_BTD


def _noted_forward(x_BTD, row):
  return _noted(x_BTD, row), x_BTD


def _noted_backward(x_BTD, g_BTD):
  x32 = x_BTD.astype(jnp.float32)
  variance, square = x32.var((0, 1)).mean(), (x32 * x32).mean()
  return g_BTD, jnp.stack([jnp.ones([]), variance, square])


_noted.defvjp(_noted_forward, _noted_backward)


def _of(values_BTV, targets_BT):
  return jnp.take_along_axis(values_BTV, targets_BT[..., None], -1)[..., 0]


def _name(path):
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  return name.removesuffix('/state')
