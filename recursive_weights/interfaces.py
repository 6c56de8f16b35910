"""The contracts between the rooms: NamedTuples of pure functions.

Nothing here computes. A contract is closed over by the functions that use it;
it is never an argument of a jitted function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Tree = Any  # a pytree of arrays
Batch = dict[str, Any]
Metrics = dict[str, Array]


class UserError(Exception):
  """A mistake of the user: the message names value, rule and remedy.

  Programs print the message without a traceback and exit with code 2.
  """


class Operator(NamedTuple):
  """A learned map T from a base weight to a derived one, `derived = T(base)`.

  init: `(key, base) -> theta`, parameters of T for a base of this shape.
  apply: `(theta, base) -> derived`. `base` is an array or a tree of arrays;
    `jax.eval_shape` tells the derived shape.
  parts: of a chain, its operators in order, whose parameters are `theta['0']`,
    `theta['1']`, ...; else ().
  """

  init: Callable[[Array, Tree], Tree]
  apply: Callable[[Tree, Tree], Tree]
  parts: tuple['Operator', ...] = ()


class Recursion(NamedTuple):
  """A cell that is applied again to its own state (recursion over depth).

  prepare: `params -> weights`: everything that depends on no input, done once
    per forward pass (products of weights, masks), so never inside the scan.
  encode: `(weights, inputs, key) -> context`: what depends on the input but
    not on the step (features, keys and values). Batch first in every leaf.
  start: `(weights, context) -> state`: the state before the first step. Batch
    first in every leaf, so finished rows can be taken out.
  step: `(weights, context, state, key) -> (state, outputs)`. `outputs` is a
    flat dict with the batch first; `unroll` adds the step axis S before it.

  `key=None` means deterministic.
  """

  prepare: Callable[[Tree], Tree]
  encode: Callable[[Tree, Any, Array | None], Tree]
  start: Callable[[Tree, Tree], Tree]
  step: Callable[[Tree, Tree, Tree, Array | None], tuple[Tree, dict]]


class Model(NamedTuple):
  """An architecture.

  init: `(key, inputs) -> params`; `inputs` is one batch's inputs or their
    shapes (`jax.ShapeDtypeStruct`).
  carry: `(params, batch_size) -> carry`: what passes from batch to batch; `{}`
    for a model without memory. Every leaf has the batch as its first axis, so
    that a halted slot or a shard is one `where` or one spec. Learned initial
    states enter inside `apply`, else they get no gradient.
  apply: `(params, carry, inputs, *, key, train) -> (outputs, carry)`.
    `outputs` is a flat dict; a recursion keeps its step axis S first;
    `outputs['penalties']`, where present, is a dict of scalars that are
    already weighted, which the training step adds to the loss and logs.
    `key=None` means deterministic.
  recursion: the cell behind `apply` where the model is a recursion over depth,
    so that evaluators can run it step by step; else None. It takes the same
    `params` as `apply`.
  rules: the `derivation.tree.Rule`s by which weights derive from the stored
    ones in `params`; () where none do.
  decoder: of a causal language model, for generation; else None. It takes
    derived weights, `derivation.tree.derive(rules, params)`, so that a text
    derives them once, not once a token.
  tables: `((parameter, input), ...)`: tables `[rows, ...]` at the top of
    `params`, of which `apply` takes the row that an input (int32 `[B]`) names
    for each example, and nothing else.
  """

  init: Callable[[Array, Any], Tree]
  carry: Callable[[Tree, int], Tree]
  apply: Callable[..., tuple[dict, Tree]]
  recursion: Recursion | None = None
  rules: tuple = ()
  decoder: 'Decoder | None' = None
  tables: tuple[tuple[str, str], ...] = ()


class Spec(NamedTuple):
  """What a task asks for.

  inputs: shape and dtype of one example's inputs, without the batch axis; a
    dict of them where there are several (`tokens` and `puzzle`).
  answer: shape of one example's answer without its class axis; `()` where an
    example has one label.
  classes: number of classes V; a model's logits are `[B, *answer, V]`.
  sizes: number of examples by split; None where examples are generated without
    end.
  phases: `((first step, {field: value}), ...)` where lengths of training
    batches change with the step, the first of them at step 0; `()` for none.
  puzzles: number of puzzle identities, where inputs are `{'tokens', 'puzzle'}`
    and name each row's (int32 `[B]`); else 0.
  vocabulary: number of kinds of input tokens; 0 where there are no more than
    classes, and where inputs are no tokens.
  domains: names of the domains that texts are of, where inputs have a `domain`
    (int32 `[B]`) that numbers each row's; else ().
  """

  inputs: Tree
  answer: tuple[int, ...]
  classes: int
  sizes: dict[str, int | None]
  phases: tuple = ()
  puzzles: int = 0
  vocabulary: int = 0
  domains: tuple[str, ...] = ()


class Text(NamedTuple):
  """How tokens stand for text.

  encode: `str -> int32 [T]`; raises `UserError` where a character has no token.
  decode: `int [T] -> str`.
  boundary: the token that stands before every document, so after one too.
  unit: what one token is, such as `character`; loss is in nats a unit.
  """

  encode: Callable[[str], np.ndarray]
  decode: Callable[[np.ndarray], str]
  boundary: int
  unit: str


class Task(NamedTuple):
  """A problem: data, augmentation, loss and metrics, without any model.

  spec: see `Spec`.
  batch: `(split, index, size) -> {'inputs', 'targets', 'weight', ...}`, NumPy
    arrays, a pure function of (seed, split, index, size). Splits are 'train',
    'validation' and 'test'. Training batches are full and follow a seeded
    order without end. The others cover a finite split once, in a fixed order,
    in `ceil(size / batch size)` batches; the last one is padded with rows of
    weight 0, which no metric counts. `weight` is float32 `[B]`: 1 for a whole
    row, a share where less of a row is there, so that means are over all that
    is there; 0 where no target is known.
  augment: `(key, batch) -> batch`, traced inside the training step.
  loss: `(answer, batch) -> (loss_B, metrics_B)`: judges one answer per example
    (logits `[B, *answer, V]`) in float32.
  picture: `example -> image`, how a person sees one row of a batch: `[h, w]`,
    larger values more ink, or `[h, w, 3]`, colours in [0, 1]. The T inputs lie
    on it in reading order of a grid of its proportions. None where they do not.
  drawing: `(example, answer) -> image`, how a person sees an answer (classes
    `[*answer]`) to one row of a batch, mistakes marked; `[h, w, 3]`, colours in
    [0, 1]. None where answers are no picture.
  data_hash: SHA-256 by split, of the files or of what was generated, so that
    a run and its results can name their data; None where they have no end.
  answers: embeddings of the answers `[classes, D]`, where an answer is to be
    retrieved; else None. Models with the parameter `answers` are given them.
  text: how a person reads and writes tokens; None where they are no text.
  planted: `{'coefficients' [E, R], 'basis' [R, D, V]}` of the members' weights
    that made the answers, float32; None where that is not known.
  """

  spec: Spec
  batch: Callable[[str, int, int], dict[str, np.ndarray]]
  augment: Callable[[Array, Batch], Batch]
  loss: Callable[[Array, Batch], tuple[Array, Metrics]]
  picture: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None
  drawing: Callable[[dict, np.ndarray], np.ndarray] | None = None
  data_hash: dict[str, str] | None = None
  answers: np.ndarray | None = None
  text: Text | None = None
  planted: dict[str, np.ndarray] | None = None


class Objective(NamedTuple):
  """Which steps of a recursion are trained, and which one answers.

  score: `(outputs, loss, batch) -> (scalar, metrics)`; `loss` is `Task.loss`,
    and rows count by `batch['weight']`. Metrics are scalars.
  answer: `outputs -> logits [B, *answer, V]`: the answer that evaluators judge.
  """

  score: Callable[[dict, Callable, Batch], tuple[Array, Metrics]]
  answer: Callable[[dict], Array]


# `(params, key) -> {name: float}`, given the EMA of the parameters unless the
# config says raw.
Evaluator = Callable[[Tree, Array], dict[str, float]]


class Slots(NamedTuple):
  """Deep supervision: rows that keep their example until they halt.

  start: `(batch, carry, metrics) -> slots`: the slots before the first step,
    all of them halted. The arguments tell shapes: a batch, a model's carry and
    the metrics of rows by name, `[B]`. Every leaf has the batch first; slots
    live in the training state's `carry`, so checkpoints hold them.
  refill: `(slots, batch, fresh_carry, step) -> slots`: halted slots take the
    new example offered in `batch` and a fresh carry; the others keep both. The
    rows to train on are `slots['batch']`, with `slots['carry']`.
  explore: `(key, size) -> least_B`: steps before which a row may not halt now.
  advance: `(slots, carry, halt_B, least_B, metrics) -> slots`: after the
    forward pass, with the model's new carry, its halting logits, what `explore`
    drew and the metrics of rows.
  report: `slots -> {name: value_B, ...}, weight_B`: the metrics of each slot's
    latest finished example, of weight 0 where it has finished none yet.
  """

  start: Callable[[Batch, Tree, Metrics], Tree]
  refill: Callable[[Tree, Batch, Tree, Array], Tree]
  explore: Callable[[Array, int], Array]
  advance: Callable[[Tree, Tree, Array, Array, Metrics], Tree]
  report: Callable[[Tree], tuple[Metrics, Array]]


class Decoder(NamedTuple):
  """A causal language model, for generation, refinement and sessions.

  embed: `(params, tokens_BT) -> x_BTD`.
  blocks: `(params, cache, x_BTD, *, resets_BT=None, tap=None, key=None) ->
    (x_BTD, pending)`: a chunk of T tokens after those that the cache has seen.
    Where `resets_BT` (bool) is True a document begins: recurrent states, token
    shifts and windows of convolutions become the learned initial ones there,
    and attention sees nothing before it. `tap(layer, x_BTD, part) -> x_BTD`
    sees and may change hidden states after each layer (part '') and what a
    recurrence inside it puts out (part: its path in `cache['recurrent']`); None
    is the plain program. `key` is for dropout; None is deterministic. `pending`
    is what `commit` needs; what of it is unused costs nothing under jit.
  head: `(params, x_BTD) -> logits_BTV`, float32.
  cache: `(params, batch_size) -> {'recurrent', 'attention', 'position'}`, the
    batch first in every leaf. Rows are at the start of a document; learned
    initial states enter inside `blocks`, so that they get gradients.
  commit: `(cache, pending, length_B=None) -> cache`: the cache after the first
    `length_B` tokens (int32 `[B]`) of the chunk, without running it again;
    None keeps all of it. A row of length 0 stays as it was, bit for bit.
  init: `key -> params`; None where weights are only loaded.
  """

  embed: Callable[[Tree, Array], Array]
  blocks: Callable[..., tuple[Array, Tree]]
  head: Callable[[Tree, Array], Array]
  cache: Callable[[Tree, int], Tree]
  commit: Callable[..., Tree]
  init: Callable[[Array], Tree] | None = None
