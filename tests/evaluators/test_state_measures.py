"""Measures of states against loops in float64 and cases of known answer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import (
  _ngrams,
  _state_measures,
  _state_reading,
  _verdicts,
)
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import text
from tests import tiny_hybrid

RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(3, 2, 6, 8)).astype(np.float32) * [[[[2.0]]]]


def by_head(function, *states):
  """A measure of one head's matrices, over the first two axes."""
  return np.array(
    [
      [function(*(np.float64(s[i, j]) for s in states)) for j in range(2)]
      for i in range(3)
    ]
  )


def softmax_entropy(s):
  p = np.exp(s / np.sqrt((s**2).mean()))
  p = p / p.sum()
  return -(p * np.log(p)).sum() / np.log(s.size)


def even(s):
  p = (s**2 / (s**2).sum()).ravel()
  return np.exp(-(p * np.log(p)).sum()) / p.size


def share(count):
  def function(s):
    values = np.linalg.svd(s, compute_uv=False)
    return values[:count].sum() / values.sum()

  return function


def test_measures_are_their_formulas():
  s = np.float32(STATES)
  other = s + np.float32(0.3 * RNG.normal(size=s.shape))
  top1, top5 = _state_measures.spectrum(s)
  pairs = [
    (_state_measures.rms(s), by_head(lambda x: np.sqrt((x**2).mean()), s)),
    (_state_measures.entropy(s), by_head(softmax_entropy, s)),
    (_state_measures.evenness(s), by_head(even, s)),
    (top1, by_head(share(1), s)),
    (top5, by_head(share(5), s)),
    (
      _state_measures.cosine(s, other),
      by_head(
        lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b),
        s,
        other,
      ),
    ),
    (
      _state_measures.update(s, other),
      by_head(lambda a, b: np.linalg.norm(b - a) / np.linalg.norm(b), s, other),
    ),
  ]
  for found, wanted in pairs:
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_extremes():
  one = np.zeros((6, 8), np.float32)
  assert float(_state_measures.entropy(one)) == pytest.approx(1)
  assert float(_state_measures.spectrum(one)[0]) == 0
  assert float(_state_measures.cosine(one, one)) == 0
  assert float(_state_measures.update(STATES[0, 0], STATES[0, 0])) == 0
  outer = np.outer(np.arange(1.0, 7), np.arange(1.0, 9)).astype(np.float32)
  assert float(_state_measures.spectrum(outer)[0]) == pytest.approx(1)
  # Entropy of a Gaussian state as the docstring has it, whatever its size.
  wide = RNG.normal(size=(64, 64)).astype(np.float32)
  for size in (1e-4, 1.0, 1e4):
    found = float(_state_measures.entropy(size * wide))
    assert found == pytest.approx(1 - 0.5 / math.log(4096), abs=4e-3)
  # Evenness as its docstring has it, of states large enough for its limits.
  for size in (64, 256):
    square = RNG.normal(size=(100, size, size)).astype(np.float32)
    pair = square[:, 0, :, None] * square[:, 1, None, :]
    same = np.ones((4, size, size), np.float32)
    one = np.zeros((4, size, size), np.float32)
    one[:, 1, 2] = -3
    for state, wanted in (
      (square, 0.482),
      (pair, 0.23),
      (same, 1),
      (one, size**-2),
    ):
      found = _state_measures.evenness(state).mean()
      assert found == pytest.approx(wanted, rel=0.1)
  wide[0, 0] = 1e3
  assert float(_state_measures.entropy(wide)) < 1e-3
  # One entry of 26 is the most that can exceed five times the root mean square.
  one = np.zeros((2, 13), np.float32)
  one[0, 0] = 1
  assert float(_state_measures.saturation(one)) == pytest.approx(1 / 26)
  assert float(_state_measures.saturation(one[:, :12])) == 0


@pytest.mark.parametrize('wanted', [0.2, 0.999, 1.0, 3.7, 40.0, 100.0, 500.0])
def test_half_life_of_an_exponential(wanted):
  curve = 7.0 * 0.5 ** (np.arange(101) / wanted)
  found = _state_measures.half_life(np.stack([curve, curve], 1))
  assert found.shape == (2,)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_half_life_of_what_never_halves():
  flat, grows = np.ones(11), 1.1 ** np.arange(11)
  gone = np.array([1.0, *np.zeros(10)])
  for curve in (flat, grows):
    found = _state_measures.half_life(curve[:, None])[0]
    assert found == pytest.approx(_state_measures.NEVER)
  assert _state_measures.half_life(gone[:, None])[0] < 0.02
  nothing = np.zeros((11, 1))
  found = _state_measures.half_life(nothing)[0]
  assert found == pytest.approx(_state_measures.NEVER)


@pytest.mark.parametrize(
  ('dead', 'verdict'), [(0, 'PASS'), (1, 'WARN'), (2, 'FAIL'), (3, 'FAIL')]
)
@pytest.mark.parametrize('value', [0.0, 0.05, 2e5, _state_measures.NEVER])
def test_a_quarter_of_collapsed_heads_is_too_many(dead, verdict, value):
  """Of eight, whose median stays what it was."""
  lives = np.array([0.43, 693.0, 2.0, 5.0, 12.0, 25.0, 60.0, 250.0])
  lives[2 : 2 + dead] = value
  share = _state_measures.collapsed(np.stack([lives, np.full(8, 9.0)]))
  np.testing.assert_allclose(share, [dead / 8, 0])
  places = {'a@0': float(share[0])}
  gates = _verdicts.judge({'collapsed': places}, _verdicts.bounds({}))
  assert gates['G3.5']['verdict'] == verdict


def test_a_half_life_that_is_not_finite_is_no_life():
  assert _state_measures.collapsed(np.array([1.0, np.nan])) == 0.5


def test_selection_is_the_spread_of_decays_over_texts():
  rate_BH = np.array([[0.1, 0.2], [0.3, 0.2]])
  curve = np.exp(-rate_BH[None] * np.arange(20)[:, None, None])
  found = _state_measures.selection(curve, tokens=8)
  np.testing.assert_allclose(found, [0.5, 0.0], atol=1e-6)
  assert (_state_measures.selection(np.ones((9, 2, 2))) == 0).all()


def constant_decays(params, half_life_LH):
  """Both components forget at that rate, whatever the text."""
  a_LH = 0.5 ** (1 / np.asarray(half_life_LH))
  bias = np.repeat(np.log(a_LH / (1 - a_LH)), tiny_hybrid.KEYS, axis=1)
  part = {
    name: weights
    | {
      'decay': 0 * weights['decay'],
      'decay_bias': jnp.asarray(bias, jnp.float32),
    }
    for name, weights in params['hybrid'].items()
  }
  return params | {'hybrid': part}


@pytest.fixture(scope='module')
def reader():
  return _state_reading.make(tiny_hybrid.decoder)


def fade(reader, params, tokens_BT, key=0):
  cache = tiny_hybrid.cache(params, len(tokens_BT))
  # A state with something in it.
  segment = tokens_BT[:, :16].reshape(1, len(tokens_BT), 16)
  cache, _ = reader.read(params, cache, segment, segment)
  rows, tokens = _state_reading.pushed(
    jax.device_get(cache), tokens_BT[:, 16:], np.random.default_rng(key)
  )
  return jax.device_get(reader.fade(params, rows, tokens))


def test_half_lives_are_measured_as_they_are(reader):
  """Known decays by layer and head, with layers below that move too."""
  wanted = np.array([[2.0, 5.0], [11.0, 60.0]])
  params = tiny_hybrid.init(jax.random.key(1), 9)
  tokens = RNG.integers(9, size=(3, 48))
  found = fade(reader, constant_decays(params, wanted), tokens)
  assert set(found) == {'hybrid/time', 'hybrid/ssm'}
  for distance in found.values():
    assert distance.shape == (33, 2, 3, 2)
    half = np.median(_state_measures.half_life(distance), 1)
    np.testing.assert_allclose(half, wanted, rtol=0.02)
    assert (_state_measures.selection(distance) < 1e-3).all()
  # Decays that hang on the text are told apart.
  for distance in fade(reader, params, tokens).values():
    assert (_state_measures.selection(distance) > 0.01).all()


def test_read_gives_neighbouring_states_and_losses(reader):
  params = tiny_hybrid.init(jax.random.key(1), 9)
  tokens_BT = RNG.integers(9, size=(3, 13))
  segments = tokens_BT[:, :12].reshape(3, 3, 4).swapaxes(0, 1)
  targets = tokens_BT[:, 1:].reshape(3, 3, 4).swapaxes(0, 1)
  empty = tiny_hybrid.cache(params, 3)
  _, found = reader.read(params, empty, segments, targets)
  d = tiny_hybrid.decoder
  cache, losses = empty, []
  for t in range(12):
    x, pending = d.blocks(params, cache, d.embed(params, tokens_BT[:, t, None]))
    before, cache = cache, d.commit(cache, pending)
    logits = np.float64(d.head(params, x))[:, 0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses.append(-log_p[np.arange(3), tokens_BT[:, t + 1]])
    if t % 4 == 3:
      for name, state in _state_reading.states(cache).items():
        old = _state_reading.states(before)[name]
        np.testing.assert_allclose(
          found['after'][name][t // 4], state, 1e-4, 1e-5
        )
        np.testing.assert_allclose(
          found['before'][name][t // 4], old, 1e-4, 1e-5
        )
      for row, read in enumerate(tokens_BT[:, t]):
        p = np.delete(np.exp(log_p[row]), read)
        p /= p.sum()
        assert found['entropy'][t // 4, row, 3] == pytest.approx(
          -(p * np.log(p)).sum(), rel=1e-4
        )
      assert (found['choice'][t // 4, :, 3] == log_p.argmax(-1)).all()
  loss_SBT = np.asarray(found['loss'])
  np.testing.assert_allclose(
    loss_SBT.swapaxes(0, 1).reshape(3, 12).T, losses, rtol=1e-4, atol=1e-5
  )


def test_gradients_and_hidden_states(reader):
  params = tiny_hybrid.init(jax.random.key(1), 9)
  tokens_BT = RNG.integers(9, size=(3, 13))
  inputs_BT, targets_BT = tokens_BT[:, :12], tokens_BT[:, 1:]
  d, empty = tiny_hybrid.decoder, tiny_hybrid.cache(params, 3)
  norms, noted = jax.device_get(
    reader.gradients(params, empty, inputs_BT, targets_BT)
  )
  hidden = {}

  def loss(params):
    x, _ = d.blocks(params, empty, d.embed(params, inputs_BT))
    log_p = jax.nn.log_softmax(d.head(params, x))
    return -jnp.take_along_axis(log_p, targets_BT[..., None], -1).mean()

  wanted = jax.jit(jax.grad(loss))(params)
  for path, g in jax.tree_util.tree_leaves_with_path(wanted):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    np.testing.assert_allclose(norms[name], np.linalg.norm(g), rtol=1e-4)

  def keep(layer, x, part):
    jax.debug.callback(
      lambda i, x: hidden.setdefault((part, int(i)), np.float64(x)), layer, x
    )
    return x

  d.blocks(params, empty, d.embed(params, inputs_BT), tap=keep)
  jax.effects_barrier()
  assert len(hidden) == 2 * len(noted)
  for (part, layer), x in hidden.items():
    wanted = 1, x.var((0, 1)).mean(), (x * x).mean()
    np.testing.assert_allclose(noted[part][layer], wanted, rtol=1e-4)
  assert all((x[2:] == 0).all() for x in noted.values())


def test_silenced_is_without_that_part():
  params = tiny_hybrid.init(jax.random.key(1), 9)
  quiet = _state_reading.silenced(params, 'hybrid/time')
  assert not quiet['hybrid']['time']['out'].any()
  assert quiet['hybrid']['ssm']['out'].all()
  one = _state_reading.silenced(params, 'hybrid/ssm', 1)['hybrid']['ssm']['out']
  assert one[0].any() and not one[1].any()


def test_counts_of_tokens_against_a_loop(tmp_path):
  documents = [''.join(RNG.choice(list('abc'), 40)) for _ in range(60)]
  (tmp_path / 'a.txt').write_text('\n\n'.join(documents))
  task = text.make(path=str(tmp_path / 'a.txt'), separator='\n\n', length=16)
  held = task.batch('test', 0, 1)
  inputs, targets = held['inputs']['tokens'], held['targets']
  single, double = _ngrams.losses(task, inputs, targets, 16)
  classes, size = task.spec.classes, 16
  batches = -(-task.spec.sizes['train'] * 16 // (size * 16))
  ones, twos = np.zeros(classes), np.zeros((classes, classes))
  for index in range(batches):
    batch = task.batch('train', index, size)
    for a, b in zip(
      batch['inputs']['tokens'].ravel(), batch['targets'].ravel(), strict=True
    ):
      ones[b] += 1
      twos[a, b] += 1
  p = (ones + 1) / (ones.sum() + classes)
  p2 = (twos + p[None]) / (twos.sum(1, keepdims=True) + 1)
  np.testing.assert_allclose(p2.sum(1), 1)
  np.testing.assert_allclose(single, -np.log(p[targets]).mean())
  np.testing.assert_allclose(double, -np.log(p2[inputs, targets]).mean())


@pytest.mark.parametrize(
  ('value', 'verdict'),
  [(0.5, 0), (1.0, 0), (0.2, 1), (3.0, 1), (0.05, 2), (11.0, 2)],
)
def test_bounds_have_two_sides(value, verdict):
  four = (0.1, 0.3, 2.0, 10.0)
  assert _verdicts.judge_value(value, four) == verdict
  for bad in (math.nan, math.inf, -math.inf):
    assert _verdicts.judge_value(bad, four) == 2


def test_the_worst_place_speaks_for_a_gate():
  limits = _verdicts.bounds({'half_life': (1.0, 2.0, 100.0, 1000.0)})
  found = _verdicts.judge(
    {
      'half_life': {'a@0': 10.0, 'a@1': 1.5, 'b@0': 0.5},
      'round_trip': {'': 1.0},
      'elsewhere': {'': math.nan},
    },
    limits,
  )
  assert list(found) == ['G0', 'G3.5']
  assert found['G0'] == {'verdict': 'PASS', 'reasons': []}
  assert found['G3.5']['verdict'] == 'FAIL'
  warned, failed = found['G3.5']['reasons']
  assert warned == 'WARN half_life a@1 = 1.5, wanted >= 2 and <= 100'
  assert failed.startswith('FAIL half_life b@0 = 0.5')
  values = {'half_life': {'a@0': 10.0, 'b@1': 9.0}, 'memory': {'a': 0.5}}
  shown = _verdicts.table(
    found,
    values,
    {'random': {'memory': {'a': 0.25}}},
    {'half_life': {'a': (3.0, 80.0), '': (1.5, 90.0)}},
  )
  rows = [line.split() for line in shown.splitlines()]
  assert rows[2][:2] == ['G3.5', 'FAIL']
  assert rows[-4:] == [
    ['measure', 'model', 'random', 'healthy'],
    ['half_life', 'a@0', '10', '3', 'to', '80'],
    ['half_life', 'b@1', '9', '1.5', 'to', '90'],  # no b was trained
    ['memory', 'a', '0.5', '0.25'],
  ]


def test_healthy_models_lie_within_the_bounds():
  """Of every measure of states and components that is judged."""
  found = _verdicts.healthy()
  judged = {*_verdicts.GATES['G3.5'], *_verdicts.GATES['G3.6']}
  assert judged <= set(found)
  for measure, by_component in found.items():
    least, most = by_component['']
    ranges = [pair for component, pair in by_component.items() if component]
    assert least == min(x for x, _ in ranges)
    assert most == max(x for _, x in ranges)
    if measure in judged:
      four = _verdicts.BOUNDS[measure]
      assert not any(_verdicts.judge_value(x, four) for x in (least, most))
  assert {'hybrid/time', 'hybrid/ssm', 'mamba2'} < set(found['half_life'])


def test_every_measure_of_a_gate_has_bounds_that_rise():
  named = {name for names in _verdicts.GATES.values() for name in names}
  assert named == set(_verdicts.BOUNDS)
  assert _verdicts.bounds(_verdicts.BOUNDS) == _verdicts.BOUNDS
  with pytest.raises(UserError, match=r'no measure hope; there are: round'):
    _verdicts.bounds({'hope': (0, 1, 2, 3)})
  with pytest.raises(UserError, match=r'bounds.update must be four numbers'):
    _verdicts.bounds({'update': (0, 3, 2, 4)})
