"""Differential fuzzer: random calls of the objectives against float64 formulas.

A case is a small record drawn from two integers (``case.py``). ``families.py``, ``likelihoods.py`` and
``decoders.py`` map each name to the library's argument and its float64 definition; ``oracle.py`` has the
bounds and the tolerance; ``check.py`` runs a case, computes the expected bound and its gradients by autograd
over torch.distributions, sharing only the draws of z with the library, and compares.

``python -m tests.fuzz --minutes 10`` runs cases in a child process that may crash.
"""
