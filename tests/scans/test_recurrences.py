"""Every form of every scan is its recurrence: values and all gradients.

Those are scans by either algorithm or as GPU kernels (without a GPU they are
interpreted), single steps, and prefills with commits.

In float32, for gates from open to shut and any layout of texts, against the
recurrence in float64: an error is at most 1e-5 of the norms of what is right
and of what it would be with open gates, array by array. Layouts and the places
where runs are split are drawn, always the same ones; they are values, so that
programs are compiled once.
"""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from recursive_weights.scans import chunks
from tests.scans import recurrences
from tests.scans.recurrences import CASES, B, timed

T, CHUNK, WHOLE = 37, 16, 32  # tokens, those of a chunk, of whole chunks
# The least that kernels take; in the second, keys in more than one part.
WIDE = recurrences.Sizes(K=16, V=32, D=48)
WIDER = recurrences.Sizes(K=64, V=16)
TOLERANCE = 1e-5
MEANS = (0.0, -0.05, -1.0, -10.0, -80.0, -np.inf)

drawn = hypothesis.settings(
  derandomize=True, database=None, deadline=None, max_examples=5
)
rows = strategies.lists(
  strategies.sets(strategies.integers(0, T - 1), max_size=5),
  min_size=B,
  max_size=B,
)
lengths = strategies.lists(
  strategies.tuples(*[strategies.integers(0, T)] * B), min_size=3, max_size=3
)
# Twice in a chunk, at its start, inside one; tokens missing at both ends.
TEXTS = [{5, 9}, {0, 16, 36}]
GAPS = [{34, 35, 36}, {0, 1, 20}]

SCANS = (*chunks.ALGORITHMS, 'fused')
FORMS = (*SCANS, 'step')


def every(*forms, more=()):
  return pytest.mark.parametrize(
    ('name', 'algorithm'), [*itertools.product(CASES, forms), *more]
  )


# Mamba-1's recurrent form keeps the states between chunks, too.
plain_chunks = every('chunked', more=[('selective', 'recurrent')])
all_chunks = every('chunked', 'fused', more=[('selective', 'recurrent')])
every_mean = pytest.mark.parametrize('mean', MEANS)
# Of a prefill, by row: chunks' ends, one token before and after, none, all.
LENGTHS = [(T, 0), (16, 15), (17, T - 1)]


def states(name, lengths_NB, *, mask, **given):
  """The state after the first tokens of each row, by the recurrence."""

  def one(length_B):
    on_BT = mask & (jnp.arange(mask.shape[1])[None] < length_B[:, None])
    return recurrences.scan(name, **given, mask=on_BT)[1]

  return jax.vmap(one)(lengths_NB)


@functools.cache
def program(name, algorithm=None):
  """`((_, (y, state)), gradients)` of a form; of the recurrence for None.

  Where flags have `lengths`, of a prefill and its states after so many tokens.
  """
  module = CASES[name].module

  def outputs(real, flags):
    flags = dict(flags)
    lengths_NB = flags.pop('lengths', None)
    if algorithm is None:
      y, state = recurrences.scan(name, **real, **flags)
      if lengths_NB is not None:
        state = states(name, lengths_NB, **real, **flags)
      return y, state
    if algorithm == 'step':
      return recurrences.scan(name, **real, **flags, step=module.step)
    options = {'algorithm': algorithm, 'chunk': CHUNK}
    if lengths_NB is None:
      return module.scan(**real, **flags, **options)
    y, pending = module.prefill(**real, **flags, **options)
    return y, jax.vmap(module.commit, (None, 0))(pending, lengths_NB)

  def total(real, flags, weights):
    y, state = outputs(real, flags)
    return (y * weights[0]).sum() + (state * weights[1]).sum(), (y, state)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(name, algorithm, *args):
  """Outputs, last state and gradients, in float64 for the recurrence."""
  exact = algorithm is None
  with jax.enable_x64(exact):
    real, flags, weights = args
    real, weights = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64 if exact else jnp.float32),
      (real, weights),
    )
    (_, outputs), gradients = program(name, algorithm)(real, flags, weights)
    return jax.tree.map(np.asarray, (outputs, gradients))


def case_of(
  name, algorithm, mean, texts, gaps, *, length=T, sizes=None, lengths=None
):
  """What has gradients, what has none, and weights of a scalar loss."""
  sizes = sizes or (WIDE if algorithm == 'fused' else recurrences.SMALL)
  inputs, shared = recurrences.given(name, length, mean, sizes=sizes)
  resets, mask = shared.pop('resets'), shared.pop('mask')
  for row in range(B):
    resets[row, [t for t in texts[row] if t < length]] = True
    mask[row, [t for t in gaps[row] if t < length]] = False
  real, flags = inputs | shared, {'resets': resets, 'mask': mask}
  y_shape = CASES[name].outputs(length, sizes)
  state_shape = shared['state'].shape
  if lengths is not None:
    flags['lengths'] = np.asarray(lengths)
    state_shape = (len(lengths), *state_shape)
  stream = np.random.default_rng(7)
  weights = [stream.normal(size=x) for x in (y_shape, state_shape)]
  return real, flags, weights


def check(name, found, real, flags, weights):
  """The rule at the top of this file, leaf by leaf."""
  exact = run(name, None, real, flags, weights)
  gate = recurrences.gate(real)
  opened = real | {gate: np.zeros_like(real[gate])}
  scale = run(name, None, opened, flags, weights)

  def one(path, a, b, c):
    assert np.isfinite(a).all(), path
    error = np.linalg.norm(a - b)
    bound = TOLERANCE * (np.linalg.norm(b) + np.linalg.norm(c))
    assert error <= bound, (path, error, bound)

  jax.tree_util.tree_map_with_path(one, found, exact, scale)
  shut = np.isneginf(real[gate])
  assert not found[1][gate][shut].any()


@every(*FORMS)
@every_mean
@drawn
@hypothesis.given(rows, rows)
@hypothesis.example(TEXTS, GAPS)
def test_a_form_is_the_recurrence(name, algorithm, mean, texts, gaps):
  case = case_of(name, algorithm, mean, texts, gaps)
  check(name, run(name, algorithm, *case), *case)


@plain_chunks
@every_mean
@drawn
@hypothesis.given(rows, rows, lengths)
@hypothesis.example(TEXTS, GAPS, LENGTHS)
def test_a_prefill_commits_any_length(
  name, algorithm, mean, texts, gaps, lengths
):
  case = case_of(name, algorithm, mean, texts, gaps, lengths=lengths)
  check(name, run(name, algorithm, *case), *case)


@every(*FORMS)
def test_one_token(name, algorithm):
  for mean in MEANS:
    for texts in ([{0}, ()], [(), ()]):
      case = case_of(name, algorithm, mean, texts, [(), ()], length=1)
      check(name, run(name, algorithm, *case), *case)


@all_chunks
def test_whole_chunks(name, algorithm):
  for mean in MEANS:
    for texts, gaps in (
      (TEXTS, GAPS),
      ([{15, 31}, {0, 16}], [{16}, {31}]),
      ([(), ()], [(), ()]),
    ):
      case = case_of(name, algorithm, mean, texts, gaps, length=WHOLE)
      check(name, run(name, algorithm, *case), *case)


@plain_chunks
def test_a_prefill_of_whole_chunks(name, algorithm):
  lengths = [(WHOLE, 0), (16, 15), (17, WHOLE - 1)]
  options = {'length': WHOLE, 'lengths': lengths}
  for mean in MEANS:
    case = case_of(name, algorithm, mean, TEXTS, GAPS, **options)
    check(name, run(name, algorithm, *case), *case)


@pytest.mark.parametrize('name', ['rwkv6', 'kimi_delta', 'selective'])
def test_a_fused_prefill(name):
  """Of each way to give what tokens wrote: their values, corrections, states.

  In one layout, as its reference, a run to every length, takes long.
  """
  for mean in (-0.05, -80.0, -np.inf):
    case = case_of(name, 'fused', mean, TEXTS, GAPS, lengths=LENGTHS)
    check(name, run(name, 'fused', *case), *case)


@pytest.mark.parametrize(
  ('algorithm', 'absent'),
  [
    ('chunked', 'state'),
    ('fused', 'fresh'),
    ('fused', 'state and fresh'),
  ],
)
@pytest.mark.parametrize('name', CASES)
def test_states_may_be_left_out(name, algorithm, absent):
  """Resets then bring in zeros; a row starts from what resets bring in."""
  for mean in MEANS:
    real, *others = case_of(name, algorithm, mean, TEXTS, GAPS)
    for part in absent.split(' and '):
      del real[part]
    case = real, *others
    check(name, run(name, algorithm, *case), *case)


@pytest.mark.parametrize('name', ['rwkv6', 'kimi_delta'])
def test_keys_in_parts(name):
  """Wider than what kernels have in registers; the two have all their parts."""
  for mean in MEANS:
    case = case_of(name, 'fused', mean, TEXTS, GAPS, sizes=WIDER)
    check(name, run(name, 'fused', *case), *case)


@pytest.mark.parametrize('algorithm', SCANS)
@pytest.mark.parametrize(
  'name', ['gated_linear', 'rwkv6', 'gated_delta', 'kimi_delta']
)
def test_gate_of_a_reset_has_no_gradient(name, algorithm):
  """Where resets bring in zeros, what decays at them is of no matter."""
  real, flags, weights = case_of(name, algorithm, -0.05, TEXTS, [(), ()])
  real['fresh'] *= 0
  slope = run(name, algorithm, real, flags, weights)[1]['log_decay']
  assert not slope[flags['resets']].any()
  assert slope[~flags['resets']].any()


@every(*FORMS)
@drawn
@hypothesis.given(
  strategies.sampled_from(MEANS), strategies.integers(0, T), rows, rows
)
@hypothesis.example(-0.05, 16, TEXTS, GAPS)
@hypothesis.example(-1.0, 23, TEXTS, GAPS)
def test_a_run_goes_on_from_any_token(
  name, algorithm, mean, split, texts, gaps
):
  """Its second part, moved to the front, starts from the state of the first.

  Gradients follow by hand: the first part is given that of the state between.
  """
  real, flags, weights = case_of(name, algorithm, mean, texts, gaps)
  t, (y_weight, state_weight) = np.arange(T)[None], weights

  def moved(tree, by):
    return {n: np.roll(x, by, 1) if timed(n) else x for n, x in tree.items()}

  before = flags | {'mask': flags['mask'] & (t < split)}
  after = {key: np.roll(x, -split, 1) for key, x in flags.items()}
  after['mask'] &= t < T - split
  part = functools.partial(run, name, algorithm)
  (y, between), _ = part(real, before, weights)
  (later_y, state), late = part(
    moved(real, -split) | {'state': between},
    after,
    (np.roll(y_weight, -split, 1), state_weight),
  )
  _, early = part(real, before, (y_weight, late.pop('state')))
  for key, slope in moved(late, split).items():
    early[key] = early[key] + slope
  found = (y + np.roll(later_y, split, 1), state), early
  check(name, found, real, flags, weights)
