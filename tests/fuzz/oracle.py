"""Expected bound and gradients: formulas in float64, and sampled rounding errors.

The tolerance is sampled instead of chosen: the formula is recomputed with every intermediate, forward and
backward, perturbed at random by a rounding of the dtype in which the library stores or computes it; the
spread of the results is the allowed error (Monte Carlo arithmetic; Parker 1997).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.objectives import bounds

Value = Callable[[Tensor], Tensor]  # the bounds [B] of log weights [K, B]


def lme(w: Tensor) -> Tensor:
    return torch.logsumexp(w, 0) - math.log(len(w))


def power(w: Tensor, alpha: float) -> Tensor:
    return w.mean(0) if alpha == 1 else lme((1 - alpha) * w) / (1 - alpha)


def groups(w: Tensor, m: int, alpha: float = 0.0) -> Tensor:
    return torch.stack([power(part, alpha) for part in w.chunk(m)]).mean(0)


def u_statistic(w: Tensor, m: int, ways: int) -> Tensor:
    blocks = len(w) // m
    rows = [
        [(j * blocks + (i + r * j) % blocks) for j in range(m)] for r in range(ways) for i in range(blocks)
    ]
    return torch.stack([lme(w[row]) for row in rows]).mean(0)


def jackknife(w: Tensor) -> Tensor:
    k = len(w)
    rest = torch.stack([lme(torch.cat([w[:i], w[i + 1 :]])) for i in range(k)]).sum(0)
    return k * lme(w) - (k - 1) / k * rest


BETAS = (0.0, 0.1, 0.5)


def tvo(w: Tensor) -> Tensor:
    ends = (*BETAS[1:], 1.0)
    return sum((e - b) * (torch.softmax(b * w, 0) * w).sum(0) for b, e in zip(BETAS, ends, strict=True))


def tvo_score(w: Tensor) -> Tensor:
    total = torch.zeros_like(w)
    for beta, end in zip(BETAS, (*BETAS[1:], 1.0), strict=True):
        weights = torch.softmax(beta * w, 0)
        total += (end - beta) * weights * ((1 - beta) * (w - (weights * w).sum(0)) - 1)
    return total


class Objective(NamedTuple):
    make: Callable[[str], Any]
    value: Value
    draws: int = 6
    estimators: tuple[str, ...] = ("iwae", "stl", "dreg")


BOUNDS = {
    "iwae": Objective(lambda e: bounds.IWAE(estimator=e), lme),
    "miwae": Objective(lambda e: bounds.IWAE(3, estimator=e), lambda w: groups(w, 3)),
    "vr": Objective(lambda e: bounds.IWAE(alpha=0.3, estimator=e), lambda w: power(w, 0.3)),
    "vr below 0": Objective(lambda e: bounds.IWAE(alpha=-1.0, estimator=e), lambda w: power(w, -1.0)),
    "vr of groups": Objective(lambda e: bounds.IWAE(2, 0.6, e), lambda w: groups(w, 2, 0.6)),
    "elbo": Objective(lambda e: bounds.IWAE(alpha=1.0, estimator=e), lambda w: w.mean(0)),
    "ciwae": Objective(lambda e: bounds.CIWAE(0.3, e), lambda w: 0.3 * w.mean(0) + 0.7 * lme(w)),
    "u": Objective(lambda e: bounds.UStatistic(2, 3, e), lambda w: u_statistic(w, 2, 3)),
    "jackknife": Objective(lambda e: bounds.Jackknife(e), jackknife),
    "tvo": Objective(lambda e: bounds.TVO(BETAS, e), tvo, 6, ("covariance", "iwae", "stl")),
}
ENCODERS = {
    "piwae": (lambda: bounds.IWAE(3), lambda w: groups(w, 3), "iwae"),
    "piwae, dreg": (lambda: bounds.IWAE(3, estimator="dreg"), lambda w: groups(w, 3), "dreg"),
    "elbo": (lambda: bounds.IWAE(alpha=1.0), lambda w: w.mean(0), "iwae"),
    "wake": (bounds.WakePhi, lme, "wake"),
}


def shares(value: Value, w: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Return each sample's coefficients in q's gradient: of the path through z and of the score, [K, B]."""
    w = w.detach().requires_grad_()
    (g,) = torch.autograd.grad(value(w).sum(), w, create_graph=True)
    zero = torch.zeros_like(w)
    if estimator == "covariance":
        return zero, tvo_score(w.detach())
    if estimator == "wake":
        return zero, g.detach()
    if estimator == "iwae":
        return g.detach(), -g.detach()
    if estimator == "dreg" and g.requires_grad:
        second = [torch.autograd.grad(g[k].sum(), w, retain_graph=True)[0][k] for k in range(len(w))]
        return (g - torch.stack(second)).detach(), zero
    return g.detach(), zero


class _Shake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, forward: float, backward: float, absolute: float | Tensor) -> Tensor:
        ctx.by = backward
        return t + forward * _signs(t) * (t.abs() + absolute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        largest = grad.abs().amax() if grad.numel() else 0.0
        return grad + ctx.by * _signs(grad) * (grad.abs() + 0.25 * largest), None, None, None


def _signs(t: Tensor) -> Tensor:
    return (2 * torch.rand_like(t) - 1) * 2


class Arithmetic:
    """Exact arithmetic, or arithmetic that perturbs every number by a rounding.

    Args:
        unit: unit roundoff of the dtype of the computation; 0 for exact arithmetic. Default: 0.
    """

    def __init__(self, unit: float = 0.0):
        self.unit = unit

    def __call__(
        self,
        t: Tensor,
        stored: torch.dtype | None = None,
        *,
        exact: bool = False,
        absolute: float | Tensor = 0.0,
    ) -> Tensor:
        """Perturb t; ``stored`` is the dtype of its gradient and, unless ``exact``, of the number."""
        if not self.unit or not t.is_floating_point():
            return t
        kept = self.unit if stored is None else max(self.unit, torch.finfo(stored).eps)
        return _Shake.apply(t, self.unit if exact else kept, kept, absolute)
