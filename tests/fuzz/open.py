"""Kinds of cases that are known to fail, left out until they are mended: empty at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import likelihoods
from .case import FUSED, HALVES, Case


def _large(case: Case) -> bool:
    numbers = case.batch * case.k
    for n in case.event:
        numbers *= n
    return numbers >= FUSED


OPEN: dict[str, Callable[[Case], bool]] = {
    "2: the last layer left out": lambda c: _large(c) or (c.entry == "evaluate" and c.via != "function"),
    "own likelihoods in half precision": lambda c: (
        likelihoods.ZOO[c.likelihood].native is not None
        and (c.net_dtype in HALVES or c.x_dtype in HALVES or c.decoder == "autocast")
    ),
    "5: integers with a mask": lambda c: (
        c.likelihood == "categorical" and c.mask != "" and c.x_dtype == torch.uint8
    ),
    "9: float16": lambda c: c.net_dtype in HALVES and (bool(c.encoder) or c.estimator == "dreg"),
    "13: empty batches": lambda c: c.batch == 0,
}


def is_open(case: Case) -> bool:
    return any(fails(case) for fails in OPEN.values())
