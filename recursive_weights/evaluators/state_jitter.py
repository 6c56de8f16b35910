"""Does a reset forget? What is left of a document when another one begins."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.decoding import generate, sampling
from recursive_weights.derivation import tree
from recursive_weights.evaluators import _reading
from recursive_weights.interfaces import UserError

BEFORE = (
  'a quantum particle is a wave. one photon may entangle another photon. a '
  'wave is a particle and a particle is a wave. '
)
TERMS = ('quantum', 'particle', 'entangle', 'wave', 'photon')
AFTER = (
  'bread is made of flour, water and salt. first mix the flour with salt. '
)


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  output_dir: str = '',
  before: str = BEFORE,
  after: str = AFTER,
  terms: tuple[str, ...] = TERMS,
  length: int = 512,
  copies: int = 4,
  count: int = 200,
  control: bool = True,
) -> interfaces.Evaluator:
  """Reads one text, begins another document, and looks for the first one in it.

  The first text is told again and again for `length` tokens, rounded up to
  whole chunks, so that the second one is cut into chunks as it is in a fresh
  state: then a reset that forgets everything gives the same logits to the bit.
  Continuations are written at temperature .8 with the same seeds.

  Args:
    objective: not used: the decoder answers.
    batch_size: not used: all copies are written together.
    output_dir: folder for `state_jitter.txt`, what the trained weights wrote
      after the reset; '' for nowhere.
    before, after: the two texts.
    terms: words of the first one.
    copies: continuations.
    count: tokens of each.
    control: the same with untrained weights.

  Returns:
    An evaluator with the keys `state_jitter/changed`, the share of logits over
    `after` that differ from those of a fresh state in any bit (0 is right), and
    `/leaked_terms`, how many more terms are written than from a fresh state (0
    is right). Both with `_without_reset`, where the boundary is read but
    nothing is reset: what a leak would look like. `state_jitter/random/...`.

  Raises:
    UserError: the model is no language model, the task no text, a number is out
      of range, or the text lacks a character.
  """
  del objective, batch_size
  decoder, text = _reading.check(
    *('state_jitter', model, task),
    {'length': length, 'copies': copies, 'count': count},
  )
  if not before or not after:
    raise UserError('state_jitter.before and .after must be texts, got none')
  begin = np.array([text.boundary], np.int32)
  first = _reading.encoded('state_jitter.before', text, before)
  length = -(-length // _reading.CHUNK) * _reading.CHUNK
  first_T = np.concatenate([begin, np.resize(first, length - 1)])
  second_T = np.concatenate(
    [begin, _reading.encoded('state_jitter.after', text, after)]
  )
  choose = sampling.make(temperature=0.8)

  def repeated(tokens_T):
    return np.repeat(tokens_T[None], copies, axis=0)

  @jax.jit
  def read(params):
    """The streams of a fresh state, and after the first text."""
    params = tree.derive(model.rules, params)
    fresh = generate.start(decoder, params, jnp.arange(copies))
    length_B = np.full(copies, length, np.int32)
    return fresh, generate.read(
      decoder,
      params,
      fresh,
      repeated(first_T),
      length_B,
      chunk=_reading.CHUNK,
      boundary=text.boundary,
    )

  @jax.jit
  def go_on(params, stream, boundary):
    params = tree.derive(model.rules, params)
    tokens_BT = jnp.asarray(repeated(second_T))
    resets_BT = tokens_BT == boundary
    x_BTD, pending = decoder.blocks(
      params,
      stream.cache,
      decoder.embed(params, tokens_BT),
      resets_BT=resets_BT,
    )
    logits_BTV = decoder.head(params, x_BTD).astype(jnp.float32)
    stream = stream._replace(
      cache=decoder.commit(stream.cache, pending),
      logits_BV=logits_BTV[:, -1],
      position_B=stream.position_B * 0,  # so that both draw the same numbers
    )
    written_BT, written_B, _ = generate.write(
      decoder,
      params,
      stream,
      jnp.full(copies, count, jnp.int32),
      count=count,
      choose=choose,
      end=text.boundary,
    )
    return logits_BTV, written_BT, written_B

  def compared(params):
    """The measure, and what is written after the reset."""
    streams = read(params)
    found, words = {}, {}
    # No text has a token -1: nothing is reset.
    for name, boundary in (('', text.boundary), ('_without_reset', -1)):
      logits, texts = [], []
      for stream in streams:
        logits_BTV, *written = jax.device_get(go_on(params, stream, boundary))
        logits.append(logits_BTV.view(np.uint32))
        texts.append(
          [text.decode(x[:n]) for x, n in zip(*written, strict=True)]
        )
      found[f'changed{name}'] = float((logits[0] != logits[1]).mean())
      said = [sum(x.count(t) for x in part for t in terms) for part in texts]
      found[f'leaked_terms{name}'] = float(max(said[1] - said[0], 0))
      words[name] = texts[1]
    return found, words['']

  def measure(params):
    found, written = compared(params)
    if output_dir and jax.process_index() == 0:
      folder = pathlib.Path(output_dir)
      folder.mkdir(parents=True, exist_ok=True)
      line = '\n' + '-' * 40 + '\n'
      (folder / 'state_jitter.txt').write_text(
        line.join(after + x for x in written) + '\n', encoding='utf-8'
      )
    return found

  return _reading.beside_random(
    *('state_jitter', model, task, measure, control),
    measure_control=lambda params: compared(params)[0],
  )
