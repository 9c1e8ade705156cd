"""elbo, iwae and log_marginal: compositions of the fused ops, which hold the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check_choice, check_count, check_number, check_same_device, check_tensor, shape_of
from .likelihoods import Likelihood, as_likelihood
from .ops.latent import ESTIMATORS
from .posteriors import Posterior, as_posterior
from .priors import Prior, as_prior
from .random import draw_seed

__all__ = ["LogMarginal", "Terms", "elbo", "iwae", "log_marginal"]


class Terms(NamedTuple):
    """A bound and its parts, each [B], in nats: ``bound`` to be maximised, ``log_likelihood`` E_q log p(x|z),
    and ``kl``.
    """

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor


class LogMarginal(NamedTuple):
    """An importance-sampling estimate of log p(x), each [B]: in nats, its standard error, and the effective
    sample size (of the k drawn)."""

    log_px: Tensor
    stderr: Tensor
    ess: Tensor


def elbo(
    x: Tensor,
    q: Any,
    decoder: Callable[[Tensor], Any],
    *,
    likelihood: str | Likelihood = "gaussian",
    prior: Prior | None = None,
    samples: int = 1,
    beta: float = 1.0,
    free_bits: float = 0.0,
    kl: str = "analytic",
    reduction: str = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | Terms:
    r"""Evidence lower bound, to be maximised.

    .. math:: \frac{1}{L} \sum_{l=1}^{L} \log p(x|z_l) - β\, \mathrm{KL}(q(z|x) \,\|\, p(z)),
              \quad z_l \sim q(z|x)

    Args:
        x: data [B, *event].
        q: the encoder's output: a pair (mu, logvar), each [B, D]; a torch.distributions.Normal or
            Independent(Normal, 1); or a posterior object.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each; called once, with N = L·B,
            sample-major.
        likelihood: ``"gaussian"`` (the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns logits),
            or an object such as ``fastvae.Gaussian(scale=0.1)`` (it returns the mean).
        prior: default N(0, I); else ``fastvae.DiagonalNormal(mu, logvar)`` or a torch.distributions.Normal.
        samples: L, the draws of z per example.
        beta: weight of the KL (β-VAE, Higgins et al. 2017).
        free_bits: λ in nats: each dimension's KL, averaged over this batch, counts as at least λ (Kingma et
            al. 2016, eq. 15), so its gradient is zero below. The KL term is then the same for every example.
        kl: ``"analytic"``, in closed form, or ``"mc"``, the mean of log q(z|x) − log p(z) over the draws.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for [B]. Events are always summed.
        terms: return the :class:`Terms` (bound, log_likelihood, kl), each [B] whatever the reduction; kl
            without β.
        generator: source of the noise; default torch's own random state.

    Returns:
        A number in nats, or [B], or Terms.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the one that does not.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014, eq. 3 and 7.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> bound = fastvae.elbo(x, encoder(x).chunk(2, dim=1), decoder, likelihood="bernoulli")
        >>> (-bound).backward()
    """
    q, likelihood, prior = _model(x, q, decoder, likelihood, prior)
    check_count("samples", samples, "the draws of z per example")
    beta = check_number("beta", beta, "the weight of the KL")
    free_bits = check_number("free_bits", free_bits, "in nats per dimension")
    check_choice("kl", kl, ("analytic", "mc"))
    check_choice("reduction", reduction, _REDUCTIONS)
    if free_bits and kl == "mc":
        raise ValueError(
            "free_bits needs the KL of each dimension, which kl='mc' does not have; use kl='analytic'"
        )
    seed = draw_seed(q.device, generator)
    if kl == "analytic":
        z, divergence = q.rsample_kl(prior, samples=samples, seed=seed, per_dimension=free_bits > 0)
        if free_bits:
            divergence = divergence.mean(0).clamp(min=free_bits).sum().expand(q.batch)
    else:
        z, log_ratio = q.rsample_log_ratio(prior, samples=samples, seed=seed)
        divergence = -log_ratio.mean(0)
    log_likelihood = _log_likelihood(x, z, decoder, likelihood).mean(0)
    bound = log_likelihood - (divergence if beta == 1 else beta * divergence)
    return Terms(bound, log_likelihood, divergence) if terms else _reduce(bound, reduction)


def iwae(
    x: Tensor,
    q: Any,
    decoder: Callable[[Tensor], Any],
    *,
    k: int = 50,
    likelihood: str | Likelihood = "gaussian",
    prior: Prior | None = None,
    estimator: str = "iwae",
    reduction: str = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | Terms:
    r"""Importance-weighted bound, to be maximised; k=1 is the ELBO, and it rises to log p(x) with k.

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} w_k, \quad
              \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    Args:
        x, q, decoder, likelihood, prior, reduction, generator: as in :func:`elbo`; the decoder is called
            once, with N = k·B.
        k: importance samples per example.
        estimator: the gradient that reaches q; the value is the same, and so is the decoder's gradient.
            ``"iwae"``: the bound's derivative, whose signal-to-noise falls with k (Rainforth et al. 2018).
            ``"dreg"``: doubly reparameterised, unbiased for it; its signal-to-noise rises with k.
            ``"stl"``: drops the score of q; unbiased for k=1, where it vanishes at the exact posterior,
                biased for k>1.
        terms: return the :class:`Terms` (bound, log_likelihood, kl), each [B] whatever the reduction: the
            bound to train on, and the means of log p(x|z_k) and of log q(z_k|x) − log p(z_k) over the draws,
            detached, to look at.

    Returns:
        A number in nats, or [B], or Terms.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the one that does not.

    References:
        Burda, Grosse & Salakhutdinov 2016; Roeder, Wu & Duvenaud 2017; Tucker, Lawson, Gu & Maddison 2019.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> q = encoder(x).chunk(2, dim=1)
        >>> bound = fastvae.iwae(x, q, decoder, k=50, likelihood="bernoulli", estimator="dreg")
        >>> (-bound).backward()
    """
    q, likelihood, prior = _model(x, q, decoder, likelihood, prior)
    check_count("k", k, "the importance samples per example")
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("reduction", reduction, _REDUCTIONS)
    seed = draw_seed(q.device, generator)
    z, log_ratio = q.rsample_log_ratio(prior, samples=k, seed=seed, estimator=estimator)
    log_likelihood = _log_likelihood(x, z, decoder, likelihood)
    bound = ops.log_mean_exp(log_likelihood + log_ratio)
    if terms:
        return Terms(bound, log_likelihood.detach().mean(0), -log_ratio.detach().mean(0))
    return _reduce(bound, reduction)


@torch.no_grad()
def log_marginal(
    x: Tensor,
    q: Any,
    decoder: Callable[[Tensor], Any],
    *,
    k: int = 5000,
    k_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Prior | None = None,
    generator: torch.Generator | None = None,
) -> LogMarginal:
    r"""Estimate log p(x) per example by importance sampling, streaming over chunks of the k draws; no
    gradients.

    With the running maximum M, :math:`S_1 = \sum_k e^{\log w_k - M}` and
    :math:`S_2 = \sum_k e^{2(\log w_k - M)}`:

    .. math:: \log \hat p = M + \log S_1 - \log K, \quad \mathrm{ESS} = S_1^2 / S_2, \quad
              \mathrm{stderr} = \sqrt{(S_2 / S_1^2 - 1/K)\, K / (K - 1)}

    Args:
        x, q, decoder, likelihood, prior, generator: as in :func:`elbo`.
        k: draws per example.
        k_chunk: draws at a time, which bounds memory and changes no result but by rounding: the noise of draw
            k is the same in any chunk. Default: as many as make about 4096 rows for the decoder.

    Returns:
        :class:`LogMarginal` (log_px, stderr, ess), each [B]. The standard error is the delta method's, and
        NaN for k=1; it is to be trusted only while ess is large.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the one that does not.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, section 5.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Linear(2, 8)
        >>> q = torch.zeros(16, 2), torch.zeros(16, 2)
        >>> fastvae.log_marginal(torch.rand(16, 8), q, decoder, k=100, likelihood="bernoulli").log_px.shape
        torch.Size([16])
    """
    q, likelihood, prior = _model(x, q, decoder, likelihood, prior)
    check_count("k", k, "the importance samples per example")
    if k_chunk is None:
        k_chunk = max(1, 4096 // max(1, q.batch))
    check_count("k_chunk", k_chunk, "the importance samples drawn at a time")
    seed = draw_seed(q.device, generator)
    state = None
    for start in range(0, k, k_chunk):
        count = min(k_chunk, k - start)
        z, log_ratio = q.rsample_log_ratio(prior, samples=count, seed=seed, sample_offset=start)
        state = _merge(state, _log_likelihood(x, z, decoder, likelihood) + log_ratio)
    maximum, first, second = state
    log_px = maximum + torch.log(first) - math.log(k)
    variance = (second / first**2 - 1 / k).clamp(min=0) * (k / (k - 1) if k > 1 else math.nan)
    return LogMarginal(*(v.to(maximum.dtype) for v in (log_px, variance.sqrt(), first**2 / second)))


def _merge(state: tuple[Tensor, ...] | None, log_w: Tensor) -> tuple[Tensor, ...]:
    """Fold log weights [K, B] into the running (maximum, sum of w, sum of w^2), relative to the maximum."""
    maximum = log_w.amax(0) if state is None else torch.maximum(state[0], log_w.amax(0))
    # A column of -inf keeps sums of 0 instead of exp(-inf + inf).
    shift = torch.where(maximum == -math.inf, 0.0, maximum)
    w = torch.exp(log_w.double() - shift)
    first, second = w.sum(0), (w**2).sum(0)
    if state is not None:
        scale = torch.exp(state[0].double() - shift)
        first, second = first + state[1] * scale, second + state[2] * scale**2
    return maximum, first, second


_REDUCTIONS = ("mean", "sum", "none")


def _reduce(bound: Tensor, reduction: str) -> Tensor:
    return bound if reduction == "none" else getattr(bound, reduction)()


def _model(x, q, decoder, likelihood, prior) -> tuple[Posterior, Likelihood, Prior]:
    """Read and check what every objective takes."""
    check_tensor("x", x)
    q = as_posterior(q)
    if x.dim() == 0 or x.shape[0] != q.batch:
        raise ValueError(
            f"x has shape {shape_of(x)} but q has {q.batch} rows; the first axis of both must be the batch"
        )
    if x.device != q.device:
        raise ValueError(f"x is on {x.device} but q is on {q.device}; move one of them")
    if not callable(decoder):
        raise TypeError(
            "decoder must be a callable z[N, D] -> parameters, such as an nn.Module; got "
            f"{type(decoder).__name__}. Pass the decoder itself, not its output"
        )
    return q, as_likelihood(likelihood), as_prior(prior)


def _log_likelihood(x: Tensor, z: Tensor, decoder: Callable, likelihood: Likelihood) -> Tensor:
    """log p(x|z) [K, B]: the decoder sees one batch axis, sample-major."""
    samples = z.shape[0]
    parameters = decoder(z.flatten(0, 1))
    first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
    if isinstance(first, Tensor):
        check_same_device("the decoder's output", first, "x", x)
    return likelihood.log_prob(x, parameters, samples)
