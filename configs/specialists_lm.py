r"""How few weights do seven language models need, one for each domain?

Each row of a batch is of one of seven domains and is read by that domain's
member, a causal attention model of two layers and width 64 (72,064 weights).
Members share what no rule names. Without a path the text is problems that are
generated; with one it is real:

  python train.py --config=configs/specialists_lm.py --workdir=runs/derived \
      --config.task.path=FOLDER --config.task.passages=32

FOLDER has a text file for each domain (tasks/domains.py names them) with a
blank line between modules: here OpenStax textbooks (Rice University, CC BY
4.0), modules split by hash. Held out: 32 passages a domain of 4 rows of 64
characters, read afresh. 800 steps of 28 rows, in nats a character:

  scheme       weights   of eight   own domain            all members  centre
                         (saved)    by seed, 0 to 4       on it        alone
  independent  504,448              2.203 2.229 2.198     2.373
  centre        72,064   87.5 %     1.977 1.988 1.974
  derived      109,696   81.0 %     1.963 1.974 1.971     2.042        2.007
                                    1.978 1.980           (mean)       (mean)
  low_rank     109,696   81.0 %     1.963 1.973 1.960     2.046        2.009
                                    1.996 1.982           (mean)       (mean)
  basis        113,108   80.4 %     1.959 1.964 1.961     2.013        2.037
  hub          542,080              2.169 2.162 2.190     2.221        2.214
  ring         542,080              2.201 2.206 2.206     2.251        2.240

`of eight`: against eight models of their own, the centre and seven members.
Every member of `derived` is better on its own domain than the seven are on
average, by 3.2 to 4.7 standard errors over passages in the worst domain of each
seed. So sharing is worth a lot at equal steps (.23 nats less than independent
members, each of which sees a seventh of the text), and specialising a little
(.003 to .015 less than one model for all). Operators and low-rank adapters of
exactly the same size are equal: 1.973 against 1.975, a difference of -.002 with
a standard error of .005 over five seeds; a basis of 3 % more weights is ahead
of operators by .004, .009 and .010. Members of the other schemes are better on
their own domain by 2.6 standard errors or more. Members whose copies of the
centre a hub or a ring synchronises beat that centre after the last
synchronisation in every seed, by .031 to .046 and .034 to .038, but learn more
slowly than those that train together.

LOGOS alone, by step (`curves`, validation, seed 0): operators are after 300
steps where an independent model is after 800.

  step           100    200    300    400    500    600    700    800
  derived       2.675  2.444  2.309  2.242  2.206  2.152  2.134  2.114
  independent   2.966  2.694  2.553  2.506  2.485  2.399  2.374  2.364

Which member should read a text? Losses on 128 characters name the right domain
in .60 to .67 of passages (seed 0: .62, top 2 .76), words alone in .62 to .66,
trigrams in .67 to .72: members are no good router. Routed by them the next 128
characters cost 1.981, with the right member 1.970, with one model for all 1.983
(seed 0).

An eighth domain (chemistry, seeds 0, 1, 2): the centre alone 2.083 2.130 2.117,
a new member with the rest frozen (5,376 weights) 2.072 2.119 2.107 after 28
rows and 1.986 1.993 2.014 after 448; all 72,064 weights of the centre 2.083
2.130 2.117 (chosen not to train) and 1.894 1.894 1.906. On a basis a new member
is twelve coefficients: 2.093 2.144 2.150 by the centre's, 2.065 2.103 2.086 by
the nearest of the seven's, its own 2.048 2.093 2.084 after 28 rows and 2.048
2.089 2.085 after 448: the better choice while samples are few. Commands:

  python train.py --config=configs/specialists_lm.py:independent,curves ...
  python -m recursive_weights.benchmarks.specialists runs/derived
  python -m recursive_weights.benchmarks.specialists runs/derived \
      --domain chemistry --samples 28 448 --steps 100

A run takes two minutes of a core (with `curves` four), one of 800 steps.

Variants, joined by commas: `smoke` (seconds), `curves` (every member on every
domain during training too, in `metrics.jsonl`); schemes `independent`, `centre`
(one model for all), `derived` (W + W A_i B_i, the default), `low_rank` (W + A_i
B_i), `basis` (sum_k a_ik G_k); `apart` (every member trains its own copy of the
centre), `hub` and `ring` (copies are synchronised every 25 steps, see
training/federation.py).
"""

from recursive_weights import config as config_lib

# Leaves that members do not share, and how they are made. Sizes are those at
# which eight models take 80 % fewer weights than eight of their own.
MATRICES = r'^attention/(attention/(qkv|out)|mlp/(up|down))$'
SCHEMES = {
  'independent': (),
  'centre': (),
  'derived': (
    (MATRICES, 0, {'name': 'residual', 'kind': 'low_rank', 'rank': 3}),
  ),
  # 5,376 weights a member, as many as `derived`.
  'low_rank': (
    (r'^attention/attention/(qkv|out)$', 0, {'name': 'low_rank', 'rank': 4}),
    (r'^attention/mlp/(up|down)$', 0, {'name': 'low_rank', 'rank': 3}),
  ),
  'basis': ((r'^attention/(attention/out|mlp/(up|down))$', 2, {'name': ''}),),
}
FEDERATIONS = ('apart', 'hub', 'ring')
VARIANTS = ('smoke', 'curves', *SCHEMES, *FEDERATIONS)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'domains',
    'path': '',  # '': problems that are generated
    'domains': (),
    'answer': 'sequence',
    'length': 64,
    'passages': 8,
    'rows': 4,
    'levels': (1, 2, 3),
    'problems': 2000,
  }
  config.model = {
    'name': 'specialists',
    'member': {
      'name': 'hybrid_lm',
      'pattern': 'A',
      'layers': 2,
      'width': 64,
      'head_width': 32,
      'window': 64,
      'expansion': 2.0,
      'tied': True,
      'precision': 'highest',
      'remat': False,
    },
  }
  config.optimizer.update(learning_rate=3e-3, b2=0.95)
  config.optimizer.schedule.update(warmup_steps=50, final_fraction=0.1)
  config.training.update(
    steps=800,
    batch_size=28,
    steps_per_dispatch=25,
    report_every=25,
    evaluate_every=200,
  )
  config.checkpoint.update(every=400, best='validation/loss', mode='min')
  evaluate(config)
  share(config, chosen, SCHEMES, layers=True)
  if 'curves' in chosen:
    curves(config)
  if 'smoke' in chosen:
    config.task.update(length=8, passages=2, problems=200)
    config.model.member.update(width=16, head_width=8, window=8)
    smoke(config)
  return config


def evaluate(config):
  """Losses of members on their own domain, then all of it."""
  config.evaluators.during = {'accuracy': {'splits': ('validation',)}}
  config.evaluators.after = {
    'accuracy': {'splits': ('validation',)},
    'domains': {
      'split': 'test',
      'passage': 4,
      'top_k': (1, 2, 3),
      'known': 3584,
    },
  }


def curves(config):
  """Every member on every domain during training too, in `metrics.jsonl`."""
  config.evaluators.during = {
    'domains': {'split': 'validation', 'passage': 4, 'known': 28}
  }
  config.training.evaluate_every = 100


def share(config, chosen, schemes, layers):
  """The chosen scheme, and copies of the centre that are synchronised."""
  name = config_lib.one(chosen, schemes) or 'derived'
  federation = config_lib.one(chosen, FEDERATIONS)
  rules = {
    f'rule{index}': {
      'pattern': pattern,
      'layers': layers,
      'basis': basis,
      'operator': dict(operator),
    }
    for index, (pattern, basis, operator) in enumerate(schemes[name])
  }
  config.model.scheme = 'derived' if rules else name
  config.model.rules = rules
  config.model.apart = bool(federation)
  if federation in ('hub', 'ring'):
    config.federation.update(every=25, topology=federation)


def smoke(config):
  """Sizes of seconds."""
  config.training.update(
    steps=6, batch_size=14, steps_per_dispatch=2, report_every=2
  )
  config.training.evaluate_every = 4
  config.checkpoint.every = 4
  config.optimizer.schedule.warmup_steps = 2
  config.evaluators.after.domains.known = 28
  if config.federation.every:
    config.federation.every = 2
