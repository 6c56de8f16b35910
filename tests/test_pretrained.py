"""Weights that the package ships fit their configs and do what they say."""

import jax
import numpy as np
import pytest

from recursive_weights import build, restore
from recursive_weights import config as config_lib
from recursive_weights.io import json_files, pretrained
from recursive_weights.recursion.unroll import unroll

# Published by A. Inkala in 2012 as the hardest that he could make.
HARDEST = (
  '8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..'
  '9....4..'
)


@pytest.mark.parametrize('name', pretrained.names())
def test_fit_their_configs(name):
  stored, load = restore.pretrained(name)
  params = load(build.parameter_shapes(stored), stored['raw'])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_small_sudokus_are_solved_as_stated():
  """Within rounding of another machine: three puzzles of 512 may flip."""
  stored, load = restore.pretrained('trm_mini')
  config = config_lib.from_data(stored)
  config.evaluators.after = {'accuracy': {'splits': ('test',)}}
  results = build.evaluate(config_lib.to_data(config), load, output_dir='')
  stated = json_files.read(pretrained.folder('trm_mini') / 'results.json')
  key = 'test/puzzle_accuracy'
  assert stated[key] >= 0.99
  assert abs(results[key] - stated[key]) < 0.006


def test_codes_are_recalled_as_stated():
  """Within rounding of another machine: three codes of 128 may flip."""
  stored, load = restore.pretrained('hybrid_recall')
  config = config_lib.from_data(stored)
  recall = config.evaluators.after.recall.to_dict()
  recall |= {'distances': (32, 128), 'control': False}
  config.evaluators.after = {'recall': recall}
  results = build.evaluate(config_lib.to_data(config), load, output_dir='')
  stated = json_files.read(pretrained.folder('hybrid_recall') / 'results.json')
  for distance, least in ((32, 0.95), (128, 0.7)):
    key = f'recall/passkey@{distance}'
    assert stated[key] >= least > stated[f'recall/random/passkey@{distance}']
    assert abs(results[key] - stated[key]) < 0.025


@pytest.mark.slow
def test_the_hardest_sudoku_is_solved():
  stored, load = restore.pretrained('trm_sudoku')
  model = build.build_model(stored, build.build_task(stored, seed=0))
  params = load(build.parameter_shapes(stored), stored['raw'])
  given_T = np.array([int(c) for c in HARDEST.replace('.', '0')], np.int32)

  @jax.jit
  def think(params, inputs):
    weights = model.recursion.prepare(params)
    context = model.recursion.encode(weights, inputs, None)
    state = model.recursion.start(weights, context)
    _, outputs = unroll(
      model.recursion, weights, context, state, 16, hoist=False
    )
    return outputs['logits'][-1, 0].argmax(-1) + 1, outputs['halt'][-1, 0]

  answer_T, halt = jax.device_get(think(params, given_T[None]))
  grid = answer_T.reshape(9, 9)
  boxes = grid.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
  for lines in (grid, grid.T, boxes):
    assert (np.sort(lines, axis=1) == np.arange(1, 10)).all()
  assert ((answer_T == given_T) | (given_T == 0)).all()
  assert halt > 0
