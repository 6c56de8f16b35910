"""Tiny Recursive Models: a small network that improves an answer again.

Source: A. Jolicoeur-Martineau, Less is More: Recursive Reasoning with Tiny
Networks, 2025 (arXiv 2510.04871).
"""

from typing import Any

import jax
import jax.numpy as jnp

from recursive_weights.interfaces import Model, Recursion, Spec, UserError
from recursive_weights.models import trm_cells
from recursive_weights.models.layers import trm_block
from recursive_weights.recursion import latent
from recursive_weights.recursion.unroll import unroll
from recursive_weights.scans import kernels

CELLS = ('mixer', 'attention', 'symmetric')


def make(
  spec: Spec,
  *,
  cell: str = 'mixer',
  width: int = 512,
  layers: int = 2,
  heads: int = 8,
  cycles: int = 3,
  inner: int = 6,
  steps: int = 16,
  states: int = 2,
  gradient: str = 'cycle',
  position: str = 'none',
  prefix: int = 0,
  vocabulary: int = 0,
  mixing: str = 'constraints',
  pool: str = 'both',
  pool_width: int = 64,
  box: tuple[int, int] | tuple[()] = (),
  expansion: float = 4.0,
  multiple: int = 256,
  remat: bool = False,
  unrolled: int = 1,
  fused: bool | trm_block.Halves | None = None,
  dtype: Any = 'float32',
) -> Model:
  """A network f of a few blocks, an answer y and a thought z for every token.

  A step of the recursion is one supervision step (`recursion.latent`): T times
  n updates `z <- f(z + y + x)` and one `y <- f(y + z)`, of which the last of
  the T cycles carries a gradient. The answer is read off y after every step.

  In training `apply` makes one step from the carry, since each step has its
  own update of the weights (`recursion.slots`); else `steps` steps. The carry
  is `{y, z}`, `[B, T, D]`, and passes no gradient.

  Parameters: `embedding [words, D]`, `blocks/...` with the layers L first,
  `readout [D, V]`, `halt/kernel`, `halt/bias`, `start/y [D]`, `start/z [D]`,
  and where asked for `position [T, D]`, `puzzle [puzzles, D]`. `start` is
  drawn once and takes no gradient: put it in a frozen group, which the average
  leaves alone too. The published mixer for Sudoku (97 places, 11 tokens and
  classes) has 5,028,866 parameters; here there are 513 fewer, as the halting
  head has one value, not two, and 1,024 more, the start states. So with the
  published attention cell, 6,828,034.

  Outputs: `logits [S, B, T, V]`, `halt [S, B]` (a logit: the answer is thought
  right where > 0) and `certainty = sigmoid(halt)`, all float32, with S = 1 in
  training and S = `steps` else.

  Args:
    spec: of the task: integer tokens `[T]`, and an answer of a class for each.
      Where it has puzzles, inputs are `{tokens [B, T], puzzle [B]}`.
    cell: 'mixer', 'attention' or 'symmetric' (Sudoku; no weights of its own
      for any digit), see `trm_cells`.
    width: D; in the symmetric cell of each cell and digit.
    layers: blocks of f.
    heads: of attention.
    cycles: T of a step.
    inner: n, updates of z in a cycle.
    steps: S, unless training.
    states: 2 for y and z; 1 for z alone, which is then updated n + 1 times in
      a cycle.
    gradient: 'cycle', 'update' or 'all', see `latent.supervision_step`.
    position: 'none', 'rotation' or 'learned'; 'none' in the symmetric cell.
    prefix: places before the tokens, at least one where there are puzzles. The
      published code has 16, the paper's tasks without identities need none; 0
      in the symmetric cell.
    vocabulary: number of tokens, not fewer than the task has; 0 for as many.
    mixing: 'constraints' or 'tokens', of the symmetric cell, as are pool,
      pool_width and box, see `trm_cells.symmetric`.
    expansion, multiple: of the SwiGLUs, see `trm_block.inner_width`.
    remat: less memory, more time: updates run again in the backward pass.
    unrolled: updates of z in one body of the compiled loop; n or more: no
      loop, which is faster on a GPU and takes longer to compile.
    fused: blocks as GPU kernels. None: where sizes fit, in bfloat16, on Hopper
      GPUs, one or under the pmap strategy; True: always, and an error where
      they do not fit; or the programs of a block's halves themselves.
    dtype: of the states; norms, softmax, logits and halting are float32.

  Raises:
    UserError: an argument is out of range, or the task does not fit.
  """
  dtype = jnp.dtype(dtype)
  _check(spec, locals())
  words = vocabulary or spec.vocabulary or spec.classes
  shared = {
    'width': width,
    'layers': layers,
    'expansion': expansion,
    'multiple': multiple,
    'halves': _halves(fused),
  }
  if cell == 'symmetric':
    parts = trm_cells.symmetric(
      spec, mixing=mixing, pool=pool, pool_width=pool_width, box=box, **shared
    )
  else:
    parts = trm_cells.sequence(
      spec,
      kind=cell,
      heads=heads,
      position=position,
      prefix=prefix,
      vocabulary=words,
      **shared,
    )
  names = ('y', 'z') if states == 2 else ('z',)

  def init(key, inputs):
    del inputs  # the spec tells all shapes
    return parts.init(key)

  def prepare(params):
    return params | {
      'blocks': tuple(
        jax.tree.map(lambda w, i=i: w[i], params['blocks'])
        for i in range(layers)
      )
    }

  def encode(weights, inputs, key):
    del key
    return {'x': parts.embed(weights, inputs).astype(dtype)}

  def carry(params, batch_size):
    shape = (batch_size, *parts.shape)
    first = (1,) * (len(shape) - 1)
    return {
      name: jnp.broadcast_to(
        params['start'][name].reshape(*first, -1), shape
      ).astype(dtype)
      for name in names
    }

  def start(weights, context):
    return carry(weights, context['x'].shape[0])

  def net(blocks, u):
    for params in blocks:
      u = parts.block(params, u)
    return shared['halves'].settle(u)

  def step(weights, context, state, key):
    del key
    # Rows are first without a step, within it where blocks want them so.
    order = _swap if parts.tokens_first else lambda tree: tree
    x, inside = order((context['x'], state))
    inside = latent.supervision_step(
      net,
      weights['blocks'],
      x,
      inside,
      cycles=cycles,
      inner=inner,
      gradient=gradient,
      remat=remat,
      unrolled=unrolled,
    )
    state = order(inside)
    logits, halt_B = parts.read(weights, state[names[0]])
    return state, {
      'logits': logits,
      'halt': halt_B,
      'certainty': jax.nn.sigmoid(halt_B),
    }

  recursion = Recursion(prepare, encode, start, step)

  def apply(params, carry, inputs, *, key=None, train=False):
    del key
    weights = prepare(params)
    context = encode(weights, inputs, None)
    if not train:
      carry, outputs = unroll(
        recursion, weights, context, carry, steps, hoist=False
      )
      return outputs, carry
    state, outputs = step(weights, context, carry, None)
    outputs = jax.tree.map(lambda x: x[None], outputs)
    return outputs, jax.lax.stop_gradient(state)

  return Model(
    init=init,
    carry=carry,
    apply=apply,
    recursion=recursion,
    tables=(('puzzle', 'puzzle'),) if spec.puzzles else (),
  )


def _halves(fused):
  if isinstance(fused, trm_block.Halves):
    return fused
  there = jax.default_backend() == 'gpu' and kernels.has_triton()
  if fused is False or (fused is None and not there):
    return trm_block.Halves()
  if fused:
    kernels.check_triton()
  # Kernels are imported where they are used.
  from recursive_weights.models.kernels import halves

  return halves.make(fused)


def _swap(tree):
  """The first two axes, rows and tokens, exchanged."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _check(spec: Spec, given: dict[str, Any]) -> None:
  if given['cell'] not in CELLS:
    raise UserError(f'cell must be one of {CELLS}, got {given["cell"]!r}')
  names = ('width', 'layers', 'heads', 'cycles', 'steps', 'multiple')
  for name in (*names, 'unrolled'):
    if given[name] < 1:
      raise UserError(f'{name} must be > 0, got {given[name]}')
  for name in ('inner', 'prefix', 'vocabulary'):
    if given[name] < 0:
      raise UserError(f'{name} must be >= 0, got {given[name]}')
  for name, none in (('position', 'none'), ('prefix', 0)):
    if given['cell'] == 'symmetric' and given[name] != none:
      raise UserError(
        f"{name} must be {none!r} with cell 'symmetric', whose places are the "
        f'cells of a Sudoku alone, got {given[name]!r}'
      )
  if given['expansion'] <= 0:
    raise UserError(f'expansion must be > 0, got {given["expansion"]}')
  if given['states'] not in (1, 2):
    raise UserError(f'states must be 1 or 2, got {given["states"]}')
  if given['gradient'] not in latent.GRADIENTS:
    raise UserError(
      f'gradient must be one of {latent.GRADIENTS}, got {given["gradient"]!r}'
    )
  tokens = spec.inputs
  if spec.puzzles and isinstance(tokens, dict):
    tokens = tokens['tokens']
  if (
    not jnp.issubdtype(tokens.dtype, jnp.integer)
    or len(tokens.shape) != 1
    or tuple(spec.answer) != tuple(tokens.shape)
  ):
    raise UserError(
      'the task must have integer tokens [T] and an answer [T], got '
      f'{tokens.dtype}{list(tokens.shape)} and {list(spec.answer)}'
    )
  known = spec.vocabulary or spec.classes
  if 0 < given['vocabulary'] < known:
    raise UserError(
      f'vocabulary must be 0 or at least {known}, the tokens of the task, got '
      f'{given["vocabulary"]}'
    )
