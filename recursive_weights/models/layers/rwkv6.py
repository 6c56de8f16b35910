"""RWKV-6 (Finch): a time mix whose decay depends on the data, a channel mix.

Time mix, with x' the token before x and d = x' - x:

  z   = x + d * mix_x
  m_s = tanh(z mix_down)_s mix_up_s             s in w, k, v, r, g
  x_s = x + d * (mix_s + m_s)
  r, k, v = x_r W_r, x_k W_k, x_v W_v           per head
  g   = -exp(decay + tanh(x_w decay_down) decay_up)
  o_t = (S_(t-1) + diag(bonus) k_t v_t^T)^T r_t
  S_t = diag(exp g_t) S_(t-1) + k_t v_t^T
  y   = (group_norm(o) * silu(x_g W_g)) W_o

Channel mix:

  k = relu((x + d * mix_k) W_k)^2
  y = sigmoid((x + d * mix_r) W_r) * (k W_v)

Grounding mixes the decay with one that is independent of the data,

  exp(g) = alpha exp(-exp(base)) + (1 - alpha) exp(-exp(w_t)),

so that what is remembered does not hang on the input alone.

Source: Peng et al. 2024, 'Eagle and Finch: RWKV with Matrix-Valued States and
Dynamic Recurrence' (arXiv 2404.05892), and the values at the start that the
authors publish with their code. Grounding: GroundThink, where it was applied to
the wrong side of the gate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Tree
from recursive_weights.models.layers import dense, matrix_state, past
from recursive_weights.scans import linear_attention

INPUTS = ('decay', 'key', 'value', 'receptance', 'gate')
EPSILON = 64e-5  # of the norm of each head's output


def channel_width(width: int) -> int:
  """F of the channel mix: 3.5 D, rounded down to a multiple of 32."""
  return max(width * 7 // 2 // 32 * 32, 32)


def time_init(
  key: Array,
  width: int,
  *,
  layer: Array | int = 0,
  layers: int = 1,
  head_width: int = 64,
  mix_rank: int = 32,
  decay_rank: int = 64,
  half_life: tuple[float, float] | tuple[()] = (),
  grounding: float = 0.0,
  learned_grounding: bool = False,
  learned_initial: bool = False,
  state_norm: int = 0,
) -> Tree:
  """Parameters of a time mix, at the published start.

  Args:
    width: D.
    layer, layers: which of how many; mixes, decays and bonus depend on it.
    head_width: K; the head count is D / K.
    mix_rank, decay_rank: of the mixes and the decay that depend on the data.
    half_life: of the first and the last channel's memory, in tokens, spaced by
      equal ratios; () for the published decays.
    grounding: alpha at the start, in [0, 1); 0 for none.
    learned_grounding: alpha is a parameter.
    learned_initial: what stands before a document (state and token) is.
    state_norm: groups of StateNorm, see `matrix_state`; 0 for none.

  Raises:
    ValueError: an argument is out of range.
  """
  if head_width < 1 or width % head_width:
    raise ValueError(
      f'head_width must divide width = {width}, got {head_width}'
    )
  if not 0 <= grounding < 1:
    raise ValueError(f'grounding must lie in [0, 1), got {grounding}')
  heads = width // head_width
  keys = iter(jax.random.split(key, 8))
  depth, rest = _depth(layer, layers)
  ramp_D = jnp.arange(width) / width
  full_D = jnp.linspace(0, 1, width)
  square = (width, width)
  decay_D = -6 + 5 * full_D ** (0.7 + 1.3 * depth)
  if half_life:
    decay_D = jnp.log(np.log(2) / matrix_state.half_lives(half_life, width))
  zigzag_D = ((jnp.arange(width) + 1) % 3 - 1) * 0.1
  params = {
    'mix_x': 1 - ramp_D**rest,
    'mix': jnp.stack(
      [
        1 - ramp_D**rest,
        1 - ramp_D**rest,
        1 - (ramp_D**rest + 0.3 * depth),
        1 - ramp_D ** (0.5 * rest),
        1 - ramp_D ** (0.5 * rest),
      ]
    ),
    'mix_down': jnp.zeros([width, len(INPUTS) * mix_rank]),
    'mix_up': dense.uniform(next(keys), (len(INPUTS), mix_rank, width), 0.01),
    'decay': decay_D,
    'decay_down': jnp.zeros([width, decay_rank]),
    'decay_up': dense.uniform(next(keys), (decay_rank, width), 0.01),
    'bonus': (depth * (1 - full_D) + zigzag_D).reshape(heads, head_width),
    'receptance': _orthogonal(next(keys), square),
    'key': 0.1 * _orthogonal(next(keys), square),
    'value': _orthogonal(next(keys), square),
    'gate': 0.1 * _orthogonal(next(keys), square),
    'norm': {
      'scale': jnp.full([width], (1 + layer) / layers) ** 0.7,
      'bias': jnp.zeros([width]),
    },
    'output': jnp.zeros(square),
  }
  if grounding:
    params['grounding'] = {'base': jnp.copy(decay_D)}
    if learned_grounding:
      logit = np.log(grounding / (1 - grounding))
      params['grounding']['alpha'] = jnp.asarray(logit, jnp.float32)
  state = matrix_state.init(
    next(keys),
    (heads, head_width, head_width),
    learned=learned_initial,
    groups=state_norm,
  )
  if state:
    params['state'] = state
  if learned_initial:
    params['first'] = jnp.zeros([width])
  return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def time_start(
  batch_size: int, width: int, *, head_width: int = 64
) -> dict[str, Array]:
  """The cache at the start of a document: `shift [B, D]`, `state`."""
  shape = (batch_size, width // head_width, head_width, head_width)
  return {'shift': jnp.zeros([batch_size, width]), 'state': jnp.zeros(shape)}


def time_mix(
  params: Tree,
  cache: dict[str, Array],
  x_BTD: Array,
  place_BT: Array,
  *,
  grounding: float = 0.0,
  state_norm: int = 0,
  algorithm: str = 'auto',
  chunk: int = 64,
  precision: str = 'highest',
) -> tuple[Array, Tree]:
  """`(y_BTD, parts)`; parts are for `time_commit`.

  Args:
    params: from `time_init`.
    cache: from `time_start` or `time_commit`.
    x_BTD: the chunk; its dtype is that of the products.
    place_BT: place of each token in its document, see `past`.
    grounding: alpha where it is not learned.
    state_norm: groups of StateNorm.
    algorithm, chunk, precision: of the scan.
  """
  dtype = x_BTD.dtype
  heads, width = params['bonus'].shape

  def cast(name):
    return params[name].astype(dtype)

  before_BTD = past.shift(cache['shift'], x_BTD, place_BT, params.get('first'))
  d_BTD = before_BTD - x_BTD
  low = jnp.tanh((x_BTD + d_BTD * cast('mix_x')[None, None]) @ cast('mix_down'))
  low_BTER = low.reshape(*low.shape[:2], len(INPUTS), -1)
  move_EBTD = jnp.einsum('BTER,ERD->EBTD', low_BTER, cast('mix_up'))
  move_EBTD = move_EBTD + cast('mix')[:, None, None]
  mixed_EBTD = x_BTD[None] + d_BTD[None] * move_EBTD
  x_w, x_k, x_v, x_r, x_g = mixed_EBTD

  def by_head(y_BTD):
    return y_BTD.reshape(*y_BTD.shape[:2], heads, width)

  r, k, v = (
    by_head(x @ cast(name))
    for x, name in ((x_r, 'receptance'), (x_k, 'key'), (x_v, 'value'))
  )
  low = jnp.tanh(x_w @ cast('decay_down')) @ cast('decay_up')
  raw_BTD = params['decay'][None, None] + low.astype(jnp.float32)
  log_decay = by_head(_log_decay(params.get('grounding'), raw_BTD, grounding))
  o_BTHV, parts = matrix_state.read(
    params.get('state', {}),
    _forms(params['bonus'], algorithm, chunk, precision),
    cache['state'],
    (r, k, v, log_decay),
    place_BT,
    groups=state_norm,
  )
  o_BTD = _head_norm(params['norm'], o_BTHV).astype(dtype)
  y_BTD = (o_BTD * jax.nn.silu(x_g @ cast('gate'))) @ cast('output')
  return y_BTD, {'x': x_BTD, 'state': parts}


def time_commit(
  cache: dict[str, Array], parts: Tree, length_B: Array
) -> dict[str, Array]:
  """The cache after the first `length_B` tokens of the chunk."""
  return {
    'shift': _latest(cache['shift'], parts['x'], length_B),
    'state': matrix_state.commit(
      _forms(), cache['state'], parts['state'], length_B
    ),
  }


def channel_init(
  key: Array,
  width: int,
  *,
  layer: Array | int = 0,
  layers: int = 1,
  learned_initial: bool = False,
) -> dict[str, Array]:
  """Parameters of a channel mix, at the published start.

  Args:
    width: D.
    layer, layers: which of how many; mixes depend on it.
    learned_initial: what stands before a document is a parameter.
  """
  _, rest = _depth(layer, layers)
  mix_D = 1 - (jnp.arange(width) / width) ** rest
  hidden = channel_width(width)
  params = {
    'mix_key': mix_D,
    'mix_receptance': jnp.copy(mix_D),
    'key': _orthogonal(key, (width, hidden)),
    'receptance': jnp.zeros([width, width]),
    'value': jnp.zeros([hidden, width]),
  }
  if learned_initial:
    params['first'] = jnp.zeros([width])
  return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def channel_start(batch_size: int, width: int) -> dict[str, Array]:
  """The cache at the start of a document: `shift [B, D]`."""
  return {'shift': jnp.zeros([batch_size, width])}


def channel_mix(
  params: dict[str, Array],
  cache: dict[str, Array],
  x_BTD: Array,
  place_BT: Array,
) -> tuple[Array, Tree]:
  """`(y_BTD, parts)`; parts are for `channel_commit`."""
  weights = {name: w.astype(x_BTD.dtype) for name, w in params.items()}
  before_BTD = past.shift(cache['shift'], x_BTD, place_BT, weights.get('first'))
  d_BTD = before_BTD - x_BTD
  k_BTD = x_BTD + d_BTD * weights['mix_key'][None, None]
  r_BTD = x_BTD + d_BTD * weights['mix_receptance'][None, None]
  k_BTF = jnp.square(jax.nn.relu(k_BTD @ weights['key']))
  r_BTD = jax.nn.sigmoid(r_BTD @ weights['receptance'])
  return r_BTD * (k_BTF @ weights['value']), {'x': x_BTD}


def channel_commit(
  cache: dict[str, Array], parts: Tree, length_B: Array
) -> dict[str, Array]:
  """The cache after the first `length_B` tokens of the chunk."""
  return {'shift': _latest(cache['shift'], parts['x'], length_B)}


def _orthogonal(key, shape):
  """A random matrix with orthonormal rows or columns, whichever are fewer.

  One at a time under `vmap`: jaxlib (0.10) splits a batch of factorisations
  over its threads, and as many batches at once as a CPU has cores wait for each
  other without end.
  """
  initial = jax.nn.initializers.orthogonal()
  return jax.custom_batching.sequential_vmap(lambda key: initial(key, shape))(
    key
  )


def _depth(layer, layers):
  """How far up a layer is, and 1 at the bottom to almost 0 at the top."""
  return layer / max(layers - 1, 1), 1 - layer / layers


def _log_decay(grounding, raw_BTD, alpha):
  """g <= 0, float32."""
  if grounding is None:
    return -jnp.exp(raw_BTD)
  logit = grounding.get('alpha')
  if logit is None:
    logit = np.log(alpha / (1 - alpha))
  base_D = jax.nn.log_sigmoid(logit) - jnp.exp(grounding['base'])
  return jnp.logaddexp(
    base_D[None, None], jax.nn.log_sigmoid(-logit) - jnp.exp(raw_BTD)
  )


def _head_norm(params, o_BTHV):
  """Layer normalisation of every head's output, joined to `[B, T, D]`."""
  o32 = o_BTHV.astype(jnp.float32)
  centred = o32 - o32.mean(-1, keepdims=True)
  variance = (centred * centred).mean(-1, keepdims=True)
  o32 = centred * jax.lax.rsqrt(variance + EPSILON)
  o_BTD = o32.reshape(*o32.shape[:2], -1)
  return o_BTD * params['scale'][None, None] + params['bias'][None, None]


def _latest(before_BD, x_BTD, length_B):
  return past.window(before_BD[:, None], x_BTD, length_B)[:, 0]


def _forms(bonus_HK=None, algorithm='auto', chunk=64, precision='highest'):
  return matrix_state.Forms(
    prefill=functools.partial(
      linear_attention.prefill,
      bonus_HK=bonus_HK,
      algorithm=algorithm,
      chunk=chunk,
      precision=precision,
    ),
    step=functools.partial(linear_attention.step, bonus_HK=bonus_HK),
    commit=linear_attention.commit,
  )
