"""Every variant of both specialist configs builds; what a benchmark refuses."""

import json

import jax
import numpy as np
import pytest

from configs import specialists_ctm, specialists_lm
from recursive_weights import build, config
from recursive_weights.benchmarks import specialists as benchmark
from recursive_weights.derivation import report
from recursive_weights.interfaces import UserError


@pytest.mark.parametrize('module', [specialists_lm, specialists_ctm])
@pytest.mark.parametrize(
  'variant', ['curves', *specialists_lm.SCHEMES, *specialists_lm.FEDERATIONS]
)
def test_variants_build(module, variant):
  """Without compiling: shapes alone, and every optimizer group meets some."""
  data = config.to_data(module.get_config(f'smoke,{variant}'))
  experiment = build.build(data)
  params = jax.eval_shape(experiment.init, np.int32(0)).params
  copies = variant in specialists_lm.FEDERATIONS
  assert set(params) == {
    'independent': {'members'},
    'centre': {'centre'},
  }.get(variant, {'centres' if copies else 'centre', 'members'})
  for part in ('members', 'centres'):
    assert {x.shape[0] for x in jax.tree.leaves(params.get(part, {}))} <= {7}
  assert bool(experiment.every) == (variant in ('hub', 'ring'))


def test_adapters_are_as_large_as_operators():
  sizes = [
    report.count(
      build.parameter_shapes(config.to_data(specialists_lm.get_config(variant)))
    )
    for variant in ('derived', 'low_rank')
  ]
  assert sizes == [109_696, 109_696]


@pytest.mark.parametrize(
  ('variant', 'fields', 'domain', 'message'),
  [
    ('derived', {'num_seeds': 2}, '', 'got num_seeds = 2: train every seed'),
    ('independent', {}, 'chemistry', "got scheme 'independent': leave"),
    ('hub', {}, 'chemistry', "got scheme 'residual hub': leave"),
    ('derived', {'model': {'name': 'ctm'}}, '', "must be .*, got 'ctm'"),
    ('derived', {}, 'LOGOS', "trained on, LOGOS, PHYSIS.*, got 'LOGOS'"),
    # The file that LOGOS is read from.
    ('derived', {}, 'statistics', "trained on, LOGOS.*, got 'statistics'"),
  ],
)
def test_runs_that_cannot_be_measured_are_refused(
  tmp_path, variant, fields, domain, message
):
  data = config.to_data(specialists_lm.get_config(variant))
  (tmp_path / 'config.json').write_text(json.dumps(data))
  with pytest.raises(UserError, match=r'but has no results.json: train it'):
    benchmark.check(tmp_path, '')
  (tmp_path / 'results.json').write_text('{}')
  benchmark.check(tmp_path, '')
  (tmp_path / 'config.json').write_text(json.dumps(data | fields))
  with pytest.raises(UserError, match=message):
    benchmark.check(tmp_path, domain)
