"""Laws of Tiny Recursive Models: shapes, symmetry, carry, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.interfaces import Spec, UserError
from recursive_weights.models import trm
from recursive_weights.models.layers import symmetric_block, trm_block
from recursive_weights.recursion.unroll import unroll

ROWS = 2
SMALL = {'width': 16, 'multiple': 16, 'pool_width': 8, 'inner': 2, 'steps': 3}
CASES = {
  'mixer': {},
  'single': {'states': 1},
  'prefix': {'prefix': 3},
  'attention': {'cell': 'attention', 'position': 'rotation', 'heads': 2},
  'constraints': {'cell': 'symmetric'},
  'tokens': {'cell': 'symmetric', 'mixing': 'tokens'},
}


def sudoku(digits):
  cells = digits * digits
  return Spec(jax.ShapeDtypeStruct((cells,), jnp.int32), (cells,), digits, {})


def problem(digits=4, **fields):
  spec = sudoku(digits)
  model = trm.make(spec, vocabulary=digits + 1, **(SMALL | fields))
  words = jax.random.randint(
    jax.random.key(1), (ROWS, digits * digits), 0, digits + 1
  )
  params = model.init(jax.random.key(0), words)
  noise = jax.random.normal(jax.random.key(2), params['halt']['kernel'].shape)
  params['halt']['kernel'] = noise
  return model, params, words


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name, marks=[pytest.mark.long] if name in ('single', 'prefix') else []
    )
    for name in CASES
  ],
)
def test_training_steps_are_the_steps_of_evaluation(name):
  """One step each from the carry gives what all steps together give."""
  model, params, words = problem(**CASES[name])
  carry = model.carry(params, ROWS)
  whole, last = jax.jit(lambda p, c, x: model.apply(p, c, x))(
    params, carry, words
  )
  chex.assert_shape(whole['logits'], (3, ROWS, 16, 4))
  chex.assert_shape([whole['halt'], whole['certainty']], (3, ROWS))
  chex.assert_trees_all_close(
    whole['certainty'], 1 / (1 + jnp.exp(-whole['halt'])), rtol=1e-5
  )
  single = jax.jit(lambda p, c, x: model.apply(p, c, x, key=None, train=True))
  for s in range(3):
    outputs, carry = single(params, carry, words)
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[0], outputs),
      jax.tree.map(lambda x, s=s: x[s], whole),
      rtol=1e-4,
      atol=1e-4,
    )
  chex.assert_trees_all_close(carry, last, rtol=1e-4, atol=1e-4)
  # The recursion runs to any number of steps, from its own start.
  recursion = model.recursion
  weights = recursion.prepare(params)
  context = recursion.encode(weights, words, None)
  state = recursion.start(weights, context)
  chex.assert_trees_all_equal(state, model.carry(params, ROWS))
  chex.assert_tree_shape_prefix((context, state), (ROWS,))
  _, outputs = unroll(
    recursion, weights, context, state, 5, hoist=False, keep=('halt',)
  )
  np.testing.assert_allclose(
    outputs['halt'][:3], whole['halt'], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('name', CASES)
def test_rows_do_not_see_one_another(name):
  model, params, words = problem(**CASES[name])
  run = jax.jit(
    lambda p, x: model.apply(p, model.carry(p, len(x)), x)[0]['logits']
  )
  both = run(params, words)
  alone = run(params, words[1:])
  np.testing.assert_allclose(both[0, 1:], alone[0], rtol=1e-4, atol=1e-4)
  other = run(params, jnp.flip(words, 0))
  np.testing.assert_allclose(
    both[0], jnp.flip(other[0], 0), rtol=1e-4, atol=1e-4
  )
  assert not np.allclose(both[0, 0], both[0, 1], atol=1e-2)


SYMMETRIC = [
  ('constraints', 'mean'),
  ('constraints', 'max'),
  ('constraints', 'both'),
  ('constraints', 'softmax'),
  ('tokens', 'both'),
]


@pytest.mark.parametrize('mixing, pool', SYMMETRIC)
@pytest.mark.parametrize(
  'digits', [4, pytest.param(6, marks=pytest.mark.slow), 9]
)
def test_relabelled_digits_come_out_relabelled(digits, mixing, pool):
  # As deep as published: random weights enlarge rounding errors on the way.
  depth = {'steps': 1, 'cycles': 3, 'inner': 6}
  model, params, words = problem(
    digits, cell='symmetric', mixing=mixing, pool=pool, **depth
  )
  rng = np.random.default_rng(digits)
  label = np.concatenate([[0], 1 + rng.permutation(digits)])
  run = jax.jit(lambda x: model.apply(params, model.carry(params, ROWS), x)[0])
  plain, renamed = run(words), run(jnp.asarray(label)[words])
  wanted = np.empty_like(plain['logits'])
  wanted[..., label[1:] - 1] = plain['logits']
  error = np.linalg.norm(renamed['logits'] - wanted)
  assert error <= 1e-5 * np.linalg.norm(wanted)
  np.testing.assert_allclose(
    renamed['halt'], plain['halt'], rtol=1e-5, atol=1e-5
  )
  # The other digits do matter, and so does which one is given.
  assert np.ptp(plain['logits'], axis=-1).min() > 1e-3


def moved(digits, box, rng):
  """Cells after a shuffle of bands and stacks and of rows and columns."""

  def axis(groups, members):
    order = rng.permutation(groups)[:, None] * members
    inside = np.stack([rng.permutation(members) for _ in range(groups)])
    return (order + inside).ravel()

  rows, columns = axis(box[1], box[0]), axis(box[0], box[1])
  return (rows[:, None] * digits + columns[None]).ravel()


@pytest.mark.parametrize(
  'digits, box, pool',
  [(4, (2, 2), 'max'), (6, (2, 3), 'both'), (9, (3, 3), 'softmax')],
)
def test_constraints_know_no_cell_from_another(digits, box, pool):
  """Moving the puzzle's cells moves the answer's; other moves do not."""
  model, params, words = problem(digits, cell='symmetric', pool=pool, steps=1)
  run = jax.jit(
    lambda x: model.apply(params, model.carry(params, ROWS), x)[0]['logits']
  )
  cells = moved(digits, box, np.random.default_rng(digits))
  plain, shuffled = np.asarray(run(words)), run(words[:, cells])
  np.testing.assert_allclose(shuffled, plain[:, :, cells], rtol=1e-4, atol=1e-4)
  wrong = cells.copy()
  wrong[[0, 1]] = wrong[[1, 0]]
  assert not np.allclose(run(words[:, wrong]), plain[:, :, wrong], atol=1e-2)


def test_pools_by_loops():
  """Each candidate gets the mean or largest value of its constraints."""
  digits, box, width, pooled = 6, (2, 3), 4, 2
  key = jax.random.key(0)
  params = symmetric_block.constraint_init(key, width, pooled, 4, 'mean')
  x = np.asarray(
    jax.random.normal(jax.random.key(1), (digits**2, 1, digits, width))
  )
  for pool, reduce in (('mean', np.mean), ('max', np.max)):
    found = symmetric_block.constraint_half(
      params,
      jnp.asarray(x),
      families=tuple(symmetric_block.FAMILIES),
      box=box,
      pool=pool,
    )
    gate, up = np.asarray(x @ params['gate']), np.asarray(x @ params['up'])
    gate = gate / (1 + np.exp(-gate))
    wanted = np.zeros_like(x)
    for cell in range(digits**2):
      r, c = divmod(cell, digits)
      for v in range(digits):
        members = [[], [], [], []]
        for other in range(digits**2):
          r2, c2 = divmod(other, digits)
          same_box = (r // 2, c // 3) == (r2 // 2, c2 // 3)
          for family, same in enumerate((r == r2, c == c2, same_box)):
            if same:
              members[family].append((other, v))
        members[3] = [(cell, other) for other in range(digits)]
        values = [
          reduce(
            [up[o, 0, w, k * pooled : (k + 1) * pooled] for o, w in who], axis=0
          )
          for k, who in enumerate(members)
        ]
        hidden = gate[cell, 0, v] * np.concatenate(values)
        out = x[cell, 0, v] + hidden @ np.asarray(params['down'])
        wanted[cell, 0, v] = out / np.sqrt((out**2).mean() + 1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_there_is_a_vector_for_every_token_of_the_task():
  spec = sudoku(4)._replace(vocabulary=5)
  for given, words in ((0, 5), (5, 5), (7, 7)):
    model = trm.make(spec, vocabulary=given, **SMALL)
    params = model.init(jax.random.key(0), None)
    assert params['embedding'].shape == (words, SMALL['width'])
  with pytest.raises(UserError, match='vocabulary must be 0 or at least 5'):
    trm.make(spec, vocabulary=4, **SMALL)
  # Tokens that are not counted are as many as the classes.
  params = trm.make(sudoku(4), **SMALL).init(jax.random.key(0), None)
  assert len(params['embedding']) == 4


def test_puzzles_have_a_place_of_their_own():
  spec = sudoku(4)._replace(puzzles=3)
  model = trm.make(spec, vocabulary=5, prefix=1, **SMALL)
  words = jnp.zeros([ROWS, 16], jnp.int32)
  inputs = {'tokens': words, 'puzzle': jnp.asarray([0, 2])}
  params = model.init(jax.random.key(0), inputs)
  assert params['puzzle'].shape == (3, 16) and not params['puzzle'].any()

  def total(params):
    carry = model.carry(params, ROWS)
    outputs, _ = model.apply(params, carry, inputs, key=None, train=True)
    return (outputs['logits'] ** 2).sum()

  moves = jax.grad(total)(params)['puzzle']
  assert moves[0].any() and moves[2].any() and not moves[1].any()


@pytest.mark.slow
def test_half_precision_keeps_its_dtypes():
  for fields in CASES.values():
    # Few updates: a recursion magnifies rounding from one to the next.
    fields = fields | {'cycles': 1, 'inner': 1}
    model, params, words = problem(dtype='bfloat16', **fields)
    full, _, _ = problem(**fields)
    carry = model.carry(params, ROWS)
    assert {x.dtype for x in jax.tree.leaves(carry)} == {jnp.dtype('bfloat16')}
    outputs, new = model.apply(params, carry, words, key=None, train=True)
    assert {x.dtype for x in outputs.values()} == {jnp.dtype('float32')}
    chex.assert_trees_all_equal_dtypes(new, carry)
    wanted, _ = full.apply(
      params, full.carry(params, ROWS), words, key=None, train=True
    )
    error = outputs['logits'] - wanted['logits']
    assert jnp.sqrt((error**2).mean()) < 0.2 * wanted['logits'].std()


def test_initial_weights():
  """Unit variance in, unit variance out of every product."""
  weight = trm_block.lecun(jax.random.key(0), 400, 500)
  np.testing.assert_allclose(weight.std() * 20, 1.0, rtol=0.01)
  assert np.abs(weight).max() * 20 <= 2 / 0.8796 + 1e-3
  widths = [trm_block.inner_width(d) for d in (512, 97, 81)]
  assert widths == [1536, 512, 256]
  model, params, words = problem()
  weights = model.recursion.prepare(params)
  x = model.recursion.encode(weights, words, None)['x']
  np.testing.assert_allclose(x.std(), 1.0, rtol=0.2)
  outputs, _ = model.apply(params, model.carry(params, ROWS), words)
  assert (problem()[1]['halt']['bias'] == -5).all()
  assert outputs['halt'].shape == (3, ROWS)


ERRORS = {
  'cell': {'cell': 'mlp'},
  'width': {'width': 0},
  'states': {'states': 3},
  'gradient': {'gradient': 'none'},
  'heads': {'cell': 'attention', 'heads': 3},
  'position': {'position': 'sine'},
  'rotation': {'position': 'rotation'},
  'box': {'cell': 'symmetric', 'box': (1, 3)},
  'mixing': {'cell': 'symmetric', 'mixing': 'cells'},
  'pool ': {'cell': 'symmetric', 'pool': 'min'},
  'position ': {'cell': 'symmetric', 'position': 'learned'},
  'prefix must be 0 with': {'cell': 'symmetric', 'prefix': 16},
  'pool_width': {'cell': 'symmetric', 'pool_width': 7},
}


@pytest.mark.parametrize('name', ERRORS)
def test_arguments_out_of_range(name):
  with pytest.raises(UserError, match=name.strip()):
    trm.make(sudoku(4), **(SMALL | ERRORS[name]))


def test_tasks_that_do_not_fit():
  floats = sudoku(4)._replace(inputs=jax.ShapeDtypeStruct((16,), jnp.float32))
  with pytest.raises(UserError, match='integer tokens'):
    trm.make(floats)
  with pytest.raises(UserError, match='needs a Sudoku'):
    trm.make(sudoku(4)._replace(classes=5), cell='symmetric')
  with pytest.raises(UserError, match='prefix'):
    trm.make(sudoku(4)._replace(puzzles=2))
