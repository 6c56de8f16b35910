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
32 values a channel: 11.0 million parameters; 400 steps of 64 x 256 characters
(6.6 million), since longer runs know such a text by heart, and dropout .2. Pure
models have the same number of parameters within 3 %.

Members by tier (`TIERS`), joined to sizes by a comma:

  1          baseline, no_anchor, shallow, second_text
  2          wide, gamma_one, state_16, state_64, groups_1, groups_4,
             alpha_learned, alpha_none, recurrent_slow, recurrent_fast,
             ssm_slow, ssm_fast, long_warmup
  3          rwkv6, mamba2, attention: pure models
  fusions    baseline and each other fusion of the two halves
  diagnosis  baseline, both pure recurrent models, and halves that learn one
             after the other: `time_first` (Mamba-2 rests for half of the
             steps), `ssm_first` (RWKV-6 rests), beside `restart` (none rests).
             These three begin the schedule and the data again half-way.

Where the design's validation matrix differs: its baseline has StateNorm in four
groups, and one group is a member; ours has none, since inside the recurrence
that goes token by token, and it was worse where it was measured (below). One
group and four are compared with the baseline and with each other. Its state is
16, with 32 as a member; ours is 32, so that half and twice as much are both
asked. Its steps are 10,000, and 5,000 for gamma, groups and state; ours are 400
for all, since only runs of equal length are compared (3,000 below). It has no
rates, alphas, warm-up, fusions or diagnosis, and no pure attention.

Measured at full size, all (of `groups_1` the first 350 steps), on
tiny-shakespeare (1,115,394 characters, of which the last tenth is held out,
half for validation and half for the test), 400 steps of 64 x 256 characters
(6.6 million), three seeds each, on an H200:

                  parameters   validation       against baseline   test
  baseline        11,016,976   1.362 +- .010                       1.580 +- .007
  rwkv6           11,085,568   1.386 +- .007    +.023 (.038)       1.574 +- .004
  mamba2          11,274,112   1.389 +- .006    +.026 (.029)       1.623 +- .023
  attention       11,039,488   1.486 +- .006    +.123 (.027)       1.631 +- .017
  no_anchor       11,586,880   1.364 +- .003    +.002 (.023)       1.585 +- .019
  shallow          5,232,112   1.372 +- .004    +.009 (.016)       1.562 +- .006
  wide            10,945,124   1.367 +- .003    +.004 (.024)       1.585 +- .010
  gamma_one       11,016,976   1.365 +- .005    +.003 (.030)       1.552 +- .018
  state_16        10,833,936   1.359 +- .005    -.004 (.019)       1.568 +- .016
  state_64        11,383,056   1.361 +- .005    -.001 (.014)       1.566 +- .009
  alpha_learned   11,016,987   1.359 +- .007    -.003 (.012)       1.574 +- .016
  alpha_none      11,014,160   1.360 +- .004    -.002 (.016)       1.558 +- .011
  recurrent_slow  11,016,976   1.362 +- .008    -.000 (.006)       1.556 +- .012
  recurrent_fast  11,016,976   1.375 +- .006    +.012 (.018)       1.579 +- .014
  ssm_slow        11,016,976   1.362 +- .006    +.000 (.034)       1.550 +- .003
  ssm_fast        11,016,976   1.360 +- .003    -.002 (.017)       1.565 +- .002
  long_warmup     11,016,976   1.348 +- .006    -.014 (.012)       1.536 +- .007
  groups_4        11,287,312   1.382 +- .001    +.020 (.024)       1.578 +- .016
  groups_1        11,287,312   1.390 +- .006    +.027 (.025)

(best validation by seed, and its difference, with what it must exceed to be
more than chance; the test after the last step; of `groups_1` and the baseline
after 350 steps). So the hybrid is better than
attention, and on validation as good as either of its halves alone, within the
spread; on the test RWKV-6 is as good too, and Mamba-2, which overfits first
(1.414 on validation in the end), worse by .043 (.039). IT DOES NOT WIN. It
learns sooner than RWKV-6 (1.396 against 1.549 after 200 steps), not than
Mamba-2 (1.381). Of the fifteen questions above two are decided (by chance .75
would be): a warm-up of 300 steps is better than one of 100, on the test too
(-.045 (.009); the schedule ends with the run, so it also lowers the rate on the
way); and StateNorm in one group is worse than none (an earlier run of it, ended
after 250 steps: +.020 (.019)). Four groups are as far behind on the way (+.023
(.019) after 250 steps, +.024 (.016) after 300), by less than the spread in the
end, and no worse on the test; one or four makes no difference (after 350 steps
.006 (.010)). No anchor, half of the layers, a wider model, gamma 1, half or
twice the state, a learned alpha or none, a tenth or thrice the rate of the
decays or of the whole Mamba-2 half do as well on validation (a tenth for
Mamba-2 is better on the test, by .030 (.020)). On another text (`second_text`:
OpenStax, Introduction to Philosophy, CC BY 4.0, 1.2 million characters) the
baseline has 1.223 +- .003.

The pure models gain as much by a warm-up of 300 steps (each with
--config.optimizer.schedule.warmup_steps=300), so that the hybrid with it stays
ahead as far: rwkv6 1.368 +- .003, -.018 (.014), test 1.550 +- .025; mamba2
1.366 +- .009, -.023 (.021), which no longer overfits (its last step is its
best; its run ended before the test); attention 1.460 +- .006, -.026 (.025),
test 1.613 +- .005. Against `long_warmup` +.020 (.022), +.017 (.009) and +.112
(.011): ahead of Mamba-2 and attention by more than chance, of RWKV-6 by a hair
less than that (test +.014 (.065), and +.078 (.030) for attention).

Others hold out the whole last tenth as validation (nanoGPT has 1.47 there, with
82 million characters and 10.6 million parameters). Of both halves together,
after the last step: baseline 1.474 +- .006, rwkv6 1.480 +- .001, mamba2 1.518
+- .010, attention 1.558 +- .012, long_warmup 1.442 +- .006.

Fusions, screened with seed 0, where `hy` has 1.374 (1.354 and 1.360 in seeds 1
and 2): gf 1.362, ws 1.363, gf_mh 1.367, hgf_mh 1.369, gf_rh 1.369, rf 1.371,
hgf 1.371, hgf_rh 1.372, cp 1.378, gf_xm 1.380, gf_xr 1.392. None is further
from it than its own seeds are from each other. First and last again, with two
more seeds: gf 1.372 +- .008, +.010 (.029), gf_xr 1.379 +- .006, +.017 (.012):
worse than `hy` (test 1.579 +- .013 and 1.585 +- .017, no difference).

Diagnosis, 200 + 200 steps, three seeds: both halves throughout (`restart`)
1.352 +- .003 (test 1.550 +- .004); Mamba-2 rests first (`time_first`) 1.369 +-
.003, +.017 (.015) (test 1.534 +- .008); RWKV-6 rests first (`ssm_first`) 1.468
+- .009, +.116 (.015) (test 1.637 +- .034). So the halves help each other from
the start; and a half that has learned alone is unsettled by the other one:
after its 200 steps Mamba-2 beside a resting RWKV-6 has 1.402 +- .006, which
what follows never reaches again. RWKV-6 beside a resting Mamba-2 has 1.436 +-
.004, both at once 1.391 +- .005. Much of that may be `hy`'s own: it norms each
half, so RWKV-6, whose output begins at zero, comes in at nearly its full weight
of .7 with its first steps, where Mamba-2 never begins at zero. At half a
million parameters (`small`, 200 + 200 steps, one seed) RWKV-6 resting first
costs .043 with `hy` (1.890, 1.847 without a rest) and nothing with `gf`, which
has no norms (1.893, 1.894).

Learning rates were tried for 200 steps with seed 0, twice: 1e-3, 2e-3, 4e-3,
and 4e-3, 8e-3, 1.6e-2. Each family's best lies within: 8e-3 for the first three
(1.396, 1.549, 1.381, where 4e-3 has 1.400, 1.568, 1.389 and 1.6e-2 has 1.401,
1.578, 1.395), 4e-3 for attention (1.736; 2e-3 1.783, 8e-3 1.776), which are the
defaults. All other members took the baseline's; Mamba-2, which overfits first,
was not run for 400 steps at 4e-3.

For 3,000 steps at 1e-3, not tuned, seed 0: the least validation loss of those
after every 250 steps (and after how many), and the last one:

               least         last    training, after 2,000 steps
  rwkv6        1.413  (750)  2.099   .71
  baseline     1.418  (500)  2.729   .44
  mamba2       1.419  (250)  3.107   .35
  attention    1.453 (1000)  1.820   .88

So longer runs know the text by heart, the hybrid and Mamba-2 first, with a
dropout of .2 too; 400 steps at the best rates end lower for all but attention
(1.453 for 1.486), which needs longer, and the hybrid does not win. None has
learned to hold what it is told (`recall`, codes of letters, after the last
step): of 128 codes each at 16, 64 and 256 characters none is said, .03 to .05
of their letters where chance has .10 (untrained .07 to .09), and of 128
questions each who holds what none is answered. What such blocks can learn to
hold is in `configs/hybrid_recall.py`.

At 4e-3, an earlier run of three seeds had 1.368 +- .003 for the baseline (test
1.561 +- .014) and 1.391 +- .004 for `rwkv6` (1.561 +- .004). Alone on the GPU,
three seeds in one program took 166 ms a step for the baseline (296,000
characters a second), 86 for `rwkv6`, 74 for `attention`, 285 for `mamba2`, with
older kernels. All in
`benchmarks/results/hybrid_matrix_shakespeare.jsonl`, and what the command makes
of it, every answer and the verdict, in `hybrid_matrix_shakespeare.md`; the runs
were

  python -m recursive_weights.matrix --config=configs/hybrid_matrix.py \\
      --tier=3 --learning_rates=4e-3,8e-3,1.6e-2 --screen_steps=200 \\
      --workdir=runs/matrix --path=TEXT
  python -m recursive_weights.matrix --config=configs/hybrid_matrix.py \\
      --tier=3 --num_seeds=1 --workdir=runs/longer --path=TEXT \\
      --config.training.steps=3000 --config.optimizer.learning_rate=1e-3 \\
      --config.training.evaluate_every=250

and the other tiers without rates to try (all by a copy of this config without
gates and checkpoints on the way, so without the former's columns; fusions with
one seed, but for the two above).

The verdicts in that file are of earlier gates: G2 warned of the baseline and
failed the pure models, since an untrained tied head of width 256 repeats the
token just read (logit .02 D = 5), and G3.5 failed Mamba-2, presumably since the
entropy of a softmax of states falls as heads grow. Gates now leave that token
out and judge the share of entries that hold a state: `small` (three seeds),
`small,mamba2` and six layers of `mamba2` pass them all
(`benchmarks/results/hybrid_gates.json`). So do at full size the three seeds of
`long_warmup` (trained again, validation 1.347 +- .005 in the end), the three of
`rwkv6` and seed 0 of `mamba2` with that warm-up, but for a warning of G3.5 in
one (states of the last two layers of `rwkv6` grow by .700 and .710, bound .7).
`baseline` and `rwkv6` as they stand, 400 steps with gates at every evaluation
(three seeds each, twice, at the end of `hybrid_matrix_shakespeare.jsonl`; best
validation 1.362 +- .004 and 1.388 +- .008, then 1.360 +- .005 and 1.384 +-
.004, as before; test 1.571 +- .005 and 1.565 +- .013 of the baseline, 1.559 +-
.023 of `rwkv6`), pass them in the end but for warnings: of one seed of the
baseline, the first time, a gradient norm of 14, as it begins to overfit, and a
phase shift of .0087 (wanted .01); of one of `rwkv6`, both times, states that
grow by .72 and .71 (.70). On the way all seeds warn after 50 steps, where two
of `rwkv6` and then all three fail G3.5; a few warn later. Both times the tier
was cut short: `mamba2` and `attention` have no such gates at full size.

`small`, the rate not tuned, 600 steps: three seeds of the baseline (513,558
parameters) 1.657 +- .050, of `groups_1` (541,206) 1.671 +- .062, +.014 (.029),
of `groups_4` 1.679 +- .038, +.023 (.033): StateNorm is worse in every seed, by
less than what would be more than chance; 12, 23 and 24 minutes of a CPU core.
Seed 0 of `rwkv6` (535,968) 1.748, where the baseline's is 1.630
(`benchmarks/results/hybrid_matrix_small.jsonl`). At 6e-3, the best and largest
of three rates for each, three seeds: baseline 1.636 +- .056, `rwkv6` 1.722 +-
.068, +.085 (.032), `mamba2` 1.596 +- .043, -.040 (.031), `attention` 1.874 +-
.062, +.238 (.020); no gate fails (`hybrid_matrix_small.md`). So where all still
learn the hybrid is ahead of RWKV-6, as it is at full size after 200 steps, but
behind a Mamba-2 that has 673,712 parameters here.

Sizes: `small` (half a million parameters, for a CPU: 600 steps of 16 x 64) and
`smoke` (about a minute, to compile). On a CPU three seeds in one program take
three times as long a step as one (`small`: .93 and .30 s on two cores).
StateNorm inside the recurrence (`groups_*`) goes token by token, so these two
members are slow: 1.3 s a step at full size, alone on an H200, where the
baseline takes .17.
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
    *('recurrent_slow', 'recurrent_fast', 'ssm_slow', 'ssm_fast'),
    'long_warmup',
  ),
  '3': ('baseline', 'rwkv6', 'mamba2', 'attention'),
  'fusions': ('baseline', *FUSIONS),
  'diagnosis': (
    *('baseline', 'rwkv6', 'mamba2'),
    *('restart', 'time_first', 'ssm_first'),
  ),
}
MEMBERS = tuple(dict.fromkeys(name for tier in TIERS.values() for name in tier))
# Members that go on from the weights of another one, half of the steps each.
AFTER = {
  'restart': 'half',
  'time_first': 'time_alone',
  'ssm_first': 'ssm_alone',
}
VARIANTS = (*MEMBERS, *AFTER.values(), *SIZES)

# What a member answers: the question, the member that is compared with the
# baseline, what to do where the baseline, or where the member, is better by
# more than the spread, and what it is compared with if not with the baseline.
QUESTIONS = (
  ('does the attention layer help?', 'no_anchor', 'keep it', 'remove it'),
  ('do 12 layers beat 6?', 'shallow', 'stay deep', 'be shallower'),
  ('is narrow and deep better than wide?', 'wide', 'stay deep', 'widen'),
  ('does gamma = .01 matter?', 'gamma_one', 'keep .01', 'use 1'),
  ('does a smaller state do?', 'state_16', 'keep 32', 'use 16'),
  ('is a state of 32 enough?', 'state_64', 'keep 32', 'use 64'),
  ('is no StateNorm better than one group?', 'groups_1', 'leave out', 'use it'),
  ('is no StateNorm better than four?', 'groups_4', 'leave out', 'use it'),
  ('one group of StateNorm or four?', 'groups_4', 'one', 'four', 'groups_1'),
  ('fixed alpha or learned?', 'alpha_learned', 'fix it', 'learn it'),
  ('does grounding help?', 'alpha_none', 'keep it', 'leave it out'),
  (
    'same rate for decays, or a tenth?',
    'recurrent_slow',
    'the same',
    'a tenth',
  ),
  ('same rate for decays, or thrice?', 'recurrent_fast', 'the same', 'thrice'),
  ('same rate for Mamba-2, or a tenth?', 'ssm_slow', 'the same', 'a tenth'),
  ('same rate for Mamba-2, or thrice?', 'ssm_fast', 'the same', 'thrice'),
  ('short warm-up, or thrice as long?', 'long_warmup', 'short', 'long'),
  *((f'hy, or {name}?', name, 'hy', name) for name in FUSIONS),
)

# What decides how long a state lives, and the state before a document.
RECURRENT = (
  r'/(?:decay|decay_down|decay_up|bonus|a_log|dt_bias|initial|alpha|base)$'
)
LARGE = r'(?:^|/)(?:receptance|key|value|gate|output|in|out|qkv|up|down|head)$'


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
  config.optimizer.learning_rate = 8e-3
  config.optimizer.schedule.warmup_steps = 100
  config.training.update(
    steps=400, batch_size=64, report_every=50, evaluate_every=50
  )
  config.checkpoint.every = 200
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
    config.optimizer.learning_rate /= 2  # its best, as the others' is theirs
  if member in ('ssm_slow', 'ssm_fast'):
    for name, group in [*groups.items()]:
      own = _where(group.pattern, '(?=hybrid/ssm/)')
      scale = 0.1 if member == 'ssm_slow' else 3.0
      changes = {'pattern': own, 'lr_scale': scale}
      groups[f'{name}_ssm'] = group.to_dict() | changes
      group.pattern = _where(group.pattern, '(?!hybrid/ssm/)')
  if member in ('time_alone', 'ssm_alone'):
    _rest(config, 'ssm' if member == 'time_alone' else 'time')


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
  for group in config.optimizer.groups.values():
    group.pattern = _where(group.pattern, f'(?!hybrid/{half}/)')
  config.optimizer.groups.resting = {
    **config.optimizer.groups.rest.to_dict(),
    'pattern': f'^hybrid/{half}/',
    'frozen': True,
  }


def _where(pattern, condition):
  """A pattern that must also meet a condition at the start of a path."""
  dots = '' if pattern.startswith('^') else '.*'
  return f'^{condition}{dots}{pattern.removeprefix("^")}'


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
