"""One supervision step against the published one, in NumPy float64.

Written from the equations of the paper and its code: rows first, transposes
around the mixer, one matrix for gate and up, Python loops.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Spec
from recursive_weights.models import trm
from recursive_weights.recursion import objective
from recursive_weights.tasks import _losses

ROWS, TOKENS, WORDS, CLASSES, WIDTH, HEADS = 3, 10, 7, 5, 16, 2
PUZZLES, PREFIX = 4, 3
CYCLES, INNER = 3, 2


def rms(x, axis):
  return x / np.sqrt((x**2).mean(axis, keepdims=True) + 1e-5)


def swiglu(half, x):
  gate_up = np.concatenate([half['gate'], half['up']], axis=1)
  gate, up = np.split(x @ gate_up, 2, axis=-1)
  return (gate / (1 + np.exp(-gate)) * up) @ half['down']


def attention(half, x, turns):
  batch, tokens, width = x.shape
  size = width // HEADS
  query, key, value = np.split(x @ half['qkv'], 3, axis=-1)
  frequency = 1 / 10_000 ** (np.arange(0, size, 2) / size)
  angle = np.outer(np.arange(tokens), frequency)
  angle = turns * np.concatenate([angle, angle], axis=-1)
  out = np.zeros_like(x)
  for head in range(HEADS):
    own = slice(head * size, (head + 1) * size)

    def turned(u, own=own):
      u = u[..., own]
      other = np.concatenate([-u[..., size // 2 :], u[..., : size // 2]], -1)
      return u * np.cos(angle) + other * np.sin(angle)

    for b in range(batch):
      score = turned(query)[b] @ turned(key)[b].T / np.sqrt(size)
      share = np.exp(score - score.max(-1, keepdims=True))
      share = share / share.sum(-1, keepdims=True)
      out[b, :, own] = share @ value[b, :, own]
  return out @ half['out']


def block(params, x, turns):
  if 'token' in params:
    x = x.transpose(0, 2, 1)
    x = rms(x + swiglu(params['token'], x), -1)
    x = x.transpose(0, 2, 1)
  else:
    x = rms(x + attention(params['attention'], x, turns), -1)
  return rms(x + swiglu(params['channel'], x), -1)


def net(params, u):
  layers = len(params['blocks']['channel']['down'])
  turns = 'position' not in params  # rotated, or with learned positions
  for i in range(layers):
    u = block(jax.tree.map(lambda w, i=i: w[i], params['blocks']), u, turns)
  return u


def embed(params, inputs):
  """With puzzles: their vectors, padded by zeros to PREFIX places, go first."""
  if 'puzzle' in params:
    x = params['embedding'][inputs['tokens']]
    first = params['puzzle'][inputs['puzzle']]
    first = np.pad(first, ((0, 0), (0, (PREFIX - 1) * WIDTH)))
    x = np.concatenate([first.reshape(ROWS, PREFIX, WIDTH), x], axis=1)
  else:
    x = params['embedding'][inputs]
  if 'position' in params:
    x = 0.5**0.5 * (x + params['position'])
  return np.sqrt(WIDTH) * x


def one_cycle(params, x, y, z):
  for _ in range(INNER):
    z = net(params, z + y + x)
  return net(params, y + z), z


def read(params, y):
  halt = y[:, 0] @ params['halt']['kernel'] + params['halt']['bias']
  own = y[:, PREFIX:] if 'puzzle' in params else y
  return own @ params['readout'], halt[:, 0]


def step(params, inputs, y, z):
  x = embed(params, inputs)
  for _ in range(CYCLES):
    y, z = one_cycle(params, x, y, z)
  return (y, z), read(params, y)


CASES = {
  'mixer': {'cell': 'mixer'},
  'attention': {'cell': 'attention', 'position': 'rotation', 'heads': HEADS},
  'learned': {'cell': 'attention', 'position': 'learned', 'heads': HEADS},
  'puzzles': {
    'cell': 'attention',
    'position': 'rotation',
    'heads': HEADS,
    'prefix': PREFIX,
  },
  'puzzles, learned': {
    'cell': 'mixer',
    'position': 'learned',
    'prefix': PREFIX,
  },
}


def problem(name):
  """Model, parameters, inputs and a state that is not the first one."""
  spec = Spec(
    jax.ShapeDtypeStruct((TOKENS,), jnp.int32), (TOKENS,), CLASSES, {}
  )
  fields = CASES[name]
  if 'prefix' in fields:
    one = {'tokens': spec.inputs, 'puzzle': jax.ShapeDtypeStruct((), jnp.int32)}
    spec = spec._replace(inputs=one, puzzles=PUZZLES)
  model = trm.make(
    spec,
    width=WIDTH,
    vocabulary=WORDS,
    multiple=8,
    cycles=CYCLES,
    inner=INNER,
    steps=2,
    **fields,
  )
  keys = jax.random.split(jax.random.key(3), 5)
  inputs = jax.random.randint(keys[0], (ROWS, TOKENS), 0, WORDS)
  if spec.puzzles:
    inputs = {'tokens': inputs, 'puzzle': jnp.asarray([2, 0, 2])}
  params = model.init(keys[1], inputs)
  params['halt']['kernel'] = jax.random.normal(keys[2], (WIDTH, 1))
  if spec.puzzles:
    params['puzzle'] = jax.random.normal(keys[4], (PUZZLES, WIDTH))
  places = TOKENS + fields.get('prefix', 0)
  noise = jax.random.normal(keys[3], (2, ROWS, places, WIDTH))
  carry = model.carry(params, ROWS)
  carry = {'y': carry['y'] + noise[0], 'z': carry['z'] + noise[1]}
  return model, params, inputs, carry


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def whole(inputs):
  return jax.tree.map(np.asarray, inputs)


@pytest.mark.parametrize('name', CASES)
def test_a_step_is_the_published_one(name):
  model, params, inputs, carry = problem(name)
  outputs, new = jax.jit(
    lambda p, c, x: model.apply(p, c, x, key=None, train=True)
  )(params, carry, inputs)
  state = double(carry)
  (y, z), (logits, halt) = step(
    double(params), whole(inputs), state['y'], state['z']
  )
  tolerance = {'rtol': 1e-4, 'atol': 1e-4}
  np.testing.assert_allclose(outputs['logits'][0], logits, **tolerance)
  np.testing.assert_allclose(outputs['halt'][0], halt, **tolerance)
  np.testing.assert_allclose(new['y'], y, **tolerance)
  np.testing.assert_allclose(new['z'], z, **tolerance)
  # In evaluation the steps follow one another.
  outputs, _ = jax.jit(lambda p, c, x: model.apply(p, c, x))(
    params, carry, inputs
  )
  _, (second, _) = step(double(params), whole(inputs), y, z)
  assert outputs['logits'].shape[0] == 2
  np.testing.assert_allclose(outputs['logits'][1], second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', CASES)
def test_the_gradient_is_the_published_one(name):
  """Slopes in a random direction of each leaf, by differences in float64.

  Of stable-max cross-entropy and half the halting head's loss. The states
  before the last cycle are constants of the published gradient.
  """
  model, params, inputs, carry = problem(name)
  rng = np.random.default_rng(0)
  targets = rng.integers(0, CLASSES, (ROWS, TOKENS))
  right = np.array([1.0, 0.0, 0.0])

  def loss_of(logits, batch):
    """The task's loss, and a metric as if the first row's answer were right."""
    loss_BT = _losses.cross_entropy(logits, jnp.asarray(targets), 'stablemax')
    return loss_BT.mean(-1), {'puzzle_accuracy': jnp.asarray(right)}

  @jax.jit
  @jax.grad
  def gradient(params):
    outputs, _ = model.apply(params, carry, inputs, key=None, train=True)
    batch = {'weight': jnp.ones(ROWS)}
    return objective.halting(weight=0.5).score(outputs, loss_of, batch)[0]

  found = gradient(params)
  base, y, z = double(params), double(carry['y']), double(carry['z'])
  x = embed(base, whole(inputs))
  for _ in range(CYCLES - 1):
    y, z = one_cycle(base, x, y, z)

  def value(params):
    x = embed(params, whole(inputs))
    logits, halt = read(params, one_cycle(params, x, y, z)[0])
    s = np.where(logits < 0, 1 / (1 - np.minimum(logits, 0)), logits + 1)
    share = np.take_along_axis(
      s / s.sum(-1, keepdims=True), targets[..., None], -1
    )
    sure = 1 / (1 + np.exp(-halt))
    halting = -right * np.log(sure) - (1 - right) * np.log(1 - sure)
    return (-np.log(share).mean((1, 2)) + 0.5 * halting).mean()

  leaves, structure = jax.tree.flatten(base)
  names = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(base)
  ]
  for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
    direction = rng.normal(size=leaf.shape)

    def moved(size, index=index, leaf=leaf, direction=direction):
      changed = list(leaves)
      changed[index] = leaf + size * direction
      return value(jax.tree.unflatten(structure, changed))

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    ours = np.sum(np.asarray(jax.tree.leaves(found)[index]) * direction)
    scale = np.linalg.norm(direction) * np.linalg.norm(
      np.asarray(jax.tree.leaves(found)[index])
    )
    assert abs(ours - slope) <= 1e-4 * scale + 1e-6, (name, ours, slope)
    assert (scale > 0) == (not name.startswith('start/'))


def test_parameter_counts_are_the_published_ones():
  """5,028,866 and 6,828,034, with a halting head of two values: 513 more."""
  spec = Spec(jax.ShapeDtypeStruct((81,), jnp.int32), (81,), 11, {})
  counts = []
  for fields in ({}, {'cell': 'attention', 'position': 'rotation'}):
    model = trm.make(spec, prefix=16, **fields)
    params = jax.eval_shape(model.init, jax.random.key(0), None)
    params.pop('start')  # not parameters there but buffers
    counts.append(sum(x.size for x in jax.tree.leaves(params)) + 513)
  assert counts == [5_028_866, 6_828_034]
