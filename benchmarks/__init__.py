"""``python -m benchmarks``: fastvae against plain PyTorch, torch.compile, Pyro and pythae, in one run."""
