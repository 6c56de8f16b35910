"""What a device can do at most, and what a program on it takes."""

import collections
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax

# What models compute in.
DTYPES = ('float32', 'bfloat16', 'float16')

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


def clock(run: Callable, *, repeats: int, calls: int) -> list[float]:
  """Milliseconds of a call, means over `calls` of which the last is waited for.

  A device does them in turn, so all have ended then. Nothing holds the results
  of the others.
  """
  times = []
  for _ in range(2 + repeats):
    started = time.perf_counter()
    for _ in range(calls - 1):
      run()
    jax.block_until_ready(run())
    times.append(1e3 * (time.perf_counter() - started) / calls)
  return times[2:]


def kernel_ms(run: Callable[[], None], calls: int) -> dict[str, float]:
  """Milliseconds a call by GPU kernel, longest first; {} without a GPU.

  Args:
    run: does all calls and waits for them.
    calls: how many they are.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    total: collections.Counter[str] = collections.Counter()
    for plane in planes:
      if not plane.name.startswith('/device:GPU'):
        continue
      for line in plane.lines:
        if line.name.startswith('Stream'):
          for event in line.events:
            total[event.name] += event.duration_ns
  return {name: ns / 1e6 / calls for name, ns in total.most_common()}
