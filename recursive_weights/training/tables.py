"""Tables of which a batch uses a few rows, such as vectors of puzzles.

A gradient of a whole table, most of it zero, may be larger than all else in
memory. So the loss sees only the rows that a batch names, each as often as it
is named, and the gradient is of these.

`tables` is of `Model.tables` what the optimizer moves by rows, as a dict.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree


def named(
  tables: Mapping[str, str], params: Tree, inputs: Any
) -> tuple[Tree, Any, dict[str, Array]]:
  """Parameters with the rows `[B, ...]` that inputs name, which are renumbered.

  Returns:
    params, inputs, and the rows' numbers by table, int32 `[B]`.
  """
  numbers = {table: inputs[name] for table, name in tables.items()}
  for name in tables.values():
    inputs = inputs | {name: jnp.arange(len(inputs[name]), dtype=jnp.int32)}
  return replaced(params, rows(params, numbers)), inputs, numbers


def replaced(params: Tree, found: Mapping[str, Array]) -> Tree:
  """Other arrays in the place of some, where there are parameters at all."""
  return params | found if found and params else params


def rows(params: Tree, numbers: Mapping[str, Array]) -> dict[str, Array]:
  """The rows of these numbers by table."""
  return {table: params[table][rows_B] for table, rows_B in numbers.items()}


def summed(grads: Tree, numbers: Mapping[str, Array]) -> Tree:
  """Gradients of equal rows added up in the first of them; zero in the rest."""
  for table, rows_B in numbers.items():
    first_B = (rows_B[:, None] == rows_B[None]).argmax(1)
    total = jax.ops.segment_sum(grads[table], first_B, len(rows_B))
    grads = replaced(grads, {table: total})
  return grads


def added(
  params: Tree, numbers: Mapping[str, Array], updates: Tree
) -> dict[str, Array]:
  """The tables after the updates of their rows."""
  return {
    table: params[table].at[rows_B].add(updates[table])
    for table, rows_B in numbers.items()
  }


def gathered(grads: Tree, numbers: Mapping[str, Array], axis: str):
  """Rows of all devices; gradients are then those of the mean over devices."""
  devices = jax.lax.axis_size(axis)
  whole = {table: grads[table] / devices for table in numbers}
  whole, numbers = jax.lax.all_gather((whole, dict(numbers)), axis, tiled=True)
  return whole, numbers
