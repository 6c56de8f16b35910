"""Flow: the base carried for unit time along a learned vector field."""

import jax.numpy as jnp

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator, UserError


def make(hidden: int = 16, steps: int = 4) -> Operator:
  """`dW/dt = field(W, t)`, `W2 = W(1)` from `W(0) = W`.

  The field is a network D + 1 -> hidden -> D with GELU on each row and the
  time; five-stage order-5 Runge-Kutta (Tsit5) in equal steps.

  Args:
    hidden: width of the field's hidden layer, h.
    steps: number of steps, fixed.

  Parameters: `(D + 1) h + h + h D + D`.
  Start: W (the field's last layer is zero).
  Gradients: reverse mode through the solver's own steps (checkpointed).
  Cost: O(steps F D h). Bound to the width D, not to the rows.
  Errors: needs diffrax, the extra `[flow]`.
  Source: examiner-ctm v5.3, section 9.2; neural ordinary differential
    equations (Chen et al. 2018), solver by diffrax (Kidger 2021).
  """
  matrix.positive(hidden=hidden, steps=steps)
  try:
    import diffrax
  except ImportError as error:
    raise UserError(
      'the flow operator needs diffrax: install the extra, '
      "pip install 'recursive_weights[flow]'"
    ) from error

  def field(t, w_FD, theta):
    time_F1 = jnp.full((w_FD.shape[0], 1), t, w_FD.dtype)
    return matrix.network_apply(theta, jnp.concatenate([w_FD, time_F1], -1))

  def init(key, base):
    _, columns = matrix.size(base.shape)
    return matrix.network_init(key, columns + 1, hidden, columns)

  def apply(theta, base):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(field),
      diffrax.Tsit5(),
      t0=0.0,
      t1=1.0,
      dt0=None,
      y0=matrix.view(base),
      args=theta,
      stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 1.0, steps + 1)),
      max_steps=steps,
    )
    assert solution.ys is not None  # the end time is saved by default
    return matrix.restore(solution.ys[0], base)

  return Operator(init, apply)


def count(base_shape, hidden: int = 16, steps: int = 4) -> int:
  """`(D + 1) h + h + h D + D`."""
  del steps
  _, columns = matrix.size(base_shape)
  return matrix.network_count(columns + 1, hidden, columns)
