"""How fast a language model forgets what another text was about."""

import itertools

import numpy as np

from recursive_weights import interfaces
from recursive_weights.evaluators import _reading
from recursive_weights.interfaces import UserError


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  split: str = 'test',
  before: int = 256,
  bins: tuple[int, ...] = (1, 8, 32, 128, 256),
  passages: int = 32,
  control: bool = True,
) -> interfaces.Evaluator:
  """The effect of a text on the predictions of an unrelated one after it.

  The effect on a token is |loss with the text before it - loss in a fresh
  state|, in nats, where nothing marks where the second text begins; a passage
  is paired with one from another half of the split. Forgetting efficiency is

    eta = 1 - effect / effect of the first bin,

  and 1 at a reset, if a reset forgets. It says how much of what is of no use
  has gone. That nothing important went with it, which GroundThink's efficiency
  also asks, it does not: what forgets all soon has the best. Read it beside
  `recall`, whose tau is the distance at which a fact is lost.

  Args:
    batch_size: texts that are read together.
    split: held-out split of whose text passages are made.
    before: tokens of the first text.
    bins: rising numbers of tokens: a bin goes from one to the next.
    passages: pairs of texts.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `forgetting/effect@N` and `forgetting/eta@N`, for
    each N of `bins` but the last, the effect on tokens N to the next bin of the
    second text (from 1), `forgetting/effect_reset`, the largest on any token
    where a document begins between the texts (0 up to rounding),
    `forgetting/eta_reset` (from its mean), and `forgetting/random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, or the split is too short.
  """
  _, text = _reading.check(
    *('forgetting', model, task),
    {'batch_size': batch_size, 'before': before, 'passages': passages},
  )
  rising = list(bins) == sorted(set(bins))
  if len(bins) < 2 or not rising or bins[0] < 1:
    raise UserError(
      'forgetting.bins must be rising numbers > 0, two or more, got '
      f'{tuple(bins)}'
    )
  length = max(before, bins[-1])
  cut = _reading.passages('forgetting', task, split, 2 * passages, length)
  first, second = cut[:passages, :before], cut[passages:, : bins[-1]]
  begin = np.full((passages, 1), text.boundary, np.int32)
  fresh = np.concatenate([begin, second], axis=1)
  joined = np.concatenate([begin, first, second], axis=1)
  parted = np.concatenate([begin, first, begin, second], axis=1)
  read = _reading.make(model, task, objective, rows=batch_size)

  def measure(params):
    judged = read(params, [*fresh, *joined, *parted])
    loss_PBT = np.array([x[-bins[-1] :] for x, _ in judged], np.float64)
    alone, after, reset = loss_PBT.reshape(3, passages, bins[-1])
    effect_T = np.abs(after - alone).mean(0)
    # Token 1 is the first that the second text says: its loss judges it.
    found, initial = {}, None
    for least, most in itertools.pairwise(bins):
      effect = float(effect_T[least - 1 : most - 1].mean())
      initial = effect if initial is None else initial
      found[f'effect@{least}'] = effect
      found[f'eta@{least}'] = _efficiency(effect, initial)
    left = np.abs(reset - alone)
    found['effect_reset'] = float(left.max())
    found['eta_reset'] = _efficiency(float(left.mean()), initial)
    return found

  return _reading.beside_random('forgetting', model, task, measure, control)


def _efficiency(effect, initial):
  """NaN where there was no effect to lose."""
  return 1 - effect / initial if initial else float('nan')
