"""Fused forms of layers for GPUs: the values of the plain ones, less traffic.

Each has a plain form beside it that it is tested against, and is imported only
where it is used.
"""
