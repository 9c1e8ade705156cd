"""Declarations of the estimates of log p(x): how each is combined over a data set, reported and measured.

They are the metadata of the fields of :class:`fastvae.LogMarginal`. The evaluation of data sets, its report,
its files and ``docs/experiments/estimators.py`` read them and name no field, so a new estimate appears in
each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

UNTRUSTED = 0.7  # Pareto k̂, Vehtari et al. 2024

_KEY = "estimate"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Declaration of a field of :class:`fastvae.LogMarginal`.

    Args:
        figure: function of the field's values [N] and their record that returns the number of a data set,
            such as :func:`nll`. Default: None, no such number.
        heading: heading of a line of the report with this number. Default: no line.
        unit: unit of the number. Default ``"nats"``.
        stderr: name of the field with the standard errors, for an estimate of log p(x).
        nonnegative: values are not negative, which is validated when a result is loaded.
        about: description in docs/estimators.md.
        quote: advice in docs/estimators.md on when to quote it.
    """

    figure: Callable[[Tensor, Any], float] | None = None
    heading: str = ""
    unit: str = "nats"
    stderr: str = ""
    nonnegative: bool = False
    about: str = ""
    quote: str = ""


def estimate(**options: Any) -> dict[str, Estimate]:
    """Return the metadata of a field of :class:`fastvae.LogMarginal`; options are :class:`Estimate`'s."""
    return {_KEY: Estimate(**options)}


def estimates_of(record: type[Any]) -> dict[str, Estimate]:
    """Return the declaration of each field, by name."""
    return {f.name: f.metadata.get(_KEY, Estimate()) for f in fields(record)}


# Figures of a data set


def nll(values: Tensor, record: Any) -> float:
    """Return minus the mean of estimates of log p(x)."""
    return -float(values.mean())


def nll_where_trusted(values: Tensor, record: Any) -> float:
    """Return the NLL of estimates that are unreliable for a heavy tail."""
    return nll(where_trusted(values, record), record)


def where_trusted(values: Tensor, record: Any) -> Tensor:
    """Replace the values of examples with k̂ above 0.7 by log_px, a lower bound in expectation."""
    return torch.where(record.khat > UNTRUSTED, record.log_px, values)


def in_quadrature(values: Tensor, record: Any) -> float:
    """Return the standard error of the mean for independent errors, or its bound for shared noise.

    Errors with shared noise may have any correlation; the mean's error is at most the mean of the errors.
    """
    if getattr(record, "left_out", None) is not None:
        return float(values.mean())
    return float(values.square().sum().sqrt()) / values.shape[0]


def median(values: Tensor, record: Any) -> float:
    """Return the median of the values except NaN."""
    return float(values.nanmedian())
