"""Estimates of log p(x) by annealed importance sampling, and two-sided bounds on simulated data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.checks import check_address, check_choice, check_count
from ...core.hints import teaches
from ...core.nested import Conditioning, called, check_batch, decoded
from ...core.options import STARTS, Start
from ...core.records import registered
from ...distributions import as_posterior, as_prior
from ...distributions.draws import draw_prior, rsample_log_prob
from ...distributions.spatial import flat_prior
from ...inputs.batch import Inputs
from ...inputs.modules import check_modules, check_repeatable, evaluating, modules_of
from ...likelihoods.base import Likelihood
from ...likelihoods.read import as_likelihood
from ...random import draw_seed
from ..stream import Chunks
from .annealing import Annealing, Settings

__all__ = ["AnnealedMarginal", "MarginalBounds", "ais", "bdmc"]


@registered
@dataclass(frozen=True, eq=False)
class AnnealedMarginal:
    """Estimate of log p(x) by annealed importance sampling, each field [B] in float64.

    ``log_px`` is in nats, a lower bound in expectation; ``log_px_stderr`` its standard error over the chains;
    ``ess`` the effective number of chains; ``acceptance`` the mean acceptance probability of the transitions,
    NaN without transitions.
    """

    log_px: Tensor
    """Estimate of log p(x), in nats: a lower bound in expectation."""
    log_px_stderr: Tensor
    """Standard error of log_px over the chains."""
    ess: Tensor
    """Effective number of chains."""
    acceptance: Tensor
    """Mean acceptance probability of the transitions; NaN without transitions."""


@registered
@dataclass(frozen=True, eq=False)
class MarginalBounds:
    """Stochastic bounds on log p(x) of data x simulated by the model, each [n] in float64, in nats.

    In expectation ``lower`` lies below log p(x) and ``upper`` above it. The standard errors are over the
    chains.
    """

    lower: Tensor
    """Lower bound of log p(x), in expectation."""
    upper: Tensor
    """Upper bound of log p(x), in expectation."""
    lower_stderr: Tensor
    """Standard error of lower over the chains."""
    upper_stderr: Tensor
    """Standard error of upper over the chains."""

    @property
    def gap(self) -> float:
        """Mean of upper − lower, in expectation at least the error of either bound."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_stderr(self) -> float:
        """Standard error of the gap over the examples."""
        difference = self.upper - self.lower
        return float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")


@teaches
@torch.no_grad()
def ais(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 16,
    steps: int = 200,
    leapfrog: int = 2,
    start: Start = "posterior",
    k_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    modules: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> AnnealedMarginal:
    r"""Estimate log p(x) per example by annealed importance sampling with Hamiltonian Monte Carlo.

    It is expensive, but accurate where importance sampling underestimates because q misses the posterior.

    Each chain starts at :math:`z_0 \sim q_0` and applies transitions that leave :math:`π_t ∝
    q_0(z)^{1 - β_t}\, p(x, z)^{β_t}` invariant, :math:`0 = β_0 < … < β_T = 1`:

    .. math:: \log w = \sum_{t=1}^{T} (β_t - β_{t-1}) \log \frac{p(x, z_{t-1})}{q_0(z_{t-1})}, \quad
              E[w] = p(x), \quad \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k

    It is a lower bound in expectation which, unlike that of :func:`fastvae.log_marginal`, tightens with more
    steps as well as with more chains. With ``steps=1`` it is importance sampling.

    A transition is one trajectory of ``leapfrog`` steps, with momenta scaled by q0's width in each dimension.
    A pilot run of a quarter of the chains tunes the step size of each transition and example for an
    acceptance near 0.65. The step size is then fixed, so that it does not depend on the chains.

    Args:
        x: data [B, *event]; a dict of such tensors for :class:`fastvae.likelihoods.Joint`. A NaN makes its
            example's result NaN, unless ``mask`` excludes it.
        q: the encoder's output: a tensor [B, 2 D], mu and logvar concatenated; a pair (mu, logvar), each [B,
            D]; an object or mapping with these names, such as the outputs of diffusers and pythae; a
            torch.distributions object [B, D] with rsample; or a :class:`fastvae.distributions.Distribution`.
            Latents may be shaped: [B, C, H, W] in place of [B, D], or a tensor [B, 2 C, H, W] whose channels
            are mu, then logvar. It needs ``log_prob``, as all of fastvae's families have.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each, with N = k·B, sample-major: a
            tensor or a tuple; a mapping or an object that names them, such as the outputs of diffusers and
            pythae; or a torch.distributions object of the likelihood's family. Shaped latents are passed as
            [N, C, H, W]. With a ``context`` it is called as ``decoder(z, context)``. It is called in eval
            mode, and differentiated by z, not by its parameters. For a function see ``modules``.
        k: draws per example, each the end of a chain. Default 16.
        steps: T. The decoder is evaluated and differentiated 1.25·K·((T − 1)·leapfrog + 1) times per
            example. Default 200.
        leapfrog: leapfrog steps per transition. At the same cost, more temperatures with 1 or 2 leapfrog
            steps were better on every model tried, including correlated latents (docs/log.md). Default 2.
        start: q0: ``"posterior"`` (default), q, the better start even where q is inaccurate; or ``"prior"``,
            which ignores q (except for the number of latents).
        k_chunk: draws per decoder call, which bounds memory and changes results only by rounding. Default:
            chunks whose decoder output has about 4 million numbers on a CPU, 64 million elsewhere. Halved,
            with a warning, when memory runs out.
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
        modules: modules that a function as decoder or prior reaches, to be put into eval mode, too. A module
            and a method of a module need none. A function with modules that are not named must be in eval
            mode already: one whose output changes between two calls is rejected. Default: none.
        generator: source of the noise. Default: torch's global random state. The noise is a function of its
            address: the same for any batch and chunk. In float32 rounding differences may flip the acceptance
            of a transition, and change that example's estimate within its error.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.

    Returns:
        :class:`AnnealedMarginal` (log_px, stderr, ess, acceptance), each [B]. The standard error is the delta
        method's, NaN for a single chain. If the chains' weights differ much (ess far below k), use more
        steps. :func:`fastvae.audit.bdmc` measures how far below log p(x) the estimate is, on simulated data.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names; for a decoder that is not
            differentiable, or a function that is not deterministic.

    References:
        Neal, Annealed Importance Sampling, 2001; Neal, MCMC Using Hamiltonian Dynamics, 2011; Wu, Burda,
        Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Linear(2, 8)
        >>> q = torch.zeros(16, 2), torch.zeros(16, 2)
        >>> result = fastvae.audit.ais(torch.rand(16, 8), q, decoder, steps=20, likelihood="bernoulli")
        >>> result.log_px.shape
        torch.Size([16])
    """
    settings = _settings(k, steps, leapfrog, start, k_chunk)
    found = _modules(decoder, likelihood, prior, getattr(q, "own_prior", None))
    with evaluating([*found, *check_modules(modules)]):
        inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
        _, row_offset = check_address(settings.chains * settings.steps, inputs.q.batch, 0, row_offset)
        seed = draw_seed(inputs.q.device, generator)
        _check_repeatable(inputs, seed)
        return AnnealedMarginal(*Annealing(inputs, seed, settings, row_offset).estimate())


@teaches
@torch.no_grad()
def bdmc(
    encoder: Callable[..., Any],
    decoder: Callable[..., Any],
    *,
    latent_dim: int | tuple[int, ...],
    n: int = 100,
    k: int = 16,
    steps: int = 200,
    leapfrog: int = 2,
    start: Start = "posterior",
    k_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    context: Any = None,
    modules: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> MarginalBounds:
    r"""Bound log p(x) from both sides on data simulated by the model, by bidirectional Monte Carlo.

    The gap bounds the error of :func:`fastvae.audit.ais` with the same settings. With :math:`z^* \sim p(z)`
    and
    :math:`x \sim p(x|z^*)`, :math:`z^*` is an exact draw from p(z|x), from which reverse chains run to q0.
    Then :math:`E[1/w] = 1/p(x)`, and

    .. math:: E \log \frac{1}{K} \sum_k w_k \;\le\; \log p(x) \;\le\; -E \log \frac{1}{K} \sum_k 1/w'_k

    for forward (w) and reverse (w') chains. In expectation, the gap is at least the error of either bound. It
    measures the error on simulated x only, and says nothing about data unlike them.

    Args:
        encoder: x [n, \*event] -> q: a tensor [n, 2 D], mu and logvar concatenated, a pair (mu, logvar), or
            another posterior; with a context, (x, context) -> q.
        decoder: z [n, D] -> parameters of the likelihood, which needs ``sample``; with a context, (z,
            context) -> parameters.
        latent_dim: D, or the shape (C, H, W) of shaped latents.
        n: number of examples to simulate. Default 100.
        k: draws per example and direction, each the end of a chain. Default 16.
        steps: T, the number of temperatures. The decoder is evaluated and differentiated about
            2.25·K·T·leapfrog times per x. Default 200.
        leapfrog: leapfrog steps per transition. At the same cost, more temperatures with 1 or 2 leapfrog
            steps were better on every model tried, including correlated latents (docs/log.md). Default 2.
        start: q0: ``"posterior"`` (default), q, the better start even where q is inaccurate; or ``"prior"``,
            which ignores q (except for the number of latents).
        k_chunk: draws per decoder call, which bounds memory and changes results only by rounding. Default:
            chunks whose decoder output has about 4 million numbers on a CPU, 64 million elsewhere. Halved,
            with a warning, when memory runs out.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q. It needs ``sample``.
        context: conditioning input of encoder, decoder and a prior that is a function: a tensor [n, ...] or a
            dict of such tensors. Default: none.
        modules: modules that a function as decoder or prior reaches, to be put into eval mode, too. A module
            and a method of a module need none. A function with modules that are not named must be in eval
            mode already: one whose output changes between two calls is rejected. Default: none.
        generator: source of the noise, on the modules' device. Default: torch's global random state.

    Returns:
        :class:`MarginalBounds`, each field [n], with ``gap`` and ``gap_stderr``.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.
        NotImplementedError: if prior or likelihood has no ``sample``.

    References:
        Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, 2015;
        Grosse, Ancha & Roy, Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo, 2016.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> bounds = fastvae.audit.bdmc(encoder, decoder, latent_dim=2, n=10, steps=20,
        ...                             likelihood="bernoulli")
        >>> bounds.lower.shape, bounds.upper.shape
        (torch.Size([10]), torch.Size([10]))
    """
    settings = _settings(k, steps, leapfrog, start, k_chunk)
    likelihood = as_likelihood(likelihood)
    n = check_count("n", n, "the number of simulated examples")
    check_address(settings.chains * settings.steps, n, 0, 0)
    latent = tuple(latent_dim) if isinstance(latent_dim, (tuple, list)) else None
    dim = 1
    for axis in (latent_dim,) if latent is None else latent:
        dim *= check_count("latent_dim", axis, "the number of latents, or each axis of their shape")
    reached = [*_modules(encoder, decoder, likelihood, prior), *check_modules(modules)]
    like = next((p for m in reached for p in m.parameters()), torch.empty(()))
    if context is not None:
        check_batch("context", context, n, like.device)
    seed = draw_seed(like.device, generator)
    with evaluating(reached):
        own = as_prior(prior, context).prepared()
        own = own if latent is None else flat_prior(own, latent, n)
        made_by = torch.Generator(like.device).manual_seed(int(seed) % 2**63)
        z = draw_prior(own, n, dim, like.device, made_by).to(like.dtype)
        x = likelihood.sample(likelihood.read(decoded(decoder, z, context, latent)), generator=made_by)
        q = as_posterior(called("encoder", encoder, x, context))
        inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(None, None, context))
        _check_repeatable(inputs, seed)
        return MarginalBounds(*Annealing(inputs, seed, settings).bounds(z))


def _check_repeatable(inputs: Inputs, seed: Tensor) -> None:
    z, _ = rsample_log_prob(inputs.q, 1, seed)
    check_repeatable(inputs.decoder, lambda: inputs.log_likelihood(z))


def _settings(k: Any, steps: Any, leapfrog: Any, start: Any, k_chunk: Any) -> Settings:
    k = check_count("k", k, "the chains of each example")
    steps = check_count("steps", steps, "the temperatures between q0 and p(z|x)")
    leapfrog = check_count("leapfrog", leapfrog, "the leapfrog steps of a transition")
    check_choice("start", start, STARTS)
    return Settings(steps, k, leapfrog, start, Chunks(k_chunk))


def _modules(*parts: Any) -> list[nn.Module]:
    """Collect the modules to put into eval mode, since dropout would make trajectories irreversible."""
    return [m for part in parts if callable(part) for m in modules_of(part)]
