"""Eight simulated devices and strict rank promotion for every test.

Most of the suite's time is compiling programs that then run a few tiny steps,
so LLVM does not optimise them, and they are kept for the session, as many tests
compile the same ones. With optimisation, as users compile:
XLA_FLAGS=--xla_backend_optimization_level=3 pytest
"""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flags = os.environ.get('XLA_FLAGS', '')
if 'optimization_level' not in flags:
  flags += ' --xla_backend_optimization_level=0'
flags += ' --xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = flags
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # else a worker of pytest
  programs = tempfile.TemporaryDirectory(prefix='recursive_weights_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = programs.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """Notebooks first: the longest file, which one worker has to itself."""
  items.sort(key=lambda item: 'test_notebooks' not in item.nodeid)
