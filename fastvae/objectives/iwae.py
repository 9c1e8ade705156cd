"""Objectives iwae and bound: importance-weighted bounds, composed of the fused ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, first_row
from ..core.hints import teaches, teaches_with
from ..core.nested import Conditioning
from ..core.options import ESTIMATORS, REDUCTIONS, Estimator, Noise, Reduction
from ..distributions.draws import describe, draw_chunk, draw_ratio
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..ops.reduce import BoundReduction
from ..random import draw_seed, seed_of
from .bounds import IWAE, Bound
from .chunks import chunked
from .from_weights import bound_from_weights
from .options import Terms
from .reduce import reduce_draws, reduce_samples
from .row_gradients import Float16Gradients, check_rows_apart
from .traced import traced_iwae
from .usual import usual_bound

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import BoundArguments, Data, Decoder, IwaeArguments


@overload
def iwae(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[False] = False, **options: Unpack[IwaeArguments]
) -> Tensor: ...
@overload
def iwae(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[True], **options: Unpack[IwaeArguments]
) -> Terms: ...
@overload
def iwae(
    x: Data, q: Any, decoder: Decoder, *, terms: bool, **options: Unpack[IwaeArguments]
) -> Tensor | Terms: ...
@teaches_with(traced_iwae)
def iwae(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    k: int = 50,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    estimator: Estimator = "iwae",
    k_chunk: int | None = None,
    noise: Noise = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: Reduction = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> Tensor | Terms:
    r"""Return the importance-weighted bound (IWAE), to be maximised.

    It is the ELBO for k=1 and rises to log p(x) with k:

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} w_k, \quad
              \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    Groups of samples (MIWAE) and other powers of the weights (VR-IWAE) are :class:`fastvae.bounds.IWAE` of
    :func:`bound`.

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
        k: importance samples per example. Default 50.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q.
        estimator: gradient that reaches q. The value and the decoder's gradient do not depend on it.
            ``"iwae"`` (default) is the bound's derivative, whose signal-to-noise ratio falls with k
            (Rainforth et al. 2018). ``"dreg"`` is doubly reparameterised, unbiased for the same derivative;
            its signal-to-noise ratio rises with k. It weights the gradient at each sample of z separately,
            and so needs a decoder that treats rows independently: a BatchNorm in training mode is refused
            where it is found, and must not hide in a function. ``"stl"`` drops the score of q: unbiased for
            k=1, where it vanishes at the exact posterior, biased for k>1.
        k_chunk: samples per chunk, to train in the memory of one chunk. Activations are dropped and
            recomputed in the backward pass with the same noise (including the decoder's, such as dropout), so
            that the gradient is that of all samples, at the cost of one more forward pass. The decoder is
            called with N = k_chunk·B; batch statistics, as in BatchNorm, are computed per chunk. Default: all
            k at once.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``, one randomised quasi-Monte-Carlo point
            set for each example (:mod:`fastvae.random`): an unbiased estimate of p(x) with less variance
            where few latents matter, hence a tighter bound; best with k a power of 2. These draws use
            composed operations, not the fused op.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B], to weight and sum
            yourself. Events are always summed.
        terms: return :class:`fastvae.Terms`: the bound to train on; log_likelihood and kl, the means of log
            p(x|z_k) and of log q(z_k|x) − log p(z_k) over the draws, detached, for logging, each [B] for any
            reduction; and z and output, for further losses, None with ``k_chunk`` and ``"dreg"``.
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
        Burda, Grosse & Salakhutdinov 2016; Roeder, Wu & Duvenaud 2017; Tucker, Lawson, Gu & Maddison 2019.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> bound = fastvae.iwae(x, encoder(x), decoder, k=50, likelihood="bernoulli", estimator="dreg")
        >>> (-bound).backward()
    """
    how = _LOG_MEAN_EXP.get(reduction) if type(reduction) is str and k_chunk is None and not terms else None
    if how is not None and noise != "philox":
        how = None
    if (
        (how is not None and mask is None and size_factor is None and context is None)
        and not torch.compiler.is_compiling()
        and (type(k) is int and k > 0 and type(row_offset) is int and row_offset == 0)
        and shared_noise is False
        and estimator in _ONE_PASS
    ):
        usual = usual_bound(x, q, decoder, likelihood, prior, k, how, estimator, generator)
        if usual is not None:
            return usual
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
    if type(k) is not int or k < 1:
        k = check_count("k", k, "the importance samples per example")
    if estimator not in ESTIMATORS:
        check_choice("estimator", estimator, ESTIMATORS)
    row = first_row(row_offset, shared_noise, k, inputs.q.batch)
    if how is not None:
        # Fast path: call the two ops directly.
        if estimator == "dreg":
            check_rows_apart(inputs.decoder, k, "estimator='dreg'")
        seed = draw_seed(inputs.q.device, generator)
        z, log_ratio = draw_ratio(inputs.q, inputs.prior, k, seed, row, estimator)
        return reduce_draws(inputs, z, log_ratio, k, None, how, False)[0]
    options = k_chunk, noise, reduction, terms, generator, row
    return _bound(inputs, _IWAE[estimator], None, k, *options)


# Estimators that need no check of the decoder.
_ONE_PASS = ("iwae", "stl")
_IWAE = {estimator: IWAE(estimator=estimator) for estimator in ESTIMATORS}
_LOG_MEAN_EXP = {reduction: BoundReduction(1.0, "log_mean_exp", reduction) for reduction in REDUCTIONS}


@overload
def bound(
    x: Data,
    q: Any,
    decoder: Decoder,
    objective: Bound,
    *,
    terms: Literal[False] = False,
    **options: Unpack[BoundArguments],
) -> Tensor: ...
@overload
def bound(
    x: Data,
    q: Any,
    decoder: Decoder,
    objective: Bound,
    *,
    terms: Literal[True],
    **options: Unpack[BoundArguments],
) -> Terms: ...
@overload
def bound(
    x: Data, q: Any, decoder: Decoder, objective: Bound, *, terms: bool, **options: Unpack[BoundArguments]
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
    noise: Noise = "philox",
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: Reduction = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> Tensor | Terms:
    r"""Return any bound of :mod:`fastvae.bounds`, to be maximised, optionally with another for the encoder.

    .. math:: F(\log w_1 … \log w_K), \quad
              \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

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
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q.
        k_chunk: samples per chunk, to train in the memory of one chunk. Activations are dropped and
            recomputed in the backward pass with the same noise (including the decoder's, such as dropout), so
            that the gradient is that of all samples, at the cost of one more forward pass. The decoder is
            called with N = k_chunk·B; batch statistics, as in BatchNorm, are computed per chunk. Default: all
            k at once.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``, one randomised quasi-Monte-Carlo point
            set for each example (:mod:`fastvae.random`): an unbiased estimate of p(x) with less variance
            where few latents matter, hence a tighter bound; best with k a power of 2. These draws use
            composed operations, not the fused op.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B], to weight and sum
            yourself. Events are always summed.
        terms: return :class:`fastvae.Terms`: the bound to train on; log_likelihood and kl, the means of log
            p(x|z_k) and of log q(z_k|x) − log p(z_k) over the draws, detached, for logging, each [B] for any
            reduction; and z and output, for further losses, None with ``k_chunk``, ``"dreg"`` and
            ``q_objective``.
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
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, and the references of
        each bound.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> tvo = fastvae.bounds.TVO()
        >>> (-fastvae.bound(x, encoder(x), decoder, tvo, k=20, likelihood="bernoulli")).backward()
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
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
    row = first_row(row_offset, shared_noise, k, inputs.q.batch)
    options = k_chunk, noise, reduction, terms, generator, row
    return _bound(inputs, objective, q_objective, k, *options)


def _bound(
    inputs: Inputs,
    objective: Bound,
    q_objective: Bound | None,
    draws: int,
    k_chunk: int | None,
    noise: Noise,
    reduction: Reduction,
    terms: bool,
    generator: torch.Generator | None,
    row: int,
) -> Tensor | Terms:
    if reduction not in REDUCTIONS:
        check_choice("reduction", reduction, REDUCTIONS)
    if k_chunk is not None:
        k_chunk = check_count("k_chunk", k_chunk, "the samples trained on at a time")
    seed = seed_of(noise, draw_seed(inputs.q.device, generator))
    how = objective.fused_reduction("none" if terms else reduction) if q_objective is None else None
    if inputs.q.strata > 1 and (how is None or not how.is_plain or how.over == "mean"):
        suffix = "" if q_objective is None else " with q_objective="
        raise ValueError(
            f"q = {describe(inputs.q)} is drawn from in strata, which {objective!r}{suffix} does not reduce; "
            "use iwae() or elbo()"
        )
    whole = k_chunk is None or k_chunk >= draws
    q_grad, z, output = None, None, None
    if (q_objective is not None and q_objective.route != "score") or objective.estimator == "dreg":
        check_rows_apart(
            inputs.decoder, draws, "q_objective=" if q_objective else f"estimator={objective.estimator!r}"
        )
    if how is not None and whole:
        dreg = (how.alpha if how.over == "log_mean_exp" else 1.0), how.groups
        z, log_ratio = draw_ratio(inputs.q, inputs.prior, draws, seed, row, objective.estimator, *dreg)
        value, log_likelihood, output = reduce_draws(inputs, z, log_ratio, draws, None, how, terms)
    else:
        source = objective if q_objective is None else q_objective
        tied = q_objective is None and source.estimator in ("iwae", "stl")
        route = source.estimator if tied else source.route
        narrow = Float16Gradients(inputs)
        if whole:
            z, log_ratio, q_grad = draw_chunk(inputs.q, inputs.prior, draws, seed, 0, row, route)
            output = inputs.output(z.flatten(0, 1), draws) if terms else None
            log_likelihood = inputs.log_likelihood(z, narrow.see, output)
            z = z.flatten(0, 1)
        else:
            assert k_chunk is not None
            # A compiled checkpoint cannot mutate outer state, so only parameters and autocast are examined.
            see = None if torch.compiler.is_compiling() else narrow.see
            drawn = chunked(inputs, seed, draws, k_chunk, route, row, see)
            log_likelihood, log_ratio, q_grad = drawn
        if q_grad is None and how is not None and how.is_plain:
            value, log_likelihood = reduce_samples(log_likelihood, log_ratio, None, how)
        else:
            value = bound_from_weights(
                log_likelihood, log_ratio, q_grad, objective, q_objective, narrow.found
            )
            log_likelihood = log_likelihood.detach().mean(0)
            value = value if terms or reduction == "none" else getattr(value, reduction)()
    if not terms:
        return value
    if z is None or q_objective is not None or objective.estimator not in ("iwae", "stl"):
        # The gradient of a draw is rescaled on its way to q, and so would be that of another loss.
        z = output = None
    z = None if z is None else inputs.shaped(z, draws)
    parts = log_likelihood.detach(), -log_ratio.detach().mean(0)  # type: ignore[union-attr]
    return Terms(value, *parts, z, output)
