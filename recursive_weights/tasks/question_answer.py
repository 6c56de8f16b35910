"""Which answer does a question ask for? Clusters of questions, one answer each.

The classes are the answers: a model that gives a score to every answer of the
set is judged by where the right one stands.
"""

import hashlib
import typing
import zlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_weights import interfaces
from recursive_weights.basis.methods import ranks
from recursive_weights.interfaces import UserError
from recursive_weights.tasks import _planted, _question_files, _splits

Encoder = Literal['minilm', 'hash', 'stored']
_PARTS = ('train', 'validation', 'test')


class Data(NamedTuple):
  """Embeddings, and which rows of `q_BD` and `member_B` a split has.

  questions, answers: what they are of. Hashed in place of embeddings, whose
  last bits differ from machine to machine.
  """

  q_BD: np.ndarray
  member_B: np.ndarray
  a_EV: np.ndarray
  rows: dict[str, np.ndarray]
  questions: list[str]
  answers: list[str]


def make(
  *,
  seed: int = 0,
  path: str = '',
  where: tuple[str, ...] = (),
  limit: int = 0,
  question: str = 'questions',
  answer: str = 'answer',
  cluster: str = '',
  test: str = 'test_questions',
  split: str = 'split',
  test_split: str = 'test',
  train_questions: int = 0,
  validation_questions: int = 5,
  transfer: bool = False,
  split_seed: int = 0,
  encoder: Encoder = 'minilm',
  folder: str = '',
  cache: str = '',
  members: int = 120,
  width: int = 16,
  rank: int = 3,
  noise: float = 0.1,
) -> interfaces.Task:
  """Retrieve the answer of a question.

  Inputs are float32 `[B, D]`, embeddings of questions; targets int32 `[B]`, the
  number of the answer; `Task.answers` has the answers' embeddings `[E, D]`.

  Args:
    seed: order of the training questions.
    path: .json, .jsonl or .csv; '' for questions and answers without words,
      whose clusters' weights share a basis by construction (`planted`).
    where: `(field, value)` of the rows to take; () for all. This, `limit`, the
      fields' names, `transfer`, `encoder` and `folder` need a file.
    limit: most clusters to take, the first ones; 0 for all.
    question: field with a question, or a list of them.
    answer: field with the answer's text.
    cluster: field by which rows are one cluster; '' for the answer's text.
      Where it is `answer` itself, `_` in it is read as a space.
    test: field with a list of questions held out; '' for none.
    split: field that says train, val or `test_split` of a row, where there is
      one; rows of other splits are left out.
    test_split: its value for test.
    train_questions: most questions of a cluster to train on; 0 for all.
    validation_questions: most of the others for validation, a cluster, where
      the file has none of its own.
    transfer: clusters are held out, not questions: of each cluster all
      questions are in one split (half of the clusters train, a fifth
      validation), and every answer is a candidate.
    split_seed: which questions or clusters train and which validate; those for
      test are always the same. Where nothing tells them they are a quarter of
      each cluster's.
    encoder: 'minilm'; 'hash' of words and three letters, which needs no
      weights; 'stored' in the file.
    folder, cache: see `models.sentence_encoder.embed`.
    members, width, rank, noise: of the planted set.

  Raises:
    UserError: a file or field is missing or wrong, a cluster has no question,
      embeddings of two dimensions or not finite, a number out of range; what is
      said of a file without a path.
  """
  _splits.check_seed(seed)
  for name, x in (
    ('limit', limit),
    ('train_questions', train_questions),
    ('validation_questions', validation_questions),
    ('split_seed', split_seed),
  ):
    if x < 0:
      raise UserError(f'{name} must be >= 0, got {x}')
  if encoder not in typing.get_args(Encoder):
    raise UserError(
      f"encoder must be 'minilm', 'hash' or 'stored', got {encoder!r}"
    )
  limits = train_questions, validation_questions
  if path:
    fields = _question_files.Fields(
      question, answer, cluster, test, split, test_split
    )
    clusters = _question_files.read(path, fields, where, encoder == 'stored')
    clusters = clusters[: limit or None]
    data = _from_clusters(
      clusters, limits, transfer, split_seed, encoder, folder, cache
    )
  else:
    of_a_file = {
      'where': tuple(where),
      'limit': limit,
      'question': question,
      'answer': answer,
      'cluster': cluster,
      'test': test,
      'split': split,
      'test_split': test_split,
      'transfer': transfer,
      'encoder': encoder,
      'folder': folder,
    }
    default = make.__kwdefaults__ or {}
    if given := [name for name, x in of_a_file.items() if x != default[name]]:
      raise UserError(
        f'{", ".join(given)} must be unset without a file: the planted set has '
        'no rows to choose and no text; give path'
      )
    data = planted(members, width, rank, noise, limits, split_seed)
  return _task(data, seed, stored=encoder == 'stored')


def planted(
  members: int,
  width: int,
  rank: int,
  noise: float,
  limits: tuple[int, int] = (0, 5),
  split_seed: int = 0,
) -> Data:
  """Clusters around unit vectors m_i, `a_i = m_i W_i / |m_i W_i|`.

  `W_i = Σ_k c_ik O_k` with random orthogonal O_k (`_planted.planted`), and a
  question is `m_i + noise g / √D`, of norm 1, g standard normal. Of 20
  questions a cluster 10 may train, 5 validate, 5 test.
  """
  if members < 2 or width < 1 or rank < 1 or noise < 0:
    raise UserError(
      'members must be > 1, width and rank > 0, noise >= 0, got '
      f'{members}, {width}, {rank}, {noise}'
    )
  truth = _planted.planted(0, members=members, width=width, rank=rank, test=1)
  draw = _splits.generator(0, 1)
  m_ED = _unit(draw.normal(size=(members, width)))
  noise_ETD = draw.normal(size=(members, 20, width)) * noise / width**0.5
  q_ETD = _unit(m_ED[:, None] + noise_ETD)
  a_EV = _unit(np.einsum('ed,edv->ev', m_ED, truth.w_EDV))
  parts = {
    'train': [list(range(20 * i, 20 * i + 15)) for i in range(members)],
    'validation': [[] for _ in range(members)],
    'test': [list(range(20 * i + 15, 20 * i + 20)) for i in range(members)],
  }
  limits = min(limits[0] or 10, 10), limits[1]
  return Data(
    q_ETD.reshape(-1, width).astype(np.float32),
    np.repeat(np.arange(members, dtype=np.int32), 20),
    a_EV.astype(np.float32),
    _choose(parts, limits, split_seed),
    [str(i) for i in range(20 * members)],
    [f'{i} of {members}, {width}, {rank}, {noise}' for i in range(members)],
  )


def hashed(texts: list[str], width: int = 384) -> np.ndarray:
  """Unit vectors of signed counts of words and of three letters, `[B, D]`.

  Source: K. Weinberger et al., Feature hashing, 2009.
  """
  out_BD = np.zeros((len(texts), width))
  for row, text in enumerate(texts):
    for word in text.lower().split():
      marked = f'<{word}>'
      parts = [marked] + [marked[i : i + 3] for i in range(len(marked) - 2)]
      for part in parts:
        # Python's own hash changes from process to process.
        number = zlib.crc32(part.encode())
        out_BD[row, number // 2 % width] += 1 - 2 * (number % 2)
  return _unit(out_BD + 1e-9).astype(np.float32)


def _from_clusters(
  clusters, limits, transfer, split_seed, encoder, folder, cache
):
  members, questions, vectors = [], [], []
  parts = {part: [[] for _ in clusters] for part in _PARTS}
  for index, one in enumerate(clusters):
    for part in _PARTS:
      some = one.questions[part]
      first = len(questions)
      parts[part][index] = list(range(first, first + len(some)))
      questions += some
      members += [index] * len(some)
      vectors += one.vectors.get(part, [])
  answers = [one.answer for one in clusters]
  names = [one.name for one in clusters]
  if encoder == 'stored':
    q_BD = _question_files.matrix(vectors, 'questions')
    a_EV = _question_files.matrix(
      [one.vectors['answer'] for one in clusters], 'answers'
    )
    if q_BD.shape[1] != a_EV.shape[1]:
      raise UserError(
        'embeddings must have one dimension, got questions of '
        f'{q_BD.shape[1]} and answers of {a_EV.shape[1]}'
      )
  else:
    x_BD = _encode([*answers, *questions], encoder, folder, cache)
    a_EV, q_BD = x_BD[: len(answers)], x_BD[len(answers) :]
  if transfer:
    rows = _choose_clusters(parts, split_seed)
  else:
    if empty := [
      n for n, x in zip(names, parts['train'], strict=True) if not x
    ]:
      raise UserError(
        f'every cluster must have a question to train on, got none in '
        f'{len(empty)}, such as {empty[0][:60]!r}; leave them out or set '
        'transfer'
      )
    if not any(parts['test']):
      parts = _hold_out(parts)
    rows = _choose(parts, limits, split_seed)
  if encoder == 'stored':
    questions, answers = map(str, vectors), [str(x.tolist()) for x in a_EV]
  return Data(
    q_BD, np.array(members, np.int32), a_EV, rows, list(questions), answers
  )


def _encode(texts, encoder, folder, cache):
  if encoder == 'hash':
    return hashed(texts)
  from recursive_weights.models import sentence_encoder

  return sentence_encoder.embed(texts, folder=folder, cache=cache)


def _choose(parts, limits, split_seed):
  """Rows by split: of each cluster its first questions in a seeded order."""
  train, validation = [], []
  own = any(parts['validation'])
  for index, rows in enumerate(parts['train']):
    order = _splits.generator(split_seed, 2, index).permutation(rows).tolist()
    cut = limits[0] or len(order)
    train += order[:cut]
    # The last ones, so that they are the same for any number to train on.
    spare = order[cut:]
    left = parts['validation'][index] if own else spare
    validation += left[max(len(left) - limits[1], 0) :]
  test = [row for rows in parts['test'] for row in rows]
  found = {'train': train, 'validation': validation, 'test': test}
  return {part: np.array(rows, np.int64) for part, rows in found.items()}


def _choose_clusters(parts, split_seed):
  """Rows by split: of whole clusters. Those for test are the same always."""
  size = len(parts['train'])
  fixed = _splits.generator(0, 3).permutation(size)
  cut = max(size * 3 // 10, 1)
  order = _splits.generator(split_seed, 3, 1).permutation(fixed[cut:])
  train = size // 2
  chosen = {
    'train': order[:train],
    'validation': order[train:],
    'test': fixed[:cut],
  }
  return {
    part: np.array(
      [row for i in sorted(own) for x in _PARTS for row in parts[x][i]],
      np.int64,
    )
    for part, own in chosen.items()
  }


def _hold_out(parts):
  """A quarter of each cluster's questions for test, the same always."""
  train, test = [], []
  for index, rows in enumerate(parts['train']):
    order = _splits.generator(0, 4, index).permutation(rows).tolist()
    cut = len(order) - max(len(order) // 4, min(len(order) - 1, 1))
    train.append(order[:cut])
    test.append(order[cut:])
  return parts | {'train': train, 'test': test}


def _task(data: Data, seed: int, stored: bool) -> interfaces.Task:
  sizes: dict[str, int | None] = {p: len(data.rows[p]) for p in _PARTS}

  def batch(split, index, size):
    _splits.check(split)
    if split == 'train':
      place_B = _splits.without_end(seed, sizes[split], index, size)
      weight_B = np.ones(size, np.float32)
    else:
      place_B, weight_B = _splits.in_order(sizes[split], index, size)
    rows_B = data.rows[split][place_B]
    return {
      'inputs': data.q_BD[rows_B],
      'targets': data.member_B[rows_B],
      'weight': weight_B,
    }

  return interfaces.Task(
    spec=interfaces.Spec(
      inputs=jax.ShapeDtypeStruct(data.q_BD.shape[1:], jnp.float32),
      answer=(),
      classes=len(data.a_EV),
      sizes=sizes,
    ),
    batch=batch,
    augment=lambda key, batch: batch,
    loss=loss,
    data_hash={part: _digest(data, part, stored) for part in _PARTS},
    answers=data.a_EV,
  )


def loss(answer, batch):
  """Cross-entropy of scores `[B, E]`; metrics: recall_1, recall_5, mrr."""
  logits_BE = answer.astype(jnp.float32)
  targets_B = batch['targets']
  loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BE, targets_B)
  rank_B = ranks(logits_BE, targets_B)
  return loss_B, {
    'recall_1': (rank_B <= 1).astype(jnp.float32),
    'recall_5': (rank_B <= 5).astype(jnp.float32),
    'mrr': 1 / rank_B.astype(jnp.float32),
  }


def _digest(data, part, stored):
  """Of texts, and of embeddings where they came with them."""
  rows = data.rows[part]
  texts = [data.questions[row] for row in rows]
  content = texts, data.member_B[rows].tolist(), data.answers
  digest = hashlib.sha256(repr(content).encode())
  if stored:
    for x in (data.q_BD[rows], data.a_EV):
      digest.update(np.ascontiguousarray(x, np.float32).tobytes())
  return digest.hexdigest()


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
