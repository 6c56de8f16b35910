"""Every member on every domain, and which member a text should be given to."""

import json
import pathlib

import jax
import numpy as np

from recursive_weights import interfaces
from recursive_weights.derivation import report
from recursive_weights.evaluators import _bootstrap, _centroids
from recursive_weights.interfaces import UserError
from recursive_weights.models import specialists


def make(
  model: interfaces.Model,
  task: interfaces.Task,
  objective: interfaces.Objective,
  *,
  batch_size: int,
  split: str = 'test',
  passage: int = 4,
  top_k: tuple[int, ...] = (1, 2, 3),
  known: int = 512,
  output_dir: str = '',
) -> interfaces.Evaluator:
  """Losses of all members on all domains' held-out rows, and routing.

  Rows are read afresh. A passage is `passage` rows in a row; a router sees the
  first half of it and is judged on the second, of which it saw nothing. With
  l_i the members' losses in nats on the first half, it gives member i

    p_i = exp(-l_i) / sum_j exp(-l_j)

  `centroid_words` and `centroid_trigrams` choose by `_centroids.shares` with
  `known` rows of training text instead: no model.

  Args:
    batch_size: rows of a batch.
    split: held-out split.
    passage: rows, even; divides a domain's rows.
    top_k: numbers of members that a router may name.
    known: rows of training text for the centroids, of all domains together.
    output_dir: `domains.json` is written there: the matrix member by domain,
      its standard errors over passages, the router's choices.

  Returns:
    An evaluator whose keys are, with D a domain,

      SPLIT/loss, SPLIT/loss/D       of members on their own domain
      SPLIT/all, SPLIT/all/D         mean over all members (of a column)
      SPLIT/margin                   all - loss, mean over domains
      SPLIT/margin_low               lower end of its 95 % interval
      SPLIT/least_margin             smallest over domains, in its standard
                                     errors over passages
      SPLIT/centre_loss[/D]          operators as they began, the mean of copies
      router/top@K, router/METHOD@K  share of passages whose domain is named
      router/loss                    second halves, by the member that is chosen
      router/own_loss                the same by the domain's own member
      router/mixture_loss            -ln sum_i p_i exp(-loss_i)
      parameters, parameters/member  stored in all, for one member more

  Raises:
    UserError: the task has no domains, or a number does not fit.
  """
  names = task.spec.domains
  if not names or task.text is None:
    raise UserError('domains needs a task of text with domains')
  if split not in task.spec.sizes or split == 'train':
    raise UserError(f'split must be validation or test, got {split!r}')
  total = task.spec.sizes[split] or 0
  if passage < 2 or passage % 2 or total // len(names) % passage:
    raise UserError(
      f'passage must be even and divide the {total // len(names)} rows of a '
      f'domain, got {passage}'
    )
  if not top_k or min(top_k) < 1 or max(top_k) > len(names):
    raise UserError(f'top_k must lie in [1, {len(names)}], got {top_k}')
  # A row's loss is a mean over these characters.
  length = int(np.prod(task.spec.answer, dtype=int))
  held = [
    task.batch(split, i, batch_size) for i in range(-(-total // batch_size))
  ]
  text = [
    task.text.decode(row) for batch in held for row in batch['inputs']['tokens']
  ][:total]
  told = _known(task, known)
  zero_E = np.zeros(len(names), int)

  @jax.jit
  def judge(params, batch):
    loss_EB = specialists.judge(
      model,
      params,
      batch['inputs'],
      lambda outputs: task.loss(objective.answer(outputs), batch)[0],
    )
    # The centre alone answers for all.
    return loss_EB if specialists.count(params) else loss_EB[zero_E]

  def losses(params):
    """`[E, domains, passages, rows]`, nats a character."""
    found = [judge(params, batch) for batch in held]
    loss_EN = np.concatenate(jax.device_get(found), 1)[:, :total]
    return loss_EN.reshape(len(loss_EN), len(names), -1, passage)

  def evaluate(params, key):
    loss_EDPR = losses(params).astype(np.float64)
    result, matrix = _matrix(loss_EDPR, names, split)
    if 'members' in params and ('centre' in params or 'centres' in params):
      start = jax.jit(lambda: model.init(key, held[0]['inputs']))()
      centre = specialists.select(specialists.at_start(params, start), 0)
      if 'centres' in params:
        mean = jax.tree.map(lambda x: x.mean(0)[None], params['centres'])
        centre = centre | {'centres': mean}
      loss_D = losses(centre)[0].mean((1, 2))
      result[f'{split}/centre_loss'] = float(loss_D.mean())
      result |= {
        f'{split}/centre_loss/{name}': float(loss)
        for name, loss in zip(names, loss_D, strict=True)
      }
    result |= _routed(loss_EDPR, length, top_k)
    result |= _by_centroids(text, told, passage, top_k)
    members = {k: x for k, x in params.items() if k in specialists.BY_MEMBER}
    result['parameters'] = float(report.count(params))
    result['parameters/member'] = report.count(members) / len(names)
    if output_dir and jax.process_index() == 0:
      folder = pathlib.Path(output_dir)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / 'domains.json').write_text(
        json.dumps({'domains': names, **matrix}, indent=1) + '\n'
      )
    return result

  return evaluate


def _matrix(loss_EDPR, names, split):
  """What the members lose on the domains, and the diagonal's advantage."""
  loss_EDP = loss_EDPR.mean(-1)
  own_DP = np.stack([loss_EDP[i, i] for i in range(len(names))])
  all_DP = loss_EDP.mean(0)
  margin_DP = all_DP - own_DP
  passages = margin_DP.shape[1]
  error_D = margin_DP.std(1, ddof=1) / np.sqrt(passages) if passages > 1 else 0
  spread_D = margin_DP.mean(1) / np.maximum(error_D, 1e-12)
  result = {
    f'{split}/loss': own_DP.mean(),
    f'{split}/all': all_DP.mean(),
    f'{split}/margin': margin_DP.mean(),
    f'{split}/margin_low': _bootstrap.interval(margin_DP.mean(0))[0],
    f'{split}/least_margin': spread_D.min(),
  }
  for i, name in enumerate(names):
    result[f'{split}/loss/{name}'] = own_DP[i].mean()
    result[f'{split}/all/{name}'] = all_DP[i].mean()
  matrix = {
    'loss': loss_EDP.mean(-1).round(4).tolist(),
    'margin': margin_DP.mean(1).round(5).tolist(),
    'margin_error': np.broadcast_to(error_D, len(names)).round(5).tolist(),
  }
  return {name: float(x) for name, x in result.items()}, matrix


def _routed(loss_EDPR, length, top_k):
  """Routing by the members' losses on the first half of a passage."""
  members, domains, passages, rows = loss_EDPR.shape
  half = rows // 2
  seen_EB, left_EB = (
    length * some.sum(-1).reshape(members, -1)
    for some in (loss_EDPR[..., :half], loss_EDPR[..., half:])
  )
  own_B = np.repeat(np.arange(domains), passages)
  member_EB, log_EB = map(np.asarray, specialists.route(seen_EB, members))
  ranked_EB = np.take_along_axis(left_EB, member_EB, 0)
  result = {
    'router/loss': ranked_EB[0],
    'router/own_loss': np.take_along_axis(left_EB, own_B[None], 0),
    'router/mixture_loss': -np.logaddexp.reduce(log_EB - ranked_EB),
  }
  # Likelihoods of the second half as a whole, then nats a character.
  result = {k: float(x.mean()) / (length * half) for k, x in result.items()}
  return result | {
    f'router/top@{k}': float((member_EB[:k] == own_B).any(0).mean())
    for k in top_k
  }


def _by_centroids(text, known, passage, top_k):
  """Routing of the first halves of passages by words and trigrams."""
  halves = [
    ''.join(text[i : i + passage // 2]) for i in range(0, len(text), passage)
  ]
  result = {}
  for kind in _centroids.FEATURES:
    share_BE = _centroids.shares(halves, known, kind)
    share_DPE = share_BE.reshape(len(known), -1, len(known))
    result |= {f'router/centroid_{kind}@{k}': _top(share_DPE, k) for k in top_k}
  return result


def _top(score_DPE, k):
  """Share of passages whose own domain is among the k best."""
  best_DPK = np.argsort(-score_DPE, axis=-1, kind='stable')[..., :k]
  own_D11 = np.arange(len(score_DPE))[:, None, None]
  return float((best_DPK == own_D11).any(-1).mean())


def _known(task, rows):
  """Training text by domain."""
  try:
    batch = task.batch('train', 0, rows)
  except UserError as error:
    raise UserError(f'domains.known = {rows}: {error}') from error
  found = [[] for _ in task.spec.domains]
  for domain, tokens_T in zip(
    batch['inputs']['domain'], batch['inputs']['tokens'], strict=True
  ):
    found[domain].append(task.text.decode(tokens_T))
  return found
