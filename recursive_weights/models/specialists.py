"""Many members of one model, one for each domain, out of few weights.

A row of a batch says whose it is (`inputs['domain']`) and is answered by that
member. What members share is one array for all rows; what they do not is
derived for every member once, outside every scan, and taken by row.

Source: examiner-ctm v5.3, sections 5.2 and 6.3 (a specialist's weights are
T_domain of the centre's); UnifyWeaver, Smoothing Basis, 2025 (coefficients on
a shared basis).
"""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights.derivation import tree as tree_lib
from recursive_weights.interfaces import Model, Operator, Spec, Tree, UserError

SCHEMES = ('independent', 'centre', 'derived')
# Parts of the parameters whose leaves have the members as their first axis.
BY_MEMBER = ('members', 'centres')
# Of the directions of a basis whose leaf begins at zero.
ZERO_SIZE = 0.02


def make(
  spec: Spec,
  *,
  member: Mapping[str, Any],
  build: Callable,
  scheme: str = 'derived',
  rules: Mapping[str, Mapping[str, Any]] | None = None,
  apart: bool = False,
  dtype: Any = 'float32',
) -> Model:
  """E members, each with a domain of `spec.domains`, on one parameter tree.

    independent   W_i of its own
    centre        W_i = W
    derived       W_i = T_i(W), or W_i = sum_k a_ik G_k, for the leaves that a
                  rule names; the others are W

  Derived members begin as the centre: T_i is the identity and, on a basis,
  G_0 = W and a_i = (1, 0, ..., 0).

  Parameters: `centre`, the tree of one member, in which a leaf on a basis is
  `[R, ...]`; `members/LEAF`, operators or coefficients `[E, ...]`; independent
  members are `members`, the tree of one with every leaf `[E, ...]`. How many
  members there are is read off these, so that one more (`grow`) needs no
  other model.

  Outputs are the member's, whose every output has the step first and rows
  next; penalties are means over rows. The carry is the members' by row.

  Args:
    spec: of a task with domains: inputs `domain` (int32 `[B]`) and those of
      the member, which gets a single other one without its name.
    member: name and fields of the model of one member.
    build: `build.make`, which knows names.
    scheme: one of `SCHEMES`.
    rules: of 'derived', by name `{pattern, layers, basis, operator}`:
      `pattern` is searched in the leaves' paths; with `layers` every slice of
      a leaf `[L, ...]` has an operator of its own; `basis` is the number of
      matrices R, or 0 for `operator` (fields of one of
      `derivation.operators`).
    apart: every member has its own copy of the centre, `centres` `[E, ...]`,
      for training that is synchronised now and then (`training.federation`).
    dtype: of the computation.

  Raises:
    UserError: the task has no domains, or a scheme or rule is wrong.
  """
  inner, spec_inputs = _member_inputs(spec)
  one = build('models', dict(member), inner, dtype=dtype)
  size = len(spec.domains)
  example = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), spec_inputs
  )
  shapes = jax.eval_shape(lambda key: one.init(key, example), jax.random.key(0))
  paths, structure = tree_lib.names(shapes), jax.tree.structure(shapes)
  _check(scheme, rules or {}, apart, paths)
  operators, ranks = _operators(rules or {}, paths, build)

  def init(key, inputs):
    own = _alone(inputs)
    keys = jax.random.split(key)
    if scheme == 'independent':
      seeds = jax.random.split(keys[0], size)
      return {'members': jax.vmap(lambda key: one.init(key, own))(seeds)}
    base = dict(
      zip(paths, jax.tree.leaves(one.init(keys[0], own)), strict=True)
    )
    members = {}
    for path, operator in operators.items():
      leaf_key = jax.random.fold_in(keys[1], zlib.crc32(path.encode()))
      if ranks[path]:
        base[path] = _bases(leaf_key, base[path], ranks[path])
      members[_name(path)] = jax.vmap(operator.init, (0, None))(
        jax.random.split(leaf_key, size), base[path]
      )
    centre = jax.tree.unflatten(structure, [base[path] for path in paths])
    params = {'centre': centre}
    if apart:
      params = {'centres': jax.tree.map(lambda x: _repeat(x, size), centre)}
    return params | ({'members': members} if members else {})

  def weights(params):
    """Leaves by path: those that all members share, and those by member."""
    if scheme == 'independent':
      return {}, _by_path(params['members'])
    base = _by_path(params['centres' if apart else 'centre'])

    def derive(member):
      theta, bases = member
      return {
        path: operator.apply(theta[_name(path)], bases.get(path, base[path]))
        for path, operator in operators.items()
      }

    # Member by member: the bits of one must not hang on how many there are.
    derived = {}
    if operators:
      bases = {path: base[path] for path in operators} if apart else {}
      derived = jax.lax.map(derive, (params['members'], bases))
    rest = {path: x for path, x in base.items() if path not in derived}
    return ({}, rest | derived) if apart else (rest, derived)

  def joined(shared, own):
    leaves = [own[path] if path in own else shared[path] for path in paths]
    return jax.tree.unflatten(structure, leaves)

  def carry(params, batch_size):
    shared, own = weights(params)
    first = {path: x[0] for path, x in own.items()}
    return one.carry(joined(shared, first), batch_size)

  def apply(params, carry, inputs, *, key=None, train=False):
    domain_B = inputs['domain']
    shared, own = weights(params)
    own_B = {path: x[domain_B] for path, x in own.items()}
    key_B = None if key is None else jax.random.split(key, len(domain_B))

    def row(own, carry, inputs, key):
      rows = jax.tree.map(lambda x: x[None], (carry, inputs))
      outputs, carry = one.apply(
        joined(shared, own), *rows, key=key, train=train
      )
      return outputs, jax.tree.map(lambda x: x[0], carry)

    outputs, carry = jax.vmap(row, (0, 0, 0, None if key is None else 0))(
      own_B, carry, _alone(inputs), key_B
    )
    penalties = jax.tree.map(jnp.mean, outputs.pop('penalties', {}))
    outputs = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), outputs)
    return outputs | ({'penalties': penalties} if penalties else {}), carry

  return Model(init=init, carry=carry, apply=apply)


def count(params: Tree) -> int:
  """Number of members; 0 where the centre answers for all."""
  leaves = jax.tree.leaves({k: params[k] for k in BY_MEMBER if k in params})
  return leaves[0].shape[0] if leaves else 0


def select(params: Tree, index: int | jax.Array) -> Tree:
  """The same with one member alone, whose rows are of domain 0."""

  def one(x_E):
    return jax.lax.dynamic_slice_in_dim(x_E, index, 1)

  return params | {
    part: jax.tree.map(one, params[part])
    for part in BY_MEMBER
    if part in params
  }


def grow(params: Tree, more: Tree) -> Tree:
  """The members of two trees; centre and bases are those of the first.

  The outputs of members that were there stay as they are, bit for bit.

  Args:
    more: such as `select(model.init(key, inputs), 0)`, a member that begins as
      the centre.
  """
  joined = {
    part: jax.tree.map(lambda *x: jnp.concatenate(x), params[part], more[part])
    for part in BY_MEMBER
    if part in params
  }
  return params | joined


def judge(
  model: Model, params: Tree, inputs: Tree, loss: Callable[[dict], jax.Array]
) -> jax.Array:
  """Every member's loss of every row, `[E, B]`, whosever the row is.

  Where there are no members it is the centre's, `[1, B]`.

  Args:
    loss: `outputs -> loss_B`.
  """
  domain_B = jnp.zeros_like(inputs['domain'])
  inputs = inputs | {'domain': domain_B}

  def one(index):
    alone = select(params, index)
    outputs, _ = model.apply(
      alone, model.carry(alone, len(domain_B)), inputs, key=None, train=False
    )
    return loss(outputs)

  return jax.lax.map(one, jnp.arange(max(count(params), 1)))


def route(loss_EB: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k members that a text should be given to, and how likely each is.

    ln p_i = -l_i - ln sum_j exp(-l_j)

  Args:
    loss_EB: nats that members lose on what is known of each text, all of it
      together: `judge` times the tokens of a row, summed over a text's rows.
    k: how many; E for all.

  Returns:
    `member_KB`, int32, who loses least first, of equals the first, and their
    `ln p`, `[K, B]`: all members count in the sum.

  Raises:
    UserError: k is not in 1 .. E.
  """
  if not 0 < k <= len(loss_EB):
    raise UserError(f'k must be in 1 .. {len(loss_EB)}, got {k}')
  log_BE = jax.nn.log_softmax(-jnp.asarray(loss_EB).T)
  log_BK, member_BK = jax.lax.top_k(log_BE, k)
  return member_BK.T, log_BK.T


def at_start(params: Tree, start: Tree) -> Tree:
  """Trained centres with members as they began: the centre as a model.

  Args:
    start: parameters from `init` of the same model.
  """
  if 'centre' not in params and 'centres' not in params:
    raise UserError('independent members have no centre')
  return params | {k: v for k, v in start.items() if k == 'members'}


def _by_path(tree):
  return dict(zip(tree_lib.names(tree), jax.tree.leaves(tree), strict=True))


def _name(path):
  return path.replace('/', '_')


def _repeat(x, count):
  return jnp.repeat(x[None], count, axis=0)


def _alone(inputs):
  """A member's inputs: without the domain, a single one without its name."""
  rest = {name: x for name, x in inputs.items() if name != 'domain'}
  return rest if len(rest) > 1 else next(iter(rest.values()))


def _member_inputs(spec):
  if not spec.domains or not isinstance(spec.inputs, dict):
    raise UserError(
      'specialists need a task whose inputs have a domain, such as domains'
    )
  inputs = _alone(spec.inputs)
  return spec._replace(inputs=inputs, domains=()), inputs


def _operators(rules, paths, build):
  """By path the operator, and the number of bases or 0."""
  operators, ranks = {}, {}
  for fields in rules.values():
    for path in paths:
      if re.search(fields['pattern'], path):
        ranks[path] = fields['basis']
        if fields['basis']:
          operator = _combination(fields['basis'])
        else:
          operator = build('derivation.operators', dict(fields['operator']))
        if fields['layers']:
          operator = _each(operator, 1 if fields['basis'] else 0)
        operators[path] = operator
  return operators, ranks


def _each(operator, axis):
  """Operators of every slice of a base along an axis."""

  def init(key, base):
    keys = jax.random.split(key, base.shape[axis])
    return jax.vmap(operator.init, (0, axis))(keys, base)

  return Operator(init, jax.vmap(operator.apply, (0, axis)))


def _combination(rank):
  """`[R, ...] -> sum_k a_k base_k`, which begins as base_0."""

  def init(key, base):
    del key, base
    return {'coefficients': jnp.zeros(rank).at[0].set(1.0)}

  def apply(theta, base):
    return jnp.tensordot(theta['coefficients'], base, 1, precision='highest')

  return Operator(init, apply)


def _bases(key, leaf, rank):
  """The leaf, and directions of its size that are drawn: G_0, G_1, ...

  Those of a leaf of zeros have a size all the same: their coefficients begin at
  zero, so a direction of zeros would have no gradient, ever.
  """
  draw = jax.random.normal(key, (rank - 1, *leaf.shape), leaf.dtype)
  size = jnp.sqrt(jnp.mean(leaf**2))
  size = jnp.where(size > 0, size, ZERO_SIZE)
  return jnp.concatenate([leaf[None], size * draw])


def _check(scheme, rules, apart, paths):
  errors = []
  if scheme not in SCHEMES:
    errors.append(f'scheme must be one of {SCHEMES}, got {scheme!r}')
  elif bool(rules) != (scheme == 'derived'):
    errors.append(
      "rules must be given with scheme 'derived' and only there, got "
      f'{scheme!r} with {len(rules)} rules'
    )
  if apart and scheme == 'independent':
    errors.append("apart must be False with scheme 'independent', got True")
  known = {'pattern', 'layers', 'basis', 'operator'}
  met: dict[str, list] = {path: [] for path in paths}
  for name, fields in rules.items():
    if set(fields) != known:
      errors.append(
        f'rules.{name} must have the fields {sorted(known)}, got '
        f'{sorted(fields)}'
      )
      continue
    if 'name' not in fields['operator']:
      errors.append(
        f"rules.{name}.operator must have a name ('' with a basis), got "
        f'{dict(fields["operator"])}'
      )
      continue
    if bool(fields['basis']) == bool(fields['operator']['name']):
      errors.append(
        f'rules.{name} must have basis > 0 or the name of an operator, got '
        f'basis {fields["basis"]} and {fields["operator"]["name"]!r}'
      )
    try:
      hits = [path for path in paths if re.search(fields['pattern'], path)]
    except re.error as error:
      errors.append(
        f'rules.{name}.pattern {fields["pattern"]!r} is no regular expression: '
        f'{error}'
      )
      continue
    if not hits:
      errors.append(
        f'rules.{name}.pattern {fields["pattern"]!r} meets no parameter; there '
        f'are: {", ".join(paths)}'
      )
    for path in hits:
      met[path].append(name)
  named: dict[str, list] = {}
  for path in (path for path, names in met.items() if names):
    named.setdefault(_name(path), []).append(path)
  errors += [
    f'{" and ".join(same)} would both be stored as members/{name}: name the '
    'parameters of the member differently, or let a rule meet one alone'
    for name, same in named.items()
    if len(same) > 1
  ]
  errors += [
    f'{path} is met by rules {names}, must be by one'
    for path, names in met.items()
    if len(names) > 1
  ]
  if errors:
    raise UserError('specialists: ' + '; '.join(errors))
