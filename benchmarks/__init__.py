"""``python -m benchmarks``: fastvae beside plain PyTorch, torch.compile, Pyro and pythae, in one run."""
