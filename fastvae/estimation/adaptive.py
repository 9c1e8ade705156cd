"""Sampler whose proposal is fitted to each example's weighted draws between rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributions.draws import draw_z
from ..distributions.multivariate_t import MultivariateStudentT
from ..distributions.stratified import StratifiedMixture, expanded_at_address
from ..inputs.batch import Inputs
from . import stream as _stream
from .draws import Draws, example_of, with_latent_of
from .weights import Weights

# Relative variance of the weights below which an example keeps q as its proposal.
EQUAL = 0.01


class Fit(NamedTuple):
    """Options of the fits, those of :class:`~fastvae.estimation.proposals.Adapted`."""

    posterior: float | None
    prior: float
    df: int | None
    scale: float | None
    rounds: list[int]  # draw counts at which the proposal is fitted
    equal: float = EQUAL  # relative variance of the weights below which an example keeps q


class _Drawn(NamedTuple):
    """Chunk of draws that the proposal is fitted to."""

    inputs: Inputs
    start: int
    rows: Tensor | None  # indices of the examples, None for all
    number: int  # index of the round, from 1
    log_w: Tensor  # [draws, B], -inf for examples not in rows


class AdaptedDraws(Draws):
    """Draws of a proposal that is fitted between rounds.

    Only the log weights of past draws are kept; z is redrawn chunk by chunk when moments are needed.
    """

    def __init__(self, fit: Fit, inputs: Inputs, *rest: Any):
        super().__init__(inputs, *rest)
        self._fit, self._rounds, self._q = fit, fit.rounds, inputs.q
        self._number = 1  # index of the round
        self._drawn: list[_Drawn] = []
        self._fitted: MultivariateStudentT | None = None
        self._stays: Tensor | None = None  # [B], True for examples that keep q
        self._elbo: Tensor | None = None  # [B], mean log weight of the first round

    def weights(self, start: int, stop: int, rows: Tensor | None = None) -> Weights | None:
        total: Weights | None = None
        for first, last in pairwise([start, *(n for n in self._rounds if start < n < stop), stop]):
            kept: list[Tensor] | None = [] if last <= max(self._rounds, default=0) else None
            part = self.folded(first, last, rows, kept)
            if part is not None:
                part = part.weighted(self._number)
                total = part if total is None else total.merge(part)
            if kept is not None:
                self._keep(kept, self._ranks.share(first, last)[0], rows)
            if last in self._rounds:
                self._refit(rows)
        return total

    def at_once(self, looks: Sequence[int]) -> None:
        """Return None: later draws depend on earlier ones."""

    def _keep(self, chunks: list[Tensor], start: int, rows: Tensor | None) -> None:
        for log_w in chunks:
            if rows is not None:
                every = log_w.new_full((len(log_w), self._q.batch), -math.inf)
                log_w = every.index_copy(1, rows, log_w)
            self._drawn.append(_Drawn(self._inputs, start, rows, self._number, log_w))
            start += len(log_w)

    def estimate(self, total: Weights) -> Weights:
        """Rescale the draws of round t by c_t n / Σ c_t n_t, which is 1 on average."""
        return total.scaled(torch.log(total.count / total.moments[0, 0]))

    def elbo(self, total: Weights) -> Tensor:
        first = self._elbo if self.elbo_of_q is None else self.elbo_of_q
        return total.elbo if first is None else first

    def _refit(self, rows: Tensor | None) -> None:
        """Fit the next round's proposal for these examples."""
        q = self._q
        like = example_of(q, self._row_offset)
        numbers = torch.arange(q.batch, device=like.device) if rows is None else rows
        log_w, counts, begin = self._everyones(numbers)
        w, ess, stays = tempered(log_w, counts, 3 * like.shape[1] + 5, self._fit.equal)
        mean, covariance = self._moments(w[begin:], numbers, like)
        d = like.shape[1]
        scale = self._fit.scale or 1 + 0.3 / math.sqrt(d)
        fitted = MultivariateStudentT.of(
            mean, scale**2 * shrunk(covariance, ess), self._fit.df or max(8, d), like
        )
        if self._fitted is None or self._stays is None:  # the first round has all rows
            self._fitted, self._stays, self._elbo = fitted, stays, log_w.mean(0)
        else:
            self._fitted = self._fitted.put(numbers, fitted)
            self._stays = self._stays.index_copy(0, numbers, stays)
        self._number += 1
        share = self._fit.posterior
        if share is None:
            share = (1 - self._fit.prior) * max(0.1, d / (d + 50))
        shares = [share, self._fit.prior, 1 - share - self._fit.prior]
        prior = expanded_at_address(self._inputs.prior, q.batch, like)
        if prior is None:
            prior, shares = q, [sum(shares[:2]), 0.0, shares[2]]
        r = StratifiedMixture([q, prior, self._fitted], shares, self._number, self._stays, like.dtype)
        self._inputs = self._inputs._replace(q=with_latent_of(q, r))

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
            z = draw_z(q, len(drawn.log_w), self._seed, drawn.start, offset)
            parts.append(z if wanted is None else z[:, wanted])
        z = parts[0] if len(parts) == 1 else torch.hstack(parts)
        return z[:, numbers if drawn.rows is None else torch.searchsorted(drawn.rows, numbers)]


def tempered(
    log_w: Tensor, counts: Tensor, least: int, equal: float = EQUAL
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the weights [n, A], tempered where their effective sample size is below ``least``.

    Returns the normalised weights, including the coefficients ``counts`` [n, 1], their effective sample size
    [A], and True [A] where the relative variance of the weights without coefficients is below ``equal``.
    """
    log_w = torch.where(log_w.isfinite(), log_w, -math.inf)
    top = log_w.amax(0)
    # Clamped so that strong tempering also includes weights of 0.
    log_w = torch.where(top == -math.inf, 0.0, (log_w - top).clamp(min=-700.0))
    stays = len(log_w) / _effective(torch.softmax(log_w, 0)) - 1 < equal
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


def shrunk(covariance: Tensor, ess: Tensor) -> Tensor:
    """Correct the covariance [A, D, D] for bias by the effective sample size, and shrink its correlations."""
    weight = 4.0 * (covariance.shape[-1] - 1)
    kept = (ess / (weight + ess))[:, None, None]
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    shrunk = kept * covariance + torch.diag_embed((1 - kept[..., 0]) * diagonal)
    return shrunk / (1 - 1 / ess).clamp(min=0.2)[:, None, None]
