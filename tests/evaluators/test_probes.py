"""Probes of memory, on models whose memory is known, good and bad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_weights.evaluators import (
  _reading,
  forgetting,
  identity,
  poison,
  recall,
  state_jitter,
  utilisation,
)
from recursive_weights.interfaces import Decoder, Model, UserError
from recursive_weights.models.decoder import from_decoder
from recursive_weights.recursion import objective
from recursive_weights.tasks import parity, text
from recursive_weights.tasks.recall import PEOPLE

LAST = objective.last()
KEY = jax.random.key(0)
WIDTH = 6
SPAN = 100  # tokens that `remembering` can look back


def decaying(classes, resets):
  """A language model whose state is a decaying sum of embeddings.

  It is one that compiles fast; without resets it is a bad one.
  """

  def init(key):
    keys = jax.random.split(key)
    return {
      'embed': jax.random.normal(keys[0], (classes, WIDTH)),
      'head': 0.3 * jax.random.normal(keys[1], (WIDTH, classes)),
      'bias': jnp.zeros(classes),
    }

  def blocks(params, cache, x_BTD, *, resets_BT=None, tap=None, key=None):
    if resets_BT is None or not resets:
      resets_BT = jnp.zeros(x_BTD.shape[:2], bool)

    def body(state, token):
      x_BD, reset_B = token
      kept_BD = jnp.where(reset_B[:, None], 0.0, 0.9 * state)
      return kept_BD + x_BD, kept_BD + x_BD

    tokens = (jnp.moveaxis(x_BTD, 1, 0), resets_BT.T)
    _, y = jax.lax.scan(body, cache['recurrent'], tokens)
    y_BTD = jnp.moveaxis(y, 0, 1)
    return y_BTD, y_BTD

  def cache(params, batch_size):
    return {
      'recurrent': jnp.zeros((batch_size, WIDTH)),
      'attention': {},
      'position': jnp.zeros(batch_size, jnp.int32),
    }

  def commit(cache, states_BTD, length_B=None):
    batch, length = states_BTD.shape[:2]
    if length_B is None:
      length_B = jnp.full(batch, length)
    last_BD = states_BTD[jnp.arange(batch), jnp.maximum(length_B - 1, 0)]
    keep_B1 = (length_B == 0)[:, None]
    return cache | {
      'recurrent': jnp.where(keep_B1, cache['recurrent'], last_BD),
      'position': cache['position'] + length_B,
    }

  return from_decoder(
    Decoder(
      embed=lambda params, tokens_BT: params['embed'][tokens_BT],
      blocks=blocks,
      head=lambda p, x_BTD: x_BTD @ p['head'] + p['bias'][None, None],
      cache=cache,
      commit=commit,
      init=init,
    )
  )


@pytest.fixture(scope='module')
def task():
  return text.make(length=64)


@pytest.fixture(scope='module')
def good(task):
  model = decaying(task.spec.classes, resets=True)
  return model, model.init(jax.random.key(3), None)


@pytest.fixture(scope='module')
def leaking(task):
  return decaying(task.spec.classes, resets=False)


def remembering(task):
  """Says the first five digits of a text again, if told at most SPAN ago."""
  zero, size = int(task.text.encode('0')[0]), 1024

  def apply(params, carry, inputs, *, key, train):
    del params, key, train
    tokens_BT = inputs['tokens']
    place_BT = carry['position'][:, None] + jnp.arange(tokens_BT.shape[1])[None]
    seen_BN = jax.vmap(lambda x, i, t: x.at[i].set(t))(
      carry['seen'], place_BT, tokens_BT
    )
    digit_BN = (seen_BN >= zero) & (seen_BN < zero + 10)
    number_BN = jnp.cumsum(digit_BN, axis=1)
    said_BT = jnp.take_along_axis(number_BN, place_BT, axis=1)
    wanted = (number_BN[:, None] == said_BT[..., None] - 4) & digit_BN[:, None]
    near = jnp.arange(size)[None, None] > place_BT[..., None] - SPAN
    token_BT = jnp.where(wanted & near, seen_BN[:, None], 0).max(-1)
    logits = 9.0 * jax.nn.one_hot(token_BT, task.spec.classes)
    carry = {'seen': seen_BN, 'position': place_BT[:, -1] + 1}
    return {'logits': logits[None]}, carry

  def carry(params, batch_size):
    del params
    return {
      'seen': jnp.zeros((batch_size, size), jnp.int32),
      'position': jnp.zeros(batch_size, jnp.int32),
    }

  # That there is a decoder is all that this probe asks of it.
  decoder = decaying(2, True).decoder
  return Model(lambda key, inputs: {}, carry, apply, decoder=decoder)


def whole(model, params, texts):
  """Loss and likeliest token at each place, in one chunk, in float64."""
  tokens_BT = np.zeros((len(texts), max(map(len, texts))), np.int32)
  for row, words in enumerate(texts):
    tokens_BT[row, : len(words)] = words
  inputs = {'tokens': tokens_BT, 'resets': tokens_BT == 0}
  outputs, _ = jax.jit(model.apply)(
    params, model.carry(params, len(texts)), inputs
  )
  logits = np.asarray(outputs['logits'][0], np.float64)[:, :-1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  said = np.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=2)[..., 0]
  return -said, logits.argmax(-1)


def test_reading_in_chunks_is_one_walk(task, good):
  model, params = good
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 9, n).astype(np.int32) for n in (70, 2, 65, 130, 9)]
  judged = _reading.make(model, task, LAST, rows=2)(params, texts)
  loss_BT, best_BT = whole(model, params, texts)
  for row, (loss_T, right_T) in enumerate(judged):
    size = len(texts[row]) - 1
    assert len(loss_T) == len(right_T) == size
    np.testing.assert_allclose(loss_T, loss_BT[row, :size], 1e-4, 1e-5)
    right = best_BT[row, :size] == texts[row][1:]
    np.testing.assert_array_equal(right_T, right)


def test_recall_finds_how_far_a_model_remembers(task):
  evaluate = recall.make(
    remembering(task),
    task,
    LAST,
    batch_size=16,
    kinds=('passkey',),
    distances=(0, 20, 60, 120, 200),
    depths=(0.0, 0.5),
    examples=8,
  )
  found = evaluate({}, KEY)
  # 17 characters of question and a space, and five of the code, are between.
  for distance, right in ((0, 1), (20, 1), (60, 1), (120, 0), (200, 0)):
    assert found[f'recall/passkey@{distance}'] == right
    assert found[f'recall/passkey_tokens@{distance}'] == right
    assert found[f'recall/passkey@{distance}_depth0.5'] == right
  assert 60 < found['recall/passkey_tau'] < 120


def test_persistence_is_where_accuracy_above_chance_halves():
  distances = (0, 9, 99)
  assert recall.persistence(distances, [0.1, 0.1, 0.1], 0.1) == 0
  assert recall.persistence(distances, [1.0, 0.9, 0.8], 0.1) == 99
  # .9 above chance at first, .45 at a distance of 9.
  tau = recall.persistence(distances, [1.0, 0.55 - 1e-9, 0.1], 0.1)
  np.testing.assert_allclose(tau, 9, rtol=1e-4)


def knowing_names(task):
  """Writes `ann` whatever was told, and ends a name that has begun."""
  classes = task.spec.classes
  table_VV = np.zeros((classes, classes), np.int32)
  begun, *rest = task.text.encode(' a')
  table_VV[:, begun] = rest
  for name in PEOPLE:
    first, second, third = task.text.encode(name)
    table_VV[begun, first], table_VV[first, second] = second, third

  def apply(params, carry, inputs, *, key, train):
    del params, key, train
    tokens_BT = inputs['tokens']
    before_BT = jnp.concatenate(
      [carry['last'][:, None], tokens_BT[:, :-1]], axis=1
    )
    said_BT = jnp.asarray(table_VV)[before_BT, tokens_BT]
    logits = 9.0 * jax.nn.one_hot(said_BT, classes)
    return {'logits': logits[None]}, {'last': tokens_BT[:, -1]}

  def carry(params, batch_size):
    del params
    return {'last': jnp.zeros(batch_size, jnp.int32)}

  decoder = decaying(2, True).decoder._replace(init=None)
  return Model(lambda key, inputs: {}, carry, apply, decoder=decoder)


def test_knowing_names_is_no_memory(task):
  evaluate = recall.make(
    knowing_names(task),
    task,
    LAST,
    batch_size=32,
    kinds=('tracking',),
    distances=(4, 16),
    examples=64,
  )
  found = evaluate({}, KEY)
  assert found['recall/tracking_tokens@4'] > 0.65
  assert found['recall/tracking@4'] < 0.175
  assert found['recall/tracking_tau'] == 0


def test_untrained_weights_recall_nothing(task, good):
  model, params = good
  evaluate = recall.make(
    model, task, LAST, batch_size=16, distances=(4,), examples=32
  )
  found = evaluate(params, KEY)
  assert found['recall/passkey@4'] == 0 and found['recall/tracking@4'] < 0.2
  assert found['recall/random/passkey_tau'] == 0
  assert 0.3 < found['recall/tracking_last@4'] < 0.7


def jitter(model, task, **fields):
  return state_jitter.make(
    model,
    task,
    LAST,
    batch_size=2,
    **{'length': 70, 'copies': 2, 'count': 12} | fields,
  )


def test_a_reset_leaves_no_bit(task, good, leaking, tmp_path):
  model, params = good
  found = jitter(model, task, output_dir=str(tmp_path))(params, KEY)
  for which in ('', 'random/'):
    assert found[f'state_jitter/{which}changed'] == 0
    assert found[f'state_jitter/{which}leaked_terms'] == 0
    assert found[f'state_jitter/{which}changed_without_reset'] > 0.5
  written = (tmp_path / 'state_jitter.txt').read_text()
  assert written.count('bread is made') == 2
  # They are the trained weights' texts, not the control's.
  alone = jitter(model, task, output_dir=str(tmp_path), control=False)
  untrained = model.init(jax.random.key(0), None)
  for weights, same in ((untrained, False), (params, True)):
    alone(weights, KEY)
    text = (tmp_path / 'state_jitter.txt').read_text()
    assert (text == written) == same
  bad = jitter(leaking, task, control=False)(params, KEY)
  assert bad['state_jitter/changed'] > 0.5


def test_leaked_terms_are_counted(task, leaking):
  """A state of `a` and nothing else makes this model write more of it."""
  a = int(task.text.encode('a')[0])
  classes = task.spec.classes
  params = {
    'embed': jnp.zeros((classes, WIDTH)).at[a, 0].set(1.0),
    'head': jnp.zeros((WIDTH, classes)).at[0, a].set(9.0),
    'bias': jnp.zeros(classes),
  }
  fields = {'before': 'a', 'after': 'b', 'terms': ('a',), 'count': 12}
  found = jitter(leaking, task, control=False, **fields)(params, KEY)
  assert found['state_jitter/leaked_terms'] > 15


def test_forgetting_falls_and_a_reset_forgets(task, good, leaking):
  model, params = good
  fields = {'batch_size': 8, 'before': 40, 'bins': (1, 4, 30), 'passages': 8}
  found = forgetting.make(model, task, LAST, **fields)(params, KEY)
  assert found['forgetting/effect_reset'] < 1e-4
  assert found['forgetting/eta_reset'] > 0.999
  assert found['forgetting/eta@1'] == 0
  assert 0 < found['forgetting/effect@4'] < found['forgetting/effect@1']
  np.testing.assert_allclose(
    found['forgetting/eta@4'],
    1 - found['forgetting/effect@4'] / found['forgetting/effect@1'],
  )
  bad = forgetting.make(leaking, task, LAST, control=False, **fields)
  assert bad(params, KEY)['forgetting/effect_reset'] > 0.01


def test_poison_is_what_a_prefix_costs(task, good, leaking):
  model, params = good
  fields = {'prefix': 20, 'length': 16, 'passages': 6, 'candidates': 5}
  found = poison.make(model, task, LAST, batch_size=8, **fields)(params, KEY)
  cut = _reading.passages('poison', task, 'test', 12, 20)
  texts = [
    np.concatenate([[0], before, words])
    for before, words in zip(cut[9:], cut[3:6, :16], strict=True)
  ]
  loss_BT, _ = whole(model, params, texts)
  np.testing.assert_allclose(
    found['poison/neutral'], loss_BT[:, -16:].mean(), rtol=1e-4
  )
  # The worst on the first half, judged on the second.
  tried = []
  hostile = poison._hostile(5, 20, task.spec.classes, task.text.boundary)
  for prefix in hostile:
    rows = [np.concatenate([[0], prefix, words[:16]]) for words in cut[:6]]
    tried.append(whole(model, params, rows)[0][:, -16:].mean(1))
  attack, judge = np.array(tried).reshape(5, 2, 3).mean(2).T
  np.testing.assert_allclose(
    found['poison/worst'], judge[attack.argmax()], rtol=1e-4
  )
  np.testing.assert_allclose(found['poison/hostile'], judge.mean(), rtol=1e-4)
  assert found['poison/reset_difference'] < 1e-4
  np.testing.assert_allclose(
    found['poison/worst_reset'], found['poison/fresh'], rtol=1e-5
  )
  bad = poison.make(leaking, task, LAST, batch_size=8, control=False, **fields)(
    params, KEY
  )
  assert bad['poison/reset_difference'] > 0.01


def test_effective_rank_counts_directions():
  rng = np.random.default_rng(0)
  turn, _ = np.linalg.qr(rng.normal(size=(20, 20)))
  for rank in (1, 4, 9):
    low = np.zeros((2 * rank, 20))
    low[np.arange(rank), np.arange(rank)] = 1
    low[np.arange(rank, 2 * rank), np.arange(rank)] = -1
    np.testing.assert_allclose(utilisation.effective_rank(low), rank)
    moved = 3 * low @ turn + 5
    np.testing.assert_allclose(utilisation.effective_rank(moved), rank)
  assert utilisation.effective_rank(np.ones((7, 5))) == 0


def test_utilisation_is_of_states_of_the_text(task, good):
  model, params = good
  fields = {'batch_size': 1, 'passages': 3, 'length': 100}
  evaluate = utilisation.make(model, task, LAST, **fields)
  found = evaluate(params, KEY)
  assert 1 < found['utilisation/rank/state'] <= 5
  np.testing.assert_allclose(
    found['utilisation/state'], found['utilisation/rank/state'] / 5
  )
  # A state that nothing is written to.
  still = params | {'embed': jnp.zeros_like(params['embed'])}
  found = evaluate(still, KEY)
  assert found['utilisation/state'] == 0
  assert found['utilisation/random/state'] > 0


def test_identity_counts_words_of_a_person(task, good):
  model, params = good
  a = int(task.text.encode('a')[0])
  stuck = params | {'bias': params['bias'].at[a].set(99.0)}
  evaluate = identity.make(
    model,
    task,
    LAST,
    batch_size=8,
    persons={'knight': 'a' * 9, 'pirate': 'arr sea'},
    copies=2,
    count=9,
    noise=20,
  )
  found = evaluate(stuck, KEY)
  for kind in ('', '_locked', '_neutral'):
    assert found[f'identity/knight{kind}'] == 1
    assert found[f'identity/pirate{kind}'] == 0
    assert found[f'identity/mean{kind}'] == 0.5
  assert found['identity/name'] == 0 and found['identity/random/mean'] == 0
  words = 'the lord has a ship'.split()
  assert identity.share(words, {'ship', 'lord'}) == 0.4
  assert identity.share([], {'ship'}) == 0


def test_identity_is_sure_of_words_and_of_what_a_story_says(task, good):
  model, params = good
  evaluate = identity.make(
    model,
    task,
    LAST,
    batch_size=8,
    persons={'knight': 'sea arr arrow', 'pirate': 'sea'},
    copies=1,
    count=2,
    noise=20,
    control=False,
  )
  embed_VD, head_DV = (
    np.asarray(params[name], np.float64) for name in ('embed', 'head')
  )

  def next_token(tokens):
    """Log-probabilities by hand, from the boundary on."""
    state_D = sum(0.9**i * embed_VD[t] for i, t in enumerate(tokens[::-1]))
    logits_V = state_D @ head_DV
    return logits_V - np.log(np.exp(logits_V).sum())

  def begin(before, word):
    """The probability that a text goes on with a word."""
    tokens = [0, *task.text.encode(before)]
    log_p = 0.0
    for token in task.text.encode(word):
      log_p += next_token(tokens)[token]
      tokens.append(token)
    return np.exp(log_p)

  k, r = task.text.encode('kr')
  for sign, recalled in ((20.0, 1), (-20.0, 0)):  # no r in what is told
    bias = params['bias'].at[k].set(sign).at[r].set(-sign)
    found = evaluate(params | {'bias': bias}, KEY)
    assert found['identity/counter_fact'] == recalled
  found = evaluate(params, KEY)
  for kind, before in (('', 'i am a knight. '), ('_neutral', 'i am here. ')):
    # A text that begins with arrow begins with arr.
    wanted = begin(before, 'sea') + begin(before, 'arr')
    np.testing.assert_allclose(
      found[f'identity/knight_mass{kind}'], wanted, rtol=1e-4
    )
  log_p = next_token([0, *task.text.encode('i am a knight. ')])
  entropy = -(np.exp(log_p) * log_p).sum()
  np.testing.assert_allclose(
    found['identity/knight_entropy'], entropy, rtol=1e-5
  )
  for name in ('knight', 'pirate'):
    mass, entropy, ratio = (
      found[f'identity/{name}_{kind}'] for kind in ('mass', 'entropy', 'ratio')
    )
    np.testing.assert_allclose(ratio, mass / entropy)
  np.testing.assert_allclose(
    2 * found['identity/mean_mass'],
    found['identity/knight_mass'] + found['identity/pirate_mass'],
  )


@pytest.mark.parametrize(
  'module', [forgetting, identity, poison, recall, state_jitter, utilisation]
)
def test_a_probe_needs_a_language_model(module, task, good):
  model, _ = good
  name = module.__name__.rsplit('.', 1)[-1]
  with pytest.raises(UserError, match=f'{name} needs a language model'):
    module.make(model, parity.make(), LAST, batch_size=2)
  with pytest.raises(UserError, match=f'{name} needs a language model'):
    module.make(model._replace(decoder=None), task, LAST, batch_size=2)


@pytest.mark.parametrize(
  ('module', 'fields', 'message'),
  [
    (recall, {'examples': 0}, 'examples = 0'),
    (recall, {'symbols': 'abc'}, "got 243 of 5 among 'abc': make codes longer"),
    (recall, {'symbols': '00'}, "two different .*, got '00'"),
    (recall, {'kinds': ('poem',)}, 'recall.kinds must be among'),
    (recall, {'distances': (4, 2)}, r'rising numbers, got \(4, 2\)'),
    (recall, {'depths': (1.0,)}, r'depths must lie in \[0, 1\), got \(1.0,\)'),
    (forgetting, {'bins': (0, 4)}, r'bins must be rising numbers > 0'),
    (forgetting, {'split': 'train'}, "split must be among .*, got 'train'"),
    (forgetting, {'passages': 10**6}, 'ask for fewer or shorter passages'),
    (poison, {'passages': 1}, 'half of the passages = 0'),
    (state_jitter, {'before': ''}, 'must be texts, got none'),
    (state_jitter, {'after': '\N{SNOWMAN}'}, 'state_jitter.after: .*choose'),
    (utilisation, {'length': 0}, 'length = 0'),
    (identity, {'copies': 0}, 'copies = 0'),
    (identity, {'prompt': 'i am. '}, r"with \{person\}, got 'i am. '"),
  ],
)
def test_bad_arguments_are_named(module, fields, message, task, good):
  with pytest.raises(UserError, match=message):
    module.make(good[0], task, LAST, batch_size=2, **fields)
