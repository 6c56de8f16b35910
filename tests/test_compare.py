"""Comparisons and transfers as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from recursive_weights import compare

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = 'configs/ctm_parity.py'
TINY = ('--config.training.steps=4', '--config.training.report_every=1')


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Compiled programs are shared between the processes of these tests."""
  return str(tmp_path_factory.mktemp('compiled'))


def run(cache, module, *arguments):
  process = subprocess.run(
    [sys.executable, '-m', f'recursive_weights.{module}', *arguments],
    cwd=ROOT,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '',
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr


@pytest.fixture(scope='module')
def compared(tmp_path_factory, cache):
  folder = tmp_path_factory.mktemp('compared')
  arguments = (
    f'--config={CONFIG}',
    '--variants=smoke,independent;smoke,polynomial',
    '--num_seeds=1',
    f'--workdir={folder}',
    *TINY,
  )
  return folder, arguments, run(cache, 'compare', *arguments)


@pytest.mark.long
def test_compare_trains_once_and_tells_the_difference(compared, cache):
  folder, arguments, (code, out, err) = compared
  assert code == 0, err
  rows = json.loads((folder / 'table.json').read_text())
  independent, derived = rows
  assert [r['variant'] for r in rows] == [
    'smoke,independent',
    'smoke,polynomial',
  ]
  # W2 [2, 8, 32] is not stored; 4 slots and 4 coefficients are.
  saved = independent['parameters'] - derived['parameters']
  assert saved == 2 * 8 * 32 - 8
  assert derived['parameters_%'] < 0 == independent['parameters_%']
  assert len(derived['final_loss_by_seed']) == 1
  assert out.splitlines()[-1] == json.dumps(
    {r['variant']: r['final_loss'] for r in rows}
  )
  curve = folder / 'smoke-polynomial' / 'metrics.jsonl'
  before = curve.read_bytes()
  code, again, err = run(cache, 'compare', *arguments)
  assert code == 0, err
  assert curve.read_bytes() == before
  assert again.splitlines()[-1] == out.splitlines()[-1]


@pytest.mark.slow
def test_runs_without_final_evaluators_are_finished_too(tmp_path, cache):
  arguments = (
    'compare',
    '--config=configs/basis_synthetic.py',
    '--variants=smoke',
    '--num_seeds=1',
    f'--workdir={tmp_path}',
  )
  code, out, err = run(cache, *arguments)
  assert code == 0, err
  again = run(cache, *arguments)
  assert again[0] == 0 and again[1].splitlines()[-1] == out.splitlines()[-1]
  # Results of a shorter run are none of the one that goes on from it.
  results = tmp_path / 'smoke' / 'results.json'
  assert compare.finished(tmp_path / 'smoke')
  results.write_text(json.dumps(json.loads(results.read_text()) | {'step': 1}))
  assert not compare.finished(tmp_path / 'smoke')
  results.unlink()
  assert not compare.finished(tmp_path / 'smoke')


@pytest.mark.slow
def test_a_mistake_in_the_last_variant_costs_no_training(tmp_path, cache):
  code, _, err = run(
    cache,
    'compare',
    f'--config={CONFIG}',
    '--variants=smoke,polynomial;smoke,nonsense',
    f'--workdir={tmp_path / "runs"}',
    *TINY,
  )
  assert code == 2
  assert 'unknown variant nonsense' in err and 'Traceback' not in err
  assert not (tmp_path / 'runs').exists()


@pytest.mark.long
def test_transfer_moves_the_learnt_operator(compared, cache, tmp_path):
  folder, _, _ = compared
  code, _, err = run(
    cache,
    'transfer',
    f'--config={CONFIG}:smoke,polynomial',
    f'--trained={folder / "smoke-polynomial"}',
    '--num_seeds=1',
    f'--workdir={tmp_path}',
    '--config.model.width=48',
    *TINY,
  )
  assert code == 0, err
  rows = json.loads((tmp_path / 'table.json').read_text())
  assert [r['variant'] for r in rows] == ['identity', 'learnt', 'random']
  losses = {r['variant']: r['final_loss'][0] for r in rows}
  assert len(set(losses.values())) == 3  # the three T differ
  code, _, err = run(
    cache,
    'transfer',
    f'--config={CONFIG}:smoke,polynomial',
    f'--trained={folder / "smoke-independent"}',
    f'--workdir={tmp_path / "none"}',
  )
  assert code == 2
  assert 'derives no weights' in err and 'Traceback' not in err
