"""Evidence lower bound, from one fused draw and one fused reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, check_weight, first_row, may_look
from ..core.hints import teaches_with
from ..core.nested import Conditioning
from ..core.options import FREE_BITS_PER, KL, KLS, REDUCTIONS, FreeBitsPer, Reduction
from ..core.torch_private import functorch_is_active
from ..distributions import Distribution
from ..distributions.draws import describe, draw_kl, draw_ratio, draw_strata, say_monte_carlo
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..ops.reduce import BoundReduction
from ..random import draw_seed
from .options import Terms
from .reduce import reduce_draws, reduce_samples
from .traced import traced_elbo
from .usual import usual_bound

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import Data, Decoder, ElboArguments


@overload
def elbo(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[False] = False, **options: Unpack[ElboArguments]
) -> Tensor: ...
@overload
def elbo(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[True], **options: Unpack[ElboArguments]
) -> Terms: ...
@overload
def elbo(
    x: Data, q: Any, decoder: Decoder, *, terms: bool, **options: Unpack[ElboArguments]
) -> Tensor | Terms: ...
@teaches_with(traced_elbo)
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
    free_bits_per: FreeBitsPer = "batch",
    kl: KL = "analytic",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: Reduction = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> Tensor | Terms:
    r"""Return the ELBO, to be maximised.

    Evidence lower bound with K draws per example:

    .. math:: \frac{1}{K} \sum_{k=1}^{K} \log p(x|z_k) - β\, \mathrm{KL}(q(z|x) \,\|\, p(z)),
              \quad z_k \sim q(z|x)

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
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q.
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
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B], to weight and sum
            yourself. Events are always summed. A weight of 0 does not silence a bound that is NaN or
            infinite; ``torch.where(weights > 0, bound, 0) * weights`` does. If x is not finite there, replace
            it with ``torch.where`` before the encoder as well, or gradients become NaN.
        terms: return :class:`fastvae.Terms` (bound, log_likelihood, kl, z, output): the first three are [B]
            for any reduction, kl is not multiplied by β, and further losses on z and output train q and the
            decoder.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.
        shared_noise: give all examples the noise of row 0, so that differences between the results of similar
            examples, such as an image and its perturbation, lose the noise they have in common. Errors then
            no longer average out over examples, so leave it off in training. Default False.

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
    if (
        (mask is None and size_factor is None and context is None and not terms)
        and not torch.compiler.is_compiling()
        and (type(k) is int and k > 0 and type(row_offset) is int and row_offset == 0)
        and shared_noise is False
        and (type(beta) is float and 0 < beta < math.inf and type(free_bits) is float and free_bits == 0)
        and (kl == "analytic" and free_bits_per in FREE_BITS_PER and reduction in REDUCTIONS)
    ):
        how = _MEAN[reduction] if beta == 1 else BoundReduction(-beta, "mean", reduction)
        usual = usual_bound(x, q, decoder, likelihood, prior, k, how, None, generator)
        if usual is not None:
            return usual
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
    q, prior = inputs.q, inputs.prior
    k, beta, free_bits = _read_options(q, k, beta, free_bits, free_bits_per, kl, reduction)
    # Reading a tensor's value would synchronise with the device.
    has_free_bits = free_bits > 0 if type(free_bits) is float else True
    if has_free_bits and kl == "mc":
        raise ValueError(
            "free_bits needs the KL of each dimension, which kl='mc' does not have; use kl='analytic'"
        )
    row = first_row(row_offset, shared_noise, k, q.batch)
    seed = draw_seed(inputs.q.device, generator)
    coefficient, factor = _weight_of_kl(beta, q)
    shares = None
    drawn = draw_kl(q, prior, k, seed, row, has_free_bits) if kl == "analytic" else None
    if drawn is not None:
        z, term = drawn
        if has_free_bits:
            term = _bounded_below(term, q.batch, free_bits, free_bits_per)
        coefficient = -coefficient
    else:
        if kl == "analytic":
            _without_closed_form(q, prior, has_free_bits)
        if q.strata > 1:
            z, term, shares = draw_strata(q, prior, k, seed, row)
        else:
            z, term = draw_ratio(q, prior, k, seed, row)
    if coefficient == 0:
        term = _unweighted(term)
    how = BoundReduction(coefficient, "mean", "none" if terms else reduction)
    if shares is None:
        bound, log_likelihood, output = reduce_draws(inputs, z, term, k, factor, how, terms)
    else:
        z_rows = z.flatten(0, 1)
        output = inputs.output(z_rows, k) if terms else None
        log_likelihood = inputs.log_likelihood(z, output=output)
        log_likelihood, term = (torch.where(shares == 0, 0.0, shares * t) for t in (log_likelihood, term))
        bound, log_likelihood = reduce_samples(log_likelihood, term, factor, how)
        z = z_rows
    if not terms:
        return bound
    term = term if term.dim() == 1 else term.mean(0)
    divergence = -term if drawn is None else term
    return Terms(bound, log_likelihood, divergence, inputs.shaped(z, k), output)  # type: ignore[arg-type]


_MEAN = {reduction: BoundReduction(-1.0, "mean", reduction) for reduction in REDUCTIONS}


def _read_options(
    q: Distribution,
    k: int,
    beta: float | Tensor,
    free_bits: float | Tensor,
    free_bits_per: FreeBitsPer,
    kl: KL,
    reduction: Reduction,
) -> tuple[int, float | Tensor, float | Tensor]:
    """Validate these options, and return k, beta and free_bits."""
    # Fast path: skip validation of common argument types.
    if type(k) is not int or k < 1:
        k = check_count("k", k, "the draws of z per example")
    if type(beta) is not float or not 0 <= beta < math.inf:
        beta = check_weight("beta", beta, "the weight of the KL", q, per_row=True)
    if type(free_bits) is not float or not 0 <= free_bits < math.inf:
        free_bits = check_weight("free_bits", free_bits, "in nats per dimension", q, per_row=False)
    if free_bits_per not in FREE_BITS_PER:
        check_choice("free_bits_per", free_bits_per, FREE_BITS_PER)
    if kl not in KLS:
        check_choice("kl", kl, KLS)
    if reduction not in REDUCTIONS:
        check_choice("reduction", reduction, REDUCTIONS)
    return k, beta, free_bits


def _weight_of_kl(beta: float | Tensor, q: Distribution) -> tuple[float, Tensor | None]:
    """Return β as a number of the fused op and, if it is not constant, a tensor."""
    if type(beta) is float and not (beta != 1 and torch.compiler.is_compiling()):
        return beta, None
    # Compiled code specialises on an op's number, but not on a tensor's value.
    if isinstance(beta, Tensor):
        return 1.0, beta
    return 1.0, beta * torch.ones((), dtype=torch.float64, device=q.device)


def _bounded_below(kl: Tensor, batch: int, free_bits: float | Tensor, per: FreeBitsPer) -> Tensor:
    """Sum a KL [B, D] over the dimensions, each of which counts as at least ``free_bits``: [B]."""
    if per == "batch":
        return kl.mean(0).clamp(min=free_bits).sum().expand(batch)
    return kl.clamp(min=free_bits).sum(1)


def _unweighted(term: Tensor) -> Tensor:
    """Detach a KL of weight zero if it is not finite, since autograd turns 0 · inf into NaN."""
    if may_look(term) and not functorch_is_active() and not bool(term.isfinite().all()):
        return term.detach()
    return term


def _without_closed_form(q: Distribution, prior: Distribution, has_free_bits: bool) -> None:
    if has_free_bits:
        raise ValueError(
            "free_bits needs the KL of each dimension in closed form, which is not known for q = "
            f"{describe(q)} and prior = {describe(prior)}; register one with "
            "fastvae.distributions.register_kl, or leave "
            "free_bits out"
        )
    say_monte_carlo(q, prior)
