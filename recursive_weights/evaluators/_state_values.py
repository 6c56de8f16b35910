"""Every measure of a language model's states, by name and place.

A place is a component, `COMPONENT@LAYER`, `layer@LAYER`, or '' for the model.
"""

import jax
import numpy as np

from recursive_weights.evaluators import (
  _average,
  _state_measures,
  _state_reading,
)
from recursive_weights.interfaces import Decoder, Tree

# By name and place.
Values = dict[str, dict[str, float]]

_ANSWERS = ('loss', 'entropy', 'top', 'choice')


def halves_of(batch: np.ndarray, chunk: int) -> list[tuple]:
  """Inputs and targets of both halves of texts, in segments `[S, B, T]`."""

  def segments(x_BT):
    return x_BT.reshape(len(x_BT), -1, chunk).swapaxes(0, 1)

  middle = (batch.shape[1] - 1) // 2
  return [
    (segments(x[:, :-1]), segments(x[:, 1:]))
    for x in (batch[:, : middle + 1], batch[:, middle:])
  ]


def measure(
  decoder: Decoder,
  reader: _state_reading.Reader,
  params: Tree,
  key: jax.Array,
  halves: list[tuple],
  *,
  classes: int,
  layers: bool,
) -> tuple[Values, Values]:
  """The measures, and those of random states in the place of the states.

  Args:
    decoder, reader: of the model.
    params: derived weights.
    key: of what is drawn.
    halves: of texts, from `halves_of`.
    classes: V.
    layers: ablate layer by layer too.
  """
  (inputs, targets), (later_inputs, _) = halves
  rows = inputs.shape[1]
  empty = _average.beside(params, decoder.cache(params, rows))
  random = np.random.default_rng(np.asarray(jax.random.key_data(key)))

  def read(weights, cache=empty, half=0):
    return reader.read(weights, cache, *halves[half])

  def loss(weights):
    cache, first = read(weights)
    _, second = read(weights, cache, 1)
    return float(np.mean(jax.device_get([first['loss'], second['loss']])))

  middle, first = read(params)
  _, second = read(params, middle, 1)
  first, second = jax.device_get((first, second))
  values, controls = _of_states(first, second, random)
  values |= _of_answers(first, second, halves, classes)
  total, after = values['loss'][''], float(second['loss'][0].mean())

  some = jax.tree.map(
    lambda x: np.asarray(x)[: max(rows // 2, 2)], jax.device_get(middle)
  )
  few = len(some['position'])
  text_BT = later_inputs[:, :few].swapaxes(0, 1).reshape(few, -1)

  def lives(cache):
    pushed = _state_reading.pushed(cache, text_BT, random)
    return _of_fading(jax.device_get(reader.fade(params, *pushed)))

  values |= lives(some)
  noise = {k: _like(x, random) for k, x in _state_reading.states(some).items()}
  controls |= lives(_state_reading.with_states(some, noise))

  for component, state in _state_reading.states(middle).items():
    state = np.asarray(state)
    for handed, kept in (
      (np.roll(state, 1, 0), values),
      (_like(state, random), controls),
    ):
      cache = _state_reading.with_states(middle, {component: handed})
      _, other = read(params, _average.beside(params, cache), 1)
      rise = float(np.asarray(other['loss'])[0].mean()) - after
      kept.setdefault('memory', {})[component] = rise
    if not _state_reading.part(params, component):
      continue
    for layer in [None, *range(state.shape[1] if layers else 0)]:
      name = 'contribution' if layer is None else 'layer_contribution'
      place = component if layer is None else f'{component}@{layer}'
      rise = loss(_state_reading.silenced(params, component, layer)) - total
      values.setdefault(name, {})[place] = rise

  text_BT, targets_BT = (
    x.swapaxes(0, 1).reshape(rows, -1) for x in (inputs, targets)
  )
  norms, hidden = jax.device_get(
    reader.gradients(params, empty, text_BT, targets_BT)
  )
  values |= _of_gradients(list(second['after']), norms)
  values |= _of_hidden(hidden)
  return values, controls


def _of_answers(first, second, halves, classes):
  """Loss, entropy over ln(V - 1), how sure and how various answers are."""
  both = {k: np.concatenate([first[k], second[k]]) for k in _ANSWERS}
  there = np.unique(np.concatenate([targets for _, targets in halves]))
  found = {
    'loss': both['loss'].mean(),
    'output_entropy': both['entropy'].mean() / np.log(classes - 1),
    'top': both['top'].mean(),
    'distinct': len(np.unique(both['choice'])) / len(there),
  }
  return {name: {'': float(x)} for name, x in found.items()}


@jax.jit
def _describe(before, after):
  """Measures `[B, L, H]` of states `[S, B, L, H, K, V]` at ends of segments."""
  top1, top5 = _state_measures.spectrum(after[-1])
  return {
    'rms': _state_measures.rms(after[-1]),
    'entropy': _state_measures.entropy(after[-1]),
    'evenness': _state_measures.evenness(after[-1]),
    'top1': top1,
    'top5': top5,
    'saturation': _state_measures.saturation(after[-1]),
    'cosine': _state_measures.cosine(before, after).mean(0),
    'update': _state_measures.update(before, after).mean(0),
  }


def _of_states(first, second, random):
  """Measures of every layer's states, and of random ones of the same size."""
  values: Values = {}
  controls: Values = {}
  for component, after in second['after'].items():
    before = second['before'][component]
    noise = _like(before, random), _like(after, random)
    for states, kept in (((before, after), values), (noise, controls)):
      described = jax.device_get(_describe(*states))
      found = {name: x_BLH.mean((0, 2)) for name, x_BLH in described.items()}
      found['capacity'] = np.prod(after.shape[3:]) * found['update']
      for name, x_L in found.items():
        _add(kept, name, component, x_L)
    # Sizes of the first chunk's states.
    both = np.stack([first['after'][component][0], after[-1]])
    size = np.sqrt(np.square(both).mean((-2, -1))).mean((1, 3)) + 1e-30
    chunks = len(first['loss']) + len(second['loss'])
    power_L = np.log(size[1] / size[0]) / np.log(chunks)
    _add(values, 'growth', component, power_L)
  values['structure'] = {
    place: value / controls['top1'][place]
    for place, value in values.get('top1', {}).items()
  }
  return values, controls


def _of_fading(fading):
  """Half-lives of heads, and how much they depend on the text."""
  values: Values = {}
  for component, distance in fading.items():
    life_LH = np.median(_state_measures.half_life(distance), 1)
    for name, x_L in (
      ('half_life', np.median(life_LH, 1)),
      ('half_life_least', life_LH.min(1)),
      ('half_life_most', life_LH.max(1)),
      ('collapsed', _state_measures.collapsed(life_LH)),
      ('selection', np.median(_state_measures.selection(distance), 1)),
    ):
      _add(values, name, component, x_L)
  return values


def _like(state, random):
  """Gaussian states, of every head the size that it has."""
  size = np.sqrt(np.square(state).mean((-2, -1), keepdims=True))
  return (size + 1e-12) * random.standard_normal(state.shape, np.float32)


def _add(values, name, component, x_L):
  """Notes a measure of every layer of a component."""
  places = values.setdefault(name, {})
  places |= {f'{component}@{i}': float(x) for i, x in enumerate(x_L)}


def _of_gradients(components, norms):
  """Norms by component and by kind of parameter."""
  norms = {path: float(x) for path, x in norms.items()}

  def joined(paths):
    return float(np.sqrt(sum(norms[path] ** 2 for path in paths)))

  own = {
    name: joined(p for p in norms if p.startswith(f'{name}/'))
    for name in components
  }
  values: Values = {'gradient_norm': {'': joined(norms)}}
  if own:
    largest = max(max(own.values()), 1e-30)
    values['gradient'] = own
    values['gradient_share'] = {k: x / largest for k, x in own.items()}
    time, ssm = (
      np.sqrt(sum(x * x for k, x in own.items() if k.endswith(ends)))
      for ends in ('time', ('ssm', 'mamba2'))
    )
    if time and ssm:
      values['rwkv_over_ssm'] = {'': float(time / ssm)}
  sides: tuple[list, list] = ([], [])
  for path, x in norms.items():
    sides[bool(_state_reading.DECIDES.search(path))].append(x)
  if all(sides):
    other, deciding = (float(np.mean(x)) for x in sides)
    values['phase_shift'] = {'': deciding / max(other, 1e-30)}
  return values


def _of_hidden(hidden):
  """Spread over tokens of hidden states and of what components put out."""
  values: Values = {}
  for part, noted_LS in hidden.items():
    seen_L, variance_L, square_L = noted_LS.T
    there = seen_L > 0
    variance_L, square_L = variance_L[there], square_L[there]
    if part:
      spread_L = np.sqrt(variance_L / np.maximum(square_L, 1e-30))
      _add(values, 'spread', part, spread_L)
    else:
      ratio_L = variance_L[1:] / np.maximum(variance_L[:-1], 1e-30)
      _add(values, 'activation', 'layer', np.sqrt(variance_L))
      _add(values, 'variance_ratio', 'layer', ratio_L)
  return values
