r"""What the draws of :func:`fastvae.log_marginal` and :func:`fastvae.evaluate` come from, ``proposal=``: q
itself, or something better.

Any density r that is positive wherever p(x, z) is will do: with :math:`w = p(x, z) / r(z)`, the mean of K
weights is an unbiased estimate of p(x), and its error is that of r as an approximation of p(z|x).
``"posterior"`` is q. ``"inflated"`` and ``"heavy"`` are q made wider, ``"defensive"`` draws a share from the
prior, which bounds the weights, and ``"adapted"`` fits a proposal to each example by what the draws so far
have shown.

A name stands for an object with its defaults: ``proposal="defensive"`` for ``fastvae.proposals.Defensive()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from . import _stream, random
from ._checks import check_count, check_number
from ._inputs import Inputs
from ._stream import Chunks
from ._teach import did_you_mean
from .distributions import (
    DiagonalNormal,
    Distribution,
    FullNormal,
    LowRankNormal,
    StudentT,
    log_shares,
    rsample,
)
from .distributions.base import is_still
from .distributions.covariance import _places, _solve, _times
from .distributions.draws import describe
from .distributions.mixture import _derived
from .distributions.wrapped import TorchDistribution, at_address
from .ops.op import accumulator
from .weights import Weights, tail_length

__all__ = ["Adapted", "Defensive", "Heavy", "Inflated", "Posterior", "Proposal", "as_proposal"]

# Draws that come from q before the first fit.
_FIRST = 64
# Excess of the second moment of the weights, relative, below which an example stays with q.
_EQUAL = 0.01


class Sharing(Protocol):
    """Processes that share the draws of each example, as :class:`fastvae.evaluate.ranks.Ranks` does."""

    rank: int

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's of these draws."""

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Everyone's, in the order of ranks."""


class Alone:
    """One process that makes all draws."""

    rank = 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def gather(self, mine: Any, what: str) -> list[Any]:
        return [mine]


class Proposal:
    """What the draws come from: the base of the classes below, and of none of the user's own (a posterior of
    one's own is given as q).
    """

    def of(self, q: Distribution, prior: Distribution) -> Distribution:
        """The distribution that is drawn from, for this posterior and prior.

        Raises:
            TypeError, ValueError: for a posterior or a prior that this proposal cannot be made of.
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
        """The draws for a batch, of which there will be k at most.

        Args:
            inputs: the batch.
            seed, row_offset: the noise's address.
            k: the most draws.
            chunks: how many are made at a time.
            tail: how many of the largest weights are kept.
            ranks: the processes that share each example's draws; None for this one alone.
        """
        r = self.of(inputs.q, inputs.prior)
        made = inputs._replace(q=_like(inputs.q, r))
        return Draws(made, seed, row_offset, chunks, tail, ranks or Alone(), r is inputs.q)


@dataclass(frozen=True)
class Posterior(Proposal):
    """Draws from q(z|x): the default.

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
    """q with its standard deviations multiplied: for a q that is too narrow, as one trained with the ELBO is.

    q must be a normal distribution: a pair (mu, logvar), :class:`fastvae.FullNormal` or
    :class:`fastvae.LowRankNormal`.

    Args:
        scale: what the standard deviations are multiplied by.

    Raises:
        TypeError, ValueError: if scale is no number above 0.

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
            diagonal = _places(mu.shape[-1], mu.device)[2]
            return FullNormal(q.mu, (tril * self.scale).index_copy(-1, diagonal, tril[..., diagonal] + more))
        if isinstance(q, LowRankNormal) and is_still(q, LowRankNormal):
            _, logvar, factor = q._wide()
            return LowRankNormal(q.mu, logvar + 2 * more, factor * self.scale)
        raise _wrong_family("inflated", q, "a normal distribution")


@dataclass(frozen=True)
class Heavy(Proposal):
    """Student's t in each dimension, with q's mean and scale: its tails are heavier than those of any p(z|x)
    that is nearly normal, so the weights are bounded.

    q must be a pair (mu, logvar), a :class:`fastvae.DiagonalNormal`.

    Args:
        df: degrees of freedom.

    Raises:
        TypeError, ValueError: if df is no number above 0.

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
    r"""q, and in some draws the prior: :math:`r = (1 - s)\, q(z|x) + s\, p(z)`.

    The weights are bounded by :math:`\max_z p(x|z) / s`, and a mode of p(z|x) that q has missed is found
    where the prior's draws find it, in a few dimensions. The draws are stratified: of any 1/s in a row one
    comes from the prior, of each randomisation with ``noise="qmc"``; each weighs by the density of the
    mixture.

    The prior must be one that can be drawn from at an address: N(0, I), a normal or another of fastvae's
    families of a location and a scale, or torch's with a quantile function; not a VampPrior, a NormalMixture
    or a Hierarchy.

    Args:
        share: s, between 0 and 1: the nearest fraction with a denominator of at most 100.

    Raises:
        TypeError, ValueError: if share is no number between 0.01 and 0.99.

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
    r"""A proposal for each example, fitted to what its draws so far have shown, and fitted again as they
    come.

    The first 64 draws come from q. Then, at draws 64, 80, 100, 125, …, a quarter more each time, a
    multivariate Student t with a full covariance is fitted to the weighted moments of all draws so far, and
    the next round comes from

    .. math:: r_t = s_q\, q + s_p\, p + (1 - s_q - s_p)\, t_ν(μ_t, Σ_t)

    in turn, until nine tenths of the draws or ``most`` are made, four fifths of few; the rest come from the
    last. In the estimate

    .. math:: \hat p(x) = \sum_t c_t \sum_{k ∈ t} \frac{p(x, z_k)}{r_t(z_k)} \Big/ \sum_t c_t n_t,
              \quad c_t = t

    all draws count. **Each draw is weighed by the density of its own round**, mixture and all, which depends
    on earlier rounds alone: so :math:`\hat p(x)` is unbiased for any k, however good or bad the fits are (the
    log of it is low by half its relative variance, as always). To weigh early draws by densities that were
    fitted to them, as AMIS does, is consistent but not unbiased: by 0.1 nats and more at k = 500 and D = 8
    (docs/NOTES.md). Later rounds count more because they are better; ``stderr`` and ``ess`` take account of
    it.

    Where the first weights are degenerate the fit tempers them, :math:`w^a` with the largest a ≤ 1 that
    leaves an effective sample of 3 D + 5; the correlations are shrunk by :math:`4 (D - 1) / (4 (D - 1) +
    \mathrm{ESS})`. An example whose weights are equal to within a hundredth of their variance has nothing to
    gain, and stays with q.

    It needs q's ``log_prob``, and latents on all of R^D. Where the prior cannot be drawn from at an address
    (a VampPrior, a Hierarchy, one of torch's without a quantile function) its share is q's. In memory are a
    number for each draw that is fitted to, ``most`` for an example, and matrices [B, D, D] in float64. q's
    ELBO, as :class:`fastvae.Evaluation` reports it, is that of the first 64 draws.

    Args:
        posterior: :math:`s_q`, q's share of the draws; default 0.1, or D/(D + 50) where that is more, of
            what the prior leaves: in many dimensions a fit needs more draws than there are, and a good q is
            not to be lost (docs/NOTES.md).
        prior: :math:`s_p`, the prior's; it finds modes that q has missed, in a few dimensions.
        df: ν, an int; default D, and at least 8. In many dimensions heavier tails would cost more than they
            save: the radii of a t vary by :math:`1 / \sqrt{2ν}`, those of a normal by :math:`1 / \sqrt{2 D}`.
        scale: what the fitted standard deviations are multiplied by; default :math:`1 + 0.3 / \sqrt D`.
        most: draws that are fitted to at most.

    Raises:
        TypeError, ValueError: for arguments that are no such numbers, or shares that leave nothing.

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
        """That of the first round."""
        _check_density("adapted", q)
        for d in (q, prior):
            if isinstance(d, TorchDistribution) and not _is_everywhere(d):
                raise ValueError(
                    f"proposal='adapted' draws z from all of R^D, but {describe(d)} has a density on a "
                    "part of it only; use another proposal"
                )
        return q

    def rounds(self, k: int) -> list[int]:
        """Of k draws, those after which the proposal is fitted."""
        found, stop = [], _FIRST
        # The tail that k̂ is fitted to is the last round's, whose draws all count the same.
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
    """A name, or an object of this module, that is drawn from with noise of this kind.

    Raises:
        TypeError, ValueError: for anything else.
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
    """The draws of a batch from one proposal: their weights as they come."""

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
        """This process's part of draws ``start`` to ``stop``, of these examples if not all; None for none."""
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
        """What all draws so far come to."""
        return total

    def elbo(self, total: Weights) -> Tensor:
        """The mean log weight under q [B]; NaN where no draws are q's."""
        return total.elbo if self._are_of_q else torch.full_like(total.elbo, math.nan)


class _Drawn(NamedTuple):
    """A chunk of draws that is fitted to."""

    inputs: Inputs
    start: int
    rows: Tensor | None  # the examples, if not all
    number: int  # of the round
    log_w: Tensor  # [draws, B], -inf for the others


class _AdaptedDraws(Draws):
    """Those of a proposal that is fitted between rounds.

    Of draws that are fitted to the weights are kept, and they are drawn again, chunk by chunk as they were,
    where their moments are needed.
    """

    def __init__(self, how: Adapted, rounds: list[int], inputs: Inputs, *rest: Any):
        super().__init__(inputs, *rest)
        self._how, self._rounds, self._q = how, rounds, inputs.q
        self._number = 1  # of the round
        self._drawn: list[_Drawn] = []
        self._fitted: _FullT | None = None
        self._stays: Tensor | None = None  # [B], the examples that stay with q
        self._elbo: Tensor | None = None  # [B], the mean log weight of the first round

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
        """With a draw of round t counting c_t n / Σ c_t n_t, which is 1 on average, and with a second moment
        that leaves this out: so the standard error and the effective sample size are those of the rounds
        together.
        """
        n = total.count.double()
        first, second = torch.zeros_like(n), torch.zeros_like(n)
        for t, (start, stop) in enumerate(pairwise([0, *self._rounds, 2**32]), 1):
            draws = (n - start).clamp(min=0, max=stop - start)
            first, second = first + t * draws, second + t**2 * draws
        scaled = total.scaled(torch.log(n / first))
        spread = second / first.square() - 1 / n
        return scaled._replace(uneven=spread)

    def elbo(self, total: Weights) -> Tensor:
        return total.elbo if self._elbo is None else self._elbo

    def _fit(self, rows: Tensor | None) -> None:
        """Make the next round's proposal of these examples."""
        q = self._q
        like = _example(q, self._row_offset)
        numbers = torch.arange(q.batch, device=like.device) if rows is None else rows
        log_w, counts, begin = self._everyones(numbers)
        w, ess, stays = _tempered(log_w, counts, 3 * like.shape[1] + 5)
        mean, covariance = self._moments(w[begin:], numbers, like)
        d = like.shape[1]
        scale = self._how.scale or 1 + 0.3 / math.sqrt(d)
        fitted = _FullT.of(mean, scale**2 * _shrunk(covariance, ess), self._how.df or max(8, d), like)
        if self._fitted is None or self._stays is None:  # rows leave later
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
        """The log weights of everyone's draws for these examples [n, A], what each draw counts [n, 1], and
        where this process's begin.
        """
        mine = [(d.number, d.log_w[:, numbers].double().cpu()) for d in self._drawn]
        every = self._ranks.gather(mine, "fit")
        begin = sum(len(log_w) for part in every[: self._ranks.rank] for _, log_w in part)
        log_w = torch.cat([log_w for part in every for _, log_w in part])
        counts = torch.cat([log_w.new_full((len(part), 1), t) for parts in every for t, part in parts])
        return log_w.to(numbers.device), counts.to(numbers.device), begin

    def _moments(self, w: Tensor, numbers: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [A, D] and covariance [A, D, D] of everyone's draws; w begins with the weights of this
        process's.
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
        """z of a chunk [draws, A, D] for these examples, a part of those that it was drawn for."""
        spans = _stream.spans_of(drawn.inputs, self._row_offset, drawn.rows)
        parts = []
        for q, offset, wanted in spans:
            z = _z(q, len(drawn.log_w), self._seed, drawn.start, offset)
            parts.append(z if wanted is None else z[:, wanted])
        z = parts[0] if len(parts) == 1 else torch.hstack(parts)
        return z[:, numbers if drawn.rows is None else torch.searchsorted(drawn.rows, numbers)]


def _tempered(log_w: Tensor, counts: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights [n, A] to fit to, tempered where fewer than ``least`` of them are effective; their
    effective sample size [A]; and whether the weights, but for what each draw counts [n, 1], are equal.
    """
    log_w = torch.where(log_w.isfinite(), log_w, -math.inf)
    top = log_w.amax(0)
    # A weight of 0 is one that counts for nothing where a few do, and for something where hardly any does.
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
    """Unbiased, as far as the effective sample size tells, and with its correlations shrunk [A, D, D]."""
    weight = 4.0 * (covariance.shape[-1] - 1)
    kept = (ess / (weight + ess))[:, None, None]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = kept * covariance + torch.diag_embed((1 - kept[..., 0]) * diagonal)
    return shrunk / (1 - 1 / ess).clamp(min=0.2)[:, None, None]


# Distributions to draw from


class _Drawable(Distribution):
    """A distribution that is drawn from without its density, too."""

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        """z [K, B, D], what :meth:`rsample` draws."""
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
    r"""A multivariate Student t, :math:`z = μ + L ε \sqrt{ν / χ^2_ν}`, whose parameters are float64.

    Args:
        mu: [B, D].
        scale: L, lower triangular [B, D, D].
        df: ν.
        dtype: of z.
    """

    def __init__(self, mu: Tensor, scale: Tensor, df: int, dtype: torch.dtype):
        super().__init__()
        self.mu, self.scale, self.df, self.dtype = mu, scale, df, dtype

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, df: int, like: Tensor) -> _FullT:
        """Of this mean and scale matrix; z in the dtype of ``like``, which tells variances from 0."""
        least = (torch.finfo(like.dtype).eps * mean.abs()).square() + torch.finfo(like.dtype).tiny
        sd = torch.maximum(covariance.diagonal(dim1=-2, dim2=-1), least).sqrt()
        correlation = covariance / (sd[:, :, None] * sd[:, None])
        root, info = torch.linalg.cholesky_ex(
            correlation + 1e-12 * torch.eye(sd.shape[1], dtype=sd.dtype, device=sd.device)
        )
        # What is NaN is so in q, too: any normal will do beside it.
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
        """With the parameters of some examples replaced."""
        mu, scale = self.mu.index_copy(0, rows, other.mu), self.scale.index_copy(0, rows, other.scale)
        return _FullT(mu, scale, self.df, self.dtype)

    def rows(self, start: int, stop: int) -> _FullT:
        return _FullT(self.mu[start:stop], self.scale[start:stop], self.df, self.dtype)

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        d, place = self.mu.shape[1], {"sample_offset": sample_offset, "row_offset": row_offset}
        shape, dtype = (samples, self.batch, d + self.df), accumulator(self.dtype)
        normals = random.normal(seed, *shape, dtype=dtype, **place).double()  # type: ignore[arg-type]
        chi_square = normals[..., d:].square().sum(-1, keepdim=True)
        z = self.mu + _times(normals[..., :d] * (self.df / chi_square).sqrt(), self.scale.mT)
        return z.to(self.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        d, df = self.mu.shape[1], self.df
        square = _solve(self.scale, z.double() - self.mu).square().sum(-1)
        constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - 0.5 * d * math.log(df * math.pi)
        logs = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = constant - logs - 0.5 * (df + d) * torch.log1p(square / df)
        return value.to(accumulator(z.dtype))


class _InTurn(_Drawable):
    """A mixture whose parts are drawn from in turn, each as often as its share says, from a place that the
    seed chooses: every draw counts the same, and is one of the mixture's over the places.

    Args:
        parts: distributions with rows, the same B.
        shares: of the draws; their nearest hundredths.
        number: tells its noise from that of others with the same seed.
        stays: [B], the examples that are drawn from the first part alone, with the noise that this has when
            it is drawn from by itself; None for none.
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
        # Evenly spread: of each place of a cycle the part, and which of this part's draws in a cycle it is.
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
        """Of each part whose turn comes: it, which of the samples are its own, and the seed and the number of
        the first of these, which the others follow; in each randomisation by itself.
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
                    yield part, mine[place], _derived(seed, period * self.number + c), first

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
        """What a draw counts among those of a part that is a mixture itself."""
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
    """A proposal with latents of q's shape."""
    if r is not q and q.latent is not None:
        r.__dict__["latent"] = q.latent
    return r


def _example(q: Distribution, row_offset: int = 0) -> Tensor:
    """A draw of each example, [B, D], whatever the seed; 0 where it is not finite."""
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    z = rsample(q, 1, seed, row_offset=row_offset)[0][0]
    return torch.where(z.isfinite(), z, 0.0)


def _with_rows(prior: Distribution, batch: int, like: Tensor) -> Distribution | None:
    """The prior as a distribution with rows, whose draws are functions of their addresses; None where that is
    not known.
    """
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
    """Whether its density is positive on all of R^D, as far as it says."""
    try:
        support = d.distribution.support
    except NotImplementedError:
        return True
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))
