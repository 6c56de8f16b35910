"""Recursion over weights: leaves of a tree derived from other leaves.

`operators` holds the maps T, one a file; `compose` builds maps from maps;
`tree` applies them to any parameter tree; `report` counts what is saved.
"""
