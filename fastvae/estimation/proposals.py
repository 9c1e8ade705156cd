r"""Proposal distributions for :func:`fastvae.log_marginal` and :func:`fastvae.evaluate`, ``proposal=``.

Any density r that is positive wherever p(x, z) is can be used: with :math:`w = p(x, z) / r(z)`, the mean of K
weights is an unbiased estimate of p(x), and its error depends on how well r approximates p(z|x).
``"posterior"`` is q. ``"inflated"`` and ``"heavy"`` widen q, ``"defensive"`` takes a share of the draws from
the prior, which bounds the weights, and ``"adapted"`` fits a proposal to each example during sampling.

A name selects an object with its defaults: ``proposal="defensive"`` is ``fastvae.proposals.Defensive()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from .. import random
from ..core.checks import check_count, check_number
from ..core.hints import did_you_mean
from ..distributions import (
    DiagonalNormal,
    Distribution,
    FullNormal,
    LowRankNormal,
    StudentT,
    log_shares,
    rsample,
)
from ..distributions.base import is_still
from ..distributions.covariance import rows_times, triangle_positions, triangular_solve
from ..distributions.draws import describe
from ..distributions.stratified import derived_seed
from ..distributions.wrapped import TorchDistribution, at_address
from ..inputs.batch import Inputs
from ..ops.op import accumulator
from . import stream as _stream
from .stream import Chunks
from .weights import Weights, tail_length

__all__ = ["Adapted", "Defensive", "Heavy", "Inflated", "Posterior", "Proposal", "as_proposal"]

# Draws from q before the first fit.
_FIRST = 64
# Relative variance of the weights below which an example keeps q as its proposal.
_EQUAL = 0.01


class Sharing(Protocol):
    """Processes that share the draws of each example, as :class:`~.evaluation.ranks.Ranks` does."""

    rank: int

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of these draws assigned to this process."""

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Gather the objects of all processes, in the order of ranks."""


class Alone:
    """Single process that makes all draws."""

    rank = 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def gather(self, mine: Any, what: str) -> list[Any]:
        return [mine]


class Proposal:
    """Base class of the proposals below; not for subclassing by users, who pass their posterior as q."""

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """Return the distribution to draw from, for this posterior and prior.

        Raises:
            TypeError, ValueError: for a posterior or a prior that this proposal does not support.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is the base of proposals, and has none itself; use one of "
            "fastvae.proposals, such as Defensive()"
        )

    def draws(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        k: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing | None = None,
    ) -> Draws:
        """Return the draws for a batch, at most k per example.

        Args:
            inputs: the batch and its distributions.
            seed: seed of the noise, int64 [], or [R] for R randomisations.
            row_offset: index of the first row in the noise's address.
            k: maximum number of draws per example.
            chunks: number of draws per chunk.
            tail: number of largest weights to store.
            ranks: processes that share each example's draws. Default: None, this process alone.
        """
        r = self.of(inputs.q, inputs.prior)
        made = inputs._replace(q=_like(inputs.q, r))
        return Draws(made, seed, row_offset, chunks, tail, ranks or Alone(), r is inputs.q)


@dataclass(frozen=True)
class Posterior(Proposal):
    """Posterior q(z|x) as the proposal, the default.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = fastvae.proposals.Posterior()
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        return q


@dataclass(frozen=True)
class Inflated(Proposal):
    """Posterior q with inflated standard deviations, for a q that is too narrow, as after ELBO training.

    q must be a normal distribution: a pair (mu, logvar), :class:`fastvae.distributions.FullNormal` or
    :class:`fastvae.distributions.LowRankNormal`.

    Args:
        scale: factor of the standard deviations. Default 1.2.

    Raises:
        TypeError, ValueError: if scale is not a number above 0.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = fastvae.proposals.Inflated(1.5)
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    scale: float = 1.2

    def __post_init__(self) -> None:
        _check_positive("scale", self.scale, "what q's standard deviations are multiplied by")

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        more = math.log(self.scale)
        if isinstance(q, DiagonalNormal) and is_still(q, DiagonalNormal):
            return DiagonalNormal(q.mu, (q._wide()[1] + 2 * more).to(q.mu.dtype))
        if isinstance(q, FullNormal) and is_still(q, FullNormal):
            mu, tril = q._wide()
            diagonal = triangle_positions(mu.shape[-1], mu.device)[2]
            return FullNormal(q.mu, (tril * self.scale).index_copy(-1, diagonal, tril[..., diagonal] + more))
        if isinstance(q, LowRankNormal) and is_still(q, LowRankNormal):
            _, logvar, factor = q._wide()
            return LowRankNormal(q.mu, logvar + 2 * more, factor * self.scale)
        raise _wrong_family("inflated", q, "a normal distribution")


@dataclass(frozen=True)
class Heavy(Proposal):
    """Student's t in each dimension, with q's mean and scale.

    Its tails are heavier than those of any nearly normal p(z|x), so the weights are bounded.

    q must be a pair (mu, logvar) or a :class:`fastvae.distributions.DiagonalNormal`.

    Args:
        df: degrees of freedom. Default 5.

    Raises:
        TypeError, ValueError: if df is not a number above 0.

    References:
        Geweke, Bayesian Inference in Econometric Models Using Monte Carlo Integration, 1989.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = "heavy"
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    df: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("df", self.df, "the degrees of freedom")

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        if not (isinstance(q, DiagonalNormal) and is_still(q, DiagonalNormal)):
            raise _wrong_family("heavy", q, "a normal distribution with a diagonal covariance")
        _, logvar = q._wide()
        return StudentT(q.mu, 0.5 * logvar, self.df)


@dataclass(frozen=True)
class Defensive(Proposal):
    r"""Mixture of q and the prior: :math:`r = (1 - s)\, q(z|x) + s\, p(z)`.

    The weights are bounded by :math:`\max_z p(x|z) / s`. In few dimensions the prior's draws may find a mode
    of p(z|x) that q misses. The draws are stratified: one of every 1/s consecutive draws comes from the
    prior, within each randomisation for ``noise="qmc"``. All weights are relative to the mixture's density.

    The prior must support draws at an address: N(0, I), a normal or another location-scale family of
    fastvae's, or a torch distribution with a quantile function; not a VampPrior, a NormalMixture or a
    Hierarchy.

    Args:
        share: s, the prior's share of the draws, between 0.01 and 0.99, rounded to hundredths. Default 0.1.

    Raises:
        TypeError, ValueError: if share is not a number between 0.01 and 0.99.

    References:
        Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 50, "likelihood": "bernoulli"}
        >>> options["proposal"] = fastvae.proposals.Defensive(0.2)
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0.01 <= check_number("share", self.share, "the prior's share of the draws") <= 0.99:
            raise ValueError(
                f"share must lie in 0.01 … 0.99, the prior's share of the draws; got {self.share!r}"
            )

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        _check_density("defensive", q)
        other = _with_rows(prior, q.batch, _example(q))
        if other is None:
            raise ValueError(
                "proposal='defensive' needs a prior that can be drawn from at an address, which "
                f"{describe(prior)} cannot be: it has neither an expand nor a quantile function of torch's; "
                "use another proposal, such as 'adapted', or 'inflated' with noise='qmc'"
            )
        return _InTurn([q, other], [1 - self.share, self.share])


@dataclass(frozen=True)
class Adapted(Proposal):
    r"""Adaptive proposal for each example, refitted to its weighted draws in rounds.

    The first 64 draws come from q. Then, at draws 64, 80, 100, 125, …, a quarter more each time, a
    multivariate Student t with a full covariance is fitted to the weighted moments of all draws so far, and
    the next round is drawn, stratified, from

    .. math:: r_t = s_q\, q + s_p\, p + (1 - s_q - s_p)\, t_ν(μ_t, Σ_t)

    until nine tenths of the draws (four fifths for small k) or ``most`` are reached; the rest come from the
    last fit. All draws enter the estimate

    .. math:: \hat p(x) = \sum_t c_t \sum_{k ∈ t} \frac{p(x, z_k)}{r_t(z_k)} \Big/ \sum_t c_t n_t,
              \quad c_t = t

    **Each draw is weighted by the mixture density of its round**, which depends only on earlier rounds, so
    :math:`\hat p(x)` is unbiased for any k, however good or bad the fits are (its log is low by half its
    relative variance, as always). Weighting early draws by densities that were fitted to them, as AMIS does,
    is consistent but biased: by 0.1 nats and more at k = 500 and D = 8 (docs/NOTES.md). Later rounds have
    larger coefficients because their fits are better; ``stderr`` and ``ess`` account for this.

    If the first weights are degenerate the fit tempers them, :math:`w^a` with the largest a ≤ 1 that leaves
    an effective sample size of 3 D + 5. Correlations are shrunk by :math:`4 (D - 1) / (4 (D - 1) +
    \mathrm{ESS})`. An example whose weights have a relative variance below 0.01 has nothing to gain, and
    keeps q.

    It needs q's ``log_prob``, and latents on all of R^D. If the prior does not support draws at an address
    (a VampPrior, a Hierarchy, a torch distribution without a quantile function) its share goes to q. Memory:
    one number per draw that is fitted to, at most ``most`` per example, and matrices [B, D, D] in float64.
    The ELBO of q, as reported by :class:`fastvae.Evaluation`, is that of the first 64 draws.

    Args:
        posterior: :math:`s_q`, q's share of the draws. Default: max(0.1, D/(D + 50)) of the share not drawn
            from the prior: in many dimensions a good fit needs more draws than are available, and a good q
            must not be lost (docs/NOTES.md).
        prior: :math:`s_p`, the prior's share, which finds modes that q misses, in few dimensions.
            Default 0.05.
        df: ν, an int. Default: max(8, D). In many dimensions heavier tails would cost more than they
            save: the radii of a t vary by :math:`1 / \sqrt{2ν}`, those of a normal by :math:`1 / \sqrt{2 D}`.
        scale: factor of the fitted standard deviations. Default: :math:`1 + 0.3 / \sqrt D`.
        most: maximum number of draws to fit to. Default 4000.

    Raises:
        TypeError, ValueError: for invalid numbers, or for shares that leave less than 0.01 for the fit.

    References:
        Oh & Berger, Adaptive Importance Sampling in Monte Carlo Integration, 1992; Owen & Zhou, Safe and
        Effective Importance Sampling, 2000, and The square root rule for adaptive importance sampling, 2020;
        Cornuet, Marin, Mira & Robert, Adaptive Multiple Importance Sampling, 2012.

    Example:
        >>> import torch, fastvae
        >>> x, q, decoder = torch.ones(4, 7), torch.zeros(4, 6), torch.nn.Linear(3, 7)
        >>> options = {"k": 500, "likelihood": "bernoulli", "proposal": "adapted"}
        >>> fastvae.log_marginal(x, q, decoder, **options).log_px.shape
        torch.Size([4])
    """

    posterior: float | None = None
    prior: float = 0.05
    df: int | None = None
    scale: float | None = None
    most: int = 4000

    def __post_init__(self) -> None:
        check_number("prior", self.prior, "a share of the draws")
        if self.posterior is not None:
            check_number("posterior", self.posterior, "a share of the draws")
        if (self.posterior or 0.0) + self.prior > 0.99:
            raise ValueError(
                f"posterior + prior must leave a share of the draws, 0.01 at least; got {self.posterior!r} + "
                f"{self.prior!r}"
            )
        if self.df is not None:
            object.__setattr__(self, "df", check_count("df", self.df, "the degrees of freedom"))
        if self.scale is not None:
            _check_positive("scale", self.scale, "what the fitted standard deviations are multiplied by")
        most = check_count("most", self.most, "the draws that are fitted to at most")
        object.__setattr__(self, "most", most)

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """Return q, the proposal of the first round, after validating q and the prior."""
        _check_density("adapted", q)
        for d in (q, prior):
            if isinstance(d, TorchDistribution) and not _is_everywhere(d):
                raise ValueError(
                    f"proposal='adapted' draws z from all of R^D, but {describe(d)} has a density on a "
                    "part of it only; use another proposal"
                )
        return q

    def rounds(self, k: int) -> list[int]:
        """Return the draw counts, out of k, at which the proposal is fitted."""
        found, stop = [], _FIRST
        # The last round, of equal coefficients, must be at least as long as the tail that k̂ is fitted to.
        while stop <= min(0.9 * k, k - tail_length(k), self.most):
            found.append(stop)
            stop += stop // 4
        return found

    def draws(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        k: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing | None = None,
    ) -> Draws:
        self.of(inputs.q, inputs.prior)
        return _AdaptedDraws(self, self.rounds(k), inputs, seed, row_offset, chunks, tail, ranks or Alone())


_NAMED: dict[str, Callable[[], Proposal]]
_NAMED = {
    "posterior": Posterior,
    "inflated": Inflated,
    "heavy": Heavy,
    "defensive": Defensive,
    "adapted": Adapted,
}


def as_proposal(proposal: Any, noise: str) -> Proposal:
    """Return the proposal for a name or an object of this module, and validate it for this kind of noise.

    Raises:
        TypeError, ValueError: for anything else, or a proposal that does not support the noise.
    """
    if isinstance(proposal, Proposal):
        if noise == "qmc" and isinstance(proposal, Adapted):
            raise ValueError(
                "proposal='adapted' is fitted between rounds, which are no point set together; use "
                "noise='philox', or another proposal"
            )
        return proposal
    known = ", ".join(map(repr, _NAMED))
    if not isinstance(proposal, str):
        raise TypeError(
            f"proposal must be a name ({known}) or an object such as "
            f"fastvae.proposals.Defensive(share=0.1); got {proposal!r}"
        )
    if proposal not in _NAMED:
        raise ValueError(f"proposal={proposal!r} is unknown; known: {known}{did_you_mean(proposal, _NAMED)}")
    return as_proposal(_NAMED[proposal](), noise)


def _check_positive(name: str, value: Any, meaning: str) -> None:
    if not check_number(name, value, meaning):
        raise ValueError(f"{name} must be greater than 0, {meaning}; got {value!r}")


def _wrong_family(name: str, q: Distribution, expected: str) -> TypeError:
    return TypeError(
        f"proposal={name!r} needs a q that is {expected}; got {describe(q)}. Use proposal='adapted', or "
        "'defensive', which goes with noise='qmc', too"
    )


def _check_density(name: str, q: Distribution) -> None:
    if type(q).log_prob is Distribution.log_prob:
        raise TypeError(
            f"proposal={name!r} needs the density of q at any z, but {describe(q)} has no log_prob; write "
            "one, or use proposal='posterior'"
        )


# Draws of a batch


class Draws:
    """Weights of the draws of a batch from one proposal."""

    def __init__(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing,
        are_of_q: bool = True,
    ):
        self._inputs, self._seed, self._row_offset = inputs, seed, row_offset
        self._chunks, self._tail, self._ranks, self._are_of_q = chunks, tail, ranks, are_of_q

    def weights(self, start: int, stop: int, rows: Tensor | None = None) -> Weights | None:
        """Compute the weights of this process's part of draws ``start`` to ``stop``; None if it is empty.

        ``rows`` are the indices of the examples to draw for. Default: all.
        """
        return self._folded(start, stop, rows)

    def _folded(
        self, start: int, stop: int, rows: Tensor | None, kept: list[Tensor] | None = None
    ) -> Weights | None:
        start, stop = self._ranks.share(start, stop)
        if start == stop:
            return None
        place: dict[str, Any] = {"row_offset": self._row_offset, "rows": rows}
        return _stream.weights(
            self._inputs, self._seed, start, stop, self._chunks, self._tail, kept=kept, **place
        )

    def estimate(self, total: Weights) -> Weights:
        """Return the weights of all draws so far, adjusted for the estimate."""
        return total

    def elbo(self, total: Weights) -> Tensor:
        """Return the mean log weight under q [B]; NaN if the draws are not from q."""
        return total.elbo if self._are_of_q else torch.full_like(total.elbo, math.nan)


class _Drawn(NamedTuple):
    """Chunk of draws that the proposal is fitted to."""

    inputs: Inputs
    start: int
    rows: Tensor | None  # indices of the examples, None for all
    number: int  # index of the round, from 1
    log_w: Tensor  # [draws, B], -inf for examples not in rows


class _AdaptedDraws(Draws):
    """Draws of a proposal that is fitted between rounds.

    Only the log weights of past draws are kept; z is redrawn chunk by chunk when moments are needed.
    """

    def __init__(self, how: Adapted, rounds: list[int], inputs: Inputs, *rest: Any):
        super().__init__(inputs, *rest)
        self._how, self._rounds, self._q = how, rounds, inputs.q
        self._number = 1  # index of the round
        self._drawn: list[_Drawn] = []
        self._fitted: _FullT | None = None
        self._stays: Tensor | None = None  # [B], True for examples that keep q
        self._elbo: Tensor | None = None  # [B], mean log weight of the first round

    def weights(self, start: int, stop: int, rows: Tensor | None = None) -> Weights | None:
        total: Weights | None = None
        for first, last in pairwise([start, *(n for n in self._rounds if start < n < stop), stop]):
            kept: list[Tensor] | None = [] if last <= max(self._rounds, default=0) else None
            part = self._folded(first, last, rows, kept)
            if part is not None:
                part = part.scaled(math.log(self._number))
                total = part if total is None else total.merge(part)
            if kept is not None:
                self._keep(kept, self._ranks.share(first, last)[0], rows)
            if last in self._rounds:
                self._fit(rows)
        return total

    def _keep(self, chunks: list[Tensor], start: int, rows: Tensor | None) -> None:
        for log_w in chunks:
            if rows is not None:
                every = log_w.new_full((len(log_w), self._q.batch), -math.inf)
                log_w = every.index_copy(1, rows, log_w)
            self._drawn.append(_Drawn(self._inputs, start, rows, self._number, log_w))
            start += len(log_w)

    def estimate(self, total: Weights) -> Weights:
        """Rescale the draws of round t by c_t n / Σ c_t n_t, which is 1 on average.

        ``uneven`` corrects the second moment for these coefficients, so that the standard error and the
        effective sample size are those of the combined rounds.
        """
        n = total.count.double()
        first, second = torch.zeros_like(n), torch.zeros_like(n)
        for t, (start, stop) in enumerate(pairwise([0, *self._rounds, 2**32]), 1):
            draws = (n - start).clamp(min=0, max=stop - start)
            first, second = first + t * draws, second + t**2 * draws
        scaled = total.scaled(torch.log(n / first))
        spread = second / first.square() - 1 / n
        return replace(scaled, uneven=spread)

    def elbo(self, total: Weights) -> Tensor:
        return total.elbo if self._elbo is None else self._elbo

    def _fit(self, rows: Tensor | None) -> None:
        """Fit the next round's proposal for these examples."""
        q = self._q
        like = _example(q, self._row_offset)
        numbers = torch.arange(q.batch, device=like.device) if rows is None else rows
        log_w, counts, begin = self._everyones(numbers)
        w, ess, stays = _tempered(log_w, counts, 3 * like.shape[1] + 5)
        mean, covariance = self._moments(w[begin:], numbers, like)
        d = like.shape[1]
        scale = self._how.scale or 1 + 0.3 / math.sqrt(d)
        fitted = _FullT.of(mean, scale**2 * _shrunk(covariance, ess), self._how.df or max(8, d), like)
        if self._fitted is None or self._stays is None:  # the first round has all rows
            self._fitted, self._stays, self._elbo = fitted, stays, log_w.mean(0)
        else:
            self._fitted = self._fitted.put(numbers, fitted)
            self._stays = self._stays.index_copy(0, numbers, stays)
        self._number += 1
        share = self._how.posterior
        if share is None:
            share = (1 - self._how.prior) * max(0.1, d / (d + 50))
        shares = [share, self._how.prior, 1 - share - self._how.prior]
        prior = _with_rows(self._inputs.prior, q.batch, like)
        if prior is None:
            prior, shares = q, [sum(shares[:2]), 0.0, shares[2]]
        r = _InTurn([q, prior, self._fitted], shares, self._number, self._stays)
        self._inputs = self._inputs._replace(q=_like(q, r))

    def _everyones(self, numbers: Tensor) -> tuple[Tensor, Tensor, int]:
        """Gather log weights [n, A] and coefficients [n, 1] of all processes' draws for A examples.

        The third result is the index of this process's first draw.
        """
        mine = [(d.number, d.log_w[:, numbers].double().cpu()) for d in self._drawn]
        every = self._ranks.gather(mine, "fit")
        begin = sum(len(log_w) for part in every[: self._ranks.rank] for _, log_w in part)
        log_w = torch.cat([log_w for part in every for _, log_w in part])
        counts = torch.cat([log_w.new_full((len(part), 1), t) for parts in every for t, part in parts])
        return log_w.to(numbers.device), counts.to(numbers.device), begin

    def _moments(self, w: Tensor, numbers: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean [A, D] and covariance [A, D, D] of all processes' draws.

        The first rows of ``w`` are the weights of this process's draws.
        """
        about = like[numbers].double()
        first, second = torch.zeros_like(about), about.new_zeros(*about.shape, about.shape[1])
        start = 0
        for drawn in self._drawn:
            stop = start + len(drawn.log_w)
            z = self._again(drawn, numbers).double() - about
            z = torch.where(z.isfinite(), z, 0.0)
            weighted = z * w[start:stop, :, None]
            first += weighted.sum(0)
            second += weighted.permute(1, 2, 0) @ z.transpose(0, 1)
            start = stop
        every = self._ranks.gather((first.cpu(), second.cpu()), "moments")
        first, second = (sum(parts).to(about.device) for parts in zip(*every, strict=True))
        return about + first, second - first[:, :, None] * first[:, None]

    def _again(self, drawn: _Drawn, numbers: Tensor) -> Tensor:
        """Redraw z of a chunk [draws, A, D] for a subset of the examples that it was drawn for."""
        spans = _stream.spans_of(drawn.inputs, self._row_offset, drawn.rows)
        parts = []
        for q, offset, wanted in spans:
            z = _z(q, len(drawn.log_w), self._seed, drawn.start, offset)
            parts.append(z if wanted is None else z[:, wanted])
        z = parts[0] if len(parts) == 1 else torch.hstack(parts)
        return z[:, numbers if drawn.rows is None else torch.searchsorted(drawn.rows, numbers)]


def _tempered(log_w: Tensor, counts: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the weights [n, A], tempered where their effective sample size is below ``least``.

    Returns the normalised weights, including the coefficients ``counts`` [n, 1], their effective sample size
    [A], and True [A] where the weights without coefficients are almost equal.
    """
    log_w = torch.where(log_w.isfinite(), log_w, -math.inf)
    top = log_w.amax(0)
    # Clamped so that strong tempering also includes weights of 0.
    log_w = torch.where(top == -math.inf, 0.0, (log_w - top).clamp(min=-700.0))
    stays = len(log_w) / _effective(torch.softmax(log_w, 0)) - 1 < _EQUAL
    log_w = log_w + counts.log()
    low, high = torch.zeros_like(top), torch.ones_like(top)
    few = _effective(torch.softmax(log_w, 0)) < least
    some = log_w[:, few]
    for _ in range(20 if bool(few.any()) else 0):
        middle = (low[few] + high[few]) / 2
        enough = _effective(torch.softmax(middle * some, 0)) >= least
        low[few], high[few] = torch.where(enough, middle, low[few]), torch.where(enough, high[few], middle)
    w = torch.softmax(torch.where(few, low, 1.0) * log_w, 0)
    return w, _effective(w), stays


def _effective(w: Tensor) -> Tensor:
    return 1 / w.square().sum(0)


def _shrunk(covariance: Tensor, ess: Tensor) -> Tensor:
    """Correct the covariance [A, D, D] for bias by the effective sample size, and shrink its correlations."""
    weight = 4.0 * (covariance.shape[-1] - 1)
    kept = (ess / (weight + ess))[:, None, None]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = kept * covariance + torch.diag_embed((1 - kept[..., 0]) * diagonal)
    return shrunk / (1 - 1 / ess).clamp(min=0.2)[:, None, None]


# Distributions to draw from


class _Drawable(Distribution):
    """Distribution that can be sampled without evaluating its density."""

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        """Draw z [K, B, D], the same as :meth:`rsample`."""
        raise NotImplementedError

    def rsample(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        z = self.z(samples, seed, sample_offset, row_offset)
        return z, self.log_prob(z)


def _z(q: Distribution, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    if isinstance(q, _Drawable):
        return q.z(samples, seed, sample_offset, row_offset)
    return rsample(q, samples, seed, sample_offset=sample_offset, row_offset=row_offset)[0]


class _FullT(_Drawable):
    r"""Multivariate Student t, :math:`z = μ + L ε \sqrt{ν / χ^2_ν}`, with float64 parameters.

    Args:
        mu: μ [B, D].
        scale: L, lower triangular [B, D, D].
        df: ν.
        dtype: dtype of z.
    """

    def __init__(self, mu: Tensor, scale: Tensor, df: int, dtype: torch.dtype):
        super().__init__()
        self.mu, self.scale, self.df, self.dtype = mu, scale, df, dtype

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, df: int, like: Tensor) -> _FullT:
        """Build it from a mean and scale matrix; z has the dtype of ``like``, which floors the variances."""
        least = (torch.finfo(like.dtype).eps * mean.abs()).square() + torch.finfo(like.dtype).tiny
        sd = torch.maximum(covariance.diagonal(dim1=-2, dim2=-1), least).sqrt()
        correlation = covariance / (sd[:, :, None] * sd[:, None])
        root, info = torch.linalg.cholesky_ex(
            correlation + 1e-12 * torch.eye(sd.shape[1], dtype=sd.dtype, device=sd.device)
        )
        # NaN moments stem from a NaN q, so any finite fit will do.
        good = (info == 0) & root.isfinite().all(-1).all(-1) & mean.isfinite().all(-1)
        scale = torch.where(
            good[:, None, None],
            sd[..., None] * root,
            torch.eye(sd.shape[1], dtype=sd.dtype, device=sd.device),
        )
        return cls(torch.where(good[:, None], mean, 0.0), scale, df, like.dtype)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.mu.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    def put(self, rows: Tensor, other: _FullT) -> _FullT:
        """Replace the parameters of the examples with indices ``rows``."""
        mu, scale = self.mu.index_copy(0, rows, other.mu), self.scale.index_copy(0, rows, other.scale)
        return _FullT(mu, scale, self.df, self.dtype)

    def rows(self, start: int, stop: int) -> _FullT:
        return _FullT(self.mu[start:stop], self.scale[start:stop], self.df, self.dtype)

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        d, place = self.mu.shape[1], {"sample_offset": sample_offset, "row_offset": row_offset}
        shape, dtype = (samples, self.batch, d + self.df), accumulator(self.dtype)
        normals = random.normal(seed, *shape, dtype=dtype, **place).double()  # type: ignore[arg-type]
        chi_square = normals[..., d:].square().sum(-1, keepdim=True)
        z = self.mu + rows_times(normals[..., :d] * (self.df / chi_square).sqrt(), self.scale.mT)
        return z.to(self.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        d, df = self.mu.shape[1], self.df
        square = triangular_solve(self.scale, z.double() - self.mu).square().sum(-1)
        constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - 0.5 * d * math.log(df * math.pi)
        logs = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = constant - logs - 0.5 * (df + d) * torch.log1p(square / df)
        return value.to(accumulator(z.dtype))


class _InTurn(_Drawable):
    """Stratified mixture: components are drawn in a fixed cycle, from an offset that depends on the seed.

    All draws have equal weight, and each is distributed as the mixture, over random offsets.

    Args:
        parts: component distributions with rows, all with the same B.
        shares: each component's share of the draws, rounded to hundredths.
        number: index that separates its noise from that of other mixtures with the same seed. Default 1.
        stays: bool [B], the examples drawn from the first component alone, with the noise that this
            component has on its own. Default: None, no examples.
    """

    def __init__(
        self,
        parts: Sequence[Distribution],
        shares: Sequence[float],
        number: int = 1,
        stays: Tensor | None = None,
    ):
        super().__init__()
        self._given = parts, shares, number
        counts = [round(100 * share) for share in shares]
        counts[counts.index(max(counts))] += 100 - sum(counts)
        divisor = math.gcd(*counts)
        self._own, self.number = parts[0], number
        self._parts = [(part, n // divisor) for part, n in zip(parts, counts, strict=True) if n]
        self._stays = stays if stays is not None and bool(stays.any()) else None
        # Spread evenly: for each position in a cycle, the component and its draw's index within the cycle.
        places = sorted(((i + 0.5) / n, c, i) for c, (_, n) in enumerate(self._parts) for i in range(n))
        self._cycle = torch.tensor([place[1:] for place in places], device="cpu")  # [period, 2]

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self._own.batch

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._own.device

    def rows(self, start: int, stop: int) -> _InTurn | None:
        parts, shares, number = self._given
        some = [part.rows(start, stop) for part in parts]
        known = [part for part in some if part is not None]
        stays = None if self._stays is None else self._stays[start:stop]
        return _InTurn(known, shares, number, stays) if len(known) == len(some) else None

    @property
    def strata(self) -> int:  # type: ignore[override]
        return max(part.strata for part, _ in self._parts)

    def _turns(self, samples: int, seed: Tensor, sample_offset: int) -> Iterator[tuple[Any, ...]]:
        """Yield each component with the indices of its samples, its seed and the index of its first draw.

        Its further draws have consecutive indices. Randomisations are treated separately.
        """
        period, numbers = len(self._cycle), torch.arange(sample_offset, sample_offset + samples, device="cpu")
        seeds = seed.split(1) if seed.dim() else (seed,)
        for r, seed in enumerate(seeds):
            mine = (numbers % len(seeds) == r).nonzero()[:, 0]
            turns = numbers[mine] // len(seeds) + int(seed) % period
            which, within = self._cycle[turns % period].unbind(1)
            for c, (part, count) in enumerate(self._parts):
                place = (which == c).nonzero()[:, 0]
                if len(place):
                    first = int(turns[place[0]]) // period * count + int(within[place[0]])
                    yield part, mine[place], derived_seed(seed, period * self.number + c), first

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        drawn, places = [], []
        for part, place, own_seed, first in self._turns(samples, seed, sample_offset):
            drawn.append(_z(part, len(place), own_seed, first, row_offset))
            places.append(place)
        order = torch.cat(places).argsort().to(drawn[0].device)
        z = torch.cat([d.to(drawn[0].dtype) for d in drawn])[order]
        if self._stays is None:
            return z
        own = _z(self._own, samples, seed, sample_offset, row_offset)
        return torch.where(self._stays[:, None], own, z.to(own.dtype))

    def log_shares(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        """Return the log weight of each draw within a component that is itself a stratified mixture."""
        shares = torch.zeros(samples, self.batch, device=seed.device)
        for part, place, own_seed, first in self._turns(samples, seed, sample_offset):
            found = log_shares(part, len(place), own_seed, first)
            if found is not None:
                shares = shares.to(found.dtype)
                shares[place.to(seed.device)] = found.expand(-1, self.batch)
        own = log_shares(self._own, samples, seed, sample_offset)
        if self._stays is None or own is None:
            return shares if self._stays is None else torch.where(self._stays, 0.0, shares)
        return torch.where(self._stays, own.to(shares.dtype), shares)

    def log_prob(self, z: Tensor) -> Tensor:
        value = self._mixed(z)
        return value if self._stays is None else torch.where(self._stays, self._own.log_prob(z), value)

    def _mixed(self, z: Tensor) -> Tensor:
        scores = [p.log_prob(z) + math.log(n / len(self._cycle)) for p, n in self._parts]
        return torch.logsumexp(torch.stack(scores), 0)


def _like(q: Distribution, r: Distribution) -> Distribution:
    """Give the proposal r the latent shape of q."""
    if r is not q and q.latent is not None:
        r.__dict__["latent"] = q.latent
    return r


def _example(q: Distribution, row_offset: int = 0) -> Tensor:
    """Draw one z per example, [B, D], with a fixed seed; 0 where it is not finite."""
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    z = rsample(q, 1, seed, row_offset=row_offset)[0][0]
    return torch.where(z.isfinite(), z, 0.0)


def _with_rows(prior: Distribution, batch: int, like: Tensor) -> Distribution | None:
    """Expand the prior to a distribution with rows that supports draws at an address; None if it cannot."""
    made = prior
    if not (prior.has_rows and prior.batch == batch):
        try:
            made = prior.expand(batch, like)
        except NotImplementedError:
            return None
    if isinstance(made, TorchDistribution):
        zero = torch.zeros((), dtype=torch.int64, device=like.device)
        return made if at_address(made.distribution, (1, *like.shape), zero, {}) is not None else None
    return made


def _is_everywhere(d: TorchDistribution) -> bool:
    """Return True if the declared support is all of R^D, or unknown."""
    try:
        support = d.distribution.support
    except NotImplementedError:
        return True
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))
