"""Kinds of cases that are known to fail, left out until they are mended: empty at the end."""

from __future__ import annotations

from collections.abc import Callable

from . import families, likelihoods
from .case import HALVES, Case


def _half_torch(case: Case) -> bool:
    of_torch = [n.startswith(("td.", "td mix", "spatial td", "tanh")) for n in (case.q, case.prior)]
    own_prior = families.POSTERIORS[case.q].spatial and case.prior == "diagonal"
    q_half = any(t in HALVES for t in case.q_dtypes)
    return (of_torch[0] and q_half) or ((of_torch[1] or own_prior) and case.prior_dtype in HALVES)


OPEN: dict[str, Callable[[Case], bool]] = {
    "7: torch.distributions in half precision": _half_torch,
    "own likelihoods in half precision": lambda c: (
        likelihoods.ZOO[c.likelihood].native is not None
        and (c.net_dtype in HALVES or c.x_dtype in HALVES or c.decoder == "autocast")
    ),
    "9: float16": lambda c: c.net_dtype in HALVES and (bool(c.encoder) or c.estimator == "dreg"),
}


def is_open(case: Case) -> bool:
    return any(fails(case) for fails in OPEN.values())
