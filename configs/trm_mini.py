"""Can a tiny network that recurs learn Sudoku in minutes on a CPU?

Puzzles of 4 x 4 cells are generated, each with one solution; no held-out puzzle
is seen in training in any guise. A network of two blocks (80,641 parameters)
repeats itself 6 times a step, for up to 8 steps, each with its own update of
the weights, until its halting head thinks the answer right.

  python train.py --config=configs/trm_mini.py --workdir=runs/trm_mini

makes 15 steps a second on one core of a busy machine. Held-out puzzles, 512 of
each split, seed 0, after the same 1,500 steps:

                              parameters  validation  test
  recursive, 8 steps          80,641      .998        .990
    seed 1                                1.000       .996
    seed 2                                1.000       .996
    (test by step, seed 0: 1 .963, 2 .979, 4 .986, 8 to 64 .990)
  `flat`, applied once        80,641      .951        .805
  `deep`, twelve blocks       480,001     1.000       1.000

So recursion makes up here for nearly all that six times the parameters would
bring; it needs more time for an answer, unless it leaves early: where the
halting head says so it is at 1.1 steps and .986 (seeds 1 and 2: 1.0 and .994,
1.0 and .992). Test puzzles are harder for all: of this size there are few that
are not alike, so a split is a small sample. `flat` and `deep` are of one seed.

The recursive one's weights come with the package: eval.py --pretrained=trm_mini

6 x 6 (`six`) tells recursion from depth. It trains for 4,000 steps, 18 minutes
of a CPU core beside other work, to .996 of validation and .994 of test puzzles
(in 1 step .662, in 2 .969, 4 .986, 8 and 16 .994, 64 .996; seed 0); what has no
recursion stays at .02 and .62 (three seeds, below). With
--config.training.steps=1500, seed 0, 512 test puzzles by steps of the
recursion:

                               parameters   1     2     4     8     16    64
  `six`                         95,489     .063  .379  .639  .715  .738  .746
  `six,flat`                    95,489     .004
  `six,deep`                   567,809     .115
  `six,symmetric`               30,977     .617  .973  .998  .998  .998  .998
  `six,symmetric,flat`          30,977     .002

(validation at 8 steps: `six,symmetric` .996; seeds 1 and 2 of it have .998 and
.992 in 8 test steps; it trains for 1,500 by itself). `symmetric` is a cell
without weights of its own for any digit or cell; a step of it takes half a
second to a second of a CPU core.

Leaving early: 1,000 test puzzles of 6 x 6, 250 at a time, `six,symmetric`, all
16 steps against leaving where the head is as sure as validation puzzles chose,
to .95 at least (finished rows are taken out every four steps; one CPU core with
other work beside; the last three runs of
`benchmarks/results/trm_early_exit_6x6.json`):

  seed   16 steps         leaving         sure to   steps   time
  0      .995 in  77 s    .995 in 26 s    .95       2.0     33 %
  1      .995 in 121 s    .994 in 24 s    .95       2.3     20 %
  2      .991 in  41 s    .991 in 15 s    .99       2.5     37 %

(Sure to .95 seed 2 solves as many, in 2.3 steps. Runs before these, which
leaving at .90 was offered to, solve .999, .994 and .998 in 16 steps, and in 26
to 27 % of the time .997, .994 and .997; sure to .95, seeds 0 and 2 .999, .998.)

  python train.py --config=configs/trm_mini.py:six,symmetric,exit \\
      --config.seed=0 --workdir=runs/exit
  python eval.py --workdir=runs/exit --config.model.steps=16 \\
      --config.task.eval_size=1000 --config.training.batch_size=250

Several noisy attempts (the evaluator `restarts`, noise .3) of which one is
taken, 512 test puzzles, seed 0 of these runs, attempts x steps of each
(`benchmarks/results/trm_restarts_6x6.json`):

                                   1x16  4x4    16x1  1x2   4x2   16x2
  the surest head (`halt`)         .998  1.000  .670  .961  .982  1.000
  the least moving (`residual`)    .998   .994  .520  .961  .727   .725

The head knows which attempt is right. That its state hardly moves says less of
it: after two steps, less than to take the first attempt would solve.

What each ingredient is worth: 4 x 4, 600 steps, seeds 0, 1, 2 in one program,
whole puzzles after 8 steps (mean and spread over seeds), training steps a
second of the three on a CPU core (`benchmarks/results/trm_controls_4x4.json`):

                                                validation    test         speed
  as published: 2 blocks, T 2, n 2 (`T2n2`)     .961 +- .012  .906 +- .033  2.9
  4 blocks, n 1 (`layers4`), a third more       .775 +- .134  .729 +- .100  2.8
  `T1n2`: no cycle without gradient             .984 +- .011  .949 +- .021  3.2
  `T1n5`, as many blocks a step                 .959 +- .028  .913 +- .055  1.7
  `T3n1`, as many blocks a step                 .937 +- .017  .884 +- .024  5.0
  `T2n3`, as many blocks a step as `layers4`    .934 +- .035  .890 +- .053  -
  `T2n4`                                        .935 +- .032  .880 +- .019  1.7
  one state for answer and thought              .994 +- .002  .977 +- .013  2.8
  `attention`                                   .007 +- .005  .005 +- .001  -
  attention, learned positions                  .003 +- .003  .003 +- .004  3.8
  `one_step_gradient`                           .951 +- .021  .903 +- .035  5.1
  `no_ema`                                      .956 +- .015  .912 +- .031  3.0
  `no_turnover`                                 .947 +- .028  .887 +- .015  3.2
  `no_digits`                                   .961 +- .012  .904 +- .045  3.1
  `flat`: no recursion, equal parameters        .718 +- .067  .471 +- .057  11.6
  `flat_deep`: none, equal arithmetic           .975 +- .008  .886 +- .026  2.9
  `deep`: none, as many blocks as a step        .885 +- .028  .742 +- .062  1.9

What the paper found and this repeats: two blocks beat four (at as many applied
a step, `T2n3`, and at fewer), recursion beats what has as many weights.
Attention has learned nothing yet after so few steps, which says little of what
it would learn. What it does not repeat, so small and so short: a single state
is better than two, one cycle better than two, and EMA, turnover, digits and the
gradient through a whole cycle make no difference beyond the spread; a net of
eight blocks without recursion, four times the weights, is as good (on 6 x 6
twelve blocks are not, see above).

The same on 6 x 6, 4,000 steps, seeds 0, 1, 2, on an H200 shared by several runs
(`benchmarks/results/trm_controls_6x6.json`); validation after 1,000 and 4,000
steps, the test at the end:

                       parameters   1,000   4,000           test
  as published (`T2n2`)    95,489   .600    .995 +- .002    .994 +- .005
  4 blocks                189,953   .554    .993 +- .001    .995 +- .001
  `T2n3`                   95,489   .562    .997 +- .002    .999 +- .001
  4 blocks, as `T2n3`     189,953   .573    .996 +- .002    .993 +- .007
  `T1n2`                   95,489   .624    .985 +- .001    .986 +- .012
  `T1n5`                   95,489   .531    .995 +- .006    .995 +- .005
  `T3n1`                   95,489   .536    .986 +- .009    .991 +- .007
  `T2n4`                   95,489   .540    .999 +- .001    .999 +- .001
  one state                95,489   .923    .997 +- .001    .998 +- .000
  `attention`             107,521   .000    .260 +- .069    .202 +- .071
  attention (learned
    positions)            109,825   .000    .148 +- .236    .130 +- .209
  `one_step_gradient`      95,489   .393    .980 +- .018    .984 +- .010
  `no_ema`                 95,489   .546    .995 +- .002    .994 +- .005
  `no_turnover`            95,489   .732    .995 +- .001    .996 +- .000
  `no_digits`              95,489   .536    .994 +- .003    .991 +- .003
  `flat`                   95,489   .008    .046 +- .009    .021 +- .007
  `flat_deep`             378,881   .178    .666 +- .031    .620 +- .056
  `deep`                  567,809   .184    .654 +- .076    .623 +- .083

Here depth without recursion fails, with as much arithmetic or with six times
the weights. Two blocks at as many applied a step as four (`T2n3`, ten minutes
of a CPU core a seed; four 15) solve as many, +.005 (.020) of the test, paired
by seed; the paper found them better. (Slots of these two rows and of
`attention` drew the least number of steps at every step, those of the others
once for an example: that matters for neither four blocks nor `T2n2`, which has
.994 of the test with the former, seed 0.) More updates of the thought (`T2n4`)
are a little better, fewer are a little worse, and so is a gradient through one
of them, which is also slower: as the paper found. A single state learns much
sooner, which it did not. The others make no difference in the end: 4,096
puzzles are not few for this size, and the rate falls to nothing, which averages
as EMA does. Attention learns late, with learned positions not in every seed,
with the published rotation in all three (16 to 20 minutes of a busy CPU core a
seed, slots as for `T2n3`), and is not done: in 64 steps these have .383, .357
and .309 of the test. With 16,000 steps (seed 0, 50 minutes of a busy core) it
is: validation .568 after 4,000, .984 after 8,000, .996 in the end, and .996 of
the test in 8 steps (1 .139, 2 .949, 4 .992). So it takes four times as long for
what the mixer does.

  python -m recursive_weights.compare --config=configs/trm_mini.py \\
      --variants='T2n2;layers4;flat' --config.training.steps=600 \\
      --workdir=runs/controls   # or six,T2n2;six,layers4;... without steps

Variants, joined by commas: `smoke`, `six`, `nine` (sizes of the puzzle; `nine`
is not trained), `attention`, `symmetric`, `deep` (as many blocks as a step
applies, once), `exit` (measures what leaving early saves, and nothing else),
`no_digits` (puzzles whose digits are not renamed), and the controls of
configs/tiny_recursive.py: `flat`, `single_state`, ...
"""

from configs import tiny_recursive
from recursive_weights import config as config_lib

VARIANTS = (
  *('smoke', 'six', 'nine', 'attention', 'symmetric', 'deep'),
  *('exit', 'no_digits'),
  *tiny_recursive.CONTROLS,
)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'sudoku',
    'size': 4,
    'loss': 'stablemax',
    'digits': True,
    'positions': True,
    'train_size': 4096,
    'eval_size': 512,
  }
  config.model = {
    'name': 'trm',
    'cell': 'mixer',
    'width': 64,
    'layers': 2,
    'heads': 4,
    'cycles': 2,
    'inner': 2,
    'steps': 8,
    'states': 2,
    'gradient': 'cycle',
    'position': 'none',
    'vocabulary': 0,
    'mixing': 'constraints',
    'pool': 'both',
    'pool_width': 16,
    'expansion': 4.0,
    'multiple': 32,
    'unrolled': 1,
  }
  config.objective = {
    'name': 'halting',
    'weight': 0.5,
    'whole': 'puzzle_accuracy',
  }
  config.optimizer.update(
    name='adam_atan2', learning_rate=1e-3, b2=0.95, clip_norm=0.0
  )
  config.optimizer.schedule.update(name='cosine', warmup_steps=100)
  config.optimizer.groups = {
    'start': {'pattern': '^start/', 'frozen': True},
    'rest': {'pattern': '^(?!start/)', 'weight_decay': 0.1, 'frozen': False},
  }
  config.training.update(
    steps=1500,
    batch_size=64,
    steps_per_dispatch=50,
    ema_decay=0.99,
    report_every=50,
    evaluate_every=250,
  )
  config.training.slots.update(steps=8, explore=0.1)
  config.checkpoint.update(every=500, best='validation/puzzle_accuracy')
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation', 'test')},
    'depth_sweep': {
      'splits': ('test',),
      'steps': (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64),
    },
    'halting': {'splits': ('test',)},
    'pictures': {'split': 'test', 'examples': 3, 'steps': 32},
  }
  size = config_lib.one(chosen, ('six', 'nine'))
  config.task.size = {'': 4, 'six': 6, 'nine': 9}[size]
  cell = config_lib.one(chosen, ('attention', 'symmetric'))
  if size == 'six' and cell != 'symmetric':
    config.training.steps = 4000  # it learns later than the other two
  if cell == 'attention':
    config.model.update(cell='attention', position='rotation')
  if cell == 'symmetric':
    config.model.update(cell='symmetric', width=32)
  if 'no_digits' in chosen:
    config.task.digits = False
  alone = ('deep', 'flat', 'flat_deep', 'layers4', *tiny_recursive.GRID)
  if config_lib.one(chosen, alone) == 'deep':
    # As many blocks as a step of the recursion applies.
    blocks = config.model.cycles * (config.model.inner + 1)
    config.model.layers *= blocks
    chosen = chosen | {'flat'}
  tiny_recursive.depart(config, chosen)
  if chosen & {'flat', 'flat_deep'}:
    config.evaluators.after = {'accuracy': {'splits': ('validation', 'test')}}
  if 'smoke' in chosen:
    config.task.update(train_size=64, eval_size=16)
    config.model.update(width=16, multiple=16, heads=2)
    config.model.steps = min(config.model.steps, 2)
    config.training.update(
      steps=6, batch_size=8, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.training.slots.steps = min(config.training.slots.steps, 2)
    config.checkpoint.every = 4
    config.optimizer.schedule.warmup_steps = 2
    config.evaluators.after = {'accuracy': {'splits': ('validation', 'test')}}
  if 'exit' in chosen:
    tiny_recursive.leave_early(config)
  return config
