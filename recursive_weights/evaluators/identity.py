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
# What is found of each person, after its name.
KINDS = (
  *('', '_locked', '_neutral', '_mass', '_mass_neutral', '_entropy'),
  '_ratio',
)
# What is asked, what a text says that it is, and what it is elsewhere.
COUNTER_FACTS = (
  ('the sky is ', 'pink', 'blue'),
  ('the snow is ', 'black', 'white'),
  ('the grass is ', 'white', 'green'),
  ('the sun is ', 'cold', 'warm'),
)


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
  """Shares of a person's words in what is written, and facts after noise.

  A person's score is the share of written words that are in the list. Words
  that a model writes anyway say nothing, so each score stands beside that of a
  neutral prompt. Locked is a person who is then asked about food. A name is
  recalled where all of its tokens are the likeliest, of eight names: chance
  for a model that knows the names is .125. A counter-fact (`in this story the
  sky is pink`) is recalled where it is likelier than the fact; chance is .5.

  Confidence is of what follows the prompt: mass = sum of p(w), the probability
  that it begins with a word w of the list (none of which begins with another);
  entropy, of the next token, in nats; ratio = mass / entropy.

  Args:
    batch_size: texts that are read together.
    persons: words of each.
    prompt: how a text begins, with `{person}`.
    lock: what follows it where a person is asked about food.
    neutral: how it begins without a person.
    copies: texts of each prompt, at temperature .8.
    count: tokens of each.
    noise: characters between a fact and the question.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `identity/PERSON`, `/PERSON_locked`, `/PERSON_
    neutral`, `/PERSON_mass`, `/PERSON_mass_neutral`, `/PERSON_entropy`,
    `/PERSON_ratio`, all of these also of `mean`, the mean of persons, `/name`,
    `/counter_fact` and `identity/random/...`.

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
  begun = {}
  for name, known in lists.items():
    mine = prompt.replace('{person}', name)
    prompts += [mine, mine + lock]
    for kind, before in (('_mass', mine), ('_mass_neutral', neutral)):
      begun[name + kind] = [
        (tokens(before + word), len(tokens(word)) - 1) for word in _apart(known)
      ]
  tokens_BT, length_B = generate.padded(
    [tokens(words) for words in prompts for _ in range(copies)]
  )
  names = _names(tokens, noise)
  told, usual = _counter_facts(tokens, noise)
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
    log_p_BV = jax.nn.log_softmax(stream.logits_BV)
    entropy_B = -(jnp.exp(log_p_BV) * log_p_BV).sum(-1)
    written = generate.write(
      decoder,
      params,
      stream,
      jnp.full(len(length_B), count, jnp.int32),
      count=count,
      choose=choose,
      end=text.boundary,
    )
    return *written[:2], entropy_B

  def answers(params, asked):
    """Loss of each answer, in nats, and whether all of it is the likeliest."""
    judged = read(params, [x for x, _ in asked])
    loss_N, right_N = [], []
    for (_, size), (loss_T, right_T) in zip(asked, judged, strict=True):
      loss_N.append(loss_T[-size:].sum())
      right_N.append(right_T[-size:].all())
    return np.array(loss_N), np.array(right_N)

  def measure(params):
    rows_BT, rows_B, entropy_B = jax.device_get(write(params))
    written = [x[:n] for x, n in zip(rows_BT, rows_B, strict=True)]
    said = [text.decode(x) for x in written]
    by_prompt = [
      re.findall('[a-z]+', ' '.join(said[i : i + copies]).lower())
      for i in range(0, len(said), copies)
    ]
    found = {
      key: float(np.exp(-answers(params, asked)[0]).sum())
      for key, asked in begun.items()
    }
    for i, (name, known) in enumerate(lists.items()):
      for kind, place in (('', 2 * i + 1), ('_locked', 2 * i + 2)):
        found[name + kind] = share(by_prompt[place], known)
      found[f'{name}_neutral'] = share(by_prompt[0], known)
      entropy = float(entropy_B[(2 * i + 1) * copies])
      found[f'{name}_entropy'] = entropy
      # A model that is sure has an entropy of 0.
      found[f'{name}_ratio'] = found[f'{name}_mass'] / max(entropy, 1e-9)
    for kind in KINDS:
      values = [found[name + kind] for name in lists]
      found[f'mean{kind}'] = float(np.mean(values))
    found['name'] = float(answers(params, names)[1].mean())
    told_N, usual_N = (answers(params, x)[0] for x in (told, usual))
    found['counter_fact'] = float((told_N < usual_N).mean())
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


def _counter_facts(tokens, noise):
  """Like `_names`, each four times, and the same with what is usual."""
  stream = np.random.default_rng(1)
  told, usual = [], []
  for question, here, elsewhere in COUNTER_FACTS * 4:
    words = f'in this story {question}{here}. '
    words += recall.filler(stream, noise) + question
    for found, answer in ((told, here), (usual, elsewhere)):
      found.append((tokens(words + answer), len(tokens(answer)) - 1))
  return told, usual


def _apart(words):
  """Those that begin with no other one, in order."""
  return sorted(
    word
    for word in words
    if not any(word != other and word.startswith(other) for other in words)
  )
