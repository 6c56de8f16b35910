"""Decay between any two tokens of a chunk, exact for gates of any strength.

With log decays g <= 0, token i sees what token j wrote through
exp(g_(j+1) + ... + g_i). The usual exp(G_i) exp(-G_j) of cumulative sums G
overflows, and exp(G_i - G_j) cancels digits. Dyadic anchors do neither: blocks
of 1, 2, 4, ... tokens are paired, and across the boundary of a pair

  exp(g_(j+1) + ... + g_i) = exp(sum from the boundary to i)      (row)
                           * exp(sum from after j to the boundary) (column)

where each exponent is a sum of non-positive numbers. Factors underflow to
zero at most, no gate needs a bound, and a log decay of minus infinity is an
exact reset with finite gradients.

All functions take any leading axes, which may broadcast against each other.
The width K of the decays is the key width, or 1 where a head decays as one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Array, Tree


class Anchors(NamedTuple):
  """Decay factors of a chunk, all in [0, 1].

  pairs: by level, from blocks of one token to blocks of C / 2: the factors of
    rows and columns, `[..., blocks / 2, block, K]` each.
  read_CK: from the start of the chunk to where each token reads.
  write_CK: from each token to the end of the chunk.
  whole_K: over the whole chunk.
  fresh_read_CK, fresh_whole_K: the share of a state that resets bring in, in
    what each token reads and at the end of the chunk; None if not asked for.
  """

  pairs: tuple[tuple[Array, Array], ...]
  read_CK: Array
  write_CK: Array
  whole_K: Array
  fresh_read_CK: Tree = None
  fresh_whole_K: Tree = None


def anchors(
  log_decay_CK: Array,
  resets_C: Array,
  *,
  exclusive: bool = False,
  fresh: bool = False,
) -> Anchors:
  """Decay factors between the tokens of a chunk and its two ends.

  S_t = exp(g_t) S_(t-1) + ..., with S_(t-1) dropped where `resets_C` is True.

  Args:
    log_decay_CK: g, float32 `[..., C, K]`, at most 0; C is a power of two.
    resets_C: bool `[..., C]`.
    exclusive: tokens read S_(t-1) (RWKV) and not S_t.
    fresh: also weigh the state that resets bring in.
  """
  # One leading axis, see `_few_axes`.
  chunk, width = log_decay_CK.shape[-2:]
  lead = jnp.broadcast_shapes(log_decay_CK.shape[:-2], resets_C.shape[:-1])
  log_decay_CK = jnp.broadcast_to(log_decay_CK, (*lead, chunk, width))
  log_decay_CK = log_decay_CK.reshape(-1, chunk, width)
  resets_C1 = jnp.broadcast_to(resets_C, (*lead, chunk)).reshape(-1, chunk, 1)
  kept_CK = jnp.where(resets_C1, -jnp.inf, log_decay_CK)
  barrier_C1 = jnp.where(resets_C1, -jnp.inf, 0.0)

  def where_read(prefix, barrier):
    # One token earlier, but never from before a reset of the reader itself.
    return _later(prefix, 0.0) + barrier if exclusive else prefix

  prefix = kept_CK[..., None, :]
  suffix = jnp.zeros_like(prefix)
  born = jnp.where(resets_C1, jnp.exp(log_decay_CK), 0.0)[..., None, :]
  pairs = []
  size = 1
  while size < chunk:
    before, after = _halves(prefix)
    suffix_before, suffix_after = _halves(suffix)
    barrier = _halves(_blocks(barrier_C1, size))[1]
    pairs.append((jnp.exp(where_read(after, barrier)), jnp.exp(suffix_before)))
    if fresh:
      born_before, born_after = _halves(born)
      born_after += jnp.exp(after) * born_before[..., -1:, :]
      born = jnp.concatenate([born_before, born_after], axis=-2)
    suffix = jnp.concatenate(
      [suffix_before + after[..., -1:, :], suffix_after], axis=-2
    )
    prefix = jnp.concatenate([before, before[..., -1:, :] + after], axis=-2)
    size *= 2
  prefix_CK, suffix_CK, born_CK = (
    x[..., 0, :, :] for x in (prefix, suffix, born)
  )
  fresh_read_CK = born_CK
  if exclusive:
    fresh_read_CK = jnp.where(resets_C1, 1.0, _later(born_CK, 0.0))
  found = Anchors(
    pairs=tuple(pairs),
    read_CK=jnp.exp(where_read(prefix_CK, barrier_C1)),
    write_CK=jnp.exp(suffix_CK),
    whole_K=jnp.exp(prefix_CK[..., -1, :]),
    fresh_read_CK=fresh_read_CK if fresh else None,
    fresh_whole_K=born_CK[..., -1, :] if fresh else None,
  )
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


class Ends(NamedTuple):
  """Of `Anchors` what a state at the end of the chunk needs."""

  write_CK: Array
  whole_K: Array
  fresh_whole_K: Tree = None


def ends(log_decay_CK: Array, resets_C: Array, *, fresh: bool = False) -> Ends:
  """Decay factors from all tokens to the end; arguments as for `anchors`.

  Sums from the end alone, so C is any number and may be a whole sequence.
  """
  resets_C1 = resets_C[..., None]
  kept_CK = jnp.where(resets_C1, -jnp.inf, log_decay_CK)
  sum_CK = jax.lax.cumsum(kept_CK, axis=kept_CK.ndim - 2, reverse=True)
  last_CK = jnp.zeros_like(sum_CK[..., :1, :])
  write_CK = jnp.exp(jnp.concatenate([sum_CK[..., 1:, :], last_CK], axis=-2))
  fresh_whole_K = None
  if fresh:
    born_CK = jnp.where(resets_C1, jnp.exp(log_decay_CK), 0.0)
    fresh_whole_K = (born_CK * write_CK).sum(-2)
  return Ends(write_CK, jnp.exp(sum_CK[..., 0, :]), fresh_whole_K)


def scores(
  q_CK: Array,
  k_CK: Array,
  decay: Anchors,
  diagonal_C: Array,
  *,
  dtype=jnp.float32,
  precision='highest',
) -> Array:
  """Decay-weighted scores of a chunk, `[..., C, C]`, lower triangular.

  P_ij = sum_k q_ik k_jk exp(sum of g_k from after j to where i reads), j < i;
  P_ii = diagonal_i. Products take operands of `dtype` and add in float32.
  """
  if decay.read_CK.shape[-1] == 1:
    # One decay a head leaves the sum over keys: one large product.
    lead, rows = _few_axes([row for row, _ in decay.pairs])
    _, columns = _few_axes([column for _, column in decay.pairs])
    zeros_C = jnp.zeros((1, decay.read_CK.shape[-2]))
    decay_CC = assemble(
      zeros_C,
      [
        row * jnp.swapaxes(column, -1, -2)
        for row, column in zip(rows, columns, strict=True)
      ],
    )
    decay_CC = decay_CC.reshape(*lead, *decay_CC.shape[-2:])
    plain_CC = product('...ck,...dk->...cd', q_CK, k_CK, dtype, precision)
    eye_CC = jnp.eye(q_CK.shape[-2], dtype=bool)
    eye_CC = eye_CC.reshape((1,) * (decay_CC.ndim - 2) + eye_CC.shape)
    return jnp.where(eye_CC, diagonal_C[..., None], plain_CC * decay_CC)
  return assemble(
    diagonal_C, blocks(q_CK, k_CK, decay, dtype=dtype, precision=precision)
  )


def blocks(
  q_CK: Array,
  k_CK: Array,
  decay: Anchors,
  *,
  dtype=jnp.float32,
  precision='highest',
) -> list[Array]:
  """The scores below the diagonal, by level: `[..., pairs, block, block]`."""
  found = []
  scalar = decay.read_CK.shape[-1] == 1
  # Fewer axes, see `_few_axes`: all but that over which heads share keys.
  lead = jnp.broadcast_shapes(q_CK.shape[:-2], decay.read_CK.shape[:-2])
  q_CK, k_CK = (_merge(x, lead, 2) for x in (q_CK, k_CK))
  for row, column in decay.pairs:
    row, column = (_merge(x, lead, 3) for x in (row, column))
    size = row.shape[-2]
    q, k = _halves(_blocks(q_CK, size))[1], _halves(_blocks(k_CK, size))[0]
    if scalar:
      block = product('...ck,...dk->...cd', q, k, dtype, precision)
      found.append(block * row * jnp.swapaxes(column, -1, -2))
    else:
      found.append(
        product('...ck,...dk->...cd', q * row, k * column, dtype, precision)
      )
  return [x.reshape(*lead, *x.shape[-3:]) for x in found]


def assemble(diagonal_C: Array, below: list[Array]) -> Array:
  """The lower triangular matrix of a diagonal and the blocks below it."""
  lead, below = _few_axes(below)
  chunk = diagonal_C.shape[-1]
  diagonal_C = jnp.broadcast_to(diagonal_C, (*lead, chunk)).reshape(-1, chunk)
  matrix = diagonal_C[..., None, None]
  for block in below:
    matrix = _join(matrix, block)
  return matrix.reshape(*lead, chunk, chunk)


def inverse(below: list[Array], *, precision='highest') -> Array:
  """(I + L)^-1 for the strictly lower L of these blocks, `[..., C, C]`.

  Blocks double: inv([[a, 0], [l, b]]) = [[inv a, 0], [-inv b l inv a, inv b]],
  so no power of L is formed. float32.
  """
  lead, below = _few_axes(below)
  batch, pairs = below[0].shape[:2]
  matrix = jnp.ones((batch, 2 * pairs, 1, 1), jnp.float32)
  for block in below:
    before, after = _halves(matrix)
    middle = jnp.matmul(block, before, precision=precision)
    matrix = _join(matrix, -jnp.matmul(after, middle, precision=precision))
  return matrix.reshape(*lead, *matrix.shape[-2:])


def product(spec: str, a: Array, b: Array, dtype, precision) -> Array:
  """An einsum of operands of `dtype` that adds in float32.

  On a CPU operands of 16 bits are rounded and then multiplied as float32, which
  is the same: XLA there (jaxlib 0.10.2) has no product of bfloat16 that adds in
  float32 for every layout.
  """
  a, b = a.astype(dtype), b.astype(dtype)

  def native(a, b):
    return jnp.einsum(
      spec, a, b, precision=precision, preferred_element_type=jnp.float32
    )

  if jnp.dtype(dtype) == jnp.float32:
    return native(a, b)

  def rounded(a, b):
    return native(a.astype(jnp.float32), b.astype(jnp.float32))

  return jax.lax.platform_dependent(a, b, cpu=rounded, default=native)


def _merge(x: Array, lead: tuple[int, ...], tail: int) -> Array:
  """Leading axes `[*lead[:-1], R or 1]` as `[product, R or 1]`."""
  last = x.shape[-tail - 1 :] if x.ndim > tail else (1, *x.shape)
  return jnp.broadcast_to(x, (*lead[:-1], *last)).reshape(-1, *last)


def _few_axes(below: list[Array]) -> tuple[tuple[int, ...], list[Array]]:
  """The leading axes of all blocks, and the blocks with one in their place.

  In gradients of arrays of seven axes XLA's CPU backend (jaxlib 0.10.2) makes
  programs that crash.
  """
  lead = jnp.broadcast_shapes(*(x.shape[:-3] for x in below))
  return lead, [
    jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
    for x in below
  ]


def _later(x_CK: Array, first: float) -> Array:
  filler = jnp.full_like(x_CK[..., :1, :], first)
  return jnp.concatenate([filler, x_CK[..., :-1, :]], axis=-2)


def _blocks(x_CK: Array, size: int) -> Array:
  *lead, chunk, width = x_CK.shape
  return x_CK.reshape(*lead, chunk // size, size, width)


def _halves(blocks: Array) -> tuple[Array, Array]:
  """Of neighbouring blocks `[..., blocks, s, K]`, the earlier and the later."""
  return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def _join(matrix: Array, below: Array) -> Array:
  """[[a, 0], [below, b]] of each two neighbours a and b on the diagonal."""
  a, b = _halves(matrix)
  lead = jnp.broadcast_shapes(a.shape, below.shape)
  a, b, below = (jnp.broadcast_to(x, lead) for x in (a, b, below))
  top = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([below, b], axis=-1)], axis=-2)
