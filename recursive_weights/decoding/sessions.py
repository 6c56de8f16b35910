"""The state of texts as a file, which outlives the program that made it.

A session file is an .npz archive without pickles: every array of a `Stream` by
tree path, the tokens read so far if they were given, and `about`, JSON with the
version of the format, a fingerprint of the weights, and the arrays' dtypes. It
holds no code and no weights, and may be carried to another machine.

A state means nothing to other weights than those that made it, so `load`
refuses it there. `rebuild` moves a session to other weights, or to another
model with the same tokens, by reading its text again.
"""

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_weights.decoding import generate
from recursive_weights.decoding.generate import Stream
from recursive_weights.interfaces import Decoder, Tree, UserError

VERSION = 1

# By version, what makes `(arrays, about)` of the next one. An entry is added
# with every change of the format, so that old sessions can still be read.
UPGRADES: dict[int, Callable[[dict, dict], tuple[dict, dict]]] = {}


def fingerprint(params: Tree) -> str:
  """SHA-256 of the names, shapes, dtypes and values of weights."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    digest.update(repr((_name(path), str(array.dtype), array.shape)).encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def save(
  path: str | pathlib.Path,
  stream: Stream,
  *,
  weights: str,
  texts: Sequence[np.ndarray] = (),
) -> None:
  """Writes a session, whole or not at all.

  Args:
    path: of the file.
    stream: where the texts stand.
    weights: `fingerprint` of the parameters that read them.
    texts: every token read so far, by row; () leaves them out, and the session
      then belongs to these weights for good.

  Raises:
    ValueError: the texts are not those that the stream has read.
  """
  lengths = [len(text) for text in texts]
  if texts and lengths != np.asarray(stream.position_B).tolist():
    raise ValueError(
      f'texts must have as many tokens as were read, '
      f'{np.asarray(stream.position_B).tolist()}, got {lengths}'
    )
  arrays = {
    f'stream/{_name(place)}': np.asarray(leaf)
    for place, leaf in jax.tree_util.tree_leaves_with_path(stream._asdict())
  }
  for row, text in enumerate(texts):
    arrays[f'text/{row}'] = np.asarray(text, np.int32)
  about = {
    'version': VERSION,
    'weights': weights,
    'dtypes': {name: str(x.dtype) for name, x in arrays.items()},
  }
  # Files know no bfloat16, so arrays are bytes there, their dtypes in `about`.
  contents = {
    name: np.ascontiguousarray(x)[..., None].view(np.uint8)
    for name, x in arrays.items()
  }
  contents['about'] = np.frombuffer(json.dumps(about).encode(), np.uint8)
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  with part.open('wb') as file:
    np.savez(file, **contents)  # type: ignore[arg-type]
  os.replace(part, path)


def load(path: str | pathlib.Path, like: Stream, *, weights: str) -> Stream:
  """The stream of a session.

  Args:
    path: of the file.
    like: a stream of the same model and number of texts, or its shapes.
    weights: `fingerprint` of the parameters that are to go on with it.

  Raises:
    UserError: the session is damaged, of a newer version, of other weights or
      of another shape; the message says which.
  """
  arrays, about = _read(path)
  if about['weights'] != weights:
    raise UserError(
      f'{path}: the state must be of these weights, {weights[:12]}, got one of '
      f'{about["weights"][:12]}: read its text again by --rebuild (in Python, '
      '`sessions.rebuild`)'
    )
  wanted = jax.tree_util.tree_leaves_with_path(like._asdict())
  names = {f'stream/{_name(place)}' for place, _ in wanted}
  found = {name for name in arrays if name.startswith('stream/')}
  if names != found:
    odd = sorted(names ^ found)
    raise UserError(
      f'{path}: the state must be one of this model, which '
      f'{"has" if odd[0] in names else "has no"} {odd[0]}'
    )

  def leaf(place, shape):
    array = arrays[f'stream/{_name(place)}']
    if array.shape != shape.shape or array.dtype != shape.dtype:
      raise UserError(
        f'{path}: {_name(place)} must be {shape.dtype}{list(shape.shape)}, got '
        f'{array.dtype}{list(array.shape)}'
      )
    return jnp.asarray(array)

  return Stream(**jax.tree_util.tree_map_with_path(leaf, like._asdict()))


def texts(path: str | pathlib.Path) -> list[np.ndarray]:
  """Every token that the session has read, by row; [] where it kept none."""
  arrays, _ = _read(path)
  count = sum(name.startswith('text/') for name in arrays)
  return [arrays[f'text/{row}'] for row in range(count)]


def rebuild(
  path: str | pathlib.Path,
  decoder: Decoder,
  params: Tree,
  *,
  chunk: int = 64,
  boundary: int | None = None,
) -> Stream:
  """The session's texts as other weights, or another model, understand them.

  Seeds, positions and ends stay as they were. `chunk` and `boundary` are
  those of `generate.read`.

  Raises:
    UserError: the session is damaged, holds no text, or one whose tokens the
      model does not have.
  """
  rows = texts(path)
  if not rows:
    raise UserError(
      f'{path} must hold its text to be read again: begin another session (in '
      'Python, save it with `texts`)'
    )
  arrays, _ = _read(path)
  stream = generate.start(decoder, params, jnp.asarray(arrays['stream/seed_B']))
  classes = stream.logits_BV.shape[-1]
  largest = max((int(row.max()) for row in rows if len(row)), default=0)
  if largest >= classes:
    raise UserError(
      f'{path}: tokens must be < {classes}, got {largest}: its text is of '
      'another vocabulary than this model, so begin another session'
    )
  if any(len(row) for row in rows):
    width = max(len(row) for row in rows)
    tokens_BT = [np.pad(row, (0, width - len(row))) for row in rows]
    length_B = [len(row) for row in rows]
    stream = generate.read(
      decoder,
      params,
      stream,
      jnp.asarray(np.stack(tokens_BT), jnp.int32),
      jnp.asarray(length_B, jnp.int32),
      chunk=chunk,
      boundary=boundary,
    )
  return stream._replace(done_B=jnp.asarray(arrays['stream/done_B']))


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _read(path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Arrays by name and what the file says about them, in today's version."""
  try:
    with np.load(path, allow_pickle=False) as file:
      contents = {name: file[name] for name in file.files}
    about = json.loads(contents.pop('about').tobytes())
    arrays = {
      name: x.view(jnp.dtype(about['dtypes'][name]))[..., 0]
      for name, x in contents.items()
    }
    version = about['version']
  except FileNotFoundError as error:
    raise UserError(f'no session {str(path)!r}') from error
  except (PermissionError, IsADirectoryError) as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except (
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    zipfile.BadZipFile,
  ) as error:
    # Not what NumPy says of it: that is to load it as pickles, which run code.
    raise UserError(
      f'{path} is no session, or damaged: give a file that `save` or --session '
      'wrote, or begin another session'
    ) from error
  if version > VERSION:
    raise UserError(
      f'{path}: version must be <= {VERSION}, got {version}: update this '
      'program'
    )
  while version < VERSION:
    if version not in UPGRADES:
      raise UserError(
        f'{path}: version must be one of {sorted(UPGRADES)} or {VERSION}, got '
        f'{version}'
      )
    arrays, about = UPGRADES[version](arrays, about)
    version += 1
  return arrays, about
