"""StateNorm: a chunk from a carried state is its tokens, one by one."""

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.models.layers import matrix_state
from recursive_weights.scans import linear_attention

B, T, H, K, V = 2, 6, 2, 4, 3
GROUPS = 3
# In the second row a document begins at its fourth token.
PLACE = np.array([[7, 8, 9, 10, 11, 12], [3, 4, 5, 0, 1, 2]], np.int32)
FORMS = matrix_state.Forms(
  # Tokens meet a normalised state, which no chunked form gives them.
  prefill=None,
  step=linear_attention.step,
  commit=None,
)


def given():
  """Parameters, a carried state, and tokens q, k, v, g."""
  stream = np.random.default_rng(0)
  params = {
    'initial': stream.normal(size=(H, K, V)),
    'gain': stream.uniform(0.5, 2.0, (H, K, V)),
  }
  q, k = stream.normal(size=(2, B, T, H, K))
  v = stream.normal(size=(B, T, H, V))
  g = -stream.exponential(size=(B, T, H, K))
  return params, stream.normal(size=(B, H, K, V)), (q, k, v, g)


def loop(params, state, tokens):
  """Outputs and the states before and after every token, by the equations."""
  outputs, states = np.zeros((B, T, H, V)), [state]
  for t in range(T):
    flat = state.reshape(B, H, GROUPS, -1)
    flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-5)
    state = flat.reshape(state.shape) * params['gain']
    state[PLACE[:, t] == 0] = params['initial']
    q, k, v, g = (x[:, t] for x in tokens)
    state = np.exp(g)[..., None] * state + k[..., None] * v[..., None, :]
    outputs[:, t] = np.einsum('bhk,bhkv->bhv', q, state)
    states.append(state)
  return outputs, states


def single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_chunk_and_its_tokens_are_the_equations():
  expected, states = loop(*given())
  params, state, tokens = single(given())

  @jax.jit
  def read(state, tokens, place):
    return matrix_state.read(params, FORMS, state, tokens, place, groups=GROUPS)

  y, parts = read(state, tokens, PLACE)
  close(y, expected)
  for n in range(T + 1):  # any length, and another one in each row
    after = matrix_state.commit(FORMS, state, parts, np.array([n, T - n]))
    close(after[0], states[n][0])
    close(after[1], states[T - n][1])
  nothing = matrix_state.commit(FORMS, state, parts, np.zeros(B, np.int32))
  np.testing.assert_array_equal(nothing, state)

  carried = state
  for t in range(T):
    token = tuple(x[:, t : t + 1] for x in tokens)
    y, parts = read(carried, token, PLACE[:, t : t + 1])
    close(y[:, 0], expected[:, t])
    carried = matrix_state.commit(FORMS, carried, parts, np.ones(B, np.int32))
    close(carried, states[t + 1])
