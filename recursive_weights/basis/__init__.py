"""Recursion over optimisation: many members, few weights.

Member i of E has the weight `W_i = Σ_k c_ik G_k`: its own R coefficients on a
basis that all members share. Coefficients and basis are found in turn, each
from the other's result; `fit` is that recursion, one step at a time.

Source: UnifyWeaver, Smoothing Basis for Multi-Cluster Projection, 2025.
"""
