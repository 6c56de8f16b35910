"""Pictures of what a recursion does with examples of a split."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.derivation import tree
from recursive_weights.evaluators import _average, _steps
from recursive_weights.interfaces import UserError
from recursive_weights.plots import answers as answers_plot
from recursive_weights.plots import attention, curves, dynamics, spectra

_log = logging.getLogger(__name__)


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  output_dir: str = '',
  split: str = 'test',
  examples: int = 3,
  steps: int = 0,
) -> interfaces.Evaluator:
  """Writes pictures into `output_dir/plots` and returns no numbers.

  Each is drawn where there is something to draw:
    attention_N.png, attention_N.gif: where the model looks, what it answers
      and how sure it is at every step, for example N (`outputs['attention']`
      `[S, B, H, T]` and `Task.picture`).
    answer_N.png, answer_N.gif: the answer to example N after every step, with
      its mistakes (`Task.drawing` and `outputs['logits']` with a step axis).
    depth.png: the task's metrics by number of steps, on a whole batch, where
      the task has drawings.
    dynamics.png: accuracy, certainty and activity by step (`outputs` with a
      step axis in `logits`, `certainty`, `activation`, `sync_out`).
    spectra.png: singular values of derived weights and of what they are
      derived from (`Model.rules`).
    curves.png: training curves, from `output_dir/metrics.jsonl`.

  Of several seeds, the last one's pictures stay. Without matplotlib nothing is
  written but a line in the log: no training fails for want of a picture.

  Args:
    objective: not used: every step is shown.
    batch_size: number of examples, spread evenly over the split, that `depth`
      and `dynamics` show, but for those whose target is not known.
    output_dir: folder to write to; '' for nowhere.
    split: split of the examples; those of unknown target are left out.
    examples: number of examples with pictures of attention and answers.
    steps: steps to show of answers and depth, of a recursion also more than it
      was trained with; 0 for the model's own.

  Raises:
    UserError: the split is unknown or empty, or a number is not positive.
  """
  del objective
  _average.check(task, (split,), batch_size, max_batches=1)
  if examples < 1:
    raise UserError(f'examples must be > 0, got {examples}')
  if steps < 0:
    raise UserError(f'steps must be >= 0, got {steps}')

  @jax.jit
  def look(params, batch):
    carry = model.carry(params, len(batch['weight']))
    outputs, _ = model.apply(
      params, carry, batch['inputs'], key=None, train=False
    )
    return outputs

  @jax.jit
  def judge(logits, batch):
    return jax.vmap(lambda answer: task.loss(answer, batch)[1])(logits)

  def thought(params, batch):
    """Metrics and answers (classes) by step; None where there are no steps."""
    own = jax.eval_shape(look, params, batch)['logits']
    if own.ndim != 3 + len(task.spec.answer):
      return None
    number = steps if model.recursion is not None else 0
    answering = task._replace(
      loss=lambda answer, batch: (
        jnp.zeros(answer.shape[:1]),
        task.loss(answer, batch)[1] | {'answer': jnp.argmax(answer, -1)},
      )
    )
    rows = len(batch['weight'])
    by_step = _steps.judged(model, answering, rows, number, 'pictures')
    found = jax.device_get(jax.jit(by_step)(params, batch))
    return found, len(own) if number else 0

  def evaluate(params, key):
    del key  # nothing here is random
    if not output_dir:
      return {}
    try:
      import matplotlib  # noqa: F401
    except ImportError:
      _log.info("no pictures without matplotlib: pip install -e '.[plots]'")
      return {}
    folder = pathlib.Path(output_dir) / 'plots'
    batch = _spread(task, split, batch_size)
    seen = shown = None
    if len(batch['weight']):
      outputs, metrics_SB = look(params, batch), {}
      if outputs['logits'].ndim == 3 + len(task.spec.answer):
        metrics_SB = judge(outputs['logits'], batch)
      seen = jax.device_get((outputs, metrics_SB))
      shown = thought(params, batch) if task.drawing is not None else None
    weights = jax.device_get(_weights(model.rules, params))
    if jax.process_index() == 0:
      if seen is not None:
        _draw_attention(folder, task, batch, *seen, examples)
        _draw_dynamics(folder, *seen)
      if shown is not None:
        _draw_answers(folder, task, batch, *shown, examples)
      _draw_spectra(folder, model.rules, weights)
      _draw_curves(folder)
    return {}

  return evaluate


def _spread(task, split, count):
  """Examples at even distances of a split, those whose target is known."""
  size = task.spec.sizes[split]
  if size is None:
    return task.batch(split, 0, count)
  # Splits may be sorted by class, so their first rows show little of them; and
  # they may be large, so these rows alone are made.
  rows_B = np.linspace(0, size - 1, min(count, size)).round().astype(int)
  rows = [task.batch(split, int(row), 1) for row in rows_B]
  batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  known_B = batch['weight'] > 0
  return jax.tree.map(lambda x: x[known_B], batch)


def _draw_attention(folder, task, batch, outputs, metrics_SB, examples):
  if 'attention' not in outputs or task.picture is None:
    return
  for number, row in enumerate(_chosen(batch, examples)):
    example = _row(batch, row)
    target, title = example['targets'], f'Example {number}'
    shown = {}
    if 'certainty' in outputs:
      shown['certainty_S'] = outputs['certainty'][:, row]
    if metrics_SB:
      answer = outputs['logits'][:, row].argmax(axis=-1)
      right = answer == target[None]
      if target.ndim == 0:
        title += f': {target}'
        shown |= {'predictions': answer, 'right': right}
      else:
        accuracy_S = metrics_SB['accuracy'][:, row]
        shown['predictions'] = [f'{x:.0%} right' for x in accuracy_S]
        if target.shape == np.shape(example['inputs']):
          shown['right'] = right
    arguments = (task.picture(example), outputs['attention'][:, row])
    name = f'attention_{number}'
    attention.strip(folder / f'{name}.png', *arguments, title=title, **shown)
    attention.film(folder / f'{name}.gif', *arguments, title=title, **shown)


def _draw_answers(folder, task, batch, found, trained, examples):
  answers = found.pop('answer')
  metrics = {
    name: x_SB
    for name, x_SB in found.items()
    if name not in ('loss', 'certainty', 'halt')
  }
  for number, row in enumerate(_chosen(batch, examples)):
    example = _row(batch, row)
    images = [task.drawing(example, answer) for answer in answers[:, row]]
    captions = [
      f'step {step}: {share:.0%} right'
      for step, share in enumerate(metrics['accuracy'][:, row], 1)
    ]
    if 'certainty' in found:
      sure = found['certainty'][:, row]
      captions = [
        f'{caption}\ncertainty {x:.2f}'
        for caption, x in zip(captions, sure, strict=True)
      ]
    title, name = f'Example {number}', f'answer_{number}'
    answers_plot.strip(folder / f'{name}.png', images, captions, title=title)
    answers_plot.film(folder / f'{name}.gif', images, captions, title=title)
  answers_plot.depth(
    folder / 'depth.png',
    {name: x_SB.mean(axis=1) for name, x_SB in metrics.items()},
    trained=trained,
  )


def _chosen(batch, examples):
  """Rows at even distances of a batch."""
  rows = len(batch['weight'])
  return np.linspace(0, rows - 1, min(examples, rows)).round().astype(int)


def _row(batch, row):
  return jax.tree.map(lambda x: x[row], batch)


def _draw_dynamics(folder, outputs, metrics_SB):
  kinds = {'neuron': 'activation', 'synchronised pair': 'sync_out'}
  activities = {
    kind: outputs[name][:, 0] for kind, name in kinds.items() if name in outputs
  }
  if activities and metrics_SB:
    dynamics.dynamics(
      folder / 'dynamics.png',
      activities,
      certainty_SB=outputs.get('certainty'),
      accuracy_S=metrics_SB['accuracy'].mean(axis=1),
    )


def _weights(rules, stored):
  """By rule, its last operator's base, that base's name, and what it derives.

  A chain's earlier parts, such as a contraction, only prepare the base.
  """
  params = tree.derive(rules, stored)
  found = []
  for rule in rules:
    own = rule.source == rule.target
    base = tree.leaf(stored if own else params, rule.source)
    name = rule.source
    theta = stored['operators'][rule.name]
    for i, operator in enumerate(rule.operator.parts[:-1]):
      base = operator.apply(theta[str(i)], base)
      name = f'contracted {rule.source}'
    found.append((name, base, tree.leaf(params, rule.target)))
  return found


def _draw_spectra(folder, rules, weights):
  for rule, (name, base, derived) in zip(rules, weights, strict=True):
    if not all(hasattr(x, 'ndim') and x.ndim > 1 for x in (base, derived)):
      continue
    stack = derived if derived.ndim > base.ndim else derived[None]
    names = (rule.target,)
    if len(stack) > 1:
      names = tuple(f'{rule.target}[{i}]' for i in range(len(stack)))
    last = '' if len(rules) == 1 else '_' + rule.target.replace('/', '_')
    spectra.spectra(
      folder / f'spectra{last}.png',
      base,
      tuple(stack),
      base_name=name,
      derived_names=names,
      title=f'Singular values: {rule.target} = T({name})',
    )


def _draw_curves(folder):
  path = folder.parent / 'metrics.jsonl'
  if not path.exists():
    return
  names = [
    name for name in curves.names(path) if name.endswith(('/loss', '/accuracy'))
  ]
  if names:
    curves.curves(
      folder / 'curves.png', {'this run': [path]}, metrics=tuple(names)
    )
