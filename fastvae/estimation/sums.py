r"""Streaming sums of importance weights, which chunks and machines merge.

Memory does not grow with K except for the tail, the :math:`3\sqrt K` largest log weights, at least 64. The
tail is stored exactly; the weights below it are stored as the sums of six powers. Draws of other chunks or
machines are merged by adding sums, never means.

Central moments come from the sums of powers of :math:`y = 1 - w / w_{\max}`. With :math:`\rho = w_{\max} /
w'_{\max} \le 1`, draws of another set are merged by

.. math:: y' = (1 - \rho) + \rho\, y,

whose terms are not negative. The largest weight has y = 0, so that :math:`\sum (y - \bar y)^2 \ge \bar y^2`
and :math:`\sum y^2 \le (K + 1) \sum (y - \bar y)^2`: centring loses at most a factor of K + 1 in precision,
however equal or unequal the weights. A difference of sums of w and w² would lose :math:`1 / \mathrm{var}(w)`.

Where draws have coefficients c, as in :mod:`fastvae.estimation.adaptive`, the powers, the tail and the groups
are those of c w, and the moments are sums of :math:`c^a y^b`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from .pareto import finite_shift, padded, tail_length

# Number of power sums of the weights below the tail, and minimum length of the tail.
POWERS, _LEAST_TAIL = 6, 64
# Highest order of the central moments.
_ORDER = 3
# Groups of draws that a jackknife leaves out one at a time: its error has a relative error of 1/√(2·31).
GROUPS = 32


def kept_draws(k: int) -> int:
    """Return the number of largest weights, of k draws, that :class:`WeightSums` must store."""
    return max(tail_length(k) + 1, min(k, _LEAST_TAIL))


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Statistics of the weights of a set of draws, per example; the last axis of every field is the batch."""

    powers: Tensor  # [6, B] float64, sums of w^j of the weights below the tail, relative to the tail's least
    log_sum: Tensor  # [B] float64, sum of the log weights
    count: Tensor  # [B] int64
    tail: Tensor  # [T, B], the largest log weights, descending; padded with -inf
    # [R, B] float64, sum of each randomisation's weights relative to the maximum; [0, B] if independent
    turns: Tensor
    # [G, B] float64, sum of each group's weights relative to the maximum; [0, B] unless requested
    groups: Tensor
    shares: Tensor  # [G, B] float64, sum of each group's coefficients
    reference: Tensor  # [B] float64, largest log weight without coefficients
    moments: Tensor  # [3, 4, B] float64, sums of c^a y^b for a = 1 .. 3, b = 0 .. 3

    @classmethod
    def of(cls, log_w: Tensor, tail: int, start: int = 0, randomisations: int = 0, groups: int = 0) -> Self:
        """Compute the statistics of log weights [K, B], storing the ``tail`` largest.

        ``start`` is the index of the first draw. Draw k belongs to randomisation k mod ``randomisations``,
        which is 0 for independent draws, and to group k mod ``groups``.
        """
        wide, (k, batch) = log_w.double(), log_w.shape
        count = torch.full((batch,), k, dtype=torch.int64, device=log_w.device)
        # topk treats NaN as the largest value.
        largest, place = log_w.topk(min(k, tail), dim=0)
        reference = largest[0].double()
        if k <= tail:
            largest, powers = padded(largest, tail), wide.new_zeros(POWERS, batch)
        else:
            below = torch.exp(wide - finite_shift(largest[-1]).double()).scatter_(0, place, 0.0)
            powers = _power_sums(below)
        y = torch.expm1(wide - finite_shift(reference)).neg_()
        moments = torch.stack([count.double(), *_power_sums(y, _ORDER)]).repeat(_ORDER, 1, 1)
        turns, by_group = (_by_turns(wide, start, n) for n in (randomisations, groups))
        group = torch.arange(groups, device=log_w.device)
        drawn = (start + k - 1 - group) // max(1, groups) - (start - 1 - group) // max(1, groups)
        shares = drawn.double()[:, None].repeat(1, batch)
        return cls(powers, wide.sum(0), count, largest, turns, by_group, shares, reference, moments)

    def merge(self, other: Self) -> Self:
        """Combine the statistics of two sets of draws."""
        length = self.tail.shape[0]
        tail, below = (
            torch.cat([self.tail, other.tail])
            .sort(0, descending=True)
            .values.split([length, other.tail.shape[0]])
        )
        least = finite_shift(tail[-1]).double()
        powers = _power_sums(torch.exp(below.double() - least))
        for part in (self, other):
            powers += rescaled(part.powers, finite_shift(part.tail[-1]).double() - least)
        # If all log weights are -inf the sums are 0, and so may be the scale.
        scale = finite_shift(tail[0]).double()
        mine, its = (torch.exp(part.maximum.double() - scale) for part in (self, other))
        turns, groups = self.turns * mine + other.turns * its, self.groups * mine + other.groups * its
        log_sum, count = self.log_sum + other.log_sum, self.count + other.count
        shares, reference = self.shares + other.shares, torch.maximum(self.reference, other.reference)
        moments = torch.zeros_like(self.moments)
        for part in (self, other):
            log_ratio = part.reference - finite_shift(reference)
            moments += moved(part.moments, -torch.expm1(log_ratio), torch.exp(log_ratio))
        return type(self)(powers, log_sum, count, tail, turns, groups, shares, reference, moments)

    def scaled(self, log_factor: float | Tensor) -> Self:
        """Multiply all weights of an example by exp(log_factor), a number or [B]."""
        if not isinstance(log_factor, Tensor):
            return self.scaled(torch.full_like(self.log_sum, log_factor)) if log_factor else self
        return replace(
            self,
            log_sum=self.log_sum + log_factor * self.count,
            tail=self.tail + log_factor.to(self.maximum.dtype),
            reference=self.reference + log_factor,
        )

    def weighted(self, coefficient: int) -> Self:
        """Multiply the coefficients of all draws."""
        powers = [coefficient**a for a in range(1, _ORDER + 1)]
        return replace(
            self.scaled(math.log(coefficient)),
            shares=coefficient * self.shares,
            reference=self.reference,
            moments=self.moments * self.moments.new_tensor(powers)[:, None, None],
        )

    def at(self, rows: Tensor) -> Self:
        """Return the statistics of the examples with indices ``rows``."""
        return type(self)(*(v[..., rows] for v in self.tensors))

    def put(self, rows: Tensor, part: Self) -> Self:
        """Replace the statistics of the examples with indices ``rows``."""
        pairs = zip(self.tensors, part.tensors, strict=True)
        return type(self)(*(v.index_copy(-1, rows, p) for v, p in pairs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, in the order of the constructor."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def _relative(self) -> tuple[Tensor, Tensor]:
        """Return the tail's weights [T, B] and the power sums of the rest [6, B], relative to the maximum."""
        shift = finite_shift(self.maximum).double()
        return torch.exp(self.tail.double() - shift), rescaled(
            self.powers, finite_shift(self.tail[-1]).double() - shift
        )

    def _sums(self, powers: int) -> Tensor:
        """Sum the first powers of all weights [powers, B], relative to the maximum."""
        tail, rest = self._relative()
        return _power_sums(tail, powers) + rest[:powers]

    @property
    def maximum(self) -> Tensor:
        """Largest log weight [B]."""
        return self.tail[0]


def _power_sums(values: Tensor, powers: int = POWERS) -> Tensor:
    """Sum the first powers of values [K, B]; returns [powers, B]."""
    power, sums = values.clone() if powers > 1 else values, [values.sum(0)]
    for _ in range(1, powers):
        power *= values  # in place: new memory for each power takes four times as long
        sums.append(power.sum(0))
    return torch.stack(sums)


def rescaled(powers: Tensor, log_scale: Tensor) -> Tensor:
    """Rescale power sums [J, B] to weights multiplied by exp(log_scale), [B]."""
    order = torch.arange(1, powers.shape[0] + 1, device=powers.device)[:, None]
    # An empty sum may come with an infinite scale.
    return torch.where(powers == 0, 0.0, powers * torch.exp(order * log_scale))


def moved(moments: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
    """Return the sums of c^a (offset + factor y)^b, given those of c^a y^b [3, 4, B]."""
    order = torch.arange(moments.shape[1], device=moments.device)[:, None]
    sums = moments * factor**order
    # Adding the lower power to the upper ones repeatedly gives binomial coefficients, in few launches.
    for b in range(1, sums.shape[1]):
        sums[:, b:] += offset * sums[:, b - 1 : -1]
    return sums


def _by_turns(log_w: Tensor, start: int, randomisations: int) -> Tensor:
    """Sum weights relative to the largest per randomisation [R, B], given log weights [K, B] in float64.

    Row k is draw ``start`` + k, and belongs to randomisation (``start`` + k) mod R.
    """
    if not randomisations:
        return log_w.new_empty(0, log_w.shape[1])
    w = torch.exp(log_w - finite_shift(log_w.amax(0)))
    front = start % randomisations
    whole: Tensor = functional.pad(w, (0, 0, front, -(front + w.shape[0]) % randomisations))
    return whole.reshape(whole.shape[0] // randomisations, randomisations, w.shape[1]).sum(0)
