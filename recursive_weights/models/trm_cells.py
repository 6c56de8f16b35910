"""What a Tiny Recursive Model repeats: how a state is fed, updated and read.

Two cells. Both keep one vector for each place of the puzzle and differ in what
a place is: a token, or a cell of a Sudoku together with a digit.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.interfaces import Array, Spec, Tree, UserError
from recursive_weights.models.layers import symmetric_block, trm_block

POSITIONS = ('none', 'rotation', 'learned')
_BOXES = {4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3), 12: (3, 4), 16: (4, 4)}


class Cell(NamedTuple):
  """The parts of a cell, over states with rows first `[B, *shape]`.

  init: `key -> params`, with the blocks of the network stacked in `blocks`.
  shape: of a row's state. Its first axis is the tokens', its last the width.
  embed: `(params, inputs) -> x [B, *shape]`, of unit variance, float32.
  block: `(params of a block, u) -> u`.
  read: `(params, y [B, *shape]) -> (logits_BTV, halt_B)`, float32.
  tokens_first: whether `block` takes `[T, B, ..., D]`, else rows first.
  """

  init: Callable[[Array], Tree]
  shape: tuple[int, ...]
  embed: Callable[[Tree, Any], Array]
  block: Callable[[Tree, Array], Array]
  read: Callable[[Tree, Array], tuple[Array, Array]]
  tokens_first: bool = True


def sequence(
  spec: Spec,
  *,
  kind: str,
  width: int,
  layers: int,
  heads: int,
  position: str,
  prefix: int,
  vocabulary: int,
  expansion: float,
  multiple: int,
  halves: trm_block.Halves,
) -> Cell:
  """The published cell: a vector for each token, and for each prefix place.

  x = sqrt(D) (embedding + position); where puzzles have identities the first
  prefix place is the puzzle's vector, which starts at zero. The other prefix
  places are fed zeros.

  Args:
    kind: 'mixer' or 'attention'.
    width, layers, heads: of the blocks.
    position: 'none', 'rotation' (attention alone) or 'learned'.
    prefix: places before the tokens.
    vocabulary: number of tokens.
    expansion, multiple: of the SwiGLUs, see `trm_block.inner_width`.
    halves: the programs of the blocks.
  """
  length = spec.answer[0]
  tokens = prefix + length
  _check_sequence(spec, kind, width, heads, position, prefix)
  turn = None
  if position == 'rotation':
    turn = trm_block.rotation(tokens, width // heads)

  def init(key):
    keys = jax.random.split(key, 5)
    deviation = 1 / np.sqrt(width)

    def block(key):
      return trm_block.init(
        key,
        kind,
        tokens=tokens,
        width=width,
        expansion=expansion,
        multiple=multiple,
      )

    params = {
      'embedding': trm_block.truncated(keys[0], (vocabulary, width), deviation),
      'blocks': jax.vmap(block)(jax.random.split(keys[1], layers)),
      'start': _start(keys[2], width),
      'readout': trm_block.lecun(keys[3], width, spec.classes),
      'halt': _halt(width),
    }
    if position == 'learned':
      params['position'] = trm_block.truncated(
        keys[4], (tokens, width), deviation
      )
    if spec.puzzles:
      params['puzzle'] = jnp.zeros([spec.puzzles, width])
    return params

  def embed(params, inputs):
    words_BT = inputs['tokens'] if isinstance(inputs, Mapping) else inputs
    x_BTD = _look_up(params['embedding'], words_BT)
    if prefix:
      first_BTD = jnp.zeros([len(x_BTD), prefix, width])
      if spec.puzzles:
        first_BTD = first_BTD.at[:, 0].set(params['puzzle'][inputs['puzzle']])
      x_BTD = jnp.concatenate([first_BTD, x_BTD], axis=1)
    if position == 'learned':
      x_BTD = (x_BTD + params['position'][None]) / np.sqrt(2)
    return x_BTD * np.sqrt(width)

  def block(params, u):
    return trm_block.apply(params, u, heads=heads, turn=turn, halves=halves)

  def read(params, y_BTD):
    logits_BTV = _product(y_BTD[:, prefix:], params['readout'])
    return logits_BTV, _judge(params['halt'], y_BTD[:, 0])

  mixes = kind == 'mixer'
  return Cell(init, (tokens, width), embed, block, read, tokens_first=mixes)


def symmetric(
  spec: Spec,
  *,
  width: int,
  layers: int,
  mixing: str,
  pool: str,
  pool_width: int,
  box: tuple[int, int] | tuple[()],
  expansion: float,
  multiple: int,
  halves: trm_block.Halves,
) -> Cell:
  """A cell for Sudoku with the same weights for every digit.

  Token 0 is a blank and token v the digit v - 1 of the answer. The input of a
  cell and a digit is one of three vectors: the cell is given as this digit,
  given as another, or blank. The readout is shared over the digits, and the
  halting head sees the mean and the largest value over all cells and digits.
  So relabelled digits come out relabelled, and the halting head is unmoved.

  Args:
    width: D of each cell and digit; layers: blocks.
    mixing, pool, pool_width: see `symmetric_block.init`.
    box: rows and columns of a box; `()` for the usual ones.
    expansion, multiple, halves: see `sequence`.
  """
  digits, cells = spec.classes, spec.answer[0]
  if cells != digits * digits:
    raise UserError(
      'cell symmetric needs a Sudoku: classes must be the root of the answer '
      f'length, got {digits} classes and an answer of {cells} tokens'
    )
  sides = tuple(box) or _BOXES.get(digits, ())
  if len(sides) != 2 or sides[0] * sides[1] != digits:
    raise UserError(
      f'box must be (rows, columns) with product {digits}, got {sides}'
    )
  if mixing not in symmetric_block.KINDS:
    raise UserError(
      f'mixing must be one of {symmetric_block.KINDS}, got {mixing!r}'
    )
  if pool not in symmetric_block.POOLS:
    raise UserError(
      f'pool must be one of {symmetric_block.POOLS}, got {pool!r}'
    )
  if pool_width < 1 or (pool == 'both' and pool_width % 2):
    raise UserError(
      f"pool_width must be > 0, and even for pool 'both', got {pool_width}"
    )

  def init(key):
    keys = jax.random.split(key, 4)

    def block(key):
      return symmetric_block.init(
        key,
        mixing,
        tokens=cells,
        width=width,
        pool=pool,
        pool_width=pool_width,
        expansion=expansion,
        multiple=multiple,
      )

    return {
      'embedding': trm_block.truncated(keys[0], (3, width), 1 / np.sqrt(width)),
      'blocks': jax.vmap(block)(jax.random.split(keys[1], layers)),
      'start': _start(keys[2], width),
      'readout': trm_block.lecun(keys[3], width, 1),
      'halt': _halt(2 * width),
    }

  def embed(params, inputs):
    words_BTV = inputs[:, :, None]
    own_V = jnp.arange(1, digits + 1)[None, None, :]
    case_BTV = jnp.where(words_BTV == own_V, 0, 1)
    case_BTV = jnp.where(words_BTV == 0, 2, case_BTV)
    return _look_up(params['embedding'], case_BTV) * np.sqrt(width)

  def block(params, u_TBVD):
    return symmetric_block.apply(
      params, u_TBVD, box=sides, pool=pool, halves=halves
    )

  def read(params, y_BTVD):
    logits_BTV = _product(y_BTVD, params['readout'])[..., 0]
    y_BTVD = y_BTVD.astype(jnp.float32)
    seen_BD = [y_BTVD.mean((1, 2)), y_BTVD.max((1, 2))]
    return logits_BTV, _judge(params['halt'], jnp.concatenate(seen_BD, -1))

  return Cell(init, (cells, digits, width), embed, block, read)


def _look_up(table_VD, index):
  """Rows of a small table by a product, whose gradient needs no scatter.

  An index outside the table gives zeros.
  """
  chosen = jax.nn.one_hot(index, len(table_VD), dtype=jnp.float32)
  return jnp.matmul(chosen, table_VD, precision='highest')


def _start(key, width):
  """The states before the first step: drawn once, not trained."""
  y_key, z_key = jax.random.split(key)
  return {
    'y': trm_block.truncated(y_key, (width,), 1.0),
    'z': trm_block.truncated(z_key, (width,), 1.0),
  }


def _halt(width):
  """Never halts at first: sigmoid(-5) = 0.007."""
  bias = jnp.full([1], -5.0, jnp.float32)
  return {'kernel': jnp.zeros([width, 1]), 'bias': bias}


def _judge(params, x_BD):
  logit_B1 = x_BD.astype(jnp.float32) @ params['kernel']
  return (logit_B1 + params['bias'][None])[:, 0]


def _product(x, kernel):
  return jnp.matmul(
    x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
  )


def _check_sequence(spec, kind, width, heads, position, prefix):
  if position not in POSITIONS:
    raise UserError(f'position must be one of {POSITIONS}, got {position!r}')
  if prefix < (1 if spec.puzzles else 0):
    raise UserError(
      'prefix must be >= 0, and >= 1 where puzzles have identities, got '
      f'{prefix}'
    )
  if kind == 'mixer':
    if position == 'rotation':
      raise UserError(
        "position 'rotation' turns queries and keys, which cell 'mixer' does "
        "not have: take 'none' or 'learned'"
      )
    return
  if width % heads or (position == 'rotation' and width // heads % 2):
    raise UserError(
      f'heads must divide width = {width} into heads of even width, got {heads}'
    )
