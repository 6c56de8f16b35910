r"""What does a recurrent language model gain from handing its state on?

A small hybrid (every layer RWKV-6 and Mamba-2 side by side) learns the language
reference of Python, which ships with Python itself, character by character. The
text is read in parallel tracks, and the state goes on from chunk to chunk.

  python train.py --config=configs/hybrid_lm.py --workdir=runs/hybrid_lm

After its 800 steps (12 minutes of CPU time, compilation included; one seed) the
0.55 million parameters have a held-out loss of 1.545 nats a character (2.23
bits) on the two validation documents and 1.061 (1.53 bits) on the three test
documents. The same weights with every chunk of 128 read afresh: 1.719 and
1.201. So few documents differ much among themselves; `library` has eighteen.

Weights of layers from those of the first one, 400 steps, seeds 0 to 2, five
minutes of a CPU core each (`benchmarks/results/hybrid_derived.json`):

                               stored    validation          test
  independent                  548,217   1.618 1.604 1.620   1.178 1.176 1.172
  `narrow`, also independent   273,447   1.692 1.677 1.691   1.280 1.264 1.256
  `tied`                       258,297   1.668 1.692 1.689   1.277 1.259 1.261
  `derived`                    268,841   1.669 1.676 1.684   1.273 1.259 1.253

Half of the weights cost .06 to .09. That they are derived gains .011 on average
on validation (.028 would be more than chance, paired by seed) and .005 on the
test (.005) over a narrower model, .007 (.022) and .004 (.010) over tied layers:
hardly more than chance.

  python -m recursive_weights.compare --config=configs/hybrid_lm.py \
      --variants='gf_mh;gf_mh,narrow;gf_mh,tied;gf_mh,derived' --num_seeds=1 \
      --config.training.steps=400 --config.seed=0 --workdir=runs/derived

Gates of state health (evaluators/state_gates.py) end the run: a table in the
log, `gates.json`. Their bounds were set on seeds 0 to 2 of a smaller hybrid
(width 48, two layers, 400 steps, heads of 16); seeds 3 to 5 pass every gate,
and the same weights with one half frozen, forgetting all, exploding, silent or
constant fail the gate that says so, 30 of 30, as do those in which a third of
the heads of one half forget all, 6 of 6
(tests/evaluators/test_hybrid_gates.py, marked long). Trained models of other
sizes and kinds pass too, one seed each: heads of 32 (`rwkv6` and `mamba2` here,
300 steps; the matrix's `small`, three seeds), heads of 64 (`rwkv6`, `mamba2`
and `hy`, width 128, 300 steps), states of 64 x 32 for Mamba-2 (the matrix's
`small,mamba2`, and six layers of it of width 256); of that `hy` the same twelve
broken copies fail as they should (`benchmarks/results/hybrid_gates.json`).
`m125` was not tried;
`evaluators.after.state_gates.bounds` takes your own bounds. Half-lives of the
hybrids with heads of 16 are 4 to 85 tokens, of single heads .5 to 250. A state
swapped for that of another text changes the loss of the next 64 characters by
less than .01 nats: so short a training hardly uses what it could remember.

Variants, joined by commas: `smoke` (seconds), and

  layers    `rwkv6`, `mamba2`, `attention` (of one kind alone), `alternate`
            (RM), `ratio31` (3R1M), `anchored` (the hybrid with attention in the
            middle); the hybrid needs none
  fusions   `hy`, `gf`, ... of its two halves (models/layers/fusion.py)
  weights   `tied` (all layers of a kind, but for anchors, have the large
            matrices of the first one), `derived` (those of the l-th one are T^l
            of them, T residual, rank 4),
            `narrow` (independent, two thirds as wide: stores as many weights
            within 6 %)
  state     `fresh` (every chunk starts anew), `shuffled` (every chunk gets the
            state of another text), `curriculum` (chunks a quarter, then half)
  watch     `gates` (state health at every evaluation, and after a smoke run),
            `plateau` (with rules that stop the run; at a plateau they say so,
            for you to look, and with `m30` or `m125` they cut the learning rate
            at up to three; those on states speak only with `plateau,gates`),
            `probes` (of memory: codes and persons by distance, leaks after a
            reset, forgetting, poison, rank, identity; at every evaluation, and
            beside untrained weights after the run)
  text      `bytes`, `library` (sources of the standard library, ten times as
            much); any other by --config.task.path=FILE_OR_FOLDER, and for one
            document --config.task.split_by=position
  sizes     `m8`, `m30`, `m125` (for GPUs: 7.9, 30.2 and, of characters, 106.8
            million parameters; 125.6 with a vocabulary of 24,576; with `smoke`
            a few short steps of the whole model)
"""

from recursive_weights import config as config_lib
from recursive_weights.interfaces import UserError
from recursive_weights.models import hybrid_lm
from recursive_weights.models.layers import fusion
from recursive_weights.training import stopping

PATTERNS = {
  'rwkv6': 'R',
  'mamba2': 'M',
  'attention': 'A',
  'alternate': 'RM',
  'ratio31': '3R1M',
}
SIZES = {'m8': '8m', 'm30': '30m', 'm125': '125m'}
# What a state does, beside recall; compiling takes longer than a smoke run.
PROBES = {
  'forgetting': {
    'before': 128,
    'bins': (1, 8, 32, 128),
    'passages': 16,
    'control': True,
  },
  'poison': {
    'prefix': 64,
    'length': 64,
    'passages': 8,
    'candidates': 8,
    'control': True,
  },
  'utilisation': {'passages': 8, 'length': 512, 'control': True},
  'state_jitter': {'length': 128, 'copies': 2, 'count': 64, 'control': True},
  'identity': {'copies': 4, 'count': 64, 'noise': 200, 'control': True},
}
# T in W_l = T^l(W_0).
SHARED = {'tied': {'name': ''}, 'derived': {'name': 'residual', 'rank': 4}}
VARIANTS = (
  'smoke',
  *PATTERNS,
  'anchored',
  *fusion.NAMES,
  *SHARED,
  'narrow',
  'fresh',
  'shuffled',
  'curriculum',
  'gates',
  'plateau',
  'probes',
  'bytes',
  'library',
  *SIZES,
)

# The large matrices of every kind of layer, by the letter of its pattern.
MATRICES = {
  'H': (
    *(f'hybrid/time/{x}' for x in 'receptance key value gate output'.split()),
    *('hybrid/ssm/in', 'hybrid/ssm/out', 'hybrid/mlp/up', 'hybrid/mlp/down'),
  ),
  'R': (
    *(f'rwkv6/time/{x}' for x in 'receptance key value gate output'.split()),
    *(f'rwkv6/channel/{x}' for x in 'receptance key value'.split()),
  ),
  'M': ('mamba2/ssm/in', 'mamba2/ssm/out'),
  'A': (
    *('attention/attention/qkv', 'attention/attention/out'),
    *('attention/mlp/up', 'attention/mlp/down'),
  ),
}


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'text',
    'path': '',  # '': what Python ships
    'test_path': '',
    'source': 'pydoc',
    'separator': '',
    'split_by': 'document',
    'tokens': 'characters',
    'length': 128,
    'curriculum': (),
    'order': 'tracks',
  }
  config.model = {
    'name': 'hybrid_lm',
    'pattern': 'H',
    'layers': 3,
    'anchors': (),
    'width': 96,
    'head_width': 32,
    'mix_rank': 16,
    'decay_rank': 32,
    'half_life': (),
    'grounding': 0.0,
    'learned_grounding': False,
    'state_width': 32,
    'expand': 2,
    'groups': 1,
    'conv_width': 4,
    'window': 128,
    'expansion': 2.0,
    'fusion': 'gf_mh',
    'norm': 'rms',
    'gamma': 0.0,
    'state_norm': 0,
    'initial': 'learned',
    'tied': True,
    'embedding_norm': False,
    'dropout': 0.0,
    'algorithm': 'auto',  # GPU kernels of the scans where they fit
    'chunk': 16,
    'precision': 'highest',
    'remat': True,  # also faster
  }
  config.optimizer.update(learning_rate=3e-3, b2=0.95)
  config.optimizer.schedule.update(warmup_steps=50, final_fraction=0.1)
  everything = config.optimizer.groups.all.to_dict()
  names = 'receptance|key|value|gate|output|in|out|qkv|up|down|head'
  large = rf'(?:^|/)(?:{names})$'
  # Only large matrices decay: states, decays, norms and the embedding do not.
  config.optimizer.groups = {
    'matrices': everything | {'pattern': large, 'weight_decay': 0.1},
    'rest': everything | {'pattern': rf'^(?!.*{large})'},
  }
  config.training.update(
    steps=800,
    batch_size=16,
    steps_per_dispatch=10,
    keep_carry=True,
    report_every=25,
    evaluate_every=200,
  )
  config.checkpoint.update(every=200, best='validation/loss', mode='min')
  config.evaluators.during = {
    'perplexity': {
      'splits': ('validation',),
      'max_batches': None,
      'hand_off': True,
      'bins': (),
    }
  }
  config.evaluators.after = {
    'perplexity': {
      'splits': ('validation', 'test'),
      'max_batches': None,
      'hand_off': True,
      'bins': (1, 16, 64, 256, 1024),
    },
    'samples': {
      'prompts': ('', 'The '),
      'copies': 2,
      'count': 400,
      'temperature': 0.8,
      'top_k': 0,
      'top_p': 0.95,
    },
    'state_gates': {
      'split': 'validation',
      'rows': 8,
      'tokens': 512,
      'chunk': 64,
      'layers': True,
      'bounds': {},
    },
  }
  _size(config, chosen)
  if 'smoke' in chosen:
    _smoke(config, chosen)
  _layers(config, chosen)
  _state(config, chosen)
  _watch(config, chosen)
  if 'bytes' in chosen:
    config.task.tokens = 'bytes'
  if 'library' in chosen:
    config.task.source = 'library'
  return config


def _size(config, chosen):
  """A size for GPUs, with longer chunks."""
  size = config_lib.one(chosen, SIZES)
  if not size:
    return
  config.model.update(hybrid_lm.SIZES[SIZES[size]])
  config.model.update(mix_rank=32, decay_rank=64, state_width=64, chunk=64)
  config.model.window = 512
  config.task.length = 512
  config.dtype = 'bfloat16'
  config.optimizer.learning_rate = 6e-4
  config.optimizer.schedule.warmup_steps = 500
  config.training.update(steps=20_000, batch_size=64)


def _smoke(config, chosen):
  """Sizes of seconds; what the other variants choose follows from them.

  A model for GPUs keeps its own, as those are what is to be tried.
  """
  config.task.length = 8
  config.model.chunk = 4
  if not chosen & set(SIZES):
    config.model.update(layers=2, width=32, head_width=16, state_width=8)
    config.model.update(mix_rank=4, decay_rank=4)
  config.training.update(
    steps=6, batch_size=8, steps_per_dispatch=2, report_every=2
  )
  config.training.evaluate_every = 4
  config.checkpoint.every = 4
  config.optimizer.schedule.warmup_steps = 2
  for when in ('during', 'after'):
    config.evaluators[when].perplexity.update(max_batches=2, bins=())
  config.evaluators.after.samples.update(count=20, copies=1)


def _layers(config, chosen):
  """Kinds of layers, the fusion of their halves, and weights they share."""
  kind = config_lib.one(chosen, PATTERNS)
  if kind:
    config.model.pattern = PATTERNS[kind]
  if kind in ('alternate', 'ratio31'):  # whole periods
    config.model.layers = -(-config.model.layers // 4) * 4
  if 'anchored' in chosen:
    if kind == 'attention':
      raise UserError('anchored and attention exclude each other: choose one')
    config.model.anchors = (config.model.layers // 2,)
  name = config_lib.one(chosen, fusion.NAMES)
  if name:
    if 'H' not in config.model.pattern:
      raise UserError(
        f'{name} needs hybrid layers, got {kind}: leave out {name} or {kind}'
      )
    config.model.fusion = name
  sharing = config_lib.one(chosen, (*SHARED, 'narrow'))
  if sharing == 'narrow':
    heads = -(-2 * config.model.width // (3 * config.model.head_width))
    config.model.width = heads * config.model.head_width
  if sharing not in SHARED:
    return
  config.recursive.rules = {
    path.replace('/', '_'): {
      'source': path,
      'target': path,
      'adapter': {'name': ''},
      'operator': dict(SHARED[sharing]),
      'iterate': True,
    }
    for letter in dict.fromkeys(config.model.pattern)
    for path in MATRICES.get(letter, ())  # none of a count
  }


def _state(config, chosen):
  """What the state is at the start of a chunk, and how long chunks are."""
  if config_lib.one(chosen, ('fresh', 'shuffled')) == 'fresh':
    config.training.keep_carry = False
  if 'shuffled' in chosen:
    config.task.order = 'shuffled'
  if 'curriculum' in chosen:
    steps, length = config.training.steps, config.task.length
    config.task.curriculum = (
      (0, length // 4),
      (steps // 5, length // 2),
      (steps // 2, length),
    )


def _watch(config, chosen):
  """What is measured on the way, and what may end a run."""
  gates = config.evaluators.after.state_gates
  if 'smoke' in chosen:
    gates.update(rows=2, tokens=16, chunk=4, layers=False)
  if 'gates' in chosen:
    config.evaluators.during.state_gates = gates.to_dict() | {'layers': False}
  elif 'smoke' in chosen:  # compiling it takes as long as all the rest
    del config.evaluators.after.state_gates
  if 'plateau' in chosen:
    # Small models are there to be understood, so a person looks at each plateau
    # (0), and nothing is cut; those for which that has been done train through
    # three.
    budget = 3 if chosen & {'m30', 'm125'} else 0
    config.early_stopping.rules = stopping.defaults() | {'budget': budget}
    # Rules speak after some evaluations.
    config.training.evaluate_every = min(config.training.evaluate_every, 40)
  if 'probes' in chosen:
    recall = {
      'kinds': ('passkey', 'tracking'),
      'distances': (16, 64, 256),
      'depths': (0.0, 0.5),
      'examples': 16,
      'symbols': '0123456789',
      'control': True,
    }
    probe(config, PROBES | {'recall': recall})


def probe(config, probes):
  """Probes at every evaluation, and beside untrained weights at the end."""
  config.evaluators.after.update(probes)
  for name, fields in probes.items():
    config.evaluators.during[name] = fields | {'control': False}
