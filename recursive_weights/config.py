"""Configs: the shared part, plain data and back, overrides.

A config file in `configs/` has `get_config(variant)` and states everything
that matters for its experiment; `base()` gives the fields of the house around
it. Values are numbers, strings, booleans, dicts and tuples.
"""

import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from recursive_weights.interfaces import UserError


def base() -> ConfigDict:
  """The fields that every training has, at their neutral values."""
  return ConfigDict(
    {
      'seed': 0,  # of parameters, data order, noise
      'num_seeds': 1,  # members seed, seed + 1, ... trained in one program
      # On the learning rate, one a member, which then share the seed; (): none.
      'rate_factors': (),
      'dtype': 'float32',  # of the computation; float32, bfloat16, float16
      'raw': False,  # evaluate the parameters themselves, not their average
      'resume_from': '',  # a run whose whole state this one begins with
      # Whose parameters this one begins with: a run's, or shipped ones by name.
      'init_from': '',
      'max_minutes': 0.0,  # save and leave after so long; 0: no limit
      'task': {'name': ''},
      'data_hash': {},  # of the task's data by split; `build` fills it in
      'model': {'name': ''},
      # Weights derived from weights. By rule name: source, target (tree
      # paths), adapter (to the target's shape: contraction or transpose; name
      # '' for none), operator T (name '' for the identity), iterate (the
      # target is the stack T(C), T(T(C)), ...).
      'recursive': {
        'rules': {},
        'lipschitz': {'weight': 0.0, 'bound': 1.0, 'scale': 0.01},
      },
      'objective': {'name': 'last'},
      # What a training step is: '' for gradients of the task's loss; a module
      # of `training` with its fields, such as 'alternating', for its own.
      'step': {'name': ''},
      'optimizer': {
        'name': 'adamw',
        'learning_rate': 1e-3,
        'b1': 0.9,
        'b2': 0.999,
        'eps': 1e-8,
        'clip_norm': 1.0,
        'moments': 'float32',  # dtype they are kept in; or bfloat16
        'schedule': {
          'name': 'cosine',
          'warmup_steps': 0,
          'final_fraction': 0.0,
        },
        'groups': {
          'all': {
            'pattern': '.*',
            'lr_scale': 1.0,
            'weight_decay': 0.0,
            'frozen': False,
            'sign': False,  # sign descent on the rows that a batch uses
          }
        },
      },
      'training': {
        'steps': 1000,
        'batch_size': 64,
        'accumulation': 1,  # micro-batches a step
        'steps_per_dispatch': 10,  # steps in one compiled program
        'ema_decay': 0.0,  # 0: no average
        'keep_carry': False,  # the model's carry passes from batch to batch
        # Deep supervision: rows keep their example until they halt, at most
        # `steps` training steps (0: off); see `recursion.slots`.
        'slots': {'steps': 0, 'explore': 0.1, 'empty_every': 0},
        'loss_scale': 1.0,  # for float16, whose gradients underflow
        'report_every': 100,
        'evaluate_every': 500,
      },
      'checkpoint': {'every': 500, 'keep': 2, 'best': '', 'mode': 'max'},
      # rules: fields of `training.stopping.defaults` that differ from it, for
      # stops and cuts of the learning rate with a named reason; {}: none.
      'early_stopping': {
        'metric': '',
        'mode': 'max',
        'patience': 10,
        'target': 0.0,  # where the metric is enough; 0: off
        'rules': {},
      },
      # Members trained apart agree on a centre at every n-th step (0: off); see
      # `training.federation`.
      'federation': {
        'every': 0,
        'topology': 'hub',
        'rate': 1.0,
        'temperature': 0.1,
        'batches': 1,  # of validation rows, evenly spaced over all domains
      },
      'devices': {'strategy': 'data', 'model_parallel': 1},
      # Evaluators by name with their arguments, and when they run. Without a
      # `batch_size` of its own one takes the rows of a micro-batch.
      'evaluators': {'during': {}, 'after': {}},
    }
  )


def member_seeds(data: dict[str, Any]) -> list[int]:
  """The seed of every member of a run."""
  apart = not data['rate_factors']
  return [data['seed'] + apart * i for i in range(max(data['num_seeds'], 0))]


def to_data(config: ConfigDict) -> dict[str, Any]:
  """Plain JSON data: dicts, lists, numbers, strings."""
  return json.loads(config.to_json())


def from_data(data: dict[str, Any]) -> ConfigDict:
  """The config that `to_data` made `data` of."""
  return ConfigDict(tuples(data))


def complete(data: dict[str, Any]) -> dict[str, Any]:
  """A stored config with the fields of the house that it is older than.

  Fields that a config lacks are at their neutral values, at which the program
  is the one that the config was made with. Stopping rules that are no more are
  left out: `collapsed` judges heads where a median half-life was judged.
  """
  house = to_data(base())
  data = {**house, **data}
  house_parts = 'optimizer training checkpoint early_stopping devices'
  for name in house_parts.split():
    data[name] = house[name] | data.get(name, {})
  rules = {**data['early_stopping']['rules']}
  for name in ('half_life_least', 'half_life_most'):
    rules.pop(name, None)
  data['early_stopping'] = data['early_stopping'] | {'rules': rules}
  neutral = house['optimizer']['groups']['all']
  groups = data['optimizer']['groups']
  groups = {name: neutral | fields for name, fields in groups.items()}
  data['optimizer'] = data['optimizer'] | {'groups': groups}
  return data


def tuples(value: Any) -> Any:
  """Lists to tuples all through: JSON has no tuples."""
  if isinstance(value, dict):
    return {k: tuples(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return tuple(tuples(v) for v in value)
  return value


def variants(text: str | None, known: tuple[str, ...]) -> set[str]:
  """The names in 'a,b'; an unknown one is an error that lists the known."""
  names = {name.strip() for name in (text or '').split(',')} - {''}
  unknown = sorted(names - set(known))
  if unknown:
    raise UserError(
      f'unknown variant {", ".join(unknown)}: choose among {", ".join(known)}'
    )
  return names


def one(chosen: set[str], names: Iterable[str]) -> str:
  """The chosen one of variants that exclude each other, '' for none."""
  found = sorted(chosen & set(names))
  if len(found) > 1:
    raise UserError(
      f'choose one of {", ".join(found)}: they exclude each other'
    )
  return found[0] if found else ''
