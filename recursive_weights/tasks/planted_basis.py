"""Which member made this answer? Members' weights share a planted basis."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _planted, _splits, question_answer


def make(
  *,
  seed: int = 0,
  members: int = 40,
  questions: int = 8,
  width: int = 32,
  rank: int = 4,
  noise: float = 0.05,
  coefficients: _planted.Coefficients = 'gaussian',
  held_out: int = 25,
  data_seed: int = 0,
) -> interfaces.Task:
  """Pairs of question and answer, `a = q W_i + noise g`, without words.

  Inputs are float32 `[B, 2 D]`, q and a one after the other; targets int32
  `[B]`, the member i. `W_i = Σ_k c_ik O_k` with random orthogonal O_k, so all
  members' pairs together tell the basis from about `1.25 R D` pairs on, long
  before a member's own pairs tell its weight (D of them).

  Args:
    seed: order of the training pairs.
    members, questions, width, rank, noise, coefficients: see
      `_planted.planted`; `questions` train a member.
    held_out: pairs of a member for validation, and as many for test.
    data_seed: of the members and their pairs.

  Raises:
    UserError: a number out of range.
  """
  _splits.check_seed(seed)
  for name, x in (
    ('members', members),
    ('questions', questions),
    ('width', width),
    ('rank', rank),
    ('held_out', held_out),
  ):
    if x < 1:
      raise UserError(f'{name} must be > 0, got {x}')
  if noise < 0:
    raise UserError(f'noise must be >= 0, got {noise}')
  truth = _planted.planted(
    data_seed,
    members=members,
    questions=questions,
    width=width,
    rank=rank,
    noise=noise,
    test=2 * held_out,
    coefficients=coefficients,
  )
  draw = _splits.generator(data_seed, 5)
  test_ETD = truth.test_ETD @ truth.w_EDV
  test_ETD += noise * draw.normal(size=test_ETD.shape)
  pairs = {
    'train': (truth.q_ETD, truth.a_ETD),
    'validation': (truth.test_ETD[:, :held_out], test_ETD[:, :held_out]),
    'test': (truth.test_ETD[:, held_out:], test_ETD[:, held_out:]),
  }
  inputs = {
    part: np.concatenate(two, -1).reshape(-1, 2 * width).astype(np.float32)
    for part, two in pairs.items()
  }
  targets = {
    part: np.repeat(np.arange(members, dtype=np.int32), len(x) // members)
    for part, x in inputs.items()
  }
  sizes: dict[str, int | None] = {part: len(x) for part, x in inputs.items()}

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      rows_B = _splits.without_end(seed, sizes[split], index, size)
      weight_B = np.ones(size, np.float32)
    else:
      rows_B, weight_B = _splits.in_order(sizes[split], index, size)
    return {
      'inputs': inputs[split][rows_B],
      'targets': targets[split][rows_B],
      'weight': weight_B,
    }

  # What it is made of: the numbers' last bits differ from machine to machine.
  content = members, questions, width, rank, noise, coefficients, held_out
  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct((2 * width,), jnp.float32),
      answer=(),
      classes=members,
      sizes=sizes,
    ),
    batch=batch,
    augment=lambda key, batch: batch,
    loss=question_answer.loss,
    data_hash={
      part: hashlib.sha256(
        repr((part, data_seed, content)).encode()
      ).hexdigest()
      for part in sizes
    },
    planted={
      'coefficients': truth.coefficients_ER.astype(np.float32),
      'basis': truth.basis_RDV.astype(np.float32),
    },
  )
