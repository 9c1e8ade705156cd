"""Objective beta_tc: an ELBO whose KL is decomposed, with a weight for the total correlation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, check_weight, first_row
from ..core.hints import teaches
from ..core.nested import Conditioning
from ..core.options import REDUCTIONS, SAMPLINGS, Reduction, Sampling
from ..core.records import registered
from ..core.reductions import times
from ..distributions.base import Distribution, is_family
from ..distributions.draws import describe, draw_ratio, rsample_as_stored
from ..distributions.mixture import log_aggregate
from ..distributions.normal import DiagonalNormal
from ..inputs.batch import Inputs
from ..likelihoods import Likelihood
from ..ops.reduce import BoundReduction
from ..random import draw_seed
from .options import Terms
from .reduce import reduce_draws

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import BetaTCArguments, Data, Decoder

__all__ = ["BetaTCTerms", "beta_tc"]


@registered
@dataclass(frozen=True, eq=False)
class BetaTCTerms(Terms):
    """Terms of :func:`fastvae.beta_tc`, whose ``kl`` is the sum of three parts.

    The parts are means over the draws, without weights, each [B], in nats.

    Attributes:
        mutual_information: log q(z|x) − log q(z).
        total_correlation: log q(z) − Σ_d log q(z_d).
        dimension_kl: Σ_d log q(z_d) − log p(z).
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor


@overload
def beta_tc(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[False] = False, **options: Unpack[BetaTCArguments]
) -> Tensor: ...
@overload
def beta_tc(
    x: Data, q: Any, decoder: Decoder, *, terms: Literal[True], **options: Unpack[BetaTCArguments]
) -> BetaTCTerms: ...
@overload
def beta_tc(
    x: Data, q: Any, decoder: Decoder, *, terms: bool, **options: Unpack[BetaTCArguments]
) -> Tensor | BetaTCTerms: ...
@teaches
def beta_tc(
    x: Tensor | Mapping[str, Any],
    q: Any,
    decoder: Callable[..., Any],
    *,
    beta: float | Tensor = 6.0,
    alpha: float | Tensor = 1.0,
    gamma: float | Tensor = 1.0,
    dataset_size: int | None = None,
    sampling: Sampling = "weighted",
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    k: int = 1,
    mask: Any = None,
    size_factor: Any = None,
    context: Any = None,
    reduction: Reduction = "mean",
    terms: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    shared_noise: bool = False,
) -> Tensor | BetaTCTerms:
    r"""Return the β-TCVAE objective, an ELBO with a separate weight for the total correlation of z.

    .. math:: E_q \log p(x|z) - α\, I_q(x; z) - β\, \mathrm{KL}\Big(q(z) \Big\| \prod_d q(z_d)\Big)
              - γ \sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d)),
              \quad q(z) \approx \frac{1}{N B} \sum_{b=1}^{B} q(z|x_b)

    It is to be maximised, and estimated from draws :math:`z \sim q(z|x)`. The aggregate posterior and its
    marginals are mixtures of this batch's posteriors; gradients reach q through z and through the mixtures.
    With α = β = γ = 1 it is the ELBO with ``kl="mc"``, for any batch.

    Args:
        x: data [B, *event]; a dict of such tensors for :class:`fastvae.likelihoods.Joint`. A NaN makes its
            example's result NaN, unless ``mask`` excludes it.
        q: the encoder's output: a tensor [B, 2 D], mu and logvar concatenated; a pair (mu, logvar), each [B,
            D]; an object or mapping with these names, such as the outputs of diffusers and pythae; a
            torch.distributions object [B, D] with rsample; or a :class:`fastvae.distributions.Distribution`.
            Latents may be shaped: [B, C, H, W] in place of [B, D], or a tensor [B, 2 C, H, W] whose channels
            are mu, then logvar. It must be normal, with a diagonal, full or low-rank covariance. Processes
            that split a batch mix the posteriors of their rows only.
        decoder: maps z [N, D] to the likelihood's parameters, N rows each, with N = k·B, sample-major: a
            tensor or a tuple; a mapping or an object that names them, such as the outputs of diffusers and
            pythae; or a torch.distributions object of the likelihood's family. Shaped latents are passed as
            [N, C, H, W]. With a ``context`` it is called as ``decoder(z, context)``.
        beta: weight of the total correlation, a number or a tensor, [] or [B]. Default 6.
        alpha: weight of the mutual information of x and z, like beta. Default 1.
        gamma: weight of the dimensions' KL to the prior, like beta. Default 1.
        dataset_size: N, the number of examples of the data set. In weighted sampling it only adds a constant
            to each part: log N to the mutual information, (D − 1) log N to the total correlation, −D log N
            to the dimensions' KL; no gradient depends on it. Default: 1, which treats this batch as the data
            set: the mutual information is then at most log B, and the total correlation is not dominated by
            a constant. Stratified sampling requires it, at least B.
        sampling: ``"weighted"`` (default), the formula above, or ``"stratified"``, the paper's
            minibatch-stratified sampling: in the estimate of q(z) for an example's draws, its own posterior
            has weight 1/N, the next example's (N − B + 1)/(N (B − 1)), and all others' 1/(B − 1). The
            weights sum to 1, and the mean of this q(z) over random batches is that of the data set;
            gradients depend on N. It needs batches of at least two examples, in random order.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q. It is the same for all examples; the
            last term is the dimensions' KL only if the prior's dimensions are independent.
        k: draws of z per example. Default 1.
        mask: bool, [B, *event] or [*event], True for observed elements of x. The others are ignored, even
            where x is NaN. Give the encoder an x without them, such as ``torch.where(mask, x, 0)``: this is
            MIWAE's bound (Mattei & Frellsen 2019). Default: all are observed.
        size_factor: size factors [B] that multiply the mean of counts, such as library sizes. Default: none.
        context: conditioning input of the decoder, and of a prior that is a function: a tensor [B, ...] or a
            dict of such tensors (labels, batches, positions), repeated for each sample. Default: none.
        reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"`` for [B], to weight and sum
            yourself. Events are always summed.
        terms: return :class:`BetaTCTerms`, the :class:`fastvae.Terms` of an ELBO and the three parts of its
            KL, each [B] for any reduction.
        generator: source of the noise. Default: torch's global random state.
        row_offset: index of x's first row in the noise's address. Processes that share a seed and split a
            batch each pass the index of their first row, such as ``rank * len(x)``, to draw the noise that
            one process draws for the whole batch; without it they all draw the same noise. Default 0.
        shared_noise: give all examples the noise of row 0, so that differences between the results of similar
            examples, such as an image and its perturbation, lose the noise they have in common. Errors then
            no longer average out over examples, so leave it off in training. Default False.

    Returns:
        A number in nats, or [B], or BetaTCTerms.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Chen, Li, Grosse & Duvenaud, Isolating Sources of Disentanglement in VAEs, 2018, eq. 2, 4 and 5,
        and appendix C for the sampling.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> x = torch.rand(16, 8)
        >>> bound = fastvae.beta_tc(x, encoder(x), decoder, beta=6.0, likelihood="bernoulli")
        >>> (-bound).backward()
    """
    inputs = Inputs.read(x, q, decoder, likelihood, prior, Conditioning.of(mask, size_factor, context))
    q, prior = inputs.q, inputs.prior
    k = check_count("k", k, "the draws of z per example")
    dataset_size = _read_sampling(sampling, dataset_size, q.batch)
    weights = [
        check_weight(name, value, f"the weight of {what}", q, per_row=True)
        for name, value, what in (
            ("alpha", alpha, "the mutual information"),
            ("beta", beta, "the total correlation"),
            ("gamma", gamma, "the dimensions' KL"),
        )
    ]
    check_choice("reduction", reduction, REDUCTIONS)
    row = first_row(row_offset, shared_noise, k, q.batch)
    if prior.per_row:
        raise ValueError(
            "beta_tc needs one prior for all examples, which the aggregate posterior is compared with; the "
            "one given has parameters for each example, or is a function of the context"
        )
    seed = draw_seed(q.device, generator)
    size = dataset_size if sampling == "stratified" else None
    log_n = math.log(dataset_size) if size is None else 0.0
    means: list[Tensor] = []
    if not terms and _one_ratio(q, weights):
        z, log_ratio = draw_ratio(q, prior, k, seed, row)
        whole, dimensions = _aggregate(q, z, size, log_n)
        correlation = (whole - dimensions).reshape(log_ratio.shape)
        term = _less(times(weights[0], log_ratio), weights[1] - weights[0], correlation)
    else:
        z, log_q = rsample_as_stored(q, k, seed, row_offset=row)
        whole, dimensions = _aggregate(q, z, size, log_n)
        log_p = prior.log_prob(z)
        parts = log_q - whole, whole - dimensions, dimensions - log_p
        weighted = [times(weight, part) for weight, part in zip(weights, parts, strict=True)]
        term = -(weighted[0] + weighted[1] + weighted[2])
        means = [part.mean(0) for part in (log_q - log_p, *parts)]
        z = z.flatten(0, 1)
    how = BoundReduction(1.0, "mean", "none" if terms else reduction)
    bound, log_likelihood, output = reduce_draws(inputs, z, term, k, None, how, terms)
    if not terms:
        return bound
    kl, *means = means
    z = inputs.shaped(z, k)
    return BetaTCTerms(bound, log_likelihood, kl, z, output, *means)  # type: ignore[arg-type]


def _one_ratio(q: Distribution, weights: list[float | Tensor]) -> bool:
    """Return True if the term is α (log p − log q) − (β − α) of the total correlation's part: α = γ.

    The ratio is computed with the draw. Half precision compares densities at the stored z instead.
    """
    alpha, _, gamma = weights
    if isinstance(alpha, Tensor) or isinstance(gamma, Tensor) or alpha != gamma:
        return False
    return is_family(q, DiagonalNormal) and q.mu.dtype.itemsize > 2


def _less(term: Tensor, factor: float | Tensor, part: Tensor) -> Tensor:
    """Return term - factor part, where 0 times infinity is 0."""
    if isinstance(factor, Tensor) or factor == 0:
        return term - times(factor, part)
    return torch.sub(term, part, alpha=factor)


def _aggregate(q: Distribution, z: Tensor, dataset_size: int | None, log_n: float) -> tuple[Tensor, Tensor]:
    """Return log q(z) and the sum of the marginals' log q(z_d), less log N for each density."""
    whole, each = log_aggregate([q], z, dataset_size)
    if each is None:
        raise ValueError(
            "beta_tc needs the marginal distribution of each dimension, which is known of normal posteriors; "
            f"q is {describe(q)}. Use fastvae.distributions.DiagonalNormal, FullNormal or LowRankNormal"
        )
    dimensions = each.sum(-1)
    if log_n == 0:
        return whole, dimensions
    return whole - log_n, dimensions - each.shape[-1] * log_n


def _read_sampling(sampling: Sampling, dataset_size: int | None, batch: int) -> int:
    """Validate the sampling, and return N, which is 1 by default."""
    check_choice("sampling", sampling, SAMPLINGS)
    if dataset_size is not None:
        dataset_size = check_count("dataset_size", dataset_size, "the examples of the whole data set")
    if sampling == "weighted":
        return 1 if dataset_size is None else dataset_size
    if dataset_size is None:
        raise ValueError(
            'sampling="stratified" needs dataset_size, the number of examples of the whole data set; pass '
            'dataset_size=len(dataset), or sampling="weighted"'
        )
    if dataset_size < batch:
        raise ValueError(
            f"dataset_size is {dataset_size}, less than the {batch} examples of this batch; expected the "
            "number of examples of the whole data set"
        )
    if batch == 1:
        raise ValueError(
            'sampling="stratified" needs at least two examples in a batch, and this one has 1; leave out the '
            "last, smaller batch of an epoch (drop_last=True of torch's DataLoader)"
        )
    return dataset_size
