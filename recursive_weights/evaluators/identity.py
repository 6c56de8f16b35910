"""Does a language model stay in the person that a text begins as?"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.decoding import generate, sampling
from recursive_weights.derivation import tree
from recursive_weights.evaluators import _reading
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import recall

PERSONS = {
  'knight': 'sword armor thee thou castle honor battle lord squire',
  'scientist': 'data experiment hypothesis theory observe measure analyze',
  'pirate': 'arr matey ship treasure captain sea plunder crew',
}


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  persons: dict[str, str] = PERSONS,
  prompt: str = 'i am a {person}. ',
  lock: str = 'i like to eat ',
  neutral: str = 'i am here. ',
  copies: int = 8,
  count: int = 200,
  noise: int = 500,
  control: bool = True,
) -> interfaces.Evaluator:
  """Shares of a person's words in what is written, and a name after noise.

  A person's score is the share of written words that are in the list. Words
  that a model writes anyway say nothing, so each score stands beside that of a
  neutral prompt. Locked is a person who is then asked about food. A name is
  recalled where all of its tokens are the likeliest, of eight names: chance
  for a model that knows the names is .125.

  Args:
    batch_size: texts that are read together.
    persons: words of each.
    prompt: how a text begins, with `{person}`.
    lock: what follows it where a person is asked about food.
    neutral: how it begins without a person.
    copies: texts of each prompt, at temperature .8.
    count: tokens of each.
    noise: characters between a name and the question.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `identity/PERSON`, `/PERSON_locked`, `/PERSON_
    neutral`, `/mean`, `/mean_locked`, `/mean_neutral`, `/name` and `identity/
    random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, no person is in the prompt, or the text lacks a character.
  """
  decoder, text = _reading.check(
    *('identity', model, task),
    {
      'batch_size': batch_size,
      'copies': copies,
      'count': count,
      'persons': len(persons),
      'noise': noise,
    },
  )
  if '{person}' not in prompt:
    raise UserError(
      'identity.prompt must be a text with {person}, got ' + repr(prompt)
    )
  begin = np.array([text.boundary], np.int32)

  def tokens(words):
    found = _reading.encoded('identity', text, words)
    return np.concatenate([begin, found])

  lists = {name: set(words.lower().split()) for name, words in persons.items()}
  prompts = [neutral]
  for name in lists:
    told = prompt.replace('{person}', name)
    prompts += [told, told + lock]
  tokens_BT, length_B = generate.padded(
    [tokens(words) for words in prompts for _ in range(copies)]
  )
  names = _names(tokens, noise)
  read = _reading.make(model, task, objective, rows=batch_size)
  choose = sampling.make(temperature=0.8)

  @jax.jit
  def write(params):
    params = tree.derive(model.rules, params)
    seed_B = jnp.arange(len(length_B), dtype=jnp.int32)
    stream = generate.start(decoder, params, seed_B)
    stream = generate.read(
      decoder, params, stream, tokens_BT, length_B, boundary=text.boundary
    )
    return generate.write(
      decoder,
      params,
      stream,
      jnp.full(len(length_B), count, jnp.int32),
      count=count,
      choose=choose,
      end=text.boundary,
    )[:2]

  def measure(params):
    rows_BT, rows_B = jax.device_get(write(params))
    written = [x[:n] for x, n in zip(rows_BT, rows_B, strict=True)]
    said = [text.decode(x) for x in written]
    by_prompt = [
      re.findall('[a-z]+', ' '.join(said[i : i + copies]).lower())
      for i in range(0, len(said), copies)
    ]
    found = {}
    for i, (name, known) in enumerate(lists.items()):
      for kind, place in (('', 2 * i + 1), ('_locked', 2 * i + 2)):
        found[name + kind] = share(by_prompt[place], known)
      found[f'{name}_neutral'] = share(by_prompt[0], known)
    for kind in ('', '_locked', '_neutral'):
      values = [found[name + kind] for name in lists]
      found[f'mean{kind}'] = float(np.mean(values))
    judged = read(params, [x for x, _ in names])
    found['name'] = float(
      np.mean(
        [
          right_T[-answer:].all()
          for (_, answer), (_, right_T) in zip(names, judged, strict=True)
        ]
      )
    )
    return found

  return _reading.beside_random('identity', model, task, measure, control)


def share(words: list[str], known: set[str]) -> float:
  """Of words that are in a list; 0 where there are no words."""
  return sum(word in known for word in words) / max(len(words), 1)


def _names(tokens, noise):
  """`[(tokens, answer tokens)]`: each name after noise, four times."""
  stream = np.random.default_rng(0)
  found = []
  for name in recall.PEOPLE * 4:
    words = f'my name is {name}. ' + recall.filler(stream, noise)
    words += 'my name is '
    found.append((tokens(words + name), len(tokens(name)) - 1))
  return found
