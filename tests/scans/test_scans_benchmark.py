"""The scans' benchmark prints the share of the limits that it reaches."""

import argparse
import json
import types
import weakref

import chex
import jax
import jax.numpy as jnp
import pytest

from recursive_weights.benchmarks import device, scans
from recursive_weights.scans.kernels import stateless


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


@pytest.mark.parametrize('calls', [1, 3])
def test_of_calls_in_flight_the_last_is_waited_for(calls, monkeypatch):
  """Its result alone is held, and a time is a call's share."""
  now, held, waited = 0.0, weakref.WeakSet(), []

  class Result:
    pass

  def run():
    nonlocal now
    now += 0.5
    assert not held
    result = Result()
    held.add(result)
    return result

  def wait(result):
    nonlocal now
    now += 3.0
    waited.append(list(held) == [result])

  clock = types.SimpleNamespace(perf_counter=lambda: now)
  monkeypatch.setattr(device, 'time', clock)
  monkeypatch.setattr(jax, 'block_until_ready', wait)
  found = device.clock(run, repeats=4, calls=calls)
  assert found == [pytest.approx(500 + 3000 / calls)] * 4
  assert waited == [True] * 6


@pytest.mark.parametrize(
  ('flag', 'platform', 'calls'),
  [('', 'cpu', 1), ('', 'gpu', 10), ('--calls 1', 'gpu', 1)],
)
def test_lines_say_how_many_calls_were_in_flight(
  flag, platform, calls, monkeypatch, capsys
):
  given = []

  def measure(function, inputs, *, repeats, calls):
    given.append((repeats, calls))
    return {'ms': 1.0}

  monkeypatch.setattr(scans, 'measure', measure)
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  command = '--kernel ssd --algorithm step --heads 1'
  (line,) = lines(monkeypatch, capsys, f'{command} {flag}')
  assert line['calls'] == calls and given == [(1, calls)]


SMALL = '--key_width 2 --value_width 2 --repeats 1'


def lines(monkeypatch, capsys, command, small=SMALL):
  monkeypatch.setattr('sys.argv', f'scans {command} {small}'.split())
  scans.main()
  return [json.loads(x) for x in capsys.readouterr().out.splitlines()]


def test_a_step_and_a_prefill_have_their_times(monkeypatch, capsys):
  command = '--kernel ssd --algorithm chunked step --length 4 8 --batch 1 2'
  found = lines(monkeypatch, capsys, f'{command} --heads 1 --bandwidth 2')
  sizes = [(x['algorithm'], x['batch'], x['length']) for x in found]
  assert sizes == [
    *(('chunked', batch, length) for batch in (1, 2) for length in (4, 8)),
    *(('step', 1, 1), ('step', 2, 1)),
  ]
  for line in found:
    names = ['forward', 'forward_backward', 'prefill']
    for name in names if line['algorithm'] == 'chunked' else ['step']:
      assert line[f'{name}_ms'] > 0 and line[f'{name}_gb_per_s'] > 0
      assert line[f'{name}_share_of_roofline'] > 0
  # A state in and out, x, dt, B and C of each text, A, and y.
  one, two = (
    x['step_peak_bytes'] - x['step_temporary_bytes'] for x in found[4:]
  )
  assert one >= 4 * (2 * 4 + 2 + 1 + 2 * 2 + 1 + 2)
  assert two > one


def test_kernels_have_a_chunk_of_their_own(monkeypatch, capsys):
  small = '--key_width 16 --value_width 16 --repeats 1'
  command = '--kernel ssd --algorithm chunked fused --chunk 2 4 --length 8'
  found = lines(monkeypatch, capsys, f'{command} --heads 1', small)
  assert [(x['algorithm'], x['chunk']) for x in found] == [
    *(('chunked', 2), ('chunked', 4)),
    ('fused', stateless.CHUNK),
  ]
  assert all(x['forward_ms'] > 0 for x in found)
  # Mamba-1's takes the one that is given.
  fields = {key: [1] for key in scans.GRID} | {'chunk': [2, 4]}
  fields |= {'kernel': ['selective'], 'algorithm': ['fused']}
  sizes = scans.grid(argparse.Namespace(**fields))
  assert [size.chunk for size in sizes] == [2, 4]


@pytest.mark.parametrize('kernel', scans.KERNELS)
def test_forms_are_of_the_same_recurrence(kernel):
  """A prefill ends where steps token by token do, from the same state."""
  fields = {'batch': 2, 'length': 3, 'heads': 2, 'key_width': 2, 'groups': 1}
  fields |= {'value_width': 2, 'gate': 0.05, 'precision': 'highest'}
  fields |= {'kernel': kernel, 'dtype': 'float32', 'chunk': 2}

  def case(name, algorithm):
    size = argparse.Namespace(**fields, algorithm=algorithm)
    return scans.cases(size)[name]

  prefill, [_, state, *inputs] = case('prefill', 'chunked')
  y, end = prefill(jnp.full(2, 3), state, *inputs)
  step, [begin, *_] = case('step', 'step')
  *_, shared = scans.build(kernel, argparse.Namespace(**fields), 'float32')
  chex.assert_trees_all_equal(begin, state)
  for t in range(3):
    token = [x if i in shared else x[:, t] for i, x in enumerate(inputs)]
    y_t, state = step(state, *token)
    chex.assert_trees_all_close(y_t, y[:, t], atol=1e-5)
  chex.assert_trees_all_close(state, end, atol=1e-5)
  forward, _ = case('forward', 'chunked')
  chex.assert_trees_all_close(
    forward(*inputs, state=begin), (y, end), atol=1e-5
  )


def test_inputs_that_fail_are_a_line_and_others_go_on(monkeypatch, capsys):
  def cases(size, real=scans.cases):
    if size.batch == 2:
      raise jax.errors.JaxRuntimeError('no room')
    return real(size)

  monkeypatch.setattr(scans, 'cases', cases)
  command = '--kernel ssd --algorithm step --batch 1 2 3 --heads 1'
  found = lines(monkeypatch, capsys, command)
  assert [x['batch'] for x in found] == [1, 2, 3]
  assert [x.get('failed') for x in found] == [None, 'no room', None]


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
