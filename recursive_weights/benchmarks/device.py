"""What a device can do at most, for shares of it."""

import jax

# Dense bfloat16 products, TFLOP/s, and memory, bytes/s, by a part of the name:
# NVIDIA's data sheets of the SXM parts.
LIMITS = {'H100': (989.0, 3.35e12), 'H200': (989.0, 4.8e12)}


def limits() -> tuple[float, float]:
  """TFLOP/s and bytes/s of the first device; zeros where they are not known."""
  kind = jax.devices()[0].device_kind
  return next((both for name, both in LIMITS.items() if name in kind), (0, 0))
