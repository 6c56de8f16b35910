"""One problem a file: data, augmentation, loss per example, metrics.

Each public module has `make(*, seed, ...) -> interfaces.Task`. Modules whose
name starts with an underscore serve the tasks and are none.
"""
