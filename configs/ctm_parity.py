"""Can a Continuous Thought Machine with derived weights learn parity?

Inputs are T bits; the answer is, at every position, the parity of all bits so
far. Sequences are generated; training and held-out ones are disjoint by hash.
The machine sees all bits at once and has to move its attention along them, so
accuracy rises with ticks. The output weights of its neurons are derived,
W2 = T(contract(W1)).

  python train.py --config=configs/ctm_parity.py --workdir=runs/ctm_parity

took 12 minutes on one core of a busy machine (9 steps a second) and solves .995
of whole held-out sequences with each of the seeds 0, 1 and 2 (203 of 204 of 12
bits), and .999 of bits. By tick (seed 0): .015 at 10, .044 at 12, .363 at 14,
.966 at 16, .995 from 17 on.

  python train.py --config=configs/ctm_parity.py:bits16,polynomial \
      --config.num_seeds=3 --workdir=runs/bits16

takes 3 minutes on one H100 (331 steps a second for three seeds in one program)
and solves .9985, .9976 and .9961 of whole held-out sequences (2,048 of 16
bits), .9998 of bits. `polynomial`, since singular values are slow on GPUs: the
spectral operators made 8 steps a second there.

  python train.py --config=configs/ctm_parity.py:published,independent \
      --config.num_seeds=3 --config.max_minutes=8 --config.task.eval_size=512 \
      --workdir=runs/bits64

trains the published model on 64 bits (75 ticks, D 1024; 5.7 million parameters)
with three seeds in one program, 26 steps a second on an H100 that other jobs
used too. Share of held-out bits after 2,500, 5,000, 7,500 and 9,500 steps:
.545, .583, .614, .643 (seed 0), .541, .601, .640, .664 (seed 1), .538, .576,
.603, .619 (seed 2), still rising; the published runs take 200,000 steps. All
evaluations: recursive_weights/benchmarks/results/parity64_h100.jsonl.

What did not learn: learned positions (.78 of bits where rotated ones had .97
after 2,400 steps of 12 bits), a learning rate of 3e-3. Random pairs solved 16
bits in 2 of 3 seeds after 30,000 steps, first-last pairs in 3 of 3. Without
dropout, one or two of three seeds missed .99 of the 12-bit sequences by one or
two of the 204.

Operators at equal steps (3,000 of 12 bits, 15 ticks, three seeds): see the
table in README.md; repeat it with

  python -m recursive_weights.compare --config=configs/ctm_parity.py \
      --variants='independent;shared;frozen;residual;spectral_residual' \
      --config.model.ticks=15 --config.training.steps=3000 \
      --config.training.batch_size=64 --config.model.dropout=0.0 \
      --config.optimizer.groups.all.weight_decay=0.1 --workdir=runs/parity

Variants, joined by commas: `smoke`, `bits16`, `published` (64 bits, 75 ticks,
D 1024: for a GPU), `deep` (two hidden layers in each neuron),
`narrow` (with `deep,independent`: as few parameters as derived), and those of
configs/derivations.py (`independent`, ...).
"""

from configs import derivations
from recursive_weights import config as config_lib

VARIANTS = (
  'smoke',
  'bits16',
  'published',
  'deep',
  'narrow',  # with deep
  *derivations.NAMES,
)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {'name': 'parity', 'length': 12, 'eval_size': 2048}
  config.model = {
    'name': 'ctm',
    'width': 128,
    'input_width': 64,
    'heads': 4,
    'memory': 10,
    'ticks': 20,
    'nlm': {'hidden': 8, 'activation': 'glu', 'layers': 0, 'norm': False},
    'synapse_depth': 1,
    'pairing': 'first-last',
    'sync_out': 32,
    'sync_action': 16,
    'self_pairs': 0,
    'position': 'rotation',
    'dropout': 0.1,
    'gate': False,
    'remat': False,
    'unrolled': 1,
    'seed': 0,
  }
  config.objective.name = 'certainty'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule.warmup_steps = 200
  config.optimizer.groups.all.weight_decay = 0.3
  config.training.update(
    steps=6000,
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
  if 'bits16' in chosen:
    config.task.length = 16
    config.model.update(width=256, ticks=20, unrolled=5, dropout=0.0)
    config.optimizer.groups.all.weight_decay = 0.1
    config.training.update(steps=20000, batch_size=64)
  if 'deep' in chosen:
    config.model.nlm.layers = 2
    if 'narrow' in chosen:  # as many parameters as the derived model has
      config.model.nlm.hidden = 5
  if 'published' in chosen:
    config.task.length = 64
    config.model.update(
      width=1024,
      input_width=512,
      heads=8,
      memory=25,
      ticks=75,
      unrolled=5,  # on a GPU; 1 is faster on CPUs
      pairing='random',
      sync_out=32,
      sync_action=32,
      position='rotation',
      dropout=0.0,
    )
    config.model.nlm.hidden = 16
    config.optimizer.learning_rate = 1e-4
    config.optimizer.groups.all.weight_decay = 0.0
    config.optimizer.schedule.warmup_steps = 500
    config.training.update(steps=200_000, batch_size=64)
  derivations.derive(config, chosen, default='polynomial')
  if 'smoke' in chosen:
    config.task.update(length=6, eval_size=64)
    config.model.update(width=32, input_width=16, ticks=3, memory=4)
    config.model.update(sync_out=4, sync_action=4)
    config.training.update(
      steps=6, batch_size=16, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.checkpoint.every = 4
    config.optimizer.schedule.warmup_steps = 2
    del config.evaluators.after.depth_sweep
    del config.evaluators.after.pictures
  return config
