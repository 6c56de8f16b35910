"""Layers that several architectures share: plain functions of arrays."""
