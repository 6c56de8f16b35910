"""Two sequences made one: how a parallel block adds up its two halves.

With a from RWKV-6 and b from Mamba-2, `[B, T, D]` both, and s a gate in (0, 1):

  hy   scale_a * rms(a) + scale_b * rms(b)            per channel, .7 and .3
  gf   s a + (1 - s) b,  s = sigmoid([a, b] W + c)    a gate for a token
  hgf  the same with a gate for every channel
  cp   [a, b] W
  ws   s a + (1 - s) b,  s = sigmoid(c)               one number
  rf   a + c b                                        c = .3 at the start

`gf` and `hgf` start with W from N(0, 0.02^2) and s near .5; with a suffix they
start at W = 0 and a share s of a: `_mh` .3, `_rh` .7, and for `gf` also `_xm`
.03, `_xr` .97.

Source: GroundThink, whose gates lost their start to a later initialisation.
"""

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array
from recursive_weights.models.layers import trm_block

SHARES = {'mh': 0.3, 'rh': 0.7, 'xm': 0.03, 'xr': 0.97}
NAMES = (
  'hy',
  'gf',
  *(f'gf_{share}' for share in SHARES),
  'hgf',
  'hgf_mh',
  'hgf_rh',
  'cp',
  'ws',
  'rf',
)


def init(key: Array, name: str, width: int) -> dict[str, Array]:
  """Parameters of the fusion of that name.

  2 D for hy, 2 D + 1 for gf, 2 D^2 + D for hgf, 2 D^2 for cp, 1 for ws and rf.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in NAMES:
    raise ValueError(f'fusion must be one of {NAMES}, got {name!r}')
  if name == 'hy':
    return {'a': jnp.full([width], 0.7), 'b': jnp.full([width], 0.3)}
  if name == 'cp':
    return {'kernel': trm_block.lecun(key, 2 * width, width)}
  if name in ('ws', 'rf'):
    return {'share': jnp.asarray(0.3 if name == 'rf' else 0.0)}
  kind, _, share = name.partition('_')
  shape = (2 * width, width if kind == 'hgf' else 1)
  if share:
    logit = np.log(SHARES[share] / (1 - SHARES[share]))
    return {
      'kernel': jnp.zeros(shape),
      'bias': jnp.full(shape[1:], logit, jnp.float32),
    }
  return {
    'kernel': 0.02 * jax.random.normal(key, shape),
    'bias': jnp.zeros(shape[1:]),
  }


def apply(
  params: dict[str, Array], name: str, a_BTD: Array, b_BTD: Array
) -> Array:
  """The fusion of that name."""
  weights = {key: w.astype(a_BTD.dtype) for key, w in params.items()}
  if name == 'hy':
    a_BTD = trm_block.rms(a_BTD) * weights['a'][None, None]
    return a_BTD + trm_block.rms(b_BTD) * weights['b'][None, None]
  if name == 'rf':
    return a_BTD + weights['share'] * b_BTD
  if name == 'ws':
    return b_BTD + jax.nn.sigmoid(weights['share']) * (a_BTD - b_BTD)
  both = jnp.concatenate([a_BTD, b_BTD], axis=-1) @ weights['kernel']
  if name == 'cp':
    return both
  gate = jax.nn.sigmoid(both + weights['bias'][None, None])
  return b_BTD + gate * (a_BTD - b_BTD)
