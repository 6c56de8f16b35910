"""Products on a Hopper GPU to which terms are added, see `kernels.hopper`.

Terms are tiles like the product's own. They are on their way while it is made,
and results leave from where they were. The two groups that multiply take tiles
by turns, so that one finishes its own while the other multiplies.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recursive_weights.interfaces import Array
from recursive_weights.models.kernels import hopper, tiling


class _Terms(NamedTuple):
  """Tiles that are added to a tile's products, and where its results are put.

  memory: `[sets, terms, rows, columns]`, a set for each of so many tiles.
  ready: of a group; free: of a set.
  """

  memory: Any
  ready: Any
  free: Any

  @staticmethod
  def scratch(tiles, dtype, count):
    """For `count` terms."""
    shape = tiles.rows, tiles.columns
    return {
      'memory': hopper.memory(*shape, dtype, tiles.sets, count),
      'ready': plgpu.Barrier(num_arrivals=count, num_barriers=2),
      'free': plgpu.Barrier(num_arrivals=1, num_barriers=tiles.sets),
    }

  def _set(self, number):
    return jax.lax.rem(number, self.memory.shape[0])

  def fetch(self, number, places):
    """Terms of a tile, from their `places` `(gmem, row, column)`."""
    which = self._set(number)

    @pl.when(number >= self.memory.shape[0])
    def _wait():
      plgpu.barrier_wait(self.free.at[which])

    ready = self.ready.at[jax.lax.rem(number, 2)]
    _, _, rows, columns = self.memory.shape
    for term, (gmem, row, column) in enumerate(places):
      at = pl.ds(row, rows), pl.ds(column, columns)
      plgpu.copy_gmem_to_smem(gmem.at[at], self.memory.at[which, term], ready)

  def drain(self, mine):
    """Waits until the last of `mine` tiles are out."""

    def body(number, carry):
      plgpu.barrier_wait(self.free.at[self._set(number)])
      return carry

    first = jnp.maximum(mine - self.memory.shape[0], 0)
    jax.lax.fori_loop(first, mine, body, 0)

  def read(self, number):
    """In float32."""
    plgpu.barrier_wait(self.ready.at[jax.lax.rem(number, 2)])
    places = self.memory.at[self._set(number)]
    count = self.memory.shape[1]
    return [places[term].astype(jnp.float32) for term in range(count)]

  def store(self, number, values, places):
    """Results, where the terms were, and from there to their places."""
    which = self._set(number)
    smems = [self.memory.at[which, term] for term in range(len(values))]
    for smem, value in zip(smems, values, strict=True):
      smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    _, _, rows, columns = self.memory.shape
    for smem, (gmem, row, column) in zip(smems, places, strict=True):
      at = pl.ds(row, rows), pl.ds(column, columns)
      plgpu.copy_smem_to_gmem(smem, gmem.at[at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(self.free.at[which])


def _product(
  finish: Callable,
  a_NK: Array,
  w_KD: Array,
  terms: list[tuple[Array, int]],
  scales: list[Array | None],
  *,
  results: int,
  sums: bool,
  tiles: hopper.Tiles,
  plan: hopper.Plan,
) -> tuple[Array, ...]:
  """What `finish` makes of `a w [N, D]` and of terms like it, tile by tile.

  Args:
    finish: `(product, terms, scales) -> (results, sums)`: of a tile's float32
      values, as many results as asked for, not more than terms, and a sum a row
      or None.
    terms: `(array, shift)`, of which columns `shift ... shift + D` are taken.
    scales: of rows `[N]`, or None.
    results: how many.
    sums: whether `finish` has them.

  Returns:
    The results side by side `[N, results D]`, and sums `[P, N]` of P tiles a
    row.

  Raises:
    ValueError: sizes that are not whole tiles.
  """
  (total, inner), width = a_NK.shape, w_KD.shape[1]
  grid = hopper.grid_of(tiles, total, inner, width)
  steps = inner // tiles.width
  given = [scale for scale in scales if scale is not None]

  def block(a_gmem, w_gmem, *refs):
    refs = list(refs)
    term_gmems = [(refs.pop(0), shift) for _, shift in terms]
    scale_gmems = [None if s is None else refs.pop(0) for s in scales]
    out_gmem, *sums_gmem = refs

    def scoped(left, right, full, empty, **scratch):
      loop = hopper.Loop(grid, steps, tiles, full, empty, alone=True)
      held = _Terms(**scratch)

      def fetch(number, step, slot, ready):
        row, column = loop.place(number)
        along = pl.ds(step * tiles.width, tiles.width)
        for gmem, at, smem in (
          (a_gmem, (pl.ds(row, tiles.rows), along), left),
          (w_gmem, (along, pl.ds(column, tiles.columns)), right),
        ):
          plgpu.copy_gmem_to_smem(gmem.at[at], smem.at[slot], ready)
        places = [(gmem, row, column + shift) for gmem, shift in term_gmems]
        # As soon as what is multiplied first is on its way.
        late = step == min(tiles.stages, steps) - 1
        pl.when(late)(functools.partial(held.fetch, number, places))

      def tile(number):
        row, column = loop.place(number)
        factors = [
          hopper.scale_of(gmem, row, tiles.rows, plan) for gmem in scale_gmems
        ]

        def accumulate(acc):
          def issue(slot):
            plgpu.wgmma(acc, left.at[slot], right.at[slot])

          loop.contract(number, issue, 1)
          product = acc[...]
          found = held.read(number)
          values, of_rows = finish(product, found, factors)
          for gmem in sums_gmem:
            part = jax.lax.div(column, tiles.columns)
            gmem[part, pl.ds(row, tiles.rows)] = of_rows
          places = [
            (out_gmem, row, column + which * width) for which in range(results)
          ]
          held.store(number, values, places)

        shape = tiles.rows, tiles.columns
        pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))

      loop.run(fetch, tile, held.drain)

    pl.run_scoped(
      scoped,
      left=hopper.memory(tiles.rows, tiles.width, a_NK.dtype, tiles.stages),
      right=hopper.memory(tiles.width, tiles.columns, a_NK.dtype, tiles.stages),
      **_Terms.scratch(tiles, a_NK.dtype, len(terms)),
      **hopper.barriers(tiles.stages, 2, alone=True),
      collective_axes='group',
    )

  out_type = [jax.ShapeDtypeStruct((total, results * width), a_NK.dtype)]
  if sums:
    out_type += [jax.ShapeDtypeStruct((grid[1], total), jnp.float32)]
  arrays = [array for array, _ in terms]
  return hopper.launch(
    block, tuple(out_type), plan, a_NK, w_KD, *arrays, *given
  )


@functools.partial(jax.jit, static_argnames='plan')
def kept_backward(
  down_FD: Array,
  both_N2F: Array,
  dr_ND: Array,
  plan: hopper.Plan,
  scale_N: Array | None = None,
) -> tuple[Array, ...]:
  """Gradients `[N, 2F]` of gate and up, from the products that `gated` kept.

  With a scale s these are s du and s dv, and there are sums `[P, N]` of u du
  over P parts of a row, u being gate.

  Raises:
    ValueError: sizes that are not whole tiles.
  """

  def finish(dh, terms, scales):
    du, dv, _ = tiling.swiglu_backward(*terms, dh)
    (scale,) = scales
    of_rows = None if scale is None else (terms[0] * du).sum(1)
    return [hopper.scaled(du, scale), hopper.scaled(dv, scale)], of_rows

  return _product(
    finish,
    dr_ND,
    down_FD.T,
    [(both_N2F, 0), (both_N2F, down_FD.shape[0])],
    [scale_N],
    results=2,
    sums=scale_N is not None,
    tiles=plan.kept,
    plan=plan,
  )


@functools.partial(jax.jit, static_argnames=('tiles', 'plan', 'squares'))
def added(
  a_NK: Array,
  w_KD: Array,
  terms: tuple[tuple[Array, Array | None], ...],
  tiles: hopper.Tiles,
  plan: hopper.Plan,
  squares: bool = False,
) -> tuple[Array, ...]:
  """`a w + sum_i s_i x_i` `[N, D]` of terms `(x [N, D], s [N])`, s = None one.

  If `squares`, also sums `[P, N]` of its squares, over P parts of a row.

  Raises:
    ValueError: sizes that are not whole tiles.
  """

  def finish(product, found, scales):
    for value, scale in zip(found, scales, strict=True):
      product += hopper.scaled(value, scale)
    return [product], (product * product).sum(1) if squares else None

  return _product(
    finish,
    a_NK,
    w_KD,
    [(x_ND, 0) for x_ND, _ in terms],
    [scale_N for _, scale_N in terms],
    results=1,
    sums=squares,
    tiles=tiles,
    plan=plan,
  )
