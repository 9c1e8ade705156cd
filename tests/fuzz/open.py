"""Kinds of cases that are known to fail, left out until they are mended: empty at the end."""

from __future__ import annotations

from collections.abc import Callable

from . import families
from .case import FUSED, HALVES, Case


def _half_torch(case: Case) -> bool:
    of_torch = [n.startswith(("td.", "td mix", "spatial td", "tanh")) for n in (case.q, case.prior)]
    own_prior = families.POSTERIORS[case.q].spatial and case.prior == "diagonal"
    q_half = any(t in HALVES for t in case.q_dtypes)
    return (of_torch[0] and q_half) or ((of_torch[1] or own_prior) and case.prior_dtype in HALVES)


def _large(case: Case) -> bool:
    numbers = case.batch * case.k
    for n in case.event:
        numbers *= n
    return numbers >= FUSED


OPEN: dict[str, Callable[[Case], bool]] = {
    "2: the last layer left out": lambda c: _large(c) or (c.entry == "evaluate" and c.via != "function"),
    "7: torch.distributions in half precision": _half_torch,
}


def is_open(case: Case) -> bool:
    return any(fails(case) for fails in OPEN.values())
