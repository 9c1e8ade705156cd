"""Keyword arguments of a VAE's methods that estimate log p(x), for type checkers and editors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch

from ..core.options import Noise, ProposalName, Shard, Start
from ..likelihoods import Likelihood
from .proposals import Proposal


class _StreamedOptions(TypedDict, total=False):
    """Options of every estimate that streams its draws."""

    k_chunk: int | None
    generator: torch.Generator | None


class _BatchOptions(_StreamedOptions, total=False):
    """Options of every estimate of a batch x."""

    mask: Any
    size_factor: Any
    context: Any
    row_offset: int


class LogMarginalOptions(_BatchOptions, total=False):
    """Options of :func:`~.log_marginal.log_marginal`."""

    noise: Noise
    proposal: ProposalName | Proposal
    shared_noise: bool


class ReconstructionOptions(_BatchOptions, total=False):
    """Options of :func:`~.log_marginal.reconstruction_log_prob`."""

    elementwise: bool
    likelihood: str | Likelihood
    shared_noise: bool


class _AnnealedOptions(TypedDict, total=False):
    """Options of the chains of an annealed estimate."""

    k: int
    steps: int
    leapfrog: int
    start: Start


class AISOptions(_AnnealedOptions, _BatchOptions, total=False):
    """Options of :func:`~.audit.annealed.ais`."""


class BDMCOptions(_AnnealedOptions, _StreamedOptions, total=False):
    """Options of :func:`~.audit.annealed.bdmc`."""

    n: int
    latent_dim: int | tuple[int, ...]
    likelihood: str | Likelihood
    prior: Any
    context: Any


class EvaluateOptions(_StreamedOptions, total=False):
    """Options of :func:`~.evaluation.loop.evaluate`."""

    k: int | None
    tol: float | None
    noise: Noise
    proposal: ProposalName | Proposal
    batch_size: int | None
    prepare_batch: Callable[[Any], Mapping[str, Any]] | None
    checkpoint: str | os.PathLike[str] | None
    audit: int | None
    shard: Shard
    progress: bool
    shared_noise: bool
