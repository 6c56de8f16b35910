"""Weights of any parameter tree derived from other weights of the same tree.

`compress` drops the derived leaves once; `derive` puts them back in every
forward pass, outside all scans. What is trained and saved is the stored tree:

  rules = (Rule('T', 'params/w1', 'params/w2', spectral.make()),)
  stored = compress(rules, params, key)
  loss = lambda stored: model_loss(derive(rules, stored))

A path is the name that `jax.tree_util.keystr(path, simple=True, separator='/')`
gives a leaf of nested dicts, such as 'params/Dense_0/kernel'. It may also name
an inner dict, for operators on trees.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax

from recursive_weights.interfaces import Array, Operator, Tree, UserError


class Rule(NamedTuple):
  """`target = operator(source)`.

  name: the operator's parameters are `stored['operators'][name]`. Rules of the
    same name share them.
  source: path of the base: a stored leaf, or the target of an earlier rule.
  target: path of the derived leaf. If it is the source itself, the leaf is a
    stack `[L, ...]` of which only the first slice is stored (see
    `compose.iterate` with `base_first`).
  operator: the map.
  """

  name: str
  source: str
  target: str
  operator: Operator


def compress(rules: Sequence[Rule], params: Tree, key: Array) -> Tree:
  """`stored`: `params` without the targets, and the operators' parameters.

  Args:
    rules: applied in this order.
    params: nested dicts of arrays.
    key: for the operators' start; each name has its own key, so one rule more
      does not change the others.

  Returns:
    `params` less the targets plus `{'operators': {rule.name: theta}}`. Without
    rules, `params` itself.

  Raises:
    UserError: an unknown path; a source that is derived by the same or a later
      rule (a cycle); two rules for one target; a derived shape or dtype that
      is not the target's.
  """
  if not rules:
    return params
  if 'operators' in params:
    raise UserError(
      "params has a key 'operators', where derived weights keep their"
      ' operators: are they compressed already?'
    )
  _check_order(rules)
  stored = params
  operators: dict[str, Tree] = {}
  for rule in rules:
    target = leaf(params, rule.target)
    leaf(params, rule.source)
    if rule.source == rule.target:
      first = jax.tree.map(lambda x: x[0], target)
      stored = _put(stored, rule.target, first)
    else:
      stored = _drop(stored, rule.target.split('/'))
  for i, rule in enumerate(rules):
    target = leaf(params, rule.target)
    base = _base(rules[:i], stored, operators, rule)
    if rule.name not in operators:
      own = jax.random.fold_in(key, zlib.crc32(rule.name.encode()))
      operators[rule.name] = rule.operator.init(own, base)
    _check_fit(rule, operators[rule.name], base, target)
  return {**stored, 'operators': operators}


def derive(rules: Sequence[Rule], stored: Tree) -> Tree:
  """`params`: the stored tree with every target derived, without operators.

  The inverse of `compress` in structure, shapes and dtypes. A tree without
  operators that holds all targets is returned as it is, so deriving twice is
  deriving once.

  Raises:
    UserError: as for `compress`; an operator whose parameters are missing.
  """
  if not rules:
    return stored
  _check_order(rules)
  if 'operators' not in stored:
    for rule in rules:
      leaf(stored, rule.target)
    return stored
  operators = stored['operators']
  params = {name: x for name, x in stored.items() if name != 'operators'}
  for rule in rules:
    if rule.name not in operators:
      raise UserError(
        f'rule {rule.name!r} has no parameters under operators/; there are: '
        + ', '.join(sorted(operators))
      )
    base = leaf(params, rule.source)
    if rule.source != rule.target and _find(params, rule.target) is not None:
      raise UserError(
        f'rule {rule.name!r} derives {rule.target!r}, which is stored too:'
        ' compress the tree with the same rules first'
      )
    derived = rule.operator.apply(operators[rule.name], base)
    params = _put(params, rule.target, derived)
  return params


def leaf(tree: Tree, path: str) -> Tree:
  """The leaf, or the inner dict, of that name; an error lists what exists."""
  found = _find(tree, path)
  if found is None:
    raise UserError(
      f'there is no {path!r} in the tree; there are: {", ".join(names(tree))}'
    )
  return found


def names(tree: Tree) -> list[str]:
  """The paths of all leaves."""
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _check_order(rules):
  targets = [rule.target for rule in rules]
  for i, rule in enumerate(rules):
    if any(_overlap(rule.target, target) for target in targets[:i]):
      raise UserError(f'two rules derive {rule.target!r}: keep one of them')
    later = targets[i + (rule.source == rule.target) :]
    if any(_overlap(rule.source, target) for target in later):
      raise UserError(
        f'rule {rule.name!r} needs {rule.source!r} before it is derived: rules'
        ' are applied in order and must not form a cycle; they derive, in'
        f' order: {", ".join(targets)}'
      )


def _overlap(a, b):
  """Whether one path names the other or a tree that holds it."""
  return f'{a}/'.startswith(f'{b}/') or f'{b}/'.startswith(f'{a}/')


def _base(earlier, stored, operators, rule):
  """The rule's source, or only its shape where earlier rules derive it."""
  found = _find(stored, rule.source)
  if found is not None and rule.source not in {r.target for r in earlier}:
    return found
  known = jax.eval_shape(
    lambda s, o: derive(earlier, {**s, 'operators': o}), stored, operators
  )
  return leaf(known, rule.source)


def _check_fit(rule, theta, base, target):
  try:
    derived = jax.eval_shape(rule.operator.apply, theta, base)
  except (TypeError, ValueError) as error:
    raise UserError(
      f'rule {rule.name!r}: the operator does not fit the source'
      f' {rule.source!r}: {_describe(base)}. Rules of the same name share their'
      f' parameters. {error}'
    ) from error
  if _describe(derived) != _describe(target):
    raise UserError(
      f'rule {rule.name!r} derives {_describe(derived)} from {rule.source!r},'
      f' but {rule.target!r} is {_describe(target)}: give the operator another'
      ' shape, or chain a contraction before it'
    )


def _describe(tree):
  described = jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)
  return described if isinstance(described, str) else str(described)


def _find(tree, path):
  for part in path.split('/'):
    if not isinstance(tree, dict) or part not in tree:
      return None
    tree = tree[part]
  return tree


def _put(tree, path, value):
  part, _, rest = path.partition('/')
  return {
    **tree,
    part: _put(tree.get(part, {}), rest, value) if rest else value,
  }


def _drop(tree, parts):
  part, *rest = parts
  kept = {name: x for name, x in tree.items() if name != part}
  if rest:
    inner = _drop(tree[part], rest)
    # An emptied dict is dropped too; `derive` makes it again.
    if inner:
      kept[part] = inner
  return kept
