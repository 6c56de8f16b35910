r"""Can seven Continuous Thought Machines share one set of weights?

A member reads 12 characters, thinks for four ticks and says which character
comes next; text and domains are those of configs/specialists_lm.py. What a
member has of its own is little: T_i of its neurons' first weights (residual,
rank 1) and, as in the design document, its biases.

  python train.py --config=configs/specialists_ctm.py --workdir=runs/ctm \
      --config.task.path=FOLDER --config.task.passages=32

400 steps of 224 rows, held-out loss in nats (512 characters of each domain);
`of eight`: weights saved against eight models of their own.

  scheme       weights   of eight   own domain,          all members   centre
                                    seeds 0, 1, 2        on it, mean   alone
  independent  224,231              3.008                3.094
  centre        32,033   87.5 %     2.681 2.722 2.781
  derived       38,760   84.9 %     2.652 2.664 2.735    2.694         2.661
  low_rank      38,536   85.0 %     2.656 2.680 2.763    2.708         2.671
  basis         46,148   82.0 %     2.684                2.697         2.684

So sharing pays at equal steps. Operators are ahead of one model for all in each
seed (by .029 to .058) and of low-rank adapters (by .004 to .027), but schemes
with rules also train with lr_scale .3 on what their members have of their own.
And the machines hardly specialise: members of `derived` are better than the
average of the seven on their own domain by .013, .009 and .007 nats, in each
seed worse in some domain, and the centre without its operators is better than
the members with them (2.661 against 2.684 on average). Nor do 3,000 steps help
(seed 0, 1,024 characters of each domain, --config.training.steps=3000
--config.task.passages=64): then one model for all has 2.389, adapters 2.412,
`derived` 2.446 and with an operator of rank 4 on the readout too 2.402 (2.413
and 2.440 at lr_scale .1 and 1). Members are better on their own domain than
the seven are on average by .027 to .037, in the worst domain by -1.3 to +.3
standard errors. LOGOS alone (`curves`, seed 0, after 100, 200, 300 and 400
steps): 3.467, 3.135, 2.850, 2.792 derived, 3.425, 3.315, 3.215, 3.143
independent. As a router they are near chance (.16 to .19 of passages; words .24
to .26, trigrams .31 to .33).

Variants, joined by commas: `smoke` (seconds) and those of
configs/specialists_lm.py.
"""

from configs import specialists_lm
from recursive_weights import config as config_lib

W1 = '^nlm/w1$'
# Each member has biases of its own, as the document's specialists have.
OWN = (r'(^|/)(bias|b1|b2)$', 0, {'name': 'offset'})
SCHEMES = {
  'independent': (),
  'centre': (),
  'derived': (
    (W1, 0, {'name': 'residual', 'kind': 'low_rank', 'rank': 1}),
    OWN,
  ),
  'low_rank': ((W1, 0, {'name': 'low_rank', 'rank': 1}), OWN),
  'basis': ((r'^(nlm/w1|readout/kernel)$', 2, {'name': ''}), OWN),
}
VARIANTS = ('smoke', 'curves', *SCHEMES, *specialists_lm.FEDERATIONS)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'domains',
    'path': '',  # '': problems that are generated
    'domains': (),
    'answer': 'next',
    'length': 12,
    'passages': 8,
    'rows': 16,
    'levels': (1, 2, 3),
    'problems': 2000,
  }
  config.model = {
    'name': 'specialists',
    'member': {
      'name': 'ctm',
      'width': 64,
      'input_width': 32,
      'heads': 2,
      'memory': 8,
      'ticks': 4,
      'nlm': {'hidden': 4, 'activation': 'relu', 'layers': 0, 'norm': False},
      'sync_out': 64,
      'sync_action': 32,
      'pairing': 'random-pairing',
      'self_pairs': 8,
    },
  }
  config.objective.name = 'certainty'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule.update(warmup_steps=50, final_fraction=0.1)
  config.training.update(
    steps=400,
    batch_size=224,
    steps_per_dispatch=25,
    ema_decay=0.99,
    report_every=25,
    evaluate_every=200,
  )
  config.checkpoint.update(every=200, best='validation/loss', mode='min')
  specialists_lm.evaluate(config)
  specialists_lm.share(config, chosen, SCHEMES, layers=False)
  if config.model.rules:
    # A member sees a seventh of the rows: its operators need shorter steps.
    everything = config.optimizer.groups.all.to_dict()
    config.optimizer.groups = {
      'members': everything | {'pattern': '^members/', 'lr_scale': 0.3},
      'rest': everything | {'pattern': '^(?!members/)'},
    }
  if 'curves' in chosen:
    specialists_lm.curves(config)
  if 'smoke' in chosen:
    config.task.update(length=8, passages=2, rows=4, problems=200)
    config.model.member.update(width=16, input_width=8, ticks=2, memory=4)
    config.model.member.update(sync_out=16, sync_action=8, self_pairs=2)
    config.evaluators.after.domains.passage = 4
    specialists_lm.smoke(config)
  return config
