"""Reading and writing text with a causal language model, in constant memory.

A `Stream` is where B texts stand: the decoder's cache, and the logits of what
comes next. `read` takes tokens in, `write` chooses tokens and takes them in;
either goes on from the other, any number of times, and cutting a text into
calls changes nothing but rounding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.decoding import sampling
from recursive_weights.interfaces import Array, Decoder, Tree, UserError


class Stream(NamedTuple):
  """Where B texts stand; every leaf has the batch first.

  cache: of the decoder, after all tokens read so far.
  logits_BV: of the next token, float32; zeros before the first one is read.
  position_B: tokens read so far, int32.
  seed_B: of what is chosen at random, int32.
  done_B: whether the text has ended; a text that has ended writes nothing.
  """

  cache: Tree
  logits_BV: Array
  position_B: Array
  seed_B: Array
  done_B: Array


def start(decoder: Decoder, params: Tree, seed_B: Array) -> Stream:
  """Texts of which nothing is read yet, one for each seed."""
  batch = seed_B.shape[0]

  def head(params):
    tokens_BT = jnp.zeros((batch, 1), jnp.int32)
    return decoder.head(params, decoder.embed(params, tokens_BT))

  classes = jax.eval_shape(head, params).shape[-1]
  return Stream(
    cache=decoder.cache(params, batch),
    logits_BV=jnp.zeros((batch, classes), jnp.float32),
    position_B=jnp.zeros(batch, jnp.int32),
    seed_B=jnp.asarray(seed_B, jnp.int32),
    done_B=jnp.zeros(batch, jnp.bool_),
  )


def read(
  decoder: Decoder,
  params: Tree,
  stream: Stream,
  tokens_BT: Array,
  length_B: Array,
  *,
  chunk: int = 64,
  boundary: int | None = None,
) -> Stream:
  """The stream after the first `length_B` of the tokens, padded on the right.

  Tokens are run in chunks, so that memory does not grow with T, and each row
  keeps its own length of a chunk. A row of length 0 stays as it was; a text
  that had ended and is read on is one that goes on.

  Args:
    tokens_BT: int32; what stands past a row's length is not read, but must be
      a token.
    length_B: int32 in [0, T].
    chunk: tokens that are run at once.
    boundary: the token at which a document begins, so the state is reset; None
      where all is one document.

  Raises:
    ValueError: `chunk` is not positive.
    UserError: the stream is of another model or number of texts.
  """
  if chunk < 1:
    raise ValueError(f'chunk must be > 0, got {chunk}')
  batch, length = tokens_BT.shape
  _check(decoder, params, stream, batch)
  if not length:
    return stream
  chunk = min(chunk, length)
  count = -(-length // chunk)
  tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, count * chunk - length)))
  parts = jnp.swapaxes(tokens_BT.reshape(batch, count, chunk), 0, 1)

  def body(carry, part):
    cache, last_BD = carry
    tokens_BC, first = part
    left_B = jnp.clip(length_B - first, 0, chunk)
    x_BCD = decoder.embed(params, tokens_BC)
    x_BCD, pending = decoder.blocks(
      params, cache, x_BCD, resets_BT=_resets(tokens_BC, boundary)
    )
    cache = decoder.commit(cache, pending, left_B)
    index_B = jnp.maximum(left_B - 1, 0)
    x_BD = jnp.take_along_axis(x_BCD, index_B[:, None, None], axis=1)[:, 0]
    last_BD = jnp.where(left_B[:, None] > 0, x_BD, last_BD)
    return (cache, last_BD), None

  firsts = jnp.arange(count, dtype=jnp.int32) * chunk
  shape = jax.eval_shape(
    lambda: decoder.blocks(
      params, stream.cache, decoder.embed(params, parts[0])
    )[0]
  )
  last_BD = jnp.zeros((batch, shape.shape[-1]), shape.dtype)
  (cache, last_BD), _ = jax.lax.scan(
    body, (stream.cache, last_BD), (parts, firsts)
  )
  logits_BV = decoder.head(params, last_BD[:, None])[:, 0]
  return stream._replace(
    cache=cache,
    logits_BV=jnp.where(
      length_B[:, None] > 0, logits_BV.astype(jnp.float32), stream.logits_BV
    ),
    position_B=stream.position_B + length_B.astype(jnp.int32),
    done_B=stream.done_B & (length_B == 0),
  )


def write(
  decoder: Decoder,
  params: Tree,
  stream: Stream,
  limit_B: Array,
  *,
  count: int,
  choose: Callable[[Array, Array], Array],
  end: int | None = None,
  boundary: int | None = None,
) -> tuple[Array, Array, Stream]:
  """Up to `limit_B` further tokens of each text.

  A text ends where `end` is chosen, which is neither written nor read. The
  loop stops as soon as every row has ended or reached its limit.

  Args:
    limit_B: int32 in [0, count].
    count: the largest limit, the width of what comes back.
    choose: from `sampling.make`.
    end: the token that ends a text; None for none.
    boundary: as in `read`, of tokens that are written.

  Returns:
    `tokens_BT` int32 `[B, count]`, `length_B` (tokens written; those past it
    are 0), and the stream after them.

  Raises:
    UserError: the stream is of another model or number of texts.
  """
  batch = (jnp.shape(limit_B) or stream.position_B.shape)[0]
  _check(decoder, params, stream, batch)

  def more(loop):
    index, _, _, stream = loop
    return (index < count) & (~stream.done_B & (index < limit_B)).any()

  def body(loop):
    index, tokens_BT, length_B, stream = loop
    key_B = sampling.keys(stream.seed_B, stream.position_B)
    token_B = choose(key_B, stream.logits_BV)
    on_B = ~stream.done_B & (index < limit_B)
    if end is not None:
      ended_B = on_B & (token_B == end)
      stream = stream._replace(done_B=stream.done_B | ended_B)
      on_B = on_B & ~ended_B
    token_B = jnp.where(on_B, token_B, 0)
    x_BTD = decoder.embed(params, token_B[:, None])
    resets_BT = _resets(token_B[:, None], boundary)
    x_BTD, pending = decoder.blocks(
      params, stream.cache, x_BTD, resets_BT=resets_BT
    )
    logits_BV = decoder.head(params, x_BTD)[:, 0].astype(jnp.float32)
    one_B = on_B.astype(jnp.int32)
    stream = stream._replace(
      cache=decoder.commit(stream.cache, pending, one_B),
      logits_BV=jnp.where(on_B[:, None], logits_BV, stream.logits_BV),
      position_B=stream.position_B + one_B,
    )
    tokens_BT = jax.lax.dynamic_update_index_in_dim(
      tokens_BT, token_B, index, axis=1
    )
    return index + 1, tokens_BT, length_B + one_B, stream

  empty = jnp.zeros((batch, count), jnp.int32), jnp.zeros(batch, jnp.int32)
  _, tokens_BT, length_B, stream = jax.lax.while_loop(
    more, body, (jnp.int32(0), *empty, stream)
  )
  return tokens_BT, length_B, stream


def _check(decoder, params, stream, batch):
  """Refuses a stream of another model or batch.

  By shapes and dtypes alone: a compiled program holds nothing of it.
  """

  def like(params):
    return start(decoder, params, jnp.zeros(batch, jnp.int32))

  def described(tree):
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = {
      jax.tree_util.keystr(path, simple=True, separator='.'): (
        f'{leaf.dtype}{list(leaf.shape)}'
      )
      for path, leaf in leaves
    }
    # For trees of the same leaves: a list where a tuple should be.
    return found | {'structure': str(structure)}

  wanted = described(jax.eval_shape(like, params))
  found = described(jax.eval_shape(lambda tree: tree, stream))
  *leaves, _ = wanted  # structure comes last
  for name in (*leaves, *found):
    if wanted.get(name) != found.get(name):
      raise UserError(
        f'stream must be of this model and of {batch} texts: its {name} must '
        f'be {wanted.get(name, "absent")}, got {found.get(name, "none")}: '
        'begin one by `start`, or go on with the model and texts it is of'
      )


def _resets(tokens_BT, boundary):
  return None if boundary is None else tokens_BT == boundary


def padded(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Token rows of different lengths as `tokens_BT` and `length_B`, int32.

  Raises:
    UserError: a text is empty, and nothing says what comes after nothing.
  """
  length_B = np.array([len(text) for text in texts], np.int32)
  if not len(texts) or not length_B.all():
    raise UserError(
      'prompts must have at least one token each, got lengths '
      f'{length_B.tolist()}: begin with the token that begins documents'
    )
  tokens_BT = np.zeros((len(texts), length_B.max()), np.int32)
  for row, text in enumerate(texts):
    tokens_BT[row, : len(text)] = text
  return tokens_BT, length_B
