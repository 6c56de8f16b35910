"""Dense layers, normalisation, gated units and dropout on plain arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array


def uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
  """Float32 of U(-bound, bound)."""
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def init(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
  """`{kernel [I, O], bias [O]}`, both U(-1/sqrt(I), 1/sqrt(I))."""
  kernel_key, bias_key = jax.random.split(key)
  bound = 1 / np.sqrt(inputs)
  return {
    'kernel': uniform(kernel_key, (inputs, outputs), bound),
    'bias': uniform(bias_key, (outputs,), bound),
  }


def apply(params: dict[str, Array], x: Array) -> Array:
  """`x @ kernel + bias` over the last axis, in the dtype of `x`."""
  kernel = params['kernel'].astype(x.dtype)
  bias = params['bias'].astype(x.dtype)
  return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def norm_init(width: int) -> dict[str, Array]:
  """`{scale [D], bias [D]}`: one and zero."""
  return {'scale': jnp.ones([width]), 'bias': jnp.zeros([width])}


def norm(params: dict[str, Array], x: Array, axis: int = -1) -> Array:
  """Layer normalisation over one axis, in float32, returned in x's dtype.

  `(x - mean) / sqrt(var + 1e-5) * scale + bias`
  """
  x32 = x.astype(jnp.float32)
  mean = x32.mean(axis, keepdims=True)
  centred = x32 - mean
  var = (centred * centred).mean(axis, keepdims=True)
  shape = [1] * x.ndim
  shape[axis] = -1
  scale, bias = params['scale'].reshape(shape), params['bias'].reshape(shape)
  return (centred * jax.lax.rsqrt(var + 1e-5) * scale + bias).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def glu(x: Array, axis: int = -1) -> Array:
  """Gated linear unit `a * sigmoid(b)`, with a and b the halves of an axis.

  The backward pass computes sigmoid(b) again from x and writes the cotangent
  of both halves in one pass over memory.
  """
  a, b = jnp.split(x, 2, axis)
  return a * jax.nn.sigmoid(b)


def _glu_forward(x, axis):
  return glu(x, axis), x


def _glu_backward(axis, x, g):
  a, b = jnp.split(x, 2, axis)
  s = jax.nn.sigmoid(b)
  return (jnp.concatenate([g * s, g * a * s * (1 - s)], axis),)


glu.defvjp(_glu_forward, _glu_backward)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
  """Zeroes entries with probability `rate`; no key or rate 0: `x` itself."""
  if key is None or rate == 0.0:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
