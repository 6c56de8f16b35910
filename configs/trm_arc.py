r"""Tiny Recursive Models on the Abstraction and Reasoning Corpus.

The published result: of the evaluation tasks .446 of ARC-AGI-1 and .078 of 2
within two attempts (attention, 7 M parameters and a vector for each of some
10^6 versions of tasks; four H100 for three days each).

  python train.py --config=configs/trm_arc.py --workdir=runs/arc

goes the whole way in small, on a CPU: 40 tasks of ARC-AGI-1 with grids of up
to 7 x 7 on a canvas of 10 x 10, 16 versions of each, of which 8 vote on a test,
and `runs/arc/submission.json` in the format of the prize beside the scores
`test/pass@1` and `test/pass@2`. It shows that the path from the data to a
scored file works. No accuracy is claimed of so short a run: seed 0, 11 minutes
of one core of a busy machine, solved no test
(`benchmarks/results/trm_arc_small.jsonl`).

  step              50    200   500   1,000  2,000  3,000
  training loss     2.11  1.63  1.42  1.06   .91    1.00
  validation loss               1.47  1.10   1.03   .85   (squares: .70 right)

Your own tasks, --config.task.train_path=... --config.task.eval_path=..., may
lack the outputs of the tests in the second file, as the prize's do: they are
answered in the submission, not scored, and counted as `test/not_scored`.

NOT TRAINED YET: `arc1` and `arc2`, the recipes of the paper on the whole
canvas, without ConceptARC, which the published runs also train on.

Variants, joined by commas: `arc1`, `arc2`; `kaggle` (arc1, or with it arc2, in
float32, 16 GB, saves and leaves after 11.5 hours); `smoke`. A step of `kaggle`
holds a state of 4.5 GiB, of which the 800,000 vectors and their copy are 3.1,
and 6.9 GiB beside it by the compiler for CPUs; the vectors' gradients are those
of the rows of a batch alone (10.5 with a gradient of all).
"""

from configs import tiny_recursive
from recursive_weights import config as config_lib

VARIANTS = ('arc1', 'arc2', 'kaggle', 'smoke')

# Small grids, from ARC-AGI-1: tasks for training and for evaluation.
TRAINING = (
  '0d3d703e',
  '25d8a9c8',
  '25ff71a9',
  '3618c87e',
  '3aa6fb7a',
  '3c9b0459',
  '44f52bb0',
  '5582e5ca',
  '67385a82',
  '67a3c6ac',
  '67e8384a',
  '68b16354',
  '6e02f1e3',
  '6f8cd79b',
  '6fa7a44f',
  '74dd1130',
  '7fe24cdd',
  '88a62173',
  '9565186b',
  'a740d043',
  'a79310a0',
  'a85d4709',
  'aabf363d',
  'c8f0f002',
  'd037b0a7',
  'd23f8c26',
  'd511f180',
  'f76d97a5',
)
EVALUATION = (
  '2072aba6',
  '31d5ba1a',
  '4cd1b7b2',
  '66e6c45b',
  '68b67ca3',
  '6ea4a07e',
  'a8610ef7',
  'b1fc8b8e',
  'be03b35f',
  'ca8de6ea',
  'e133d23d',
  'e633a9e5',
)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  version = config_lib.one(chosen, ('arc1', 'arc2'))
  whole = bool(chosen & {'arc1', 'arc2', 'kaggle'})
  config = config_lib.base()
  config.task = {
    'name': 'arc',
    'version': 2 if version == 'arc2' else 1,
    'also_other': False,
    'tasks': () if whole else TRAINING + EVALUATION,
    'train_path': '',
    'eval_path': '',
    'canvas': 30 if whole else 10,
    'augmentations': 1000 if whole else 16,
    'voters': 1000 if whole else 8,
    'dihedral': True,
    'colours': True,
    'translate': True,
    'loss': 'stablemax',
  }
  tiny_recursive.recipe(config)
  config.model.update(cell='attention', position='rotation', prefix=16, inner=4)
  config.optimizer.groups.rest.weight_decay = 0.1
  # Vectors of versions: at a rate of 1e-2, and their own decay.
  config.optimizer.groups.puzzle = {
    'pattern': '^puzzle$',
    'lr_scale': 100.0,
    'weight_decay': 0.1,
    'sign': True,
  }
  config.training.update(
    # As far as the published checkpoints (518,071 and 723,914), 100,000 passes
    # over sets that hold ConceptARC's pairs too: of the 3,036 and 4,539 pairs
    # here each is offered about 131,000 and 122,500 times.
    steps=724_000 if version == 'arc2' else 518_000,
    accumulation=32,
    evaluate_every=10_000,
  )
  config.checkpoint.every = 5000
  config.evaluators.after = {
    'accuracy': {'splits': ('validation',)},
    'halting': {'splits': ('validation',)},
    'arc_submission': {'split': 'test', 'passes': (1, 2)},
    'pictures': {'split': 'test', 'examples': 3},
  }
  if not whole:
    config.dtype = 'float32'
    config.model.update(
      width=64,
      heads=4,
      cycles=2,
      inner=2,
      multiple=32,
      steps=8,
      unrolled=1,
      prefix=1,
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule.update(name='cosine', warmup_steps=100)
    config.optimizer.groups.puzzle.lr_scale = 10.0
    config.training.update(
      steps=3000,
      batch_size=32,
      accumulation=1,
      ema_decay=0.99,
      report_every=50,
      evaluate_every=500,
    )
    config.training.slots.steps = 8
    config.checkpoint.every = 500
  if 'kaggle' in chosen:
    tiny_recursive.kaggle(config)
    config.training.accumulation = 96
    config.checkpoint.every = 2500
  if 'smoke' in chosen:
    tiny_recursive.smoke(config)
    config.task.update(
      tasks=TRAINING + EVALUATION[:2], canvas=10, augmentations=2, voters=2
    )
  return config
