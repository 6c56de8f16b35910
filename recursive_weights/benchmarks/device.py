"""What a device can do at most, for shares of it, and what a program holds."""

import jax

# By a part of the name: memory in GB/s, and TFLOP/s without sparsity by the
# bytes of a number, float32 on no matrix unit. NVIDIA's data sheets, SXM parts.
LIMITS = {
  'H100': (3350.0, {2: 989.0, 4: 67.0}),
  'H200': (4800.0, {2: 989.0, 4: 67.0}),
}


def limits(itemsize: int = 2) -> tuple[float, float]:
  """TFLOP/s and GB/s of the first device; 0 where they are not known."""
  kind = jax.devices()[0].device_kind
  for name, (bandwidth, tflops) in LIMITS.items():
    if name in kind:
      return tflops.get(itemsize, 0.0), bandwidth
  return 0.0, 0.0


def peak_bytes(memory) -> int | None:
  """Memory that a program takes by the compiler's count, None where unknown.

  Arguments, outputs that do not lie in them, and temporaries.

  Args:
    memory: `compiled.memory_analysis()`.
  """
  if memory is None:
    return None
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
