"""Pictures are written where asked, of the numbers that the model gives."""

import builtins
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import Rule, chain, iterate
from recursive_weights.derivation.operators import contraction, residual
from recursive_weights.evaluators import pictures
from recursive_weights.interfaces import Model, Recursion, UserError
from recursive_weights.models import derived
from recursive_weights.plots import (
  answers,
  attention,
  curves,
  dynamics,
  spectra,
)
from recursive_weights.recursion.unroll import from_recursion
from recursive_weights.tasks import digits, maze, maze_path, parity, sudoku

STEPS, HEADS, NEURONS = 3, 2, 5
TASKS = {
  'digits': lambda: digits.make(patch=2),
  'parity': lambda: parity.make(length=6),
  'maze': lambda: maze.make(size=5, eval_size=8),
}


def tiny(task, without=()):
  """A recursion whose outputs depend on the step and on the example."""
  tokens, width = task.spec.inputs.shape[0], task.spec.classes
  size = int(np.prod(task.spec.answer)) * width

  def init(key, inputs):
    del inputs
    k1, k2, k3 = jax.random.split(key, 3)
    return {
      'w1': jax.random.normal(k1, (4, 3, NEURONS)),
      'w2': jax.random.normal(k2, (3, NEURONS)),
      'w3': jax.random.normal(k2, (2, 3, NEURONS)),
      'out': jax.random.normal(k3, (tokens, size)),
    }

  def apply(params, carry, inputs, *, key, train):
    assert key is None and not train
    x_BT = inputs.reshape(len(inputs), tokens, -1).mean(-1)
    x_BT = x_BT.astype(jnp.float32)
    step_S11 = jnp.arange(1.0, STEPS + 1)[:, None, None]
    x_SBT = jnp.sin(step_S11 * (1 + x_BT[None]))
    logits_SBN = x_SBT @ params['out']
    shape = (STEPS, len(inputs), *task.spec.answer, width)
    head_1111 = jnp.arange(1.0, HEADS + 1)[None, None, :, None]
    outputs = {
      'logits': logits_SBN.reshape(shape),
      'certainty': jnp.abs(jnp.cos(logits_SBN[:, :, 0])),
      'attention': jax.nn.softmax(head_1111 * x_SBT[:, :, None], -1),
      'activation': jnp.sin(logits_SBN[:, :, :1] * jnp.ones((1, 1, NEURONS))),
    }
    if 'steps' in without:
      outputs = {'logits': outputs['logits'][-1]}
    return {k: x for k, x in outputs.items() if k not in without}, carry

  return Model(init=init, carry=lambda params, batch_size: {}, apply=apply)


def run(task, model, folder, **fields):
  params = model.init(jax.random.key(0), task.spec.inputs)
  evaluate = pictures.make(
    model, task, None, **{'batch_size': 8, 'output_dir': str(folder)} | fields
  )
  return params, evaluate(params, jax.random.key(0))


def written(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def drawn(monkeypatch):
  """Arguments of every picture by file name, and no drawing."""
  calls = {}

  def record(module, name):
    def call(path, *args, **kwargs):
      calls[path.name] = (args, kwargs)

    monkeypatch.setattr(module, name, call)

  record(attention, 'strip')
  record(attention, 'film')
  record(answers, 'strip')
  record(answers, 'film')
  record(answers, 'depth')
  record(dynamics, 'dynamics')
  record(spectra, 'spectra')
  record(curves, 'curves')
  return calls


@pytest.mark.parametrize('name', TASKS)
def test_pictures_of_every_task_are_written(tmp_path, name):
  task = TASKS[name]()
  _, result = run(task, tiny(task), tmp_path, examples=2)
  assert result == {}
  kinds = [f'attention_{i}.{end}' for i in range(2) for end in ('png', 'gif')]
  assert written(tmp_path) == {f'plots/{k}' for k in (*kinds, 'dynamics.png')}


@pytest.mark.parametrize(
  ('without', 'left'),
  [
    ('attention', {'dynamics.png'}),
    ('activation', {'attention_0.png', 'attention_0.gif'}),
    ('certainty', {'attention_0.png', 'attention_0.gif', 'dynamics.png'}),
    ('steps', set()),
  ],
)
def test_what_a_model_does_not_show_is_not_drawn(
  tmp_path, drawn, without, left
):
  task = TASKS['digits']()
  run(task, tiny(task, (without,)), tmp_path, examples=1)
  assert set(drawn) == left


def test_no_picture_of_a_task_without_one(tmp_path, drawn):
  task = TASKS['digits']()._replace(picture=None)
  run(task, tiny(task), tmp_path)
  assert set(drawn) == {'dynamics.png'}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  task = TASKS['parity']()
  _, result = run(task, tiny(task), '')
  assert result == {} and not written(tmp_path)


def test_numbers_are_those_of_evenly_spread_examples(tmp_path, drawn):
  task = TASKS['digits']()
  model = tiny(task)
  params, _ = run(task, model, tmp_path, batch_size=8, examples=3)
  rows = np.linspace(0, task.spec.sizes['test'] - 1, 8).round().astype(int)
  whole = task.batch('test', 0, task.spec.sizes['test'])
  batch = {name: x[rows] for name, x in whole.items()}
  assert len(set(batch['targets'].tolist())) >= 7  # the split is sorted
  outputs, _ = model.apply(params, {}, batch['inputs'], key=None, train=False)
  answer_SB = outputs['logits'].argmax(-1)
  right_SB = np.asarray(answer_SB == batch['targets'][None])
  assert 0 < right_SB.sum()

  args, kwargs = drawn['dynamics.png']
  np.testing.assert_allclose(
    args[0]['neuron'], outputs['activation'][:, 0], rtol=1e-5
  )
  np.testing.assert_allclose(
    kwargs['certainty_SB'], outputs['certainty'], rtol=1e-4
  )
  np.testing.assert_allclose(kwargs['accuracy_S'], right_SB.mean(1), rtol=1e-6)
  for number, row in enumerate((0, 4, 7)):
    args, kwargs = drawn[f'attention_{number}.png']
    np.testing.assert_array_equal(
      args[0], digits.pixels(batch['inputs'], 2)[row]
    )
    np.testing.assert_allclose(args[1], outputs['attention'][:, row], rtol=1e-5)
    np.testing.assert_array_equal(kwargs['predictions'], answer_SB[:, row])
    np.testing.assert_array_equal(kwargs['right'], right_SB[:, row])
    assert kwargs['title'] == f'Example {number}: {batch["targets"][row]}'


def test_no_row_is_made_that_is_not_shown(tmp_path, drawn):
  task = TASKS['digits']()
  made = []

  def batch(split, index, size):
    made.append(size)
    return task.batch(split, index, size)

  run(task._replace(batch=batch), tiny(task), tmp_path, batch_size=8)
  assert sum(made) == 8


def test_answers_that_are_not_known_are_not_shown(tmp_path, drawn):
  task = DRAWN['sudoku']()
  asked = {0, 3, 4}  # of eight puzzles

  def hiding(rows):
    def batch(split, index, size):
      found = task.batch(split, index, size)
      first = index * size
      hidden_B = [row in rows for row in range(first, first + size)]
      return found | {'weight': np.where(hidden_B, 0, found['weight'])}

    return task._replace(batch=batch)

  run(hiding(asked), thinker(task, 3), tmp_path, examples=8)
  assert {f'answer_{i}.png' for i in range(5)} < set(drawn)
  assert 'answer_5.png' not in drawn
  (values,), _ = drawn['depth.png']
  kept = [row for row in range(8) if row not in asked]
  targets_BX = task.batch('test', 0, 8)['targets'][kept]
  last_BX = np.where(np.arange(16) % 5 < 3, targets_BX, 0)
  share = (last_BX == targets_BX).mean()
  np.testing.assert_allclose(values['accuracy'][-1], share, rtol=1e-6)
  drawn.clear()
  run(hiding(range(8)), thinker(task, 3), tmp_path)
  assert not drawn


def test_answers_to_every_token_are_marked(tmp_path, drawn):
  task = TASKS['parity']()
  run(task, tiny(task), tmp_path)
  _, kwargs = drawn['attention_0.png']
  assert np.shape(kwargs['right']) == (STEPS, 6)
  shares = [f'{x:.0%} right' for x in np.mean(kwargs['right'], axis=1)]
  assert kwargs['predictions'] == shares
  task = TASKS['maze']()
  run(task, tiny(task), tmp_path)
  assert 'right' not in drawn['attention_0.png'][1]


SMALL = {'train_size': 8, 'eval_size': 8}
DRAWN = {
  'sudoku': lambda: sudoku.make(**SMALL),
  'maze_path': lambda: maze_path.make(**SMALL),
}


def thinker(task, steps):
  """Right in cell c of row b from step `c % 5 + 1` on, else class 0."""

  def step(weights, context, state, key):
    now_B = state['now'] + 1
    cells_X = jnp.arange(task.spec.answer[0]) % 5
    done_BX = now_B[:, None] > cells_X[None]
    # Sudoku: the oracle reads the answer off a table of all test puzzles.
    same_BR = (context['x'][:, None] == weights['inputs'][None]).all(-1)
    answer_BX = weights['targets'][same_BR.argmax(1)]
    answer_BX = jnp.where(done_BX, answer_BX, 0)
    logits = jax.nn.one_hot(answer_BX, task.spec.classes)
    return {'now': now_B}, {'logits': logits, 'certainty': now_B / 10}

  return from_recursion(
    Recursion(
      lambda params: params,
      lambda weights, inputs, key: {'x': inputs},
      lambda weights, context: {'now': jnp.zeros(len(context['x']))},
      step,
    ),
    lambda key, inputs: jax.tree.map(jnp.asarray, task.batch('test', 0, 8)),
    steps,
  )


@pytest.mark.parametrize('name', DRAWN)
def test_answers_are_drawn_to_files(tmp_path, name):
  task = DRAWN[name]()
  run(task, thinker(task, 3), tmp_path, examples=2)
  kinds = [f'answer_{i}.{end}' for i in range(2) for end in ('png', 'gif')]
  assert written(tmp_path) == {f'plots/{k}' for k in (*kinds, 'depth.png')}


@pytest.mark.parametrize('steps', [0, 7])
def test_answers_are_those_of_every_step(tmp_path, drawn, steps):
  task = DRAWN['sudoku']()
  run(task, thinker(task, 3), tmp_path, examples=2, steps=steps)
  assert set(drawn) == {
    *(f'answer_{i}.{end}' for i in range(2) for end in ('png', 'gif')),
    'depth.png',
  }
  batch = task.batch('test', 0, 8)
  total = steps or 3
  (values,), options = drawn['depth.png']
  assert options['trained'] == (3 if steps else 0)
  assert set(values) == {'accuracy', 'puzzle_accuracy', 'valid'}
  shares = []
  for step in range(1, total + 1):
    done_X = np.arange(16) % 5 < step
    answer_BX = np.where(done_X[None], batch['targets'], 0)
    shares.append((answer_BX == batch['targets']).mean())
    for number, row in enumerate((0, 7)):
      images, captions = drawn[f'answer_{number}.gif'][0]
      assert len(images) == len(captions) == total
      example = {key: x[row] for key, x in batch.items()}
      np.testing.assert_array_equal(
        images[step - 1], task.drawing(example, answer_BX[row])
      )
      right = (answer_BX[row] == batch['targets'][row]).mean()
      assert captions[step - 1] == (
        f'step {step}: {right:.0%} right\ncertainty {step / 10:.2f}'
      )
  np.testing.assert_allclose(values['accuracy'], shares, rtol=1e-6)
  assert values['puzzle_accuracy'][-1] == (total >= 5)


def test_spectra_are_of_what_the_operator_gets_and_gives(tmp_path, drawn):
  task = TASKS['parity']()
  contract, operator = contraction.make(), residual.make(rank=2)
  rules = (
    Rule('a', 'w1', 'w2', chain(contract, operator)),
    Rule('b', 'w2', 'w3', iterate(operator, 2)),
  )
  model = derived.wrap(tiny(task), rules)
  stored, _ = run(task, model, tmp_path)
  base = contract.apply(stored['operators']['a']['0'], stored['w1'])
  w2 = operator.apply(stored['operators']['a']['1'], base)
  args, kwargs = drawn['spectra_w2.png']
  np.testing.assert_allclose(args[0], base, rtol=1e-6)
  np.testing.assert_allclose(args[1][0], w2, rtol=1e-6)
  assert kwargs['base_name'] == 'contracted w1'
  args, kwargs = drawn['spectra_w3.png']
  np.testing.assert_allclose(args[0], w2, rtol=1e-6)
  assert len(args[1]) == 2
  assert kwargs['derived_names'] == ('w3[0]', 'w3[1]')


def test_one_rule_and_metrics_are_drawn_to_files(tmp_path):
  task = TASKS['parity']()
  rule = Rule('a', 'w1', 'w2', contraction.make())
  (tmp_path / 'metrics.jsonl').write_text(
    '{"step": 1, "train/loss": 0.5, "train/learning_rate": 1.0}\n'
    '{"step": 2, "train/loss": null}\n'
  )
  run(task, derived.wrap(tiny(task), (rule,)), tmp_path, examples=1)
  assert {'plots/spectra.png', 'plots/curves.png'} < written(tmp_path)


def test_missing_matplotlib_is_one_line_in_the_log(
  tmp_path, monkeypatch, caplog
):
  plain = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith('matplotlib'):
      raise ImportError(name)
    return plain(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  task = TASKS['parity']()
  with caplog.at_level(logging.INFO, logger='recursive_weights'):
    _, result = run(task, tiny(task), tmp_path)
  assert result == {} and not written(tmp_path)
  (record,) = (r for r in caplog.records if r.name.startswith('recursive'))
  assert "pip install -e '.[plots]'" in record.getMessage()


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'batch_size': 0}, 'batch_size must be > 0, got 0'),
    ({'examples': 0}, 'examples must be > 0, got 0'),
    ({'steps': -1}, 'steps must be >= 0, got -1'),
    ({'split': 'tset'}, "got 'tset'"),
  ],
)
def test_errors_name_the_value(tmp_path, wrong, message):
  task = TASKS['parity']()
  with pytest.raises(UserError, match=message):
    run(task, tiny(task), tmp_path, **wrong)
