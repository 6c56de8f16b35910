"""Any model with some of its weights derived from others."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from recursive_weights.derivation import report, tree
from recursive_weights.interfaces import Model


def wrap(
  model: Model,
  rules: Sequence[tree.Rule],
  *,
  weight: float = 0.0,
  bound: float = 1.0,
  scale: float = 0.01,
) -> Model:
  """The same model over stored weights: `params = derive(rules, stored)`.

  Weights are derived once per forward pass, before any recursion. In training
  the penalty weight * sum over rules of max(0, L_T - bound) keeps operators
  smooth, where L_T = ||T(W + e) - T(W)|| / ||e|| with ||e|| about `scale` of
  ||W||; with weight 0 it is absent from the program.

  Args:
    model: over independent weights.
    rules: what derives from what.
    weight, bound, scale: of the Lipschitz penalty.
  """

  def init(key, inputs):
    model_key, rules_key = jax.random.split(key)
    return tree.compress(rules, model.init(model_key, inputs), rules_key)

  def penalty(stored, params, key):
    total = jnp.zeros([], jnp.float32)
    for index, rule in enumerate(rules):
      # Of a stack derived from its own first slice only that slice is a base.
      within = stored if rule.source == rule.target else params
      total += report.lipschitz_penalty(
        rule.operator,
        stored['operators'][rule.name],
        tree.leaf(within, rule.source),
        jax.random.fold_in(key, index),
        bound=bound,
        scale=scale,
      )
    return weight * total

  def apply(stored, carry, inputs, *, key=None, train=False):
    params = tree.derive(rules, stored)
    outputs, carry = model.apply(params, carry, inputs, key=key, train=train)
    if weight and train and key is not None:
      penalties = outputs.get('penalties', {})
      lipschitz = penalty(stored, params, jax.random.fold_in(key, 1))
      outputs = outputs | {'penalties': penalties | {'lipschitz': lipschitz}}
    return outputs, carry

  def carry(stored, batch_size):
    return model.carry(tree.derive(rules, stored), batch_size)

  recursion = model.recursion
  if recursion is not None:
    prepare = recursion.prepare
    recursion = recursion._replace(
      prepare=lambda stored: prepare(tree.derive(rules, stored))
    )
  return Model(
    init, carry, apply, recursion, rules=tuple(rules), decoder=model.decoder
  )
