"""train.py and eval.py as a user runs them: kills, devices, bad input."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# SGD, so that parameters differ as gradients do (Adam makes steps of equal size
# out of rounding errors), and every tick counts (which tick is the surest of an
# untrained model changes with the last bit).
PLAIN = (
  '--config.objective.name=every',
  '--config.optimizer.name=sgd',
  '--config.optimizer.learning_rate=0.3',
  '--config.optimizer.schedule.name=constant',
)
TINY = (
  '--config=configs/ctm_parity.py:smoke,residual',
  '--config.training.steps=24',
  '--config.training.report_every=1',
  '--config.training.evaluate_every=8',
  '--config.checkpoint.every=4',
  '--config.evaluators.after.accuracy.splits=("validation",)',
)


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Compiled programs are shared between the processes of these tests."""
  return str(tmp_path_factory.mktemp('compiled'))


def environment(cache, devices=1):
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    # The last of equal flags counts.
    'XLA_FLAGS': os.environ['XLA_FLAGS']
    + f' --xla_force_host_platform_device_count={devices}',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(cache, program, *arguments, devices=1):
  return subprocess.Popen(
    [sys.executable, program, *arguments],
    cwd=ROOT,
    env=environment(cache, devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(cache, program, *arguments, devices=1):
  process = start(cache, program, *arguments, devices=devices)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def trained(workdir):
  """Parameters, EMA and the rest of the newest checkpoint, by file."""
  import orbax.checkpoint as ocp

  steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
  folder = workdir / 'checkpoints' / str(max(steps))
  found = {}
  with ocp.StandardCheckpointer() as reader:
    for item in ('params', 'ema', 'rest'):
      found[item] = reader.restore(folder / item)
  return max(steps), found


def same_bits(a, b):
  import jax

  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def untimed(workdir):
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]


@pytest.fixture(scope='session')
def whole(cache, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  code, out, err = run(cache, 'train.py', *TINY, f'--workdir={workdir}')
  assert code == 0, err
  assert 'validation/accuracy' in out
  return workdir


def steps_reported(workdir):
  path = workdir / 'metrics.jsonl'
  return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize('times', [3, pytest.param(10, marks=pytest.mark.long)])
def test_killed_is_uninterrupted_to_the_bit(cache, whole, tmp_path, times):
  """kill -9 at random points; every life has its own dispatch length."""
  rng = random.Random(0)
  points = sorted(rng.sample(range(1, 24), times))
  for life, point in enumerate(points):
    process = start(
      cache,
      'train.py',
      *TINY,
      f'--workdir={tmp_path}',
      f'--config.training.steps_per_dispatch={1 + life % 4}',
    )
    while steps_reported(tmp_path) < point and process.poll() is None:
      time.sleep(0.002)
    # Not at a line's end, but somewhere in what follows it.
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  code, _, err = run(cache, 'train.py', *TINY, f'--workdir={tmp_path}')
  assert code == 0, err
  step, state = trained(tmp_path)
  expected_step, expected = trained(whole)
  assert step == expected_step == 24
  assert same_bits(state, expected)
  assert untimed(tmp_path) == untimed(whole)


@pytest.mark.slow
def test_sigterm_saves_where_it_is(cache, whole, tmp_path):
  process = start(cache, 'train.py', *TINY, f'--workdir={tmp_path}')
  while steps_reported(tmp_path) < 6:
    assert process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate()
  assert process.returncode == 0
  assert 'SIGTERM' in err or trained(tmp_path)[0] == 24
  assert trained(tmp_path)[0] >= 6
  run(cache, 'train.py', *TINY, f'--workdir={tmp_path}')
  assert same_bits(trained(tmp_path)[1], trained(whole)[1])


@pytest.fixture(scope='session')
def plain(cache, tmp_path_factory):
  """A whole run on one device with SGD."""
  workdir = tmp_path_factory.mktemp('plain')
  code, _, err = run(cache, 'train.py', *TINY, *PLAIN, f'--workdir={workdir}')
  assert code == 0, err
  return workdir


def assert_close(workdir, reference):
  """Metrics of every step, float32: 1e-3 relative, 1e-5 absolute."""
  for line, expected in zip(untimed(workdir), untimed(reference), strict=True):
    assert line.keys() == expected.keys()
    for name in line:
      np.testing.assert_allclose(
        line[name], expected[name], rtol=1e-3, atol=1e-5, err_msg=name
      )


@pytest.mark.long  # tests/training/test_loop.py has each step of it
def test_eight_devices_one_device_and_every_strategy(cache, plain, tmp_path):
  """8 devices under pmap -> 1 -> 8 under fsdp is one run on one device."""
  lives = ((8, 8, 'pmap'), (16, 1, 'data'), (24, 8, 'fsdp'))
  for steps, devices, strategy in lives:
    code, _, err = run(
      cache,
      'train.py',
      *TINY,
      *PLAIN,
      f'--workdir={tmp_path}',
      f'--config.devices.strategy={strategy}',
      f'--config.training.steps={steps}',
      devices=devices,
    )
    assert code == 0, err
  assert_close(tmp_path, plain)
  import chex

  # The gradient of a decay jumps where it is clamped, at 0, which is where
  # decays start: rounding decides the side.
  chex.assert_trees_all_close(
    trained(tmp_path)[1]['params'],
    trained(plain)[1]['params'],
    rtol=1e-3,
    atol=1e-3,
  )


@pytest.mark.slow
def test_two_processes_train_as_one(cache, plain, tmp_path):
  port = random.Random(os.getpid()).randrange(20000, 40000)
  processes = [
    start(
      cache,
      'train.py',
      *TINY,
      *PLAIN,
      f'--workdir={tmp_path}',
      f'--coordinator_address=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={index}',
    )
    for index in range(2)
  ]
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  assert_close(tmp_path, plain)


@pytest.mark.slow
def test_evaluation_from_the_checkpoint_alone(cache, whole, tmp_path):
  code, out, err = run(
    cache,
    'eval.py',
    f'--workdir={whole}',
    f'--output_dir={tmp_path}',
    '--config.evaluators.after.accuracy.splits=("test",)',
  )
  assert code == 0, err
  results = json.loads(out.splitlines()[-1])
  assert 0 <= results['test/accuracy'] <= 1
  assert json.loads((tmp_path / 'results.json').read_text()) == results


@pytest.mark.slow
def test_shipped_weights_reach_what_they_say(cache):
  """Within float32 rounding of another machine: one example may flip."""
  code, out, err = run(cache, 'eval.py', '--pretrained=ctm_digits')
  assert code == 0, err
  results = json.loads(out.splitlines()[-1])
  folder = ROOT / 'recursive_weights' / 'pretrained' / 'ctm_digits'
  stated = json.loads((folder / 'results.json').read_text())
  assert stated['test/accuracy'] >= 0.97
  assert abs(results['test/accuracy'] - stated['test/accuracy']) < 0.003


BAD = {
  'unknown field': (
    ['--config=configs/ctm_digits.py', '--config.model.wdth=3'],
    'config.model.wdth is no field',
  ),
  'wrong type': (
    ['--config=configs/ctm_digits.py', '--config.training.steps=many'],
    'config.training.steps must be int',
  ),
  'negative width': (
    ['--config=configs/ctm_digits.py', '--config.model.width=-3'],
    'width must be > 0, got -3',
  ),
  'several at once': (
    [
      '--config=configs/ctm_digits.py',
      '--config.training.batch_size=0',
      '--config.training.ema_decay=2.0',
      '--config.devices.strategy=all',
    ],
    'training.batch_size must be > 0, got 0; training.ema_decay must lie in '
    "[0, 1), got 2.0; devices.strategy must be one of ('data', 'fsdp', 'pmap')",
  ),
  # Parts that configs share, such as configs/derivations.py, are not listed.
  'several parts at once': (
    ['--config=configs/ctm_parity.py:smoke']
    + ['--config.optimizer.learning_rate=0.0', '--config.optimizer.b1=2.0']
    + ['--config.evaluators.during.accuracy.splits=("tset",)']
    + ['--config.evaluators.after.accuracy.splits=("train",)']
    + ['--config.federation.every=3'],
    'optimizer.learning_rate must be > 0, got 0.0; optimizer.b1 must lie in '
    "[0, 1), got 2.0; evaluators.during.accuracy: splits must be among ('train'"
    ", 'validation', 'test'), got 'tset'; evaluators.after.accuracy: "
    "split 'train' has no end: give max_batches, got max_batches=None; "
    'federation needs members',
  ),
  'missing file': (
    ['--config=configs/nothing.py'],
    'configs/ctm_parity.py, configs/hybrid_lm.py',
  ),
  'config that is no Python': (
    ['--config=README.md'],
    "--config must be a Python file with get_config, got 'README.md'",
  ),
  'unknown variant': (
    ['--config=configs/ctm_digits.py:big'],
    'unknown variant',
  ),
  'unknown flag': (['--wrokdir=x'], 'wrokdir'),
  'stray argument': (['configs/ctm_digits.py'], 'unexpected argument'),
  'unknown operator': (
    ['--config=configs/ctm_digits.py']
    + ['--config.recursive.rules.w2.operator.name=fractal'],
    "derivation.operators has no 'fractal'",
  ),
  'text shorter than a track': (
    ['--config=configs/hybrid_lm.py', '--config.task.path=TEXT']
    + ['--config.task.split_by=position'],
    'config: batch_size x length must be at most the 18 tokens of the training '
    'text, got 16 x 128',
  ),
  'missing checkpoint': (
    ['--config=configs/ctm_parity.py:smoke', '--config.init_from=nowhere'],
    'is no folder',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_clear_message(cache, tmp_path, name):
  arguments, message = BAD[name]
  text, workdir = tmp_path / 'text.txt', tmp_path / 'run'
  text.write_text('the quick brown fox')
  arguments = [x.replace('TEXT', str(text)) for x in arguments]
  code, out, err = run(cache, 'train.py', *arguments, f'--workdir={workdir}')
  assert code == 2
  assert out == ''
  assert message in err.splitlines()[-1]
  assert 'Traceback' not in err
  assert not (workdir / 'metrics.jsonl').exists()


BAD_PROGRAMS = {
  'no tiers': (
    ['matrix', '--config=configs/ctm_digits.py', '--workdir=WORKDIR'],
    'give one such as configs/hybrid_matrix.py',
  ),
  'no numbers of questions': (
    ['retrieval', '--config=configs/basis_retrieval.py', '--train_questions=']
    + ['--output_dir=WORKDIR'],
    '--train_questions must be one number or more',
  ),
  'no variants': (
    ['compare', '--config=configs/ctm_digits.py', '--variants=;']
    + ['--workdir=WORKDIR'],
    "--variants must be one or more, joined by ';'",
  ),
  'tiles that are no JSON': (
    ['benchmarks.trm', '--tiles', 'x'],
    'must be JSON such as {"token": {"columns": 64}}',
  ),
  'tiles of no kernel': (
    ['benchmarks.trm', '--tiles', '{"tokn": {}}'],
    'by kernel (token, channel, attention, constraint, cell)',
  ),
  'places that a cell lacks': (
    ['benchmarks.trm', '--cell', 'mixer', 'symmetric', '--tokens', '81', '97'],
    '--tokens must be 81 with --cell symmetric',
  ),
  'groups that do not divide heads': (
    ['benchmarks.scans', '--groups', '3'],
    '--groups must divide --heads with --kernel ssd, got 3 for 4',
  ),
  'no groups': (
    ['benchmarks.scans', '--groups', '0'],
    '--groups must be > 0, got 0',
  ),
  'a pattern of no layer': (
    ['benchmarks.hybrid', '--pattern', 'R', 'X'],
    "none, such as '3R1M', got 'X'",
  ),
  **{
    f'dtype of {name}': (
      [f'benchmarks.{name}', *more, '--dtype', 'foo'],
      "argument --dtype: invalid choice: 'foo'",
    )
    for name, more in {
      **dict.fromkeys(('ctm', 'hybrid', 'scans', 'trm'), ()),
      'trm_halves': ('token',),
    }.items()
  },
}


@pytest.mark.parametrize('name', BAD_PROGRAMS)
def test_bad_input_of_other_programs_too(cache, tmp_path, name):
  (program, *arguments), message = BAD_PROGRAMS[name]
  workdir = str(tmp_path / 'run')
  arguments = [x.replace('WORKDIR', workdir) for x in arguments]
  module = f'recursive_weights.{program}'
  code, out, err = run(cache, '-m', module, *arguments)
  assert code == 2
  assert out == ''
  assert message in err.splitlines()[-1]
  assert 'Traceback' not in err
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_text_of_small_letters_needs_no_other_config(cache, tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text('the quick brown fox jumps over the lazy dog. ' * 50)
  code, _, err = run(
    cache,
    'train.py',
    '--config=configs/hybrid_lm.py:smoke,attention',
    '--config.training.steps=2',
    f'--config.task.path={text}',
    '--config.task.split_by=position',
    f'--workdir={tmp_path / "run"}',
  )
  assert code == 0, err
  assert "samples without a prompt: 'The ' cannot be written" in err
  assert (tmp_path / 'run' / 'samples.txt').exists()


@pytest.mark.slow
def test_config_of_another_model_changes_nothing(cache, whole):
  before = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
  code, _, err = run(
    cache, 'train.py', *TINY, f'--workdir={whole}', '--config.model.width=48'
  )
  assert code == 2
  assert 'holds another experiment: model.width: 48 here' in err
  assert {p: p.stat().st_mtime_ns for p in whole.rglob('*')} == before


@pytest.mark.slow
def test_nan_loss_stops_with_the_last_checkpoint_named(cache, tmp_path):
  code, _, err = run(
    cache,
    'train.py',
    *TINY,
    f'--workdir={tmp_path}',
    '--config.optimizer.learning_rate=1e30',
    '--config.optimizer.clip_norm=0.0',
  )
  assert code == 3
  assert 'last good checkpoint is' in err or 'no checkpoint yet' in err
  assert 'Traceback' not in err


def test_eval_wants_exactly_one_source(cache):
  code, _, err = run(cache, 'eval.py')
  assert code == 2 and 'exactly one of' in err
  code, _, err = run(cache, 'eval.py', '--workdir=nowhere')
  assert code == 2 and 'no folder' in err
  code, _, err = run(cache, 'eval.py', '--pretrained=nothing')
  assert code == 2 and 'no pretrained weights' in err


def test_print_config_and_help(cache):
  code, out, _ = run(
    cache,
    'train.py',
    '--config=configs/ctm_digits.py:power',
    '--print_config',
    '--config.seed=7',
  )
  assert code == 0
  config = json.loads(out)
  assert config['seed'] == 7
  assert config['recursive']['rules']['w2']['operator'] == {'name': 'power'}
  code, out, _ = run(cache, 'train.py', '--help')
  assert code == 0 and '--workdir' in out and 'absl' not in out


def test_package_imports_fast():
  """Under a second beyond jax itself; three tries, for a busy machine."""
  program = (
    'import time, jax; t = time.perf_counter(); import recursive_weights; '
    'print(time.perf_counter() - t)'
  )
  times = [
    float(subprocess.check_output([sys.executable, '-c', program], cwd=ROOT))
    for _ in range(3)
  ]
  assert min(times) < 1.0


def test_benchmarks_of_tiny_recursion_print_their_lines(cache):
  small = ['--batch=2', '--width=32', '--dtype=float32', '--repeats=1']
  module = 'recursive_weights.benchmarks.trm'
  step = ['--fused=plain', '--unrolled=1']
  code, out, _ = run(cache, '-m', module, *small, *step)
  (line,) = map(json.loads, out.splitlines())
  assert code == 0 and line['ms'] > 0 and line['peak_bytes'] > 0
  halves = ['channel', '--tokens=8', '--settings=1']
  code, out, _ = run(cache, '-m', f'{module}_halves', *halves, *small)
  lines = list(map(json.loads, out.splitlines()))
  assert code == 0 and [x['tiles'] for x in lines][:2] == ['plain', {}]
  assert all(x['both_ms'] > 0 and x['error'] < 1e-5 for x in lines)
