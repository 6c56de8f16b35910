r"""Can a recursive network draw the shortest path through a maze?

The published result: .853 of whole 30 x 30 mazes (1,000 for training, 1,000
tests, paths longer than 110) with attention, 7 M parameters; a mixer solves
none of them.

  python train.py --config=configs/trm_maze.py --workdir=runs/maze

is small, for a CPU: 10 x 10 mazes of our generator with paths of 12 moves or
more. `published` is the recipe of the paper, on generated 30 x 30 mazes or on
files (columns `question` and `answer`, 900 characters of `# SGo`):

  python train.py --config=configs/trm_maze.py:published \
      --workdir=runs/maze30 --config.task.train_path=train.csv \
      --config.task.validation_path=rest.csv --config.task.test_path=test.csv

NOT TRAINED YET: these are recipes, not results. `puzzle_accuracy` is equality
with the label, `valid` that the path is one of the shortest, which is the one
to believe where several are shortest.

Variants, joined by commas: `published`; `kaggle` (published in float32, 16 GB,
saves and leaves after 11.5 hours); `mixer`; the controls of
configs/tiny_recursive.py; `smoke`.
"""

from configs import tiny_recursive
from recursive_weights import config as config_lib

VARIANTS = (
  'published',
  'mixer',
  'kaggle',
  *tiny_recursive.CONTROLS,
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
  if 'mixer' in chosen:
    config.model.update(cell='mixer', position='none')
  if 'kaggle' in chosen:
    tiny_recursive.kaggle(config)
    config.training.accumulation = 96
  tiny_recursive.depart(config, chosen)
  if 'smoke' in chosen:
    tiny_recursive.smoke(config)
    config.task.update(size=10, train_size=32, eval_size=8)
  return config
