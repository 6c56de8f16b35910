"""Ways to derive weights of a Continuous Thought Machine, by name.

A name here is a variant of each of its configs. W1 is 'nlm/w1' [M, F, D]; its
contraction over the memory axis has the shape of W2, 'nlm/w2' [O, H, D], and of
each hidden layer. The way up of a U-Net is derived from its way down.
"""

import ml_collections

from recursive_weights.interfaces import UserError

# T in W2 = T(contract(W1)).
OPERATORS = {
  'linear': {'bottleneck': 32},
  'spectral': {'kind': 'mlp', 'rank': 8},
  'spectral_scale': {'kind': 'scale', 'rank': 8},
  'spectral_odd': {'kind': 'odd'},
  'residual': {'kind': 'low_rank', 'rank': 4},
  'residual_network': {'kind': 'network'},
  'power': {},
  'polynomial': {'degree': 3},
  'fourier': {'modes': 8},
  'flow': {'steps': 4},
  'spectral_residual': {'rank': 8, 'alpha': 0.7},
}
FILES = {
  'spectral_scale': 'spectral',
  'spectral_odd': 'spectral',
  'residual_network': 'residual',
}
RANKS = {'rank4': 4, 'rank8': 8, 'rank16': 16}
ALPHAS = {'alpha50': 0.5, 'alpha80': 0.8, 'alpha100': 1.0}

NAMES = (
  'independent',  # W2 stored
  'shared',  # W2 = contract(W1), no operator
  'frozen',  # W2 random, never trained
  *OPERATORS,
  'linear_contraction',  # weights of any sign in place of a softmax
  'mean_contraction',  # the document's, not normalised: W2 starts small
  *RANKS,  # of the operator
  *ALPHAS,  # at the start, of spectral_residual
)


def derive(
  config: ml_collections.ConfigDict, chosen: set[str], default: str
) -> None:
  """Sets `config.recursive.rules` (and groups) for the chosen variants."""
  operators = [name for name in OPERATORS if name in chosen]
  if len(operators) > 1:
    raise UserError(f'choose one operator, got {", ".join(operators)}')
  alone = sorted(chosen & {'independent', 'frozen', 'shared'})
  if len(alone) + len(operators) > 1:
    raise UserError(
      f'choose one of {", ".join(alone + operators)}: they exclude each other'
    )
  if 'frozen' in chosen:
    everything = config.optimizer.groups.all.copy_and_resolve_references()
    config.optimizer.groups = {
      'rest': everything.to_dict() | {'pattern': '^(?!nlm/w2$)'},
      'frozen': everything.to_dict() | {'pattern': '^nlm/w2$', 'frozen': True},
    }
  if chosen & {'frozen', 'independent'}:
    config.recursive.rules = {}
    return
  name = operators[0] if operators else default
  fields = {'name': FILES.get(name, name)} | OPERATORS[name]
  if 'shared' in chosen:
    fields = {'name': ''}
  for variant in sorted(chosen & set(RANKS)):
    fields['rank'] = RANKS[variant]
  for variant in sorted(chosen & set(ALPHAS)):
    fields['alpha'] = ALPHAS[variant]
  adapter = {
    'name': 'contraction',
    'kind': 'linear' if 'linear_contraction' in chosen else 'softmax',
    'normalised': 'mean_contraction' not in chosen,
  }

  def rule(source, target, adapter, iterate=False):
    return {
      'source': source,
      'target': target,
      'adapter': dict(adapter),
      'operator': dict(fields),
      'iterate': iterate,
    }

  rules = {'w2': rule('nlm/w1', 'nlm/w2', adapter)}
  if config.model.nlm.layers:
    # Deep: the hidden stack is T(C), T(T(C)), ... with one T.
    rules['hidden'] = rule('nlm/w1', 'nlm/hidden', adapter, iterate=True)
  for level in range(config.model.synapse_depth - 1):
    # A U-Net's way up from its way down.
    down, up = (f'synapse/{way}/level{level}' for way in ('down', 'up'))
    rules[f'up{level}'] = rule(
      f'{down}/linear/kernel', f'{up}/linear/kernel', {'name': 'transpose'}
    )
  config.recursive.rules = rules
