r"""Can a recursive network draw the shortest path through a maze?

The published result: .853 of whole 30 x 30 mazes (1,000 for training, 1,000
tests, paths longer than 110) with attention, 7 M parameters; a mixer solves
none of them.

  python train.py --config=configs/trm_maze.py --workdir=runs/maze

is small, for a CPU: 10 x 10 mazes of our generator with paths of 12 moves or
more. 107,329 parameters, 4,000 steps of 64 mazes, seed 0, 55 minutes of a core
shared with others: .36 of 256 held-out mazes, .00 by `flat`, the same blocks
applied once (.89 of cells, 20 minutes). Whole mazes by steps of the recursion:

    1     2     4     8     16    32    64    the surest step
   .00   .05   .26   .36   .35   .35   .35    .41

(trained for 8; of four noisy restarts the surest has .39, of sixteen .39.) The
best checkpoint, step 3,500, has .44 of the validation mazes, the last .40 (and
.47 of its training rows).

`published` is the recipe of the paper, on generated 30 x 30 mazes or on files
(columns `question` and `answer`, 900 characters of `# SGo`):

  python train.py --config=configs/trm_maze.py:published \
      --workdir=runs/maze30 --config.task.train_path=train.csv \
      --config.task.validation_path=rest.csv --config.task.test_path=test.csv

NOT TRAINED YET: `published`. `puzzle_accuracy` is equality with the label,
`valid` that the path is one of the shortest, which is the one to believe where
several are shortest.

Variants, joined by commas: `published`; `kaggle` (published in float32, 16 GB,
saves and leaves after 11.5 hours); `mixer`; `exit` (measures what leaving early
saves, and nothing else); the controls of configs/tiny_recursive.py; `smoke`.
"""

from configs import tiny_recursive
from recursive_weights import config as config_lib

VARIANTS = (
  'published',
  'mixer',
  'kaggle',
  *tiny_recursive.CONTROLS,
  'exit',
  'smoke',
)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  published = bool(chosen & {'published', 'kaggle'})
  config = config_lib.base()
  config.task = {
    'name': 'maze_path',
    'size': 30,
    'min_path': 0,  # 110 for size 30, in proportion to the area
    'branching': 0.1,
    'loops': 0.0,
    'loss': 'stablemax',
    'augmentation': 'dihedral',
    'train_size': 1000,
    'eval_size': 256,
    'train_path': '',
    'validation_path': '',
    'test_path': '',
    'limits': (0, 0, 0),
  }
  tiny_recursive.recipe(config)
  config.model.update(cell='attention', position='rotation', inner=4)
  # 50,000 passes of 1,000 mazes.
  config.training.update(steps=65_000, accumulation=32)
  if not published:
    config.dtype = 'float32'
    config.task.size = 10
    config.model.update(
      width=64, heads=4, cycles=2, inner=2, multiple=32, steps=8, unrolled=1
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule.update(name='cosine', warmup_steps=100)
    config.optimizer.groups.rest.weight_decay = 0.1
    config.training.update(
      steps=4000,
      batch_size=64,
      accumulation=1,
      ema_decay=0.99,
      report_every=50,
      evaluate_every=500,
    )
    config.training.slots.steps = 8
    config.checkpoint.every = 500
    # Sixteen restarts of 256 mazes take a CPU as long as a third of training.
    config.evaluators.after.restarts.counts = (1, 4)
  if 'mixer' in chosen:
    config.model.update(cell='mixer', position='none')
  if 'kaggle' in chosen:
    tiny_recursive.kaggle(config)
    config.training.accumulation = 96
  tiny_recursive.depart(config, chosen)
  if 'smoke' in chosen:
    tiny_recursive.smoke(config)
    config.task.update(size=10, train_size=32, eval_size=8)
  if 'exit' in chosen:
    tiny_recursive.leave_early(config)
  return config
