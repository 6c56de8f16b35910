"""The training loop, the same for every system."""

import contextlib
import itertools
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from recursive_weights import config as config_lib
from recursive_weights.interfaces import Evaluator, Task, Tree, UserError
from recursive_weights.io import json_files
from recursive_weights.training import checkpoints as checkpoints_lib
from recursive_weights.training import devices, lock, metrics, stopping
from recursive_weights.training.interrupt import Interrupt
from recursive_weights.training.start import start
from recursive_weights.training.state import State

_log = logging.getLogger(__name__)


class Experiment(NamedTuple):
  """What `build` makes of a config and `run` trains.

  config: the resolved config as plain data.
  tasks: one by seed; they differ in the order of their data alone.
  init: `seed -> State`, traceable.
  make_step: `axis name or None -> step(state, batch)`.
  during, after: evaluators by name, run at intervals and at the end.
  every: `((n, f), ...)`: at every n-th step `state = f(state)`, before that
    step's report (federated synchronisation is one).
  """

  config: dict[str, Any]
  tasks: tuple[Task, ...]
  init: Callable[[jax.Array], State]
  make_step: Callable[[str | None], Callable]
  during: dict[str, Evaluator]
  after: dict[str, Evaluator]
  every: tuple[tuple[int, Callable[[State], State]], ...] = ()


class Diverged(Exception):
  """Loss or gradient is not finite; the message names the last checkpoint."""


def run(experiment: Experiment, workdir: str) -> dict[str, float]:
  """Trains to the end of the config, or to where it was told to stop.

  Order of a step that several things fall on: update, `every`, report and
  evaluation (one line of metrics.jsonl), checkpoint. The line stands before
  the checkpoint, so whatever is restored has its lines.

  Args:
    experiment: from `build.build`.
    workdir: folder of this run; if it holds checkpoints the run goes on from
      the newest intact one, to the same bits as if it had never stopped.

  Returns:
    The final metrics, also in `workdir/results.json`; `{}` where the run was
    interrupted (SIGTERM, SIGINT, `max_minutes`) before its end, or in its last
    steps, when only the final evaluation is left for the next start.

  Raises:
    UserError: a config, file or checkpoint cannot be used.
    Diverged: loss or gradient became NaN or infinite.
  """
  config = experiment.config
  train = config['training']
  begun = time.monotonic()
  folder = pathlib.Path(workdir)
  main = jax.process_index() == 0
  seeds = config['num_seeds']

  placement = devices.make(
    batch_size=train['batch_size'],
    accumulation=train['accumulation'],
    seeds=seeds,
    **config['devices'],
  )
  with contextlib.ExitStack() as stack, Interrupt() as interrupted:
    if main:
      stack.enter_context(lock.alone(folder))
    check_workdir(folder, config)
    init, abstract = _initial(experiment, placement)
    saved = checkpoints_lib.open_folder(
      folder, config, **_without(config['checkpoint'], 'every')
    )
    stack.callback(saved.close)
    state, origin = start(
      saved,
      init,
      abstract,
      resume_from=config['resume_from'],
      init_from=config['init_from'],
    )
    step = _step(state)
    _log.info('start at step %d from %s', step, origin)
    if main:
      write_config(folder, config)
    writer = metrics.Writer(folder, step, main)
    stack.callback(writer.close)
    stop = _stop(_verdict(writer.history, config))
    total = train['steps']
    finished = step >= total or bool(stop)
    results_path = folder / 'results.json'
    if finished and results_path.exists():
      results = json.loads(results_path.read_text())
      results = {k: math.nan if v is None else v for k, v in results.items()}
      if results.pop('step') == step:
        _log.info('%s is finished; nothing to do', folder)
        return results

    dispatch = placement.compile(_step_by_seed(experiment, seeds))
    state = placement.scatter(state)
    intervals = [
      train['report_every'],
      train['evaluate_every'],
      config['checkpoint']['every'],
      *(n for n, _ in experiment.every),
    ]
    # Where slots are emptied, checkpoints are small: that is where to leave.
    empty_every = train['slots']['steps'] and train['slots']['empty_every']
    if empty_every:
      intervals.append(empty_every)
    phases = [first for first, _ in experiment.tasks[0].spec.phases]
    plan = _plan(step, total, train['steps_per_dispatch'], intervals, phases)
    loader = stack.enter_context(futures.ThreadPoolExecutor(1))
    fetch = _fetcher(experiment, train)
    bar = stack.enter_context(
      tqdm(
        total=total,
        initial=step,
        unit='step',
        disable=not main,
        dynamic_ncols=True,
      )
    )
    previous = None  # last dispatch's metrics, fetched while the next one runs
    ahead = _ahead(loader, fetch, plan)
    clock, clock_step = time.monotonic(), step
    while step < total and not stop and not interrupted.now():
      try:
        count, batches = next(ahead)
      except StopIteration:
        break
      state, found = dispatch(
        state, placement.batches(batches), np.int32(step), np.int32(count)
      )
      step += count
      if previous is not None:
        _check(previous, saved)
        _show(bar, previous)
      bar.update(count)
      previous = (found, step, count)
      for n, function in experiment.every:
        if step % n == 0:
          state = placement.scatter(function(placement.gather(state)))
      report = step % train['report_every'] == 0 or step == total
      evaluate = step % train['evaluate_every'] == 0 or step == total
      save = step % config['checkpoint']['every'] == 0 or step == total
      emptied = bool(empty_every) and step % empty_every == 0
      over = time.monotonic() - begun > 60 * config['max_minutes']
      if config['max_minutes'] and over and (emptied or not empty_every):
        interrupted.ask(f'max_minutes = {config["max_minutes"]} are over')
      if not (report or evaluate or save or emptied):
        continue
      _check(previous, saved)
      line: dict[str, float] = {}
      if report:
        line |= _train_metrics(found, count - 1, seeds)
        now = time.monotonic()
        rate = (step - clock_step) / max(now - clock, 1e-9)
        line['time/steps_per_second'] = rate
        clock, clock_step = now, step
      if evaluate:
        line |= evaluate_all(
          experiment.during, judged(placement.gather(state), config), config
        )
        clock, clock_step = time.monotonic(), step
        _check_names(config, writer.history, line)
      if line:
        writer.write(step, line)
        verdict = _verdict(writer.history, config)
        stop = _stop(verdict)
        state = _cut(state, verdict, line, config, placement)
      if save or stop:
        saved.save(
          placement.gather(state), _scores(writer.history, step), emptied
        )

    if previous is not None:
      _check(previous, saved)
    plain = placement.gather(state)
    emptied = bool(empty_every) and step % empty_every == 0
    saved.save(plain, _scores(writer.history, step), emptied)
    saved.wait()
    bar.close()
    interrupted.at_once = True  # all is saved
    # Told in its last steps, it leaves the evaluation to the next start.
    if interrupted.now() or (step < total and not stop):
      _log.info(
        'stopped at step %d of %d (%s); the same command goes on from there',
        step,
        total,
        interrupted.reason,
      )
      return {}
    if stop:
      _log.info('stopped early at step %d: %s', step, stop)
    results = evaluate_all(experiment.after, judged(plain, config), config)
    if main:
      json_files.write(
        results_path, {'step': step} | metrics.finite(results), indent=2
      )
    return results


def evaluate_all(
  evaluators: dict[str, Evaluator], params: Tree, config: dict
) -> dict[str, float]:
  """Every evaluator on every seed's parameters."""
  if not evaluators:
    return {}
  by_seed = []
  for index, seed in enumerate(config_lib.member_seeds(config)):
    member = params
    if config['num_seeds'] > 1:
      member = jax.tree.map(lambda x, i=index: x[i], params)
    # Fixed by the seed alone: evaluating must not depend on when it is done.
    key = jax.random.key(seed)
    values: dict[str, float] = {}
    for evaluator in evaluators.values():
      values |= evaluator(member, key)
    by_seed.append(values)
  return metrics.summary(by_seed)


def judged(state: State, config: dict) -> Tree:
  """The parameters that evaluators see: the EMA unless `raw` or none."""
  params = state.params if config['raw'] or not state.ema else state.ema
  if jax.process_count() == 1:
    return params
  # Outputs of weights that are split over hosts may be split too, and no host
  # could read them. With whole weights each one evaluates by itself.
  return multihost_utils.process_allgather(params, tiled=True)


def check_workdir(folder: pathlib.Path, config: dict) -> None:
  """Refuses a workdir that holds checkpoints or results of another experiment.

  Raises:
    UserError: names every field that differs.
  """
  if not (folder / 'config.json').exists():
    return
  # One that ended before its first checkpoint leaves nothing to mix with.
  saved = any(p.name.isdigit() for p in (folder / 'checkpoints').glob('*'))
  if not saved and not (folder / 'results.json').exists():
    return
  lines = checkpoints_lib.foreign(config, checkpoints_lib.read_config(folder))
  if lines:
    raise UserError(
      f'{folder} holds another experiment: {"; ".join(lines)}. Choose another '
      '--workdir; to go on from its weights give --config.init_from or '
      '--config.resume_from'
    )


def write_config(folder: pathlib.Path, config: dict) -> None:
  """`config.json` and its recursive part, readable, where they changed."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, part in (
    ('config', config),
    ('recursive_config', config['recursive']),
  ):
    json_files.write(folder / f'{name}.json', part, indent=2)


def _without(fields: dict, *names: str) -> dict:
  return {k: v for k, v in fields.items() if k not in names}


def _step(state: State) -> int:
  return int(np.ravel(np.asarray(state.step))[0])


def _initial(experiment, placement):
  """`init() -> placed State`, and the plain state's shapes and shardings."""
  config = experiment.config
  seeds = np.asarray(config_lib.member_seeds(config), np.int32)
  factors = np.asarray(config['rate_factors'], np.float32)
  if config['num_seeds'] == 1:
    by_seed, seeds = experiment.init, seeds[0]
  else:
    by_seed = jax.vmap(experiment.init)

  def function(seeds):
    state = by_seed(seeds)
    if not factors.size:
      return state
    return state._replace(rate={'factor': factors.reshape(seeds.shape)})

  shapes = jax.eval_shape(function, seeds)
  shardings = placement.shardings(shapes)
  abstract = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  return lambda: jax.jit(function, out_shardings=shardings)(seeds), abstract


def _step_by_seed(experiment, seeds):
  def make(axis):
    step = experiment.make_step(axis)
    return step if seeds == 1 else jax.vmap(step)

  return make


def _plan(
  step: int, total: int, most: int, intervals: list[int], phases: list[int]
) -> Iterator[tuple[int, int]]:
  """(first step, steps) of each dispatch: up to `most`, cut at intervals.

  And where a phase begins: batches of one dispatch have one shape.
  """
  while step < total:
    ends = [total, step + most, *((step // n + 1) * n for n in intervals)]
    end = min([*ends, *(first for first in phases if first > step)])
    yield step, end - step
    step = end


def _fetcher(experiment, train):
  """`fetch(first step, count)`: a dispatch's batches, a pure function."""
  size, most = train['batch_size'], train['steps_per_dispatch']

  def fetch(first, count):
    members = []
    for task in experiment.tasks:
      rows = [task.batch('train', first + i, size) for i in range(count)]
      # One spare row, so that XLA sees a loop for every number of steps; the
      # rows past `count` are not read.
      rows += [rows[-1]] * (most + 1 - count)
      members.append(jax.tree.map(lambda *x: np.stack(x), *rows))
    if len(members) == 1:
      return count, members[0]
    return count, jax.tree.map(lambda *x: np.stack(x, 1), *members)

  return fetch


def _ahead(loader, fetch, plan):
  """Batches made on a thread, one dispatch ahead of the device."""
  waiting = None
  for first, count in itertools.chain(plan, [(None, None)]):
    made = None if first is None else loader.submit(fetch, first, count)
    if waiting is not None:
      yield waiting.result()
    waiting = made


def _show(bar, previous):
  found, _, count = previous
  loss = float(np.mean(np.asarray(found['loss'])[count - 1]))
  bar.set_postfix(loss=f'{loss:.4f}', refresh=False)


def _train_metrics(found, row, seeds):
  values = jax.tree.map(lambda x: np.asarray(x)[row], found)
  values = {k: v for k, v in values.items() if k != 'finite'}
  members = [
    {
      f'train/{name}': float(value if seeds == 1 else value[index])
      for name, value in values.items()
    }
    for index in range(seeds)
  ]
  return metrics.summary(members)


def _verdict(history, config):
  return stopping.judge(history, **config['early_stopping'])


def _stop(verdict):
  """The reason to stop, '' to go on."""
  return f'{verdict.rule}: {verdict.reason}' * (verdict.action == 'stop')


def _cut(state, verdict, line, config, placement):
  """The state with the learning rate that a line's verdict asks for."""
  if verdict.action not in ('cut', 'examine'):
    return state
  rules, _, curves = stopping.parse(config['early_stopping']['rules'])
  # The verdict of a line without a new value is that of the one before.
  if curves['validation'] not in line:
    return state
  _log.warning('%s: %s', verdict.rule, verdict.reason)
  if verdict.action == 'examine':
    return state
  plain = placement.gather(state)
  rate = jax.tree.map(lambda x: x * rules.cut, plain.rate)
  return placement.scatter(plain._replace(rate=rate))


def _scores(history, step):
  """Metrics that a checkpoint is judged by: those of its own step."""
  last = history[-1] if history else {'step': None}
  if last['step'] != step:
    return {}
  return {
    k: v
    for k, v in last.items()
    if k != 'step' and not k.startswith('time/') and v is not None
  }


def _check_names(config, history, line):
  """Refuses to judge by a metric that was in no line up to an evaluation."""
  known = set(line).union(*history)
  wanted = {
    'checkpoint.best': config['checkpoint']['best'],
    'early_stopping.metric': config['early_stopping']['metric'],
  }
  rules = config['early_stopping']['rules']
  if rules:
    _, _, curves = stopping.parse(rules)
    # Before the first report there is none of training.
    told = any(name.startswith('train/') for name in known)
    for name in ('train', 'validation', 'probe')[not told :]:
      wanted[f'early_stopping.rules.{name}'] = curves[name]
  for field, metric in wanted.items():
    if metric and metric not in known:
      raise UserError(
        f'{field} = {metric!r} is no metric of this run; there are: '
        f'{", ".join(sorted(known - {"step"}))}'
      )


def _check(dispatched, saved):
  """Raises Diverged where a step of this dispatch was not finite."""
  found, end, count = dispatched
  finite = np.asarray(found['finite'])[:count].reshape(count, -1).all(1)
  if finite.all():
    return
  row = int(np.argmin(finite))
  loss, norm = (
    _worst(np.ravel(np.asarray(found[name])[row]))
    for name in ('loss', 'gradient_norm')
  )
  saved.wait()
  steps = saved.steps()
  last, how = 'there is no checkpoint yet', 'run again'
  if steps:
    # What diverged is part of the experiment that this workdir holds.
    path = saved.path(steps[-1])
    last = f'the last good checkpoint is {path}'
    how = f'go on in another --workdir with --config.resume_from={path}'
  raise Diverged(
    f'step {end - count + row + 1}: loss {loss}, gradient norm {norm}. Nothing '
    f'of it was saved; {last}. Lower optimizer.learning_rate or '
    f'optimizer.clip_norm, or mend the data, and {how}'
  )


def _worst(values):
  return next((v for v in values if not math.isfinite(v)), values[0])
