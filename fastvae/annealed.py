"""log p(x) by annealed importance sampling, and how far off it can be: bounds from both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._annealing import STARTS, Annealing, Settings, draw_prior
from ._checks import check_address, check_choice, check_count
from ._inputs import Inputs
from ._nested import Beside, called, check_batch, decoded
from ._stream import Chunks
from ._teach import teaches
from .distributions import as_posterior, as_prior
from .distributions.spatial import flat_prior
from .evaluate.modules import evaluating, modules_of
from .likelihoods.base import Likelihood, as_likelihood
from .random import draw_seed

__all__ = ["AnnealedMarginal", "MarginalBounds", "ais", "bdmc"]


class AnnealedMarginal(NamedTuple):
    """An estimate of log p(x) by annealed importance sampling, each [B] in float64: in nats, a lower bound in
    expectation; its standard error over the chains; the effective number of these; and the mean acceptance
    probability of the transitions, NaN where there are none.
    """

    log_px: Tensor
    stderr: Tensor
    ess: Tensor
    acceptance: Tensor


class MarginalBounds(NamedTuple):
    """Stochastic bounds on log p(x) of data x that the model made, each [n] in float64, in nats: in
    expectation ``lower`` lies below log p(x) and ``upper`` above it; and their standard errors over the
    chains.
    """

    lower: Tensor
    upper: Tensor
    lower_stderr: Tensor
    upper_stderr: Tensor

    @property
    def gap(self) -> float:
        """Mean of upper − lower: no more than this is, in expectation, the error of either."""
        return float((self.upper - self.lower).mean())

    @property
    def gap_stderr(self) -> float:
        """Its standard error over the examples."""
        difference = self.upper - self.lower
        return float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else float("nan")


@teaches
@torch.no_grad()
def ais(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    steps: int = 200,
    chains: int = 16,
    leapfrog: int = 2,
    start: str = "posterior",
    chain_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    mask: Any = None,
    size: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> AnnealedMarginal:
    r"""Estimate log p(x) per example by annealed importance sampling with Hamiltonian Monte Carlo: dear, and
    right where importance sampling from q is low because q is not where p(z|x) is.

    Each chain starts at :math:`z_0 \sim q_0` and goes through transitions that leave :math:`π_t ∝
    q_0(z)^{1 - β_t}\, p(x, z)^{β_t}` invariant, :math:`0 = β_0 < … < β_T = 1`:

    .. math:: \log w = \sum_{t=1}^{T} (β_t - β_{t-1}) \log \frac{p(x, z_{t-1})}{q_0(z_{t-1})}, \quad
              E[w] = p(x), \quad \log \hat p(x) = \log \frac{1}{C} \sum_{c=1}^{C} w_c

    so that it is a lower bound in expectation, and, unlike that of :func:`fastvae.log_marginal`, comes closer
    with more steps as well as with more chains. With ``steps=1`` it is importance sampling.

    A transition is one trajectory of ``leapfrog`` steps, whose momenta are scaled by q0's width in each
    dimension. Its step size is found by a pilot run of a quarter of the chains, for each transition and
    example, for an acceptance near 0.65, and then fixed, so that it does not depend on what the chains do.

    Args:
        x, q, decoder, likelihood, prior, mask, size, context, row_offset: as in :func:`fastvae.elbo`. q needs
            ``log_prob``, as all families of fastvae's have. The decoder is followed by gradients of z, and by
            none of its parameters; it is called in eval mode.
        steps: T. The decoder is called, and followed back, 1.25·C·((T − 1)·leapfrog + 1) times for each
            example.
        chains: C.
        leapfrog: steps of a transition's trajectory. At the same cost more temperatures, with 1 or 2 of
            these, were better on every model that was tried, correlated latents included (docs/NOTES.md).
        start: q0: ``"posterior"``, q, the better start even where q is off; or ``"prior"``, which does not
            look at q (but for the number of latents).
        chain_chunk: chains that the decoder evaluates at a time, which bounds memory and changes no result
            but by rounding. Default: as many as give its output about 4 million numbers on a CPU, 64 million
            elsewhere. Halved, with a warning, when memory runs out.
        generator: source of the noise; default torch's own random state. The noise is a function of its
            address, as everywhere: the same for any batch and chunk. What differs by rounding may, in
            float32, change a decision of some transition, and then that example's estimate within its error.

    Returns:
        :class:`AnnealedMarginal` (log_px, stderr, ess, acceptance), each [B]. The standard error is the delta
        method's, NaN for a single chain. If the chains' weights differ much (ess far below C), use more
        steps. :func:`fastvae.bdmc` measures how far below log p(x) this is on data of the model's own.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the one that does not; for a decoder
            without a gradient.

    References:
        Neal, Annealed Importance Sampling, 2001; Neal, MCMC Using Hamiltonian Dynamics, 2011; Wu, Burda,
        Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Linear(2, 8)
        >>> q = torch.zeros(16, 2), torch.zeros(16, 2)
        >>> result = fastvae.ais(torch.rand(16, 8), q, decoder, steps=20, likelihood="bernoulli")
        >>> result.log_px.shape
        torch.Size([16])
    """
    settings = _settings(steps, chains, leapfrog, start, chain_chunk)
    with evaluating(_modules(decoder, likelihood, prior, getattr(q, "own_prior", None))):
        inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size, context))
        _, row_offset = check_address(settings.chains * settings.steps, inputs.q.batch, 0, row_offset)
        seed = draw_seed(inputs.q.device, generator)
        return AnnealedMarginal(*Annealing(inputs, seed, settings, row_offset).estimate())


@teaches
@torch.no_grad()
def bdmc(
    encoder: Callable[..., Any],
    decoder: Callable[..., Any],
    latent_dim: int | tuple[int, ...],
    *,
    n: int = 100,
    steps: int = 200,
    chains: int = 16,
    leapfrog: int = 2,
    start: str = "posterior",
    chain_chunk: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
) -> MarginalBounds:
    r"""Bound log p(x) from both sides on data that the model itself makes, by bidirectional Monte Carlo: what
    :func:`fastvae.ais` with the same settings may be off by.

    With :math:`z^* \sim p(z)` and :math:`x \sim p(x|z^*)`, :math:`z^*` is an exact draw of p(z|x), from which
    chains go back to q0: then :math:`E[1/w] = 1/p(x)`, and

    .. math:: E \log \frac{1}{C} \sum_c w_c \;\le\; \log p(x) \;\le\; -E \log \frac{1}{C} \sum_c 1/w'_c

    for chains that go forward (w) and back (w'). The gap is at least the error of either, in expectation. It
    says what sampling costs on such x, and nothing of data that are unlike them.

    Args:
        encoder: x [n, \*event] -> q, as in :func:`fastvae.evaluate`; with a context, (x, context) -> q.
        decoder: z [n, D] -> parameters of the likelihood, which needs ``sample``.
        latent_dim: D, or the shape of latents that have axes of their own, (C, H, W).
        n: how many x are made.
        steps, chains, leapfrog, start, chain_chunk: as in :func:`fastvae.ais`. The decoder is called, and
            followed back, about 2.25·C·T·leapfrog times for each x.
        likelihood, prior, context: as in :func:`fastvae.elbo`; the prior needs ``sample``, the context has n
            rows.
        generator: source of the noise, on the CPU or the modules' device; default torch's own random state.

    Returns:
        :class:`MarginalBounds` (lower, upper, lower_stderr, upper_stderr), each [n], with ``gap`` and
        ``gap_stderr``.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the one that does not.
        NotImplementedError: if prior or likelihood has no ``sample``.

    References:
        Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, 2015;
        Grosse, Ancha & Roy, Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo, 2016.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> bounds = fastvae.bdmc(encoder, decoder, 2, n=10, steps=20, likelihood="bernoulli")
        >>> bounds.lower.shape, bounds.upper.shape
        (torch.Size([10]), torch.Size([10]))
    """
    settings = _settings(steps, chains, leapfrog, start, chain_chunk)
    likelihood = as_likelihood(likelihood)
    n = check_count("n", n, "the examples that are made")
    check_address(settings.chains * settings.steps, n, 0, 0)
    latent = tuple(latent_dim) if isinstance(latent_dim, (tuple, list)) else None
    dim = 1
    for axis in (latent_dim,) if latent is None else latent:
        dim *= check_count("latent_dim", axis, "the number of latents, or each axis of their shape")
    modules = _modules(encoder, decoder, likelihood, prior)
    like = next((p for m in modules for p in m.parameters()), torch.empty(()))
    if context is not None:
        check_batch("context", context, n, like.device)
    seed = draw_seed(like.device, generator)
    with evaluating(modules):
        own = as_prior(prior, context).prepared()
        own = own if latent is None else flat_prior(own, latent, n)
        made_by = torch.Generator(like.device).manual_seed(int(seed) % 2**63)
        z = draw_prior(own, n, dim, like.device, made_by).to(like.dtype)
        x = likelihood.sample(
            likelihood.multiplied_out(decoded(decoder, z, context, latent)), generator=made_by
        )
        q = as_posterior(called("encoder", encoder, x, context))
        inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(None, None, context))
        return MarginalBounds(*Annealing(inputs, seed, settings).bounds(z))


def _settings(steps: Any, chains: Any, leapfrog: Any, start: Any, chain_chunk: Any) -> Settings:
    steps = check_count("steps", steps, "the temperatures between q0 and p(z|x)")
    chains = check_count("chains", chains, "the chains of each example")
    leapfrog = check_count("leapfrog", leapfrog, "the leapfrog steps of a transition")
    check_choice("start", start, STARTS)
    return Settings(steps, chains, leapfrog, start, Chunks(chain_chunk, "chain_chunk"))


def _modules(*parts: Any) -> list[nn.Module]:
    """What must be in eval mode: a trajectory that dropout changes leads nowhere back."""
    return [m for part in parts if callable(part) for m in modules_of(part)]
