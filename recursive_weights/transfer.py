r"""Does an operator T learnt at one size serve at another?

  python -m recursive_weights.transfer \
      --config=configs/ctm_digits.py:polynomial \
      --trained=runs/compare/polynomial --num_seeds=3 \
      --workdir=runs/transfer --config.model.width=192 \
      [--config.field=value ...]

Trains the model at its new size three times, with T frozen: as it was learnt
in `--trained`, at random (from its start as far away as the learnt one, leaf
by leaf, in another direction), and at its start, the identity. Only operators
whose parameters do not depend on what the new size changes can be moved.
"""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
from absl import flags

from recursive_weights import command
from recursive_weights.io import json_files

_log = logging.getLogger('recursive_weights.transfer')  # even as __main__

_CONFIG = flags.DEFINE_string('config', None, 'configs/NAME.py:variant')
_TRAINED = flags.DEFINE_string('trained', None, 'workdir that T comes from')
_SEEDS = flags.DEFINE_integer('num_seeds', 3, 'seeds of each', lower_bound=1)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of all runs')

KINDS = ('identity', 'learnt', 'random')


def main(overrides):
  from recursive_weights import compare, interfaces

  for name in ('config', 'trained', 'workdir'):
    if not flags.FLAGS[name].value:
      raise interfaces.UserError(f'give --{name}')
  learnt = read_operators(_TRAINED.value)
  folder = pathlib.Path(_WORKDIR.value)
  overrides = [*overrides, f'--config.num_seeds={_SEEDS.value}']
  rows = [
    train(_CONFIG.value, kind, learnt, overrides, folder) for kind in KINDS
  ]
  for row in rows:
    row |= compare.against(row, rows[0])
  json_files.write(folder / 'table.json', rows)
  text = compare.table(rows)
  (folder / 'table.md').write_text(text)
  print(text)
  print(json.dumps({r['variant']: r['final_loss'] for r in rows}))


def read_operators(workdir: str):
  """`operators` of the first seed of a trained run.

  Raises:
    UserError: the run derives no weights.
  """
  from recursive_weights import build, restore
  from recursive_weights.interfaces import UserError

  stored, load = restore.workdir(workdir)
  params = load(build.parameter_shapes(stored), stored['raw'])
  if 'operators' not in params:
    raise UserError(f'{workdir} derives no weights: it has no T to move')
  operators = params['operators']
  if stored['num_seeds'] > 1:
    operators = jax.tree.map(lambda x: x[0], operators)
  return operators


def moved(kind: str, learnt, start, key):
  """The operators' parameters that a kind begins (and stays) with."""
  from recursive_weights.interfaces import UserError

  shapes = [jax.tree.map(jnp.shape, tree) for tree in (learnt, start)]
  if shapes[0] != shapes[1]:
    raise UserError(
      f'T does not fit the new size: it has shapes {shapes[0]}, the new model '
      f'wants {shapes[1]}. Choose an operator without widths (spectral, power, '
      'polynomial) or change another size'
    )
  if kind == 'identity':
    return start
  if kind == 'learnt':
    return learnt

  def turn(path, a, b):
    name = jax.tree_util.keystr(path)
    own = jax.random.fold_in(key, sum(name.encode()))
    noise = jax.random.normal(own, a.shape)
    length = jnp.linalg.norm(jnp.ravel(a - b))
    return b + noise * length / jnp.linalg.norm(jnp.ravel(noise))

  return jax.tree_util.tree_map_with_path(turn, learnt, start)


def train(
  path: str, kind: str, learnt, overrides: list[str], folder: pathlib.Path
) -> dict:
  """Trains the new size with T of this kind, frozen, and measures it."""
  from recursive_weights import build, compare, config

  fields = command.override(command.read_config_file(path), overrides)
  everything = fields.optimizer.groups.all.to_dict()
  fields.optimizer.groups = {
    'rest': everything | {'pattern': '^(?!operators/)'},
    'operators': everything | {'pattern': '^operators/', 'frozen': True},
  }
  data = config.to_data(fields)
  experiment = build.build(compare.brief(data))
  init = experiment.init

  def begin(seed):
    state = init(seed)
    operators = moved(
      kind, learnt, state.params['operators'], jax.random.key(seed)
    )
    params = state.params | {'operators': operators}
    ema = state.ema and state.ema | {'operators': operators}
    return state._replace(params=params, ema=ema)

  _log.info('T is %s', kind)
  return compare.measure(kind, experiment._replace(init=begin), folder / kind)


if __name__ == '__main__':
  command.run(main, __doc__)
