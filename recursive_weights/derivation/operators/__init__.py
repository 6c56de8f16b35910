"""Maps T from a base weight to a derived one, one a file.

Each file has `make(...) -> Operator`, whose arguments all have defaults;
`count(base_shape, ...) -> int`, its exact number of parameters; and, where the
start is not the base itself, `start(base, ...)`. A base `[..., D]` is seen as
a matrix of F rows, `[F, D]`.
"""
