r"""Goes on with a text, by the language model of a run.

  python -m recursive_weights.generate --workdir=runs/hybrid_lm \
      --prompt='The "for" ' --count=400 --temperature=0.8 [--session=FILE]

The text appears as it is written, in constant memory, until `--count` tokens or
the end of the document. With `--session` its state is saved in FILE; where FILE
is there, the text goes on from it, the prompt after all that was read before.
A state means nothing to other weights than its own: after more training, or in
another run with the same tokens, `--rebuild` reads the session's text again.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from recursive_weights import command
from recursive_weights.interfaces import UserError

BLOCK = 16  # tokens that appear together


def main(overrides):
  given = flags.FLAGS
  if not given.workdir:
    raise UserError('give --workdir')
  names = 'prompt count seed session rebuild temperature top_k top_p'
  fields = {name: given[name].value for name in names.split()}
  for said in write(given.workdir, overrides, **fields):
    print(said, end='', flush=True)
  print()


def write(
  workdir: str,
  overrides: Sequence[str] = (),
  *,
  prompt: str = '',
  count: int = 400,
  seed: int = 0,
  session: str = '',
  rebuild: bool = False,
  **fields,
) -> Iterator[str]:
  """The prompt and what follows it, piece by piece; arguments are the flags.

  Raises:
    UserError: the run, the session, the prompt or a number cannot be used.
  """
  from recursive_weights.decoding import generate, sampling, sessions
  from recursive_weights.derivation import tree

  choose = sampling.make(**fields)
  if rebuild and not session:
    raise UserError('rebuild must have a session to read: give --session=FILE')
  path = pathlib.Path(session)
  if not path.parent.is_dir():
    raise UserError(f'no folder {str(path.parent)!r} for the session')
  model, text, stored = _restored(workdir, overrides)
  weights = sessions.fingerprint(stored) if session else ''
  params = tree.derive(model.rules, stored)
  stream = generate.start(model.decoder, params, jnp.array([seed]))
  told, begin = [np.zeros(0, np.int32)], [text.boundary]
  if rebuild or (session and path.exists()):
    told, begin = sessions.texts(path), []
    if rebuild:
      if len(told) > 1:
        raise UserError(f'{path} must be of one text, got {len(told)}')
      stream = sessions.rebuild(
        path, model.decoder, params, boundary=text.boundary
      )
    else:
      stream = sessions.load(path, stream, weights=weights)
  told += [np.array([*begin, *text.encode(prompt)], np.int32)]
  if len(told[-1]):
    tokens_BT, length_B = map(jnp.asarray, generate.padded(told[-1:]))
    stream = generate.read(
      model.decoder, params, stream, tokens_BT, length_B, boundary=text.boundary
    )
  how = {'count': BLOCK, 'choose': choose, 'end': text.boundary}
  go_on = jax.jit(functools.partial(generate.write, model.decoder, **how))
  yield prompt
  held = np.zeros(0, np.int32)
  for done in range(0, count, BLOCK):
    limit_B = jnp.array([min(count - done, BLOCK)])
    tokens_BT, length_B, stream = go_on(params, stream, limit_B)
    new = np.asarray(tokens_BT[0, : length_B[0]])
    told += [new] if session else []
    held = np.concatenate([held, new])
    said = text.decode(held)
    if not said.endswith('\ufffd'):  # else within a character: bytes wait
      yield said
      held = held[:0]
    if stream.done_B[0]:
      break
  yield text.decode(held)
  if session:
    all_T = np.concatenate(told)  # a session may lack its text
    texts = [all_T] if len(all_T) == stream.position_B[0] else []
    sessions.save(path, stream, weights=weights, texts=texts)


def _restored(workdir, overrides):
  from recursive_weights import build, config, restore

  stored, load = restore.workdir(workdir)
  data = config.to_data(command.override(config.from_data(stored), overrides))
  task = build.build_task(data, data['seed'])
  model = build.build_model(data, task)
  if model.decoder is None or task.text is None:
    raise UserError(f'{workdir} must be a run of a language model')
  params = load(build.parameter_shapes(data), data['raw'])
  if data['num_seeds'] > 1:  # the first one writes
    params = jax.tree.map(lambda x: x[0], params)
  return model, task.text, params


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'of train.py, or a checkpoint in it')
  flags.DEFINE_string('prompt', '', 'how the text begins, or goes on')
  flags.DEFINE_integer('count', 400, 'most tokens', lower_bound=1)
  flags.DEFINE_float('temperature', 0.8, '0 for the likeliest token')
  flags.DEFINE_integer('top_k', 0, 'so many of the likeliest; 0 for all')
  flags.DEFINE_float('top_p', 0.95, 'the likeliest that together have so much')
  flags.DEFINE_integer('seed', 0, 'of a text that begins', 0, 2**31 - 1)
  flags.DEFINE_string('session', '', 'file of the state, to go on from')
  flags.DEFINE_bool('rebuild', False, "read the session's text again")
  command.run(main, __doc__)
