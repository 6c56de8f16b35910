"""What a derivation saves, and what it does to a weight."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from recursive_weights.derivation.tree import Rule, names
from recursive_weights.interfaces import Operator, Tree


def count(tree: Tree) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def counts(tree: Tree, depth: int | None = None) -> dict[str, int]:
  """Scalars by leaf path, or by the first `depth` parts of the path."""
  result: dict[str, int] = {}
  for name, x in zip(names(tree), jax.tree.leaves(tree), strict=True):
    part = '/'.join(name.split('/')[:depth])
    result[part] = result.get(part, 0) + math.prod(x.shape)
  return result


def savings(
  rules: Sequence[Rule], params: Tree, stored: Tree, depth: int | None = None
) -> dict:
  """Exact parameter counts of a model with independent and derived weights.

  Args:
    rules: what was given to `tree.compress`.
    params: the full parameters, or their shapes.
    stored: the compressed ones, or their shapes.
    depth: group parts by so many components of their path; None: by leaf.

  Returns:
    `{'parts': {path: {'independent', 'stored'}}, 'independent', 'stored',
    'saved', 'touched'}`. `saved` is `1 - stored / independent`, negative where
    the operators cost more than they replace. `touched` is the share of the
    independent weights that is derived: no derivation can save more.
  """
  before, after = counts(params, depth), counts(stored, depth)
  parts = {
    part: {'independent': before.get(part, 0), 'stored': after.get(part, 0)}
    for part in (*before, *(part for part in after if part not in before))
  }
  independent, kept = count(params), count(stored)
  # A stack derived from its own first slice still stores that slice.
  leaves = list(zip(names(params), jax.tree.leaves(params), strict=True))
  left = counts(stored)
  derived = sum(
    math.prod(x.shape) - left.get(name, 0)
    for name, x in leaves
    if any(f'{name}/'.startswith(f'{rule.target}/') for rule in rules)
  )
  return {
    'parts': parts,
    'independent': independent,
    'stored': kept,
    'saved': 1 - kept / independent,
    'touched': derived / independent,
  }


def table(
  rules: Sequence[Rule], params: Tree, stored: Tree, depth: int | None = None
) -> str:
  """The result of `savings` as text: one line a part, then the total."""
  report = savings(rules, params, stored, depth)
  lines = [('part', 'independent', 'stored', 'saved')]
  for part, row in (*report['parts'].items(), ('total', report)):
    before, after = row['independent'], row['stored']
    saved = f'{100 * (1 - after / before):.1f} %' if before else ''
    lines.append((part, f'{before:,}', f'{after:,}', saved))
  widths = [max(len(line[i]) for line in lines) for i in range(4)]
  text = [
    '  '.join(
      [line[0].ljust(widths[0])]
      + [line[i].rjust(widths[i]) for i in range(1, 4)]
    )
    for line in lines
  ]
  rule = '-' * len(text[0])
  touched = f'derivation touches {100 * report["touched"]:.1f} % of the weights'
  return '\n'.join([text[0], rule, *text[1:-1], rule, text[-1], touched])


def lipschitz(operator: Operator, theta, base, key, scale: float = 0.01):
  """`||T(W + e) - T(W)||_F / ||e||_F`: how much T stretches a random step.

  A lower bound of the operator's local Lipschitz constant, 1 for the identity.
  e is normal, its deviation `scale` times the root mean square of W, so that
  `||e|| ≈ scale ||W||` for each leaf.

  Source: examiner-ctm v5.3, section 7.3, which divides by `scale` and so
  overstates the constant by about the root of the number of weights.
  """
  leaves, structure = jax.tree.flatten(base)
  keys = jax.random.split(key, len(leaves))
  noise = jax.tree.unflatten(
    structure,
    [
      scale * _rms(x) * jax.random.normal(k, x.shape, x.dtype)
      for k, x in zip(keys, leaves, strict=True)
    ],
  )
  moved = operator.apply(theta, jax.tree.map(jnp.add, base, noise))
  change = jax.tree.map(jnp.subtract, moved, operator.apply(theta, base))
  return _norm(change) / _norm(noise)


def lipschitz_penalty(
  operator: Operator, theta, base, key, scale: float = 0.01, bound: float = 1.0
):
  """`max(0, L - bound)` with L from `lipschitz`; to be weighted and added."""
  return jnp.maximum(0.0, lipschitz(operator, theta, base, key, scale) - bound)


def spectra(w1, w2) -> dict:
  """Singular values, descending, of the `[F, D]` views of base and derived."""
  return {
    name: jnp.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False)
    for name, w in (('base', w1), ('derived', w2))
  }


def _rms(x):
  return jax.lax.stop_gradient(jnp.sqrt(jnp.mean(jnp.square(x))))


def _norm(tree):
  squares = sum(
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  )
  # The floor keeps the gradient finite where an operator is constant.
  return jnp.sqrt(jnp.maximum(squares, 1e-30))
