"""ARC scored as its prize does: versions of a test vote, two attempts count.

Source of the voting: G. Wang et al., Hierarchical Reasoning Model, 2025, and A.
Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny Networks, 2025
(arXiv 2510.04871).
"""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.evaluators import _average
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _arc

_ATTEMPTS = 2


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  output_dir: str = '',
  split: str = 'test',
  passes: tuple[int, ...] = (1, 2),
) -> interfaces.Evaluator:
  """Shares of tests solved by the answers with most votes, and the submission.

  Every version of a test (`tasks.arc`, voters) gives an answer, which is
  cropped to a grid and turned and recoloured back. Grids are ranked by the
  number of versions that give them, then by their mean certainty
  (`outputs['certainty']`, the last step's, where there is one).

  Writes `output_dir/submission.json`: by task a list of its tests, each
  `{'attempt_1': grid, 'attempt_2': grid}`, rows of colours. Where there is no
  second answer the first stands for it; no answer at all is `[[0]]`. Tests
  whose output is not known are answered too, and not scored.

  Args:
    objective: its answer is judged.
    batch_size: rows of a batch.
    output_dir: folder to write to; '' for nowhere.
    split: of the arc task, 'test' or 'validation'.
    passes: numbers of attempts to score.

  Returns:
    An evaluator with the keys
      `SPLIT/pass@K`: mean over tasks of the share of a task's tests whose
        output is among the first K answers, where outputs are known.
      `SPLIT/not_scored`: number of tests whose output is not known, if any.

  Raises:
    UserError: the task is not arc, or an argument is out of range.
  """
  _average.check(task, (split,), batch_size, None)
  if not passes or min(passes) < 1:
    raise UserError(f'passes must be numbers > 0, got {passes}')

  @jax.jit
  def look(params, batch):
    carry = model.carry(params, batch_size)
    outputs, _ = model.apply(
      params, carry, batch['inputs'], key=None, train=False
    )
    answer_BX = jnp.argmax(objective.answer(outputs), axis=-1)
    sure = outputs.get('certainty', jnp.zeros([batch_size]))
    return answer_BX.astype(jnp.uint8), sure if sure.ndim == 1 else sure[-1]

  def evaluate(params, key):
    del key  # nothing here is random
    size = task.spec.sizes[split]
    votes, truth = {}, {}
    for index in range(-(-size // batch_size)):
      batch = task.batch(split, index, batch_size)
      if 'way' not in batch:
        raise UserError('arc_submission needs the task arc')
      answer_BX, sure_B = jax.device_get(look(params, batch))
      for row in range(min(batch_size, size - index * batch_size)):
        test = f'{batch["task"][row]:08x}', int(batch['pair'][row])
        how = batch['way'][row], batch['colours'][row]
        if test not in truth:
          truth[test] = _arc.decode(batch['targets'][row], *how).tolist()
          votes[test] = {}
        grid = _arc.decode(answer_BX[row], *how)
        if grid.size:
          rows = grid.tolist()
          _, sure = votes[test].setdefault(str(rows), (rows, []))
          sure.append(float(sure_B[row]))
    answers = {test: _ranked(votes[test]) for test in truth}
    if output_dir and jax.process_index() == 0:
      _write(pathlib.Path(output_dir) / 'submission.json', answers)
    known = {test: target for test, target in truth.items() if target}
    found = {}
    if known:
      found = {f'{split}/pass@{n}': _score(answers, known, n) for n in passes}
    if len(known) < len(truth):
      found[f'{split}/not_scored'] = float(len(truth) - len(known))
    return found

  return evaluate


def _ranked(votes):
  """Grids, best first; the first seen of equals."""
  order = sorted(
    votes.values(), key=lambda vote: (-len(vote[1]), -np.mean(vote[1]))
  )
  return [grid for grid, _ in order]


def _score(answers, truth, attempts):
  by_task = collections.defaultdict(list)
  for test, target in truth.items():
    by_task[test[0]].append(target in answers[test][:attempts])
  return float(np.mean([np.mean(solved) for solved in by_task.values()]))


def _write(path, answers):
  submission = {}
  for (name, _), grids in sorted(answers.items()):
    grids = (grids or [[[0]]])[:_ATTEMPTS]
    grids += grids[:1] * (_ATTEMPTS - len(grids))
    attempts = {f'attempt_{i + 1}': grid for i, grid in enumerate(grids)}
    submission.setdefault(name, []).append(attempts)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(submission) + '\n')
