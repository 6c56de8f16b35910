"""How few weights do seven language models need, one for each domain?

TO BE WRITTEN
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
  'low_rank': ((MATRICES, 0, {'name': 'low_rank', 'rank': 4}),),
  'basis': ((r'^attention/(attention/out|mlp/(up|down))$', 2, {'name': ''}),),
}
FEDERATIONS = ('apart', 'hub', 'ring')
VARIANTS = ('smoke', *SCHEMES, *FEDERATIONS)


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
