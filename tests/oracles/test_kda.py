"""Delta rules against published programs, on random weights.

A whole model of Kimi Delta Attention layers, written here from our scans, and
the two rules alone with their last states and gradients. They need
`pip install -e '.[oracles]'`; without it they are skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.models.layers import past
from recursive_weights.scans import delta_rule

TOLERANCE = 1e-4
VOCABULARY, LAYERS, TOKENS = 50, 3, 37
WIDTH, HEADS, KEYS = 32, 2, 16


def rms(x, weight):
  square = (x * x).mean(-1, keepdims=True)
  weight = weight.reshape((1,) * (x.ndim - 1) + (-1,))
  return x * jax.lax.rsqrt(square + 1e-5) * weight


def unit(x):
  return x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


@functools.partial(jax.jit, static_argnames='algorithm')
def kda_model(weights, tokens_BT, algorithm):
  """Logits of a Kimi-Linear model without full attention and experts."""
  place_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  x = weights['model.embed_tokens.weight'][tokens_BT]
  for i in range(LAYERS):

    def w(name, i=i):
      return weights[f'model.layers.{i}.{name}.weight']

    def by_head(y):
      return y.reshape(*y.shape[:2], HEADS, KEYS)

    n = rms(x, w('input_layernorm'))
    joined = jnp.concatenate(
      [n @ w(f'self_attn.{name}_proj').T for name in 'qkv'], axis=-1
    )
    kernel = w('self_attn.conv1d')[:, 0].T
    before = jnp.zeros((len(n), len(kernel) - 1, joined.shape[-1]))
    joined = jax.nn.silu(past.convolve(kernel, before, joined, place_BT))
    q, k, v = (by_head(y) for y in jnp.split(joined, 3, axis=-1))
    gate = 'self_attn.forget_gate.'
    raw = n @ w(gate + 'f_a_proj').T @ w(gate + 'f_b_proj').T
    raw = raw + weights[f'model.layers.{i}.{gate}dt_bias'][None, None]
    a_log = weights[f'model.layers.{i}.{gate}A_log']
    y, _ = delta_rule.scan(
      unit(q) * KEYS**-0.5,
      unit(k),
      v,
      -jnp.exp(a_log) * jax.nn.softplus(by_head(raw)),
      jax.nn.sigmoid(n @ w('self_attn.b_proj').T),
      algorithm=algorithm,
      chunk=16,
    )
    gate = n @ w('self_attn.g_a_proj').T @ w('self_attn.g_b_proj').T
    y = rms(y, w('self_attn.o_norm')) * jax.nn.sigmoid(by_head(gate))
    x = x + y.reshape(*n.shape[:2], -1) @ w('self_attn.o_proj').T
    n = rms(x, w('post_attention_layernorm'))
    hidden = jax.nn.silu(n @ w('mlp.gate_proj').T) * (n @ w('mlp.up_proj').T)
    x = x + hidden @ w('mlp.down_proj').T
  x = rms(x, weights['model.norm.weight'])
  return x @ weights['lm_head.weight'].T


def test_kimi_delta_attention_is_that_of_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.KimiLinearConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    linear_num_heads=HEADS,
    linear_head_dim=KEYS,
    layer_types=['linear_attention'] * LAYERS,
    mlp_layer_types=['dense'] * LAYERS,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
  )
  theirs = transformers.KimiLinearForCausalLM(config).eval()
  stream = np.random.default_rng(1)
  with torch.no_grad():  # away from ones and zeros, gates from weak to strong
    for name, x in theirs.named_parameters():
      scale = 1.0 if name.endswith(('A_log', 'dt_bias')) else 0.1
      x += scale * torch.tensor(stream.normal(size=x.shape), dtype=x.dtype)
  weights = {n: jnp.asarray(x.numpy()) for n, x in theirs.state_dict().items()}
  tokens_BT = stream.integers(0, VOCABULARY, (2, TOKENS))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens_BT), use_cache=False).logits.numpy()
  assert np.std(expected) > 0.05
  for algorithm in ('chunked', 'recurrent'):
    found = kda_model(weights, tokens_BT, algorithm)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
  ('module', 'function', 'per_channel'),
  [
    ('kimi_linear', 'recurrent_kimi_delta_attention', True),
    ('qwen3_next', 'torch_recurrent_gated_delta_rule', False),
  ],
)
def test_rules_states_and_gradients(module, function, per_channel):
  """Channels that keep and that forget at once; from a state, to a state."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  folder = f'transformers.models.{module}.modeling_{module}'
  published = getattr(pytest.importorskip(folder), function)
  stream = np.random.default_rng(2)

  def normal(*shape):
    return stream.normal(size=shape).astype(np.float32)

  rows = (2, TOKENS, HEADS)
  gates = -np.exp(2 * normal(*rows, *([KEYS] if per_channel else [])) - 2)
  beta = 1 / (1 + np.exp(-normal(*rows)))
  given = [*(normal(*rows, KEYS) for _ in range(3)), gates, beta]
  given.append(normal(2, HEADS, KEYS, KEYS))
  weight_y, weight_state = normal(*rows, KEYS), normal(2, HEADS, KEYS, KEYS)

  def ours(q, k, v, g, beta, state):
    y, last = delta_rule.scan(
      unit(q) * KEYS**-0.5, unit(k), v, g, beta, state=state, chunk=16
    )
    return (y * weight_y).sum() + (last * weight_state).sum(), (y, last)

  grads, (y, last) = jax.jit(jax.grad(ours, argnums=range(6), has_aux=True))(
    *given
  )
  tensors = [torch.tensor(x, requires_grad=True) for x in given]
  q, k, v, g, beta, state = tensors
  their_y, their_last = published(
    q,
    k,
    v,
    g=g,
    beta=beta,
    initial_state=state,
    output_final_state=True,
    use_qk_l2norm_in_kernel=True,
  )
  total = (their_y * torch.tensor(weight_y)).sum()
  (total + (their_last * torch.tensor(weight_state)).sum()).backward()
  pairs = [(y, their_y), (last, their_last)]
  pairs += [(a, b.grad) for a, b in zip(grads, tensors, strict=True)]
  for found, expected in pairs:
    expected = expected.detach().numpy()
    scale = max(np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)
