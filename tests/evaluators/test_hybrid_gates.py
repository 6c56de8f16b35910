"""Gates of real hybrids on real text: seeds that no bound was set on."""

import json

import jax
import numpy as np
import pytest

from configs import hybrid_lm
from recursive_weights import build, config
from recursive_weights.evaluators import state_gates
from recursive_weights.training.state import make_dispatch

STEPS, ROWS, AT_ONCE = 400, 8, 20
WIDTH, STATE = 48, 16
INNER = (
  2 * WIDTH
)  # of Mamba-2: z | x | B | C | dt, of which x, B, C are convolved


def experiment():
  made = hybrid_lm.get_config()
  made.model.update(layers=2, width=WIDTH, head_width=16, state_width=STATE)
  made.model.update(mix_rank=8, decay_rank=16)
  made.task.length = 64
  made.training.update(steps=STEPS, batch_size=ROWS)
  made.evaluators.update(during={}, after={})
  return build.build(config.to_data(made))


def edited(params, component, **changes):
  part = params['hybrid'][component]
  part = part | {name: f(part[name]) for name, f in changes.items()}
  return params | {'hybrid': params['hybrid'] | {component: part}}


def zero(x):
  return 0 * x


def never(x):
  """As a logarithm, of a decay of 1."""
  return 0 * x - 40


def written(value, *, first):
  """A convolution that gives the same in columns from `first` to B's end."""

  def change(conv):
    columns = slice(first, INNER + STATE)
    return {
      'kernel': conv['kernel'].at[..., columns].set(0.0),
      'bias': conv['bias'].at[..., columns].set(value),
    }

  return change


def frozen_time(params):
  return edited(params, 'time', decay=never, decay_up=zero, value=zero)


def frozen_ssm(params):
  def no_b(x):
    return x.at[..., INNER : INNER + STATE].set(0.0)

  return edited(
    params, 'ssm', a_log=never, conv=written(0.0, first=INNER), first=no_b
  )


def forgetful_time(params):
  """Half-life ln 2 / e^2, a tenth of a token."""
  return edited(params, 'time', decay=lambda x: 0 * x + 2, decay_up=zero)


def forgetful_ssm(params):
  return edited(params, 'ssm', a_log=lambda x: 0 * x + 8)


def some_forgetful_time(params):
  """One head of three, half-life ln 2 / e^3."""
  return edited(
    params,
    'time',
    decay=lambda x: x.at[..., :STATE].set(3.0),
    decay_up=lambda x: x.at[..., :STATE].set(0.0),
  )


def some_forgetful_ssm(params):
  """Two heads of six."""
  return edited(params, 'ssm', a_log=lambda x: x.at[..., :2].set(12.0))


def exploding_time(params):
  return edited(params, 'time', decay=never, decay_up=zero)


def exploding_ssm(params):
  return edited(params, 'ssm', a_log=never, conv=written(1.0, first=0))


def dead_time(params):
  return edited(params, 'time', output=zero)


def dead_ssm(params):
  return edited(params, 'ssm', out=zero)


def constant(model, component):
  """The model where a half puts out its mean, the same for every token."""

  def blocks(*args, tap=None, **fields):
    def averaged(layer, x_BTD, part):
      if part == component:
        x_BTD = x_BTD.mean((0, 1), keepdims=True) + 0 * x_BTD
      return x_BTD if tap is None else tap(layer, x_BTD, part)

    return model.decoder.blocks(*args, tap=averaged, **fields)

  return model._replace(decoder=model.decoder._replace(blocks=blocks))


BROKEN = {
  frozen_time: ('G3.5', 'FAIL update hybrid/time'),
  frozen_ssm: ('G3.5', 'FAIL update hybrid/ssm'),
  forgetful_time: ('G3.5', 'FAIL half_life hybrid/time'),
  forgetful_ssm: ('G3.5', 'FAIL half_life hybrid/ssm'),
  some_forgetful_time: ('G3.5', 'FAIL collapsed hybrid/time'),
  some_forgetful_ssm: ('G3.5', 'FAIL collapsed hybrid/ssm'),
  exploding_time: ('G3.5', 'FAIL growth hybrid/time'),
  exploding_ssm: ('G3.5', 'FAIL growth hybrid/ssm'),
  dead_time: ('G3.6', 'FAIL contribution hybrid/time'),
  dead_ssm: ('G3.6', 'FAIL contribution hybrid/ssm'),
}
COMPONENTS = ('hybrid/time', 'hybrid/ssm')


@pytest.mark.long
def test_trained_hybrids_pass_and_broken_ones_fail(tmp_path):
  made = experiment()
  model = build.build_model(made.config, made.tasks[0])
  dispatch = jax.jit(make_dispatch(made.make_step(None)), donate_argnums=0)
  init = jax.jit(made.init)

  def judge(model):
    evaluate = state_gates.make(
      model,
      made.tasks[0],
      None,
      batch_size=ROWS,
      output_dir=str(tmp_path),
      layers=False,
    )

    def report(params):
      evaluate(params, jax.random.key(7))
      return json.loads((tmp_path / 'gates.json').read_text())['gates']

    return report

  report = judge(model)
  constants = {name: judge(constant(model, name)) for name in COMPONENTS}

  for seed in (3, 4, 5):
    task = build.build_task(made.config, seed)
    state = init(np.int32(seed))
    for first in range(0, STEPS, AT_ONCE):
      rows = [task.batch('train', first + i, ROWS) for i in range(AT_ONCE)]
      batches = jax.tree.map(lambda *x: np.stack(x), *rows)
      state, _ = dispatch(state, batches, np.int32(first), np.int32(AT_ONCE))
    gates = report(state.params)
    assert {x['verdict'] for x in gates.values()} == {'PASS'}, gates
    for change, (gate, reason) in BROKEN.items():
      gates = report(change(state.params))
      assert gates[gate]['verdict'] == 'FAIL', change.__name__
      reasons = gates[gate]['reasons']
      assert any(x.startswith(reason) for x in reasons), (change, reasons)
    for name, report_constant in constants.items():
      reasons = report_constant(state.params)['G3.6']['reasons']
      wanted = f'FAIL spread {name}'
      assert any(x.startswith(wanted) for x in reasons), reasons
