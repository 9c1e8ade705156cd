"""Sleep phase of wake–sleep: training the encoder on data simulated by the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_choice, check_count
from ..core.hints import teaches
from ..core.nested import called, check_batch, decoded
from ..core.options import REDUCTIONS, Reduction
from ..distributions import as_posterior, as_prior
from ..distributions.draws import describe, draw_prior
from ..distributions.spatial import flat_prior
from ..estimation.evaluation.data import place_of
from ..inputs.modules import check_modules
from ..likelihoods.base import Likelihood
from ..likelihoods.read import as_likelihood

__all__ = ["sleep"]


@teaches
def sleep(
    encoder: Callable[..., Any],
    decoder: Callable[..., Any],
    n: int,
    *,
    latent_dim: int | tuple[int, ...],
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    context: Any = None,
    reduction: Reduction = "mean",
    modules: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return log q(z|x) of data simulated by the model, to be maximised: the sleep phase of wake–sleep.

    .. math:: E_{p(z)\, p(x|z)} \log q(z|x) = -E_{p(x)}\, \mathrm{KL}(p(z|x) \,\|\, q(z|x)) + \mathrm{const}

    It is not a bound of log p(x), and uses no data. Its gradient reaches only the encoder. The KL has the
    opposite direction to the ELBO's, so q covers the posterior of simulated x.

    Args:
        encoder: maps x [n, \*event] to q: a tensor [n, 2 D], mu and logvar concatenated, a pair (mu, logvar),
            or another posterior; called with ``context``, if given, as its second argument.
        decoder: maps z [n, D] to the likelihood's parameters; called in its current mode (train or eval).
        n: number of examples to simulate.
        latent_dim: D, or the shape (C, H, W) of shaped latents.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`. It must implement ``sample``, as fastvae's do.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q. It must implement ``sample``.
        context: conditioning input of encoder, decoder and a prior that is a function: a tensor [n, ...] or a
            dict of such tensors.
        reduction: ``"mean"`` (default) or ``"sum"`` over the examples, or ``"none"`` for [n].
        modules: modules that encoder and decoder reach if these are functions, not modules or methods of
            modules: the simulated data get the device and dtype of their parameters. Default: none.
        generator: source of the noise. Default: torch's global random state.

    Returns:
        A number in nats, or [n].

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Hinton, Dayan, Frey & Neal, The wake-sleep algorithm for unsupervised neural networks, 1995;
        Bornschein & Bengio, Reweighted Wake-Sleep, 2015, section 2.3.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> (-fastvae.sleep(encoder, decoder, 16, latent_dim=2, likelihood="bernoulli")).backward()
        >>> encoder.weight.grad.shape, decoder.weight.grad
        (torch.Size([4, 8]), None)
    """
    for name, value in (("encoder", encoder), ("decoder", decoder)):
        if not callable(value):
            raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
    check_choice("reduction", reduction, REDUCTIONS)
    likelihood = as_likelihood(likelihood)
    reached = check_modules(modules)
    device, dtype = place_of(nn.ModuleList(reached) if reached else encoder, decoder)
    like = torch.empty((), device=device, dtype=dtype)
    with torch.no_grad():
        z, parameters = simulate(decoder, prior, n, latent_dim, context, like, generator)
        x = likelihood.sample(likelihood.read(parameters), generator=generator)
    q = as_posterior(called("encoder", encoder, x, context))
    if q.batch != n:
        raise ValueError(f"the encoder returned a q of {q.batch} rows for x of n = {n} rows")
    if q.known_dim not in (None, z.shape[1]):
        raise ValueError(
            f"q, {describe(q)}, has D = {q.known_dim} latents, but latent_dim={latent_dim!r} is "
            f"{z.shape[1]}; expected as many"
        )
    log_q = q.log_prob(z[None])[0]
    return log_q if reduction == "none" else getattr(log_q, reduction)()


def simulate(
    decoder: Callable[..., Any],
    prior: Any,
    n: int,
    latent_dim: int | tuple[int, ...],
    context: Any,
    like: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Any]:
    """Draw z [n, D] from the prior, like ``like`` in device and dtype; return z and the decoder's output."""
    n = check_count("n", n, "the number of draws")
    if context is not None:
        check_batch("context", context, n, like.device)
    prior = as_prior(prior, context)
    latent = latent_dim if isinstance(latent_dim, tuple) else None
    if latent is not None:
        prior = flat_prior(prior, latent, n)
    size = (
        check_count("latent_dim", latent_dim, "the number of latents")
        if latent is None
        else math.prod(latent)
    )
    z = draw_prior(prior, n, size, like.device, generator).to(like.dtype)
    return z, decoded(decoder, z, context, latent)
