"""What train.py and eval.py share: flags, config files, errors of the user."""

import ast
import contextlib
import importlib.util
import logging
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from recursive_weights.interfaces import UserError


def read_config_file(text: str) -> ConfigDict:
  """`configs/NAME.py[:variant]` -> `get_config(variant)`.

  Raises:
    UserError: no such file, it is no Python, or it has no get_config.
  """
  path, _, variant = text.partition(':')
  return read_module(path).get_config(variant or None)


def read_module(path: str):
  """A config file as a module. Errors as for `read_config_file`."""
  if not pathlib.Path(path).is_file():
    # Some files there are parts that configs share.
    found = sorted(
      str(p)
      for p in pathlib.Path('configs').glob('[!_]*.py')
      if 'def get_config(' in p.read_text('utf-8')
    )
    raise UserError(
      f'no config file {path!r}; there are: {", ".join(found) or "none here"}'
    )
  if not path.endswith('.py'):
    raise UserError(
      f'--config must be a Python file with get_config, got {path!r}: give one '
      'whose name ends in .py'
    )
  spec = importlib.util.spec_from_file_location(
    f'config_{pathlib.Path(path).stem}', path
  )
  assert spec is not None and spec.loader is not None  # it is a .py file
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path} has no function get_config(variant)')
  return module


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
  """Applies `--config.field=value` flags; fields and types are checked.

  Raises:
    UserError: every unknown field and wrong type, in one message.
  """
  config = config.copy_and_resolve_references()
  errors = []
  for argument in arguments:
    name, _, text = argument.lstrip('-').removeprefix('config.').partition('=')
    try:
      node = _find(config, name)
      config.update_from_flattened_dict({name: _parse(name, text, node)})
    except UserError as error:
      errors.append(str(error))
  if errors:
    raise UserError('; '.join(errors))
  return config


def _find(config, name):
  node = config
  for depth, part in enumerate(name.split('.')):
    if not isinstance(node, ConfigDict) or part not in node:
      where = '.'.join(['config', *name.split('.')[:depth]])
      fields = sorted(node) if isinstance(node, ConfigDict) else []
      raise UserError(
        f'config.{name} is no field; {where} has: '
        f'{", ".join(fields) or "no fields"}'
      )
    node = node[part]
  if isinstance(node, ConfigDict):
    raise UserError(
      f'config.{name} is a group: set one of its fields, '
      f'{", ".join(sorted(node))}'
    )
  return node


def _parse(name, text, now):
  """`text` as a value of the type that the field has now."""
  if isinstance(now, str):
    return text
  if isinstance(now, bool):
    words = {'true': True, '1': True, 'false': False, '0': False}
    if text.lower() in words:
      return words[text.lower()]
  else:
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval(text)
      if isinstance(now, float) and type(value) in (int, float):
        return float(value)
      if isinstance(now, tuple) and isinstance(value, list | tuple):
        return tuple(value)
      if type(value) is type(now):
        return value
  raise UserError(
    f'config.{name} must be {type(now).__name__}, as in {now!r}; got {text!r}'
  )


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """(the rest, `--config.x=value` flags), values after a blank joined."""
  rest, found = [], []
  arguments = list(arguments)
  while arguments:
    argument = arguments.pop(0)
    if not re.match(r'--?config\.', argument):
      rest.append(argument)
      continue
    if '=' not in argument and arguments and arguments[0][:2] != '--':
      argument = f'{argument}={arguments.pop(0)}'
    found.append('--' + argument.lstrip('-'))
  return rest, found


def numbers(flag: str, texts: Sequence[str], kind: type = float) -> list:
  """The values of a list flag.

  Raises:
    UserError: one is no number of this kind, negative, infinite or nan.
  """
  try:
    found = [kind(text) for text in texts]
  except ValueError:
    found = [-1]
  if not all(0 <= value < math.inf for value in found):
    raise UserError(
      f'--{flag} must be finite numbers >= 0 of type {kind.__name__}, joined '
      f'by commas, got {",".join(texts)!r}'
    )
  return found


def fail(message: str, code: int = 2):
  """Prints one message and exits; standard output stays clean."""
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def run(main: Callable[[list[str]], None], description: str) -> None:
  """Runs `main(config overrides)` with flags parsed and errors explained.

  Errors of the user end with one message and exit code 2. `--help` lists the
  flags of this program alone.
  """
  from recursive_weights.training.loop import Diverged

  # Our own lines; of the libraries only warnings.
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(message)s'))
  ours = logging.getLogger('recursive_weights')
  ours.addHandler(handler)
  ours.setLevel(logging.INFO)
  ours.propagate = False
  rest, overrides = split_overrides(sys.argv)
  if any(a in ('--help', '-h', '-help', '--helpfull') for a in rest):
    print(f'{description}\nFlags:\n{flags.FLAGS.module_help(sys.argv[0])}')
    print('  --config.FIELD: overrides a field of the config')
    sys.exit(0)

  try:
    left = flags.FLAGS(rest)
    if len(left) > 1:
      raise UserError(
        f'unexpected argument {left[1]!r}: flags are --name=value'
      )
  except flags.Error as error:
    fail(str(error).split('\n')[0])
  except UserError as error:
    fail(str(error))

  def guarded(_):
    try:
      main(overrides)
    except UserError as error:
      fail(str(error))
    except Diverged as error:
      fail(str(error), code=3)
    except KeyboardInterrupt:
      fail('interrupted', code=130)

  app.run(guarded, argv=rest[:1], flags_parser=lambda argv: argv)
