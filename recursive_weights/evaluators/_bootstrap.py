"""Intervals of means by resampling."""

import numpy as np


def interval(
  values_SB: np.ndarray, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
  """Percentile bootstrap of the mean of means over the last axis.

  Args:
    values_SB: the same B examples judged in S runs: examples are drawn with
      replacement, the same in every run. `[B]` is one run.
    resamples: how often; the generator's seed is fixed.
    level: share of the resampled means that the interval holds.

  Source: B. Efron, Bootstrap methods: another look at the jackknife, 1979.
  """
  mean_B = np.atleast_2d(values_SB).mean(0)
  draw = np.random.default_rng(0)
  # Counts of each example, by hundreds: all at once would take much memory.
  means = []
  share_B = np.full(len(mean_B), 1 / len(mean_B))
  for first in range(0, resamples, 100):
    count = min(100, resamples - first)
    times_NB = draw.multinomial(len(mean_B), share_B, count)
    means.append(times_NB @ mean_B / len(mean_B))
  tail = (1 - level) / 2
  low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
  return float(low), float(high)
