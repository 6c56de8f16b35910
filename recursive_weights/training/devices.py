"""Where a training lives: strategies on one mesh, for any number of devices.

Models know no devices. A `Placement` puts states and batches where a strategy
wants them and compiles the dispatch; `gather` gives back the plain state, the
same for every strategy, which is what checkpoints hold. So a run saved under
one strategy and device count goes on under any other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recursive_weights.interfaces import Tree, UserError
from recursive_weights.training.state import State, make_dispatch

STRATEGIES = ('data', 'fsdp', 'pmap')


class Placement(NamedTuple):
  """How one strategy places things.

  shardings: `abstract state -> shardings` of the plain state.
  scatter: `plain state -> placed state`.
  gather: `placed state -> plain state`, sharded as `shardings` says.
  batches: `NumPy tree of [K, B, ...] -> device arrays`.
  compile: `make_step(axis) -> dispatch(state, batches, first, count)` with a
    donated state; `make_step` is called with the mapped axis' name or None.
  """

  shardings: Callable[[Tree], Tree]
  scatter: Callable[[State], State]
  gather: Callable[[State], State]
  batches: Callable[[Tree], Tree]
  compile: Callable[[Callable], Callable]


def make_mesh(model_parallel: int = 1) -> jax.sharding.Mesh:
  """All devices as ('data', 'model'), with Auto axis types."""
  count = jax.device_count()
  if model_parallel < 1 or count % model_parallel:
    raise UserError(
      f'devices.model_parallel must divide the {count} devices, got '
      f'{model_parallel}'
    )
  return jax.make_mesh(
    (count // model_parallel, model_parallel),
    ('data', 'model'),
    (AxisType.Auto, AxisType.Auto),
  )


def fsdp_spec(shape: tuple[int, ...], devices: int, min_size: int) -> P:
  """Shards the largest axis that `devices` divides; small leaves stay whole."""
  sizes = [s if s % devices == 0 else 0 for s in shape]
  if not shape or max(sizes) == 0 or np.prod(shape) < min_size:
    return P()
  axis = int(np.argmax(sizes))
  return P(*[('data', 'model') if i == axis else None for i in range(axis + 1)])


def make(
  strategy: str,
  *,
  batch_size: int,
  accumulation: int = 1,
  seeds: int = 1,
  model_parallel: int = 1,
  min_size: int = 1024,
) -> Placement:
  """The placement for a strategy.

  Args:
    strategy: 'data' (state on every device, batch split), 'fsdp' (state split
      along its leaves' largest axes too) or 'pmap' (`jax.pmap`, one replica a
      device).
    batch_size: the global batch; the data axis must divide it.
    accumulation: micro-batches; under 'pmap' they divide each device's rows.
    seeds: members trained by vmap; leaves then have a leading axis E.
    model_parallel: size of the mesh's 'model' axis.
    min_size: leaves with fewer elements are not split by 'fsdp'.
  """
  if strategy not in STRATEGIES:
    raise UserError(
      f'devices.strategy must be one of {STRATEGIES}, got {strategy!r}'
    )
  mesh = make_mesh(model_parallel)
  data = mesh.shape['data']
  if batch_size % data:
    raise UserError(
      f'training.batch_size must be a multiple of the {data} devices of the '
      f'data axis, got {batch_size}'
    )
  # Batches are [K, B, ...], or [K, E, B, ...] with several seeds.
  batch_spec = P(None, 'data') if seeds == 1 else P(None, None, 'data')
  row_spec = P('data') if seeds == 1 else P(None, 'data')

  def shardings(state):
    def spec(leaf):
      if strategy == 'fsdp':
        return fsdp_spec(leaf.shape, mesh.size, min_size)
      return P()

    specs = jax.tree.map(spec, state)
    specs = specs._replace(carry=jax.tree.map(lambda _: row_spec, state.carry))
    return jax.tree.map(
      lambda s: NamedSharding(mesh, s),
      specs,
      is_leaf=lambda s: isinstance(s, P),
    )

  def batches(tree):
    sharding = NamedSharding(mesh, batch_spec)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index]
      ),
      tree,
    )

  def scatter(state):
    return jax.device_put(state, shardings(state))

  def compile_mesh(make_step):
    dispatch = make_dispatch(make_step(None))

    def constrained(state, batches, first, count):
      placed = shardings(state)
      state, metrics = dispatch(state, batches, first, count)
      return jax.lax.with_sharding_constraint(state, placed), metrics

    return jax.jit(constrained, donate_argnums=0)

  if strategy != 'pmap':
    return Placement(
      shardings, scatter, lambda state: state, batches, compile_mesh
    )
  if model_parallel != 1:
    raise UserError(
      'devices.model_parallel must be 1 under the pmap strategy, got '
      f'{model_parallel}'
    )

  if jax.process_count() > 1:
    raise UserError(
      'devices.strategy pmap serves one process: use data or fsdp for several'
    )
  devices = jax.device_count()
  if batch_size // devices % accumulation:
    raise UserError(
      'training.accumulation must divide the rows of each device under the '
      f'pmap strategy, {batch_size // devices}, got {accumulation}'
    )
  rows = 0 if seeds == 1 else 1  # the batch axis of a carry's leaves

  def split_rows(x, axis):
    """[..., B, ...] -> [devices, ..., B / devices, ...]."""
    x = x.reshape(
      *x.shape[:axis], devices, x.shape[axis] // devices, *x.shape[axis + 1 :]
    )
    order = (axis, *(i for i in range(x.ndim) if i != axis))
    return x.transpose(order)

  # Where jax.pmap puts its results: else the second call compiles once more.
  replicas = NamedSharding(
    jax.make_mesh((devices,), ('data',), (AxisType.Auto,)), P('data')
  )

  def stack(x):
    return np.stack([np.asarray(x)] * devices)

  def pmap_scatter(state):
    carry = state.carry
    placed = jax.tree.map(stack, state._replace(carry={}))
    placed = placed._replace(
      carry=jax.tree.map(lambda x: split_rows(np.asarray(x), rows), carry)
    )
    return jax.device_put(placed, replicas)

  def pmap_gather(state):
    def first(x):
      return np.asarray(x.addressable_shards[0].data)[0]

    def join(x):
      x = np.moveaxis(np.asarray(x), 0, rows)
      return x.reshape(*x.shape[:rows], -1, *x.shape[rows + 2 :])

    plain = jax.tree.map(first, state._replace(carry={}))
    plain = plain._replace(carry=jax.tree.map(join, state.carry))
    return scatter(plain)

  def pmap_batches(tree):
    axis = 1 if seeds == 1 else 2
    return jax.tree.map(lambda x: split_rows(x, axis), tree)

  def compile_pmap(make_step):
    mapped = jax.pmap(
      make_dispatch(make_step('data')),
      axis_name='data',
      in_axes=(0, 0, None, None),
      donate_argnums=0,
    )

    def dispatch(state, batches, first, count):
      state, metrics = mapped(state, batches, first, count)
      return state, jax.tree.map(lambda m: m[0], metrics)

    return dispatch

  return Placement(
    shardings, pmap_scatter, pmap_gather, pmap_batches, compile_pmap
  )


def initialize(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Joins the hosts of one training; nothing to do for a single process."""
  if coordinator_address is None:
    if num_processes not in (None, 1) or process_id not in (None, 0):
      raise UserError(
        f'num_processes is {num_processes} and process_id is {process_id}: '
        'give --coordinator_address (HOST:PORT of process 0) too'
      )
    return
  # Only read on CPU, where several processes talk through gloo.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except ValueError as error:  # an argument is missing or out of range
    raise UserError(f'the processes cannot be joined: {error}') from error
