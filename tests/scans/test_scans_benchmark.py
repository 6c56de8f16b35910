"""The scans' benchmark prints the share of the limits that it reaches."""

import argparse
import json
import types

import jax
import pytest

from recursive_weights.benchmarks import device, scans


def test_share_of_the_roofline(monkeypatch, capsys):
  command = (
    'scans --kernel ssd --algorithm recurrent --length 4 --heads 1 '
    '--key_width 2 --value_width 2 --repeats 1 --bandwidth 2 --peak 3'
  )
  monkeypatch.setattr('sys.argv', command.split())
  scans.main()
  line = json.loads(capsys.readouterr().out)
  for name in ('forward', 'forward_backward'):
    shares = line[f'{name}_gb_per_s'] / 2, line[f'{name}_tflops'] / 3
    found = line[f'{name}_share_of_roofline']
    assert found == pytest.approx(max(shares), rel=1e-3)
    # x, dt, A, B and C; y and the state, or as many gradients as inputs.
    inputs = 4 * 2 + 4 + 1 + 2 * 4 * 2
    outputs = 4 * 2 + 2 * 2 if name == 'forward' else inputs + 1
    held = line[f'{name}_peak_bytes'] - line[f'{name}_temporary_bytes']
    assert held >= 4 * (inputs + outputs)


def test_peak_counts_once_what_outputs_take_from_arguments():
  memory = types.SimpleNamespace(
    argument_size_in_bytes=40,
    output_size_in_bytes=60,
    temp_size_in_bytes=30,
    alias_size_in_bytes=40,
  )
  assert device.peak_bytes(memory) == 90
  assert device.peak_bytes(None) is None


def test_limits_are_of_the_device_or_of_flags(monkeypatch):
  def limits(bandwidth=None):
    flags = argparse.Namespace(bandwidth=bandwidth, peak=None)
    return tuple(scans.roof(flags, 'bfloat16').values())

  assert limits() == (0.0, 0.0)
  gpu = types.SimpleNamespace(device_kind='NVIDIA H200')
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  assert limits() == (4800.0, 989.0)
  assert limits(bandwidth=1.0) == (1.0, 989.0)
