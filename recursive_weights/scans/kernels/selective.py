"""Mamba-1's scan as a GPU kernel, forward and backward (Pallas, Triton).

A program takes some channels of one example through all tokens, their states in
registers. Kept for the backward pass are the states at the start of every
chunk; it makes those between again, a chunk at a time, and goes back through
them. Gradients of B and C are sums over channels, of which a program has a
part, so they come in parts that are added up after it.

On one H200 8 x 4,096 tokens of 2,048 channels with 16 entries (x, B and C of
bfloat16, chunks of 32, ten calls in flight) take 6.8 ms forward and 15.6 ms
with backward, 12.4 and 100.7 chunked. That is 1.6 and 1.1 % of what the memory
allows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.scans import kernels

ENTRIES = 1024  # of a program's states, at most; 8 in a thread of 4 warps
WARPS = 4


class Plan(NamedTuple):
  """What is known before a trace.

  block: channels of a program. chunk: tokens. fresh: resets bring in a state.
  """

  block: int
  chunk: int
  fresh: bool
  interpret: bool


def fits(width: int, entries: int) -> bool:
  """Whether the kernel takes D channels of N entries."""
  return width % 16 == 0 and 1 < entries <= 64 and entries & (entries - 1) == 0


def scan(
  x_BTD: Array,
  dt_BTD: Array,
  a_DN: Array,
  b_BTN: Array,
  c_BTN: Array,
  state_BDN: Array,
  fresh_BDN: Array | None,
  resets_BT: Array,
  *,
  chunk: int,
  interpret: bool | None = None,
) -> tuple[Array, Array, Array]:
  """Outputs, the last state and those at the start of every chunk.

  Args:
    x_BTD, dt_BTD, a_DN, b_BTN, c_BTN, state_BDN, fresh_BDN: as in
      `scans.selective`, all float32; T is a multiple of the chunk.
    resets_BT: bool.
    chunk: tokens of a chunk.
    interpret: run without a GPU, slowly; None: where there is none.

  Returns:
    `y [B, T, D]`, `[B, D, N]` and `[chunks, B, D, N]`, float32.

  Raises:
    ValueError: sizes that `fits` refuses.
    UserError: a GPU that cannot run kernels.
  """
  width, entries = a_DN.shape
  if not fits(width, entries):
    raise ValueError(
      "algorithm 'fused' takes channels in multiples of 16 and entries that "
      f'are a power of two from 2 to 64, got {width} and {entries}'
    )
  if interpret is None:
    kernels.check_gpu()
    interpret = jax.default_backend() != 'gpu'
  block = min(width & -width, ENTRIES // entries)
  plan = Plan(block, chunk, fresh_BDN is not None, interpret)
  inputs: tuple = x_BTD, dt_BTD, a_DN, b_BTN, c_BTN, state_BDN
  if fresh_BDN is not None:
    inputs = (*inputs, fresh_BDN)
  return _scan(inputs, resets_BT.astype(jnp.float32), plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs, resets_BT, plan):
  return _forward(inputs, resets_BT, plan)


def _scan_forward(inputs, resets_BT, plan):
  found = _forward(inputs, resets_BT, plan)
  return found, (inputs, resets_BT, found[2])


def _scan_backward(plan, saved, cotangents):
  inputs, resets_BT, starts = saved
  grads = _backward(inputs, resets_BT, starts, cotangents, plan)
  return grads, jnp.zeros_like(resets_BT)


_scan.defvjp(_scan_forward, _scan_backward)


class _Refs(NamedTuple):
  """The inputs; `fresh` only where the plan has it."""

  x: Any
  dt: Any
  a: Any
  b: Any
  c: Any
  state: Any
  resets: Any
  fresh: Any = None

  @classmethod
  def of(cls, refs, plan):
    """From the first of some, and the others."""
    count = 7 + plan.fresh
    return cls(*refs[:count]), refs[count:]


class _Part(NamedTuple):
  """Channels of an example, as indices of arrays."""

  example: Any
  number: Any
  channels: Any

  @classmethod
  def here(cls, plan):
    number = pl.program_id(1)
    channels = pl.ds(number * plan.block, plan.block)
    return cls(pl.program_id(0), number, channels)

  @property
  def state(self):
    return self.example, self.channels, slice(None)

  def entered(self, state, refs, fresh, token):
    """The state that a token meets: the fresh one at a reset."""
    reset = refs.resets[self.example, token] > 0
    return jnp.where(reset, 0.0 if fresh is None else fresh, state)

  def factors(self, refs, a, token):
    """dt, x, B and the decay of a token."""
    at = self.example, token, self.channels
    dt, x = refs.dt[at], refs.x[at]
    b = refs.b[self.example, token, :]
    return dt, x, b, jnp.exp(dt[:, None] * a)


def _step(part, refs, a, fresh, state, token):
  dt, x, b, decay = part.factors(refs, a, token)
  state = part.entered(state, refs, fresh, token)
  return decay * state + (dt * x)[:, None] * b[None]


def _forward_kernel(*refs, plan):
  refs, (y_ref, last_ref, start_ref) = _Refs.of(refs, plan)
  part = _Part.here(plan)
  a = refs.a[part.channels, :]
  fresh = refs.fresh[part.state] if plan.fresh else None

  def one(token, state):
    state = _step(part, refs, a, fresh, state, token)
    c = refs.c[part.example, token, :]
    y_ref[part.example, token, part.channels] = (state * c[None]).sum(1)
    return state

  def body(index, state):
    start_ref[(index, *part.state)] = state
    first = index * plan.chunk
    return jax.lax.fori_loop(first, first + plan.chunk, one, state)

  state = refs.state[part.state]
  last_ref[part.state] = jax.lax.fori_loop(0, start_ref.shape[0], body, state)


def _meet(plan):
  """Threads wait for each other: one may read what another has written."""
  if not plan.interpret:
    plgpu.debug_barrier()


def _backward_kernel(*refs, plan):
  refs, others = _Refs.of(refs, plan)
  start_ref, dy_ref, dlast_ref, dstart_ref, *others = others
  dx_ref, ddt_ref, da_ref, db_ref, dc_ref, dstate_ref, *others = others
  *dfresh_refs, before_ref = others
  part = _Part.here(plan)
  example = part.example
  a = refs.a[part.channels, :]
  fresh = refs.fresh[part.state] if plan.fresh else None

  def body(step, sums):
    index = start_ref.shape[0] - 1 - step
    first = index * plan.chunk

    def again(offset, state):
      """What every token of the chunk met, before its reset."""
      before_ref[(offset, *part.state)] = state
      return _step(part, refs, a, fresh, state, first + offset)

    def one(step, sums):
      state, dstate, da, dfresh = sums
      offset = plan.chunk - 1 - step
      token = first + offset
      at = example, token, part.channels
      dt, x, b, decay = part.factors(refs, a, token)
      dy, c = dy_ref[at], refs.c[example, token, :]
      before = before_ref[(offset, *part.state)]
      dc_ref[example, token, part.number, :] = (dy[:, None] * state).sum(0)
      dstate += dy[:, None] * c[None]
      db_ref[example, token, part.number, :] = ((dt * x)[:, None] * dstate).sum(
        0
      )
      dwritten = (dstate * b[None]).sum(1)
      dx_ref[at] = dt * dwritten
      met = part.entered(before, refs, fresh, token)
      dlog = dstate * met * decay
      ddt_ref[at] = x * dwritten + (dlog * a).sum(1)
      da += dt[:, None] * dlog
      dstate *= decay
      reset = refs.resets[example, token] > 0
      if plan.fresh:
        dfresh += jnp.where(reset, dstate, 0.0)
      return before, jnp.where(reset, 0.0, dstate), da, dfresh

    start = start_ref[(index, *part.state)]
    _meet(plan)
    state = jax.lax.fori_loop(0, plan.chunk, again, start)
    _meet(plan)
    _, *sums = jax.lax.fori_loop(0, plan.chunk, one, (state, *sums))
    dstate, *sums = sums
    return dstate + dstart_ref[(index, *part.state)], *sums

  dlast = dlast_ref[part.state]
  dfresh = jnp.zeros_like(dlast) if plan.fresh else 0.0
  dstate, da, dfresh = jax.lax.fori_loop(
    0, start_ref.shape[0], body, (dlast, jnp.zeros_like(dlast), dfresh)
  )
  dstate_ref[part.state] = dstate
  da_ref[part.state] = da
  for ref in dfresh_refs:
    ref[part.state] = dfresh


@functools.partial(jax.jit, static_argnames='plan')
def _forward(inputs, resets_BT, plan):
  x, *_ = inputs
  count = x.shape[1] // plan.chunk
  shape = inputs[5].shape
  return _run(
    *(_forward_kernel, 'selective_forward'),
    [x.shape, shape, (count, *shape)],
    *(inputs, resets_BT, (), plan),
  )


@functools.partial(jax.jit, static_argnames='plan')
def _backward(inputs, resets_BT, starts, cotangents, plan):
  x, _, _, b, *_ = inputs
  shape = inputs[5].shape
  parts = x.shape[2] // plan.block
  apart = (*b.shape[:2], parts, b.shape[2])
  dx, ddt, da, db, dc, *dstates = _run(
    *(_backward_kernel, 'selective_backward'),
    [x.shape, x.shape, shape, apart, apart]
    + [shape] * (1 + plan.fresh)
    + [(plan.chunk, *shape)],
    *(inputs, resets_BT, (starts, *cotangents), plan),
  )
  return dx, ddt, da.sum(0), db.sum(2), dc.sum(2), *dstates[:-1]


def _run(kernel, name, shapes, inputs, resets_BT, others, plan):
  batch, _, width = inputs[0].shape
  args = (*inputs[:6], resets_BT, *inputs[6:], *others)
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    out_shape=tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes),
    grid=(batch, width // plan.block),
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=2),
    interpret=plan.interpret,
    name=name,
  )(*args)
