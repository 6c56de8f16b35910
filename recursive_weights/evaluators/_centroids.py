"""Which domain is a text of, by its words alone: a line to beat."""

import collections
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from recursive_weights.basis import routing

# How a text is cut into features.
FEATURES: dict[str, Callable[[str], list[str]]] = {
  'words': lambda text: text.lower().split(),
  'trigrams': lambda text: [text[i : i + 3] for i in range(len(text) - 2)],
}


def shares(
  texts: Sequence[str],
  known: Sequence[Sequence[str]],
  kind: str,
  temperature: float = 0.1,
) -> np.ndarray:
  """`softmax(cos(text, centroid) / temperature)` by domain, `[B, E]`.

  A text is the vector of `ln(1 + count) ln(N / N_f)` of its features f, N_f of
  the N known texts having f, at length 1; a domain is the mean of its texts.

  Args:
    texts: to be told.
    known: texts of every domain.
    kind: of `FEATURES`.
  """
  cut = FEATURES[kind]
  counts = [[collections.Counter(cut(text)) for text in few] for few in known]
  having: collections.Counter = collections.Counter()
  for few in counts:
    for one in few:
      having.update(one.keys())
  place = {feature: i for i, feature in enumerate(having)}
  total = sum(len(few) for few in known)
  idf_F = np.log(total / np.array(list(having.values())))

  def vector(one):
    x_F = np.zeros(len(place), np.float32)
    for feature, count in one.items():
      if feature in place:
        x_F[place[feature]] = np.log1p(count)
    x_F = x_F * idf_F
    return x_F / max(float(np.linalg.norm(x_F)), 1e-9)

  centroid_EF = np.stack(
    [np.mean([vector(x) for x in few], 0) for few in counts]
  )
  q_BF = np.stack([vector(collections.Counter(cut(text))) for text in texts])
  share_BE = routing.shares(
    jnp.asarray(q_BF, jnp.float32),
    jnp.asarray(centroid_EF, jnp.float32),
    temperature,
  )
  return np.asarray(share_BE)
