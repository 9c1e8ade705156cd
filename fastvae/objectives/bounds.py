r"""Bounds of log p(x) over log weights [K, B], for :func:`fastvae.bound`.

Each bound is a reduction over the samples, and defines the weight of each sample's gradient for the decoder
and for the encoder. With the log weights :math:`\ell_k = \log w_k` of one example, a bound is a function
:math:`F(\ell_1 … \ell_K)`. Its derivatives :math:`g_k = \partial F / \partial \ell_k` train the decoder, the
likelihood and the prior: :math:`\sum_k g_k \nabla_θ \log p(x, z_k)`. The encoder gets an estimate of

.. math:: \nabla_φ \mathbb{E}[F] = \mathbb{E}\Big[ \sum_k a_k \frac{\partial \ell_k}{\partial z_k}
          \frac{\partial z_k}{\partial φ} + s_k \nabla_φ \log q(z_k|x) \Big]

with one of these pairs, named by ``estimator``:

- ``"iwae"``: :math:`a_k = g_k, s_k = -g_k`, the derivative of F through z and through q's density;
- ``"stl"``: :math:`a_k = g_k, s_k = 0`, without the score; unbiased where F is a mean, biased elsewhere
  (Roeder et al. 2017);
- ``"dreg"``: :math:`a_k = g_k - \partial^2 F / \partial \ell_k^2, s_k = 0`, doubly reparameterised: the
  score is also taken through z, exactly, by :math:`\mathbb{E}_q[f(z) \nabla_φ \log q(z)] =
  \mathbb{E}_q[f'(z)\, \partial z / \partial φ]` for :math:`f = g_k` as a function of :math:`z_k`
  (Tucker et al. 2019, with :math:`a_k = \tilde w_k^2` for IWAE; Daudel et al. 2023 for the power mean).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, check_number, shape_of
from ..core.options import ESTIMATORS, BoundEstimator, Estimator, Reduction
from ..core.reductions import power_mean, shift
from ..ops.reduce import BoundReduction

__all__ = ["CIWAE", "IWAE", "TVO", "Bound", "Jackknife", "UStatistic", "WakePhi"]


class Bound:
    r"""Bound of log p(x): a reduction of log weights [K, B] to [B].

    To define your own bound, subclass it and implement :meth:`value`, which is differentiated by autograd.
    The estimators ``"iwae"`` and ``"stl"`` then work; ``"dreg"`` also needs :meth:`paths`.

    Args:
        estimator: gradient that reaches q: ``"iwae"`` (default), ``"stl"`` or ``"dreg"``; see
            :mod:`fastvae.bounds`.

    Raises:
        ValueError: for an unknown estimator, or one that this bound does not support.

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

    def __init__(self, estimator: BoundEstimator = "iwae"):
        known = tuple(e for e in self.estimators if e != "dreg" or type(self).paths is not Bound.paths)
        check_choice("estimator", estimator, known)
        self.estimator = estimator

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def check(self, k: int) -> None:
        """Validate that the bound is defined for k samples; raise ValueError otherwise."""

    def value(self, log_w: Tensor) -> Tensor:
        """Compute the bound [B] from log weights [K, B], float64."""
        raise NotImplementedError(f"{type(self).__name__} has no value(log_w), the bound [B] of log_w [K, B]")

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the bound [B] and its derivatives g [K, B] by the log weights; all float64."""

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
        """Compute DReG's a_k [K, B], ∂F/∂ℓ_k − ∂²F/∂ℓ_k²."""
        raise NotImplementedError(f"{type(self).__name__} has no paths(log_w), which 'dreg' needs")

    # Interface to the objectives.

    def fused_reduction(self, reduction: Reduction) -> BoundReduction | None:
        """Return the equivalent reduction of the fused ops, or None."""
        return None

    @property
    def route(self) -> str:
        """Route by which the encoder's gradient reaches q, see :mod:`fastvae.distributions.draws`."""
        return {"iwae": "tied", "stl": "paths", "dreg": "paths"}.get(self.estimator, "score")

    def q_grad(self, log_w: Tensor) -> Tensor:
        """Compute the encoder's weights [K, B], sent along :attr:`route`: a_k, or s_k for the score route."""
        return self.paths(log_w) if self.estimator == "dreg" else self.reduce(log_w)[1]


class IWAE(Bound):
    r"""Importance-weighted bound, of M groups of samples and order 1 - α.

    .. math:: \frac{1}{M} \sum_{m=1}^{M} \frac{1}{1 - α} \log \frac{1}{K} \sum_{k=1}^{K} w_{mk}^{1 - α}

    M = 1, α = 0 is IWAE; M > 1 is MIWAE; α ≠ 0 is the VR-IWAE bound, a Rényi bound differentiated
    through its samples; α = 1 is the Monte Carlo ELBO. The bound falls in α and rises in K.

    Args:
        groups: M, the number of groups of consecutive samples; must divide k. Default 1.
        alpha: α, a number or a tensor [], whose value compiled code does not specialise on. Default 0.
        estimator: ``"iwae"`` (default), ``"dreg"`` (:math:`a = α \tilde w + (1 - α) \tilde w^2`) or
            ``"stl"``.

    Raises:
        TypeError, ValueError: for an invalid argument.

    References:
        Burda, Grosse & Salakhutdinov 2016; Rainforth et al., Tighter Variational Bounds are Not Necessarily
        Better, 2018 (MIWAE); Li & Turner, Rényi Divergence Variational Inference, 2016; Daudel,
        Benton, Shi & Doucet, Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders,
        2023.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> piwae = dict(objective=fastvae.bounds.IWAE(), q_objective=fastvae.bounds.IWAE(groups=8))
        >>> fastvae.bound(x, q, decoder, **piwae, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, groups: int = 1, alpha: float | Tensor = 0.0, estimator: Estimator = "iwae"):
        self.groups = check_count("groups", groups, "the groups of samples")
        self.alpha = check_alpha(alpha)
        super().__init__(estimator)

    def check(self, k: int) -> None:
        _check_divides("groups", self.groups, k)

    @property
    def is_mean(self) -> bool:
        return not isinstance(self.alpha, Tensor) and self.alpha == 1

    def fused_reduction(self, reduction: Reduction) -> BoundReduction | None:
        if isinstance(self.alpha, Tensor):
            return None
        if self.is_mean:
            return BoundReduction(1.0, "mean", reduction)
        return BoundReduction(1.0, "log_mean_exp", reduction, self.alpha, self.groups)

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_mean:
            return log_w.mean(0), torch.full_like(log_w, 1 / log_w.shape[0])
        return power_mean(log_w, self.alpha, self.groups)

    def paths(self, log_w: Tensor) -> Tensor:
        weights = self.reduce(log_w)[1]
        return self.alpha * weights + (1 - self.alpha) * self.groups * weights.square()


class CIWAE(Bound):
    r"""Convex combination of the ELBO and the importance-weighted bound of the same samples.

    .. math:: β\, \frac{1}{K} \sum_k \log w_k + (1 - β) \log \frac{1}{K} \sum_k w_k

    Args:
        beta: β, the weight of the ELBO, in [0, 1]. Default 0.5.
        estimator: ``"iwae"`` (default), ``"dreg"`` (:math:`a = β / K + (1 - β) \tilde w^2`) or ``"stl"``.

    Raises:
        TypeError, ValueError: for an invalid argument.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> ciwae = fastvae.bounds.CIWAE(0.5)
        >>> fastvae.bound(x, q, decoder, ciwae, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, beta: float = 0.5, estimator: Estimator = "iwae"):
        self.beta = check_number("beta", beta, "the ELBO's share, in [0, 1]")
        if self.beta > 1:
            raise ValueError(f"beta must lie in [0, 1], the ELBO's share; got {beta}")
        super().__init__(estimator)

    def fused_reduction(self, reduction: Reduction) -> BoundReduction | None:
        # DReG's weights cannot be recovered from the gradient of this reduction.
        if self.estimator == "dreg":
            return None
        if self.beta == 1:
            return BoundReduction(1.0, "mean", reduction)
        return BoundReduction(1.0, "log_mean_exp", reduction, share=self.beta)

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        return power_mean(log_w, share=self.beta)

    def paths(self, log_w: Tensor) -> Tensor:
        return self.beta / log_w.shape[0] + (1 - self.beta) * power_mean(log_w)[1].square()


class UStatistic(Bound):
    r"""Mean of IWAE bounds of m samples, over many subsets of the K samples.

    The bound and its expected gradient are those of MIWAE with K/m groups, with less variance.

    .. math:: \frac{1}{R\, K/m} \sum_{r=1}^{R} \sum_{S \in \text{blocks}_r}
              \log \frac{1}{m} \sum_{k \in S} w_k

    The K samples are partitioned into K/m blocks in R ways: with the samples as an m × K/m table, block i of
    partition r has the samples :math:`(j, (i + r j) \bmod K/m), j = 0 … m - 1`, so that blocks of two
    partitions share at most one sample if K/m is prime.

    Args:
        m: samples per block; it must divide K.
        permutations: R, the number of partitions, at most K/m; R = 1 is MIWAE. Default 10.
        estimator: ``"iwae"`` (default), ``"dreg"`` or ``"stl"``.

    Raises:
        TypeError, ValueError: for an invalid argument.

    References:
        Burroni, Takatsu, Domke & Sheldon, U-Statistics for Importance-Weighted Variational Inference, 2023
        (arXiv 2302.13918), with random partitions.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> of_eight = fastvae.bounds.UStatistic(8, permutations=4)
        >>> fastvae.bound(x, q, decoder, of_eight, k=56, likelihood="bernoulli").shape
        torch.Size([])
    """

    def __init__(self, m: int, permutations: int = 10, estimator: Estimator = "iwae"):
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
        """Return the sample indices of all blocks of all partitions, concatenated, and their log weights."""
        device, blocks = log_w.device, log_w.shape[0] // self.m
        way = torch.arange(self.permutations, device=device)[:, None, None]
        block = torch.arange(blocks, device=device)[:, None]
        place = torch.arange(self.m, device=device)
        index = (place * blocks + (block + way * place) % blocks).flatten()
        return index, log_w[index]

    def reduce(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        index, chosen = self._blocks(log_w)
        bound, weights = power_mean(chosen, groups=chosen.shape[0] // self.m)
        return bound, torch.zeros_like(log_w).index_add(0, index, weights)

    def paths(self, log_w: Tensor) -> Tensor:
        index, chosen = self._blocks(log_w)
        groups = chosen.shape[0] // self.m
        weights = power_mean(chosen, groups=groups)[1]
        return torch.zeros_like(log_w).index_add(0, index, groups * weights.square())


class Jackknife(Bound):
    r"""Jackknife of the importance-weighted bound, which removes its bias of order 1/K.

    .. math:: K L_K - \frac{K - 1}{K} \sum_{k=1}^{K} L_{K \setminus k}, \quad
              L_S = \log \frac{1}{|S|} \sum_{j \in S} w_j

    It is not a lower bound but an estimate of log p(x) with bias O(K⁻²). If all weights but one are 0
    it is +∞, and its gradient is undefined.

    Args:
        estimator: ``"iwae"`` (default), ``"dreg"`` or ``"stl"``.

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
        """Compute normalised weights w̃ [K, B], 1 / (1 − w̃), weights without the largest, and log(1 − w̃).

        1 / (1 − w̃) is set to 0 for the largest weight. log(1 − w̃) of the largest weight is computed from
        the other weights, since 1 − w̃ may be as small as exp(-1000). All are [K, B].
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
        # As tensors: torch.compile would treat the logarithm of a size as a separate symbolic number.
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
    r"""Thermodynamic variational objective: a left Riemann sum of the thermodynamic integral.

    .. math:: \sum_{n} (β_{n+1} - β_n)\, \mathbb{E}_{π_{β_n}}[\log w], \quad
              π_β \propto q(z|x)^{1 - β} p(x, z)^{β}

    The expectations use self-normalised importance weights :math:`\tilde w_k^{(β)} \propto w_k^β` over the K
    samples. It is a lower bound of log p(x) as K → ∞; β = 0 alone is the ELBO.

    Args:
        betas: left ends of the intervals, rising from 0, below 1. Default: 0 and nine values from 0.01 to
            0.8, evenly spaced in log β.
        estimator: ``"covariance"`` (default), the paper's: :math:`\nabla_φ` by the score, :math:`s_k = \sum_n
            Δ_n \tilde w_k [(1 - β)(\log w_k - \mathbb{E}_{π_β}[\log w]) - 1]`, which needs no
            reparameterisation; ``"iwae"``, the derivative of the sum through the samples, or ``"stl"``.

    Raises:
        TypeError, ValueError: for an invalid argument.

    References:
        Masrani, Le & Wood, The Thermodynamic Variational Objective, 2019.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> fastvae.bound(x, q, decoder, fastvae.bounds.TVO(), k=50, likelihood="bernoulli").shape
        torch.Size([])
    """

    estimators = ("covariance", "iwae", "stl")

    def __init__(
        self,
        betas: Sequence[float] | None = None,
        estimator: Literal["covariance", "iwae", "stl"] = "covariance",
    ):
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
        """Yield each interval's length, β, weights [K, B], centred log w [K, B] and its mean [B]."""
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

    def q_grad(self, log_w: Tensor) -> Tensor:
        if self.estimator != "covariance":
            return super().q_grad(log_w)
        score = torch.zeros_like(log_w)
        for length, beta, weights, centred, _ in self._intervals(log_w):
            score = score + length * weights * ((1 - beta) * centred - 1)
        return score


class WakePhi(Bound):
    r"""Wake-φ objective of reweighted wake–sleep, which fits q to the importance-weighted posterior.

    .. math:: \nabla_φ: \sum_k \tilde w_k \nabla_φ \log q(z_k|x)

    This converges to :math:`-\nabla_φ \mathrm{KL}(p(z|x) \| q(z|x))` as K → ∞. Use it as ``q_objective=`` of
    :func:`fastvae.bound`, with :class:`IWAE` for the decoder (wake-θ). The sleep phase is
    :func:`fastvae.sleep`.

    References:
        Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Le et al., Revisiting Reweighted Wake-Sleep
        for Models with Stochastic Control Flow, 2019.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.rand(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> wake = dict(objective=fastvae.bounds.IWAE(), q_objective=fastvae.bounds.WakePhi())
        >>> fastvae.bound(x, q, decoder, **wake, k=64, likelihood="bernoulli").shape
        torch.Size([])
    """

    estimators = ("score",)

    def __init__(self) -> None:
        super().__init__("score")

    def value(self, log_w: Tensor) -> Tensor:
        raise ValueError("WakePhi trains q alone and has no value; use q_objective=WakePhi()")

    def q_grad(self, log_w: Tensor) -> Tensor:
        return power_mean(log_w)[1]


def check_alpha(alpha: Any) -> float | Tensor:
    """Validate the order of a bound: a finite number, or a tensor [] without a gradient."""
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
