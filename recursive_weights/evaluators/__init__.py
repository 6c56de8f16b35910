"""One measurement a file.

Each public module has
`make(model, task, objective, *, batch_size, splits, max_batches, ...)`, which
returns an `interfaces.Evaluator`: `(params, key) -> {'split/metric': float}`.
One that writes files has the parameter `output_dir`, '' for writing nothing.
"""
