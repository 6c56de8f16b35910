"""Weight gradients taken out of the backward scan.

The gradient of a weight that every step of a recursion shares is a sum over
steps, dW = sum_s x_s^T g_s. Differentiated as it stands, a scan reads and
writes the whole sum in every step and multiplies thin matrices. Here a step
only leaves its input x_s and its cotangent g_s behind, and one product over
steps and rows together follows the scan.

A recursion asks for it by wrapping weights in `Linear` and multiplying with
`linear`; `unroll` does the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
  """A dense layer inside a recursion: `y = x @ kernel + bias`.

  kernel: `[I, O]`.
  bias: `[O]` or None.
  taps: `(x_BI, g_BO)` where `unroll` takes the gradients out of the scan: two
    inputs that the forward pass ignores, and whose cotangents are defined as
    the layer's input and its output's cotangent.
  """

  kernel: Array
  bias: Array | None = None
  taps: tuple[Array, Array] | None = None


def linear(weight: Linear, x_BI: Array) -> Array:
  """`x @ kernel + bias`, `[B, O]`."""
  if weight.taps is None:
    y_BO = x_BI @ weight.kernel
  else:
    y_BO = _tapped(x_BI, weight.kernel, *weight.taps)
  if weight.bias is None:
    return y_BO
  return y_BO + weight.bias[None]


def expose(
  weights: Tree, steps: int, batch: int, seen: Tree = ()
) -> tuple[Tree, list]:
  """Cuts the `Linear` weights of a tree off from their gradients.

  Args:
    seen: what else the steps see. Under `vmap` taps must have the mapped axis
      wherever inputs of the layers may have it: else cotangents of all rows
      would be summed before they are multiplied.

  Returns:
    The tree with constant `Linear` nodes, and for each of them taps of shape
    `[S, B, I]` and `[S, B, O]`, to be scanned over and put back by `attach`.
    The gradient reaches the weights through the taps.
  """
  zero = _zero((weights, seen))
  nodes, structure = jax.tree.flatten(weights, is_leaf=_is_linear)
  taps = [
    _expose(steps, batch, node.kernel, node.bias, zero)
    for node in nodes
    if _is_linear(node)
  ]
  nodes = [jax.lax.stop_gradient(x) if _is_linear(x) else x for x in nodes]
  return jax.tree.unflatten(structure, nodes), taps


def attach(weights: Tree, taps: list) -> Tree:
  """The tree with one step's taps in its `Linear` nodes."""
  nodes, structure = jax.tree.flatten(weights, is_leaf=_is_linear)
  rest = iter(taps)
  nodes = [
    dataclasses.replace(x, taps=tuple(next(rest))) if _is_linear(x) else x
    for x in nodes
  ]
  return jax.tree.unflatten(structure, nodes)


def _is_linear(x):
  return isinstance(x, Linear)


@jax.custom_vjp
def _tapped(x_BI, kernel, x_tap, g_tap):
  del x_tap, g_tap
  return x_BI @ kernel


def _tapped_forward(x_BI, kernel, x_tap, g_tap):
  del x_tap, g_tap
  return x_BI @ kernel, (x_BI, kernel)


def _tapped_backward(saved, g_BO):
  x_BI, kernel = saved
  return g_BO @ kernel.T, None, x_BI, g_BO


_tapped.defvjp(_tapped_forward, _tapped_backward)


def _zero(tree):
  """0 that is mapped by `vmap` where any leaf is."""
  zero = jnp.zeros([], jnp.float32)
  for x in jax.tree.leaves(tree):
    if x.size and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
      first = jax.lax.stop_gradient(x).reshape(-1)[0].astype(jnp.float32)
      zero = jnp.where(False, first, zero)
  return zero


def _expose(steps, batch, kernel, bias, zero):
  """Taps of zeros; their cotangents X, G give dW = X^T G and db = sum G."""

  @jax.custom_vjp
  def taps(kernel, bias, zero):
    zero = zero.astype(kernel.dtype)
    x_SBI = jnp.full((steps, batch, kernel.shape[0]), zero)
    g_SBO = jnp.full((steps, batch, kernel.shape[1]), zero)
    return x_SBI, g_SBO

  def forward(kernel, bias, zero):
    return taps(kernel, bias, zero), (kernel, bias)

  def backward(saved, cotangents):
    kernel, bias = saved
    x_SBI, g_SBO = cotangents
    d_kernel = jnp.einsum(
      'SBI,SBO->IO', x_SBI, g_SBO, preferred_element_type=jnp.float32
    ).astype(kernel.dtype)
    if bias is None:
      return d_kernel, None, None
    d_bias = g_SBO.astype(jnp.float32).sum((0, 1)).astype(bias.dtype)
    return d_kernel, d_bias, None

  taps.defvjp(forward, backward)
  return taps(kernel, bias, zero)
