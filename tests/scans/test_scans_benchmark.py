"""The scans' benchmark prints the share of the limits that it reaches."""

import argparse
import json
import types

import jax
import pytest

from recursive_weights.benchmarks import scans


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


def test_limits_are_of_the_device_or_of_flags(monkeypatch):
  def limits(bandwidth=None):
    flags = argparse.Namespace(bandwidth=bandwidth, peak=None)
    return tuple(scans.roof(flags, 'bfloat16').values())

  assert limits() == (0.0, 0.0)
  gpu = types.SimpleNamespace(device_kind='NVIDIA H200')
  monkeypatch.setattr(jax, 'devices', lambda: [gpu])
  assert limits() == (4800.0, 989.0)
  assert limits(bandwidth=1.0) == (1.0, 989.0)
