"""Recall: what a text said some hundred characters ago, asked at its end.

  passkey   the code is 48213. FILLER what is the code? 48213
  tracking  ann has the cup. bob has the key. bob gives the key to eve.
            ann gives the cup to tom. FILLER who has the key? eve

Filler is of sentences without end, a distance is the number of characters of
filler between the last fact and the question, and the document begins with as
much filler as is left. Chance is .1 a digit and 1e-5 a code of five; to name
any of the eight people gets .125 of trackings, to name whoever was given
something last about .5.

Source: the passkey test of Mohtashami and Jaggi 2023, 'Landmark Attention'
(arXiv 2305.16300), and GroundThink's probes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _losses, _splits, text

KINDS = ('passkey', 'tracking')
DIGITS = '0123456789'
PEOPLE = ('ann', 'bob', 'dan', 'eve', 'ida', 'kim', 'leo', 'tom')
THINGS = ('cup', 'hat', 'key')
CODE = 5
_WORDS = (
  ('the old', 'a small', 'the quiet', 'some green', 'a cold', 'another dark'),
  ('river', 'garden', 'window', 'road', 'forest', 'table', 'morning', 'house'),
  ('stands near', 'looks like', 'lies behind', 'is far from', 'leads to'),
  ('the sea', 'a hill', 'the town', 'an open field', 'the wall', 'some trees'),
)


class Story(NamedTuple):
  """What is said, what is asked, what is right, and the last thing named."""

  fact: str
  question: str
  answer: str
  last: str

  @property
  def size(self) -> int:
    """Characters without filler."""
    return len(self.fact + self.question + self.answer)


def make(
  *,
  seed: int = 0,
  kinds: tuple[str, ...] = KINDS,
  distances: tuple[int, ...] = (0, 4, 16, 64),
  length: int = 176,
  rest: float = 0.1,
  digits: tuple[int, ...] = (CODE,),
  symbols: str = DIGITS,
  share: float = 0.0,
  path: str = '',
  source: str = 'pydoc',
  separator: str = '',
  tokens: str = 'characters',
  eval_size: int = 256,
) -> interfaces.Task:
  """Predict `targets[t] = tokens[t + 1]`, above all where the answer stands.

  Inputs, targets and alphabet are those of `tasks.text` on the same text, so
  that one model can do both, and every row of a story is one document that
  fills it. With n answer tokens at its end, the loss of a row is

    (mean over the n of CE + rest * mean over the others of CE) / (1 + rest).

  A hash of the fact decides its split: no code of the test is ever trained on.
  Held-out rows are stories alone and do not depend on the seed.

  Args:
    seed: stream of training stories, and of the text.
    kinds: of stories, equally often.
    distances: characters of filler between fact and question, equally often.
    length: T, at least what the longest story needs.
    rest: weight of all other tokens of a story in its loss.
    digits: lengths of codes, equally often, with 1000 codes or more of each.
    symbols: the ten or so characters that codes are made of.
    share: of training rows that are tracks of ordinary text, the first ones;
      their loss is its mean over all tokens.
    path, source, separator, tokens: of the text, see `tasks.text`. Of stories
      alone, tokens='bytes' are the same whatever the text.
    eval_size: stories in each held-out split.

  Raises:
    UserError: an argument is out of range, or a character of a story does not
      occur in the text.
  """
  base = text.make(
    seed=seed,
    path=path,
    source=source,
    separator=separator,
    tokens=tokens,
    length=length,
  )
  assert base.text is not None
  encode = base.text.encode
  _check(kinds, distances, rest, digits, share, eval_size)
  check_symbols(base.text, symbols, digits)
  _needed(kinds, distances, length, max(digits))

  def stories(split, stream, size):
    kind_B = stream.integers(len(kinds), size=size)
    distance_B = stream.choice(np.array(distances), size)
    digits_B = stream.choice(np.array(digits), size)
    tokens_BT = np.full((size, length + 1), text.BOUNDARY, np.int32)
    answer_BT = np.zeros((size, length), bool)
    for row in range(size):
      distance = int(distance_B[row])
      story = draw(kinds[kind_B[row]], stream, split, symbols, digits_B[row])
      before = length - story.size - distance
      words = told(story, stream, distance, before)
      tokens_BT[row, 1:] = encode(words + story.answer)
      answer_BT[row, -len(story.answer) :] = True
    return _batch(tokens_BT, answer_BT, rest)

  @functools.cache
  def held_out(split):
    stream = _splits.generator(0, _splits.NAMES.index(split))
    return stories(split, stream, eval_size)

  def batch(split, index, size):
    _splits.check(split)
    if split != 'train':
      rows_B, weight_B = _splits.in_order(eval_size, index, size)
      found = jax.tree.map(lambda x: x[rows_B], held_out(split))
      return found | {'weight': weight_B}
    tracks = round(share * size)
    stream = _splits.generator(seed, _splits.NAMES.index(split), index)
    found = stories(split, stream, size - tracks)
    found['weight'] = np.ones(size - tracks, np.float32)
    if not tracks:
      return found
    row = base.batch(split, index, tracks)
    shape = row['targets'].shape
    row['focus'] = np.full(shape, 1 / length, np.float32)
    row['answer'] = np.ones(shape, bool)
    return jax.tree.map(lambda *x: np.concatenate(x), row, found)

  return base._replace(
    spec=base.spec._replace(
      sizes={'train': None, 'validation': eval_size, 'test': eval_size}
    ),
    batch=batch,
    loss=_loss,
  )


def told(
  story: Story, stream: np.random.Generator, distance: int, before: int = 0
) -> str:
  """A story up to its answer, with its filler."""
  start, between = filler(stream, before), filler(stream, distance)
  return start + story.fact + between + story.question


def draw(
  kind: str,
  stream: np.random.Generator,
  split: str,
  symbols: str = DIGITS,
  digits: int = CODE,
) -> Story:
  """A story of that split; those of other splits are drawn again."""
  make_one = {'passkey': _passkey, 'tracking': _tracking}[kind]
  while True:
    story = make_one(stream, symbols, digits)
    fact_1N = np.frombuffer(story.fact.encode(), np.uint8)[None]
    where = int(_splits.by_hash(_splits.hash_rows(fact_1N))[0])
    if _splits.NAMES[where] == split:
      return story


def filler(stream: np.random.Generator, length: int) -> str:
  """Exactly so many characters of sentences; the first one may be cut."""
  found = ''
  while len(found) < length:
    words = (choices[stream.integers(len(choices))] for choices in _WORDS)
    found += ' '.join(words) + '. '
  return found[len(found) - length :]


def check_symbols(
  words: interfaces.Text, symbols: str, digits: tuple[int, ...] = (CODE,)
) -> None:
  """Raises `UserError` where a text cannot write codes and stories.

  Or where codes are so few that a split might have none of them.
  """
  if len(set(symbols)) < 2 or len(set(symbols)) < len(symbols):
    raise UserError(
      f'symbols must be two different characters or more, got {symbols!r}'
    )
  codes = len(symbols) ** min(digits)
  if codes < 1000:
    raise UserError(
      f'symbols and digits must make 1000 codes or more, got {codes} of '
      f'{min(digits)} among {symbols!r}: make codes longer or symbols more'
    )
  filling = ''.join(word for words in _WORDS for word in words)
  for name, characters, remedy in (
    ('symbols', symbols, 'choose others, such as abcdefghij'),
    ('stories', ''.join(PEOPLE + THINGS) + filling + ' .?', 'choose English'),
  ):
    try:
      words.encode(characters)
    except UserError as error:
      raise UserError(
        f'{name} must be of characters of the text, got {characters!r} '
        f'({error}): {remedy}'
      ) from error


def _passkey(stream, symbols, digits):
  code = ''.join(symbols[i] for i in stream.integers(len(symbols), size=digits))
  return Story(f'the code is {code}. ', 'what is the code? ', code, code)


def _tracking(stream, symbols, digits):
  del symbols, digits
  first, second, third, fourth, *_ = (PEOPLE[i] for i in stream.permutation(8))
  one, two, _ = (THINGS[i] for i in stream.permutation(3))
  moves = [(first, one, third), (second, two, fourth)]
  order = stream.permutation(2)
  fact = f'{first} has the {one}. {second} has the {two}. '
  for giver, thing, taker in (moves[i] for i in order):
    fact += f'{giver} gives the {thing} to {taker}. '
  _, asked, holder = moves[stream.integers(2)]
  return Story(fact, f'who has the {asked}? ', holder, moves[order[1]][2])


def _batch(tokens_BT, answer_BT, rest):
  inputs_BT = tokens_BT[:, :-1]
  size, length = inputs_BT.shape
  count_B1 = answer_BT.sum(1, keepdims=True)
  focus_BT = np.where(
    answer_BT, 1 / count_B1, rest / np.maximum(length - count_B1, 1)
  )
  return {
    'inputs': {'tokens': inputs_BT, 'resets': inputs_BT == text.BOUNDARY},
    'targets': tokens_BT[:, 1:],
    'length': np.full(size, length, np.int32),
    'focus': (focus_BT / (1 + rest)).astype(np.float32),
    'answer': answer_BT,
  }


def _loss(answer, batch):
  """Cross-entropy of logits `[B, T, V]`, weighed by `focus`.

  Metrics: accuracy, the share of answer tokens that were the likeliest, and
  answer_accuracy, whether all of them were.
  """
  targets_BT, on_BT = batch['targets'], batch['answer']
  loss_BT = _losses.cross_entropy(answer, targets_BT)
  right_BT = jnp.argmax(answer, axis=-1) == targets_BT
  right_B = (right_BT & on_BT).sum(1).astype(jnp.float32)
  return (batch['focus'] * loss_BT).sum(1), {
    'accuracy': right_B / on_BT.sum(1),
    'answer_accuracy': (right_BT | ~on_BT).all(1).astype(jnp.float32),
  }


def _needed(kinds, distances, length, digits):
  """Raises `UserError` where a story does not fit into a row."""
  stream = np.random.default_rng(0)
  size = max(draw(kind, stream, 'train', digits=digits).size for kind in kinds)
  least = size + max(distances)
  if length < least:
    raise UserError(
      f'length must be at least {least} for a distance of {max(distances)}, '
      f'got {length}: make it longer or the distances shorter'
    )


def _check(kinds, distances, rest, digits, share, eval_size):
  unknown = sorted(set(kinds) - set(KINDS))
  if unknown or not kinds:
    raise UserError(f'kinds must be among {KINDS}, got {tuple(kinds)}')
  if not distances or min(distances) < 0:
    raise UserError(f'distances must be numbers >= 0, got {tuple(distances)}')
  if rest < 0:
    raise UserError(f'rest must be >= 0, got {rest}')
  if not digits or min(digits) < 1:
    raise UserError(f'digits must be numbers > 0, got {tuple(digits)}')
  if not 0 <= share < 1:
    raise UserError(f'share must lie in [0, 1), got {share}')
  if eval_size < 1:
    raise UserError(f'eval_size must be > 0, got {eval_size}')
