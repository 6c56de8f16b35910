"""Mamba-2: a state-space layer whose heads decay as one.

  [z, x, B, C, dt] = u W_in
  [x, B, C] = silu(conv([x, B, C]))             causal, depthwise
  dt  = softplus(dt + dt_bias),  A = -exp(a_log)
  S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T    per head, half-life
                                                ln 2 / (dt_t exp(a_log))
  y_t = S_t^T C_t + skip x_t
  out = (rms(y * silu(z)) * norm) W_out         norm over each group

Source: Dao and Gu 2024, 'Transformers are SSMs' (arXiv 2405.21060), and the
values at the start that the authors publish with their code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import dense, matrix_state, past, trm_block
from recursive_weights.scans import ssd


def init(
  key: Array,
  width: int,
  *,
  layers: int = 1,
  expand: int = 2,
  head_width: int = 64,
  state_width: int = 64,
  groups: int = 1,
  conv_width: int = 4,
  half_life: tuple[float, float] | tuple[()] = (),
  learned_initial: bool = False,
  state_norm: int = 0,
) -> Tree:
  """Parameters of one layer, at the published start.

  Args:
    width: D.
    layers: of the model; W_out starts smaller by its root.
    expand: inner width over D.
    head_width: P, entries of x in a head.
    state_width: N, entries of B and C.
    groups: of B and C, which the heads of a group share.
    conv_width: taps of the convolution.
    half_life: of the first and the last head's memory, in tokens, spaced by
      equal ratios, at the dt of a token to which W_in adds nothing: dt_bias
      follows from A; () for the published dt_bias.
    learned_initial: what stands before a document (state, tokens under the
      convolution) is a parameter.
    state_norm: groups of StateNorm, see `matrix_state`; 0 for none.

  Raises:
    ValueError: an argument is out of range.
  """
  inner = expand * width
  for name, value in (
    ('expand', expand),
    ('head_width', head_width),
    ('state_width', state_width),
    ('groups', groups),
    ('conv_width', conv_width),
  ):
    if value < 1:
      raise ValueError(f'{name} must be > 0, got {value}')
  if inner % head_width or inner // head_width % groups:
    raise ValueError(
      f'head_width must divide the inner width {inner} into heads of which '
      f'groups = {groups} is a divisor, got {head_width}'
    )
  heads = inner // head_width
  convolved = inner + 2 * groups * state_width
  keys = jax.random.split(key, 7)
  log_low, log_high = np.log(1e-3), np.log(0.1)
  dt_H = jax.random.uniform(keys[0], [heads], minval=log_low, maxval=log_high)
  dt_H = jnp.maximum(jnp.exp(dt_H), 1e-4)
  a_H = jax.random.uniform(keys[4], [heads], minval=1.0, maxval=16.0)
  if half_life:
    dt_H = np.log(2) / (a_H * matrix_state.half_lives(half_life, heads))
  params = {
    'in': dense.uniform(
      keys[1], (width, inner + convolved + heads), 1 / np.sqrt(width)
    ),
    'conv': {
      'kernel': dense.uniform(
        keys[2], (conv_width, convolved), 1 / np.sqrt(conv_width)
      ),
      'bias': dense.uniform(keys[3], (convolved,), 1 / np.sqrt(conv_width)),
    },
    # The inverse of the softplus.
    'dt_bias': dt_H + jnp.log(-jnp.expm1(-dt_H)),
    'a_log': jnp.log(a_H),
    'skip': jnp.ones([heads]),
    'norm': jnp.ones([inner]),
    'out': dense.uniform(keys[5], (inner, width), 1 / np.sqrt(inner))
    / np.sqrt(layers),
  }
  state = matrix_state.init(
    keys[6],
    (heads, state_width, head_width),
    learned=learned_initial,
    groups=state_norm,
  )
  if state:
    params['state'] = state
  if learned_initial:
    params['first'] = jnp.zeros([conv_width - 1, convolved])
  return params


def start(
  batch_size: int,
  width: int,
  *,
  expand: int = 2,
  head_width: int = 64,
  state_width: int = 64,
  groups: int = 1,
  conv_width: int = 4,
) -> dict[str, Array]:
  """The cache at the start of a document: `window`, `state`; see `init`."""
  inner = expand * width
  convolved = inner + 2 * groups * state_width
  heads = inner // head_width
  return {
    'window': jnp.zeros([batch_size, conv_width - 1, convolved]),
    'state': jnp.zeros([batch_size, heads, state_width, head_width]),
  }


def apply(
  params: Tree,
  cache: dict[str, Array],
  x_BTD: Array,
  place_BT: Array,
  *,
  groups: int = 1,
  state_norm: int = 0,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Tree]:
  """`(y_BTD, parts)`; parts are for `commit`.

  Args:
    params: from `init`.
    cache: from `start` or `commit`.
    x_BTD: the chunk; its dtype is that of the products.
    place_BT: place of each token in its document, see `past`.
    groups: of B and C.
    state_norm: groups of StateNorm.
    algorithm, chunk, precision: of the scan.
  """
  dtype = x_BTD.dtype
  heads, inner = params['skip'].shape[0], params['norm'].shape[0]
  z_BTF, u_BTF, dt_BTH = jnp.split(
    x_BTD @ params['in'].astype(dtype),
    [inner, params['in'].shape[1] - heads],
    axis=-1,
  )
  convolved = past.convolve(
    params['conv']['kernel'],
    cache['window'],
    u_BTF,
    place_BT,
    params.get('first'),
  )
  bias_F = params['conv']['bias'].astype(dtype)
  convolved = _silu(convolved + bias_F[None, None])
  maps = (convolved.shape[-1] - inner) // 2
  x_BTF, b, c = jnp.split(convolved, [inner, inner + maps], axis=-1)
  x_BTHV, b_BTGN, c_BTGN = (
    y.reshape(*y.shape[:2], count, -1)
    for y, count in ((x_BTF, heads), (b, groups), (c, groups))
  )
  dt_BTH = jax.nn.softplus(
    dt_BTH.astype(jnp.float32) + params['dt_bias'][None, None]
  )
  y_BTHV, parts = matrix_state.read(
    params.get('state', {}),
    _forms(-jnp.exp(params['a_log']), algorithm, chunk, precision),
    cache['state'],
    (x_BTHV, dt_BTH, b_BTGN, c_BTGN),
    place_BT,
    groups=state_norm,
  )
  skip_H = params['skip'].astype(dtype)
  y_BTHV = y_BTHV + skip_H[None, None, :, None] * x_BTHV
  y_BTF = y_BTHV.reshape(*z_BTF.shape) * jax.nn.silu(z_BTF)
  y_BTGV = trm_block.rms(y_BTF.reshape(*y_BTF.shape[:2], groups, -1))
  y_BTF = y_BTGV.reshape(y_BTF.shape) * params['norm'].astype(dtype)[None, None]
  y_BTD = y_BTF @ params['out'].astype(dtype)
  return y_BTD, {'u': u_BTF, 'state': parts}


def commit(
  cache: dict[str, Array], parts: Tree, length_B: Array
) -> dict[str, Array]:
  """The cache after the first `length_B` tokens of the chunk."""
  return {
    'window': past.window(cache['window'], parts['u'], length_B),
    'state': matrix_state.commit(
      _forms(), cache['state'], parts['state'], length_B
    ),
  }


@jax.custom_jvp
def _silu(x: Array) -> Array:
  """`x sigmoid(x)`, whose last operation is a division.

  XLA repeats cheap operations in every consumer, and a convolution that ends
  in a product counts as cheap, however long: on a CPU it took most of the time.
  """
  return x / (1 + jnp.exp(-x))


@_silu.defjvp
def _silu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  share = jax.nn.sigmoid(x)
  return _silu(x), dx * share * (1 + x * (1 - share))


def _forms(a_H=None, algorithm='auto', chunk=64, precision='highest'):
  options = {'algorithm': algorithm, 'chunk': chunk, 'precision': precision}

  def prefill(x, dt, b, c, **where):
    return ssd.prefill(x, dt, a_H, b, c, **where, **options)

  def step(state, x, dt, b, c, **where):
    return ssd.step(state, x, dt, a_H, b, c, **where)

  return matrix_state.Forms(prefill, step, ssd.commit)
