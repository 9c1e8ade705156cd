"""Log importance weights of k draws, from which users build their own objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, first_row
from ..core.hints import teaches
from ..core.nested import Conditioning
from ..core.options import ESTIMATORS, Estimator, Noise
from ..core.records import registered
from ..distributions.draws import draw_ratio
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..random import draw_seed, seed_of
from .row_gradients import check_rows_apart


@registered
@dataclass(frozen=True, eq=False)
class LogWeights:
    """Parts of the log weights, each [K, B], in nats: log p(x|z_k), and log p(z_k) − log q(z_k|x)."""

    log_likelihood: Tensor
    log_ratio: Tensor


@teaches
def log_weights(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    estimator: Estimator = "iwae",
    noise: Noise = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> LogWeights:
    r"""Return log importance weights of k draws, in two parts, to build your own objective from.

    .. math:: \log w_k = \log p(x|z_k) + \big[\log p(z_k) - \log q(z_k|x)\big], \quad z_k \sim q(z|x)

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
        k: draws per example.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q.
        estimator: gradient that reaches q through the log-ratio: ``"iwae"`` (default), all of it, ``"stl"``,
            without q's score, or ``"dreg"``, doubly reparameterised (:func:`iwae`). ``"dreg"`` takes its
            weights from the upstream gradient of the log-ratio: it is correct under one log-mean-exp over
            these k draws.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``: the k draws of an example are one
            randomised quasi-Monte-Carlo point set (:mod:`fastvae.random`); subsets may be point sets too,
            such as the first 2^m draws.
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
        :class:`~fastvae.objectives.log_weights.LogWeights` (log_likelihood, log_ratio), each [K, B].

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, eq. 8.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> parts = fastvae.log_weights(x, encoder(x), decoder, k=5, likelihood="bernoulli")
        >>> tempered = torch.logsumexp(0.5 * (parts.log_likelihood + parts.log_ratio), 0)
        >>> tempered.shape
        torch.Size([16])
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
    k = check_count("k", k, "the importance samples per example")
    check_choice("estimator", estimator, ESTIMATORS)
    row = first_row(row_offset, shared_noise, k, inputs.q.batch)
    if estimator == "dreg":
        check_rows_apart(inputs.decoder, k, "estimator='dreg'")
    seed = seed_of(noise, draw_seed(inputs.q.device, generator))
    z, log_ratio = draw_ratio(inputs.q, inputs.prior, k, seed, row, estimator)
    return LogWeights(inputs.log_likelihood(z.unflatten(0, (k, -1))), log_ratio)
