"""Objectives elbo, iwae and log_marginal, composed of the fused ops."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from . import _backend, _stream
from ._checks import (
    check_address,
    check_choice,
    check_count,
    check_weight,
    may_look,
)
from ._inputs import Inputs, weigh_samples
from ._nested import Beside, tensors
from ._recompute import repeatable
from ._stream import Chunks
from ._teach import teaches
from .bounds import IWAE, Bound, weighed
from .distributions import Distribution, draw_chunk, draw_kl, draw_ratio, draw_strata
from .distributions.draws import describe, say_monte_carlo
from .head import called_by
from .likelihoods import Likelihood
from .ops.latent import ESTIMATORS
from .ops.weigh import Weighing
from .proposals import Proposal, as_proposal
from .random import RANDOMISATIONS, draw_seed, seed_of
from .weights import LogMarginal, kept_draws

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    # Options shared by the overloads.

    class BoundOptions(TypedDict, total=False):
        mask: Any
        size_factor: Any
        context: Any
        reduction: str
        generator: torch.Generator | None
        row_offset: int

    class ElboOptions(BoundOptions, total=False):
        k: int
        beta: float | Tensor
        free_bits: float | Tensor
        free_bits_per: str
        kl: str

    class SampledOptions(BoundOptions, total=False):
        k_chunk: int | None
        noise: str

    class IwaeOptions(SampledOptions, total=False):
        estimator: str


__all__ = [
    "LogMarginal",
    "LogWeights",
    "Terms",
    "bound",
    "elbo",
    "iwae",
    "log_marginal",
    "log_weights",
    "reconstruction_log_prob",
]


class Terms(NamedTuple):
    """Bound to be maximised and its two parts, each [B], in nats.

    ``log_likelihood`` is E_q log p(x|z); ``kl`` is unweighted.
    """

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor


@overload
def elbo(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: Literal[True],
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[ElboOptions],
) -> Terms: ...
@overload
def elbo(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: Literal[False] = ...,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[ElboOptions],
) -> Tensor: ...
@overload
def elbo(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: bool,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[ElboOptions],
) -> Tensor | Terms: ...
@teaches
def elbo(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    k: int = 1,
    beta: float | Tensor = 1.0,
    free_bits: float | Tensor = 0.0,
    free_bits_per: str = "batch",
    kl: str = "analytic",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: str = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor | Terms:
    r"""Return the ELBO, to be maximised.

    Evidence lower bound with L draws per example:

    .. math:: \frac{1}{K} \sum_{k=1}^{K} \log p(x|z_k) - β\, \mathrm{KL}(q(z|x) \,\|\, p(z)),
              \quad z_k \sim q(z|x)

    Args:
        x: data [B, *event]; a dict of such tensors for :class:`fastvae.Joint`.
        q: the encoder's output: a tensor [B, 2 D], mu and logvar concatenated; a pair (mu, logvar), each
            [B, D]; an object or mapping with these names, such as the outputs of diffusers and pythae; a
            torch.distributions object [B, D] with rsample; or a :class:`fastvae.Distribution`. Latents may
            be shaped: [B, C, H, W] in place of [B, D], or a tensor [B, 2 C, H, W] whose channels are mu,
            then logvar.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each; called once, with N = L·B,
            sample-major. Shaped latents are passed as [N, C, H, W]. With a ``context`` it is called as
            ``decoder(z, context)``.
        likelihood: ``"gaussian"`` (the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns logits),
            another name, an object such as ``fastvae.Gaussian(scale=0.1)`` (it returns the mean), or a
            user-defined :class:`fastvae.Likelihood`.
        prior: ``fastvae.DiagonalNormal(mu, logvar)``, another :class:`fastvae.Distribution`, a
            torch.distributions object, a pair (mu, logvar), each [B, D], or a function of the context that
            returns one of these. For shaped latents its parameters broadcast to [B, C, H, W], or are flat,
            [D]. Default: N(0, I), or the :class:`fastvae.Hierarchy` that produced q.
        k: draws of z per example. Default 1.
        beta: weight of the KL (β-VAE, Higgins et al. 2017): a number, or a tensor, [] or [B]. Default 1.
            Under torch.compile a new number recompiles; a new value of a tensor does not.
        free_bits: λ in nats, a number or a tensor []: each dimension's KL counts as at least λ, so its
            gradient is zero below λ. Default 0: none.
        free_bits_per: quantity bounded below by λ. ``"batch"`` (default): each dimension's KL averaged over
            this batch (Kingma et al. 2016, eq. 15),
            :math:`\sum_d \max(λ, \frac1B \sum_b \mathrm{KL}_{bd})`, which is then the KL of every example.
            ``"example"``: each dimension's KL per example, :math:`\sum_d \max(λ, \mathrm{KL}_{bd})`, which
            does not depend on the rest of the batch.
        kl: ``"analytic"`` (default), in closed form, or ``"mc"``, the mean of log q(z|x) − log p(z) over the
            draws. Without a closed form for q and the prior, ``"analytic"`` falls back to ``"mc"`` with a
            warning.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019).
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B], to weight and sum
            yourself. Events are always summed. A weight of 0 does not silence a bound that is NaN or
            infinite; ``torch.where(weights > 0, bound, 0) * weights`` does. If x is not finite there,
            replace it with ``torch.where`` before the encoder as well, or gradients become NaN.
        terms: return :class:`Terms` (bound, log_likelihood, kl), each [B] for any reduction; kl is not
            multiplied by β.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.

    Returns:
        A number in nats, or [B], or Terms.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014, eq. 3 and 7.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> bound = fastvae.elbo(x, encoder(x), decoder, likelihood="bernoulli")
        >>> (-bound).backward()
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size_factor, context))
    q, prior = inputs.q, inputs.prior
    # Fast path: skip validation of common argument types.
    if type(k) is not int or k < 1:
        k = check_count("k", k, "the draws of z per example")
    if type(beta) is not float or not 0 <= beta < math.inf:
        beta = check_weight("beta", beta, "the weight of the KL", q, per_row=True)
    if type(free_bits) is not float or not 0 <= free_bits < math.inf:
        free_bits = check_weight("free_bits", free_bits, "in nats per dimension", q, per_row=False)
    if free_bits_per not in _FREE_BITS_PER:
        check_choice("free_bits_per", free_bits_per, _FREE_BITS_PER)
    if kl not in _KLS:
        check_choice("kl", kl, _KLS)
    if reduction not in _REDUCTIONS:
        check_choice("reduction", reduction, _REDUCTIONS)
    # Reading a tensor's value would synchronise with the device.
    has_free_bits = free_bits > 0 if type(free_bits) is float else True
    if has_free_bits and kl == "mc":
        raise ValueError(
            "free_bits needs the KL of each dimension, which kl='mc' does not have; use kl='analytic'"
        )
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(k, q.batch, 0, row_offset)
    seed = draw_seed(inputs.q.device, generator)
    coefficient, factor = 1.0, None
    if type(beta) is float and not (beta != 1 and torch.compiler.is_compiling()):
        coefficient = beta
    else:
        # Compiled code specialises on an op's number, but not on a tensor's value.
        factor = (
            beta if isinstance(beta, Tensor) else beta * torch.ones((), dtype=torch.float64, device=q.device)
        )
    drawn, shares = None, None
    if kl == "analytic":
        drawn = draw_kl(q, prior, k, seed, row_offset, has_free_bits)
    if drawn is not None:
        z, term = drawn
        if has_free_bits:
            if free_bits_per == "batch":
                term = term.mean(0).clamp(min=free_bits).sum().expand(q.batch)
            else:
                term = term.clamp(min=free_bits).sum(1)
        coefficient = -coefficient
    else:
        if kl == "analytic":
            _without_closed_form(q, prior, has_free_bits)
        if q.strata > 1:
            z, term, shares = draw_strata(q, prior, k, seed, row_offset)
        else:
            z, term = draw_ratio(q, prior, k, seed, row_offset)
    if coefficient == 0:
        term = _unweighted(term)
    how = Weighing(coefficient, "mean", "none" if terms else reduction)
    if shares is None:
        bound, log_likelihood = inputs.bound(z, term, k, factor, how, terms)
    else:
        counted = (torch.where(shares == 0, 0.0, shares * t) for t in (inputs.log_likelihood(z), term))
        log_likelihood, term = counted
        bound, log_likelihood = weigh_samples(log_likelihood, term, factor, how)
    if not terms:
        return bound
    term = term if term.dim() == 1 else term.mean(0)
    return Terms(bound, log_likelihood, -term if drawn is None else term)  # type: ignore[arg-type]


def _unweighted(term: Tensor) -> Tensor:
    """Detach a KL of weight zero if it is not finite, since autograd turns 0 · inf into NaN."""
    if may_look(term) and not torch._C._are_functorch_transforms_active() and not bool(term.isfinite().all()):
        return term.detach()
    return term


def _without_closed_form(q: Distribution, prior: Distribution, has_free_bits: bool) -> None:
    if has_free_bits:
        raise ValueError(
            "free_bits needs the KL of each dimension in closed form, which is not known for q = "
            f"{describe(q)} and prior = {describe(prior)}; register one with fastvae.register_kl, or leave "
            "free_bits out"
        )
    say_monte_carlo(q, prior)


@overload
def iwae(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: Literal[True],
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    k: int = ...,
    **options: Unpack[IwaeOptions],
) -> Terms: ...
@overload
def iwae(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: Literal[False] = ...,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    k: int = ...,
    **options: Unpack[IwaeOptions],
) -> Tensor: ...
@overload
def iwae(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    terms: bool,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    k: int = ...,
    **options: Unpack[IwaeOptions],
) -> Tensor | Terms: ...
@teaches
def iwae(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 50,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    estimator: str = "iwae",
    k_chunk: int | None = None,
    noise: str = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: str = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor | Terms:
    r"""Return the importance-weighted bound (IWAE), to be maximised.

    It is the ELBO for k=1 and rises to log p(x) with k:

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} w_k, \quad
              \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    Groups of samples (MIWAE) and other powers of the weights (VR-IWAE) are :class:`fastvae.bounds.IWAE` of
    :func:`bound`.

    Args:
        x: data [B, *event], as in :func:`elbo`.
        q: the encoder's output, as in :func:`elbo`.
        decoder: maps z [N, D] to the likelihood's parameters; called with N = k·B, once without ``k_chunk``.
        k: importance samples per example. Default 50.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        prior: as in :func:`elbo`. Default: N(0, I), or the hierarchy that produced q.
        estimator: gradient that reaches q. The value and the decoder's gradient do not depend on it.
            ``"iwae"`` (default): the bound's derivative, whose signal-to-noise ratio falls with k (Rainforth
                et al. 2018).
            ``"dreg"``: doubly reparameterised, unbiased for the same derivative; its signal-to-noise ratio
                rises with k. It weights the gradient at each sample of z
                separately, and so needs a decoder that treats rows independently: a BatchNorm in training
                mode is refused where it is found, and must not hide in a function.
            ``"stl"``: drops the score of q; unbiased for k=1, where it vanishes at the exact posterior,
                biased for k>1.
        k_chunk: samples per chunk, to train in the memory of one chunk. Activations are dropped and
            recomputed in the backward pass with the same noise (including the decoder's, such as dropout), so
            that the gradient is that of all samples, at the cost of one more forward pass. The decoder is
            called with N = k_chunk·B; batch statistics, as in BatchNorm, are computed per chunk. Default: all
            k at once.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``, one randomised quasi-Monte-Carlo point
            set for each example (:mod:`fastvae.random`): an unbiased estimate of p(x) with less variance
            where few latents matter, hence a tighter bound; best with k a power of 2. These draws use
            composed operations, not the fused op.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder and prior, [B, ...], as in :func:`elbo`.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``, as in :func:`elbo`.
        terms: return :class:`Terms` (bound, log_likelihood, kl), each [B] for any reduction: the bound to
            train on, and the means of log p(x|z_k) and of log q(z_k|x) − log p(z_k) over the draws, detached,
            for logging.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        A number in nats, or [B], or Terms.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Burda, Grosse & Salakhutdinov 2016; Roeder, Wu & Duvenaud 2017; Tucker, Lawson, Gu & Maddison 2019.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> bound = fastvae.iwae(x, encoder(x), decoder, k=50, likelihood="bernoulli", estimator="dreg")
        >>> (-bound).backward()
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size_factor, context))
    if type(k) is not int or k < 1:
        k = check_count("k", k, "the importance samples per example")
    if estimator not in ESTIMATORS:
        check_choice("estimator", estimator, ESTIMATORS)
    how = _LOG_MEAN_EXP.get(reduction) if type(reduction) is str and k_chunk is None and not terms else None
    if how is not None and noise == "philox":
        # Fast path: call the two ops directly.
        if type(row_offset) is not int or row_offset:
            _, row_offset = check_address(k, inputs.q.batch, 0, row_offset)
        if estimator == "dreg":
            _check_rows_apart(inputs.decoder, k, "estimator='dreg'")
        seed = draw_seed(inputs.q.device, generator)
        z, log_ratio = draw_ratio(inputs.q, inputs.prior, k, seed, row_offset, estimator)
        return inputs.bound(z, log_ratio, k, None, how, False)[0]
    options = k_chunk, noise, reduction, terms, generator, row_offset
    return _bound(inputs, _IWAE[estimator], None, k, *options)


_IWAE = {estimator: IWAE(estimator=estimator) for estimator in ESTIMATORS}
_LOG_MEAN_EXP = {reduction: Weighing(1.0, "log_mean_exp", reduction) for reduction in ("mean", "sum", "none")}


@overload
def bound(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    objective: Bound,
    *,
    terms: Literal[True],
    k: int = ...,
    q_objective: Bound | None = ...,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[SampledOptions],
) -> Terms: ...
@overload
def bound(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    objective: Bound,
    *,
    terms: Literal[False] = ...,
    k: int = ...,
    q_objective: Bound | None = ...,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[SampledOptions],
) -> Tensor: ...
@overload
def bound(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    objective: Bound,
    *,
    terms: bool,
    k: int = ...,
    q_objective: Bound | None = ...,
    likelihood: str | Likelihood = ...,
    prior: Any = ...,
    **options: Unpack[SampledOptions],
) -> Tensor | Terms: ...
@teaches
def bound(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    objective: Bound,
    *,
    k: int = 50,
    q_objective: Bound | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    k_chunk: int | None = None,
    noise: str = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: str = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor | Terms:
    r"""Return any bound of :mod:`fastvae.bounds`, to be maximised, optionally with another for the encoder.

    .. math:: F(\log w_1 … \log w_K), \quad
              \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    Args:
        x: data [B, *event], as in :func:`elbo`.
        q: the encoder's output, as in :func:`elbo`.
        decoder: maps z [N, D] to the likelihood's parameters, as in :func:`elbo`.
        objective: the bound F, such as ``fastvae.bounds.CIWAE(0.5)``: its value is returned, and its gradient
            trains decoder, likelihood and prior.
        k: total samples per example; :class:`fastvae.bounds.IWAE` with M groups has k/M in each.
            Default 50.
        q_objective: bound that trains q, on the same samples. Default: the objective.
            ``objective=IWAE(), q_objective=IWAE(groups=8)`` is PIWAE (Rainforth et al. 2018),
            ``q_objective=WakePhi()`` reweighted wake–sleep. As for ``"dreg"`` of :func:`iwae`, the decoder
            must treat rows independently. Where gradients by z are float16, the weight of decoder and prior
            in a sample is raised to at least 2⁻¹¹ of the encoder's, a difference that float16 cannot resolve;
            scale the loss, as float16 requires in any case.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        prior: as in :func:`elbo`. Default: N(0, I), or the hierarchy that produced q.
        k_chunk: samples per chunk, as in :func:`iwae`. Default: all k at once.
        noise: ``"philox"`` (default) or ``"qmc"``, as in :func:`iwae`.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder and prior, [B, ...], as in :func:`elbo`.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``, as in :func:`elbo`.
        terms: return :class:`Terms`, each [B], as in :func:`iwae`.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        A number in nats, or [B], or Terms.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, and the references of
        each bound.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> tvo = fastvae.bounds.TVO()
        >>> (-fastvae.bound(x, encoder(x), decoder, tvo, k=20, likelihood="bernoulli")).backward()
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size_factor, context))
    if type(k) is not int or k < 1:
        k = check_count("k", k, "the importance samples per example")
    for name, value in (("objective", objective), ("q_objective", q_objective)):
        if value is None and name == "q_objective":
            continue
        if not isinstance(value, Bound):
            raise TypeError(
                f"{name} must be a bound of fastvae.bounds, such as fastvae.bounds.IWAE(); got {value!r}"
            )
        value.check(k)
    options = k_chunk, noise, reduction, terms, generator, row_offset
    return _bound(inputs, objective, q_objective, k, *options)


def _bound(
    inputs: Inputs,
    objective: Bound,
    q_objective: Bound | None,
    draws: int,
    k_chunk: int | None,
    noise: str,
    reduction: str,
    terms: bool,
    generator: torch.Generator | None,
    row_offset: int,
) -> Tensor | Terms:
    if reduction not in _REDUCTIONS:
        check_choice("reduction", reduction, _REDUCTIONS)
    if k_chunk is not None:
        k_chunk = check_count("k_chunk", k_chunk, "the samples trained on at a time")
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(draws, inputs.q.batch, 0, row_offset)
    seed = seed_of(noise, draw_seed(inputs.q.device, generator))
    how = objective.weighing("none" if terms else reduction) if q_objective is None else None
    if inputs.q.strata > 1 and (how is None or not how.is_plain or how.over == "mean"):
        beside = "" if q_objective is None else " with q_objective="
        raise ValueError(
            f"q = {describe(inputs.q)} is drawn from in strata, which {objective!r}{beside} does not weigh; "
            "use iwae() or elbo()"
        )
    whole = k_chunk is None or k_chunk >= draws
    told = None
    if (q_objective is not None and q_objective.route != "score") or objective.estimator == "dreg":
        _check_rows_apart(
            inputs.decoder, draws, "q_objective=" if q_objective else f"estimator={objective.estimator!r}"
        )
    if how is not None and whole:
        dreg = (how.alpha if how.over == "log_mean_exp" else 1.0), how.groups
        z, log_ratio = draw_ratio(inputs.q, inputs.prior, draws, seed, row_offset, objective.estimator, *dreg)
        value, log_likelihood = inputs.bound(z, log_ratio, draws, None, how, terms)
    else:
        source = objective if q_objective is None else q_objective
        tied = q_objective is None and source.estimator in ("iwae", "stl")
        route = source.estimator if tied else source.route
        narrow = _Float16(inputs.decoder, inputs.device)
        if whole:
            z, log_ratio, told = draw_chunk(inputs.q, inputs.prior, draws, seed, 0, row_offset, route)
            log_likelihood = inputs.log_likelihood(z, narrow.see)
        else:
            assert k_chunk is not None
            # A compiled checkpoint cannot mutate outer state, so only parameters and autocast are examined.
            see = None if torch.compiler.is_compiling() else narrow.see
            drawn = _chunked(inputs, seed, draws, k_chunk, route, row_offset, see)
            log_likelihood, log_ratio, told = drawn
        if told is None and how is not None and how.is_plain:
            value, log_likelihood = weigh_samples(log_likelihood, log_ratio, None, how)
        else:
            value = weighed(log_likelihood, log_ratio, told, objective, q_objective, narrow.found)
            log_likelihood = log_likelihood.detach().mean(0)
            value = value if terms or reduction == "none" else getattr(value, reduction)()
    if not terms:
        return value
    return Terms(value, log_likelihood.detach(), -log_ratio.detach().mean(0))  # type: ignore[union-attr]


def _check_rows_apart(decoder: Any, draws: int, what: str) -> None:
    """Reject a decoder that mixes rows, where each sample's gradient by z is weighted separately."""
    decoder = called_by(decoder)
    if draws == 1 or not isinstance(decoder, torch.nn.Module):
        return
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{what} weighs the gradient that reaches each sample of z by itself, but the decoder's "
                f"{name or 'module'}, a {type(module).__name__}, takes statistics over all samples: the "
                "gradient of q would be wrong. Use estimator='iwae' or 'stl', decoder.eval(), or a "
                "normalization of each row, such as GroupNorm"
            )


class _Float16:
    """Detector of float16 gradients by z, through decoder parameters, autocast, z or decoder output."""

    def __init__(self, decoder: Any, device: torch.device):
        owner = called_by(decoder)
        parameters = owner.parameters() if isinstance(owner, torch.nn.Module) else ()
        kind = device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        self.found = cast or any(p.dtype == torch.float16 for p in parameters)

    def see(self, z: Tensor, outputs: list[Tensor]) -> None:
        self.found = self.found or any(t.dtype == torch.float16 for t in (z, *outputs))


class LogWeights(NamedTuple):
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
    estimator: str = "iwae",
    noise: str = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> LogWeights:
    r"""Return log importance weights of k draws, in two parts, to build your own objective from.

    .. math:: \log w_k = \log p(x|z_k) + \big[\log p(z_k) - \log q(z_k|x)\big], \quad z_k \sim q(z|x)

    Args:
        x: data [B, *event], as in :func:`elbo`.
        q: the encoder's output, as in :func:`elbo`.
        decoder: maps z [N, D] to the likelihood's parameters, as in :func:`elbo`.
        k: draws per example.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        prior: as in :func:`elbo`. Default: N(0, I), or the hierarchy that produced q.
        estimator: gradient that reaches q through the log-ratio, as in :func:`iwae`. ``"dreg"`` takes its
            weights from the upstream gradient of the log-ratio: it is correct under one log-mean-exp over
            these k draws. Default ``"iwae"``.
        noise: ``"philox"`` (default) or ``"qmc"``, as in :func:`iwae`. With ``"qmc"`` the k draws are one
            randomised point set; subsets may be point sets too, such as the first 2^m draws.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder and prior, [B, ...], as in :func:`elbo`.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        :class:`LogWeights` (log_likelihood, log_ratio), each [K, B].

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
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size_factor, context))
    k = check_count("k", k, "the importance samples per example")
    check_choice("estimator", estimator, ESTIMATORS)
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(k, inputs.q.batch, 0, row_offset)
    if estimator == "dreg":
        _check_rows_apart(inputs.decoder, k, "estimator='dreg'")
    seed = seed_of(noise, draw_seed(inputs.q.device, generator))
    z, log_ratio = draw_ratio(inputs.q, inputs.prior, k, seed, row_offset, estimator)
    return LogWeights(inputs.log_likelihood(z.unflatten(0, (k, -1))), log_ratio)


# Small tensors that a chunk leaves in the graph lie between its activations. Freed activations leave holes in
# the heap that are too small for the next chunk's, so the heap grows with k. Trimming every few chunks, in
# both passes, returns the pages of these holes to the system.
_CHUNKS_PER_TRIM = 8


def _trim(device: torch.device) -> None:
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None on other systems."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def _chunked(
    inputs: Inputs,
    seed: Tensor,
    k: int,
    k_chunk: int,
    route: str,
    row_offset: int,
    seen: Callable[[Tensor, list[Tensor]], None] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute log p(x|z) and log p(z) − log q(z|x), each [K, B], in chunks that recompute activations.

    The third result, [K, B] or None, receives the gradient for q in its backward pass.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "k_chunk does not work under torch.func transforms, which cannot drop activations; leave it out, "
            "or differentiate with backward() or torch.autograd.grad"
        )

    # checkpoint keeps the random state (used by dropout) only of devices on which it is passed a tensor.
    def draw(start: int, on_device: Tensor) -> list[Tensor]:
        if start // k_chunk % _CHUNKS_PER_TRIM == _CHUNKS_PER_TRIM - 1 and not torch.compiler.is_compiling():
            _trim(inputs.device)
        z, *drawn = draw_chunk(
            inputs.q, inputs.prior, min(k_chunk, k - start), seed, start, row_offset, route
        )
        return [inputs.log_likelihood(z, seen), *(t for t in drawn if t is not None)]

    if not torch.compiler.is_compiling():
        aside = inputs.beside or Beside()
        read = {
            "x": inputs.x, "q": inputs.q, "prior": inputs.prior, "decoder": inputs.decoder,
            "likelihood": inputs.likelihood, "mask": aside.mask, "size_factor": aside.size_factor,
            "context": aside.context,
        }  # fmt: skip
        draw = repeatable(draw, read)
        # Recomputation may run in an autograd thread, and must use the backend of the first pass.
        draw = functools.partial(_backend.run_on, _backend.chosen(), draw)
    on_device = tensors(inputs.x)[0]
    # The second pass runs to its end, to compare its results with the first's.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else set_checkpoint_early_stop(False):
        parts = [checkpoint(draw, start, on_device, use_reentrant=False) for start in range(0, k, k_chunk)]
    log_likelihood, log_ratio, *told = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_likelihood, log_ratio, told[0] if told else None


@teaches
@torch.no_grad()
def log_marginal(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 5000,
    k_chunk: int | None = None,
    noise: str = "philox",
    proposal: str | Proposal = "posterior",
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
            more; ``"defensive"``, ``"inflated"`` or ``"heavy"``; or an object of :mod:`fastvae.proposals`.
        likelihood: name or object, as in :func:`elbo`. Default ``"gaussian"``.
        prior: as in :func:`elbo`. Default: N(0, I), or the hierarchy that produced q.
        mask: observed elements of x, bool, [B, *event] or [*event], as in :func:`elbo`.
        size_factor: size factors [B], as in :func:`elbo`.
        context: conditioning input of the decoder and prior, [B, ...], as in :func:`elbo`.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address, as in :func:`elbo`. Default 0.

    Returns:
        :class:`LogMarginal`, each field [B]. The standard errors are NaN for k=1. Trust them and the
        estimates only while Pareto k̂ (:func:`fastvae.weights.pareto_khat`) is below 0.7; above that, the
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
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Beside.of(mask, size_factor, context))
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
    beside = Beside.of(mask, size_factor, context)
    inputs = Inputs.read(x, q, decoder, likelihood, None, beside, compared=False)
    k = check_count("k", k, "the draws per example")
    chunks = Chunks(k_chunk)
    if type(row_offset) is not int or row_offset:
        _, row_offset = check_address(k, inputs.q.batch, 0, row_offset)
    seed = draw_seed(inputs.q.device, generator)
    w = _stream.weights(inputs, seed, 0, k, chunks, 1, ratio=False, row_offset=row_offset)
    return w.log_px.to(w.maximum.dtype)


_KLS = ("analytic", "mc")
_FREE_BITS_PER = ("batch", "example")
_REDUCTIONS = ("mean", "sum", "none")
