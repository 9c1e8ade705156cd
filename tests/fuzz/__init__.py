"""A differential fuzzer: random calls of the objectives against float64 formulas.

A case is a small record drawn from two integers (``case.py``). ``families.py``, ``likelihoods.py`` and
``decoders.py`` have for each name what the library is given and what is true of it; ``oracle.py`` has the
bounds and the tolerance; ``check.py`` runs a case, computes the expected bound and its gradients by autograd
over torch.distributions, sharing nothing with the library but the draws of z, and compares.

``python -m tests.fuzz --minutes 10`` runs cases in a child process that may die.
"""
