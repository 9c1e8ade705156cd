"""Names of options as ``Literal`` types, which a type checker verifies and an editor completes.

``likelihood`` stays a ``str``: its name is often read from a configuration, and a checker would reject such a
variable where a ``Literal`` is expected.
"""

from __future__ import annotations

from typing import Literal, get_args

Reduction = Literal["mean", "sum", "none"]
Estimator = Literal["iwae", "dreg", "stl"]
BoundEstimator = Literal["iwae", "dreg", "stl", "covariance", "score"]
Noise = Literal["philox", "qmc"]
KL = Literal["analytic", "mc"]
FreeBitsPer = Literal["batch", "example"]
ProposalName = Literal["posterior", "adapted", "refined", "defensive"]
Shard = Literal["data", "samples", "none"]
Start = Literal["posterior", "prior"]
Sampling = Literal["weighted", "stratified"]
Objective = Literal["elbo", "iwae", "beta_tc", "sleep", "log_marginal"]

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
KLS: tuple[KL, ...] = get_args(KL)
FREE_BITS_PER: tuple[FreeBitsPer, ...] = get_args(FreeBitsPer)
SHARDS: tuple[Shard, ...] = get_args(Shard)
STARTS: tuple[Start, ...] = get_args(Start)
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
