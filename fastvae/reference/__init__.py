"""The ops in plain PyTorch: the definition, the oracle of the tests, and the fallback on other devices."""
