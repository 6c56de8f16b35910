"""Fourier: a learned filter of the base's frequencies."""

from typing import Literal

import jax.numpy as jnp

from recursive_weights.derivation import matrix
from recursive_weights.interfaces import Operator

Kind = Literal['columns', 'rows', 'both']


def make(kind: Kind = 'columns', modes: int | None = None) -> Operator:
  """`W2 = irfft(filter * rfft(W))`, one complex filter for all rows.

  Args:
    kind: 'columns': along D, one filter for all rows. 'rows': along F, one
      filter for all columns. 'both': one after the other (separable).
    modes: how many of the lowest frequencies are filtered, clipped to the
      n // 2 + 1 that n points have; the others pass. None filters all.

  Parameters, along an axis of n points with m modes: m real parts, and an
    imaginary part for each mode but 0 and, if n is even, n / 2, whose phase a
    real signal cannot have. All modes: n. 'both': the sum over both axes.
  Start: W (filter 1).
  Cost: O(F D log n). A filter with fewer modes than n / 2 fits any n.
  Source: examiner-ctm v5.3, section 9.3; circular convolution as in global
    filter networks (Rao et al. 2021).
  """
  matrix.one_of('kind', kind, ('columns', 'rows', 'both'))
  if modes is not None:
    matrix.positive(modes=modes)

  def init(key, base):
    del key
    theta = {}
    for name, n in _axes(kind, base.shape):
      real, imag = _sizes(n, modes)
      theta[name] = {'real': jnp.ones(real), 'imag': jnp.zeros(imag)}
    return theta

  def apply(theta, base):
    w_FD = matrix.view(base)
    if 'columns' in theta:
      w_FD = w_FD + _change(theta['columns'], w_FD)
    if 'rows' in theta:
      w_FD = w_FD + _change(theta['rows'], w_FD.T).T
    return matrix.restore(w_FD, base)

  return Operator(init, apply)


def count(base_shape, kind: Kind = 'columns', modes: int | None = None) -> int:
  """Real and imaginary parts that act; n an axis with all modes."""
  return sum(sum(_sizes(n, modes)) for _, n in _axes(kind, base_shape))


def _axes(kind, base_shape):
  rows, columns = matrix.size(base_shape)
  axes = (('columns', columns), ('rows', rows))
  return [(name, n) for name, n in axes if kind in (name, 'both')]


def _sizes(n, modes):
  real = n // 2 + 1 if modes is None else min(modes, n // 2 + 1)
  return real, min(real, (n + 1) // 2) - 1


def _change(theta, w_FD):
  """irfft((filter - 1) rfft(w)) along the last axis."""
  n = w_FD.shape[-1]
  spectrum_FK = jnp.fft.rfft(w_FD, axis=-1)
  real, imag = theta['real'] - 1, theta['imag']
  last = real.shape[0] - imag.shape[0] - 1
  imag = jnp.concatenate([jnp.zeros(1), imag, jnp.zeros(last)])
  change_FK = spectrum_FK[:, : real.shape[0]] * (real + 1j * imag)[None, :]
  return jnp.fft.irfft(change_FK, n=n, axis=-1)
