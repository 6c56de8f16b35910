"""Whole models against published programs, on random weights.

They need `pip install -e '.[oracles]'`; without it they are skipped.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.models import hybrid_lm

TOLERANCE = 1e-4
VOCABULARY, LAYERS, TOKENS = 50, 3, 37


def heads_of(decoder):
  """`tokens [1, T] -> logits [1, T, V]`, in one chunk."""

  @jax.jit
  def run(params, tokens_BT):
    x, _ = decoder.blocks(
      params,
      decoder.cache(params, len(tokens_BT)),
      decoder.embed(params, tokens_BT),
    )
    return decoder.head(params, x)

  return run


def stack(weights, name, transform=lambda x: x):
  """The tensors of all layers, `name` with `{}` for the layer's number."""
  return np.stack([transform(weights[name.format(i)]) for i in range(LAYERS)])


def rwkv6_params(weights):
  """Ours from a published checkpoint of RWKV-6, as NumPy arrays by name."""

  def att(name, transform=lambda x: x):
    return stack(weights, 'blocks.{}.att.' + name, transform)

  def ffn(name, transform=lambda x: x):
    return stack(weights, 'blocks.{}.ffn.' + name, transform)

  def norm(name):
    return {'scale': name('weight'), 'bias': name('bias')}

  def layer(prefix):
    return norm(lambda kind: stack(weights, f'blocks.{{}}.{prefix}.{kind}'))

  def top(prefix):
    return norm(lambda kind: weights[f'{prefix}.{kind}'])

  linear = np.transpose
  return {
    'embedding': {
      'table': weights['emb.weight'],
      'norm': top('blocks.0.ln0'),
    },
    'rwkv6': {
      'before_time': {'norm': layer('ln1')},
      'time': {
        'mix_x': att('time_maa_x', np.ravel),
        'mix': np.stack(
          [att(f'time_maa_{name}', np.ravel) for name in 'wkvrg'], axis=1
        ),
        'mix_down': att('time_maa_w1'),
        'mix_up': att('time_maa_w2'),
        'decay': att('time_decay', np.ravel),
        'decay_down': att('time_decay_w1'),
        'decay_up': att('time_decay_w2'),
        'bonus': att('time_faaaa'),
        'norm': layer('att.ln_x'),
        **{
          name: att(f'{name}.weight', linear)
          for name in ('receptance', 'key', 'value', 'gate', 'output')
        },
      },
      'before_channel': {'norm': layer('ln2')},
      'channel': {
        'mix_key': ffn('time_maa_k', np.ravel),
        'mix_receptance': ffn('time_maa_r', np.ravel),
        **{
          name: ffn(f'{name}.weight', linear)
          for name in ('key', 'receptance', 'value')
        },
      },
    },
    'norm': top('ln_out'),
    'head': weights['head.weight'].T,
  }


def rwkv6_weights(stream, width):
  """A random checkpoint with the published names."""

  def normal(*shape, scale=1.0):
    return scale * stream.normal(size=shape).astype(np.float32)

  hidden = width * 7 // 2 // 32 * 32
  weights = {
    'emb.weight': normal(VOCABULARY, width),
    'head.weight': normal(VOCABULARY, width, scale=width**-0.5),
  }

  def norm(name):
    weights[f'{name}.weight'] = 1 + normal(width, scale=0.1)
    weights[f'{name}.bias'] = normal(width, scale=0.1)

  norm('ln_out')
  norm('blocks.0.ln0')
  for i in range(LAYERS):
    for name in ('ln1', 'ln2', 'att.ln_x'):
      norm(f'blocks.{i}.{name}')
    att, ffn = f'blocks.{i}.att.', f'blocks.{i}.ffn.'
    for name in 'xwkvrg':
      weights[f'{att}time_maa_{name}'] = normal(1, 1, width, scale=0.5)
    weights[f'{att}time_maa_w1'] = normal(width, 160, scale=width**-0.5)
    weights[f'{att}time_maa_w2'] = normal(5, 32, width, scale=0.1)
    weights[f'{att}time_decay'] = normal(1, 1, width) - 3
    weights[f'{att}time_decay_w1'] = normal(width, 64, scale=width**-0.5)
    weights[f'{att}time_decay_w2'] = normal(64, width, scale=0.1)
    weights[f'{att}time_faaaa'] = normal(width // 64, 64)
    for name in ('receptance', 'key', 'value', 'gate', 'output'):
      weights[f'{att}{name}.weight'] = normal(width, width, scale=width**-0.5)
    for name in 'kr':
      weights[f'{ffn}time_maa_{name}'] = normal(1, 1, width, scale=0.5)
    for name, shape in {
      'key': (hidden, width),
      'value': (width, hidden),
      'receptance': (width, width),
    }.items():
      weights[f'{ffn}{name}.weight'] = normal(*shape, scale=width**-0.5)
  return weights


def test_rwkv6_is_that_of_the_package_rwkv(tmp_path):
  torch = pytest.importorskip('torch')
  os.environ.setdefault('RWKV_JIT_ON', '0')
  os.environ.setdefault('RWKV_CUDA_ON', '0')
  published = pytest.importorskip('rwkv.model')
  stream = np.random.default_rng(0)
  weights = rwkv6_weights(stream, 128)
  path = tmp_path / 'tiny'
  torch.save(
    {name: torch.tensor(x) for name, x in weights.items()}, f'{path}.pth'
  )
  theirs = published.RWKV(model=str(path), strategy='cpu fp32', verbose=False)
  tokens = stream.integers(0, VOCABULARY, TOKENS)
  expected, _ = theirs.forward(tokens.tolist(), None, full_output=True)
  decoder = hybrid_lm.decoder(
    VOCABULARY,
    pattern='R',
    layers=LAYERS,
    width=128,
    norm='layer',
    embedding_norm=True,
    tied=False,
    initial='zeros',
    chunk=16,
  )
  params = jax.tree.map(jnp.asarray, rwkv6_params(weights))
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  found = heads_of(decoder)(params, tokens[None])
  assert np.std(expected.numpy()) > 0.5
  np.testing.assert_allclose(found[0], expected.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('groups', [1, 2])
def test_mamba2_is_that_of_transformers(groups):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  width, head_width, state_width = 32, 16, 8
  torch.manual_seed(0)
  theirs = transformers.Mamba2ForCausalLM(
    transformers.Mamba2Config(
      vocab_size=VOCABULARY,
      hidden_size=width,
      num_hidden_layers=LAYERS,
      num_heads=2 * width // head_width,
      head_dim=head_width,
      state_size=state_width,
      n_groups=groups,
      expand=2,
      conv_kernel=4,
      chunk_size=16,
      tie_word_embeddings=False,
    )
  ).eval()
  stream = np.random.default_rng(1)
  with torch.no_grad():  # away from ones and zeros
    for x in theirs.parameters():
      x += 0.1 * torch.tensor(stream.normal(size=x.shape), dtype=x.dtype)
  weights = {name: x.numpy() for name, x in theirs.state_dict().items()}
  tokens = stream.integers(0, VOCABULARY, TOKENS)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens[None])).logits.numpy()

  def mixer(name, transform=lambda x: x):
    return stack(weights, 'backbone.layers.{}.mixer.' + name, transform)

  params = {
    'embedding': {'table': weights['backbone.embeddings.weight']},
    'mamba2': {
      'before_ssm': {
        'norm': {'scale': stack(weights, 'backbone.layers.{}.norm.weight')}
      },
      'ssm': {
        'in': mixer('in_proj.weight', np.transpose),
        'conv': {
          'kernel': mixer('conv1d.weight', lambda x: x[:, 0].T),
          'bias': mixer('conv1d.bias'),
        },
        'dt_bias': mixer('dt_bias'),
        'a_log': mixer('A_log'),
        'skip': mixer('D'),
        'norm': mixer('norm.weight'),
        'out': mixer('out_proj.weight', np.transpose),
      },
    },
    'norm': {'scale': weights['backbone.norm_f.weight']},
    'head': weights['lm_head.weight'].T,
  }
  params = jax.tree.map(jnp.asarray, params)
  decoder = hybrid_lm.decoder(
    VOCABULARY,
    pattern='M',
    layers=LAYERS,
    width=width,
    head_width=head_width,
    state_width=state_width,
    groups=groups,
    tied=False,
    initial='zeros',
    chunk=16,
  )
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  found = heads_of(decoder)(params, tokens[None])
  assert np.std(expected) > 0.05
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
