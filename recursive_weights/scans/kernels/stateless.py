"""What depends on no state: the first and the fourth kernel of `matrix_state`.

Decays between tokens by matrix products and dyadic anchors (see `scans.decay`;
no difference of sums, so no gate needs a bound). A pair of tokens j < i meets
at one size h: they lie in the two halves of a block of 2h tokens, and

  decay(j to i) = exp(sum of g over the half of i, up to where it reads)
                * exp(sum of g over the half of j, after it).

With E_h these two factors in one array (rows of upper halves, columns of lower
ones), scores are the sum over h of `mask_h * (q E_h)(k E_h)^T`, and sums of g
are products with matrices of zeros and ones. All terms of a sum have one sign,
so no gate needs a bound. A gate of minus infinity counts as -1e30, whose
exponential is zero too. Resets need no gates: `same_CC` says which tokens stand
in one text, and everything else is masked.

The sizes below have the fewest machine instructions a token of those compiled
for an H100 (chunks of 16 to 64, columns of 16 to 128, 1 to 8 warps); the loops
over levels and columns stay loops, unrolled they do not fit into registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recursive_weights.scans.kernels.plan import Inside, Plan, dot

CHUNK = 16
COLUMNS = 32  # entries of a key that are in registers at once
SHUT = -1e30


class _Text:
  """Which token of a chunk sees which, as masks of a program."""

  def __init__(self, reset_ref, plan: Plan):
    self.plan = plan
    self.head, self.index = pl.program_id(0), pl.program_id(1)
    self.here = here = pl.ds(self.index * plan.chunk, plan.chunk)
    example, head, group = plan.place(self.head)
    # Of what is laid out by token: rows of values' heads and of keys' heads.
    self.at, self.at_keys = (example, here, head), (example, here, group)
    self.rows_C1 = jnp.arange(plan.chunk)[:, None]
    self.columns_1C = jnp.arange(plan.chunk)[None, :]
    self.eye_CC = self.rows_C1 == self.columns_1C
    self.below_CC = self.rows_C1 > self.columns_1C
    reset_C = reset_ref[example, here]
    later = self.rows_C1 >= self.columns_1C
    self.text_C1 = jnp.where(later, reset_C[None], 0.0).sum(1)[:, None]
    earlier = self.rows_C1 <= self.columns_1C
    text_C = jnp.where(earlier, reset_C[:, None], 0.0).sum(0)
    self.same_CC = self.text_C1 == text_C[None]
    self.last = reset_C.sum()
    self.old_C1 = jnp.where(self.text_C1 == 0, 1.0, 0.0)
    self.new_C1 = 1 - self.old_C1
    self.final_C1 = jnp.where(self.text_C1 == self.last, 1.0, 0.0)
    # Where tokens read: before they write, or after.
    self.read_CC = (
      self.below_CC if plan.exclusive else self.below_CC | self.eye_CC
    )

  def over_levels(self, body, start):
    """`body(level, sums)` for halves of 1, 2, 4, ... tokens."""
    levels = self.plan.chunk.bit_length() - 1
    return jax.lax.fori_loop(0, levels, body, start)

  def met(self, level):
    """Pairs (i, j) that meet at halves of 2^level tokens."""
    i, j = self.rows_C1 >> level, self.columns_1C >> level
    return (i & 1 == 1) & (i - 1 == j)

  def half(self, level):
    """Whose g a token's factor at this level sums, as zeros and ones."""
    i, j = self.rows_C1 >> level, self.columns_1C >> level
    after = self.rows_C1 < self.columns_1C
    upper = i & 1 == 1
    chosen = (upper & self.read_CC) | (~upper & after)
    return _ones(chosen & (i == j))

  def prefix(self):
    return _ones(self.read_CC)

  def suffix(self):
    return _ones(self.rows_C1 < self.columns_1C)

  def own(self):
    """As `prefix`, within a token's own text."""
    return _ones(self.read_CC & self.same_CC)


def _ones(mask):
  return jnp.where(mask, 1.0, 0.0)


def _sums(ones_CC, x_CK, plan: Plan, parts: int = 2):
  """`ones x` with x to about 16 bits (f32: all), by products of 16 bits.

  Splitting x keeps what a product of 16 bits would round off.
  """
  if not plan.narrow:
    return dot(ones_CC, x_CK)  # a sum of logarithms wants all bits
  ones_CC = ones_CC.astype(jnp.bfloat16)
  total = jnp.zeros(x_CK.shape, jnp.float32)
  for _ in range(parts):
    part_CK = x_CK.astype(jnp.bfloat16)
    total += dot(ones_CC, part_CK)
    x_CK = x_CK - part_CK.astype(jnp.float32)
  return total


class _Keys:
  """Some columns of the chunk's queries and keys, and their decays."""

  def __init__(self, text, q_ref, k_ref, g_ref, first):
    columns = pl.ds(first, min(COLUMNS, q_ref.shape[-1]))
    self.text, self.columns = text, columns
    self.q = q_ref[*text.at_keys, columns].astype(jnp.float32)
    self.k = k_ref[*text.at_keys, columns].astype(jnp.float32)
    g = g_ref[*text.at, columns]
    self.g = jnp.maximum(g, SHUT)

  def decay(self, ones_CC):
    return jnp.exp(_sums(ones_CC, self.g, self.text.plan))

  def read(self):
    """Of the state at the start of the chunk, in what each row reads."""
    return self.decay(self.text.prefix()) * self.text.old_C1

  def write(self):
    """Of what each row writes, in the state at the end."""
    return self.decay(self.text.suffix()) * self.text.final_C1

  def whole(self):
    return jnp.where(self.text.last == 0, jnp.exp(self.g.sum(0)), 0.0)

  def shares(self):
    """Of the state that resets bring in, in what each row reads."""
    return self.decay(self.text.own()) * self.text.new_C1

  def fresh_whole(self):
    own = jnp.where(self.text.final_C1 > 0, self.g, 0.0)
    return jnp.where(self.text.last > 0, jnp.exp(own.sum(0)), 0.0)


def _over_columns(q_ref, body, start):
  """`body(first column, sums)` for some columns after the other."""
  width = min(COLUMNS, q_ref.shape[-1])

  def step(index, sums):
    return body(index * width, sums)

  return jax.lax.fori_loop(0, q_ref.shape[-1] // width, step, start)


def forward_kernel(q_ref, k_ref, g_ref, reset_ref, *refs, plan):
  refs = list(refs)
  beta_ref = refs.pop(0) if plan.delta else None
  bonus_ref = refs.pop(0) if plan.exclusive else None
  out, rest = Inside.of(refs, plan)
  text = _Text(reset_ref, plan)
  head, here = text.head, text.here
  dtype = out.read.dtype
  product = functools.partial(dot, precision=plan.precision)
  keys = functools.partial(_Keys, text, q_ref, k_ref, g_ref)

  def columns(first, sums):
    score, below, own_C1 = sums
    at = keys(first)
    out.read[head, here, at.columns] = (at.q * at.read()).astype(dtype)
    out.write[head, here, at.columns] = (at.k * at.write()).astype(dtype)
    out.whole[head, text.index, at.columns] = at.whole()
    if plan.fresh:
      fresh_read = (at.q * at.shares()).astype(dtype)
      out.fresh_read[head, here, at.columns] = fresh_read
      out.fresh_whole[head, text.index, at.columns] = at.fresh_whole()
    own = at.q * at.k
    if plan.exclusive:
      own *= bonus_ref[head, at.columns][None]
    own_C1 += own.sum(1)[:, None]

    def level(index, sums):
      score, below = sums
      met, decay = text.met(index), at.decay(text.half(index))
      q, k = (at.q * decay).astype(dtype), (at.k * decay).astype(dtype)
      score += jnp.where(met, product(q, k.T), 0.0)
      if plan.delta:
        below += jnp.where(met, product(k, k.T), 0.0)
      return score, below

    score, below = text.over_levels(level, (score, below))
    return score, below, own_C1

  zeros_CC = jnp.zeros((plan.chunk, plan.chunk), jnp.float32)
  zeros_C1 = jnp.zeros((plan.chunk, 1), jnp.float32)
  sums = (zeros_CC, zeros_CC if plan.delta else 0.0, zeros_C1)
  score, below, own_C1 = _over_columns(q_ref, columns, sums)
  score = jnp.where(text.same_CC, score, 0.0)
  score += jnp.where(text.eye_CC, own_C1, 0.0)
  out.score[head, here, :] = score.astype(dtype)
  if not plan.delta:
    return
  beta = beta_ref[*text.at]
  below = jnp.where(text.same_CC, below, 0.0)
  (below_ref,) = rest
  below_ref[head, here, :] = below
  solve = _inverse(beta[:, None] * below, text) * beta[None]
  solve = solve.astype(dtype)
  out.solve[head, here, :] = solve

  def old(first, _):
    at = keys(first)
    old = product(solve, (at.k * at.read()).astype(dtype))
    out.old[head, here, at.columns] = old.astype(dtype)
    if plan.fresh:
      old = product(solve, (at.k * at.shares()).astype(dtype))
      out.fresh_old[head, here, at.columns] = old.astype(dtype)
    return 0

  _over_columns(q_ref, old, 0)


def _inverse(lower_CC, text):
  """`(I + L)^-1`, blocks doubling: no power of L is formed."""
  product = functools.partial(dot, precision=text.plan.inner)

  def level(index, inverse):
    block = jnp.where(text.met(index), lower_CC, 0.0)
    return inverse - product(product(inverse, block), inverse)

  return text.over_levels(level, jnp.where(text.eye_CC, 1.0, 0.0))


def backward_kernel(q_ref, k_ref, g_ref, reset_ref, *refs, plan):
  refs = list(refs)
  beta_ref = refs.pop(0) if plan.delta else None
  bonus_ref = refs.pop(0) if plan.exclusive else None
  below_ref = refs.pop(0) if plan.delta else None
  grads, refs = Inside.of(refs, plan)
  dq_ref, dk_ref, dg_ref, *refs = refs
  text = _Text(reset_ref, plan)
  head, here = text.head, text.here
  dtype = q_ref.dtype
  keys = functools.partial(_Keys, text, q_ref, k_ref, g_ref)
  product = functools.partial(dot, precision=plan.precision)
  dscore = grads.score[head, here, :].astype(jnp.float32)
  own_C1 = jnp.where(text.eye_CC, dscore, 0.0).sum(1)[:, None]
  earlier = text.same_CC & text.below_CC
  dscore = jnp.where(earlier, dscore, 0.0)
  dbelow = solve = None
  if plan.delta:

    def old(first, dsolve):
      at = keys(first)
      dold = grads.old[head, here, at.columns].astype(dtype)
      dsolve += product(dold, (at.k * at.read()).astype(dtype).T)
      if plan.fresh:
        dold = grads.fresh_old[head, here, at.columns].astype(dtype)
        dsolve += product(dold, (at.k * at.shares()).astype(dtype).T)
      return dsolve

    dsolve = grads.solve[head, here, :].astype(jnp.float32)
    dsolve = _over_columns(q_ref, old, dsolve)
    inner = functools.partial(dot, precision=plan.inner)
    beta, below = beta_ref[*text.at], below_ref[head, here, :]
    inverse = _inverse(beta[:, None] * below, text)
    solve = (inverse * beta[None]).astype(dtype)
    dlower = -inner(inner(inverse.T, dsolve * beta[None]), inverse.T)
    dlower = jnp.where(earlier, dlower, 0.0)
    refs[0][*text.at] = (dsolve * inverse).sum(0) + (dlower * below).sum(1)
    dbelow = beta[:, None] * dlower

  def columns(first, _):
    at = keys(first)
    dq, dk = own_C1 * at.k, own_C1 * at.q
    if plan.exclusive:
      bonus = bonus_ref[head, at.columns][None]
      dbonus = (own_C1 * at.q * at.k).sum(0)
      refs[0][head, text.index, at.columns] = dbonus
      dq, dk = dq * bonus, dk * bonus

    def level(index, sums):
      dq, dk, dg = sums
      half, met = text.half(index), text.met(index)
      decay = at.decay(half)
      q, k = (at.q * decay).astype(dtype), (at.k * decay).astype(dtype)
      pairs = jnp.where(met, dscore, 0.0).astype(dtype)
      more_q, more_k = product(pairs, k), product(pairs.T, q)
      if plan.delta:
        pairs = jnp.where(met, dbelow, 0.0)
        more_k += product((pairs + pairs.T).astype(dtype), k)
      more_q, more_k = more_q * decay, more_k * decay
      dg += _sums(half.T, more_q * at.q + more_k * at.k, plan, 1)
      return dq + more_q, dk + more_k, dg

    dq, dk, dg = text.over_levels(level, (dq, dk, jnp.zeros_like(dq)))

    def reads(share, ones, dread_ref, dold_ref):
      """Gradients through a state's share in what rows read."""
      dq = dread_ref[head, here, at.columns].astype(jnp.float32) * share
      dk, dsums = jnp.zeros_like(dq), dq * at.q
      if plan.delta:
        dold = dold_ref[head, here, at.columns].astype(dtype)
        dk = product(solve.T, dold) * share
        dsums += dk * at.k
      return dq, dk, _sums(ones.T, dsums, plan, 1)

    more = reads(at.read(), text.prefix(), grads.read, grads.old)
    dq, dk, dg = dq + more[0], dk + more[1], dg + more[2]
    # What is written, at the end.
    dwrite = grads.write[head, here, at.columns]
    more = dwrite.astype(jnp.float32) * at.write()
    dk += more
    dg += _sums(text.suffix().T, more * at.k, plan, 1)
    dg += (grads.whole[head, text.index, at.columns] * at.whole())[None]
    if plan.fresh:
      fresh = grads.fresh_read, grads.fresh_old
      more = reads(at.shares(), text.own(), *fresh)
      dq, dk, dg = dq + more[0], dk + more[1], dg + more[2]
      ends = grads.fresh_whole[head, text.index, at.columns] * at.fresh_whole()
      dg += ends[None] * text.final_C1
    # What a gate shut entirely decays is zero.
    dg_ref[*text.at, at.columns] = jnp.where(at.g == SHUT, 0.0, dg)
    dq_ref[*text.at, at.columns] = dq.astype(dq_ref.dtype)
    dk_ref[*text.at, at.columns] = dk.astype(dk_ref.dtype)
    return 0

  _over_columns(q_ref, columns, 0)
