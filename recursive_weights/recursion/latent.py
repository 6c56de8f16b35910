"""Latent recursion: an answer y and a thought z that improve each other.

One supervision step is T cycles; a cycle is

  n times:  z <- f(z + (y + x)),      then      y <- f(y + z)

with one network f for both. The first T - 1 cycles carry no gradient: the
gradient is the one with their result fed in as a constant.

Source: A. Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny
Networks, 2025 (arXiv 2510.04871), section 4.
"""

from collections.abc import Callable

import jax

from recursive_weights.interfaces import Array, Tree

GRADIENTS = ('cycle', 'update', 'all')

Net = Callable[[Tree, Array], Array]


def cycle(
  net: Net,
  weights: Tree,
  x: Array,
  state: dict[str, Array],
  inner: int,
  *,
  unrolled: int = 1,
) -> dict[str, Array]:
  """One cycle: n = `inner` updates of z, then one of the answer.

  With a state `{'z'}` alone, the variant of a single latent, it is n + 1
  updates `z <- f(z + x)`.

  Args:
    net: `f(weights, u) -> u`, any shapes.
    weights: of f.
    x: the embedded input, like the states.
    state: `{'y', 'z'}` or `{'z'}`.
    inner: n, at least 0.
    unrolled: updates in one body of the compiled loop; `inner` or more makes
      it no loop at all.
  """
  if 'y' not in state:
    return {'z': _repeat(net, weights, x, state['z'], inner + 1, unrolled)}
  y, z = state['y'], state['z']
  z = _repeat(net, weights, y + x, z, inner, unrolled)
  return {'y': net(weights, y + z), 'z': z}


def supervision_step(
  net: Net,
  weights: Tree,
  x: Array,
  state: dict[str, Array],
  *,
  cycles: int = 3,
  inner: int = 6,
  gradient: str = 'cycle',
  remat: bool = False,
  unrolled: int = 1,
) -> dict[str, Array]:
  """T = `cycles` cycles; `state` and what comes back are `{'y', 'z'}`.

  Args:
    net, weights, x, state, inner, unrolled: see `cycle`.
    cycles: T, at least 1.
    gradient: what carries a gradient: 'cycle' the last cycle, as published;
      'update' only the last update of z and that of y, the one-step gradient
      of earlier models; 'all' every cycle.
    remat: keep only the states of the updates that carry a gradient, and run
      the network again in the backward pass.

  Raises:
    ValueError: a number is out of range.
  """
  if cycles < 1:
    raise ValueError(f'cycles must be > 0, got {cycles}')
  if inner < 0:
    raise ValueError(f'inner must be >= 0, got {inner}')
  if gradient not in GRADIENTS:
    raise ValueError(f'gradient must be one of {GRADIENTS}, got {gradient!r}')
  trained = jax.checkpoint(net) if remat else net

  def run(net, weights, x, state, cycles):
    def body(state, _):
      return cycle(net, weights, x, state, inner, unrolled=unrolled), None

    if cycles == 1:
      return body(state, None)[0]
    return jax.lax.scan(body, state, None, length=cycles)[0]

  if gradient == 'all':
    return run(trained, weights, x, state, cycles)
  if cycles > 1:
    # Cut off before and after: what comes in, so that no residual is kept for
    # these cycles, and what goes out, so that nothing of them is a variable.
    state = jax.lax.stop_gradient(
      run(net, *jax.lax.stop_gradient((weights, x, state)), cycles - 1)
    )
  if gradient == 'cycle':
    return run(trained, weights, x, state, 1)
  return _last_update(net, weights, x, state, inner, unrolled)


def _last_update(net, weights, x, state, inner, unrolled):
  """A cycle with a gradient through its last update of each state alone."""
  still_weights, still_x = jax.lax.stop_gradient((weights, x))
  z = jax.lax.stop_gradient(state['z'])
  if 'y' not in state:
    z = _repeat(net, still_weights, still_x, z, inner, unrolled)
    return {'z': net(weights, jax.lax.stop_gradient(z) + x)}
  y = jax.lax.stop_gradient(state['y'])
  if inner:
    z = _repeat(net, still_weights, y + still_x, z, inner - 1, unrolled)
    z = net(weights, jax.lax.stop_gradient(z) + (y + x))
  return {'y': net(weights, y + z), 'z': z}


def _repeat(net, weights, offset, z, count, unrolled):
  """`count` times `z <- net(z + offset)`."""
  if unrolled >= count:
    for _ in range(count):
      z = net(weights, z + offset)
    return z

  def body(z, _):
    return net(weights, z + offset), None

  return jax.lax.scan(body, z, None, length=count, unroll=unrolled)[0]
