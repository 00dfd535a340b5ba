"""FCOS in PyTorch."""
