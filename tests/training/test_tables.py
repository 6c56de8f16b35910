"""Rows of a table move as the whole table would, without its gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import final_state

from configs import trm_arc
from recursive_weights import build
from recursive_weights import config as config_lib
from recursive_weights.training import loop, optimizers, state, tables

# Few versions for many rows, so that rows share them.
TASKS = ('0d3d703e', '25d8a9c8')


def parts(augmentations=8, **training):
  """Config, task, model and a function that makes a step of some tables."""
  config = trm_arc.get_config('smoke')
  config.task.update(tasks=TASKS, augmentations=augmentations)
  config.training.update(training)
  data = config_lib.to_data(config)
  task = build.build_task(data, 0)
  model = build.build_model(data, task)
  objective, slots = (
    build.build_objective(data),
    build.build_slots(data['training']['slots']),
  )
  rows = data['training']['batch_size']
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), build.example(task, rows)
  )
  optimizer, schedule = optimizers.make(shapes, 6, **data['optimizer'])
  batch = task.batch('train', 0, rows)
  init = state.make_init(
    model,
    optimizer,
    inputs=build.example(task, rows),
    batch_size=rows,
    ema_decay=0.9,
    keep_carry=False,
    first_slots=state.empty_slots(model, task, objective, slots, batch),
  )

  def step(chosen):
    return state.make_step(
      model,
      task,
      objective,
      optimizer,
      schedule=schedule,
      ema_decay=0.9,
      accumulation=data['training']['accumulation'],
      slots=slots,
      averaged=optimizers.averaged(data['optimizer']['groups']),
      tables=dict(chosen),
    )

  return task, model, jax.jit(init), step


@pytest.mark.parametrize(
  'accumulation', [2, pytest.param(1, marks=pytest.mark.long)]
)
def test_rows_are_the_table(accumulation):
  task, model, init, step = parts(accumulation=accumulation)
  assert model.tables == (('puzzle', 'puzzle'),)
  batches = [task.batch('train', index, 8) for index in range(3)]
  numbers = [batch['inputs']['puzzle'] for batch in batches]
  assert any(len(set(row)) < 8 for row in numbers)  # some share a row
  found = []
  for chosen in (model.tables, ()):
    run, current = jax.jit(step(chosen)), init(0)
    for batch in batches:
      current, metrics = run(current, batch)
    found.append((current, metrics))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
  (current, _), _ = found
  moved = (np.asarray(current.params['puzzle']) != 0).any(1)
  # A row that no batch has named stays where it was.
  assert set(np.flatnonzero(moved)) <= set(np.concatenate(numbers))
  assert moved.any() and not moved.all()
  chex.assert_trees_all_equal(current.ema['puzzle'], current.params['puzzle'])


def test_a_bad_step_moves_no_row():
  task, model, init, step = parts()
  batch = task.batch('train', 0, 8)
  first = init(0)
  broken = first.params | {'readout': first.params['readout'] * jnp.nan}
  found, metrics = jax.jit(step(model.tables))(
    first._replace(params=broken), batch
  )
  assert metrics['finite'] == 0
  chex.assert_trees_all_equal(found.params['puzzle'], first.params['puzzle'])


def test_gradients_of_equal_rows_add_up_in_the_first():
  g_BD = jax.random.normal(jax.random.key(0), (5, 3))
  numbers = {'a': jnp.array([7, 2, 7, 4, 7])}
  found = tables.summed({'a': g_BD, 'b': 1.0}, numbers)
  wanted = np.array(g_BD)
  wanted[0] += wanted[2] + wanted[4]
  wanted[[2, 4]] = 0
  np.testing.assert_allclose(found['a'], wanted, rtol=1e-6)
  assert found['b'] == 1.0


def test_no_array_of_a_step_is_as_large_as_the_table():
  """But for the table itself and its average."""
  task, model, init, step = parts(augmentations=2000)
  rows = len(jax.eval_shape(init, 0).params['puzzle'])
  size = 4 * rows * 16
  memory = [
    jax.jit(step(chosen), donate_argnums=0)
    .lower(jax.eval_shape(init, 0), task.batch('train', 0, 8))
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for chosen in (model.tables, ())
  ]
  assert memory[0] + 0.9 * size < memory[1]


@pytest.mark.slow
def test_devices_agree(tmp_path):
  found = []
  for strategy in ('data', 'pmap'):
    config = trm_arc.get_config('smoke')
    config.task.update(tasks=TASKS)
    config.evaluators.during, config.evaluators.after = {}, {}
    config.checkpoint.best = ''
    config.devices.strategy = strategy
    run = build.build(config_lib.to_data(config))
    loop.run(run, tmp_path / strategy)
    found.append(final_state(run, tmp_path / strategy).params)
  chex.assert_trees_all_close(*found, rtol=1e-3, atol=1e-4)
  assert np.asarray(found[0]['puzzle']).any()
