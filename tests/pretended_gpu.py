"""A GPU that is not there, to what chooses programs by the device."""

import sys
import types

import jax


def pretend(monkeypatch, capability):
  """One GPU of this compute capability, called 'Some GPU'."""
  gpu = types.SimpleNamespace(
    compute_capability=capability, device_kind='Some GPU'
  )
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


def without_triton(monkeypatch):
  """A JAX whose Pallas has lost the backend of most kernels."""
  monkeypatch.setitem(sys.modules, 'jax.experimental.pallas.triton', None)
