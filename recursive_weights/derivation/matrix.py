"""How an operator sees a weight: `[..., D]` as a matrix of F rows, `[F, D]`.

Also the two-layer network that several operators share.
"""

import math

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import UserError


def size(shape: tuple[int, ...]) -> tuple[int, int]:
  """Rows F and columns D of the matrix view of a base of this shape."""
  if not shape:
    raise UserError('base must have at least one axis, got a scalar')
  return math.prod(shape[:-1]), shape[-1]


def view(base) -> jax.Array:
  """`[..., D] -> w_FD`, in float32 at least."""
  dtype = jnp.promote_types(base.dtype, jnp.float32)
  return base.reshape(size(base.shape)).astype(dtype)


def restore(w_FD, base) -> jax.Array:
  """The inverse of `view`: shape and dtype of `base`."""
  return w_FD.reshape(base.shape).astype(base.dtype)


def matmul(*factors) -> jax.Array:
  """Product of matrices in full float32, whatever the device's default."""
  product = factors[0]
  for factor in factors[1:]:
    product = jnp.matmul(product, factor, precision='highest')
  return product


def network_init(key, inputs: int, hidden: int, outputs: int) -> dict:
  """`inputs -> hidden -> outputs`; the last layer is zero."""
  kernel = jax.nn.initializers.lecun_normal()(key, (inputs, hidden))
  return {
    'down': {'kernel': kernel, 'bias': jnp.zeros(hidden)},
    'up': {'kernel': jnp.zeros((hidden, outputs)), 'bias': jnp.zeros(outputs)},
  }


def network_apply(theta, x_FD) -> jax.Array:
  """`up(gelu(down(x)))` row by row, with the exact GELU."""
  down, up = theta['down'], theta['up']
  h_FH = matmul(x_FD, down['kernel']) + down['bias'][None, :]
  h_FH = jax.nn.gelu(h_FH, approximate=False)
  return matmul(h_FH, up['kernel']) + up['bias'][None, :]


def network_count(inputs: int, hidden: int, outputs: int) -> int:
  """Parameters of the network: both kernels, both biases."""
  return inputs * hidden + hidden + hidden * outputs + outputs


def positive(**values):
  """Raises unless every named value is > 0."""
  for name, value in values.items():
    if not value > 0:
      raise UserError(f'{name} must be > 0, got {value}')


def one_of(name: str, value, allowed: tuple):
  """Raises unless `value` is one of `allowed`."""
  if value not in allowed:
    raise UserError(f'{name} must be one of {allowed}, got {value!r}')
