"""Operators made of operators. Parameters are dicts, so that they have names.

`init` of a combinator looks at shapes alone: no weight is derived there.
"""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Operator, UserError


def chain(*operators: Operator) -> Operator:
  """`T = Tn ∘ ... ∘ T1`: the first operator is applied first.

  theta: `{'0': theta1, '1': theta2, ...}`; no operator is the identity.
  """

  def init(key, base):
    theta = {}
    for i, operator in enumerate(operators):
      theta[str(i)] = operator.init(jax.random.fold_in(key, i), base)
      base = jax.eval_shape(operator.apply, theta[str(i)], base)
    return theta

  def apply(theta, base):
    for i, operator in enumerate(operators):
      base = operator.apply(theta[str(i)], base)
    return base

  return Operator(init, apply, parts=operators)


def blend(a: Operator, b: Operator, alpha: float = 0.7) -> Operator:
  """`T(W) = alpha a(W) + (1 - alpha) b(W)`, alpha a learned scalar.

  theta: `{'a', 'b', 'alpha'}`. Where a and b start as the identity so does T,
  whatever alpha: it is computed as `b + alpha (a - b)`.
  """

  def init(key, base):
    key_a, key_b = jax.random.split(key)
    return {
      'a': a.init(key_a, base),
      'b': b.init(key_b, base),
      'alpha': jnp.asarray(alpha, jnp.float32),
    }

  def apply(theta, base):
    share = theta['alpha']
    return jax.tree.map(
      lambda x, y: (y + share * (x - y)).astype(y.dtype),
      a.apply(theta['a'], base),
      b.apply(theta['b'], base),
    )

  return Operator(init, apply)


def residual(operator: Operator) -> Operator:
  """`T(W) = W + gate operator(W)`, gate a learned scalar, 0 at the start.

  theta: `{'inner', 'gate'}`. The identity at the start for any operator that
  keeps the shape. At gate 0 only the gate gets a gradient; the inner
  parameters follow from the second step on.
  """

  def init(key, base):
    _check_same(operator, theta := operator.init(key, base), base)
    return {'inner': theta, 'gate': jnp.zeros(())}

  def apply(theta, base):
    gate = theta['gate']
    return jax.tree.map(
      lambda w, d: (w + gate * d).astype(w.dtype),
      base,
      operator.apply(theta['inner'], base),
    )

  return Operator(init, apply)


def iterate(
  operator: Operator, length: int, base_first: bool = False
) -> Operator:
  """The stack `(T(W), T²(W), ..., T^L(W))`, `[L, ...]`, with one theta for T.

  With `base_first` the stack is `(W, T(W), ..., T^(L-1)(W))`. By `lax.scan`, so
  compile time does not grow with L.

  Args:
    operator: T, which must keep shape and dtype.
    length: L.
    base_first: whether W itself is the first of the L.

  Source: examiner-ctm v5.3, section 5.1, `Wn = T^(n-1)(W1)`.
  """
  if length < 1:
    raise UserError(f'length must be > 0, got {length}')

  def init(key, base):
    _check_same(operator, theta := operator.init(key, base), base)
    return theta

  def apply(theta, base):
    def step(w, _):
      derived = operator.apply(theta, w)
      return derived, w if base_first else derived

    return jax.lax.scan(step, base, None, length=length)[1]

  return Operator(init, apply)


def _check_same(operator, theta, base):
  derived = jax.eval_shape(operator.apply, theta, base)
  before, after = (
    jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (base, derived)
  )
  if before != after:
    raise UserError(
      'an operator that is iterated or added to its base must keep the shape,'
      f' got {after} from {before}'
    )
