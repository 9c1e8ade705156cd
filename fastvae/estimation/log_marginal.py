"""Estimates of log p(x) of a batch, and of its reconstruction, streaming over the draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.checks import check_address, check_count
from ..core.hints import teaches
from ..core.nested import Conditioning
from ..core.options import Noise, ProposalName
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..random import RANDOMISATIONS, draw_seed, seed_of
from . import stream as _stream
from .proposals import Proposal, as_proposal
from .stream import Chunks
from .weights import LogMarginal, kept_draws

if TYPE_CHECKING:
    pass


@teaches
@torch.no_grad()
def log_marginal(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 5000,
    k_chunk: int | None = None,
    noise: Noise = "philox",
    proposal: ProposalName | Proposal = "posterior",
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> LogMarginal:
    r"""Estimate log p(x) per example by importance sampling, streaming over chunks of the k draws.

    No gradients are computed. With the running maximum M, :math:`S_1 = \sum_k e^{\log w_k - M}` and
    :math:`S_2 = \sum_k e^{2(\log w_k - M)}`:

    .. math:: \log \hat p = M + \log S_1 - \log K, \quad \mathrm{ESS} = S_1^2 / S_2, \quad
              \mathrm{stderr} = \sqrt{(S_2 / S_1^2 - 1/K)\, K / (K - 1)}

    Args:
        x: data [B, *event], as in :func:`elbo`.
        q: the encoder's output, as in :func:`elbo`.
        decoder: maps z [N, D] to the likelihood's parameters, as in :func:`elbo`.
        k: draws per example. Default 5000.
        k_chunk: draws per chunk, which bounds memory and changes results only by rounding: the noise of draw
            k is the same in any chunk. Default: chunks whose decoder output has about 4 million numbers on a
            CPU (sized for its caches), 64 million elsewhere. Halved, with a warning, when memory runs out.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``: eight independently randomised
            quasi-Monte-Carlo point sets of k/8 draws each (:mod:`fastvae.random`). Their spread gives the
            standard error, and ``jackknife`` leaves out a point set at a time. The variance is smaller by 20
            to 300 times for two latents and light weights, by 2 to 3 for eight, and by 1.5 for fifty, from
            k=4096 on; below 1024 draws it may be larger (docs/NOTES.md). Any k works; 4096, 8192 and other
            powers of 2 use the points best. ESS and k̂ still say how well q fits. Where k̂ is above 0
            the standard error is too small: the points remove the variance of most draws, but not that of the
            rare large weights, which eight point sets seldom contain. The interval from low to high is then
            at least as wide as that of independent draws.
        proposal: distribution from which z is drawn, with weights relative to it: ``"posterior"`` (default),
            q; ``"adapted"``, fitted to each example during sampling, far better for k of some hundreds or
            more; ``"defensive"``; or an object of :mod:`fastvae.proposals`.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        prior: as in :func:`elbo`. Default: N(0, I), or the hierarchy that produced q.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder and prior, [B, ...], as in :func:`elbo`.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        :class:`LogMarginal`, each field [B]. The standard errors are NaN for k=1. Trust them and the
        estimates only while Pareto k̂ (:func:`fastvae.diagnostics.pareto_khat`) is below 0.7; above that, the
        variance of the weights is effectively infinite. The interval from low to high contains log p(x) for
        95 % of the seeds, also for heavy-tailed weights, given a few hundred draws (docs/estimators.md).

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, section 5; Nowozin, Debiasing
        Evidence Approximations, 2018; Vehtari et al., Pareto Smoothed Importance Sampling, 2024.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Linear(2, 8)
        >>> q = torch.zeros(16, 2), torch.zeros(16, 2)
        >>> fastvae.log_marginal(torch.rand(16, 8), q, decoder, k=100, likelihood="bernoulli").log_px.shape
        torch.Size([16])
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
    k = check_count("k", k, "the importance samples per example")
    chunks, proposal = Chunks(k_chunk), as_proposal(proposal, noise)
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(k, inputs.q.batch, 0, row_offset)
    seed = seed_of(noise, draw_seed(inputs.q.device, generator), RANDOMISATIONS)
    draws = proposal.draws(inputs, seed, row_offset, k, chunks, kept_draws(k))
    total = draws.weights(0, k)
    assert total is not None
    w = draws.estimate(total)
    return w.summary(w.maximum.dtype)


@teaches
@torch.no_grad()
def reconstruction_log_prob(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 100,
    k_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""Return the log of the mean likelihood of x over draws from its posterior; low values are anomalous.

    This is An and Cho's reconstruction probability. No gradients are computed.

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} p(x|z_k), \quad z_k \sim q(z|x)

    Args:
        x: data [B, *event], as in :func:`elbo`.
        q: the encoder's output, as in :func:`elbo`.
        decoder: maps z [N, D] to the likelihood's parameters, as in :func:`elbo`.
        k: draws per example. Default 100.
        k_chunk: draws per chunk, as in :func:`log_marginal`.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder, [B, ...], as in :func:`elbo`.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        [B], in nats.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        An & Cho, Variational Autoencoder based Anomaly Detection using Reconstruction Probability, 2015.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Linear(2, 8)
        >>> q = torch.zeros(16, 2), torch.zeros(16, 2)
        >>> x = torch.rand(16, 8)
        >>> fastvae.reconstruction_log_prob(x, q, decoder, k=30, likelihood="bernoulli").shape
        torch.Size([16])
    """
    conditioning = Conditioning.of(mask, size_factor, context)
    inputs = Inputs.read(x, q, decoder, likelihood, None, conditioning, compared=False)
    k = check_count("k", k, "the draws per example")
    chunks = Chunks(k_chunk)
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(k, inputs.q.batch, 0, row_offset)
    seed = draw_seed(inputs.q.device, generator)
    w = _stream.weights(inputs, seed, 0, k, chunks, 1, ratio=False, row_offset=row_offset)
    return w.log_px.to(w.maximum.dtype)
