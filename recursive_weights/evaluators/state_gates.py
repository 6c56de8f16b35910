"""Is the state of a recurrent language model alive, and may a run go on?"""

import importlib
import json
import logging
import pathlib
import pkgutil
import statistics
from typing import Any

import jax
import numpy as np

from recursive_weights import interfaces
from recursive_weights.derivation import tree
from recursive_weights.evaluators import (
  _average,
  _ngrams,
  _state_reading,
  _state_texts,
  _state_values,
  _verdicts,
)
from recursive_weights.interfaces import UserError
from recursive_weights.io import json_files
from recursive_weights.scans import kernels

_log = logging.getLogger(__name__)


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  output_dir: str = '',
  split: str = 'validation',
  rows: int = 8,
  tokens: int = 512,
  chunk: int = 64,
  layers: bool = True,
  bounds: dict[str, Any] | None = None,
) -> interfaces.Evaluator:
  """Measures of state health with their controls, and gates G0 to G5.

  Texts of `tokens` held-out tokens without a document's end inside are read in
  chunks, the state handed on. Measured are, for every recurrent state of the
  decoder's cache (a component) and every layer of it, means over texts and
  heads (`_state_measures` has the formulas):

    rms                size at the end
    growth             power of the number of tokens with which it has grown
                       since the first chunk: 0 where it is steady, 1/2 where
                       writes add up at random and 1 where all are the same and
                       nothing is forgotten
    entropy            of the softmax of a head's N = K V entries, over ln N
    evenness           share of a head's entries that hold it: .48 of a Gaussian
                       state and 1 / N of a single entry, whatever N
    top1, top5         share of the largest singular values of a head
    structure          top1 over top1 of a random state
    saturation         share of entries beyond 5 rms
    cosine, update     of the states before and after a token
    capacity           entries of the layer's state times update, W of
                       GroundThink: it grows with the state whether that is of
                       use or not (`utilisation` counts what is used)
    half_life          tokens in which a perturbation of a head's state halves,
                       the median over heads and texts: measured, not read off
                       the parameters, so the same for any recurrence
    half_life_least,   of the heads that forget soonest and latest, each the
      half_life_most   median over texts
    collapsed          share of heads whose half-life is less than .1 tokens or
                       more than 1e5: decays of 0 or 1
    selection          how much the decays depend on the text
    contribution       rise of the loss where the layer's component puts out 0
    spread             standard deviation over tokens of what it puts out, over
                       its root mean square: 0 where that is always the same

  for every component `contribution` with all its layers at once, `memory` (rise
  of the loss of the chunk after half of the text where the state handed to it
  is that of another text), the norm of its gradient and its `gradient_share` of
  the largest; and for the whole model gradient norms, their ratio of RWKV over
  state-space parameters, `phase_shift` (mean norm for parameters that decide
  what is remembered, over that for the others), `activation` (standard
  deviation of hidden states after each layer) and its `variance_ratio` from
  layer to layer, the entropy of predictions over ln(V - 1), mean probability of
  the likeliest token and the number of distinct ones over those of the text,
  and the loss beside that of counts of one and two tokens. The entropy is that
  of tokens other than the one just read: a tied head of width D begins with a
  logit of .02 D for that one, with nothing wrong.

  Three controls stand beside, each of what it can be of: `random`, measures of
  states, half-lives and `memory` with Gaussian states of the same size (not of
  contributions and gradients, which are of weights and of texts read from their
  start: random weights are the control of these); `untrained`, all of them for
  a fresh initialisation of the same model; `healthy`, least and greatest of
  trained models that passed, by component where one of them had it. Those were
  measured once (`_verdicts.healthy`): they are other models on other text, so
  not what this one should have, but where such models lie. Sizes, gradients and
  what is nowhere judged are of one small hybrid in six seeds.

  Gates are functions of these and of `bounds` alone (`_verdicts`): G0 the text
  survives its tokens, the boundary of documents is one token that stands for
  nothing else, and the scans' GPU kernels can be imported; G1 outputs are
  finite; G2 entropy of predictions and evenness of states of the untrained
  model; G3 loss below the untrained model's and gradient norm; G3.5 states;
  G3.6 components; G4 everything could be measured and outputs have not
  collapsed; G5 the loss is below that of counts of two tokens (WARN: of one).

  Bounds (`_verdicts.BOUNDS`) were set on small hybrids with heads of 16 and
  broken ones; trained models with heads of 32, states of 64 x 32, a width of
  256 or one kind of layer alone pass too, but for `collapsed`, which only those
  of width 48 were judged by (`benchmarks/results/hybrid_gates.json`). Nothing
  here judges `memory`, `cosine`, `top5` and `rwkv_over_ssm`, which did not tell
  healthy from broken, `entropy`, which did not in larger heads, and `capacity`,
  as `update` is.

  Cost, with `layers`: a forward pass over the texts for each component of each
  layer, as many for the untrained model at the first call, one backward pass,
  and twice tokens / 2 single steps of 1 + components x layers times half the
  texts.

  Args:
    objective: not used: the loss is that of the next token.
    batch_size: rows of the training batches that are counted, no more than
      those of the training itself, so that what trains can be counted; texts
      are read together.
    output_dir: folder for `gates.json`, of the last evaluation alone (of the
      other seeds of `num_seeds` `gates_1.json` and so on), null where a number
      is not finite; '' for nowhere. What is returned stays in metrics.jsonl.
    split: held-out text, whose rows follow one another (`tasks.text`).
    rows: texts.
    tokens: of each, a multiple of 2 chunks.
    chunk: tokens a chunk.
    layers: contributions layer by layer too.
    bounds: what differs from `_verdicts.BOUNDS`: by measure (fail below, warn
      below, warn above, fail above).

  Returns:
    An evaluator with the keys `gates/GATE` (0 PASS, 1 WARN, 2 FAIL), and by
    component `gates/NAME/COMPONENT` for half_life_least, half_life_most,
    collapsed, update, selection, activation (spread; the worst layer's all),
    memory, contribution, gradient (its norm) and gradient_share, and for rms
    and entropy (means over layers).

  Raises:
    UserError: the model is no language model, the task is no text, its held-out
      rows do not follow one another or have no documents so long, its training
      text is too short for the batch size, or a number is out of range.
  """
  del objective
  decoder, text = model.decoder, task.text
  if decoder is None or text is None:
    raise UserError(
      'state_gates needs a language model and a task that is a text'
    )
  if split not in task.spec.sizes or split == 'train':
    raise UserError(f"split must be 'validation' or 'test', got {split!r}")
  if rows < 2 or chunk < 2 or tokens < 2 or tokens % (2 * chunk):
    raise UserError(
      'state_gates needs rows > 1 (one text is the control of another), chunk '
      f'> 1 and tokens a multiple of 2 chunks, got rows {rows}, chunk {chunk} '
      f'and tokens {tokens}'
    )
  limits, trained = _verdicts.bounds(bounds or {}), _verdicts.healthy()
  batch = _state_texts.windows(task, split, rows, tokens)
  before = _before(task, split, batch)
  task.batch('train', 0, batch_size)  # a text too short is an error now
  halves = _state_values.halves_of(batch, chunk)
  reader = _state_reading.make(decoder)
  derive = jax.jit(lambda params: tree.derive(model.rules, params))
  counted: list[float] = []  # once, and not before it is needed
  before_training: dict[bytes, dict] = {}

  def measured(params, key):
    # In one place, whatever the strategy, so that one program serves all.
    params = _average.beside(params, derive(params))
    return _state_values.measure(
      decoder,
      reader,
      params,
      key,
      halves,
      classes=task.spec.classes,
      layers=layers,
    )

  def evaluate(params, key):
    name = np.asarray(jax.random.key_data(key)).tobytes()
    if name not in before_training:
      inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype),
        task.spec.inputs,
      )
      first = jax.jit(lambda key: model.init(key, inputs))(key)
      before_training[name] = measured(first, key)[0]
    if not counted:
      counted.extend(
        _ngrams.losses(task, batch[:, :-1], batch[:, 1:], batch_size)
      )
    untrained = before_training[name]
    values, random = measured(params, key)
    values |= _whole(values, untrained, before, counted)
    verdicts = _verdicts.judge(values, limits)
    controls = {'random': random, 'untrained': untrained}
    shown = _verdicts.table(verdicts, values, controls, trained)
    _log.info('gates\n%s', shown)
    if output_dir and jax.process_index() == 0:
      seed = list(before_training).index(name)
      _write(
        pathlib.Path(output_dir)
        / (f'gates_{seed}.json' if seed else 'gates.json'),
        {
          'gates': verdicts,
          'measures': values,
          'controls': controls,
          'healthy': trained,
          'bounds': {name: list(four) for name, four in limits.items()},
        },
      )
    return _metrics(verdicts, values)

  return evaluate


def _before(task, split, batch):
  """Measures for which no model is needed, 1 where all is well."""
  whole = all(_state_texts.survives(task.text, row) for row in batch)
  return {
    'round_trip': float(whole),
    'boundary': float(_state_texts.one_boundary(task, task.text, split)),
    'kernels': float(_kernels_import()),
  }


def _kernels_import():
  try:
    for module in pkgutil.iter_modules(kernels.__path__):
      importlib.import_module(f'{kernels.__name__}.{module.name}')
  except (ImportError, AttributeError) as error:  # a jax without what they use
    _log.warning("the scans' kernels cannot be imported: %s", error)
    return False
  return True


def _whole(values, untrained, before, counted):
  """Measures that compare: with the start, with counts of tokens."""
  loss = values['loss']['']
  found = before | {
    'finite': float(np.isfinite(loss)),
    'initial_entropy': untrained['output_entropy'][''],
    'fall': (untrained['loss'][''] - loss) / untrained['loss'][''],
    'over_unigram': loss - counted[0],
    'over_bigram': loss - counted[1],
    'measured': float(
      all(np.isfinite(x) for places in values.values() for x in places.values())
    ),
  }
  result: dict[str, dict[str, float]] = {k: {'': x} for k, x in found.items()}
  result['initial_evenness'] = untrained.get('evenness', {})
  return result


def _metrics(verdicts, values):
  """What goes into a line of metrics: gates, and one number a component."""
  found = {
    f'gates/{gate}': float(_verdicts.VERDICTS.index(x['verdict']))
    for gate, x in verdicts.items()
  }
  for name, measure, pick in (
    ('half_life_least', 'half_life_least', min),
    ('half_life_most', 'half_life_most', max),
    ('collapsed', 'collapsed', max),
    ('update', 'update', min),
    ('selection', 'selection', min),
    ('memory', 'memory', min),
    ('contribution', 'contribution', min),
    ('gradient', 'gradient', min),
    ('gradient_share', 'gradient_share', min),
    ('activation', 'spread', min),
    ('rms', 'rms', statistics.fmean),
    ('entropy', 'entropy', statistics.fmean),
  ):
    by_component: dict[str, list[float]] = {}
    for place, value in values.get(measure, {}).items():
      component = place.split('@')[0].replace('/', '_')
      by_component.setdefault(component, []).append(value)
    for component, x in by_component.items():
      found[f'gates/{name}/{component}'] = pick(x)
  return found


def _write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  # JSON has no NaN and no infinity.
  plain = json.loads(json.dumps(data), parse_constant=lambda name: None)
  json_files.write(path, plain, indent=2)
