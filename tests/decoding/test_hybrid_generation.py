"""The hybrid language model, of every kind of layer, through `decoding`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.decoding import generate, sampling, sessions
from recursive_weights.models import hybrid_lm

V, COUNT = 11, 6


@pytest.mark.slow
def test_padded_prompts_go_on_as_whole_texts_do(tmp_path):
  """Also past the window of attention, and through a session file."""
  decoder = hybrid_lm.decoder(
    V,
    pattern='AH',
    layers=2,
    width=16,
    head_width=8,
    mix_rank=2,
    decay_rank=2,
    state_width=4,
    window=5,
    chunk=4,
  )
  params = decoder.init(jax.random.key(0))
  # Away from zero outputs, where layers would say nothing.
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = jax.tree.unflatten(
    tree,
    [
      x + 0.2 * jax.random.normal(key, x.shape)
      for x, key in zip(leaves, keys, strict=True)
    ],
  )
  rng = np.random.default_rng(0)
  prompts = [rng.integers(1, V, n).astype(np.int32) for n in (9, 1, 4)]
  tokens_BT, length_B = generate.padded(prompts)
  choose = sampling.make(temperature=0.0)

  @jax.jit
  def begin(tokens_BT, length_B):
    stream = generate.start(decoder, params, jnp.arange(3))
    return generate.read(decoder, params, stream, tokens_BT, length_B, chunk=4)

  @jax.jit
  def go_on(stream, limit_B):
    return generate.write(
      decoder, params, stream, limit_B, count=COUNT, choose=choose
    )

  @jax.jit
  def whole(tokens_BT):
    x_BTD = decoder.embed(params, tokens_BT)
    x_BTD, _ = decoder.blocks(params, decoder.cache(params, 3), x_BTD)
    return decoder.head(params, x_BTD)

  stream = begin(tokens_BT, length_B)
  half = jnp.full(3, COUNT // 2)
  first_BT, _, stream = go_on(stream, half)
  weights = sessions.fingerprint(params)
  sessions.save(tmp_path / 's', stream, weights=weights)
  stream = sessions.load(tmp_path / 's', stream, weights=weights)
  rest_BT, _, _ = go_on(stream, half)
  found_BT = np.concatenate(
    [first_BT[:, : COUNT // 2], rest_BT[:, : COUNT // 2]], axis=1
  )
  text_BT = np.zeros((3, 9 + COUNT), np.int32)
  for row, prompt in enumerate(prompts):
    text_BT[row, : len(prompt)] = prompt
    text_BT[row, len(prompt) : len(prompt) + COUNT] = found_BT[row]
  logits_BTV = np.asarray(whole(text_BT))
  for row, prompt in enumerate(prompts):
    said = logits_BTV[row, len(prompt) - 1 : len(prompt) - 1 + COUNT]
    np.testing.assert_array_equal(said.argmax(-1), found_BT[row])
  assert len(np.unique(found_BT)) > 2
