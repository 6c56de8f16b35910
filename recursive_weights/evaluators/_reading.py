"""What the probes of a language model's memory share: reading, passages."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import Tree, UserError
from recursive_weights.tasks import _losses

CHUNK = 64


def check(
  name: str,
  model: interfaces.Model,
  task: interfaces.Task,
  counts: dict[str, int],
) -> tuple[interfaces.Decoder, interfaces.Text]:
  """Decoder and text, both there; `counts` are all > 0.

  Raises:
    UserError: the model is no language model, the task no text, or a count is
      not positive.
  """
  if model.decoder is None or task.text is None:
    raise UserError(f'{name} needs a language model and a task that is a text')
  wrong = [f'{field} = {x}' for field, x in counts.items() if x < 1]
  if wrong:
    raise UserError(f'{name} needs numbers > 0, got {", ".join(wrong)}')
  return model.decoder, task.text


def encoded(name: str, text: interfaces.Text, words: str) -> np.ndarray:
  """Tokens of words that a config gives. Errors name it."""
  try:
    return text.encode(words)
  except UserError as error:
    raise UserError(
      f'{name}: {words!r} cannot be written in this text ({error}): choose '
      'words that can'
    ) from error


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  rows: int,
) -> Callable[[Tree, Sequence[np.ndarray]], list[tuple]]:
  """`read(params, texts) -> [(loss_T, right_T), ...]`.

  Texts are rows of tokens of any length > 1 with boundaries where documents
  begin, a state being reset there and nowhere else. Entry t judges token t + 1:
  its loss in nats, and whether it was the likeliest. Texts are read `rows` at a
  time in chunks whose state is handed on, so all of them run one program and
  memory does not grow with their length.
  """
  assert task.text is not None
  boundary = task.text.boundary

  @jax.jit
  def judge(params, carry, tokens_BT):
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    inputs = {'tokens': inputs_BT, 'resets': inputs_BT == boundary}
    outputs, carry = model.apply(params, carry, inputs, key=None, train=False)
    answer = objective.answer(outputs)
    loss_BT = _losses.cross_entropy(answer, targets_BT)
    return (loss_BT, jnp.argmax(answer, axis=-1) == targets_BT), carry

  def together(params, texts):
    judged = max(len(text) for text in texts) - 1
    width = -(-judged // CHUNK) * CHUNK
    tokens_BT = np.zeros((rows, width + 1), np.int32)
    for row, text in enumerate(texts):
      tokens_BT[row, : len(text)] = text
    carry, found = model.carry(params, rows), []
    for first in range(0, width, CHUNK):
      part_BT = tokens_BT[:, first : first + CHUNK + 1]
      judgement, carry = judge(params, carry, part_BT)
      found.append(judgement)
    loss_BT, right_BT = (
      np.concatenate(x, axis=1)
      for x in zip(*jax.device_get(found), strict=True)
    )
    return [
      (loss_BT[row, : len(text) - 1], right_BT[row, : len(text) - 1])
      for row, text in enumerate(texts)
    ]

  def read(params, texts):
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [None] * len(texts)
    for first in range(0, len(texts), rows):
      chosen = order[first : first + rows]
      answers = together(params, [texts[i] for i in chosen])
      for i, answer in zip(chosen, answers, strict=True):
        found[i] = answer
    return found

  return read


def passages(
  name: str, task: interfaces.Task, split: str, count: int, length: int
) -> np.ndarray:
  """Stretches of a held-out text, evenly spaced, int32 `[count, length]`.

  Boundaries are left out, so a passage may go from one document to the next.

  Raises:
    UserError: the split is unknown, is the training split, or is too short.
  """
  sizes = {k: v for k, v in task.spec.sizes.items() if k != 'train' and v}
  if split not in sizes:
    raise UserError(f'{name}.split must be among {tuple(sizes)}, got {split!r}')
  batch = task.batch(split, 0, sizes[split])
  tokens_BT = batch['inputs']['tokens']
  on_BT = np.arange(tokens_BT.shape[1])[None] < batch['length'][:, None]
  assert task.text is not None
  row_T = tokens_BT[on_BT & (tokens_BT != task.text.boundary)]
  if len(row_T) < count * length:
    raise UserError(
      f'{name}: {split} must have {count} x {length} tokens, got {len(row_T)}: '
      'ask for fewer or shorter passages'
    )
  begin_B = np.arange(count) * (len(row_T) // count)
  return row_T[begin_B[:, None] + np.arange(length)[None]]


def beside_random(
  name: str,
  model: interfaces.Model,
  task: interfaces.Task,
  measure: Callable[[Tree], dict[str, float]],
  control: bool,
  measure_control: Callable[[Tree], dict[str, float]] | None = None,
) -> interfaces.Evaluator:
  """The measure as `NAME/...`, that of untrained weights as `NAME/random/...`.

  The control is left out where weights are only loaded. It says nothing where
  untrained layers have zero outputs, as those of a pure RWKV-6 have: no token
  then depends on one before it, whatever the state does.

  Args:
    measure_control: of untrained weights, where `measure` writes files.
  """
  inputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), task.spec.inputs
  )
  init = model.decoder.init if model.decoder is not None else None

  def evaluate(params, key):
    del key  # probes are the same at every time
    found = {f'{name}/{k}': v for k, v in measure(params).items()}
    if control and init is not None:
      untrained = jax.jit(lambda key: model.init(key, inputs))
      random = (measure_control or measure)(untrained(jax.random.key(0)))
      found |= {f'{name}/random/{k}': v for k, v in random.items()}
    return found

  return evaluate
