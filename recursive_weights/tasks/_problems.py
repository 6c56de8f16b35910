"""Problems of seven domains, written out with their answers.

Source: examiner-ctm v5.3, procedural problems of its curriculum; there four of
the seven domains had a few fixed sentences.
"""

import functools
import itertools

from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _splits

_COLOURS = ('red', 'blue', 'green', 'black', 'white')
_NOUNS = ('blicket', 'dax', 'wug', 'fep', 'toma', 'zorp', 'gax', 'mib', 'lorp')
_PAIRS = {'A': 'U', 'T': 'A', 'G': 'C', 'C': 'G'}
_CODONS = {'AUG': 'Met', 'UUU': 'Phe', 'GGC': 'Gly', 'AAA': 'Lys', 'GAA': 'Glu'}


@functools.lru_cache(maxsize=8)
def documents(
  domain: str, count: int, levels: tuple[int, ...], seed: int
) -> tuple[bytes, ...]:
  """Distinct problems of a domain, the levels in turn.

  Args:
    domain: a name in `DOMAINS`.
    count: how many.
    levels: 1 to 3; larger numbers and longer chains are harder.
    seed: of the draw.

  Raises:
    UserError: there are not so many.
  """
  draw = _splits.generator(seed, list(DOMAINS).index(domain))
  kinds = DOMAINS[domain]
  found: dict[str, None] = {}
  for attempt in range(50 * count):
    level = levels[attempt % len(levels)]
    found.setdefault(kinds[int(draw.integers(len(kinds)))](draw, level))
    if len(found) == count:
      return tuple(text.encode() for text in found)
  raise UserError(
    f'{domain} has fewer than {count} different problems of the levels '
    f'{levels}: make problems smaller, or give more levels'
  )


def _number(draw, level):
  return int(draw.integers(2, (10, 30, 100)[level - 1]))


def _some(draw, items, count):
  return [items[i] for i in draw.permutation(len(items))[:count]]


def _equation(draw, level):
  a, x, b = (_number(draw, level) for _ in range(3))
  if level == 1:
    return f'Solve {a}x + {b} = {a * x + b}. x = {x}'
  c, y = _number(draw, 1), _number(draw, 1)
  return f'Solve {a}x + {c}y = {a * x + c * y} with y = {y}. x = {x}'


def _boolean(draw, level):
  values = draw.integers(2, size=level + 1).astype(bool)
  text, value = str(values[0]), bool(values[0])
  for other in values[1:]:
    if draw.integers(2):
      text, value = f'({text} and {other})', value and bool(other)
    else:
      text, value = f'({text} or {other})', value or bool(other)
  a, b = _number(draw, level), _number(draw, level)
  return f'if {text}: x = {a} else: x = {b}. x is {a if value else b}'


def _motion(draw, level):
  u, a, t = (_number(draw, level) for _ in range(3))
  return (
    f'With u = {u} m/s, a = {a} m/s2 and t = {t} s, v = u + at = {u + a * t}'
  )


def _energy(draw, level):
  m, v = 2 * _number(draw, level), _number(draw, level)
  return f'A mass of {m} kg at {v} m/s has KE = mv2/2 = {m * v * v // 2} J'


def _strand(draw, level):
  strand = ''.join(draw.choice(list(_PAIRS), 2 + 2 * level))
  copy = ''.join(_PAIRS[base] for base in strand)
  return f'The gene {strand} is transcribed to the RNA {copy}'


def _protein(draw, level):
  codons = draw.choice(list(_CODONS), 1 + level)
  names = '-'.join(_CODONS[codon] for codon in codons)
  return f'The codons {" ".join(codons)} make the peptide {names}'


def _heart(draw, level):
  rate, stroke = 40 + _number(draw, level), 50 + _number(draw, level)
  return f'Heart rate {rate}, stroke volume {stroke} ml: output {rate * stroke}'


def _vote(draw, level):
  yes, no = (10 * _number(draw, level) for _ in range(2))
  share = ('half', 'two thirds')[int(draw.integers(2))]
  passes = yes > no if share == 'half' else 3 * yes > 2 * (yes + no)
  end = 'is adopted' if passes else 'is rejected'
  return f'The bill needs {share}. Ayes {yes}, noes {no}: it {end}'


def _term(draw, level):
  year, term, times = 1800 + _number(draw, 3), 2 + level, _number(draw, 1)
  return (
    f'Elected in {year} to terms of {term} years and {times} times in all, the '
    f'senator leaves in {year + term * times}'
  )


def _span(draw, level):
  digits = [str(d) for d in draw.integers(10, size=2 + level)]
  return f'Recall {" ".join(digits)} backwards. {" ".join(digits[::-1])}'


def _stroop(draw, level):
  words = _some(draw, _COLOURS, level + 1)
  inks = [str(ink) for ink in draw.choice(_COLOURS, level + 1)]
  shown = ', '.join(f'{w} in {i}' for w, i in zip(words, inks, strict=True))
  return f'Name the ink, not the word: {shown}. {" ".join(inks)}'


def _syllogism(draw, level):
  nouns = _some(draw, _NOUNS, level + 2)
  chain = [f'All {a}s are {b}s.' for a, b in itertools.pairwise(nouns)]
  if draw.integers(2):
    last = f'Tam is a {nouns[0]}. So Tam is a {nouns[-1]}'
  else:
    last = f'Tam is no {nouns[-1]}. So Tam is no {nouns[0]}'
  return ' '.join([*chain, last])


def _profit(draw, level):
  p, q, cost = (_number(draw, level) for _ in range(3))
  kind = 'profit' if p * q >= cost else 'loss'
  return f'Price {p}, quantity {q}, cost {cost}: {kind} {abs(p * q - cost)}'


def _market(draw, level):
  slope, price = _number(draw, level), _number(draw, level)
  start = _number(draw, level)
  demand = start + 2 * slope * price
  return (
    f'Demand {demand} - {slope}p, supply {start} + {slope}p: the market clears '
    f'at p = {price}'
  )


DOMAINS = {
  'LOGOS': (_equation, _boolean),
  'PHYSIS': (_motion, _energy),
  'BIOS': (_strand, _protein, _heart),
  'NOMOS': (_vote, _term),
  'PSYCHE': (_span, _stroop),
  'SOPHIA': (_syllogism,),
  'OIKOS': (_profit, _market),
}
