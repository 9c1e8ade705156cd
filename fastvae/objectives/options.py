"""Options and results that the objectives share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..core.options import KL, Estimator, FreeBitsPer, Noise, Reduction
from ..core.records import registered


@registered
@dataclass(frozen=True, eq=False)
class Terms:
    """Bound to be maximised, its parts, and the draws and the decoder's output of the same pass.

    A further loss on ``z`` or ``output`` trains encoder and decoder in the same backward pass. Both are None
    with a ``k_chunk`` below k, which saves their memory, and with ``estimator="dreg"`` and ``q_objective=``,
    which rescale each draw's gradient on its way to q, and would rescale that of another loss.

    Attributes:
        bound: bound of each example, [B], in nats.
        log_likelihood: mean of log p(x|z) over the draws, [B].
        kl: KL(q(z|x) ‖ p(z)) without its weight, or the mean of log q(z|x) − log p(z) over the draws, [B].
        z: draws from q(z|x), [K, B, D] or [K, B, C, H, W], in the dtype that the decoder gets. Those of a
            :class:`fastvae.distributions.Mixture` take turns between its components, whatever their weights.
        output: what the decoder returned for ``z``, K·B rows, sample-major. The last layer is never fused
            with ``terms=True``; the record of a :class:`fastvae.FusedHead` is replaced by its outputs.
    """

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor
    z: Tensor | None
    output: Any


class BoundOptions(TypedDict, total=False):
    """Options of every objective."""

    mask: Any
    size_factor: Any
    context: Any
    reduction: Reduction
    generator: torch.Generator | None
    row_offset: int


class ElboOptions(BoundOptions, total=False):
    """Options of :func:`~.elbo.elbo`."""

    k: int
    beta: float | Tensor
    free_bits: float | Tensor
    free_bits_per: FreeBitsPer
    kl: KL


class SampledOptions(BoundOptions, total=False):
    """Options of every bound of k draws."""

    k_chunk: int | None
    noise: Noise


class IwaeOptions(SampledOptions, total=False):
    """Options of :func:`~.iwae.iwae`."""

    estimator: Estimator
