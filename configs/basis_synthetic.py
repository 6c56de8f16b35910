r"""Is a basis that members share found again where there is one?

Pairs of question and answer, `a = q W_i + noise`, from 40 members with
`W_i = Σ_k c_ik O_k`, O_k four random orthogonal 32x32 matrices. Eight pairs of
a member do not tell its weight (32 would); those of all members together tell
the basis (from 1.25 R D = 160 on; there are 320). Asked of a new pair: whose is
it? Chance is .025.

  python train.py --config=configs/basis_synthetic.py --workdir=runs/synthetic

fits coefficients and basis by exact least squares in turn, in seconds, until
the tangent gradient is below 3e-5 (`early_stopping.target`) or after 30 steps.
By variant, each with its own --workdir: pairs found at once, of 1,000 held out;
the worst principal cosine between the span found and the planted one, and the
relative squared error of the coefficients (`evaluators/recovery.py`); steps:

  variant      found  cosine  coefficients  steps
               1.000   .9996        1.7e-5     15
  sparse       1.000   .9992        3.3e-5     20
  noisy         .994   .958          .0018     15
  rank8         .785   .996          .033      30  its ridge is too weak
  few           .765   .640          .22       30  too few pairs
  rank2         .549   .898          .34       30  of two angles
  independent   .467   .831          .56        5  every member for itself

(`benchmarks/results/basis_synthetic.jsonl`.) How near the basis comes, by
questions, rank, noise and ridge, with a picture, and with sparse coefficients:

  python -m recursive_weights.benchmarks.recovery --picture recovery.png

(`benchmarks/results/recovery.jsonl`). Relative error on held-out questions,
median of ten draws: .0053 at four pairs a member, .00057 at eight, where it is
.0044 and .00054 with the planted coefficients given: the .0005 that one would
like is below what noise leaves. Sparse coefficients (each kept with probability
.5, one a member at least) leave less signal beside the same noise: .013 and
.0011, with the planted ones given .010 and .0010, worst principal cosine .990
and .9991 (Gaussian: .996 and .9995); one draw of ten had not converged after
300 steps at four pairs. Any ridge up to 1e-3 does; at 3 pairs, too few, 1e-3
halves the error of 1e-6 (.18 against .36).

Variants, joined by commas: `smoke` (seconds), `sparse` coefficients, `few` (two
pairs a member), `noisy` (standard deviation .5 where answers have about 11 in
norm), `gradient` (by cross-entropy over members instead), and one of `rank2`,
`rank8`, `independent` (rank 40).
"""

from configs import basis_retrieval
from recursive_weights import config as config_lib

RANKS = {'rank2': 2, 'rank8': 8, 'independent': 40}
VARIANTS = ('smoke', 'sparse', 'few', 'noisy', 'gradient', *RANKS)


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = basis_retrieval.get_config(','.join(chosen & {'smoke', 'gradient'}))
  config.task = {
    'name': 'planted_basis',
    'members': 40,
    'questions': 8,
    'width': 32,
    'rank': 4,
    'noise': 0.05,
    'coefficients': 'gaussian',
    'held_out': 25,
    'data_seed': 0,
  }
  config.model.update(rank=4, identity=False)
  config.evaluators.during.recovery = {}
  config.evaluators.after.recovery = {}
  if 'gradient' not in chosen:
    config.step.update(ridge=1e-3, similarity=0.0, warm_steps=100)
  if 'sparse' in chosen:
    config.task.coefficients = 'sparse'
  if 'few' in chosen:
    config.task.questions = 2
  if 'noisy' in chosen:
    config.task.noise = 0.5
  if name := config_lib.one(chosen, RANKS):
    config.model.rank = RANKS[name]
  if 'smoke' in chosen:
    config.task.update(members=10, questions=4, width=4, rank=2, held_out=4)
    config.model.rank = 2
    if 'gradient' not in chosen:
      config.step.warm_steps = 2
  return config
