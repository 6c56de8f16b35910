"""Scans as GPU kernels: the same signature as the plain form, its reference."""

import importlib.util
import logging

import jax
from jax.sharding import AxisType

from recursive_weights.interfaces import UserError

AMPERE, HOPPER = 8, 9
_log = logging.getLogger(__name__)


def generation() -> int:
  """The first number of an NVIDIA GPU's compute capability; 0 of others.

  Of the first device: 7 is Volta and Turing (V100, T4), 8 Ampere and Ada.
  """
  capability = getattr(jax.devices()[0], 'compute_capability', '')
  major = str(capability).partition('.')[0]
  return int(major) if major.isdigit() else 0


def shared_memory() -> int:
  """Bytes that a program may have on chip; where unknown, those of Hopper."""
  device = jax.devices()[0]
  return getattr(device, 'shared_memory_per_block_optin', 227 * 1024)


def has_triton() -> bool:
  """Whether this JAX has the backend of most kernels, which is to be removed.

  jax 0.11 says so; without it plain forms run, which a GPU's owner is told.
  """
  found = importlib.util.find_spec('jax.experimental.pallas.triton') is not None
  if not found and generation() >= AMPERE:
    _log.warning(
      'jax %s has no Triton backend of Pallas: slower plain forms run in the '
      'place of GPU kernels',
      jax.__version__,
    )
  return found


def on_one_gpu() -> bool:
  """Whether what is traced runs by itself on a GPU that can run kernels."""
  return generation() >= AMPERE and on_one_device() and has_triton()


def check_triton() -> None:
  """Refuses a JAX from which kernels cannot be imported.

  Raises:
    UserError: it does not have their backend.
  """
  if not has_triton():
    raise UserError(
      f'kernels need the Triton backend of Pallas, which jax {jax.__version__} '
      "does not have: leave 'fused' out, or install jax 0.11"
    )


def check_gpu() -> None:
  """Refuses a GPU that cannot run kernels; without a GPU they are simulated.

  Raises:
    UserError: Pallas does not compile for this GPU through Triton.
  """
  if jax.default_backend() == 'gpu' and generation() < AMPERE:
    raise UserError(
      'kernels need an NVIDIA GPU of compute capability 8.0 or more, got '
      f"{jax.devices()[0].device_kind}: leave 'fused' out"
    )


def on_one_device() -> bool:
  """Whether what is traced runs on a device by itself.

  That is the only one, or one of those that each run the program by themselves
  (`jax.pmap`, `jax.shard_map`): a program that the compiler splits over several
  devices needs operations that it knows how to split.
  """
  kinds = jax.sharding.get_abstract_mesh().axis_types
  own = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)
  return own or jax.device_count() == 1
