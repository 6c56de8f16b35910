"""Which parts of a hybrid language model earn their place, before it is scaled?

The validation matrix of the RWKV-6 x Mamba-2 hybrid: one baseline, and members
that differ from it in one thing each. A tier of it is trained by one command,

  python -m recursive_weights.matrix --config=configs/hybrid_matrix.py \\
      --tier=1 --num_seeds=3 --workdir=runs/matrix --path=TEXT \\
      --second_path=OTHER_TEXT

which goes on where it stopped and ends with a table, curves, a table of
decisions and a verdict on scaling. Without paths the texts are those that every
Python ships: the language reference, and sources of the standard library. A
member alone: `train.py --config=configs/hybrid_matrix.py:MEMBER`.

The baseline: twelve layers of width 256, RWKV-6 and Mamba-2 in parallel in each
('hy'), attention at layer 6, residual scale .01, grounding alpha .6, state of
32 values a channel: 11.0 million parameters; 5,000 steps of 64 x 256
characters (82 million) and dropout .2. Pure models have the same number of
parameters within 3 %.

Members by tier (`TIERS`), joined to sizes by a comma:

  1          baseline, no_anchor, shallow, second_text
  2          wide, gamma_one, state_16, state_64, groups_1, groups_4,
             alpha_learned, alpha_none, recurrent_slow, recurrent_fast,
             long_warmup
  3          rwkv6, mamba2, attention: pure models
  fusions    baseline and each other fusion of the two halves
  diagnosis  baseline, both pure recurrent models, and halves that learn one
             after the other: `time_first` (Mamba-2 rests for half of the
             steps), `ssm_first` (RWKV-6 rests), beside `restart` (none rests).
             These three begin the schedule and the data again half-way.

Measured so far, at full size: tier 3 on tiny-shakespeare (1,115,394 characters,
of which the last tenth is held out, half for validation and half for the test),
400 steps of 64 x 256 characters (6.6 million), three seeds, on an H200:

                parameters   validation       test             both
  baseline      11,016,976   1.368 +- .003    1.561 +- .014    1.465
  rwkv6         11,085,568   1.391 +- .004    1.561 +- .004    1.476
  attention     11,039,488   1.480 +- .004    1.625 +- .006    1.553
  mamba2        not finished

(best validation by seed; the others after the last step). The hybrid is better
than RWKV-6 by .023 on validation (.007 is more than chance), but on the test
part no better, and better than attention by .11, whose loss still falls. Each
took 4e-3, the largest of the three rates tried (1e-3, 2e-3, 4e-3; 200 steps,
seed 0: 1.398 for the baseline, 1.392 for `mamba2`, 1.567 for `rwkv6`, 1.737 for
`attention`), so none is tuned to the end, and by that one seed Mamba-2 alone is
as good as the hybrid. Longer runs know the text by heart: an earlier baseline
at 2e-3, of which no file is left, was at a training loss of .65 after 1,200
steps. Three seeds in one
program take 166 ms a step for the baseline (296,000 characters a second), 86
for `rwkv6`, 74 for `attention`, 285 for `mamba2`. All in
`benchmarks/results/hybrid_matrix_shakespeare.jsonl`; the run was

  python -m recursive_weights.matrix --config=configs/hybrid_matrix.py \\
      --tier=3 --learning_rates=1e-3,2e-3,4e-3 --screen_steps=200 --path=TEXT \\
      --config.training.steps=400 --config.training.evaluate_every=50

(but for a copy of this config without gates and checkpoints on the way).

Gate G2 warns of the baseline and fails the pure models: untrained they repeat
the token they have read, as a tied head of width 256 sees an input of size .02
D = 5 for it (entropy .4 to .6 of its largest).

`small`, seed 0, the rate not tuned, 600 steps, ten minutes of a shared CPU core
each: validation 1.630 for the baseline (513,558 parameters), 1.748 for `rwkv6`
(535,968) (`benchmarks/results/hybrid_matrix_small.jsonl`).

Sizes: `small` (half a million parameters, for a CPU: 600 steps of 16 x 64) and
`smoke` (about a minute, to compile). On a CPU train one seed at a time: three
in one program took eight times as long a step as one. StateNorm inside the
recurrence (`groups_*`) goes token by token, so these two members are slow.
"""

from typing import Any

from configs import hybrid_lm
from recursive_weights import config as config_lib
from recursive_weights.models.layers import fusion

FUSIONS = tuple(name for name in fusion.NAMES if name != 'hy')
SIZES = ('small', 'smoke')
TIERS = {
  '1': ('baseline', 'no_anchor', 'shallow', 'second_text'),
  '2': (
    *('baseline', 'wide', 'gamma_one', 'state_16', 'state_64'),
    *('groups_1', 'groups_4', 'alpha_learned', 'alpha_none'),
    *('recurrent_slow', 'recurrent_fast', 'long_warmup'),
  ),
  '3': ('baseline', 'rwkv6', 'mamba2', 'attention'),
  'fusions': ('baseline', *FUSIONS),
  'diagnosis': (
    *('baseline', 'rwkv6', 'mamba2'),
    *('restart', 'time_first', 'ssm_first'),
  ),
}
MEMBERS = tuple(dict.fromkeys(name for tier in TIERS.values() for name in tier))
# Members that go on from the weights of another one.
AFTER = {
  'restart': 'half',
  'time_first': 'time_alone',
  'ssm_first': 'ssm_alone',
}
VARIANTS = (*MEMBERS, *AFTER.values(), *SIZES)

# What a member answers: the question, the member that is compared with the
# baseline, and what to do where the baseline, or where the member, is better by
# more than the spread.
QUESTIONS = (
  ('does the attention layer help?', 'no_anchor', 'keep it', 'remove it'),
  ('do 12 layers beat 6?', 'shallow', 'stay deep', 'be shallower'),
  ('is narrow and deep better than wide?', 'wide', 'stay deep', 'widen'),
  ('does gamma = .01 matter?', 'gamma_one', 'keep .01', 'use 1'),
  ('does a smaller state do?', 'state_16', 'keep 32', 'use 16'),
  ('is a state of 32 enough?', 'state_64', 'keep 32', 'use 64'),
  ('is no StateNorm better than one group?', 'groups_1', 'leave out', 'use it'),
  ('is no StateNorm better than four?', 'groups_4', 'leave out', 'use it'),
  ('fixed alpha or learned?', 'alpha_learned', 'fix it', 'learn it'),
  ('does grounding help?', 'alpha_none', 'keep it', 'leave it out'),
  (
    'same rate for decays, or a tenth?',
    'recurrent_slow',
    'the same',
    'a tenth',
  ),
  ('same rate for decays, or thrice?', 'recurrent_fast', 'the same', 'thrice'),
  ('short warm-up, or thrice as long?', 'long_warmup', 'short', 'long'),
  *((f'hy, or {name}?', name, 'hy', name) for name in FUSIONS),
)

# What decides how long a state lives, and the state before a document.
RECURRENT = (
  r'/(?:decay|decay_down|decay_up|bonus|a_log|dt_bias|initial|alpha|base)$'
)
LARGE = r'/(?:receptance|key|value|gate|output|in|out|qkv|up|down|head)$'


def get_config(variant=None):
  chosen = config_lib.variants(variant or 'baseline', VARIANTS)
  member = config_lib.one(chosen, VARIANTS[: -len(SIZES)]) or 'baseline'
  size = config_lib.one(chosen, SIZES)
  config = hybrid_lm.get_config()
  config.task.update(split_by='position', length=256)
  config.model.update(
    layers=12,
    anchors=(6,),
    width=256,
    state_width=32,
    window=256,
    expansion=1.0,
    fusion='hy',
    gamma=0.01,
    grounding=0.6,
    dropout=0.2,
    chunk=64,
  )
  config.dtype = 'bfloat16'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule.warmup_steps = 100
  config.training.update(
    steps=5000, batch_size=64, report_every=100, evaluate_every=250
  )
  config.checkpoint.every = 1000
  config.evaluators.after.perplexity.bins = ()
  # What any English text can go on from.
  config.evaluators.after.samples.prompts = ('', 'The ')
  gates = config.evaluators.after.state_gates
  config.evaluators.during.state_gates = gates.to_dict() | {'layers': False}
  if size:
    _small(config)
  if size == 'smoke':  # before members change them
    config.model.update(anchors=(3,))
  _groups(config)
  _member(config, member)
  if size == 'smoke':
    _smoke(config)
  return config


def _member(config, member):
  """What a member changes."""
  model, layers = config.model, config.model.layers
  changes: dict[str, dict[str, Any]] = {
    'no_anchor': {'anchors': ()},
    'shallow': {'layers': layers // 2, 'anchors': (layers // 4,)},
    'wide': {
      'layers': -(-layers * 2 // 3),
      'anchors': (layers // 3,),
      'width': -(-model.width * 5 // 4 // 32) * 32,
    },
    'gamma_one': {'gamma': 1.0},
    'state_16': {'state_width': 16},
    'state_64': {'state_width': 64},
    'groups_1': {'state_norm': 1},
    'groups_4': {'state_norm': 4},
    'alpha_learned': {'learned_grounding': True},
    'alpha_none': {'grounding': 0.0},
    'rwkv6': {'pattern': 'R', 'anchors': ()},
    # A layer of it is half as large: it has no mlp.
    'mamba2': {
      'pattern': 'M',
      'anchors': (),
      'layers': 2 * layers,
      'state_width': 2 * model.state_width,
    },
    'attention': {'pattern': 'A', 'anchors': (), 'expansion': 5.0},
    **{name: {'fusion': name} for name in FUSIONS},
  }
  model.update(changes.get(member, {}))
  if member == 'second_text':
    config.task.source = 'library'
  if member == 'long_warmup':
    config.optimizer.schedule.warmup_steps *= 3
  groups = config.optimizer.groups
  if member == 'recurrent_slow':
    groups.recurrent.lr_scale = 0.1
  if member == 'recurrent_fast':
    groups.recurrent.lr_scale = 3.0
  if member == 'attention':
    del groups['recurrent']
  if member in ('time_alone', 'ssm_alone'):
    _rest(config, 'ssm' if member == 'time_alone' else 'time')
  if member in (*AFTER, *AFTER.values()):  # halves of the same steps
    config.training.steps //= 2


def _groups(config):
  """Large matrices decay; decays and states have a group of their own."""
  plain = config.optimizer.groups.rest.to_dict() | {'weight_decay': 0.0}
  config.optimizer.groups = {
    'matrices': plain | {'pattern': LARGE, 'weight_decay': 0.1},
    'recurrent': plain | {'pattern': RECURRENT},
    'rest': plain | {'pattern': f'^(?!.*(?:{LARGE}|{RECURRENT}))'},
  }


def _rest(config, half):
  """The weights of one half of the hybrid layers stay as they are."""
  other = f'^(?!hybrid/{half}/)'
  for group in config.optimizer.groups.values():
    pattern = group.pattern.removeprefix('^')
    dots = '' if group.pattern.startswith('^') else '.*'
    group.pattern = f'{other}{dots}{pattern}'
  config.optimizer.groups.resting = {
    **config.optimizer.groups.rest.to_dict(),
    'pattern': f'^hybrid/{half}/',
    'frozen': True,
  }


def _small(config):
  """Half a million parameters, for a CPU."""
  config.dtype = 'float32'
  config.task.length = 64
  config.model.update(layers=4, anchors=(2,), width=96, chunk=16, window=64)
  config.model.update(mix_rank=8, decay_rank=16, dropout=0.0)
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule.warmup_steps = 50
  config.training.update(
    steps=600, batch_size=16, report_every=50, evaluate_every=100
  )
  config.checkpoint.every = 200


def _smoke(config):
  """Seconds."""
  config.task.length = 8
  config.model.update(width=32, head_width=16, state_width=8, chunk=4)
  config.model.update(mix_rank=4, decay_rank=4)
  config.training.update(
    steps=4, batch_size=8, steps_per_dispatch=2, report_every=2
  )
  config.training.evaluate_every = 2
  config.checkpoint.every = 4
  config.optimizer.schedule.warmup_steps = 2
  for when in ('during', 'after'):
    config.evaluators[when].perplexity.update(max_batches=2)
  config.evaluators.after.samples.update(count=20, copies=1)
  for when in ('during', 'after'):  # longer to compile than the rest
    del config.evaluators[when]['state_gates']
