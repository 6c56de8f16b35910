"""Every variant of the language model's config is one that can be built."""

import functools

import jax
import numpy as np
import pytest

from configs import hybrid_lm
from recursive_weights import build, config
from recursive_weights.interfaces import UserError
from recursive_weights.training import optimizers


def parameters(variant):
  data = config.to_data(hybrid_lm.get_config(variant))
  experiment = build.build(data)
  state = jax.eval_shape(experiment.init, np.int32(0))
  return sum(x.size for x in jax.tree.leaves(state.params)), data


@pytest.mark.parametrize(
  'variant',
  [
    *(name for name in hybrid_lm.VARIANTS if name not in hybrid_lm.SIZES),
    *('rwkv6,tied', 'mamba2,derived', 'attention,derived', 'smoke,ratio31'),
    *('smoke,anchored', 'smoke,curriculum'),
    *('anchored,derived', 'alternate,tied', 'ratio31,derived'),
  ],
)
def test_variants_build(variant):
  count, _ = parameters(variant)
  assert 1e4 < count < 3e6


@pytest.mark.parametrize(
  ('variant', 'most'), [('m8', 9e6), ('m30', 33e6), ('m125', 125e6)]
)
def test_sizes_are_what_they_are_called(variant, most):
  count, data = parameters(variant)
  assert 0.6 * most < count < most
  assert data['dtype'] == 'bfloat16'


@pytest.mark.slow
@pytest.mark.parametrize(
  'size', ['m30', pytest.param('m125', marks=pytest.mark.long)]
)
def test_whole_models_for_gpus_take_two_steps(size):
  whole, small = (
    config.to_data(hybrid_lm.get_config(v)) for v in (size, f'{size},smoke')
  )
  assert small['model'] == whole['model'] | {'chunk': 4}
  small['training']['batch_size'] = 2
  experiment = build.build(small)
  state = jax.jit(experiment.init)(np.int32(0))
  step = jax.jit(experiment.make_step(None), donate_argnums=0)
  losses = []
  for index in range(2):
    batch = experiment.tasks[0].batch('train', index, 2)
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  assert np.isfinite(losses).all() and losses[1] < losses[0]


def test_sharing_layers_saves_their_matrices():
  whole, tied, derived = (
    parameters(variant)[0]
    for variant in ('rwkv6', 'rwkv6,tied', 'rwkv6,derived')
  )
  assert tied < derived < whole
  assert tied < 0.6 * whole


@pytest.mark.parametrize('kinds', ['alternate', 'anchored', 'ratio31'])
def test_layers_of_each_kind_are_shared(kinds):
  shapes = {}
  for sharing in ('', ',tied'):
    data = config.to_data(hybrid_lm.get_config(kinds + sharing))
    shapes[sharing] = build.parameter_shapes(data)
  for letter in set(hybrid_lm.PATTERNS.get(kinds, 'H')) & set('HRM'):
    for path in hybrid_lm.MATRICES[letter]:
      kind, *rest = path.split('/')
      own, shared = (
        functools.reduce(dict.get, rest, shapes[x][kind]) for x in ('', ',tied')
      )
      assert shared.shape == own.shape[1:], path


def test_state_variants():
  assert not parameters('fresh')[1]['training']['keep_carry']
  shuffled = parameters('shuffled')[1]
  assert shuffled['training']['keep_carry']
  assert shuffled['task']['order'] == 'shuffled'
  phases = parameters('curriculum')[1]['task']['curriculum']
  assert phases == [[0, 32], [160, 64], [400, 128]]


def test_smoke_keeps_what_other_variants_choose():
  assert hybrid_lm.get_config('smoke,anchored').model.anchors == (1,)
  curriculum = hybrid_lm.get_config('smoke,curriculum').task.curriculum
  assert curriculum == ((0, 2), (1, 4), (3, 8))
  plain = hybrid_lm.get_config('smoke')
  assert plain.model.anchors == () and plain.task.curriculum == ()


def test_small_models_ask_at_a_plateau_and_large_ones_go_on():
  for size, budget in (('', 0), ('m8,', 0), ('m30,', 3), ('m125,', 3)):
    rules = hybrid_lm.get_config(size + 'plateau').early_stopping.rules
    assert rules.budget == budget


def test_large_matrices_decay_wherever_they_are():
  groups = hybrid_lm.get_config().optimizer.groups
  params = {
    'embedding': {'table': 0},
    'head': 0,
    'hybrid': {'time': {'key': 0, 'head_norm': 0}},
  }
  found = optimizers.label(params, {g: groups[g].pattern for g in groups})
  assert found == {
    'embedding': {'table': 'rest'},
    'head': 'matrices',
    'hybrid': {'time': {'key': 'matrices', 'head_norm': 'rest'}},
  }


def test_variants_that_exclude_each_other():
  for variant in ('rwkv6,mamba2', 'hy,gf', 'fresh,shuffled', 'm8,m30'):
    with pytest.raises(UserError, match='they exclude each other'):
      hybrid_lm.get_config(variant)
  with pytest.raises(UserError, match='anchored and attention exclude'):
    hybrid_lm.get_config('anchored,attention')
  for kind in hybrid_lm.PATTERNS:
    with pytest.raises(UserError, match=f'hy needs hybrid layers, got {kind}'):
      hybrid_lm.get_config(f'smoke,hy,{kind}')
