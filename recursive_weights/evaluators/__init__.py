"""One measurement a file.

Each public module has
`make(model, task, objective, *, batch_size, splits, max_batches, ...)`, which
returns an `interfaces.Evaluator`: `(params, key) -> {'split/metric': float}`.
`batch_size` is `training.batch_size / training.accumulation` unless the config
gives the evaluator its own, so that what fits in training fits here. It is the
number of tracks of `perplexity` too, and of training rows in `state_gates`.
One that writes files has the parameter `output_dir`, '' for writing nothing.
"""
