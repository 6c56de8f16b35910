"""The basis and what it is compared with, each fitted in the same call.

`METHODS[name].fit(clusters, a_EV, **settings) -> score`, and
`score(q_BD) -> {rule: scores_BE}`: every rule of `routing` that the method has.
`METHODS[name].grid` are the settings to choose among, on validation questions.
`parameters` counts what is kept of a fit.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recursive_weights.basis import baselines, dual, lagrangian, routing, solve
from recursive_weights.basis import objective as objective_lib
from recursive_weights.basis.clusters import Clusters
from recursive_weights.basis.objective import einsum
from recursive_weights.interfaces import Array, UserError

Score = Callable[[Array], dict[str, Array]]
BASES = ('zero', 'identity')


class Sizes(NamedTuple):
  """E members, N training questions of all, of widths D, answers of V."""

  members: int
  questions: int
  width: int
  values: int


def _matrices(sizes: Sizes, **_) -> int:
  return sizes.members * sizes.width * sizes.values


class Method(NamedTuple):
  """See the module; `count(sizes, **settings)` is of `parameters`."""

  fit: Callable[..., Score]
  grid: tuple[dict[str, Any], ...] = ({},)
  count: Callable[..., int] = _matrices


def parameters(
  name: str, sizes: Sizes, settings: dict[str, Any], rule: str
) -> int:
  """Numbers that a method keeps, beside the answers, to score by `rule`.

  A member's own weight counts as its `D V` matrix, though with fewer than
  `D V / (D + V)` questions the rows of `baselines.dual` are less, `N (D + V)`
  for all. Rules that go through a mixture keep the mean questions too.
  """
  means = sizes.members * sizes.width if rule.startswith('routed') else 0
  return METHODS[name].count(sizes, **settings) + means


def members(
  weights: Callable[..., Array], clusters: Clusters, a_EV: Array, **settings
) -> Score:
  """The score of members' weights, `weights(clusters, a_EV, **rest)`.

  Args:
    base: 'zero', or 'identity': `W_i = I + X_i`, with X_i fitted to what the
      question itself leaves of the answer.
    neighbours: temperature of `routing.extend` for members without questions;
      0 leaves them what the method itself gives them.

  Raises:
    UserError: unknown base, or questions and answers differ in size.
  """
  base, neighbours = settings.pop('base', 'zero'), settings.pop('neighbours', 0)
  if base not in BASES:
    raise UserError(f'base must be one of {", ".join(BASES)}, got {base!r}')
  if base == 'identity':
    eye_EDV = baselines.identity(clusters)  # tells of sizes
  w_EDV = weights(_rest(clusters, base), a_EV, **settings)
  if neighbours:
    w_EDV = routing.extend(w_EDV, clusters, a_EV, neighbours)
  if base == 'identity':
    w_EDV = w_EDV + eye_EDV
  centroid_ED = routing.centroids(clusters, a_EV)
  return lambda q_BD: _scores(q_BD, w_EDV, a_EV, centroid_ED)


def _rest(clusters, base):
  """What the base leaves of the answers."""
  if base == 'zero':
    return clusters
  return clusters._replace(a_ETV=clusters.a_ETV - clusters.q_ETD)


def basis(clusters: Clusters, a_EV: Array, **settings) -> Array:
  """Weights of the shared basis, `[E, D, V]`; see `fit_basis`."""
  return objective_lib.weights(*fit_basis(clusters, a_EV, **settings)[1:])


def stationarity(
  clusters: Clusters, a_EV: Array, *, base: str = 'zero', **settings
) -> float:
  """`lagrangian.tangent` where the basis of these settings ends."""
  settings.pop('neighbours', None)
  rest = _rest(clusters, base)
  objective, c_ER, basis_RDV = fit_basis(rest, a_EV, **settings)
  found = lagrangian.multipliers(objective, rest, c_ER, basis_RDV)
  return float(lagrangian.tangent(objective, rest, c_ER, found))


def fit_basis(
  clusters: Clusters,
  a_EV: Array,
  *,
  rank: int = 8,
  ridge: float = 1.0,
  similarity: float = 0.0,
  cosine: float = 0.0,
  steps: int = 30,
) -> tuple[objective_lib.Objective, Array, Array]:
  """The objective, coefficients `[E, R]` and basis `[R, D, V]`.

  Through rows (`dual.run`) with `steps` steps. A rank above the number of
  members with a question is that number.
  """
  coupled: dict[str, Any] = {}
  if similarity:
    coupled = {
      'similarity': similarity,
      'similarity_EE': answer_graph(a_EV),
    }
  objective = objective_lib.make(ridge=ridge, cosine=cosine, **coupled)
  asked = int(jnp.any(clusters.weight_ET > 0, -1).sum())
  rank = min(rank, asked)
  c_ER, basis_RDV, _ = dual.run(
    objective, clusters, rank, steps=steps, warm_ridge=1.0, warm_steps=steps
  )
  return objective, c_ER, basis_RDV


def answer_graph(a_EV: Array, neighbours: int = 8) -> Array:
  """`S_ij = max(cos(a_i, a_j), 0)` of the nearest answers, rows' mean sum 1."""
  unit_EV = routing.unit(a_EV)
  cosine_EE = jnp.maximum(einsum('ev,fv->ef', unit_EV, unit_EV), 0)
  cosine_EE *= 1 - jnp.eye(len(a_EV))
  least = jax.lax.top_k(cosine_EE, min(neighbours, len(a_EV)))[0][:, -1:]
  kept_EE = jnp.where(cosine_EE >= least, cosine_EE, 0)
  kept_EE = (kept_EE + kept_EE.T) / 2
  return kept_EE * len(a_EV) / jnp.maximum(kept_EE.sum(), 1e-9)


def coupled(
  clusters: Clusters, a_EV: Array, *, strength: float, ridge: float
) -> Array:
  """`baselines.graph_laplacian` on the graph of answers."""
  return baselines.graph_laplacian(
    clusters, answer_graph(a_EV), strength=strength, ridge=ridge
  )


def smoothed(
  clusters: Clusters, a_EV: Array, *, length: float, ridge: float
) -> Array:
  """`baselines.kernel` of ridge solutions."""
  del a_EV
  w_EDV = baselines.independent(clusters, ridge=ridge)
  return baselines.kernel(clusters, w_EDV, length=length)


def adapter(
  clusters: Clusters, a_EV: Array, *, rank: int, ridge: float, shared: float
) -> Array:
  """`baselines.low_rank` on the shared weight."""
  del a_EV
  start_EDV = baselines.shared(clusters, ridge=shared)
  rank = min(rank, *start_EDV.shape[1:])
  return baselines.low_rank(clusters, start_EDV, rank=rank, ridge=ridge)


def classifier(
  clusters: Clusters, a_EV: Array, *, temperature: float, pull: float
) -> Score:
  """Logistic regression: a prototype u_i for each answer, from the answer.

    mean_t -log softmax_j(q · u_j / τ)_i + pull Σ_i |u_i - a_i|² / N

  E D weights, trained to tell all answers apart.
  """
  u_ED = solve.minimise(
    _classifier_loss, a_EV, (clusters, a_EV, temperature, pull), 50
  )
  return lambda q_BD: {'dot': einsum('bd,ed->be', q_BD, u_ED)}


def _classifier_loss(u_ED, clusters, a_EV, temperature, pull):
  q_ND = clusters.q_ETD.reshape(-1, clusters.q_ETD.shape[-1])
  scores_NE = einsum('nd,ed->ne', q_ND, u_ED) / temperature
  return _surprise(scores_NE, clusters) + pull * jnp.sum((u_ED - a_EV) ** 2) / (
    objective_lib.total_weight(clusters)
  )


def _surprise(scores_NE, clusters):
  members, questions = clusters.weight_ET.shape
  member_N = jnp.repeat(jnp.arange(members), questions)
  loss_N = optax.softmax_cross_entropy_with_integer_labels(scores_NE, member_N)
  weight_N = clusters.weight_ET.reshape(-1)
  return jnp.sum(weight_N * loss_N) / objective_lib.total_weight(clusters)


def multi_head(clusters: Clusters, a_EV: Array, *, temperature: float) -> Score:
  """`routing.multi_head`."""
  centroid_ED = routing.centroids(clusters, a_EV)
  return lambda q_BD: {
    'mixture': routing.multi_head(q_BD, a_EV, centroid_ED, temperature)
  }


def centroid(clusters: Clusters, a_EV: Array, *, share: float) -> Score:
  """`(1 - β) cos(q, a_i) + β cos(q, c_i)`, c_i the mean question."""
  centroid_ED = routing.unit(routing.centroids(clusters, a_EV))
  both_ED = share * centroid_ED
  if share < 1:
    both_ED = both_ED + (1 - share) * routing.unit(a_EV)
  return lambda q_BD: {'dot': einsum('bd,ed->be', routing.unit(q_BD), both_ED)}


def nearest(clusters: Clusters, a_EV: Array) -> Score:
  """`max_t cos(q, q_it)`: the nearest question; the answer where is none."""
  q_ETD, weight_ET = routing.unit(clusters.q_ETD), clusters.weight_ET
  if q_ETD.shape[-1] == a_EV.shape[-1]:
    empty_E = ~jnp.any(weight_ET > 0, -1)
    own_ED = jnp.where(empty_E[:, None], routing.unit(a_EV), q_ETD[:, 0])
    q_ETD = q_ETD.at[:, 0].set(own_ED)
    weight_ET = weight_ET.at[:, 0].add(empty_E)

  def score(q_BD):
    cosine_BET = einsum('bd,etd->bet', routing.unit(q_BD), q_ETD)
    return {'dot': jnp.where(weight_ET[None] > 0, cosine_BET, -2).max(-1)}

  return score


def choose(
  method: Method,
  clusters: Clusters,
  a_EV: Array,
  q_BD: Array,
  targets_B: Array,
  extra: tuple[dict[str, Any], ...] = ({},),
) -> tuple[dict[str, Any], str, float]:
  """The settings and the rule of the best mean reciprocal rank.

  Args:
    q_BD, targets_B: validation questions, and which answers are right.
    extra: settings to combine with those of the grid.
  """
  best: tuple[dict[str, Any], str, float] = ({}, '', -1.0)
  for settings, more in itertools.product(method.grid, extra):
    settings = settings | more
    scores = method.fit(clusters, a_EV, **settings)(q_BD)
    for rule, scores_BE in scores.items():
      found = float(jnp.mean(1 / ranks(scores_BE, targets_B)))
      if found > best[2]:
        best = settings, rule, found
  return best


def ranks(scores_BE: Array, targets_B: Array) -> Array:
  """Where the right answer stands, from 1; after those of equal score."""
  right_B1 = jnp.take_along_axis(scores_BE, targets_B[:, None], 1)
  return jnp.sum(~(scores_BE < right_B1), 1)


def _product(**values):
  names = list(values)
  return tuple(
    dict(zip(names, x, strict=True))
    for x in itertools.product(*values.values())
  )


def _plain(function):
  """A baseline that asks nothing of the answers."""
  return lambda clusters, a_EV, **settings: function(clusters, **settings)


def _of(weights):
  return functools.partial(members, weights)


def _prototypes(sizes: Sizes, **_) -> int:
  return sizes.members * sizes.width


def _adapters(sizes: Sizes, *, rank: int, **_) -> int:
  each = rank * (sizes.width + sizes.values)
  return sizes.width * sizes.values + sizes.members * each


def _bases(sizes: Sizes, *, rank: int, **_) -> int:
  rank = min(rank, sizes.members)
  return rank * (sizes.width * sizes.values + sizes.members)


_scores = jax.jit(routing.scores, static_argnames='temperatures')
_RIDGES = (0.1, 0.3, 1.0, 3.0)

# `configs/basis_retrieval.py` says where a choice was an end of its grid.
METHODS = {
  'identity': Method(
    _of(_plain(baselines.identity)), count=lambda sizes, **_: 0
  ),
  'centroid': Method(
    centroid,
    _product(share=(0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)),
    _prototypes,
  ),
  'nearest_question': Method(
    nearest, count=lambda sizes, **_: sizes.questions * sizes.width
  ),
  'multi_head': Method(
    multi_head,
    _product(temperature=(0.01, 0.02, 0.05, 0.1, 0.2)),
    _prototypes,
  ),
  'shared': Method(
    _of(_plain(baselines.shared)),
    _product(base=BASES, ridge=(0.03, *_RIDGES, 10.0, 30.0, 100.0)),
    lambda sizes, **_: sizes.width * sizes.values,
  ),
  'pseudo_inverse': Method(
    _of(_plain(baselines.independent)), _product(base=BASES)
  ),
  'ridge': Method(
    _of(_plain(baselines.independent)),
    _product(base=BASES, ridge=(0.01, 0.03, *_RIDGES, 10.0)),
  ),
  'gradient': Method(
    _of(_plain(baselines.gradient)),
    _product(base=BASES, cosine=(0.0, 0.5, 0.7), steps=(1, 2, 5, 20, 100)),
  ),
  'procrustes': Method(_of(_plain(baselines.procrustes))),
  'laplacian': Method(
    _of(coupled),
    _product(
      base=BASES,
      strength=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
      ridge=(0.03, *_RIDGES),
    ),
  ),
  'kernel': Method(
    _of(smoothed),
    _product(
      base=BASES, length=(0.05, 0.1, 0.2, 0.4, 0.8), ridge=(0.03, *_RIDGES)
    ),
  ),
  'low_rank': Method(
    _of(adapter),
    _product(
      base=BASES,
      rank=(1, 4, 8),
      ridge=(0.1, 0.3, 1.0, 3.0),
      shared=(0.3, 3.0, 30.0),
    ),
    _adapters,
  ),
  'classifier': Method(
    classifier,
    _product(
      temperature=(0.015, 0.03, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
      pull=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
    _prototypes,
  ),
  'basis': Method(
    _of(basis),
    _product(
      base=('identity',),
      rank=(4, 8, 32, 64),
      ridge=(0.03, *_RIDGES),
      similarity=(0.0, 0.05, 0.5),
    )
    # The angle is the prediction's own: of what the identity leaves it is not.
    + _product(
      base=('zero',),
      rank=(8, 32),
      ridge=(0.1, 1.0),
      similarity=(0.0,),
      cosine=(0.0, 0.5),
    ),
    _bases,
  ),
}

# Those whose members without questions need `neighbours`.
EXTENDED = (
  'pseudo_inverse',
  'ridge',
  'gradient',
  'procrustes',
  'kernel',
  'low_rank',
  'basis',
)
