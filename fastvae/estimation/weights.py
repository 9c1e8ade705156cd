r"""Estimates of log p(x) from importance weights, with their errors and diagnostics.

With the maximum M of the log weights, :math:`S_j = \sum_k e^{j (\log w_k - M)}`, of which
:mod:`fastvae.estimation.sums` keeps the parts, and :math:`\tilde w_k = w_k / \sum_l w_l`:

.. math::
    \log \hat p = M + \log S_1 - \log K, \quad \mathrm{ESS} = S_1^2 / S_2, \quad
    \mathrm{stderr} = \sqrt{(S_2 / S_1^2 - 1/K)\, K / (K - 1)}

The standard error is the delta method's, :math:`\mathrm{sd}(w) / (\sqrt K\, \bar w)`. Quasi-Monte-Carlo draws
are not independent: their errors and the jackknife use the randomisations, which are independent
(:func:`between`).

*Coefficients*: where draw k has the coefficient c (:class:`~fastvae.estimation.proposals.Adapted`), with
:math:`\bar w = \sum c w / \sum c`, the variance is that of a ratio of means (Owen, Monte Carlo theory,
methods and examples, section 9.2, on self-normalised importance sampling):

.. math::
    V = \frac{\sum c^2 (w - \bar w)^2}{\left(\sum c w\right)^2}, \quad
    \mathrm{stderr} = \sqrt{V K / (K - 1)}, \quad \mathrm{ESS} = 1 / (1/K + V)

With c = 1 these are the formulas above. The difference :math:`\sum c^2 w^2 / (\sum c w)^2 - \sum c^2 / (\sum
c)^2` has the same expectation to first order, but it retains a term linear in :math:`δ = w / \bar w - 1`,
:math:`2 \sum c^2 δ / (\sum c)^2`, which exceeds V where the weights vary by less than about
:math:`1/\sqrt K`. The third moment, for the interval's skewness, is centred in the same way. The moments are
computed without cancellation (:mod:`fastvae.estimation.sums`).

*Jackknife* (Nowozin, Debiasing Evidence Approximations, ICLR 2018, order 1): it removes the bias of order
1/K. Leaving out draw k multiplies the sum by :math:`1 - \tilde w_k`, so

.. math::
    K L_K - (K - 1) \frac{1}{K} \sum_k L_{K \setminus k}
      = \log \hat p - \frac{K - 1}{K} \sum_k \log(1 - \tilde w_k) - (K - 1) \log \frac{K}{K - 1}

exactly in the tail, and in the rest by the logarithm's series, :math:`-\sum_{j \le 6} \tilde w^j / j`. With T
draws in the tail :math:`\tilde w \le 1 / (T + 1)` in the rest, so that the truncation error is less than
:math:`(T + 1)^{-6} / 7`, 2e-12 for the shortest tail, and far less if only a few draws have such large
weights. With coefficients, leaving out draw k also leaves out its coefficient, :math:`u = c / \sum c`, so
that :math:`\log(1 - u)` takes the place of :math:`\log(1 - 1/K)`. The jackknife's variance is V multiplied by
the ratio of the two methods' variances of the products c w, which is 1 + O(max w̃).

*Pareto smoothing* (Vehtari et al., Pareto Smoothed Importance Sampling, JMLR 25, 2024): the tail's weights
are replaced by quantiles of the generalised Pareto distribution fitted to them, capped at the largest weight.

*Interval*: the lower end is Hall's for a mean (On the Removal of Skewness by Transformation, 1992, the
cubic transformation), in logarithms, and never below :math:`\log \hat p + \log(α/2)`: by Markov's inequality
:math:`\hat p > 2 p / α` has a probability of at most α/2. The upper end is the larger of Hall's and the
quantile of

.. math:: \log \Big[ (1 - \tfrac nK) \bar w_{\text{body}} + \tfrac nK \big(u + \tfrac{σ}{1 - ξ}\big) \Big]

over Zhang and Stephens' posterior of the Pareto distribution (ξ, σ) of the n weights above u, and over the
sampling error of the body and of n. The mean of the weights, p(x), is finite, so ξ < 1. If a quarter or more
of the posterior has ξ ≥ 1, the draws do not determine the missing mass, and the upper end is +∞. For
quasi-Monte-Carlo draws the interval is Student's for the mean of the randomisations. If k̂ is above 0, which
implies rare large weights that few randomisations contain, the interval is widened to include that of
independent draws. Coverage is measured in docs/estimators.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.fast_path import ON_CPU, ON_GPU, plain
from ..core.records import registered
from .estimates import estimate, estimates_of, in_quadrature, median, nll, nll_where_trusted
from .pareto import TailFit, finite_shift, fit_tail, rows_at_once
from .sums import POWERS, WeightSums, moved, rescaled

__all__ = ["LogMarginal", "Weights"]

# Coefficients of x^j, j = 1 .. 6, in log(1 - x) and in its square.
_LOG = (-1.0, -1 / 2, -1 / 3, -1 / 4, -1 / 5, -1 / 6)
_LOG_SQUARE = (0.0, 1.0, 1.0, 11 / 12, 5 / 6, 137 / 180)
# Relative variance of the weights below which the jackknife's error is the delta method's: they differ by
# less than 1e-3/K, and the jackknife's is a difference of nearly equal numbers.
_NEARLY_EQUAL = 1e-8
# Posterior probability of a tail shape ξ ≥ 1 from which the upper end of the interval is +∞.
_OPEN = 0.25
# Largest Pareto k̂ for which the spread of a few randomisations is trusted as the error of their mean.
_LIGHT = 0.0
# Probability of the intervals of a summary, and the normal quantile of their ends.
_LEVEL = 0.95, NormalDist().inv_cdf(0.975)
# Numbers of the tails of a batch on a GPU up to which copies to the CPU and back take less time than the
# launches of the formulas.
_MOST_ON_HOST = 2**14
# Nodes and weights of Gauss-Hermite quadrature for N(0, 1).
_NODES = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))


@registered
@dataclass(frozen=True, eq=False, kw_only=True)
class LogMarginal:
    """Importance-sampling estimates of log p(x), each [B], in nats, with their errors and diagnostics.

    Each is the property of that name of ``Weights``.
    """

    log_px: Tensor = field(
        metadata=estimate(
            figure=nll,
            stderr="log_px_stderr",
            about="log of the mean weight: low by about log_px_stderr²/2",
            quote="as a bound, where k̂ is above 0.7",
        )
    )
    """Log of the mean weight: a lower bound of log p(x) in expectation."""
    log_px_stderr: Tensor = field(metadata=estimate(figure=in_quadrature, nonnegative=True))
    """Standard error of log_px over the draws, by the delta method."""
    ess: Tensor = field(metadata=estimate(figure=median, unit="draws", nonnegative=True))
    """Effective sample size, out of k draws."""
    khat: Tensor = field(metadata=estimate(figure=median, unit=""))
    """Pareto k̂: above 0.7 neither estimates nor standard errors are reliable."""
    jackknife: Tensor = field(
        metadata=estimate(
            figure=nll_where_trusted,
            stderr="jackknife_stderr",
            about="without the bias of order 1/K (Nowozin 2018)",
            quote="where k̂ is below 0.7, most of all for means",
        )
    )
    """Jackknife estimate, without the bias of order 1/k (Nowozin 2018): the one to average over examples."""
    jackknife_stderr: Tensor = field(metadata=estimate(figure=in_quadrature, nonnegative=True))
    """Standard error of the jackknife estimate."""
    psis: Tensor = field(
        metadata=estimate(
            figure=nll,
            stderr="log_px_stderr",
            about="the largest weights replaced by quantiles of a Pareto distribution (Vehtari et al. 2024)",
            quote="for a single example whose k̂ is above 0.5: the least rms error, but low on average",
        )
    )
    """Pareto-smoothed estimate (Vehtari et al. 2024): lower variance for heavy-tailed weights, biased low."""
    low: Tensor
    """Lower end of the 95 % interval for log p(x) over the draws (:mod:`fastvae.estimation.weights`)."""
    high: Tensor
    """Upper end of the interval; +∞ where the draws do not bound log p(x)."""


ESTIMATES = estimates_of(LogMarginal)
_other_estimates = _backend.native("weight_estimates")


@dataclass(frozen=True, eq=False)
class Weights(WeightSums):
    """Estimates of log p(x), their errors and diagnostics, from the statistics of the weights."""

    @property
    def log_px(self) -> Tensor:
        """Estimate of log p(x) [B], the log of the mean weight."""
        return self._log_mean(self._sums(1)[0])

    def _log_mean(self, total: Tensor) -> Tensor:
        """Return the log of the mean weight [B], given the sum of weights relative to the maximum."""
        return finite_shift(self.maximum).double() + torch.log(total) - torch.log(self.count.double())

    @property
    def elbo(self) -> Tensor:
        """Mean of the log weights [B], the bound for k=1."""
        return self.log_sum / self.count

    @property
    def log_px_stderr(self) -> Tensor:
        """Standard error of log_px [B]; NaN for one draw.

        For quasi-Monte-Carlo draws it is computed by :func:`between`.
        """
        if self.turns.shape[0]:
            return between(self.turns, self.count).stderr
        return self._standard_error

    @property
    def _standard_error(self) -> Tensor:
        k = self.count.double()
        return (self._central[0] * (k / (k - 1))).sqrt()

    @functools.cached_property
    def _central(self) -> tuple[Tensor, Tensor]:
        r"""Sums of :math:`(\tilde w - u)^2` and :math:`(\tilde w - u)^3`, each [B].

        Here :math:`u = c / \sum c`, so that :math:`\tilde w - u = u (w - \bar w) / \bar w`.
        """
        every = self.moments[0, 0]
        mean = self.moments[0, 1] / every
        central = moved(self.moments, -mean, torch.ones_like(mean))
        total = every * (1 - mean)
        # y falls as w grows.
        return central[1, 2].clamp(min=0) / total.square(), -central[2, 3] / total**3

    @property
    def ess(self) -> Tensor:
        """Effective sample size [B]."""
        return 1 / (1 / self.count.double() + self._central[0])

    @property
    def khat(self) -> Tensor:
        """Pareto k̂ [B], see :func:`pareto_khat`."""
        return self._pareto.khat

    @property
    def jackknife(self) -> Tensor:
        """Jackknife estimate [B].

        It is NaN for one draw, and infinite if only one weight is nonzero, since leaving it out leaves log 0.
        For quasi-Monte-Carlo draws one randomisation at a time is left out.
        """
        return self._jackknife[0]

    @property
    def jackknife_stderr(self) -> Tensor:
        """Standard error of the jackknife estimate [B]."""
        return self._jackknife[1]

    @functools.cached_property
    def _jackknife(self) -> tuple[Tensor, Tensor]:
        if self.turns.shape[0]:
            found = between(self.turns, self.count)
            nothing = (self.maximum == -math.inf) & (found.number > 1)
            value = torch.where(nothing, -math.inf, self.log_px + found.correction)
            return value, found.jackknife_stderr
        k = self.count.double()
        tail, rest = self._relative()
        total = tail.sum(0) + rest[0]
        share = tail / total
        # The sum without the largest weight, which may dominate, is computed relative to the second largest.
        second = finite_shift(self.tail[1]).double()
        others = torch.exp(self.tail[1:].double() - second).sum(0)
        others = others + rescaled(self.powers[:1], finite_shift(self.tail[-1]).double() - second)[0]
        without = second - finite_shift(self.maximum).double() + torch.log(others) - torch.log(total)
        left_out = torch.cat([without[None], torch.log1p(-share[1:])])
        # Padding of the tail, and -inf minus -inf.
        left_out = torch.where(self.tail == -math.inf, 0.0, left_out)
        scaled = rest / total ** torch.arange(1, POWERS + 1, device=total.device)[:, None]
        first = left_out.sum(0) + torch.tensordot(scaled.new_tensor(_LOG), scaled, 1)
        square = left_out.square().sum(0) + torch.tensordot(scaled.new_tensor(_LOG_SQUARE), scaled, 1)
        # Sum of -log(1 - u), minus its value for equal coefficients, to third order.
        every = self.moments[0, 0]
        uneven = (self.moments[1, 0] / every**2 - 1 / k) / 2 + (self.moments[2, 0] / every**3 - 1 / k**2) / 3
        value = self._log_mean(total) - (k - 1) * (first / k - torch.log1p(-1 / k) + uneven / k)
        of_delta = share.square().sum(0) + scaled[1] - 1 / k
        ratio = (square - first.square() / k) / of_delta
        ratio = torch.where(k * of_delta < _NEARLY_EQUAL, (k / (k - 1)).square(), ratio)
        error = (self._central[0] * ratio * (k - 1) / k).sqrt()
        nothing = self.maximum == -math.inf
        return torch.where(nothing & (k > 1), -math.inf, value), torch.where(nothing, math.nan, error)

    @property
    def psis(self) -> Tensor:
        """Pareto-smoothed estimate of log p(x) [B]; log_px where no tail can be fitted."""
        fit = self._pareto
        tail, rest = self._relative()
        rank = torch.arange(self.tail.shape[0], dtype=torch.float64, device=tail.device)[:, None]
        # Standard exponential quantiles; those of the Pareto distribution are σ (e^{k x} - 1) / k.
        x = -torch.log1p(-((rank + 0.5) / fit.n).clamp(max=1 - 1e-16))
        flat = fit.khat.abs() < 1e-8
        grown = torch.where(flat, x, torch.expm1(fit.khat * x) / torch.where(flat, 1.0, fit.khat))
        smooth = (torch.exp(fit.cutoff) + fit.scale * grown).clamp(max=1.0)
        body = torch.where(fit.inside, 0.0, tail).sum(0) + rest[0]
        total = body + torch.where(rank < fit.n, smooth, 0.0).sum(0)
        return torch.where(fit.khat.isfinite(), self._log_mean(total), self.log_px)

    @property
    def low(self) -> Tensor:
        """Lower end of the 95 % interval [B]."""
        return self._interval_of_summary[0]

    @property
    def high(self) -> Tensor:
        """Upper end of the 95 % interval [B]."""
        return self._interval_of_summary[1]

    @property
    def left_out(self) -> Tensor:
        """log_px without one group of the draws at a time [G, B]; [0, B] without groups.

        For quasi-Monte-Carlo draws the groups are the randomisations.
        """
        if not self.groups.shape[0]:
            return self.groups
        if self.turns.shape[0]:
            sums = self.turns
            g = torch.arange(sums.shape[0], device=sums.device)[:, None]
            others = (self.count - (self.count - g + sums.shape[0] - 1) // sums.shape[0]).double()
        else:
            sums, every = self.groups, self.moments[0, 0]
            others = (every - self.shares) * (self.count / every)
        return finite_shift(self.maximum).double() + torch.log(without_each(sums)) - torch.log(others)

    def summary(self, dtype: torch.dtype = torch.float64) -> LogMarginal:
        """Compute all estimates.

        On a CPU, and for a small batch on a GPU, they come from the C++: the formulas are hundreds of small
        ops, which take longer than the draws of a small model.
        """
        found = self._estimates_in_cpp()
        if found is None:
            found = {name: getattr(self, name) for name in ESTIMATES}
        elif self.turns.shape[0]:
            # The errors of quasi-Monte-Carlo draws are those of their randomisations.
            found["log_px_stderr"] = self.log_px_stderr
            found["jackknife"], found["jackknife_stderr"] = self._jackknife
            ends = found["low"], found["high"]
            found["low"], found["high"] = self._of_randomisations(_LEVEL[0], *ends, found["khat"])
        return LogMarginal(**{name: t.to(dtype) for name, t in found.items()})

    def _estimates_in_cpp(self) -> dict[str, Tensor] | None:
        """Return the estimates for independent draws by csrc/weights.hpp; None where it does not apply."""
        if torch.compiler.is_compiling() or not self.count.numel():
            return None
        tensors = self.tail, self.powers, self.moments, self.count
        place, log_px = plain(tensors), self.log_px
        if place == ON_CPU and _backend.on_cpu() == "native":
            tail, powers, moments, count = (t.contiguous() for t in tensors)
            others = _other_estimates(log_px, tail.double(), powers, moments, count, *_LEVEL)
        elif (
            place == ON_GPU
            and not _backend.LEFT_OUT
            and self.tail.numel() <= _MOST_ON_HOST
            and _backend.is_native_on_gpu(log_px.device)
            and not torch.cuda.is_current_stream_capturing()
        ):
            wide = self.tail.double(), self.powers, self.moments.flatten(0, 1), self.count.double()[None]
            (on_host,), *parts = torch.cat([log_px[None], *wide]).cpu().split([1, *map(len, wide)])
            tail, powers, moments, (count,) = parts
            moments, count = moments.view_as(self.moments), count.long()
            others = _other_estimates(on_host, tail, powers, moments, count, *_LEVEL)
            others = torch.stack(others).to(log_px.device).unbind()
        else:
            return None
        return dict(zip(ESTIMATES, (log_px, *others), strict=True))

    @functools.cached_property
    def _pareto(self) -> TailFit:
        """Pareto distribution of the tail, which several estimates share."""
        return fit_tail(self.tail, self.count)

    @functools.cached_property
    def _interval_of_summary(self) -> tuple[Tensor, Tensor]:
        return self.interval(_LEVEL[0])

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of an interval for log p(x), each [B], with coverage ``level`` over seeds."""
        fit = self._pareto
        ends = self._independent(level, fit)
        return self._of_randomisations(level, *ends, fit.khat) if self.turns.shape[0] else ends

    def _of_randomisations(
        self, level: float, low: Tensor, high: Tensor, khat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the interval from the spread of the randomisations, given that for independent draws."""
        found = between(self.turns, self.count)
        quantile = [_student(level, n - 1) for n in range(2, self.turns.shape[0] + 1)]
        number = (found.number - 2).clamp(min=0).long()
        error = found.stderr * found.stderr.new_tensor([*quantile, math.nan])[number]
        log_px = self.log_px
        ends = (
            log_px + torch.log((1 - error).clamp(min=(1 - level) / 2)),
            log_px + torch.log1p(error),
        )
        light = khat <= _LIGHT
        low = torch.where(light, ends[0], torch.fmin(low, ends[0]))
        return low, torch.where(light, ends[1], torch.fmax(high, ends[1]))

    def _independent(self, level: float, fit: TailFit) -> tuple[Tensor, Tensor]:
        """Return the interval for independent draws."""
        k, below = self.count.double(), (1 - level) / 2
        z = NormalDist().inv_cdf((1 + level) / 2)
        log_px, error, (second, third) = self.log_px, self._standard_error, self._central
        # Skewness over √K is at most 1, its value if a single weight is nonzero.
        skewness = third / second**1.5
        skewness = skewness.nan_to_num(nan=0.0).clamp(min=-1, max=1)
        low = 1 - error * _hall(z, skewness)
        high = log_px + torch.log(1 - error * _hall(-z, skewness))
        low = log_px + torch.log(low.clamp(min=below))
        high = torch.maximum(high, self._pareto_end(1 - below, fit))
        # A single draw has no spread, but Markov's inequality still applies.
        low = torch.where(k == 1, log_px + math.log(below), low)
        high = torch.where((k == 1) | (self.maximum == -math.inf), math.inf, high)
        low = torch.where(self.maximum == -math.inf, -math.inf, low)
        return low, torch.where(self.maximum.isnan(), math.nan, high)

    def _pareto_end(self, probability: float, fit: TailFit) -> Tensor:
        """Return the quantile of log p(x) over the tail's posterior [B].

        It is -inf without a fit, and +inf where the posterior does not bound it.
        """
        k, n = self.count.double(), fit.n.double()
        tail, rest = self._relative()
        share = n / k
        mean = (torch.where(fit.inside, 0.0, tail).sum(0) + rest[0]) / (k - n)
        found_above = torch.where(fit.inside, tail, 0.0).sum(0) / n
        within = torch.where(fit.inside, tail - found_above, 0.0).square().sum(0) / n
        # Variance of all weights, whose part within the tail is replaced by that of the fit. It bounds the
        # distance of the means above and below the cutoff, which coefficients would widen.
        every = k * self._central[0] * ((1 - share) * mean + share * found_above).square()
        gap = torch.minimum(found_above - mean, (every / (share * (1 - share))).sqrt())

        # Given θ, log(1 - θ x) is exponential: its mean, ξ, has a relative error of 1 / √n.
        shape = torch.cat([fit.xi * torch.exp(x / n.sqrt()) for x, _ in _NODES])
        weight = torch.cat([fit.weight * w for _, w in _NODES])
        open_share = torch.where(shape < 1, 0.0, weight).sum(0) / weight.sum(0)
        above = torch.exp(fit.cutoff) - shape / fit.theta.repeat(len(_NODES), 1) / (1 - shape)
        weight = torch.where((shape < 1) & above.isfinite(), weight, 0.0)
        above = torch.where(weight > 0, above, 1.0)
        total = (1 - share) * mean + share * above
        shift = above - found_above
        variance = (every - share * within).clamp(min=0) + share * (1 - share) * shift * (2 * gap + shift)
        spread = (torch.where(variance > 0, variance, every) / k).sqrt() / total
        at = torch.log(total)
        weight = weight / weight.sum(0)

        used = weight > 0
        begin = torch.where(used, at - 7 * spread, math.inf).amin(0)
        end = torch.where(used, at + 7 * spread, -math.inf).amax(0)

        def excess(value: Tensor) -> Tensor:
            parts = value.split(rows_at_once(value, at))
            each = [(weight * torch.special.ndtr((v[:, None] - at) / spread)).sum(1) for v in parts]
            return torch.cat(each) - probability

        found: Tensor = finite_shift(self.maximum).double() + _root(excess, begin, end)
        found = torch.where(open_share < _OPEN, found, math.inf)
        found = torch.where(fit.khat.isfinite(), found, -math.inf)
        return torch.where(fit.khat == math.inf, math.inf, found)


def _root(f: Callable[[Tensor], Tensor], begin: Tensor, end: Tensor) -> Tensor:
    """Find the root [B] of f, which rises from below 0 at ``begin`` [B] to above 0 at ``end``.

    f takes any number of values per example, [N, B]: a GPU's launches cost more than their arithmetic. Each
    step keeps one of nine parts, until f is almost linear; then two steps of regula falsi.
    """
    parts = torch.arange(1, 9, device=begin.device)[:, None]
    for _ in range(7):
        width = (end - begin) / 9
        begin = begin + width * (f(begin + width * parts) < 0).sum(0)
        end = begin + width
    low, high = f(torch.stack([begin, end]))
    for _ in range(2):
        middle = _crossing(begin, end, low, high)
        value = f(middle[None])[0]
        above = value >= 0
        begin, low = torch.where(above, begin, middle), torch.where(above, low, value)
        end, high = torch.where(above, middle, end), torch.where(above, value, high)
    return _crossing(begin, end, low, high)


def _crossing(begin: Tensor, end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where the line from (begin, low) to (end, high) crosses 0, at most at an end."""
    share = (low / (low - high)).nan_to_num(0.0).clamp(0, 1)
    return begin + share * (end - begin)


def _hall(z: float, skewness: Tensor) -> Tensor:
    """Map a normal quantile z to that of the studentised mean, given the skewness over √K."""
    a = torch.where(skewness.abs() < 1e-12, 1e-12, skewness)
    x = a * (z - a / 6)
    root = torch.where(
        x > -0.5, torch.expm1(torch.log1p(x) / 3), (1 + x).sign() * (1 + x).abs() ** (1 / 3) - 1
    )
    return 3 * root / a


def without_each(sums: Tensor) -> Tensor:
    """Return the sum over the first axis without each of its elements.

    Adds the others instead of subtracting one, which may be nearly the whole.
    """
    zero = sums.new_zeros(1, *sums.shape[1:])
    before = torch.cat([zero, sums.cumsum(0)[:-1]])
    after = torch.cat([sums.flip(0).cumsum(0).flip(0)[1:], zero])
    return before + after


class Between(NamedTuple):
    """Statistics of an estimate from the spread of its randomisations, each [B].

    ``stderr`` is the standard error, ``correction`` the jackknife minus the estimate, ``jackknife_stderr``
    the jackknife's standard error, and ``number`` the count of randomisations with at least one draw.
    """

    stderr: Tensor
    correction: Tensor
    jackknife_stderr: Tensor
    number: Tensor


def between(turns: Tensor, count: Tensor) -> Between:
    r"""Compute the standard error of :math:`\log \hat p` from R independent, unbiased randomisations.

    .. math:: \mathrm{stderr} = \frac{1}{\bar p} \sqrt{\frac{1}{R (R - 1)} \sum_r (\hat p_r - \bar p)^2}

    It has R − 1 degrees of freedom, so intervals use Student's quantiles. The jackknife leaves out one
    randomisation at a time.

    Args:
        turns: sum of each randomisation's weights [R, B], on any scale.
        count: total number of draws [B], assigned to the randomisations in turn, starting with the first.

    Returns:
        :class:`Between`; NaN where fewer than two randomisations have a draw.
    """
    r = torch.arange(turns.shape[0], device=turns.device)[:, None]
    points = (count - r + turns.shape[0] - 1) // turns.shape[0]
    drawn = points > 0
    number = drawn.sum(0).double()
    means = torch.where(drawn, turns / points, 0.0)
    mean = means.sum(0) / number
    square = torch.where(drawn, (means - mean).square(), 0.0).sum(0)
    stderr = (square / (number * (number - 1))).sqrt() / mean
    # Mean without one randomisation, relative to the mean of all; 1 for randomisations without draws.
    others = torch.where(drawn, without_each(means) / (number - 1) / mean, 1.0).log()
    average = others.sum(0) / number
    square = torch.where(drawn, (others - average).square(), 0.0).sum(0)
    jackknife_stderr = (square * (number - 1) / number).sqrt()
    return Between(stderr, -(number - 1) * average, jackknife_stderr, number)


@functools.cache
def _student(level: float, degrees: int) -> float:
    """Return Student's t for a two-sided interval, for an integer number of degrees of freedom.

    Bisection of the distribution function, which is elementary (Abramowitz & Stegun, 26.7.3 and 26.7.4).
    """

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        cos, term, total = math.cos(angle), 1.0, 0.0
        odd = degrees % 2
        for n in range(odd, degrees - 1, 2):
            total += term
            term *= cos**2 * (n + 1) / (n + 2)
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * cos * total)

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return low
