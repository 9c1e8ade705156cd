"""Ops in plain PyTorch: the definition, the tests' reference, and the fallback on other devices."""
