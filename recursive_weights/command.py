"""What train.py and eval.py share: flags, config files, errors of the user."""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from recursive_weights.interfaces import UserError


def read_config_file(text: str) -> ConfigDict:
  """`configs/NAME.py[:variant]` -> `get_config(variant)`.

  Raises:
    UserError: no such file, or it has no get_config.
  """
  path, _, variant = text.partition(':')
  if not pathlib.Path(path).is_file():
    found = sorted(str(p) for p in pathlib.Path('configs').glob('[!_]*.py'))
    raise UserError(
      f'no config file {path!r}; there are: {", ".join(found) or "none here"}'
    )
  spec = importlib.util.spec_from_file_location(
    f'config_{pathlib.Path(path).stem}', path
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path} has no function get_config(variant)')
  return module.get_config(variant or None)


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
  """Applies `--config.field=value` flags; fields and types are checked.

  Raises:
    UserError: every unknown field and wrong type, in one message.
  """
  config = config.copy_and_resolve_references()
  errors = []
  for argument in arguments:
    name = argument.lstrip('-').partition('=')[0].removeprefix('config.')
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict('config', config.lock(), flag_values=values)
    try:
      with open(os.devnull, 'w') as quiet, contextlib.redirect_stderr(quiet):
        values(['', argument])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
      errors.append(_explain(config, name, argument, e))
  if errors:
    raise UserError('; '.join(errors))
  return config


def _explain(config, name, argument, error):
  value = argument.partition('=')[2]
  node = config
  for depth, part in enumerate(name.split('.')):
    if not isinstance(node, ConfigDict) or part not in node:
      where = '.'.join(name.split('.')[:depth])
      fields = sorted(node) if isinstance(node, ConfigDict) else []
      return (
        f'config.{name} is no field; config{"." if where else ""}{where} has: '
        f'{", ".join(fields) or "no fields"}'
      )
    node = node[part]
  if isinstance(node, ConfigDict):
    return (
      f'config.{name} is a group: set one of its fields '
      f'{", ".join(sorted(node))}'
    )
  kind = type(node).__name__
  del error
  return f'config.{name} must be {kind}, as in {node!r}; got {value!r}'


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

  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  rest, overrides = split_overrides(sys.argv)
  if any(a in ('--help', '-h', '-help', '--helpfull') for a in rest):
    print(f'{description}\n\nFlags:\n{flags.FLAGS.module_help(sys.argv[0])}')
    print(_own_flags())
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

  for noisy in ('orbax', 'jax._src', 'tensorboardX'):
    __import__('logging').getLogger(noisy).setLevel('WARNING')
  app.run(guarded, argv=rest[:1], flags_parser=lambda argv: argv)


def _own_flags() -> str:
  own = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
  lines = [f'  --{flag.name}: {flag.help}' for flag in own]
  lines.append('  --config.FIELD=VALUE: overrides a field of the config')
  return '\n'.join(lines)
