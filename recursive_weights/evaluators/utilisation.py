"""How many directions of its state a language model uses."""

import jax
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
  passages: int = 16,
  length: int = 1024,
  control: bool = True,
) -> interfaces.Evaluator:
  """The effective rank of recurrent states over a held-out text.

  States x_i, all entries of one leaf of the cache in a row, are taken after
  every 64 tokens of every passage; with the eigenvalues e of their covariance

    rank = (sum e)^2 / sum e^2,

  at most the number of samples less one, and of entries: those that never move
  on their own carry nothing. GroundThink's capacity W, the size of the state
  times how much a token changes it, is `capacity` of `state_gates`.

  Args:
    objective: not used: states are looked at.
    batch_size: not used: all passages are read together.
    split: held-out split of whose text passages are made.
    passages, length: how many of how many tokens.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `utilisation/LEAF` (rank over the most there
    could be) and `utilisation/rank/LEAF`, for every recurrent leaf such as
    `hybrid/time/state`, and `utilisation/random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, or the split is too short.
  """
  del objective, batch_size
  _, text = _reading.check(
    *('utilisation', model, task), {'passages': passages, 'length': length}
  )
  length = -(-length // _reading.CHUNK) * _reading.CHUNK
  cut = _reading.passages('utilisation', task, split, passages, length - 1)
  begin = np.full((passages, 1), text.boundary, np.int32)
  tokens_BT = np.concatenate([begin, cut], axis=1)

  @jax.jit
  def step(params, carry, tokens_BC):
    inputs = {'tokens': tokens_BC, 'resets': tokens_BC == text.boundary}
    return model.apply(params, carry, inputs, key=None, train=False)[1]

  def measure(params):
    carry, seen = model.carry(params, passages), []
    for first in range(0, length, _reading.CHUNK):
      part_BC = tokens_BT[:, first : first + _reading.CHUNK]
      carry = step(params, carry, part_BC)
      seen.append(jax.device_get(carry['recurrent']))
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda *x: np.concatenate(x), *seen)
    ):
      name = jax.tree_util.keystr(path, simple=True, separator='/') or 'state'
      samples = leaf.reshape(len(leaf), -1)
      rank = effective_rank(samples)
      found[f'rank/{name}'] = rank
      found[name] = rank / max(min(len(samples) - 1, samples.shape[1]), 1)
    return found

  return _reading.beside_random('utilisation', model, task, measure, control)


def effective_rank(samples_BN: np.ndarray) -> float:
  """(sum e)^2 / sum e^2 over eigenvalues e of the covariance; 0 without any.

  The Gram matrix of the samples has the same eigenvalues.
  """
  x_BN = samples_BN.astype(np.float64)
  x_BN = x_BN - x_BN.mean(0)
  gram_BB = x_BN @ x_BN.T
  square = (gram_BB**2).sum()
  return float(np.trace(gram_BB) ** 2 / square) if square > 0 else 0.0
