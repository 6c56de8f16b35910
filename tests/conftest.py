"""Eight simulated devices and strict rank promotion for every test.

A worker has cores of its own, and so have the processes that it starts: where
threads of two workers waited for each other on the same cores, that was more
than half of a notebook's processor time, and six sevenths of another test's.

Most of the suite's time is compiling programs that then run a few tiny steps,
so LLVM does not optimise them, XLA's emitters of fusions are off (a hybrid's
step compiles in a quarter of the time), a program is compiled in one part and
its operations name one line of their origin (a tenth of the time), and programs
are kept for the session, as many tests compile the same ones. Set XLA_FLAGS to
compile as users do:
--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true
"""

import gc
import importlib.util
import mmap
import os
import pathlib
import tempfile


def known(flag):
  """Whether XLA has a flag; one that it has not would end the process.

  Names stand alone between zeros; those of fields that are kept free do not.
  """
  folder = pathlib.Path(importlib.util.find_spec('jaxlib').origin).parent
  for path in folder.glob('libjax_common*'):
    with (
      path.open('rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
      return content.find(b'\0' + flag.encode() + b'\0') >= 0
  return False


def share(cores):
  """Those of this worker of pytest; all where there are fewer than workers."""
  worker = os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')
  workers = os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1')
  return sorted(cores)[int(worker) :: int(workers)] or cores


if hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, share(os.sched_getaffinity(0)))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flags = os.environ.get('XLA_FLAGS', '')
if 'optimization_level' not in flags:
  flags += ' --xla_backend_optimization_level=0'
for flag, value in (
  ('xla_cpu_use_fusion_emitters', 'false'),
  ('xla_cpu_parallel_codegen_split_count', '1'),
):
  if flag not in flags and known(flag):
    flags += f' --{flag}={value}'
os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count=8'
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # else a worker of pytest
  programs = tempfile.TemporaryDirectory(prefix='recursive_weights_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = programs.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
os.environ.setdefault('JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS', 'false')

import jax

# Tracing makes many objects and few cycles: looking for them as often as Python
# does by default took some tenth of the time of two files.
gc.set_threshold(100_000, 50, 100)

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """Notebooks first: the longest file, which one worker has to itself."""
  items.sort(key=lambda item: 'test_notebooks' not in item.nodeid)
