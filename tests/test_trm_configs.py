"""Configs of Tiny Recursive Models: every variant builds, and is what it says.

Shapes are traced; nothing is computed.
"""

import importlib
from unittest import mock

import jax
import numpy as np
import pytest

from configs import tiny_recursive
from recursive_weights import build, config
from recursive_weights.interfaces import UserError
from recursive_weights.training import checkpoints, start

SUDOKU = [
  '',
  'kaggle',
  'slices',
  'constraints',
  'constraints,kaggle',
  'finish',
  'mixer,anneal',
  'mixer,finish,vicinity',
  'attention',
  'attention,prefix16',
  'mixer',
  'mixer,published',
  'mixer,kaggle',
  'mixer,slices',
  'mixer,short,no_digits',
  *(f'mixer,short,{name}' for name in tiny_recursive.CONTROLS),
  *(f'smoke,{name}' for name in ('slices', 'kaggle', 'mixer', 'flat_deep')),
  'smoke,mixer,finish,vicinity',
]
MINI = [
  *('', 'deep', 'no_digits', 'six,symmetric,flat', 'smoke,deep'),
  *tiny_recursive.CONTROLS,
]
MAZE = ['', 'mixer', 'published', 'kaggle', 'published,T2n2', 'smoke,kaggle']
ARC = ['', 'arc1', 'arc2', 'kaggle', 'arc2,kaggle', 'smoke,kaggle']


def load(name, variant):
  fields = importlib.import_module(f'configs.{name}').get_config(variant)
  if name != 'trm_arc':
    fields.task.update(train_size=16, eval_size=4)
  return config.to_data(fields)


def traced(name, variant):
  """The experiment, and the shapes of its state before and after a step."""
  experiment = build.build(load(name, variant))
  state = jax.eval_shape(experiment.init, np.int32(0))
  size = experiment.config['training']['batch_size']
  batch = experiment.tasks[0].batch('train', 0, size)
  after, _ = jax.eval_shape(experiment.make_step(None), state, batch)
  return experiment, state, after


def number(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def mebibytes(tree):
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)]
  return sum(sizes) / 2**20


def types(tree):
  return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), tree)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'variant'),
  [
    (name, variant)
    for name, variants in (
      ('trm_mini', MINI),
      ('trm_sudoku', SUDOKU),
      ('trm_maze', MAZE),
      ('trm_arc', ARC),
    )
    for variant in variants
  ],
)
def test_every_variant_builds_and_its_step_compiles_once(name, variant):
  """A state that came back with other types would compile the step anew."""
  _, before, after = traced(name, variant)
  assert types(before) == types(after)


def test_published_sizes():
  """5,028,866 and 6,828,034, less what `models.trm` says."""
  less = 1024 - 513
  for cell, published in (('mixer', 5_028_866), ('attention', 6_828_034)):
    _, state, _ = traced('trm_sudoku', f'{cell},prefix16')
    # Ten tokens and nine classes here, eleven of each there.
    assert number(state.params) == published + less - 512 * (1 + 2)
  for variant, ours in (('', 469_505), ('constraints', 492_545)):
    _, state, _ = traced('trm_sudoku', variant)
    assert number(state.params) == ours


def test_every_size_has_its_tokens():
  """A blank and the digits, none of them fed as zeros."""
  for variant, size in (('', 4), ('six', 6), ('nine', 9), ('', 6)):
    data = load('trm_mini', variant)
    data['task']['size'] = size
    shapes = build.parameter_shapes(data)
    assert shapes['embedding'].shape[0] == size + 1
  for name, words in (('trm_sudoku', 10), ('trm_maze', 5), ('trm_arc', 12)):
    data = load(name, 'attention' if name == 'trm_sudoku' else '')
    assert build.parameter_shapes(data)['embedding'].shape[0] == words


def test_what_is_carried_between_slices_is_small():
  """Less than 60 MiB in all: slots are emptied, so not saved."""
  for variant in (
    'mixer,slices',
    'slices',
    'finish,slices',
    'mixer,finish,slices',
    'mixer,finish,vicinity,slices',
  ):
    _, state, _ = traced('trm_sudoku', variant)
    fields = load('trm_sudoku', variant)['checkpoint']
    states = fields['keep'] + bool(fields['best'])
    assert states * mebibytes(state._replace(carry={})) < 60, variant


def random(shape, rng):
  """A value of a shape whose bits are random, which no file makes smaller."""
  if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  count = shape.size * shape.dtype.itemsize
  bits = np.frombuffer(rng.bytes(count), shape.dtype)
  return jax.numpy.asarray(bits.reshape(shape.shape))


@pytest.fixture(scope='module')
def slices_sizes(tmp_path_factory):
  """Bytes of every file of a run in slices, and of its state."""
  folder = tmp_path_factory.mktemp('slices')
  experiment, state, _ = traced('trm_sudoku', 'mixer,slices')
  fields = experiment.config['checkpoint']
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: random(x, rng), state._replace(carry={}))
  saved = checkpoints.open_folder(
    folder, experiment.config, keep=fields['keep'], best=fields['best']
  )
  for step in (500, 1000):  # the second takes the place of the first
    saved.save(state._replace(step=jax.numpy.int32(step)), {}, emptied=True)
    saved.wait()
  saved.close()
  files = [p.stat().st_size for p in folder.rglob('*') if p.is_file()]
  return files, mebibytes(state) * 2**20


def test_a_slices_checkpoint_is_small(slices_sizes):
  """At most 60 MiB, of a state that no file makes smaller."""
  files, state = slices_sizes
  assert state < sum(files) <= 60 * 2**20


def test_files_of_a_slices_checkpoint_are_small(slices_sizes):
  """None above 16 MiB."""
  files, _ = slices_sizes
  assert max(files) <= 16 * 2**20


def test_flat_nets_have_equal_parameters_or_equal_arithmetic():
  _, ours, _ = traced('trm_sudoku', 'mixer,short')
  _, flat, _ = traced('trm_sudoku', 'mixer,short,flat')
  assert number(ours.params) == number(flat.params)
  model = load('trm_sudoku', 'mixer')['model']
  deep = load('trm_sudoku', 'mixer,flat_deep')['model']
  calls = model['cycles'] * (model['inner'] + 1) + 2 * (model['inner'] + 1)
  cost = calls * model['layers']
  assert cost <= 3 * deep['layers'] < cost + 3
  for variant, layers in (('flat', 2), ('deep', 12), ('smoke,deep', 12)):
    fields = load('trm_mini', variant)
    assert fields['model']['layers'] == layers
    assert fields['model']['steps'] == 1
    assert fields['training']['slots']['steps'] == 0


def test_what_leaving_early_saves_is_measured_alone():
  for name, variant in (
    ('trm_mini', 'six,symmetric'),
    ('trm_sudoku', ''),
    ('trm_maze', 'published'),
  ):
    fields = load(name, f'exit,{variant}'.strip(','))
    assert list(fields['evaluators']['after']) == ['early_exit']
    with pytest.raises(UserError, match='exit needs a recursion'):
      load(name, f'exit,{variant},flat'.replace(',,', ','))


def test_what_excludes_each_other_is_refused():
  for name, variant in (
    ('trm_sudoku', 'mixer,attention'),
    ('trm_sudoku', 'mixer,constraints'),
    ('trm_sudoku', 'constraints,finish'),
    ('trm_sudoku', 'attention,finish'),
    ('trm_sudoku', 'published,short'),
    ('trm_sudoku', 'mixer,anneal,finish'),
    ('trm_sudoku', 'T2n2,layers4'),
    ('trm_mini', 'deep,flat'),
    ('trm_mini', 'attention,symmetric'),
    ('trm_mini', 'six,nine'),
    ('trm_maze', 'flat,flat_deep'),
    ('trm_arc', 'arc1,arc2'),
  ):
    with pytest.raises(UserError, match='choose one'):
      load(name, variant)
  for variant in ('vicinity', 'mixer,vicinity', 'finish,vicinity'):
    with pytest.raises(UserError, match='choose mixer,finish,vicinity'):
      load('trm_sudoku', variant)
  with pytest.raises(UserError, match='choose mixer or attention'):
    load('trm_sudoku', 'anneal')
  data = load('trm_sudoku', 'prefix16')  # of the symmetric cell
  with pytest.raises(UserError, match="prefix must be 0 with cell 'symmetric'"):
    build.build(data)


@pytest.mark.parametrize(
  'variant', ['finish', 'mixer,anneal', 'mixer,finish,vicinity']
)
def test_later_runs_ask_for_the_weights_of_the_one_before(variant):
  new = mock.Mock()
  new.restore_newest.return_value = None
  asked = load('trm_sudoku', variant)['init_from']
  with pytest.raises(UserError, match=r'init_from .* is no folder, nor one of'):
    start.start(new, mock.Mock(), mock.Mock(), resume_from='', init_from=asked)
  assert not load('trm_sudoku', f'{variant},smoke')['init_from']
