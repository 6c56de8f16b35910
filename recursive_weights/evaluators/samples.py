"""Text that a language model writes, for people to read."""

import logging
import pathlib

import jax
import numpy as np

from recursive_weights import interfaces
from recursive_weights.decoding import generate, sampling
from recursive_weights.derivation import tree
from recursive_weights.interfaces import UserError

_log = logging.getLogger(__name__)
_GRAM = 4


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  output_dir: str = '',
  prompts: tuple[str, ...] = ('',),
  copies: int = 2,
  count: int = 400,
  temperature: float = 0.8,
  top_k: int = 0,
  top_p: float = 0.95,
) -> interfaces.Evaluator:
  """Writes continuations of prompts to `output_dir/samples.txt`.

  Every prompt begins a document; a text ends where the model ends the document,
  or after `count` tokens. Of several seeds, the last one's samples stay. A
  prompt with a character that the task's text lacks is left out, with a line in
  the log, as long as others remain.

  Args:
    objective: not used: text is what the decoder writes.
    batch_size: not used: all samples are written together.
    output_dir: folder to write to; '' for nowhere.
    prompts: how texts begin; '' for the beginning of a document.
    copies: texts of each prompt.
    count: longest text.
    temperature, top_k, top_p: see `decoding.sampling`.

  Returns:
    An evaluator with the key `samples/distinct`: the share of distinct ones
    among all runs of 4 tokens; a model that repeats itself has few.

  Raises:
    UserError: the model is no language model, the task is no text, every prompt
      has a character without a token, or a number is out of range.
  """
  del objective, batch_size
  decoder, text = model.decoder, task.text
  if decoder is None or text is None:
    raise UserError('samples needs a language model and a task that is a text')
  if copies < 1 or count < 1:
    raise UserError(f'copies and count must be > 0, got {copies} and {count}')
  if not prompts:
    raise UserError(f'prompts must be one text or more, got {prompts}')
  choose = sampling.make(temperature=temperature, top_k=top_k, top_p=top_p)
  begin = np.array([text.boundary], np.int32)
  rows = {
    prompt: np.concatenate([begin, tokens_T])
    for prompt, tokens_T in _encoded(text, prompts).items()
  }
  tokens_BT, length_B = generate.padded(
    [x for x in rows.values() for _ in range(copies)]
  )

  @jax.jit
  def write(params, seed_B):
    params = tree.derive(model.rules, params)
    stream = generate.start(decoder, params, seed_B)
    stream = generate.read(
      decoder, params, stream, tokens_BT, length_B, boundary=text.boundary
    )
    limit_B = np.full(len(length_B), count, np.int32)
    return generate.write(
      decoder,
      params,
      stream,
      limit_B,
      count=count,
      choose=choose,
      end=text.boundary,
      boundary=text.boundary,
    )[:2]

  def evaluate(params, key):
    seed_B = jax.random.randint(key, (len(length_B),), 0, np.int32(2**31 - 1))
    written_BT, written_B = jax.device_get(write(params, seed_B))
    found = [
      row[:length] for row, length in zip(written_BT, written_B, strict=True)
    ]
    if output_dir and jax.process_index() == 0:
      shown = [prompt for prompt in rows for _ in range(copies)]
      _write(
        pathlib.Path(output_dir) / 'samples.txt',
        [a + text.decode(b) for a, b in zip(shown, found, strict=True)],
      )
    return {'samples/distinct': _distinct(found)}

  return evaluate


def _encoded(text, prompts):
  """Tokens by prompt, of those that have them.

  Raises:
    UserError: none has.
  """
  found, errors = {}, []
  for prompt in prompts:
    try:
      found[prompt] = text.encode(prompt)
    except UserError as error:
      errors.append(f'{prompt!r} cannot be written in this text ({error})')
  if not found:
    raise UserError(f'prompts: {"; ".join(errors)}: choose one that can')
  # Prompts of a config are for its own text; another one may lack a letter.
  for line in errors:
    _log.warning('samples without a prompt: %s', line)
  return found


def _distinct(rows):
  """Share of distinct runs of tokens; 1 where there are none."""
  runs = [
    tuple(row[i : i + _GRAM].tolist())
    for row in rows
    for i in range(len(row) - _GRAM + 1)
  ]
  return len(set(runs)) / len(runs) if runs else 1.0


def _write(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  line = '-' * 40
  path.write_text(f'\n{line}\n'.join(texts) + '\n', encoding='utf-8')
