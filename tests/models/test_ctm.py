"""The CTM against its equations, written once more as loops in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights import interfaces
from recursive_weights.models import ctm, ctm_neurons, ctm_sync
from recursive_weights.recursion import objective as objectives
from recursive_weights.recursion.unroll import unroll

BATCH, LENGTH, TICKS = 3, 5, 4
SMALL = {
  'width': 24,
  'input_width': 8,
  'heads': 2,
  'memory': 3,
  'ticks': TICKS,
  'sync_out': 4,
  'sync_action': 5,
}
RELU = {'hidden': 3, 'activation': 'relu'}
GLU = {'hidden': 3, 'activation': 'glu'}


def spec_of(kind='tokens'):
  if kind == 'tokens':
    inputs = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    return interfaces.Spec(inputs, (LENGTH,), 2, {})
  inputs = jax.ShapeDtypeStruct((LENGTH, 4), jnp.float32)
  return interfaces.Spec(inputs, (), 3, {})


def inputs_of(kind='tokens'):
  stream = np.random.default_rng(1)
  if kind == 'tokens':
    return jnp.asarray(stream.integers(0, 2, (BATCH, LENGTH)), jnp.int32)
  return jnp.asarray(stream.normal(size=(BATCH, LENGTH, 4)), jnp.float32)


def built(kind='tokens', **fields):
  model = ctm.make(spec_of(kind), **{**SMALL, 'nlm': GLU, **fields})
  params = model.init(jax.random.key(0), inputs_of(kind))
  # Zeros and ones would hide a term left out.
  noisy = jax.tree.map(
    lambda x: x + 0.2 * jax.random.uniform(jax.random.key(x.size), x.shape),
    params,
  )
  return model, noisy


def run(model, params, kind='tokens', **kwargs):
  kwargs = {'key': None, 'train': False} | kwargs
  return jax.jit(lambda p, x: model.apply(p, {}, x, **kwargs)[0])(
    params, inputs_of(kind)
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def dense(p, x):
  return x @ p['kernel'] + p['bias']


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p['scale'] + p['bias']


def halves(x):
  n = x.shape[-1] // 2
  return x[..., :n] * sigmoid(x[..., n:])


def silu(x):
  return x * sigmoid(x)


def reference_synapse(p, x):
  if 'linear' in p:
    return norm(p['norm'], halves(dense(p['linear'], x)))

  def block(q, x):
    return silu(norm(q['norm'], dense(q['linear'], x)))

  levels = [block(p['first'], x)]
  for i in range(len(p['down'])):
    levels.append(block(p['down'][f'level{i}'], levels[-1]))
  x = levels.pop()
  for i in reversed(range(len(p['up']))):
    x = norm(p['skip'][f'level{i}'], block(p['up'][f'level{i}'], x) + levels[i])
  return x


def reference_neuron(p, history_M, d, activation):
  """One neuron of one example."""
  gated = activation == 'glu'
  cold = p.get('temperature', np.ones(9))
  if 'norm' in p:
    history_M = norm(p['norm'], history_M)

  def act(x):
    return halves(x) if gated else np.maximum(x, 0)

  h = act((history_M @ p['w1'][:, :, d] + p['b1'][:, d]) / cold[0])
  for i in range(len(p.get('hidden', ()))):
    h = h @ p['hidden'][i, :, :, d] + p['hidden_bias'][i, :, d]
    h = act(h / cold[1 + i])
  y = (p['w2'][:, :, d] @ h + p['b2'][:, d]) / cold[-1]
  return halves(y)[0] if gated else y[0]


def reference(p, inputs, spec, *, heads, ticks, nlm, pairs, gate=False, **_):
  """Every output by loops over ticks, examples, heads and neurons."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  inputs = np.asarray(inputs)
  if inputs.ndim == 2:
    x = p['features']['embedding'][inputs]
  else:
    x = dense(p['features']['dense'], inputs.astype(np.float64))
  length = inputs.shape[1]
  if 'position' in p['features']:
    x = x + p['features']['position'][None]
  if 'rotation' in p['features']:
    a = np.linspace(0, np.pi, length)
    turned = np.stack([-np.sin(a), np.cos(a)], -1)
    x = x + dense(p['features']['rotation'], turned)[None]
  x = norm(p['features']['norm'], dense(p['features']['linear'], x))
  att = p['attention']
  width = p['start']['z'].shape[0]
  seen = []
  for b in range(inputs.shape[0]):
    z, trace = p['start']['z'].copy(), p['start']['trace'].copy()
    sums = {side: [0.0, 0.0] for side in pairs}

    def sync(side, z, sums=sums):
      i, j = pairs[side]
      r = np.exp(-np.clip(p['sync'][f'{side}_decay'], 0, 15))
      sums[side][0] = r * sums[side][0] + z[i] * z[j]
      sums[side][1] = r * sums[side][1] + 1
      return sums[side][0] / np.sqrt(sums[side][1])

    sync('out', z)
    rows = []
    for _ in range(ticks):
      q = dense(att['query'], dense(att['sync'], sync('action', z)))
      k, v = dense(att['key'], x[b]), dense(att['value'], x[b])
      n = q.shape[0] // heads
      shares, mixed = [], []
      for h in range(heads):
        part = slice(h * n, (h + 1) * n)
        shares.append(softmax(k[:, part] @ q[part] / np.sqrt(n)))
        mixed.append(shares[-1] @ v[:, part])
      o = dense(att['out'], np.concatenate(mixed))
      pre = reference_synapse(p['synapse'], np.concatenate([o, z]))
      trace = np.concatenate([trace[:, 1:], pre[:, None]], 1)
      read = trace
      if gate:
        read = trace * np.array(
          [sigmoid(w_FD @ z).mean() for w_FD in p['nlm']['w1']]
        )
      z = np.array(
        [
          reference_neuron(p['nlm'], read[d], d, nlm['activation'])
          for d in range(width)
        ]
      )
      s = sync('out', z)
      logits = dense(p['readout'], s).reshape(*spec.answer, spec.classes)
      prob = softmax(logits)
      entropy = -(prob * np.log(prob)).sum(-1).mean() / np.log(spec.classes)
      rows.append(
        {
          'logits': logits,
          'certainty': 1 - entropy,
          'attention': np.stack(shares),
          'sync_out': s,
          'activation': z,
        }
      )
    seen.append(
      {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    )
  return {name: np.stack([s[name] for s in seen], 1) for name in seen[0]}


def plain_pairs(pairing, width, counts, self_pairs, seed):
  """Index lists by the definition; random draws are the model's own."""
  result = {}
  for side, count in counts.items():
    made = ctm_sync.make_pairs(pairing, side, width, count, self_pairs, seed)
    if pairing == 'random-pairing':
      result[side] = (made.left, made.right)
      continue
    ij = [(i, j) for i in range(count) for j in range(i, count)]
    left, right = made.left, made.right
    if pairing == 'first-last':
      left = right = np.arange(width)[:count]
      if side == 'action':
        left = right = np.arange(width)[-count:]
    result[side] = tuple(
      np.array(x)
      for x in zip(*((left[i], right[j]) for i, j in ij), strict=True)
    )
  return result


CASES = {
  'glu-random': {},
  'relu-first-last': {'nlm': RELU, 'pairing': 'first-last'},
  'pairing-self': {'pairing': 'random-pairing', 'self_pairs': 2},
  'unet': {'synapse_depth': 3},
  'layers-norm-gate': {
    'nlm': {**GLU, 'layers': 2, 'norm': True},
    'gate': True,
  },
  'relu-layers': {'nlm': {**RELU, 'layers': 1}, 'position': 'none'},
  'floats': {'kind': 'floats', 'position': 'rotation'},
  'tokens-without-table': {'input_width': 4, 'heads': 4},
}


@pytest.mark.parametrize('name', CASES)
def test_equals_loops_over_ticks_examples_and_neurons(name):
  fields = dict(CASES[name])
  kind = fields.pop('kind', 'tokens')
  full = {**SMALL, 'nlm': GLU, 'pairing': 'random', 'self_pairs': 0, **fields}
  model, params = built(kind, **full)
  pairs = plain_pairs(
    full['pairing'],
    full['width'],
    {'out': full['sync_out'], 'action': full['sync_action']},
    full['self_pairs'],
    0,
  )
  wanted = reference(
    params, inputs_of(kind), spec_of(kind), **{**full, 'pairs': pairs}
  )
  found = run(model, params, kind)
  assert set(found) == set(wanted)
  for output in wanted:
    np.testing.assert_allclose(
      found[output], wanted[output], rtol=2e-4, atol=2e-5, err_msg=output
    )


def test_shapes_and_training_outputs():
  model, params = built()
  outputs = run(model, params)
  heads, pairs = SMALL['heads'], 4 * 5 // 2
  chex.assert_shape(outputs['logits'], (TICKS, BATCH, LENGTH, 2))
  chex.assert_shape(outputs['certainty'], (TICKS, BATCH))
  chex.assert_shape(outputs['attention'], (TICKS, BATCH, heads, LENGTH))
  chex.assert_shape(outputs['sync_out'], (TICKS, BATCH, pairs))
  chex.assert_shape(outputs['activation'], (TICKS, BATCH, SMALL['width']))
  chex.assert_tree_all_finite(outputs)
  np.testing.assert_allclose(outputs['attention'].sum(-1), 1, rtol=1e-5)
  trained = run(model, params, train=True)
  assert set(trained) == {'logits', 'certainty'}
  assert model.carry(params, BATCH) == {}
  for name, x in trained.items():
    np.testing.assert_array_equal(x, outputs[name])


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'nlm': {**RELU, 'layers': 1}, 'pairing': 'first-last'},
    {'synapse_depth': 3, 'gate': True, 'nlm': {**GLU, 'norm': True}},
    {'kind': 'floats'},
    {'input_width': 4, 'heads': 4, 'position': 'rotation'},
  ],
)
def test_every_parameter_gets_a_gradient_at_the_start(fields):
  fields = dict(fields)
  kind = fields.pop('kind', 'tokens')
  model = ctm.make(spec_of(kind), **{**SMALL, 'nlm': GLU, **fields})
  params = model.init(jax.random.key(0), inputs_of(kind))

  @jax.jit
  @jax.grad
  def gradient(params):
    outputs, _ = model.apply(params, {}, inputs_of(kind), key=None, train=True)
    weight = jnp.arange(1.0, 1 + outputs['logits'].size)
    return (outputs['logits'].ravel() * weight).sum()

  gradient = gradient(params)
  chex.assert_tree_all_finite(gradient)
  for path, x in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name == 'attention/key/bias':
      continue  # a shift of all scores of a query: no effect by the equations
    assert np.abs(x).max() > 0, name
  decay = gradient['sync']['out_decay']
  assert (decay != 0).mean() > 0.9


def test_decay_gradient_leads_back_from_beyond_a_bound():
  p = jnp.array([-1.0, -1.0, 0.0, 0.0, 3.0, 16.0, 16.0])
  up = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
  value, pull = jax.vjp(ctm_sync.decay, p)
  np.testing.assert_array_equal(value, [0, 0, 0, 0, 3, 15, 15])
  # A descent step follows -gradient: at -1 only a rise is let through.
  np.testing.assert_array_equal(pull(up)[0], [0, -1, 1, -1, 1, 1, 0])


@pytest.mark.parametrize('hoist', [True, False])
def test_ticks_one_by_one_equal_apply(hoist):
  model, params = built(synapse_depth=2)
  wanted = run(model, params)
  recursion = model.recursion

  @jax.jit
  def by_tick(params, inputs):
    weights = recursion.prepare(params)
    context = recursion.encode(weights, inputs, None)
    state = recursion.start(weights, context)
    for leaf in jax.tree.leaves((context, state)):
      assert leaf.shape[0] == BATCH
    return unroll(recursion, weights, context, state, TICKS, hoist=hoist)[1]

  found = by_tick(params, inputs_of())
  assert set(found) == set(wanted)
  for name in wanted:
    np.testing.assert_allclose(
      found[name], wanted[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_a_table_of_tokens_equals_keys_and_values_by_example(monkeypatch):
  model, params = built()

  def value_and_gradient(model):
    def loss(params):
      outputs, _ = model.apply(params, {}, inputs_of(), key=None, train=True)
      return (outputs['logits'] ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(params)

  table = value_and_gradient(model)
  monkeypatch.setattr(ctm.ctm_attention, 'uses_table', lambda *args: False)
  other = value_and_gradient(ctm.make(spec_of(), **SMALL, nlm=GLU))
  chex.assert_trees_all_close(table, other, rtol=2e-4, atol=2e-5)


def test_history_equals_a_ring_buffer():
  memory, width, rows = 3, 4, 2
  stream = np.random.default_rng(0)
  ring = stream.normal(size=(width, memory, rows)).astype(np.float32)
  trace = jnp.asarray(ring)
  for tick in range(2 * memory + 1):
    pre = stream.normal(size=(rows, width)).astype(np.float32)
    ring[:, tick % memory] = pre.T
    trace = ctm_neurons.push(trace, jnp.asarray(pre))
    oldest_first = [(tick + 1 + m) % memory for m in range(memory)]
    np.testing.assert_array_equal(trace, ring[:, oldest_first])


def test_gate_off_is_absent():
  plain, params = built()
  off, off_params = built(gate=False)
  chex.assert_trees_all_equal(params, off_params)
  chex.assert_trees_all_equal(run(plain, params), run(off, off_params))
  jaxpr = jax.make_jaxpr(
    lambda model: model.apply(params, {}, inputs_of())[0], static_argnums=0
  )
  assert str(jaxpr(plain)) == str(jaxpr(off))
  on, on_params = built(gate=True)
  chex.assert_trees_all_equal_shapes(params, on_params)
  logits = run(on, params)['logits']
  assert np.abs(logits - run(plain, params)['logits']).max() > 1e-4


def test_no_key_is_deterministic_and_dropout_needs_one():
  plain, params = built()
  noisy, _ = built(dropout=0.3)
  wanted = run(plain, params)['logits']
  for kwargs in (
    {'train': True},
    {'train': False, 'key': jax.random.key(0)},
  ):
    found = run(noisy, params, **kwargs)['logits']
    np.testing.assert_array_equal(found, wanted)

  @jax.jit
  def sampled(key):
    return noisy.apply(params, {}, inputs_of(), key=key, train=True)[0][
      'logits'
    ]

  one, same, other = (sampled(jax.random.key(seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 1e-4
  assert np.abs(one - wanted).max() > 1e-4


def test_remat_and_unrolling_change_nothing():
  def gradient(**fields):
    model, params = built(**fields)
    objective = objectives.make('certainty')
    batch = {'targets': inputs_of(), 'weight': jnp.ones(BATCH)}

    def loss_of(logits, batch):
      log_p = jax.nn.log_softmax(logits)
      targets = jax.nn.one_hot(batch['targets'], 2)
      return -(log_p * targets).sum(-1).mean(-1), {}

    def loss(params):
      outputs, _ = model.apply(params, {}, inputs_of(), key=None, train=True)
      return objective.score(outputs, loss_of, batch)[0]

    return jax.jit(jax.grad(loss))(params)

  plain = gradient()
  for fields in ({'remat': True}, {'unrolled': 3}):
    chex.assert_trees_all_close(gradient(**fields), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_stays_near_float32(dtype):
  plain, params = built()
  half, _ = built(dtype=dtype)
  wanted, found = run(plain, params), run(half, params)
  assert found['logits'].dtype == jnp.float32
  assert found['activation'].dtype == jnp.dtype(dtype)
  np.testing.assert_allclose(found['logits'], wanted['logits'], atol=0.1)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(spec, **fields):
  model = ctm.make(spec, **fields)
  inputs = jax.ShapeDtypeStruct((1, *spec.inputs.shape), spec.inputs.dtype)
  return jax.eval_shape(model.init, jax.random.key(0), inputs)


def test_published_parity_model_has_5719714_parameters():
  spec = interfaces.Spec(jax.ShapeDtypeStruct((64,), jnp.int32), (64,), 2, {})
  params = shapes(
    spec,
    width=1024,
    input_width=512,
    heads=8,
    memory=25,
    ticks=75,
    nlm={'hidden': 16},
    position='rotation',
  )
  assert count(params) == 5_719_714
  assert params['nlm']['w1'].shape == (25, 32, 1024)
  assert params['nlm']['w2'].shape == (2, 16, 1024)


def test_neurons_of_the_design_have_8832_parameters():
  params = shapes(
    spec_of(), width=128, memory=15, nlm={'hidden': 4, 'activation': 'relu'}
  )
  sizes = {name: x.size for name, x in params['nlm'].items()}
  assert sizes == {'w1': 7680, 'b1': 512, 'w2': 512, 'b2': 128}


@pytest.mark.parametrize('pairing', ctm_sync.PAIRINGS)
def test_pairs_are_a_function_of_the_seed(pairing):
  def make(side, seed):
    return ctm_sync.make_pairs(pairing, side, 50, 7, 3, seed)

  chex.assert_trees_all_equal(make('out', 1), make('out', 1))
  out, action, other = make('out', 1), make('action', 1), make('out', 2)
  assert out.size == (7 if pairing == 'random-pairing' else 28)
  assert (out.left != action.left).any()
  if pairing == 'first-last':
    chex.assert_trees_all_equal(out, other)
    assert list(action.left) == list(range(43, 50))
  else:
    assert (out.left != other.left).any()
  if pairing == 'random-pairing':
    np.testing.assert_array_equal(out.left[:3], out.right[:3])


@pytest.mark.parametrize('limit', [0, 2**18])
def test_gradient_of_a_product_by_either_way(limit, monkeypatch):
  monkeypatch.setattr(ctm_sync, '_ONE_HOT_LIMIT', limit)
  pairs = ctm_sync.make_pairs('random', 'out', 9, 4, 0, 0)
  z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)), jnp.float32)
  weight = jnp.arange(20.0).reshape(2, 10)
  found = jax.grad(lambda z: (ctm_sync.product(pairs, z) * weight).sum())(z)
  wanted = np.zeros((2, 9))
  for p, (i, j) in enumerate(zip(pairs.rows, pairs.cols, strict=True)):
    left, right = pairs.left[i], pairs.right[j]
    wanted[:, left] += weight[:, p] * z[:, right]
    wanted[:, right] += weight[:, p] * z[:, left]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
  'fields',
  [
    {'width': 0},
    {'heads': 3},
    {'ticks': 0},
    {'nlm': {'hidden': 0}},
    {'nlm': {'hidden': 2, 'activation': 'gelu'}},
    {'nlm': {'hidden': 2, 'depth': 1}},
    {'pairing': 'all'},
    {'sync_out': 25},
    {'self_pairs': 9},
    {'dropout': 1.0},
    {'position': 'sine'},
  ],
)
def test_arguments_out_of_range_are_user_errors(fields):
  with pytest.raises(interfaces.UserError, match='got'):
    ctm.make(spec_of(), **{**SMALL, 'nlm': GLU, **fields})
