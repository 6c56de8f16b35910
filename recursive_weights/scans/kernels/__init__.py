"""Scans as GPU kernels: the same signature as the plain form, its reference."""

import jax
from jax.sharding import AxisType


def on_one_gpu() -> bool:
  """Whether what is traced runs on a GPU by itself."""
  return jax.default_backend() == 'gpu' and on_one_device()


def on_one_device() -> bool:
  """Whether what is traced runs on a device by itself.

  That is the only one, or one of those that each run the program by themselves
  (`jax.pmap`, `jax.shard_map`): a program that the compiler splits over several
  devices needs operations that it knows how to split.
  """
  kinds = jax.sharding.get_abstract_mesh().axis_types
  own = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)
  return own or jax.device_count() == 1
