"""Linear attention and the delta rule as two GPU kernels.

Chunks of 16 tokens. The first kernel (`stateless`) runs on all of them at once
and makes what depends on no state: decays between tokens, scores, and for the
delta rule the inverse of its triangle. The second goes from chunk to chunk, the
state in registers.

Backward, a third goes from the last chunk to the first with the gradient of the
state, and a fourth takes all chunks at once back to the inputs. Kept for it are
the state at the start of every chunk and what tokens wrote, in the dtype of v.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.scans import chunks, kernels
from recursive_weights.scans.kernels import stateless
from recursive_weights.scans.kernels.plan import Inside, Plan, dot


def fits(given: chunks.Inputs) -> bool:
  """Whether the kernels take these values and widths.

  Not float16: states are kept between chunks in the dtype of v. Nor states that
  leave no room on chip: 256 x 256 on no GPU, half as many entries not on those
  with 99 KiB (L4, RTX), nor 256 keys and 128 values in float32 on an A100.
  """
  keys, values = given.q_BTGK.shape[-1], given.v_BTHV.shape[-1]
  dtype = given.v_BTHV.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    return False
  if any(not 16 <= n <= 256 or n & (n - 1) for n in (keys, values)):
    return False
  # A state that is laid out anew, beside four chunks of keys: no less than what
  # XLA asked for when it compiled for those GPUs.
  needed = 4 * keys * (values + stateless.CHUNK * dtype.itemsize)
  return needed <= kernels.shared_memory()


def scan(
  given: chunks.Inputs,
  *,
  delta: bool,
  bonus_HK: Array | None = None,
  written: bool = False,
  precision: str = 'highest',
  interpret: bool | None = None,
) -> tuple[Array, ...]:
  """Outputs `[B, T, H, V]` and the last state `[B, H, K, V]`.

  Args:
    given: checked inputs that `fits` takes.
    delta: the delta rule; else linear attention, with RWKV-6's `bonus_HK`.
    written: also give what tokens of the delta rule wrote, `[B, T, H, V]` in
      the dtype of v: their corrections.
    precision: of products of float32; the inverse is at 'highest', but in TF32
      where values have 16 bits.
    interpret: run without a GPU, slowly; None: where there is none.

  Raises:
    ValueError: inputs that `fits` refuses.
    UserError: a GPU that cannot run kernels.
  """
  batch, length, groups, keys = given.q_BTGK.shape
  heads, values = given.v_BTHV.shape[2:]
  if not fits(given):
    raise ValueError(
      "algorithm 'fused' takes float32 or bfloat16 and widths that are powers "
      'of two from 16 to 256, and states for which there is room on chip, got '
      f'{given.v_BTHV.dtype} of {keys} and {values}'
    )
  if interpret is None:
    kernels.check_gpu()
    interpret = jax.default_backend() != 'gpu'
  exclusive = bonus_HK is not None
  fresh = given.fresh_BHKV
  plan = Plan(
    delta=delta,
    exclusive=exclusive,
    fresh=fresh is not None,
    written=written,
    heads=heads,
    repeats=heads // groups,
    precision=precision,
    interpret=interpret,
    narrow=given.v_BTHV.dtype.itemsize == 2,
    chunk=stateless.CHUNK,
    warps=_warps(keys * values),
  )
  more = -length % plan.chunk

  def whole(x):
    """Zeros after the last token, up to a whole chunk."""
    return jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))

  inputs = _Inputs(
    q=whole(given.q_BTGK),
    k=whole(given.k_BTGK),
    v=whole(given.v_BTHV),
    g=whole(
      jnp.broadcast_to(given.log_decay_BTHK, (batch, length, heads, keys))
    ),
    resets=whole(given.resets_BT.astype(jnp.float32)),
    state=given.state_BHKV.reshape(-1, keys, values),
  )
  if fresh is not None:
    inputs = inputs._replace(fresh=fresh.reshape(-1, keys, values))
  if delta:
    inputs = inputs._replace(beta=whole(given.beta_BTH))
  if bonus_HK is not None:
    bonus = jnp.broadcast_to(bonus_HK[None], (batch, heads, keys))
    bonus = bonus.astype(jnp.float32).reshape(-1, keys)
    inputs = inputs._replace(bonus=bonus)
  y, last, *corrections = _scan(inputs, plan)
  last = last.reshape(batch, heads, keys, values)
  return y[:, :length], last, *(x[:, :length] for x in corrections)


def _warps(size: int) -> tuple[int, int, int]:
  """Warps for a state of so many entries, see `Plan`.

  Up to 32 of them in a thread's registers, 64 where nothing is kept (timed on
  an H200: four warps instead of eight took .75 of the time, but 1.2 where every
  state is written).
  """
  return 1, min(max(size // 2048, 1), 4), min(max(size // 1024, 1), 8)


class _Inputs(NamedTuple):
  """Whole chunks `[B, T, H, ...]`, states and bonus `[B H, ...]`.

  What a rule does not have is None.
  """

  q: Array
  k: Array
  v: Array
  g: Array
  resets: Array
  state: Array
  fresh: Array | None = None
  beta: Array | None = None
  bonus: Array | None = None

  def inside(self):
    """What the kernels that know no state take."""
    own = (self.q, self.k, self.g, self.resets, self.beta, self.bonus)
    return [x for x in own if x is not None]

  def states(self):
    return [x for x in (self.state, self.fresh) if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs, plan):
  inside, _ = _inside(inputs, plan)
  return _along(inside, inputs, plan, False)


def _scan_forward(inputs, plan):
  inside, kept = _inside(inputs, plan)
  y, last, starts, *written = _along(inside, inputs, plan, True)
  out = y, last, *(written if plan.written else ())
  written = written[0] if plan.delta else inputs.v
  return out, (inputs, inside, kept, starts, written)


def _scan_backward(plan, saved, cotangents):
  inputs, inside, kept, starts, written = saved
  dv, dstates, dinside = _back(
    inside, inputs, written, starts, cotangents, plan
  )
  dq, dk, dg, *rest = _inside_back(inputs, kept, dinside, plan)
  gradient = _Inputs(dq, dk, dv, dg, jnp.zeros_like(inputs.resets), *dstates)
  if plan.delta:
    gradient = gradient._replace(beta=rest[0])
  if plan.exclusive:
    gradient = gradient._replace(bonus=rest[0].sum(1))
  return (gradient,)


_scan.defvjp(_scan_forward, _scan_backward)


def _call(kernel, name, out, grid, warps, stages, plan, *args):
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    out_shape=tuple(out),
    grid=grid,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=plan.interpret,
    name=name,
  )(*args)


@functools.partial(jax.jit, static_argnames='plan')
def _inside(inputs, plan):
  """Of every chunk: `q` and `k` with their decays to its start and end, its
  whole decay, scores `[C, C]`; for the delta rule `M E K` and `M`; for a fresh
  state its shares in what is read, at the end, and in `M E K`. And what the
  backward kernel of `stateless` wants of it again."""
  _, length, _, keys = inputs.g.shape
  heads, count = len(inputs.state), length // plan.chunk

  def like(*shape, dtype=inputs.v.dtype):
    return jax.ShapeDtypeStruct((heads, *shape), dtype)

  out = [
    like(length, keys),
    like(length, keys),
    like(count, keys, dtype=jnp.float32),
    like(length, plan.chunk),
  ]
  if plan.delta:
    out += [like(length, keys), like(length, plan.chunk)]
  if plan.fresh:
    out += [like(length, keys), like(count, keys, dtype=jnp.float32)]
    out += [like(length, keys)] * plan.delta
  grid, warps, args = (heads, count), plan.warps[0], inputs.inside()
  kept = len(out)
  out += [like(length, plan.chunk, dtype=jnp.float32)] * plan.delta
  kernel = stateless.forward_kernel
  found = _call(kernel, 'scan_inside', out, grid, warps, 1, plan, *args)
  return found[:kept], found[kept:]


def _along_kernel(*refs, plan):
  inside, refs = Inside.of(refs, plan)
  product = functools.partial(dot, precision=plan.precision)
  v_ref, state_ref, *refs = refs
  fresh = None
  if plan.fresh:
    fresh_ref, *refs = refs
    fresh = fresh_ref[pl.program_id(0), :, :]
  y_ref, last_ref, *kept_refs = refs
  head = pl.program_id(0)
  example, own, _ = plan.place(head)

  def body(index, state):
    here = pl.ds(index * plan.chunk, plan.chunk)
    at = example, here, own, slice(None)
    narrow = state.astype(v_ref.dtype)
    written = v_ref[at]
    if plan.delta:
      written = product(inside.solve[head, here, :], written)
      written -= product(inside.old[head, here, :], narrow)
      if plan.fresh:
        written -= product(
          inside.fresh_old[head, here, :], fresh.astype(v_ref.dtype)
        )
      written = written.astype(v_ref.dtype)
    y = product(inside.read[head, here, :], narrow)
    y += product(inside.score[head, here, :], written)
    if kept_refs[plan.delta :]:
      kept_refs[0][head, index, :, :] = narrow
    if plan.delta and kept_refs:
      kept_refs[-1][at] = written
    state = inside.whole[head, index, :][:, None] * state
    if plan.fresh:
      y += product(inside.fresh_read[head, here, :], fresh.astype(v_ref.dtype))
      state += inside.fresh_whole[head, index, :][:, None] * fresh
    y_ref[at] = y.astype(y_ref.dtype)
    return state + product(inside.write[head, here, :].T, written)

  state = state_ref[head, :, :].astype(jnp.float32)
  count = inside.whole.shape[1]
  last_ref[head, :, :] = jax.lax.fori_loop(0, count, body, state)


@functools.partial(jax.jit, static_argnames=('plan', 'keep'))
def _along(inside, inputs, plan, keep):
  """Outputs and the last state; kept: starts, and what the delta rule wrote."""
  v, state = inputs.v, inputs.state
  like_v = jax.ShapeDtypeStruct(v.shape, v.dtype)
  out = [like_v, jax.ShapeDtypeStruct(state.shape, jnp.float32)]
  if keep:
    heads, *sizes = state.shape
    count = v.shape[1] // plan.chunk
    out.append(jax.ShapeDtypeStruct((heads, count, *sizes), v.dtype))
  if plan.written or (keep and plan.delta):
    out.append(like_v)
  args = (*inside, v, *inputs.states())
  grid, warps = state.shape[:1], plan.warps[1 + keep]
  return _call(_along_kernel, 'scan_along', out, grid, warps, 2, plan, *args)


def _back_kernel(*refs, plan):
  inside, refs = Inside.of(refs, plan)
  product = functools.partial(dot, precision=plan.precision)
  fresh = fresh_ref = None
  if plan.fresh:
    fresh_ref, *refs = refs
    fresh = fresh_ref[pl.program_id(0), :, :]
  v_ref, written_ref, start_ref, dy_ref, dlast_ref, *refs = refs
  if plan.written:
    dwritten_ref, *refs = refs
  dv_ref, dstate_ref, *refs = refs
  if plan.fresh:
    dfresh_ref, *refs = refs
  grads, _ = Inside.of(refs, plan)
  head, count = pl.program_id(0), inside.whole.shape[1]
  example, own, _ = plan.place(head)
  dtype = v_ref.dtype

  def body(step, sums):
    dstate, dfresh = sums
    index = count - 1 - step
    here = pl.ds(index * plan.chunk, plan.chunk)
    at = example, here, own, slice(None)
    start = start_ref[head, index, :, :]
    dy = dy_ref[at]
    written = written_ref[at]
    narrow = dstate.astype(dtype)
    grads.read[head, here, :] = product(dy, start.T)
    grads.write[head, here, :] = product(written, narrow.T)
    grads.whole[head, index, :] = (dstate * start.astype(jnp.float32)).sum(1)
    grads.score[head, here, :] = product(dy, written.T)
    dwritten = product(inside.score[head, here, :].T, dy)
    dwritten += product(inside.write[head, here, :], narrow)
    if plan.written:
      dwritten += dwritten_ref[at].astype(jnp.float32)
    if plan.fresh:
      share = inside.fresh_whole[head, index, :][:, None]
      grads.fresh_whole[head, index, :] = (dstate * fresh).sum(1)
      grads.fresh_read[head, here, :] = product(dy, fresh.astype(dtype).T)
      dfresh += share * dstate
      dfresh += product(inside.fresh_read[head, here, :].T, dy)
    dstate = inside.whole[head, index, :][:, None] * dstate
    dstate += product(inside.read[head, here, :].T, dy)
    if plan.delta:
      dwritten = dwritten.astype(dtype)
      grads.old[head, here, :] = -product(dwritten, start.T)
      grads.solve[head, here, :] = product(dwritten, v_ref[at].T)
      dstate -= product(inside.old[head, here, :].T, dwritten)
      if plan.fresh:
        dold = -product(dwritten, fresh.astype(dtype).T)
        grads.fresh_old[head, here, :] = dold
        dfresh -= product(inside.fresh_old[head, here, :].T, dwritten)
      dwritten = product(inside.solve[head, here, :].T, dwritten)
    dv_ref[at] = dwritten.astype(dv_ref.dtype)
    return dstate, dfresh

  dlast = dlast_ref[head, :, :].astype(jnp.float32)
  dfresh = jnp.zeros_like(dlast) if plan.fresh else 0.0
  dstate, dfresh = jax.lax.fori_loop(0, count, body, (dlast, dfresh))
  dstate_ref[head, :, :] = dstate
  if plan.fresh:
    dfresh_ref[head, :, :] = dfresh


@functools.partial(jax.jit, static_argnames='plan')
def _back(inside, inputs, written, starts, cotangents, plan):
  """Gradients of v, of the states and of what `_inside` gives."""
  v = inputs.v
  states = inputs.states()
  wide = [
    jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*states, *inside)
  ]
  out = [jax.ShapeDtypeStruct(v.shape, v.dtype), *wide]
  args = (*inside, *states[1:], v, written, starts, *cotangents)
  grid, warps = inputs.state.shape[:1], plan.warps[2]
  dv, *rest = _call(_back_kernel, 'scan_back', out, grid, warps, 1, plan, *args)
  return dv, rest[: len(states)], rest[len(states) :]


@functools.partial(jax.jit, static_argnames='plan')
def _inside_back(inputs, kept, dinside, plan):
  """Gradients of q, k, g, and of beta or, by chunk, of the bonus."""
  shape = inputs.g.shape
  heads, count = len(inputs.state), shape[1] // plan.chunk

  def like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  dtype = inputs.q.dtype if plan.repeats == 1 else jnp.float32
  out = [like(shape, dtype)] * 2 + [like(shape)]
  if plan.delta:
    out.append(like(shape[:3]))
  if plan.exclusive:
    out.append(like((heads, count, shape[3])))
  args = (*inputs.inside(), *kept, *dinside)
  grid, warps = (heads, count), plan.warps[0]
  kernel = stateless.backward_kernel
  dq, dk, *rest = _call(
    kernel, 'scan_inside_back', out, grid, warps, 1, plan, *args
  )

  def shared(x, like):
    """Sums over the heads of values that a head of keys serves."""
    x = x.reshape(*like.shape[:3], plan.repeats, -1).sum(3)
    return x.astype(like.dtype)

  return shared(dq, inputs.q), shared(dk, inputs.k), *rest
