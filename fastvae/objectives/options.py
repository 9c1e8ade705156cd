"""Options and results that the objectives share."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class Terms(NamedTuple):
    """Bound to be maximised and its two parts, each [B], in nats.

    ``log_likelihood`` is E_q log p(x|z); ``kl`` is unweighted.
    """

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor


class BoundOptions(TypedDict, total=False):
    """Options of every objective."""

    mask: Any
    size_factor: Any
    context: Any
    reduction: str
    generator: torch.Generator | None
    row_offset: int


class ElboOptions(BoundOptions, total=False):
    """Options of :func:`~.elbo.elbo`."""

    k: int
    beta: float | Tensor
    free_bits: float | Tensor
    free_bits_per: str
    kl: str


class SampledOptions(BoundOptions, total=False):
    """Options of every bound of k draws."""

    k_chunk: int | None
    noise: str


class IwaeOptions(SampledOptions, total=False):
    """Options of :func:`~.iwae.iwae`."""

    estimator: str
