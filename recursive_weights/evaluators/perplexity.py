"""How well a language model predicts a text that it reads from end to end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.evaluators import _average
from recursive_weights.interfaces import UserError


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  splits: tuple[str, ...] = ('test',),
  max_batches: int | None = None,
  hand_off: bool = True,
  bins: tuple[int, ...] = (),
) -> interfaces.Evaluator:
  """Means over tokens of a split that is read in order.

  A split's rows are consecutive chunks of one text (`tasks.text`). They are
  dealt to `batch_size` tracks, each a stretch of the text, and the model's
  carry goes from one chunk of a track to the next; a track begins fresh.

  Args:
    batch_size: number of tracks.
    splits: held-out splits to measure.
    max_batches: chunks of every track, from its beginning; None for all.
    hand_off: False starts every chunk afresh, to tell what the carry is worth.
    bins: rising numbers of tokens; the loss is also given for tokens that come
      after as much context, see below.

  Returns:
    An evaluator whose keys are `SPLIT/loss` in nats a token,
    `SPLIT/perplexity` = exp(loss), `SPLIT/bits_per_UNIT` = loss / ln 2 with the
    unit of `task.text`, every metric of the task, and `SPLIT/loss@N` for each N
    of `bins`: the mean loss of tokens before which the model has read at least
    N tokens of the same document, and fewer than the next bin.

  Raises:
    UserError: the task is no text, a split is unknown or is the training split,
      or a number is out of range.
  """
  if task.text is None:
    raise UserError('perplexity needs a task that is a text')
  _average.check(task, splits, batch_size, max_batches)
  if 'train' in splits:
    raise UserError("splits must be held out, got 'train'")
  if list(bins) != sorted(set(bins)) or (bins and bins[0] < 0):
    raise UserError(f'bins must be rising numbers >= 0, got {bins}')
  edges = np.array([*bins, np.iinfo(np.int32).max])

  @jax.jit
  def judge(params, carry, batch):
    outputs, carry = model.apply(
      params, carry, batch['inputs'], key=None, train=False
    )
    answer = objective.answer(outputs)
    loss_B, metrics_B = task.loss(answer, batch)
    values = {'loss': loss_B, **metrics_B}
    sums = _average.masked_sums(values, batch['weight'])
    by_bin = _by_bin(answer, batch) if bins else {}
    return (sums, batch['weight'].sum(), by_bin), carry

  def walk(params, split):
    text = task.batch(split, 0, task.spec.sizes[split])
    rows_SB, on_SB = _tracks(len(text['weight']), batch_size)
    rows_SB, on_SB = rows_SB[:max_batches], on_SB[:max_batches]
    context = _context(text['inputs']['resets'], rows_SB, hand_off)
    carry = fresh = _average.beside(params, model.carry(params, batch_size))
    for rows_B, on_B, context_BT in zip(rows_SB, on_SB, context, strict=True):
      batch = jax.tree.map(lambda x, rows_B=rows_B: x[rows_B], text)
      batch['weight'] = batch['weight'] * on_B
      if bins:
        batch['bin'] = np.searchsorted(edges, context_BT, 'right') - 1
        batch['bins'] = np.arange(len(bins))
      found, carry = judge(params, carry if hand_off else fresh, batch)
      yield found

  def evaluate(params, key):
    del key  # nothing here is random
    result = {}
    for split in splits:
      # The device works on one batch while the host prepares the next.
      sums, weights, by_bin = zip(
        *jax.device_get(list(walk(params, split))), strict=True
      )
      weight = sum(float(x) for x in weights)
      means = {
        name: sum(float(x[name]) for x in sums) / weight for name in sums[0]
      }
      means['perplexity'] = math.exp(min(means['loss'], 700.0))
      means[f'bits_per_{task.text.unit}'] = means['loss'] / math.log(2)
      for index, least in enumerate(bins):
        total, count = (
          sum(float(x[name][index]) for x in by_bin)
          for name in ('loss', 'tokens')
        )
        means[f'loss@{least}'] = total / count if count else math.nan
      result |= {f'{split}/{name}': value for name, value in means.items()}
    return result

  return evaluate


def _tracks(rows, tracks):
  """Which row every track reads at every step, `[S, B]`, and whether any."""
  steps = -(-rows // tracks)
  rows_SB = np.arange(tracks)[None] * steps + np.arange(steps)[:, None]
  on_SB = rows_SB < rows
  return np.where(on_SB, rows_SB, 0), on_SB.astype(np.float32)


def _context(resets_RT, rows_SB, hand_off):
  """Tokens read of a document up to each token, with it, `[S, B, T]`."""
  resets_SBT = resets_RT[rows_SB]
  first = slice(None) if not hand_off else 0
  resets_SBT[first, :, 0] = True
  steps, tracks, length = resets_SBT.shape
  resets_BT = resets_SBT.swapaxes(0, 1).reshape(tracks, -1)
  place_BT = np.broadcast_to(np.arange(steps * length)[None], resets_BT.shape)
  begin_BT = np.maximum.accumulate(np.where(resets_BT, place_BT, 0), axis=1)
  context_BT = place_BT - begin_BT + 1
  return context_BT.reshape(tracks, steps, length).swapaxes(0, 1)


def _by_bin(answer, batch):
  """Sums of losses and numbers of tokens of every bin."""
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(
    answer.astype(jnp.float32), batch['targets']
  )
  length_B = jnp.where(batch['weight'] > 0, batch['length'], 0)
  on_BT = jnp.arange(loss_BT.shape[1])[None] < length_B[:, None]
  inside = (batch['bin'][None] == batch['bins'][:, None, None]) & on_BT[None]
  return {
    'loss': jnp.where(inside, loss_BT[None], 0.0).sum((1, 2)),
    'tokens': inside.sum((1, 2)).astype(jnp.float32),
  }
