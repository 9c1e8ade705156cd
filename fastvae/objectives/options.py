"""Options and results that the objectives share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..core.options import KL, Estimator, FreeBitsPer, Noise, Reduction, Sampling
from ..core.records import registered
from ..likelihoods import Likelihood
from .bounds import Bound


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
        output: what the decoder returned for ``z``, K·B rows, sample-major: the tensor, mapping, object or
            distribution itself. The last layer is never fused with ``terms=True``; the record of a
            :class:`fastvae.FusedHead` is replaced by its outputs.
    """

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor
    z: Tensor | None
    output: Any


# Keyword arguments of the overloads by ``terms``: ``...Options`` of a VAE's methods, ``...Arguments`` of the
# functions, which also take the parts of a model.

Data = Tensor | Mapping[str, Any]
Decoder = Callable[..., Any]


class BoundOptions(TypedDict, total=False):
    """Options of every objective."""

    mask: Any
    size_factor: Any
    context: Any
    reduction: Reduction
    generator: torch.Generator | None
    row_offset: int
    shared_noise: bool


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


class QObjectiveOptions(SampledOptions, total=False):
    """Options of :func:`~.iwae.bound`."""

    q_objective: Bound | None


class BetaTCOptions(BoundOptions, total=False):
    """Options of :func:`~.beta_tc.beta_tc`."""

    beta: float | Tensor
    alpha: float | Tensor
    gamma: float | Tensor
    dataset_size: int | None
    sampling: Sampling
    k: int


class SleepOptions(TypedDict, total=False):
    """Options of :func:`~.wake_sleep.sleep`."""

    latent_dim: int | tuple[int, ...]
    likelihood: str | Likelihood
    prior: Any
    context: Any
    reduction: Reduction
    modules: Sequence[nn.Module]
    generator: torch.Generator | None


class ModelArguments(TypedDict, total=False):
    """Parts of a model, which a :class:`fastvae.VAE` passes itself."""

    likelihood: str | Likelihood
    prior: Any


class ElboArguments(ElboOptions, ModelArguments, total=False):
    """Keyword arguments of :func:`~.elbo.elbo`, except ``terms``."""


class IwaeArguments(IwaeOptions, ModelArguments, total=False):
    """Keyword arguments of :func:`~.iwae.iwae`, except ``terms``."""

    k: int


class BoundArguments(QObjectiveOptions, ModelArguments, total=False):
    """Keyword arguments of :func:`~.iwae.bound`, except ``terms``."""

    k: int


class BetaTCArguments(BetaTCOptions, ModelArguments, total=False):
    """Keyword arguments of :func:`~.beta_tc.beta_tc`, except ``terms``."""
