"""Does thinking longer help a Continuous Thought Machine out of a maze?

Inputs are the 81 squares of a 9x9 maze; the answer is the moves, at most 8, of
the shortest route from start to goal. Mazes are generated; held-out ones are no
turned or mirrored training ones. The machine sees the maze through attention
only. The output weights of its neurons are derived, W2 = T(contract(W1)).

  python train.py --config=configs/ctm_maze.py --workdir=runs/ctm_maze

takes 5 minutes on one CPU core (25 steps a second). Seed 0, on 1,024 test
mazes, each tick's answer and that of the tick that is surest of its own:

  tick          1    2    3    4    6    8   10   12   15  surest
  accuracy   .395 .565 .574 .602 .688 .698 .727 .722 .700    .778
  solved     .016 .048 .074 .166 .271 .397 .440 .460 .410    .622

What this is worth, on the same mazes:

  the most frequent move of each position            accuracy .244, solved .000
  the same, or to stay                                        .137         .019
  a table by start and goal of 245,760 mazes                  .797         .659

So more ticks help, but what is learned is mostly where start and goal lie: it
is no better than the table, which never sees a wall. (In the run below with
attention at twice the rate, other walls between the same start and goal
changed 14 % of the answers.) Attention moves little after the third tick.

Not every run gets there. Attention starts even, and start and goal are 2 of 81
squares, so for some 2,000 steps little is learned but how often routes are
short; perhaps because the loss of the best tick rewards ticks that differ. With
attention and features at twice the learning rate, seed 0 alone left this
plateau before step 750 and had .770 and .643 of validation mazes at 3,500, but
seeds 0 to 2 in one program (equal in seed 0 to rounding) had .225, .253, .314
and .021, .030, .056 at 4,000 of 6,000 and were stopped. Also stopped: the mean
over ticks as the loss (`every`; no progress at 1,750 steps; with attention at
four times the rate .337, .140, .298 at 1,500), `lookahead` 1, width 192, decays
of synchronisation at ten times the rate. `rotation` was not tried: its angle
hardly tells 81 squares apart.

Variants, joined by commas: `smoke` (seconds) and those of
configs/derivations.py (`independent`, `shared`, an operator's name, ...).
"""

from configs import derivations
from recursive_weights import config as config_lib

VARIANTS = ('smoke', *derivations.NAMES)


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
    'ticks': 15,
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
  config.objective.name = 'certainty'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule.warmup_steps = 200
  config.optimizer.groups.all.weight_decay = 0.1
  config.training.update(
    steps=6000,
    batch_size=64,
    steps_per_dispatch=50,
    ema_decay=0.995,
    report_every=50,
    evaluate_every=500,
  )
  config.checkpoint.update(every=1000, best='validation/accuracy')
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation', 'test')},
    'depth_sweep': {'splits': ('test',)},
    'pictures': {'split': 'test', 'examples': 3},
  }
  derivations.derive(config, chosen, default='spectral_residual')
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
