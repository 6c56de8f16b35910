"""Five measures of a model with derived weights against one without.

Parameters stored, final loss, speed of convergence, forward latency, and what
is reached on held-out data. Each is a function of two finished trainings.
"""

import statistics
import time

import jax
import numpy as np

from recursive_weights.interfaces import Model, Tree


def parameters(stored: Tree) -> int:
  """Number of stored parameters."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(stored))


def curves(history: list[dict], metric: str) -> np.ndarray:
  """Values `[E, lines]` of a metric by seed, from lines of metrics.jsonl."""
  lines = [line for line in history if metric in line]
  members = sum(f'{metric}/seed{i}' in lines[0] for i in range(len(lines[0])))
  names = [f'{metric}/seed{i}' for i in range(members)] or [metric]
  return np.array([[line[name] for line in lines] for name in names])


def final(curve_EN: np.ndarray, share: float = 0.1) -> np.ndarray:
  """Mean over the last `share` of a curve, by seed."""
  count = max(1, round(share * curve_EN.shape[1]))
  return curve_EN[:, -count:].mean(1)


def steps_to(
  steps_N: np.ndarray, curve_EN: np.ndarray, share: float = 0.9
) -> np.ndarray:
  """First step at which `share` of the whole fall of the loss is behind.

  The curve is smoothed by a running mean over a twentieth of its length, so
  that one lucky batch is not taken for convergence.
  """
  width = max(1, curve_EN.shape[1] // 20)
  kernel = np.ones(width) / width
  result = []
  for curve_N, last in zip(curve_EN, final(curve_EN), strict=True):
    smooth = np.convolve(curve_N, kernel, mode='valid')
    goal = curve_N[0] - share * (curve_N[0] - last)
    reached = np.flatnonzero(smooth <= goal)
    index = reached[0] + width - 1 if len(reached) else len(curve_N) - 1
    result.append(steps_N[index])
  return np.array(result)


def latency(model: Model, params: Tree, inputs, *, repeats: int = 30) -> float:
  """Median milliseconds of one forward pass, deriving weights included."""
  batch = jax.tree.leaves(inputs)[0].shape[0]

  @jax.jit
  def forward(params, inputs):
    outputs, _ = model.apply(
      params, model.carry(params, batch), inputs, key=None, train=True
    )
    return outputs['logits']

  forward(params, inputs).block_until_ready()
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    forward(params, inputs).block_until_ready()
    times.append(1e3 * (time.perf_counter() - begun))
  return statistics.median(times)
