"""Blocks for Sudoku in which no digit has weights of its own.

The state holds a vector for every cell and every digit that may stand there,
`x_TBVD`: T cells first, V digits. All weights are shared by the digits, and
digits are only pooled over, so a relabelling of the digits of the input
relabels the state: the block is equivariant by construction.

Two blocks, whose halves are `x <- rms(x + f(x))` as in `trm_block`:

  constraints:  f mixes within every row, column, box and cell of the puzzle;
                the same weights serve all of them, so the block knows no cell
                from another and is equivariant under the puzzle's moves
                (rows of a band, bands, columns, stacks) as well
  tokens:       f = SwiGLU over the cells with a weight for each pair, norm
                over the cells; then f mixes within every cell
  both then:    f = SwiGLU over the width (`trm_block.channel_half`)

The families of constraints are those of the exact-cover form of Sudoku: in a
row each digit stands once, in a column, in a box, and a cell has one digit.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import trm_block

# Axes of `view` that a family pools over.
FAMILIES = {'row': (2, 3), 'column': (0, 1), 'box': (1, 3), 'cell': (2,)}
POOLS = ('mean', 'max', 'both', 'softmax')
KINDS = ('constraints', 'tokens')


def init(
  key: Array,
  kind: str,
  *,
  tokens: int,
  width: int,
  pool: str = 'both',
  pool_width: int = 64,
  expansion: float = 4.0,
  multiple: int = 64,
) -> Tree:
  """Parameters of one block: `{constraint, channel}`, with `token` in 'tokens'.

  Args:
    kind: 'constraints' or 'tokens'.
    tokens: T, number of cells.
    width: D.
    pool, pool_width: see `constraint_init`.
    expansion, multiple: of the SwiGLUs, see `trm_block.inner_width`.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {KINDS}, got {kind!r}')
  keys = jax.random.split(key, 3)
  families = 4 if kind == 'constraints' else 1
  hidden = trm_block.inner_width(width, expansion, multiple)
  params = {
    'constraint': constraint_init(keys[0], width, pool_width, families, pool),
    'channel': trm_block.swiglu_init(keys[1], width, hidden),
  }
  if kind == 'tokens':
    hidden = trm_block.inner_width(tokens, expansion, multiple)
    params['token'] = trm_block.swiglu_init(keys[2], tokens, hidden)
  return params


def constraint_init(
  key: Array, width: int, pooled: int, families: int, pool: str
) -> dict[str, Array]:
  """`{gate [D, N P], up [D, N P], down [N P, D]}` for N families.

  P = `pooled` values a family; with 'softmax', `score [D, N P]` too.
  """
  keys = jax.random.split(key, 4)
  hidden = families * pooled
  params = {
    'gate': trm_block.lecun(keys[0], width, hidden),
    'up': trm_block.lecun(keys[1], width, hidden),
    'down': trm_block.lecun(keys[2], hidden, width),
  }
  if pool == 'softmax':
    params['score'] = trm_block.lecun(keys[3], width, hidden)
  return params


def constraint_half(
  params: Mapping[str, Array],
  x_TBVD: Array,
  *,
  families: tuple[str, ...],
  box: tuple[int, int],
  pool: str,
) -> Array:
  """`rms_D(x + (silu(x gate) * pool(x up)) down)`: a SwiGLU that pools.

  A family's values are pooled over the members of each of its constraints,
  and every member multiplies what was pooled by its own gate.

  Args:
    params: from `constraint_init`.
    x_TBVD: the state; T = V^2 cells in reading order.
    families: names in `FAMILIES`.
    box: rows and columns of a box; their product is V.
    pool: 'mean', 'max', 'both' (half of the values each), or 'softmax', an
      average weighted by softmax(x score) among the members.
  """
  shape = x_TBVD.shape
  gates = jax.nn.silu(x_TBVD @ params['gate'].astype(x_TBVD.dtype))
  values = pooled(params, x_TBVD, families=families, box=box, pool=pool)
  mixed = [
    (view(gate, name, box) * value).reshape(*shape[:-1], -1)
    for name, gate, value in zip(
      families, _split(gates, families), values, strict=True
    )
  ]
  hidden = jnp.concatenate(mixed, axis=-1)
  return trm_block.rms(x_TBVD + hidden @ params['down'].astype(x_TBVD.dtype))


def apply(
  params: Tree,
  x_TBVD: Array,
  *,
  box: tuple[int, int],
  pool: str = 'both',
  halves: trm_block.Halves = trm_block.Halves(),  # noqa: B008
) -> Array:
  """One block; its kind is told by its parameters.

  Args:
    params: from `init`.
    x_TBVD, box, pool: see `constraint_half`.
    halves: programs of the halves; `constraint` None for the one here.
  """
  families = tuple(FAMILIES)
  if 'token' in params:
    families = ('cell',)
    x_TBVD = halves.token(params['token'], x_TBVD)
  constraint = halves.constraint or constraint_half
  x_TBVD = constraint(
    params['constraint'], x_TBVD, families=families, box=box, pool=pool
  )
  return halves.channel(params['channel'], x_TBVD)


def _split(x, families):
  return jnp.split(x, len(families), axis=-1)


def view(x_TBVD: Array, family: str, box: tuple[int, int]) -> Array:
  """The state by axes that a family pools over (`FAMILIES`) or keeps.

  `[T, B, V, D]` for 'cell', else `[bands, rows, stacks, columns, B V, D]`.
  """
  if family == 'cell':
    return x_TBVD
  # Not an axis more: where products of rank 7 are summed on a CPU, XLA as of
  # jaxlib 0.10.2 and 0.11.0 ends the process (jax issue 39257).
  return x_TBVD.reshape(box[1], box[0], box[0], box[1], -1, x_TBVD.shape[-1])


def pooled(
  params: Mapping[str, Array],
  x_TBVD: Array,
  *,
  families: tuple[str, ...],
  box: tuple[int, int],
  pool: str,
) -> list[Array]:
  """Each family's values, P wide, in its `view`, with size 1 along the axes
  pooled over; arguments as in `constraint_half`.

  Values of all families come from one product, but for means, which are linear
  and so may be taken first: their products are small.
  """
  weights = {name: value.astype(x_TBVD.dtype) for name, value in params.items()}
  up, width = weights['up'], x_TBVD.shape[-1]

  def by_family(x_TBVN):
    """The part of each, in its view."""
    parts = _split(x_TBVN, families)
    return [view(x, n, box) for n, x in zip(families, parts, strict=True)]

  members = [FAMILIES[name] for name in families]
  if pool == 'mean':
    return [
      _mean(view(x_TBVD, name, box), FAMILIES[name]) @ part
      for name, part in zip(families, _split(up, families), strict=True)
    ]
  if pool == 'both':
    halves = up.reshape(width, len(families), 2, -1)
    largest = by_family(x_TBVD @ halves[:, :, 1].reshape(width, -1))
    return [
      jnp.concatenate(
        [
          _mean(view(x_TBVD, name, box), axes) @ halves[:, i, 0],
          value.max(axes, keepdims=True),
        ],
        -1,
      )
      for i, (name, axes, value) in enumerate(
        zip(families, members, largest, strict=True)
      )
    ]
  values = by_family(x_TBVD @ up)
  if pool == 'max':
    return [
      value.max(axes, keepdims=True)
      for axes, value in zip(members, values, strict=True)
    ]
  if pool != 'softmax':
    raise ValueError(f'pool must be one of {POOLS}, got {pool!r}')
  scores = by_family((x_TBVD @ weights['score']).astype(jnp.float32))
  return [
    _weighted(score, value, axes)
    for axes, score, value in zip(members, scores, values, strict=True)
  ]


def _weighted(score, value, axes):
  """Mean of values weighted by softmax(score)."""
  most = jax.lax.stop_gradient(score.max(axes, keepdims=True))
  e = jnp.exp(score - most)
  return (_mean(e * value, axes) / _mean(e, axes)).astype(value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _mean(x, axes):
  """Of float32 to the same bits in any order of what is summed.

  A recursion enlarges rounding errors, so that without it relabelled digits
  would come out as other answers. Whole numbers have exact sums, and these are
  less than 2^31.
  """
  if x.dtype != jnp.float32:
    return x.mean(axes, keepdims=True, dtype=jnp.float32).astype(x.dtype)
  count = math.prod(x.shape[axis] for axis in axes)
  unit = jnp.abs(x).max(axes, keepdims=True) * 2.0 ** -(30 - count.bit_length())
  unit = jnp.where(unit > 0, unit, 1.0)
  whole = jnp.round(x / unit).astype(jnp.int32)
  return whole.sum(axes, keepdims=True) * (unit / count)


@_mean.defjvp
def _mean_jvp(axes, primals, tangents):
  (x,), (dx,) = primals, tangents
  return _mean(x, axes), dx.mean(axes, keepdims=True)
