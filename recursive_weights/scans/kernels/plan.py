"""What the kernels of the matrix state share: a plan, names, one product."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
  """What is known before a trace.

  delta: the delta rule, else linear attention. exclusive: tokens read before
  they write, but for their bonus. fresh: resets bring in a state. written: what
  tokens of the delta rule wrote is an output. heads: of values. repeats: heads
  of values for one of keys. precision: of products of float32. narrow: values
  are of 16 bits. chunk: tokens. warps: of a program without a state, of one
  that carries it on, of one that keeps it or goes back.
  """

  delta: bool
  exclusive: bool
  fresh: bool
  written: bool
  heads: int
  repeats: int
  precision: str
  interpret: bool
  narrow: bool
  chunk: int
  warps: tuple[int, int, int]

  @property
  def inner(self):
    """Precision of products of the triangle's inverse, in float32.

    TF32 where values have 16 bits: fewer than its 19, and `solve` is one.
    """
    return 'default' if self.narrow else 'highest'

  def place(self, program):
    """Example, head of values and head of keys of a program."""
    example, head = program // self.heads, program % self.heads
    return example, head, head // self.repeats


class Inside(NamedTuple):
  """What depends on no state, or references to it, by name."""

  read: Any
  write: Any
  whole: Any
  score: Any
  old: Any = None
  solve: Any = None
  fresh_read: Any = None
  fresh_whole: Any = None
  fresh_old: Any = None

  @classmethod
  def of(cls, refs, plan):
    """From the first of some, and the others."""
    names = cls._fields[:4] + cls._fields[4:6] * plan.delta
    names += cls._fields[6:8] * plan.fresh
    names += cls._fields[8:] * (plan.fresh and plan.delta)
    found = dict(zip(names, refs, strict=False))
    return cls(**found), refs[len(names) :]


def dot(a, b, precision='highest'):
  """`a b` with sums in float32; `precision` is of factors in float32."""
  if jax.default_backend() == 'cpu':
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  wide = a.dtype == jnp.float32 and b.dtype == jnp.float32
  return jnp.dot(
    a,
    b,
    precision=precision if wide else None,
    preferred_element_type=jnp.float32,
  )
