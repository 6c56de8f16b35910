"""Config -> model, task, objective, optimizer, evaluators.

The only place that turns names into objects. A name is a module of its room:
adding an operator, model, task or evaluator is adding one file.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights import config as config_lib
from recursive_weights.config import tuples
from recursive_weights.interfaces import (
  Model,
  Objective,
  Slots,
  Task,
  UserError,
)
from recursive_weights.training import devices, optimizers, stopping
from recursive_weights.training.loop import Experiment, evaluate_all
from recursive_weights.training.state import (
  empty_slots,
  make_init,
  make_step,
)

DTYPES = ('float32', 'bfloat16', 'float16')


def names(room: str) -> list[str]:
  """The modules of a room, such as 'tasks' or 'derivation.operators'."""
  package = importlib.import_module(f'recursive_weights.{room}')
  return sorted(
    m.name
    for m in pkgutil.iter_modules(package.__path__)
    if hasattr(
      importlib.import_module(f'recursive_weights.{room}.{m.name}'), 'make'
    )
  )


def make(room: str, fields: dict[str, Any], *args, **extra):
  """`recursive_weights.ROOM.NAME.make(*args, **rest of fields, **extra)`.

  Raises:
    UserError: unknown name or field, with those that exist.
  """
  fields = dict(fields)
  name = fields.pop('name')
  if not name.isidentifier() or name not in names(room):
    raise UserError(
      f'{room} has no {name!r}; there are: {", ".join(names(room))}'
    )
  function = importlib.import_module(f'recursive_weights.{room}.{name}').make
  known = inspect.signature(function).parameters
  unknown = sorted(set(fields) - set(known))
  if unknown:
    allowed = [k for k, p in known.items() if p.kind is not p.POSITIONAL_ONLY][
      len(args) :
    ]
    raise UserError(
      f'{room}.{name} has no field {", ".join(unknown)}; it has: '
      f'{", ".join(allowed)}'
    )
  extra = {k: v for k, v in extra.items() if k in known}
  try:
    return function(*args, **tuples(fields), **extra)
  except (ValueError, TypeError) as error:
    raise UserError(f'{room}.{name}: {error}') from error


def check(config: dict[str, Any]) -> list[str]:
  """Errors in the fields of the house, every one at once."""
  errors = []
  train, saving = config['training'], config['checkpoint']
  positive = {
    'num_seeds': config['num_seeds'],
    'training.steps': train['steps'],
    'training.batch_size': train['batch_size'],
    'training.accumulation': train['accumulation'],
    'training.steps_per_dispatch': train['steps_per_dispatch'],
    'training.report_every': train['report_every'],
    'training.evaluate_every': train['evaluate_every'],
    'training.loss_scale': train['loss_scale'],
    'checkpoint.every': saving['every'],
    'checkpoint.keep': saving['keep'],
    'early_stopping.patience': config['early_stopping']['patience'],
  }
  for name, value in positive.items():
    if value <= 0:
      errors.append(f'{name} must be > 0, got {value}')
  if train['accumulation'] > 0 and train['batch_size'] % train['accumulation']:
    errors.append(
      'training.accumulation must divide training.batch_size = '
      f'{train["batch_size"]}, got {train["accumulation"]}'
    )
  if not 0 <= train['ema_decay'] < 1:
    errors.append(
      f'training.ema_decay must lie in [0, 1), got {train["ema_decay"]}'
    )
  largest = 2**31 - max(config['num_seeds'], 1)
  if not 0 <= config['seed'] <= largest:
    errors.append(f'seed must lie in [0, {largest}], got {config["seed"]}')
  factors = config['rate_factors']
  # A flag can put anything into a tuple.
  fit = len(factors) == config['num_seeds'] and all(
    isinstance(factor, int | float) and 0 < factor < math.inf
    for factor in factors
  )
  if factors and not fit:
    errors.append(
      'rate_factors must be () or one factor > 0 for each of num_seeds = '
      f'{config["num_seeds"]} members, got {tuple(factors)}'
    )
  if factors and config['step']['name']:
    errors.append('rate_factors must be () with step alternating')
  if config['max_minutes'] < 0:
    errors.append(f'max_minutes must be >= 0, got {config["max_minutes"]}')
  strategy = config['devices']['strategy']
  if strategy not in devices.STRATEGIES:
    errors.append(
      f'devices.strategy must be one of {devices.STRATEGIES}, got {strategy!r}'
    )
  if config['dtype'] not in DTYPES:
    errors.append(f'dtype must be one of {DTYPES}, got {config["dtype"]!r}')
  target = config['early_stopping']['target']
  if target and not config['early_stopping']['metric']:
    errors.append(
      f'early_stopping.target needs early_stopping.metric, got {target} alone'
    )
  for name in ('checkpoint', 'early_stopping'):
    if config[name]['mode'] not in ('max', 'min'):
      errors.append(
        f"{name}.mode must be 'max' or 'min', got {config[name]['mode']!r}"
      )
  slots = train['slots']
  if slots['steps'] < 0 or slots['empty_every'] < 0:
    errors.append(
      'training.slots needs steps >= 0 (0: off) and empty_every >= 0, got '
      f'{slots["steps"]} and {slots["empty_every"]}'
    )
  if not 0 <= slots['explore'] <= 1:
    errors.append(
      f'training.slots.explore must lie in [0, 1], got {slots["explore"]}'
    )
  if slots['steps'] and train['keep_carry']:
    errors.append(
      'training.keep_carry must be False with training.slots, which keep the '
      'carry of a row as long as its example, got True'
    )
  if config['step']['name'] not in ('', 'alternating'):
    errors.append(
      "step.name must be '' (gradients) or 'alternating', got "
      f'{config["step"]["name"]!r}'
    )
  if config['step']['name'] and train['ema_decay']:
    errors.append(
      'training.ema_decay must be 0 with step alternating, got '
      f'{train["ema_decay"]}'
    )
  if config['step']['name']:
    unused = {
      'recursive.rules': ('{}', config['recursive']['rules']),
      'training.slots.steps': ('0', slots['steps']),
      'training.keep_carry': ('False', train['keep_carry']),
    }
    errors += [
      f'{name} must be {off} with step alternating, which fits the stored '
      f'parameters to whole splits, got {value}'
      for name, (off, value) in unused.items()
      if value
    ]
  rules = config['early_stopping']['rules']
  if rules and config['step']['name']:
    errors.append(
      'early_stopping.rules must be {} with step alternating, which has no '
      f'learning rate to cut, got {rules}'
    )
  try:
    stopping.parse(rules)
  except UserError as error:
    errors.append(str(error))
  lipschitz = config['recursive']['lipschitz']
  if lipschitz['weight'] < 0 or lipschitz['scale'] <= 0:
    errors.append(
      'recursive.lipschitz needs weight >= 0 and scale > 0, got '
      f'{lipschitz["weight"]} and {lipschitz["scale"]}'
    )
  return errors


def build_task(config: dict[str, Any], seed: int) -> Task:
  return make('tasks', config['task'], seed=seed)


def build_objective(config: dict[str, Any]) -> Objective:
  from recursive_weights.recursion import objective

  fields = dict(config['objective'])
  return objective.make(fields.pop('name'), **fields)


def build_slots(fields: dict[str, Any]) -> Slots | None:
  """The slots of `config.training.slots`, None for none."""
  from recursive_weights.recursion import slots

  return slots.make(**fields) if fields['steps'] else None


def example(task: Task, batch_size: int):
  """Shapes of one batch's inputs."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype),
    task.spec.inputs,
  )


def build_model(config: dict[str, Any], task: Task) -> Model:
  """The model, with the weights that `config.recursive` derives."""
  from recursive_weights.models import derived

  dtype = jnp.dtype(config['dtype'])
  model = make(
    'models',
    config['model'],
    task.spec,
    dtype=dtype,
    answers=task.answers,
    build=make,
  )
  rules = config['recursive']['rules']
  if not rules:
    return model
  key = jax.random.key(0)
  shapes = jax.eval_shape(model.init, key, example(task, 1))
  paths = dict(
    zip(optimizers.path_names(shapes), jax.tree.leaves(shapes), strict=True)
  )
  return derived.wrap(
    model,
    tuple(build_rule(name, fields, paths) for name, fields in rules.items()),
    **config['recursive']['lipschitz'],
  )


def build_rule(name: str, fields: dict[str, Any], paths: dict[str, Any]):
  """A derivation rule from its config; `paths`: leaf shapes by path."""
  from recursive_weights.derivation import compose
  from recursive_weights.derivation.tree import Rule

  fields = dict(fields)
  known = {'source', 'target', 'adapter', 'operator', 'iterate'}
  if set(fields) != known:
    raise UserError(
      f'recursive.rules.{name} must have the fields {sorted(known)}, got '
      f'{sorted(fields)}'
    )
  missing = [fields[k] for k in ('source', 'target') if fields[k] not in paths]
  if missing:
    raise UserError(
      f'recursive.rules.{name}: no parameter {", ".join(missing)}; there are: '
      f'{", ".join(paths)}'
    )
  shape = paths[fields['target']].shape
  length = 0
  if fields['iterate']:
    length, *rest = shape
    shape = tuple(rest)
  parts = []
  if fields['adapter']['name']:
    parts.append(make('derivation.operators', fields['adapter'], shape=shape))
  operator = compose.chain()
  if fields['operator']['name']:
    operator = make('derivation.operators', fields['operator'])
  if length:
    # Of a stack derived from itself the first layer is the stored one.
    own = fields['source'] == fields['target']
    operator = compose.iterate(operator, length, base_first=own)
  parts.append(operator)
  return Rule(name, fields['source'], fields['target'], compose.chain(*parts))


def build_evaluators(config, when: str, model, task, objective, output_dir):
  """Evaluators by name, of the rows of training where they do not say.

  Args:
    when: 'during' or 'after'.

  Raises:
    UserError: the errors of all of them.
  """
  train, found, errors = config['training'], {}, []
  # What the memory holds at once in training it holds in evaluation.
  rows = train['batch_size'] // train['accumulation']
  for name, arguments in config['evaluators'][when].items():
    fields = {'name': name, 'batch_size': rows} | arguments
    parts = model, task, objective
    try:
      found[name] = make('evaluators', fields, *parts, output_dir=output_dir)
    except UserError as error:
      errors.append(f'evaluators.{when}.{name}: {error}')
  if errors:
    raise UserError('; '.join(errors))
  return found


def build_federation(config, model, task, objective, output_dir):
  """What `config.federation` does every n steps, () where it is off."""
  if not config['federation']['every']:
    return ()
  if config['num_seeds'] > 1:
    raise UserError(
      f'federation needs num_seeds = 1, got {config["num_seeds"]}: give every '
      'seed a run of its own'
    )
  from recursive_weights.training import federation

  return (
    federation.make(
      model,
      task,
      objective,
      **config['federation'],
      batch_size=config['training']['batch_size'],
      output_dir=output_dir,
    ),
  )


def try_batches(config: dict[str, Any], task: Task) -> None:
  """Makes a training batch of every phase, for the errors that it raises.

  A text may be shorter than its tracks, which depends on the batch size, so no
  task can tell when it is made.
  """
  train = config['training']
  for first, _ in task.spec.phases or ((0, {}),):
    if first < train['steps']:
      task.batch('train', first, train['batch_size'])


def build(
  config: dict[str, Any], output_dir: str = '', *, trains: bool = True
) -> Experiment:
  """Everything that `training.loop.run` needs.

  Args:
    config: the resolved config as plain data (`config.to_data`).
    output_dir: where evaluators may write files, '' for nowhere.
    trains: False for evaluators alone, whose data need not be enough to train.

  Raises:
    UserError: every error found in the config, in one message; of optimizer,
      batches, evaluators and federation once there are none in task, objective,
      model and plain fields, which they need.
  """
  errors = check(config)

  def attempt(function, *args):
    try:
      return function(*args)
    except UserError as error:
      errors.append(str(error))
      return None

  def conclude():
    if errors:
      raise UserError('config: ' + '; '.join(errors))

  seeds = config_lib.member_seeds(config)
  tasks = attempt(lambda: tuple(build_task(config, seed) for seed in seeds))
  objective = attempt(build_objective, config)
  model = tasks and attempt(build_model, config, tasks[0])
  conclude()
  # So workdirs and checkpoints know their data, and refuse other data.
  config = config | {'data_hash': dict(tasks[0].data_hash or {})}
  train, factors = config['training'], config['rate_factors']
  inputs = example(tasks[0], train['batch_size'])
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  # First, since what evaluators say of a text too short misleads.
  if trains:
    attempt(try_batches, config, tasks[0])
  made = attempt(
    lambda: optimizers.make(shapes, train['steps'], **config['optimizer'])
  )
  parts = model, tasks[0], objective, output_dir
  evaluators: dict[str, Any] = {'during': {}}
  for when in ('during', 'after') if trains else ('after',):
    evaluators[when] = attempt(build_evaluators, config, when, *parts)
  every = attempt(build_federation, config, *parts)
  conclude()
  optimizer, schedule = made
  slots = build_slots(train['slots'])
  first_slots = None
  if slots is not None:
    batch = tasks[0].batch('train', 0, train['batch_size'])
    first_slots = empty_slots(model, tasks[0], objective, slots, batch)
  groups = config['optimizer']['groups']
  averaged = optimizers.averaged(groups)
  patterns = {name: fields['pattern'] for name, fields in groups.items()}
  labels = optimizers.label(shapes, patterns)
  tables = {
    table: name
    for table, name in model.tables
    if groups[labels[table]].get('sign')
  }

  def step(axis):
    return make_step(
      model,
      tasks[0],
      objective,
      optimizer,
      schedule=schedule,
      ema_decay=train['ema_decay'],
      accumulation=train['accumulation'],
      loss_scale=train['loss_scale'],
      keep_carry=train['keep_carry'],
      slots=slots,
      averaged=averaged,
      tables=tables,
      axis=axis,
    )

  init = make_init(
    model,
    optimizer,
    inputs=inputs,
    batch_size=train['batch_size'],
    ema_decay=train['ema_decay'],
    keep_carry=train['keep_carry'],
    first_slots=first_slots,
    with_rate=bool(config['early_stopping']['rules'] or factors),
  )
  make_own_step = step
  if config['step']['name']:
    # Fits in turn start and step by themselves, on the model's own parameters.
    shape = {k: v for k, v in config['model'].items() if k != 'name'}
    init, make_own_step = make('training', config['step'], tasks[0], **shape)
  return Experiment(
    config=config,
    tasks=tasks,
    init=init,
    make_step=make_own_step,
    every=every,
    **evaluators,
  )


def evaluate(
  config: dict[str, Any], load: Callable[[Any, bool], Any], output_dir: str = ''
) -> dict[str, float]:
  """Final metrics of trained weights.

  Args:
    config: plain data, as stored beside the weights, maybe with overrides.
    load: `(shapes of the parameters, raw) -> parameters` (see `restore`).
    output_dir: where evaluators may write files, '' for nowhere.
  """
  experiment = build(config, output_dir, trains=False)
  params = load(parameter_shapes(config), config['raw'])
  return evaluate_all(experiment.after, params, config)


def parameter_shapes(config: dict[str, Any]):
  """Shapes of what a run of this config trains, as its checkpoints hold it."""
  seeds = config['num_seeds']
  task = build_task(config, config['seed'])
  model = build_model(config, task)
  inputs = example(task, config['training']['batch_size'])
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  if seeds == 1:
    return shapes
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((seeds, *s.shape), s.dtype), shapes
  )
