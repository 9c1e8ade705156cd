"""Estimates of log p(x) of a batch, and of its reconstruction, streaming over the draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, first_row
from ..core.hints import teaches
from ..core.nested import Conditioning
from ..core.options import Noise, ProposalName
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..random import RANDOMISATIONS, draw_seed, seed_of
from . import stream as _stream
from .imputation import elementwise_log_prob
from .proposals import Proposal, as_proposal
from .stream import Chunks
from .sums import kept_draws
from .weights import LogMarginal


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
    shared_noise: bool = False,
) -> LogMarginal:
    r"""Estimate log p(x) per example by importance sampling, streaming over chunks of the k draws.

    No gradients are computed. With the running maximum M, :math:`S_1 = \sum_k e^{\log w_k - M}` and
    :math:`S_2 = \sum_k e^{2(\log w_k - M)}`:

    .. math:: \log \hat p = M + \log S_1 - \log K, \quad \mathrm{ESS} = S_1^2 / S_2, \quad
              \mathrm{stderr} = \sqrt{(S_2 / S_1^2 - 1/K)\, K / (K - 1)}

    Args:
        x: data [B, *event]; a dict of such tensors for :class:`fastvae.likelihoods.Joint`. A NaN makes its
            example's result NaN, unless ``mask`` excludes it.
        q: the encoder's output: a tensor [B, 2 D], mu and logvar concatenated; a pair (mu, logvar), each [B,
            D]; an object or mapping with these names, such as the outputs of diffusers and pythae; a
            torch.distributions object [B, D] with rsample; or a :class:`fastvae.distributions.Distribution`.
            Latents may be shaped: [B, C, H, W] in place of [B, D], or a tensor [B, 2 C, H, W] whose channels
            are mu, then logvar.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each, with N = k·B, sample-major: a
            tensor or a tuple; a mapping or an object that names them, such as the outputs of diffusers and
            pythae; or a torch.distributions object of the likelihood's family. Shaped latents are passed as
            [N, C, H, W]. With a ``context`` it is called as ``decoder(z, context)``.
        k: draws per example. Default 5000.
        k_chunk: draws per chunk, which bounds memory and changes results only by rounding: the noise of draw
            k is the same in any chunk. Default: chunks whose decoder output has about 4 million numbers on a
            CPU (sized for its caches), 64 million elsewhere. Halved, with a warning, when memory runs out.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``: eight independently randomised
            quasi-Monte-Carlo point sets of k/8 draws each (:mod:`fastvae.random`). Their spread gives the
            standard error, and ``jackknife`` leaves out a point set at a time. The variance is smaller by 20
            to 300 times for two latents and light weights, by 2 to 3 for eight, and by 1.5 for fifty, from
            k=4096 on; below 1024 draws it may be larger (docs/log.md). Any k works; 4096, 8192 and other
            powers of 2 use the points best. ESS and k̂ still say how well q fits. Where k̂ is above 0 the
            standard error is too small: the points remove the variance of most draws, but not that of the
            rare large weights, which eight point sets seldom contain. The interval from low to high is then
            at least as wide as that of independent draws.
        proposal: distribution from which z is drawn, with weights relative to it: ``"posterior"`` (default),
            q; ``"adapted"``, fitted to each example during sampling, far better for k of some hundreds or
            more; ``"defensive"``; or an object of :mod:`fastvae.proposals`.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.
        shared_noise: give all examples the noise of row 0, so that differences between the results of similar
            examples, such as an image and its perturbation, lose the noise they have in common. Errors then
            no longer average out over examples, so leave it off in training. Default False.

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
    row = first_row(row_offset, shared_noise, k, inputs.q.batch)
    seed = seed_of(noise, draw_seed(inputs.q.device, generator), RANDOMISATIONS)
    draws = proposal.draws(inputs, seed, row, k, chunks, kept_draws(k))
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
    elementwise: bool = False,
    likelihood: str | Likelihood = "gaussian",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> Tensor:
    r"""Return the log of the mean likelihood of x over draws from its posterior; low values are anomalous.

    This is An and Cho's reconstruction probability. No gradients are computed.

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} p(x|z_k), \quad z_k \sim q(z|x)

    With ``elementwise`` it is that of each element of x, which shows where an example is anomalous.

    Args:
        x: data [B, *event]; a dict of such tensors for :class:`fastvae.likelihoods.Joint`. A NaN makes its
            example's result NaN, unless ``mask`` excludes it.
        q: the encoder's output: a tensor [B, 2 D], mu and logvar concatenated; a pair (mu, logvar), each [B,
            D]; an object or mapping with these names, such as the outputs of diffusers and pythae; a
            torch.distributions object [B, D] with rsample; or a :class:`fastvae.distributions.Distribution`.
            Latents may be shaped: [B, C, H, W] in place of [B, D], or a tensor [B, 2 C, H, W] whose channels
            are mu, then logvar.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each, with N = k·B, sample-major: a
            tensor or a tuple; a mapping or an object that names them, such as the outputs of diffusers and
            pythae; or a torch.distributions object of the likelihood's family. Shaped latents are passed as
            [N, C, H, W]. With a ``context`` it is called as ``decoder(z, context)``.
        k: draws per example. Default 100.
        k_chunk: draws per chunk, which bounds memory and changes results only by rounding: the noise of draw
            k is the same in any chunk. Default: chunks whose decoder output has about 4 million numbers on a
            CPU (sized for its caches), 64 million elsewhere. Halved, with a warning, when memory runs out.
        elementwise: return the score of each element of x. Default False.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.
        shared_noise: give all examples the noise of row 0, so that differences between the results of similar
            examples, such as an image and its perturbation, lose the noise they have in common. Errors then
            no longer average out over examples, so leave it off in training. Default False.

    Returns:
        [B], in nats; with ``elementwise`` [B, *event], 0 where ``mask`` is False, and a dict for a Joint.

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
    row = first_row(row_offset, shared_noise, k, inputs.q.batch)
    seed = draw_seed(inputs.q.device, generator)
    if elementwise:
        if size_factor is not None:
            raise ValueError("elementwise=True takes no size_factor; add its log to the decoder's log mean")
        return elementwise_log_prob(inputs, seed, k, chunks, row)  # type: ignore[no-any-return]
    w = _stream.weights(inputs, seed, 0, k, chunks, 1, ratio=False, row_offset=row)
    return w.log_px.to(w.maximum.dtype)
