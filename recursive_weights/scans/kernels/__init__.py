"""Scans as GPU kernels: the same signature as the plain form, its reference."""
