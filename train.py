r"""Trains what a config describes.

  python train.py --config=configs/NAME.py[:variant] --workdir=DIR \
      [--config.field=value ...]

A workdir that holds checkpoints goes on from the newest one.
"""

import json

from absl import flags

from recursive_weights import command

_CONFIG = flags.DEFINE_string(
  'config', None, 'configs/NAME.py, or configs/NAME.py:variant'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'folder of the run: checkpoints, metrics, pictures'
)
_PRINT = flags.DEFINE_boolean(
  'print_config', False, 'show the resolved config and leave'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of process 0, for several hosts'
)
_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'number of processes, for several hosts'
)
_PROCESS = flags.DEFINE_integer(
  'process_id', None, 'this process, from 0, for several hosts'
)


def main(overrides):
  from recursive_weights import build, config, interfaces
  from recursive_weights.training import devices, loop, metrics

  if _CONFIG.value is None:
    raise interfaces.UserError('give --config=configs/NAME.py')
  fields = command.override(command.read_config_file(_CONFIG.value), overrides)
  data = config.to_data(fields)
  if _PRINT.value:
    print(json.dumps(data, indent=2))
    return
  if _WORKDIR.value is None:
    raise interfaces.UserError('give --workdir=DIR, a folder for the run')
  devices.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  experiment = build.build(data, output_dir=_WORKDIR.value)
  results = loop.run(experiment, _WORKDIR.value)
  if results:
    print(metrics.table(results, f'\n{_WORKDIR.value}'))


if __name__ == '__main__':
  command.run(main, __doc__)
