"""Any decoder as a model that is trained on chunks of text."""

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Decoder, Model, Spec


def from_decoder(decoder: Decoder) -> Model:
  """The decoder as a model whose carry is its cache.

  Inputs: `{'tokens': int32 [B, T], 'resets': bool [B, T]}`, where resets are
  True at the first token of a document. Outputs: `logits [1, B, T, V]`, one
  step for objectives. The carry is the cache after the chunk and passes no
  gradient: training is truncated at chunks, memory is not.
  """

  def init(key, inputs):
    del inputs  # chunks of any length have the same parameters
    return decoder.init(key)

  def apply(params, carry, inputs, *, key=None, train=False):
    x_BTD, pending = decoder.blocks(
      params,
      carry,
      decoder.embed(params, inputs['tokens']),
      resets_BT=inputs['resets'],
      key=key if train else None,
    )
    logits_BTV = decoder.head(params, x_BTD)
    carry = jax.lax.stop_gradient(decoder.commit(carry, pending))
    return {'logits': logits_BTV[None]}, carry

  return Model(init, decoder.cache, apply, decoder=decoder)


def text_spec(vocabulary: int, length: int = 1) -> Spec:
  """What a task of text of V tokens asks for, without the task."""
  inputs = {
    'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
    'resets': jax.ShapeDtypeStruct((length,), jnp.bool_),
  }
  return Spec(inputs, (length,), vocabulary, {})
