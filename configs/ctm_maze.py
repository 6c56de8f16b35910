"""Does thinking longer help a Continuous Thought Machine out of a maze?

Inputs are the 81 squares of a 9x9 maze; the answer is the moves, at most 8, of
the shortest route from start to goal. Mazes are generated; held-out ones are no
turned or mirrored training ones. Two 3x3 convolutions tell each square what
lies around it; what lies further the machine has to find by moving its
attention. The output weights of its neurons are derived, W2 = T(contract(W1)).

  python train.py --config=configs/ctm_maze.py --workdir=runs/ctm_maze \
      --config.num_seeds=3

takes 90 seconds on one H100 for three seeds (45 steps a second, bound by the
making of mazes). On 1,024 test mazes, seeds 0, 1 and 2, the answer of each tick
and that of the tick that is surest of its own:

  tick               1    2    3    4    6    8   10   12   15  surest
  accuracy of moves
    seed 0        .493 .731 .855 .917 .957 .968 .969 .965 .949    .986
    seed 1        .465 .540 .718 .893 .956 .972 .973 .974 .976    .985
    seed 2        .593 .708 .829 .899 .917 .928 .932 .928 .901    .954
  mazes solved
    seed 0        .007 .085 .368 .610 .822 .856 .860 .839 .721    .936
    seed 1        .003 .012 .037 .370 .696 .806 .862 .882 .788    .916
    seed 2        .003 .056 .390 .598 .691 .731 .738 .736 .651    .816

The variant `large` (8,000 steps, 2.5 minutes on an H100) solves .974, .948 and
.960 (accuracy .993, .987, .990); its mean by tick: .008 at 1, .336 at 4, .693
at 6, .820 at 8, .876 at 10, .878 at 12, .759 at 15.

Beside it, on the same mazes:

  the most frequent move of each position            accuracy .244, solved .000
  the same, or to stay                                        .137         .019
  a table by start and goal of 245,760 mazes                  .797         .659

The table never sees a wall, so what lies above it is read off the maze. Answers
of late ticks are worse since the loss is that of each maze's best and surest
ticks, which are earlier.

What it took: without the convolutions (batches of 64, 6,000 steps) nothing
beyond the table was learned, and that by one seed of three. With them, three
seeds of 4,000 steps each, first-last pairs of 32 neurons solved .56, .82 and
.25 of validation mazes; at a third of the learning rate .67, .61 and .60; with
`large`'s width as well .84, .76 and .84. 128 random pairs in place of those 32
neurons solved .93, .93 and .82: this config.

Variants, joined by commas: `smoke` (seconds), `large` (width 256) and those of
configs/derivations.py (`independent`, `shared`, an operator's name, ...).
`polynomial` is the default, since singular values are slow on GPUs.
"""

from configs import derivations
from recursive_weights import config as config_lib

VARIANTS = ('smoke', 'large', *derivations.NAMES)


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
    'pairing': 'random-pairing',
    'sync_out': 128,
    'sync_action': 64,
    'self_pairs': 8,
    'stem': 32,
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
    steps=4000,
    batch_size=128,
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
  if 'large' in chosen:
    config.model.update(width=256, input_width=128, stem=64)
    config.optimizer.learning_rate = 1e-3
    config.training.steps = 8000
  derivations.derive(config, chosen, default='polynomial')
  if 'smoke' in chosen:
    config.task.update(route=4, eval_size=64)
    config.model.update(width=32, input_width=16, ticks=3, memory=4, stem=4)
    config.model.update(sync_out=8, sync_action=8, self_pairs=2)
    config.training.update(
      steps=6, batch_size=16, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.checkpoint.every = 4
    config.optimizer.schedule.warmup_steps = 2
    config.evaluators.after.pictures.examples = 1
  return config
