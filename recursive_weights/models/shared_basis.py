"""Retrieval by members' weights on a shared basis: `W_i = I + Σ_k c_ik G_k`.

Source: UnifyWeaver, Smoothing Basis for Multi-Cluster Projection, 2025.
"""

import jax.numpy as jnp
import numpy as np

from recursive_weights import interfaces
from recursive_weights.basis import initial, routing
from recursive_weights.interfaces import UserError


def make(
  spec: interfaces.Spec,
  *,
  answers: np.ndarray | None = None,
  rank: int = 8,
  rule: str = 'distance',
  temperature: float = 0.1,
  identity: bool = True,
  dtype=jnp.float32,
) -> interfaces.Model:
  """Scores of all answers, each judged by its own member's weight.

    logits_i = score(q W_i, a_i) / τ,  W_i = [I +] Σ_k c_ik G_k

  Parameters are `coefficients` `[E, R]` and `basis` `[R, D, V]`: `E R + R D V`
  in place of `E D V`. At the start c = 0: with `identity` the model is the
  similarity of question and answer, exactly.

  Args:
    answers: embeddings `[E, V]`, of the task; None where inputs are pairs of
      question and answer, one after the other, and the scores say whose they
      are: `-|q W_i - a|² / τ`, the rule 'distance' without `identity`.
    rank: R, bases; at most E, and the entries of a weight, D V.
    rule: of `routing.scores`: 'distance', 'dot' or 'cosine'.
    temperature: τ; matters where scores are trained by cross-entropy.
    identity: members' weights are the identity and what the basis adds.
    dtype: float32; spans and scores of unit vectors need its digits.

  Raises:
    UserError: the task retrieves nothing, inputs are no vectors, or a field is
      out of range.
  """
  if rule not in routing.JUDGED:
    raise UserError(
      f'rule must be one of {", ".join(routing.JUDGED)}, got {rule!r}'
    )
  if temperature <= 0:
    raise UserError(f'temperature must be > 0, got {temperature}')
  if jnp.dtype(dtype) != jnp.float32:
    raise UserError(f"dtype must be 'float32' here, got {jnp.dtype(dtype)}")
  shape = getattr(spec.inputs, 'shape', None)
  if shape is None or len(shape) != 1:
    raise UserError(
      'inputs must be one vector an example, of a question or a pair, got '
      f'{spec.inputs}: choose a task such as question_answer'
    )
  width, members = shape[0], spec.classes
  if answers is None:
    if rule != 'distance':
      raise UserError(
        "rule must be 'distance' where inputs are pairs of question and "
        f'answer, got {rule!r}'
      )
    if identity or width % 2:
      raise UserError(
        'a task without answers to retrieve needs pairs as inputs, and '
        f'identity False; got inputs of {width} and identity {identity}'
      )
    width = values = width // 2
  else:
    a_EV = np.asarray(answers, np.float32)
    values = a_EV.shape[1]
  if identity and width != values:
    raise UserError(
      f'identity needs answers of the size of questions, {width}, got {values}'
    )
  limit = min(members, width * values)
  if not 0 < rank <= limit:
    raise UserError(
      f'rank must be in 1 .. {limit} (members, or entries of a weight), '
      f'got {rank}'
    )

  def init(key, inputs):
    del inputs
    return {
      'coefficients': jnp.zeros((members, rank)),
      'basis': initial.random(key, rank, width, values),
    }

  def apply(params, carry, inputs, *, key=None, train=False):
    del key, train
    if answers is None:
      scores_BE = routing.pair_scores(
        inputs[:, :width],
        inputs[:, width:],
        params['coefficients'],
        params['basis'],
      )
      return {'logits': scores_BE[None] / temperature}, carry
    scores = routing.basis_scores(
      inputs,
      params['coefficients'],
      params['basis'],
      jnp.asarray(a_EV),
      identity=identity,
    )
    return {'logits': scores[rule][None] / temperature}, carry

  return interfaces.Model(init=init, carry=lambda params, size: {}, apply=apply)
