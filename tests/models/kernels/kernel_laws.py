"""What every fused half obeys, for the tests beside this file."""

import chex
import jax
import jax.numpy as jnp


def value_and_gradients(half, params, x, g):
  """The value, and the gradients of `sum(g value)` in parameters and x."""

  @jax.jit
  def both(params, x):
    y, pull = jax.vjp(half, params, x)
    return y, pull(g)

  return both(params, x)


def check_is_plain(fused, plain, case):
  """Values and gradients, in float32."""
  chex.assert_trees_all_close(
    value_and_gradients(fused, *case),
    value_and_gradients(plain, *case),
    rtol=2e-5,
    atol=2e-5,
  )


def check_as_far_from_float32_as_plain(fused, plain, case):
  """Of a case in bfloat16: values and gradients round no worse."""
  params, x, g = case
  wide = params, x.astype(jnp.float32), g.astype(jnp.float32)
  exact = value_and_gradients(plain, *wide)

  def distance(half):
    found = value_and_gradients(half, *case)
    return jax.tree.map(
      lambda a, b: (
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
      ),
      found,
      exact,
    )

  for ours, theirs in zip(
    jax.tree.leaves(distance(fused)),
    jax.tree.leaves(distance(plain)),
    strict=True,
  ):
    assert ours < 1.2 * theirs + 1e-3
    assert ours < 2e-2
