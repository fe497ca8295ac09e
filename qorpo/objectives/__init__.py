"""Losses of log-probabilities, one a file: a pure function of tensors, and a class that a training step calls.

They need torch and `ops` alone, and take no recipe. Begin with `base.Objective`, then `orpo`.
"""
