"""Laws of generation: batches, chunks and calls change nothing but rounding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.decoding import generate, sampling
from recursive_weights.interfaces import UserError
from tests import tiny_decoder

V = 7
DECODER = tiny_decoder.decoder
PARAMS = tiny_decoder.init(jax.random.key(0), V)
SEEDS = jnp.array([5, 6, 7], jnp.int32)
CHOOSE = sampling.make(temperature=1.3, top_p=0.95)


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(1, V, n).astype(np.int32) for n in (11, 1, 5)]


@functools.partial(jax.jit, static_argnames=('chunk', 'boundary'))
def read(stream, tokens_BT, length_B, chunk=4, boundary=None):
  return generate.read(
    DECODER,
    PARAMS,
    stream,
    tokens_BT,
    length_B,
    chunk=chunk,
    boundary=boundary,
  )


@functools.partial(
  jax.jit, static_argnames=('count', 'end', 'choose', 'boundary')
)
def write(stream, limit_B, count=20, end=None, choose=CHOOSE, boundary=None):
  return generate.write(
    DECODER,
    PARAMS,
    stream,
    limit_B,
    count=count,
    choose=choose,
    end=end,
    boundary=boundary,
  )


def start(seed_B=SEEDS):
  return generate.start(DECODER, PARAMS, seed_B)


@jax.jit
def whole(tokens_BT):
  """The logits after every token of texts, in one chunk from a fresh cache."""
  cache = DECODER.cache(PARAMS, tokens_BT.shape[0])
  x_BTD, _ = DECODER.blocks(PARAMS, cache, DECODER.embed(PARAMS, tokens_BT))
  return DECODER.head(PARAMS, x_BTD)


def logits_of(tokens):
  """The logits after a text; what pads it is behind it."""
  padded_T = np.zeros(24, np.int32)
  padded_T[: len(tokens)] = tokens
  return whole(padded_T[None])[0, len(tokens) - 1]


def limits(*numbers):
  return jnp.array(numbers, jnp.int32)


@pytest.mark.parametrize('chunk', [1, 4, 64])
def test_reading_padded_prompts_is_reading_each(chunk):
  tokens_BT, length_B = generate.padded(prompts())
  stream = read(start(), tokens_BT, length_B, chunk=chunk)
  wanted = jnp.stack([logits_of(prompt) for prompt in prompts()])
  chex.assert_trees_all_close(stream.logits_BV, wanted, atol=1e-5)
  chex.assert_trees_all_equal(stream.position_B, length_B)
  # What stands past a prompt is not read.
  other_BT = np.where(
    np.arange(tokens_BT.shape[1])[None] < length_B[:, None], tokens_BT, V - 1
  )
  chex.assert_trees_all_equal(
    read(start(), other_BT, length_B, chunk=chunk), stream
  )


def test_reading_nothing_changes_no_bit():
  tokens_BT, length_B = generate.padded(prompts())
  stream = read(start(), tokens_BT, length_B)
  again = read(stream, tokens_BT, jnp.array([0, 3, 0]))
  for row in (0, 2):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda x, row=row: x[row], (again.cache, again.logits_BV)),
      jax.tree.map(lambda x, row=row: x[row], (stream.cache, stream.logits_BV)),
    )
  assert (again.logits_BV[1] != stream.logits_BV[1]).all()
  empty_BT = jnp.zeros((3, 0), jnp.int32)
  chex.assert_trees_all_equal(
    generate.read(DECODER, PARAMS, stream, empty_BT, limits(0, 0, 0)), stream
  )


@pytest.mark.parametrize('chunk', [1, 4, 64])
def test_a_boundary_forgets_the_document_before_it(chunk):
  """Where a chunk begins, within one, at a text's end, and not padded."""
  later = [np.concatenate([[0], prompt]) for prompt in prompts()]
  earlier = [np.full(n, 3) for n in (4, 2, 9)]
  texts = [np.concatenate(x) for x in zip(earlier, later, strict=True)]
  found, alone = (
    read(start(), *generate.padded(rows), chunk=chunk, boundary=0)
    for rows in (texts, later)
  )
  chex.assert_trees_all_close(found.logits_BV, alone.logits_BV, atol=1e-5)
  chex.assert_trees_all_close(
    found.cache['recurrent'], alone.cache['recurrent'], atol=1e-5
  )
  plain = read(start(), *generate.padded(texts), chunk=chunk)
  assert (jnp.abs(plain.logits_BV - alone.logits_BV).max(1) > 1e-3).all()


def test_a_written_boundary_forgets_what_was_read():
  def choose(key_B, logits_BV):
    del key_B
    return jnp.zeros(logits_BV.shape[0], jnp.int32)

  stream = read(start(), *generate.padded(prompts()))
  _, length_B, after = write(
    stream, limits(1, 1, 0), count=2, choose=choose, boundary=0
  )
  np.testing.assert_array_equal(length_B, [1, 1, 0])
  wanted_V = logits_of(np.array([0]))
  for row in (0, 1):
    chex.assert_trees_all_close(after.logits_BV[row], wanted_V, atol=1e-5)
  chex.assert_trees_all_equal(after.logits_BV[2], stream.logits_BV[2])
  _, _, plain = write(stream, limits(1, 1, 0), count=2, choose=choose)
  assert jnp.abs(plain.logits_BV[:2] - wanted_V[None]).max() > 1e-3


def test_reading_on_revives_what_had_ended():
  def choose(key_B, logits_BV):
    del key_B
    return jnp.zeros(logits_BV.shape[0], jnp.int32)

  stream = read(start(), *generate.padded(prompts()))
  _, _, ended = write(stream, limits(2, 2, 2), count=2, choose=choose, end=0)
  assert ended.done_B.all()
  more_BT = jnp.full((3, 2), 5, jnp.int32)
  again = read(ended, more_BT, limits(2, 0, 1))
  np.testing.assert_array_equal(again.done_B, [False, True, False])
  _, length_B, _ = write(again, limits(2, 2, 2), count=2)
  np.testing.assert_array_equal(length_B, [2, 0, 2])


def test_what_is_written_is_what_the_whole_text_says():
  """Greedy, against running the whole text anew for every token."""
  tokens_BT, length_B = generate.padded(prompts())
  choose = sampling.make(temperature=0.0)
  stream = read(start(), tokens_BT, length_B)
  found_BT, found_B, after = write(stream, limits(8, 8, 8), choose=choose)
  np.testing.assert_array_equal(found_B, [8, 8, 8])
  for row, prompt in enumerate(prompts()):
    text = list(prompt)
    for _ in range(8):
      text.append(int(jnp.argmax(logits_of(np.array(text)))))
    np.testing.assert_array_equal(found_BT[row, :8], text[len(prompt) :])
    chex.assert_trees_all_close(
      after.logits_BV[row], logits_of(np.array(text)), atol=1e-5
    )


def test_a_batch_is_its_rows_one_by_one():
  tokens_BT, length_B = generate.padded(prompts())
  stream = read(start(), tokens_BT, length_B)
  found_BT, found_B, _ = write(stream, limits(20, 20, 20), end=0)
  for row, prompt in enumerate(prompts()):
    alone = read(start(SEEDS[row : row + 1]), *generate.padded([prompt]))
    one_BT, one_B, _ = write(alone, limits(20), end=0)
    np.testing.assert_array_equal(one_BT[0], found_BT[row])
    assert one_B[0] == found_B[row]


def test_calls_cut_a_text_anywhere():
  """20 tokens are 7 and then 13, and reading what was written is writing it."""
  tokens_BT, length_B = generate.padded(prompts())
  stream = read(start(), tokens_BT, length_B)
  whole_BT, _, end = write(stream, limits(20, 20, 20))
  first_BT, _, middle = write(stream, limits(7, 7, 7))
  rest_BT, _, cut = write(middle, limits(13, 13, 13))
  np.testing.assert_array_equal(
    np.concatenate([first_BT[:, :7], rest_BT[:, :13]], axis=1), whole_BT
  )
  chex.assert_trees_all_close(cut, end, atol=1e-5)
  chex.assert_trees_all_equal(cut.position_B, end.position_B)
  reread = read(stream, whole_BT, limits(20, 20, 20))
  chex.assert_trees_all_close(reread, end, atol=1e-5)


def test_a_text_ends_at_its_end_or_limit():
  tokens_BT, length_B = generate.padded(prompts() * 20)
  seeds = jnp.arange(60, dtype=jnp.int32)
  stream = read(start(seeds), tokens_BT, length_B)
  limit_B = jnp.asarray(np.arange(60) % 21, jnp.int32)
  found_BT, found_B, after = write(stream, limit_B, end=0)
  free_BT, *_ = write(stream, limits(*[20] * 60))
  ended = 0
  for row in range(60):
    own = np.flatnonzero(np.asarray(free_BT[row]) == 0)
    until = int(own[0]) if len(own) else 20
    count = min(until, int(limit_B[row]))
    assert found_B[row] == count
    np.testing.assert_array_equal(found_BT[row, :count], free_BT[row, :count])
    assert not found_BT[row, count:].any()
    assert bool(after.done_B[row]) == (until < int(limit_B[row]))
    ended += bool(after.done_B[row])
  assert 10 < ended < 58
  # What has ended says nothing more, and its state stays to the bit.
  more_BT, more_B, later = write(after, limits(*[20] * 60), end=0)
  done = np.asarray(after.done_B)
  assert not np.asarray(more_B)[done].any()
  assert not np.asarray(more_BT)[done].any()
  chex.assert_trees_all_equal(
    jax.tree.map(lambda x: x[done], later.cache),
    jax.tree.map(lambda x: x[done], after.cache),
  )


def test_memory_does_not_grow_with_the_text():
  def largest(count):
    jaxpr = jax.make_jaxpr(
      lambda s, n: generate.write(
        DECODER, PARAMS, s, n, count=count, choose=CHOOSE
      )
    )(start(), limits(1, 1, 1))
    (loop,) = [e for e in jaxpr.eqns if e.primitive.name == 'while']
    sizes = [v.aval.size for v in loop.outvars]
    return sum(sizes) - 3 * count  # less what is written

  assert largest(10) == largest(1000)


def changed(stream, **cache):
  return stream._replace(cache=stream.cache | cache)


STREAMS = {
  'model': (
    lambda s: s._replace(cache={'state': s.cache['recurrent']}),
    r'cache.position must be int32\[3\], got none',
  ),
  'layers': (
    lambda s: changed(s, attention={'keys': s.seed_B}),
    r'cache.attention.keys must be absent, got int32\[3\]',
  ),
  'width': (
    lambda s: changed(s, recurrent=s.cache['recurrent'][..., :2]),
    r'cache.recurrent must be float32\[3, 2, 4, 4\], got float32\[3, 2, 4, 2\]',
  ),
  'dtype': (
    lambda s: changed(s, recurrent=s.cache['recurrent'].astype(jnp.bfloat16)),
    r'cache.recurrent must be float32\[3, 2, 4, 4\], got bfloat16',
  ),
  'batch': (
    lambda s: jax.tree.map(lambda x: x[:2], s),
    r'cache.position must be int32\[3\], got int32\[2\]',
  ),
  'vocabulary': (
    lambda s: s._replace(logits_BV=s.logits_BV[:, 1:]),
    r'logits_BV must be float32\[3, 7\], got float32\[3, 6\]',
  ),
  'containers': (
    lambda s: changed(s, attention=()),
    r'structure must be PyTreeDef.* got PyTreeDef',
  ),
}


@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_of_another_model_is_refused(name):
  change, message = STREAMS[name]
  stream = change(start())
  with pytest.raises(UserError, match=f'of 3 texts: its {message}.*: begin'):
    read(stream, *generate.padded(prompts()))
  with pytest.raises(UserError, match=f'of 3 texts: its {message}.*: begin'):
    write(stream, limits(2, 2, 2))


def test_that_a_stream_fits_is_told_by_shapes_alone(monkeypatch):
  def programs():
    stream = start()
    tokens_BT, length_B = map(jnp.asarray, generate.padded(prompts()))
    for run in (
      lambda s: generate.read(DECODER, PARAMS, s, tokens_BT, length_B),
      lambda s: generate.write(
        DECODER, PARAMS, s, length_B, count=11, choose=CHOOSE
      ),
    ):
      yield str(jax.make_jaxpr(run)(stream))

  checked = list(programs())
  monkeypatch.setattr(generate, '_check', lambda *_: None)
  assert checked == list(programs())


def test_prompts_must_have_a_token():
  with pytest.raises(
    UserError, match=r'at least one token each, got .*\[2, 0\]'
  ):
    generate.padded([np.array([1, 2]), np.array([], int)])
  with pytest.raises(UserError, match='prompts'):
    generate.padded([])
