"""How far back a language model can remember: codes and who holds what."""

import math

import numpy as np

from recursive_weights import interfaces
from recursive_weights.evaluators import _reading
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import recall


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  kinds: tuple[str, ...] = recall.KINDS,
  distances: tuple[int, ...] = (16, 64, 256, 1024),
  depths: tuple[float, ...] = (0.0, 0.5),
  examples: int = 64,
  symbols: str = recall.DIGITS,
  control: bool = True,
) -> interfaces.Evaluator:
  """Stories of `tasks.recall` by distance and depth, told to any model.

  Depth d is the share of a document's filler that stands before the fact, so a
  distance D has D d / (1 - d) characters before it. An answer is right where
  each of its tokens is the likeliest after the true ones before it, which is
  what greedy writing would say.

  Importance persists for tau characters: the distance at which the accuracy
  above chance has fallen to half of that at the shortest distance, between two
  distances by the logarithm; the longest distance where it never has, 0 where
  there was none to lose (less than .05 above chance). Of passkeys it is that of
  tokens, with a chance of one in the number of symbols; of trackings that of
  whole answers, with a chance of one in eight: the first letter of a person
  tells the others, so a model without memory has most tokens right.

  Args:
    batch_size: texts that are read together.
    kinds: of stories.
    distances: rising, in characters.
    depths: in [0, 1).
    examples: stories of each kind, distance and depth, all of the test split.
    symbols: what codes are made of; letters for a text without digits.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `recall/KIND@D` (answers wholly right) and
    `/KIND_tokens@D` (tokens of answers), each a mean over depths,
    `/KIND@D_depthX` where there are several, `/KIND_tau`,
    `/tracking_last@D`, the share of questions that naming the last receiver
    answers, and `recall/random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, or the text lacks a character.
  """
  _, text = _reading.check(
    *('recall', model, task),
    {'batch_size': batch_size, 'examples': examples},
  )
  _check(kinds, distances, depths)
  recall.check_symbols(text, symbols)
  read = _reading.make(model, task, objective, rows=batch_size)
  texts, where, last = _stories(
    text, kinds, distances, depths, examples, symbols
  )

  def measure(params):
    judged = read(params, [words for words, _ in texts])
    right = [
      right_T[-answer:]
      for (_, answer), (_, right_T) in zip(texts, judged, strict=True)
    ]
    found: dict[str, float] = {}
    for kind in kinds:
      curve = []
      for distance in distances:
        cells = [
          np.array([right[i] for i in where[kind, distance, depth]])
          for depth in depths
        ]
        whole = found[f'{kind}@{distance}'] = _mean([x.all(1) for x in cells])
        tokens = found[f'{kind}_tokens@{distance}'] = _mean(cells)
        curve.append(tokens if kind == 'passkey' else whole)
        if len(depths) > 1:
          for depth, cell in zip(depths, cells, strict=True):
            name = f'{kind}@{distance}_depth{depth:g}'
            found[name] = float(cell.all(1).mean())
        if kind == 'tracking':
          found[f'tracking_last@{distance}'] = last[distance]
      chance = 1 / len(symbols if kind == 'passkey' else recall.PEOPLE)
      found[f'{kind}_tau'] = persistence(distances, curve, chance)
    return found

  return _reading.beside_random('recall', model, task, measure, control)


def persistence(
  distances: tuple[int, ...], accuracy: list[float], chance: float
) -> float:
  """tau of `make`."""
  above = np.array(accuracy) - chance
  if above[0] < 0.05:
    return 0.0
  low = np.flatnonzero(above < above[0] / 2)
  if not len(low):
    return float(distances[-1])
  i = int(low[0])
  near, far = (math.log1p(distances[j]) for j in (i - 1, i))
  share = (above[i - 1] - above[0] / 2) / (above[i - 1] - above[i])
  return math.expm1(near + share * (far - near))


def _mean(cells):
  return float(np.mean([x.mean() for x in cells]))


def _stories(text, kinds, distances, depths, examples, symbols):
  """`[(tokens, answer tokens)]`, their places by cell, the rule of the last."""
  texts, where, last = [], {}, {}
  begin = np.array([text.boundary], np.int32)
  for kind in kinds:
    for distance in distances:
      stream = np.random.default_rng([recall.KINDS.index(kind), distance])
      named = []
      for depth in depths:
        first = len(texts)
        before = round(distance * depth / (1 - depth))
        for _ in range(examples):
          story = recall.draw(kind, stream, 'test', symbols)
          words = recall.told(story, stream, distance, before)
          tokens = text.encode(words + story.answer)
          answer = len(text.encode(story.answer))
          texts.append((np.concatenate([begin, tokens]), answer))
          named.append(story.last == story.answer)
        where[kind, distance, depth] = range(first, len(texts))
      if kind == 'tracking':
        last[distance] = float(np.mean(named))
  return texts, where, last


def _check(kinds, distances, depths):
  unknown = sorted(set(kinds) - set(recall.KINDS))
  if unknown or not kinds:
    raise UserError(
      f'recall.kinds must be among {recall.KINDS}, got {tuple(kinds)}'
    )
  if not distances or list(distances) != sorted({*distances}):
    raise UserError(
      f'recall.distances must be rising numbers, got {tuple(distances)}'
    )
  if distances[0] < 0:
    raise UserError(f'recall.distances must be >= 0, got {distances[0]}')
  if not depths or not all(0 <= depth < 1 for depth in depths):
    raise UserError(f'recall.depths must lie in [0, 1), got {tuple(depths)}')
