"""Does a Continuous Thought Machine need its own W2, or will T(W1) do?

A Continuous Thought Machine reads real handwritten digits (scikit-learn's 1,797
scans of 8x8 pixels; 1,257 to train, 180 to validate, 360 to test), thinking for
a few ticks about each. The output weights of its neurons are not stored: they
are derived from the input weights, W2 = T(contract(W1)).

  python train.py --config=configs/ctm_digits.py --workdir=runs/ctm_digits

takes 2.5 minutes on two CPU cores and reaches a held-out accuracy of .983, .989
and .992 (360 test digits; seeds 0, 1 and 2). Rows that stop when certain take 5
of 10 ticks at that accuracy; at this size that saves no time.

What it took: without the convolutional stem held-out accuracy was .969 to .981
from run to run; with W2 the plain mean of W1's slots (`mean_contraction`),
which starts too small, .51 of validation digits after 250 steps where a stored
W2 had .81; one token a pixel learned nothing in 1,500 steps.

What derivation is worth here is in README.md (every operator, `deep` and `unet`
with as small independent models beside them); one command for a part of it:

  python -m recursive_weights.compare --config=configs/ctm_digits.py \
      --variants='unet,independent;unet,shared;unet,residual' \
      --config.training.steps=1000 --config.training.evaluate_every=500 \
      --config.training.report_every=10 --config.checkpoint.every=1000 \
      --config.optimizer.schedule.warmup_steps=50 --workdir=runs/compare

and for T learnt with two hidden layers in a model with three:

  python -m recursive_weights.transfer \
      --config=configs/ctm_digits.py:deep,polynomial \
      --trained=runs/compare/deep-polynomial --config.model.nlm.layers=3 \
      --config.training.steps=1000 --workdir=runs/transfer

Variants, joined by commas: `smoke` (seconds), `independent` (W2 stored),
`shared`, `frozen`, an operator's name, `rank4` and so on (see
configs/derivations.py), `document` (the design document's neuron sizes: M 15,
h 4, D 128), `deep` (two hidden layers in each neuron's model), `unet` (synapses
of four levels, the way up derived from the way down), `narrow` (with
`deep,independent` or `unet,independent`: as few parameters as derived).
"""

from configs import derivations
from recursive_weights import config as config_lib

VARIANTS = ('smoke', 'document', 'deep', 'unet', 'narrow', *derivations.NAMES)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {'name': 'digits', 'patch': 2, 'max_shift': 1}
  config.model = {
    'name': 'ctm',
    'width': 128,
    'input_width': 64,
    'heads': 4,
    'memory': 10,
    'ticks': 10,
    'nlm': {'hidden': 8, 'activation': 'glu', 'layers': 0, 'norm': False},
    'synapse_depth': 1,
    'stem': 32,
    'pairing': 'random-pairing',
    'sync_out': 128,
    'sync_action': 64,
    'self_pairs': 8,
    'dropout': 0.1,
    'gate': False,
    'remat': False,
    'unrolled': 1,
    'seed': 0,
  }
  config.objective.name = 'certainty'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule.warmup_steps = 100
  config.optimizer.groups.all.weight_decay = 0.1
  config.training.update(
    steps=3000,
    batch_size=64,
    steps_per_dispatch=25,
    ema_decay=0.995,
    report_every=25,
    evaluate_every=250,
  )
  config.checkpoint.update(every=500, best='validation/accuracy')
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation', 'test')},
    'depth_sweep': {'splits': ('test',)},
    'early_exit': {'splits': ('test',), 'chunk': 2},
    'pictures': {'split': 'test', 'examples': 3},
  }
  if 'document' in chosen:
    config.model.memory = 15
    config.model.nlm.update(hidden=4, activation='relu')
  if 'deep' in chosen:
    config.model.nlm.layers = 2
  if 'unet' in chosen:
    config.model.synapse_depth = 4
  if 'narrow' in chosen:
    # About as many parameters as the derived model has.
    if 'deep' in chosen:
      config.model.nlm.hidden = 5
    else:
      config.model.update(width=111, sync_out=111)
  derivations.derive(config, chosen, default='spectral_residual')
  if 'smoke' in chosen:
    config.model.update(width=32, input_width=16, ticks=3, memory=4, stem=4)
    config.model.update(sync_out=16, sync_action=16, self_pairs=2)
    config.training.update(
      steps=6, batch_size=16, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.checkpoint.every = 4
    config.optimizer.schedule.warmup_steps = 2
    config.evaluators.after.pictures.examples = 1
  return config
