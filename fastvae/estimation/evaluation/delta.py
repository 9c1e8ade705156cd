"""Differences of log p(x) between examples or models that share their noise."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .result import Evaluation


class Delta(NamedTuple):
    """Differences of log p(x), and their standard errors over the draws."""

    value: Tensor
    """log p(x) − log p(x₀) of each example [N], in nats."""
    stderr: Tensor
    """Standard error over the draws [N]; NaN for one draw."""


def delta(result: Evaluation, reference: Any) -> Delta:
    """Return :meth:`Evaluation.delta`."""
    (log_px, left_out), other = _parts("this evaluation", result), None
    if isinstance(reference, type(result)):
        other = _parts("reference", reference)
        if len(other[0]) not in (1, len(log_px)):
            raise ValueError(
                f"reference has {len(other[0])} examples; expected 1, or {len(log_px)} as this evaluation"
            )
        if len(other[1]) != len(left_out):
            raise ValueError(
                f"reference has {len(other[1])} groups of draws and this evaluation has {len(left_out)}; use "
                "the same noise= for both"
            )
    else:
        try:
            index = operator.index(reference)
        except TypeError:
            raise TypeError(
                "reference must be the index of an example or another Evaluation, got "
                f"{type(reference).__name__}"
            ) from None
        if not -len(log_px) <= index < len(log_px):
            raise IndexError(f"reference is {index}, but there are {len(log_px)} examples")
        other = log_px[index].reshape(1), left_out[:, index, None]
    return Delta(log_px - other[0], jackknife_stderr(left_out - other[1]))


def jackknife_stderr(left_out: Tensor) -> Tensor:
    """Return the standard error [N] of estimates, given their values without each group of draws [G, N]."""
    groups = len(left_out)
    deviations = left_out - left_out.mean(0)
    return (deviations.square().sum(0) * (groups - 1) / groups).sqrt()


def _parts(name: str, result: Evaluation) -> tuple[Tensor, Tensor]:
    if result.left_out is None:
        raise ValueError(
            f"{name} was not computed with shared_noise=True, which a difference needs for its standard "
            "error; evaluate(..., shared_noise=True)"
        )
    return result.log_px, result.left_out
