r"""Bounds of log p(x) over log weights [K, B], for :func:`fastvae.bound`: each is a reduction over the
samples, and says how much of a sample's gradient reaches the decoder and how much of it the encoder.

With the log weights :math:`\ell_k = \log w_k` of one example a bound is a function :math:`F(\ell_1 …
\ell_K)`, whose derivatives :math:`g_k = \partial F / \partial \ell_k` are what the decoder, the likelihood
and the prior learn by: :math:`\sum_k g_k \nabla_θ \log p(x, z_k)`. What reaches the encoder is an estimate of

.. math:: \nabla_φ \mathbb{E}[F] = \mathbb{E}\Big[ \sum_k a_k \frac{\partial \ell_k}{\partial z_k}
          \frac{\partial z_k}{\partial φ} + s_k \nabla_φ \log q(z_k|x) \Big]

with any of these pairs, by the name of the ``estimator``:

- ``"iwae"``: :math:`a_k = g_k, s_k = -g_k`, the derivative of F through z and through q's density;
- ``"stl"``: :math:`a_k = g_k, s_k = 0`, without the score, which is unbiased where F is a mean, and biased
  elsewhere (Roeder et al. 2017);
- ``"dreg"``: :math:`a_k = g_k - \partial^2 F / \partial \ell_k^2, s_k = 0`, doubly reparameterised: the
  score is taken through z as well, exactly, by :math:`\mathbb{E}_q[f(z) \nabla_φ \log q(z)] =
  \mathbb{E}_q[f'(z)\, \partial z / \partial φ]` for :math:`f = g_k` as a function of its own :math:`z_k`
  (Tucker et al. 2019, whose :math:`\tilde w_k^2` this is for IWAE; Daudel et al. 2023 for the power mean).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_number, shape_of
from .ops.latent import ESTIMATORS
from .ops.weigh import Weighing
from .reference.importance import shift
from .reference.weigh import power_mean, without_denormals

__all__ = ["CIWAE", "IWAE", "TVO", "Bound", "Jackknife", "UStatistic", "WakePhi"]


class Bound:
    r"""A bound of log p(x): a reduction of log weights [K, B] to [B].

    Subclass it for one of your own: :meth:`value` is enough, and its derivative is taken by autograd. For the
    encoder it serves with ``estimator="iwae"`` and ``"stl"``; ``"dreg"`` needs :meth:`paths` too.

    Args:
        estimator: the gradient that reaches q: ``"iwae"``, ``"stl"`` or ``"dreg"``; see
            :mod:`fastvae.bounds`.

    Raises:
        ValueError: for an unknown estimator, or one that this bound does not have.

    Example:
        >>> import torch, fastvae
        >>> class Median(fastvae.bounds.Bound):
        ...     def value(self, log_w):
        ...         return log_w.median(0).values
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> fastvae.bound(x, q, decoder, Median(), k=5, likelihood="bernoulli").shape
        torch.Size([])
    """

    estimators: tuple[str, ...] = ESTIMATORS

    def __init__(self, estimator: str = "iwae"):
        known = tuple(e for e in self.estimators if e != "dreg" or type(self).paths is not Bound.paths)
        check_choice("estimator", estimator, known)
        self.estimator = estimator

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def check(self, k: int) -> None:
        """That it can be of so many samples; raises ValueError."""

    def value(self, log_w: Tensor) -> Tensor:
        """The bound [B] of log weights [K, B], float64."""
        raise NotImplementedError(f"{type(self).__name__} has no value(log_w), the bound [B] of log_w [K, B]")

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """The bound [B], and its derivatives g [K, B] by the log weights; all float64."""

        def total(log_w: Tensor) -> tuple[Tensor, Tensor]:
            value = self.value(log_w)
            if not isinstance(value, Tensor) or value.shape != log_w.shape[1:]:
                came = shape_of(value) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(self).__name__}.value returned {came} for log_w {shape_of(log_w)}; expected the "
                    f"bound of each example, [B] = {list(log_w.shape[1:])}"
                )
            return value.sum(), value

        grad, value = torch.func.grad(total, has_aux=True)(log_w)
        return value.detach(), grad

    def paths(self, log_w: Tensor) -> Tensor:
        """DReG's a [K, B]: the derivatives less the second derivatives, each by its own log weight."""
        raise NotImplementedError(f"{type(self).__name__} has no paths(log_w), which 'dreg' needs")

    # What objectives ask.

    def weighing(self, reduction: str) -> Weighing | None:
        """As the fused ops have it, where they do."""
        return None

    @property
    def route(self) -> str:
        """How what is told reaches q: a route of :mod:`fastvae.distributions.draws`."""
        return {"iwae": "tied", "stl": "paths", "dreg": "paths"}.get(self.estimator, "score")

    def told(self, log_w: Tensor) -> Tensor:
        """What is sent along its route, [K, B]: the a, or the s of one that takes the score alone."""
        return self.paths(log_w) if self.estimator == "dreg" else self.reduce(log_w)[1]


class IWAE(Bound):
    r"""The importance-weighted bound, of M groups of the samples, and of order 1 - α.

    .. math:: \frac{1}{M} \sum_{m=1}^{M} \frac{1}{1 - α} \log \frac{1}{K} \sum_{k=1}^{K} w_{mk}^{1 - α}

    M = 1, α = 0 is IWAE; M > 1 is MIWAE; α ≠ 0 is the VR-IWAE bound, a Rényi bound that is differentiated
    through its samples; α = 1 is the ELBO by Monte Carlo. It falls in α and rises in K.

    Args:
        m: groups of samples next to each other; it must divide their number.
        alpha: α, a number or a tensor [], whose value is no part of compiled code.
        estimator: ``"iwae"``, ``"dreg"`` (:math:`a = α \tilde w + (1 - α) \tilde w^2`) or ``"stl"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    References:
        Burda, Grosse & Salakhutdinov 2016; Rainforth et al., Tighter Variational Bounds are Not Necessarily
        Better, 2018 (MIWAE); Li & Turner, Rényi Divergence Variational Inference, 2016; Daudel,
        Benton, Shi & Doucet, Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders,
        2023.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> piwae = dict(objective=fastvae.bounds.IWAE(), encoder=fastvae.bounds.IWAE(m=8))
        >>> fastvae.bound(x, q, decoder, **piwae, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, m: int = 1, alpha: float | Tensor = 0.0, estimator: str = "iwae"):
        self.m = check_count("m", m, "the groups of samples")
        self.alpha = check_alpha(alpha)
        super().__init__(estimator)

    def check(self, k: int) -> None:
        _check_divides("m", self.m, k)

    @property
    def is_mean(self) -> bool:
        return not isinstance(self.alpha, Tensor) and self.alpha == 1

    def weighing(self, reduction: str) -> Weighing | None:
        if isinstance(self.alpha, Tensor):
            return None
        if self.is_mean:
            return Weighing(1.0, "mean", reduction)
        return Weighing(1.0, "log_mean_exp", reduction, self.alpha, self.m)

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_mean:
            return log_w.mean(0), torch.full_like(log_w, 1 / log_w.shape[0])
        return power_mean(log_w, self.alpha, self.m)

    def paths(self, log_w: Tensor) -> Tensor:
        weights = self.reduce(log_w)[1]
        return self.alpha * weights + (1 - self.alpha) * self.m * weights.square()


class CIWAE(Bound):
    r"""A convex combination of the ELBO and the importance-weighted bound, of the same samples.

    .. math:: β\, \frac{1}{K} \sum_k \log w_k + (1 - β) \log \frac{1}{K} \sum_k w_k

    Args:
        beta: β, the ELBO's share, in [0, 1].
        estimator: ``"iwae"``, ``"dreg"`` (:math:`a = β / K + (1 - β) \tilde w^2`) or ``"stl"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> ciwae = fastvae.bounds.CIWAE(0.5)
        >>> fastvae.bound(x, q, decoder, ciwae, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, beta: float = 0.5, estimator: str = "iwae"):
        self.beta = check_number("beta", beta, "the ELBO's share, in [0, 1]")
        if self.beta > 1:
            raise ValueError(f"beta must lie in [0, 1], the ELBO's share; got {beta}")
        super().__init__(estimator)

    def weighing(self, reduction: str) -> Weighing | None:
        # DReG's weights are not read off these.
        if self.estimator == "dreg":
            return None
        if self.beta == 1:
            return Weighing(1.0, "mean", reduction)
        return Weighing(1.0, "log_mean_exp", reduction, share=self.beta)

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        return power_mean(log_w, share=self.beta)

    def paths(self, log_w: Tensor) -> Tensor:
        return self.beta / log_w.shape[0] + (1 - self.beta) * power_mean(log_w)[1].square()


class UStatistic(Bound):
    r"""The mean of IWAE bounds of m samples over many ways to choose these among the K: the same bound as
    MIWAE of K/m groups, and the same expected gradient, with less variance.

    .. math:: \frac{1}{R\, K/m} \sum_{r=1}^{R} \sum_{S \in \text{blocks}_r}
              \log \frac{1}{m} \sum_{k \in S} w_k

    The K samples are divided into K/m blocks in R ways: with the samples as an m × K/m table, block i of way
    r has the samples :math:`(j, (i + r j) \bmod K/m), j = 0 … m - 1`, so that blocks of two ways share at
    most one sample where K/m is prime.

    Args:
        m: samples of a bound; it must divide their number K.
        permutations: R, the ways to divide them, at most K/m; R = 1 is MIWAE.
        estimator: ``"iwae"``, ``"dreg"`` or ``"stl"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    References:
        Burroni, Takatsu, Domke & Sheldon, U-Statistics for Importance-Weighted Variational Inference, 2023
        (arXiv 2302.13918), whose ways are drawn at random.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> of_eight = fastvae.bounds.UStatistic(8, permutations=4)
        >>> fastvae.bound(x, q, decoder, of_eight, k=56, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, m: int, permutations: int = 10, estimator: str = "iwae"):
        self.m = check_count("m", m, "the samples of a bound")
        self.permutations = check_count("permutations", permutations, "the ways to divide the samples")
        super().__init__(estimator)

    def check(self, k: int) -> None:
        _check_divides("m", self.m, k)
        if self.permutations > k // self.m:
            raise ValueError(
                f"permutations={self.permutations} is more than the k/m = {k // self.m} ways that "
                f"{k} samples are divided into blocks of {self.m}; use permutations={k // self.m} or fewer"
            )

    def _blocks(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples, of all blocks of all ways one after the other; and their log weights."""
        device, blocks = log_w.device, log_w.shape[0] // self.m
        way = torch.arange(self.permutations, device=device)[:, None, None]
        block = torch.arange(blocks, device=device)[:, None]
        place = torch.arange(self.m, device=device)
        index = (place * blocks + (block + way * place) % blocks).flatten()
        return index, log_w[index]

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        index, chosen = self._blocks(log_w)
        bound, weights = power_mean(chosen, groups=len(chosen) // self.m)
        return bound, torch.zeros_like(log_w).index_add(0, index, weights)

    def paths(self, log_w: Tensor) -> Tensor:
        index, chosen = self._blocks(log_w)
        groups = len(chosen) // self.m
        weights = power_mean(chosen, groups=groups)[1]
        return torch.zeros_like(log_w).index_add(0, index, groups * weights.square())


class Jackknife(Bound):
    r"""The importance-weighted bound without its bias of order 1/K: the jackknife, as an objective.

    .. math:: K L_K - \frac{K - 1}{K} \sum_{k=1}^{K} L_{K \setminus k}, \quad
              L_S = \log \frac{1}{|S|} \sum_{j \in S} w_j

    Not a lower bound any more, but an estimate of log p(x) with bias O(K⁻²). Where all weights but one are 0
    it is +∞, and its gradient is not defined.

    Args:
        estimator: ``"iwae"``, ``"dreg"`` or ``"stl"``.

    Raises:
        ValueError: for an unknown estimator.

    References:
        Nowozin, Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
        Variational Inference, 2018, of order 1.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> jackknife = fastvae.bounds.Jackknife()
        >>> fastvae.bound(x, q, decoder, jackknife, k=50, likelihood="bernoulli").shape
        torch.Size([])
    """

    def check(self, k: int) -> None:
        if k < 2:
            raise ValueError(f"the jackknife leaves one sample out, and needs k of at least 2; got k={k}")

    @staticmethod
    def _weights(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised weights [K, B]; their inverses of 1 less each, 0 for the largest; the weights among all
        but the largest; and log(1 less each), which for the largest is taken from the others: it may be as
        small as exp(-1000).
        """
        maximum, first = log_w.max(0, keepdim=True)
        others = log_w.scatter(0, first, -math.inf)
        second = others.amax(0, keepdim=True)
        exps, rests = torch.exp(log_w - shift(maximum)), torch.exp(others - shift(second))
        total, rest = exps.sum(0, keepdim=True), rests.sum(0, keepdim=True)
        share = (total - exps) / total
        log_rest = share.log().scatter(0, first, second - maximum + (rest / total).log())
        return exps / total, (1 / share).scatter(0, first, 0.0), rests / rest, log_rest

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        k = log_w.shape[0]
        weights, inverse, others, log_rest = self._weights(log_w)
        # Tensors: a compiler takes a logarithm of a size for a number of its own.
        number, fewer = (log_w.new_full((), n) for n in (k, k - 1))
        constant = torch.xlogy(fewer, fewer) - torch.xlogy(number, number)
        bound = torch.logsumexp(log_w, 0) + constant - (k - 1) / k * log_rest.sum(0)
        return bound, k * weights - (k - 1) / k * (weights * (inverse.sum(0) - inverse) + others)

    def paths(self, log_w: Tensor) -> Tensor:
        k = log_w.shape[0]
        weights, inverse, others, _ = self._weights(log_w)
        inverse = inverse.square()
        return k * weights.square() - (k - 1) / k * (
            weights.square() * (inverse.sum(0) - inverse) + others.square()
        )


class TVO(Bound):
    r"""The thermodynamic variational objective: a left Riemann sum of the thermodynamic integral.

    .. math:: \sum_{n} (β_{n+1} - β_n)\, \mathbb{E}_{π_{β_n}}[\log w], \quad
              π_β \propto q(z|x)^{1 - β} p(x, z)^{β}

    with expectations by self-normalised importance weights :math:`\tilde w_k^{(β)} \propto w_k^β` over the K
    samples. A lower bound of log p(x), as K → ∞; β = 0 alone is the ELBO.

    Args:
        betas: the left ends of the intervals, rising from 0, below 1. Default: 0 and nine values from 0.01 to
            0.8, evenly spaced in log β.
        estimator: ``"covariance"``, the paper's: :math:`\nabla_φ` by the score, :math:`s_k = \sum_n Δ_n
            \tilde w_k [(1 - β)(\log w_k - \mathbb{E}_{π_β}[\log w]) - 1]`, which needs no
            reparameterisation; ``"iwae"``, the derivative of the sum through the samples, or ``"stl"``.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    References:
        Masrani, Le & Wood, The Thermodynamic Variational Objective, 2019.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> fastvae.bound(x, q, decoder, fastvae.bounds.TVO(), k=50, likelihood="bernoulli").shape
        torch.Size([])
    """

    estimators = ("covariance", "iwae", "stl")

    def __init__(self, betas: Sequence[float] | None = None, estimator: str = "covariance"):
        if betas is not None and not isinstance(betas, Iterable):
            raise TypeError(
                f"betas must be a list of numbers, the left ends of intervals; got {type(betas).__name__}"
            )
        if betas is None:
            betas = [0.0, *(0.01 * 80 ** (n / 8) for n in range(9))]
        self.betas = tuple(
            [check_number("each of betas", beta, "the left end of an interval") for beta in betas]
        )
        rising = all(a < b for a, b in zip(self.betas, (*self.betas[1:], 1.0), strict=True))
        if not self.betas or self.betas[0] != 0 or not rising:
            raise ValueError(
                f"betas must rise from 0 and end below 1, the left ends of intervals; got {self.betas}"
            )
        super().__init__(estimator)

    def _intervals(self, log_w: Tensor) -> Any:
        """Of each interval: its length, β, the weights, and log w less its mean, and the mean [B]."""
        log_w = log_w.clamp(min=torch.finfo(log_w.dtype).min)  # 0 · -inf
        for beta, end in zip(self.betas, (*self.betas[1:], 1.0), strict=True):
            weights = torch.softmax(beta * log_w, 0)
            mean = (weights * log_w).sum(0)
            yield end - beta, beta, weights, log_w - mean, mean

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        bound, grads = log_w.new_zeros(log_w.shape[1:]), torch.zeros_like(log_w)
        for length, beta, weights, centred, mean in self._intervals(log_w):
            bound = bound + length * mean
            grads = grads + length * weights * (1 + beta * centred)
        return bound, grads

    def told(self, log_w: Tensor) -> Tensor:
        if self.estimator != "covariance":
            return super().told(log_w)
        score = torch.zeros_like(log_w)
        for length, beta, weights, centred, _ in self._intervals(log_w):
            score = score + length * weights * ((1 - beta) * centred - 1)
        return score


class WakePhi(Bound):
    r"""The encoder's half of reweighted wake–sleep: q is pulled towards the posterior that the weights show.

    .. math:: \nabla_φ: \sum_k \tilde w_k \nabla_φ \log q(z_k|x)

    which follows :math:`-\nabla_φ \mathrm{KL}(p(z|x) \| q(z|x))` as K → ∞. For ``encoder=`` of
    :func:`fastvae.bound`; with :class:`IWAE` for the decoder's half, wake-θ. The sleep phase is
    :func:`fastvae.sleep`.

    References:
        Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Le et al., Revisiting Reweighted Wake-Sleep
        for Models with Stochastic Control Flow, 2019.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> wake = dict(objective=fastvae.bounds.IWAE(), encoder=fastvae.bounds.WakePhi())
        >>> fastvae.bound(x, q, decoder, **wake, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    estimators = ("score",)

    def __init__(self) -> None:
        super().__init__("score")

    def value(self, log_w: Tensor) -> Tensor:
        raise ValueError("WakePhi is no bound, but an encoder's objective; use encoder=WakePhi()")

    def told(self, log_w: Tensor) -> Tensor:
        return power_mean(log_w)[1]


# Where the decoder's share of a sample is less than this, the encoder's is sent on with this much of it: no
# sum of shares, which are 1 together, notices either.
_LEAST = {torch.float32: 2.0**-100, torch.float64: 2.0**-800}
# Gradients of a decoder in float16 have no such range: there the decoder's share is at least this part of the
# encoder's. Shares are 1 together, so that this adds half a unit of float16's last digit at most.
_LEAST_OF_FLOAT16 = 2.0**-11


class _Weighed(torch.autograd.Function):
    """The bound [B], and for the backward pass the derivatives [K, B] by log weights, and what is told [K, B]
    to what reaches q.
    """

    @staticmethod
    def forward(
        log_likelihood: Tensor,
        log_ratio: Tensor,
        told: Tensor | None,
        objective: Bound,
        encoder: Bound,
        float16: bool,
    ) -> tuple[Any, ...]:
        log_w = log_likelihood + log_ratio.to(log_likelihood.dtype)
        dtype, wide = log_w.dtype, log_w.double()
        bound, grads = objective.reduce(wide)
        grads = without_denormals(grads, dtype)
        if told is None:
            return bound.to(dtype), grads, None
        to_q = without_denormals(encoder.told(wide), dtype)
        if encoder.route != "score":
            floor = torch.full_like(grads, _LEAST[dtype])
            if float16:
                floor = torch.maximum(floor, _LEAST_OF_FLOAT16 * to_q.abs())
            least = torch.copysign(floor, grads)
            grads = torch.where((grads.abs() < least.abs()) & (to_q != 0), least, grads)
        return bound.to(dtype), grads, to_q

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        _, *kept = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in kept if t is not None))
        ctx.save_for_backward(*kept)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        if grad is None:
            return (None,) * 6
        grads, to_q = ctx.saved_tensors
        each = [grads, grads, to_q]
        sent = [None if d is None else (grad * t).to(d) for t, d in zip(each, ctx.dtypes, strict=True)]
        return *sent, None, None, None


def weighed(
    log_likelihood: Tensor,
    log_ratio: Tensor,
    told: Tensor | None,
    objective: Bound,
    encoder: Bound | None,
    float16: bool = False,
) -> Tensor:
    """The bound [B] of log p(x|z) and log p(z) − log q(z|x), each [K, B]; ``told`` takes the gradient that is
    to reach q, by the encoder's bound or the objective itself. ``float16`` says that gradients by z pass
    through numbers of that dtype.
    """
    bound, *_ = _Weighed.apply(  # type: ignore[no-untyped-call]
        log_likelihood, log_ratio, told, objective, encoder or objective, float16
    )
    return bound  # type: ignore[no-any-return]


def check_alpha(alpha: Any) -> float | Tensor:
    """The order of a bound: a finite number, or a tensor [] without a gradient."""
    if isinstance(alpha, Tensor):
        if alpha.dim() or not alpha.is_floating_point() or alpha.requires_grad:
            raise ValueError(
                f"alpha is a tensor {shape_of(alpha)} of {alpha.dtype}; expected one floating-point number, "
                "[], without a gradient"
            )
        return alpha
    return check_number("alpha", alpha, "the order of a Rényi bound", -math.inf)


def _check_divides(name: str, m: int, k: int) -> None:
    if k % m:
        raise ValueError(
            f"{name}={m} does not divide k={k} samples into equal groups; use a k that is a multiple of {m}"
        )
