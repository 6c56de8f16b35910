"""Does thinking longer help a Continuous Thought Machine out of a maze?

Inputs are the 81 squares of a 9x9 maze; the answer is the moves of the shortest
route from start to goal. Mazes are generated; held-out ones are no turned or
mirrored training ones. The machine sees the maze through attention only, a few
squares at a tick, so its answers get better with ticks. The output weights of
its neurons are derived, W2 = T(contract(W1)).

  python train.py --config=configs/ctm_maze.py --workdir=runs/ctm_maze

Variants, joined by commas: `smoke` (seconds) and those of
configs/derivations.py (`independent`, `shared`, an operator's name, ...).
"""

from configs import derivations
from recursive_weights import config as config_lib

VARIANTS = ('smoke', *derivations.NAMES)
LOOK = 'features/|attention/'


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'maze',
    'size': 9,
    'route': 8,
    'branching': 0.1,
    'loops': 0.0,
    'lookahead': 5,
    'augmentation': 'dihedral',
    'eval_size': 1024,
  }
  config.model = {
    'name': 'ctm',
    'width': 128,
    'input_width': 64,
    'heads': 8,
    'memory': 10,
    'ticks': 12,
    'nlm': {'hidden': 8, 'activation': 'glu', 'layers': 0, 'norm': False},
    'synapse_depth': 1,
    'pairing': 'first-last',
    'sync_out': 32,
    'sync_action': 32,
    'self_pairs': 0,
    'position': 'learned',
    'vocabulary': 4,
    'dropout': 0.0,
    'gate': False,
    'remat': False,
    'unrolled': 1,
    'seed': 0,
  }
  config.objective.name = 'every'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule.warmup_steps = 200
  config.optimizer.groups.all.weight_decay = 0.1
  config.training.update(
    steps=3000,
    batch_size=64,
    steps_per_dispatch=50,
    ema_decay=0.995,
    report_every=50,
    evaluate_every=250,
  )
  config.checkpoint.update(every=1000, best='validation/accuracy')
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation', 'test')},
    'depth_sweep': {'splits': ('test',)},
    'pictures': {'split': 'test', 'examples': 3},
  }
  derivations.derive(config, chosen, default='spectral_residual')
  # At first attention is even, so 81 squares drown the start and the goal. It
  # learns at four times the rate of the rest, and does not decay.
  slow = config.optimizer.groups['rest' if 'frozen' in chosen else 'all']
  config.optimizer.groups.look = slow.to_dict() | {
    'pattern': f'^({LOOK})',
    'lr_scale': 4.0,
    'weight_decay': 0.0,
  }
  not_stored = 'nlm/w2$|' if 'frozen' in chosen else ''
  slow.pattern = f'^(?!{not_stored}{LOOK})'
  if 'smoke' in chosen:
    config.task.update(route=4, eval_size=64)
    config.model.update(width=32, input_width=16, ticks=3, memory=4)
    config.model.update(sync_out=4, sync_action=4)
    config.training.update(
      steps=6, batch_size=16, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.checkpoint.every = 4
    config.optimizer.schedule.warmup_steps = 2
    config.evaluators.after.pictures.examples = 1
  return config
