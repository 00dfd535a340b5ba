"""Contracts and array arithmetic: NumPy and the standard library only."""
