"""What the experiments with Tiny Recursive Models share.

`recipe` is the published training, `depart` leaves one ingredient of it out.

Source: A. Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny
Networks, 2025 (arXiv 2510.04871), sections 4 and 5.
"""

import ml_collections

from recursive_weights import config as config_lib
from recursive_weights.interfaces import UserError

# T cycles with n updates of the thought in each; published: 3 and 6.
GRID = {
  'T1n2': (1, 2),
  'T2n2': (2, 2),
  'T2n3': (2, 3),
  'T2n4': (2, 4),
  'T4n8': (4, 8),
  'T6n6': (6, 6),
  # As many blocks a step as 2 and 2, the demonstration's.
  'T1n5': (1, 5),
  'T3n1': (3, 1),
}

CONTROLS = (
  *GRID,
  'layers4',  # 4 blocks and half as large an n: of n 2 as many a step as T2n3
  'single_state',  # the thought is the answer
  'one_step_gradient',  # through the last update of each state alone
  'no_ema',
  'no_turnover',  # the halting head is not trained: all take every step
  'flat',  # one pass through the same blocks, no recursion
  'flat_deep',  # one pass through as many as cost a training step as much
)


def recipe(config: ml_collections.ConfigDict) -> None:
  """The published mixer: T 3, n 6, batch 768, AdamATan2, slots, EMA."""
  config.dtype = 'bfloat16'
  config.model = {
    'name': 'trm',
    'cell': 'mixer',
    'width': 512,
    'layers': 2,
    'heads': 8,
    'cycles': 3,
    'inner': 6,
    'steps': 16,
    'states': 2,
    'gradient': 'cycle',
    'position': 'none',
    'prefix': 0,
    'vocabulary': 0,
    'mixing': 'constraints',
    'pool': 'both',
    'pool_width': 64,
    'expansion': 4.0,
    'multiple': 256,
    'unrolled': 6,  # on a GPU; 1 compiles sooner
  }
  config.objective = {
    'name': 'halting',
    'weight': 0.5,
    'whole': 'puzzle_accuracy',
  }
  config.optimizer.update(
    name='adam_atan2', learning_rate=1e-4, b1=0.9, b2=0.95, clip_norm=0.0
  )
  config.optimizer.schedule.update(name='constant', warmup_steps=2000)
  config.optimizer.groups = {
    'start': {'pattern': '^start/', 'frozen': True},
    'rest': {'pattern': '^(?!start/|puzzle$)', 'weight_decay': 1.0},
  }
  config.training.update(
    steps=50_000,
    batch_size=768,
    steps_per_dispatch=50,
    ema_decay=0.999,
    report_every=100,
    evaluate_every=2500,
  )
  config.training.slots.update(steps=16, explore=0.1)
  config.checkpoint.update(every=2500, best='validation/puzzle_accuracy')
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation', 'test')},
    'depth_sweep': {'splits': ('test',), 'steps': (1, 2, 4, 8, 16, 32, 64)},
    'halting': {'splits': ('test',)},
    'restarts': {
      'splits': ('test',),
      'counts': (1, 4, 16),
      'noise': 0.3,
      'steps': 16,
      'shared': False,
      'select': 'halt',
    },
    'pictures': {'split': 'test', 'examples': 3, 'steps': 64},
  }


def depart(config: ml_collections.ConfigDict, chosen: set[str]) -> None:
  """Leaves out what the chosen controls name."""
  # Each sets the depth: an error where several do.
  config_lib.one(chosen, (*GRID, 'layers4', 'flat', 'flat_deep'))
  model = config.model
  for name in chosen & set(GRID):
    model.cycles, model.inner = GRID[name]
  if 'layers4' in chosen:
    model.update(layers=4, inner=model.inner // 2)
  if 'single_state' in chosen:
    model.states = 1
  if 'one_step_gradient' in chosen:
    model.gradient = 'update'
  if 'no_ema' in chosen:
    config.training.ema_decay = 0.0
  if 'no_turnover' in chosen:
    config.objective.weight = 0.0
  if chosen & {'flat', 'flat_deep'}:
    if 'flat_deep' in chosen:
      # A step runs T (n + 1) times the blocks, n + 1 of them backward as well,
      # at twice the cost; one pass forward and backward costs 3.
      calls = (model.cycles + 2) * (model.inner + 1)
      model.layers = -(-model.layers * calls // 3)
    model.update(states=1, cycles=1, inner=0, steps=1)
    config.training.slots.steps = 0
    for name in ('depth_sweep', 'halting', 'restarts'):
      if name in config.evaluators.after:
        del config.evaluators.after[name]


def leave_early(config: ml_collections.ConfigDict) -> None:
  """Measures what leaving early saves, and nothing else."""
  if config.model.steps == 1:
    raise UserError('exit needs a recursion: leave out flat and deep')
  config.evaluators.after = {
    'early_exit': {
      'splits': ('test',),
      'metric': 'puzzle_accuracy',
      'rule': 'last',
      # Where heads are less sure some answers differ, too few of them for
      # validation to tell.
      'thresholds': (0.95, 0.99),
    },
  }


def kaggle(config: ml_collections.ConfigDict) -> None:
  """One or two GPUs of 16 GB without bfloat16, twelve hours at a time.

  A step compiles for a T4 (jax 0.11, on a machine without one) and by XLA's
  count takes 2.1 GiB (Sudoku, mixer), 5.8 (symmetric), 7.3 (maze) or 8.3 (ARC).
  """
  config.dtype = 'float32'
  config.max_minutes = 690.0
  config.training.update(batch_size=384, accumulation=12, steps_per_dispatch=10)
  config.checkpoint.every = 250


def smoke(config: ml_collections.ConfigDict) -> None:
  """Seconds: everything runs, nothing is learned."""
  config.dtype = 'float32'
  model = config.model
  model.update(width=16, heads=2, multiple=16, pool_width=8, unrolled=1)
  model.update(
    layers=min(model.layers, 2),
    cycles=min(model.cycles, 2),
    inner=min(model.inner, 2),
    steps=min(model.steps, 2),
  )
  config.optimizer.schedule.warmup_steps = 2
  config.training.update(
    steps=6,
    batch_size=8,
    accumulation=1,
    steps_per_dispatch=2,
    report_every=2,
    evaluate_every=4,
  )
  config.training.slots.steps = min(config.training.slots.steps, 2)
  config.checkpoint.every = 4
  after = config.evaluators.after
  for name in ('depth_sweep', 'restarts', 'pictures'):
    if name in after:
      del after[name]
