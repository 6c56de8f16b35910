"""Can a hostile text spoil a language model's state for what comes after it?"""

import numpy as np

from recursive_weights import interfaces
from recursive_weights.evaluators import _reading


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  split: str = 'test',
  prefix: int = 128,
  length: int = 128,
  passages: int = 16,
  candidates: int = 16,
  control: bool = True,
) -> interfaces.Evaluator:
  """Loss on held-out passages after hostile prefixes, natural ones, and none.

  Hostile prefixes are drawn at random: one token again and again, two in turn,
  or any tokens. The attacker chooses the one of `candidates` that hurts most on
  one half of the passages and is judged on the other half.

  Args:
    batch_size: texts that are read together.
    split: held-out split of whose text passages are made.
    prefix: tokens before a passage.
    length: tokens of a passage.
    passages: an even number of them.
    candidates: hostile prefixes to choose from.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `poison/fresh`, `/neutral` (another passage),
    `/hostile` (mean over all candidates), `/worst` (the chosen one), in nats a
    token, all on the second half of the passages; `/worst_early` and
    `/worst_late`, rises over neutral in the first and last quarter of a passage
    (a state that recovers has a smaller late one); `/worst_reset`, where the
    passage begins a document after the worst prefix, and `/reset_difference`,
    its largest difference from fresh on any token (0 up to rounding);
    `poison/random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, or the split is too short.
  """
  half = passages // 2
  _, text = _reading.check(
    *('poison', model, task),
    {
      'batch_size': batch_size,
      'prefix': prefix,
      'length': length,
      'candidates': candidates,
      'half of the passages': half,
    },
  )
  longest = max(prefix, length)
  cut = _reading.passages('poison', task, split, 4 * half, longest)
  targets, neutral = cut[: 2 * half, :length], cut[2 * half :, :prefix]
  hostile = _hostile(candidates, prefix, task.spec.classes, text.boundary)
  begin = np.array([text.boundary], np.int32)
  read = _reading.make(model, task, objective, rows=batch_size)

  def losses(params, pairs):
    """Loss of every token of the last part, `[B, length]`."""
    judged = read(params, [np.concatenate([begin, *parts]) for parts in pairs])
    return np.array([loss_T[-length:] for loss_T, _ in judged], np.float64)

  def measure(params):
    attack, judge = targets[:half], targets[half:]
    tried = losses(params, [(h, x) for h in hostile for x in attack])
    worst = hostile[tried.reshape(candidates, -1).mean(1).argmax()]
    fresh_BT = losses(params, [(x,) for x in judge])
    pairs = zip(neutral[half:], judge, strict=True)
    neutral_BT = losses(params, list(pairs))
    hostile_BT = losses(params, [(h, x) for h in hostile for x in judge])
    worst_BT = losses(params, [(worst, x) for x in judge])
    reset_BT = losses(params, [(worst, begin, x) for x in judge])
    rise_T = (worst_BT - neutral_BT).mean(0)
    quarter = max(length // 4, 1)
    return {
      'fresh': float(fresh_BT.mean()),
      'neutral': float(neutral_BT.mean()),
      'hostile': float(hostile_BT.mean()),
      'worst': float(worst_BT.mean()),
      'worst_early': float(rise_T[:quarter].mean()),
      'worst_late': float(rise_T[-quarter:].mean()),
      'worst_reset': float(reset_BT.mean()),
      'reset_difference': float(np.abs(reset_BT - fresh_BT).max()),
    }

  return _reading.beside_random('poison', model, task, measure, control)


def _hostile(candidates, prefix, classes, boundary):
  """Rows of one token, of two in turn, of any, without the boundary."""
  stream = np.random.default_rng(0)
  tokens_V = np.delete(np.arange(classes, dtype=np.int32), boundary)
  widths = (1, 2, prefix)
  return np.stack(
    [
      np.resize(stream.choice(tokens_V, widths[i % 3]), prefix)
      for i in range(candidates)
    ]
  )
