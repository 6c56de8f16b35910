r"""Evaluates a trained model from its checkpoint alone.

  python eval.py --workdir=DIR | --pretrained=NAME \
      [--output_dir=DIR] [--config.field=value ...]

The last line of standard output is one JSON object.
"""

import json
import pathlib

from absl import flags

from recursive_weights import command

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'a workdir of train.py, or one checkpoint folder in it'
)
_PRETRAINED = flags.DEFINE_string(
  'pretrained', None, 'name of weights that the package ships'
)
_OUTPUT = flags.DEFINE_string(
  'output_dir', None, 'folder for results.json and pictures'
)
_BEST = flags.DEFINE_boolean(
  'best', False, 'the best checkpoint (config.checkpoint.best), not the newest'
)


def main(overrides):
  from recursive_weights import build, config, interfaces, restore
  from recursive_weights.training import metrics

  if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
    raise interfaces.UserError('give exactly one of --workdir, --pretrained')
  if _PRETRAINED.value is not None:
    stored, load = restore.pretrained(_PRETRAINED.value)
  else:
    stored, load = restore.workdir(_WORKDIR.value, best=_BEST.value)
  data = config.to_data(command.override(config.from_data(stored), overrides))
  results = build.evaluate(data, load, output_dir=_OUTPUT.value or '')
  print(metrics.table(results))
  text = json.dumps(metrics.finite(results))
  if _OUTPUT.value:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(text + '\n')
  print(text)


if __name__ == '__main__':
  command.run(main, __doc__)
