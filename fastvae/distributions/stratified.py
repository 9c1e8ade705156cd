"""Stratified mixture: each sample is drawn from a known component."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import random
from ..core.checks import check_count, check_tensor, shape_of
from ..ops.op import accumulator
from .base import Distribution, hold, is_family, support_of_mixture
from .draws import Drawable, draw_z, log_stratum_weights
from .read import as_component
from .runs import without_noise
from .wrapped import TorchDistribution, at_address


class Mixture(Distribution):
    r"""Mixture of a few distributions of any families, as a posterior or a prior.

    .. math:: q(z|x) = \sum_c π_c(x)\, q_c(z|x)

    A posterior's draws are stratified: they cycle through the C components, starting at one that the seed
    chooses. A draw from component c has weight C π_c, so that gradients reach the logits, too, and is
    evaluated under the mixture's density. The weights are unbiased for any number of samples; a multiple of C
    draws equally often from each component. Components that are the same for all examples, such as the prior,
    make it a defensive proposal, whose weights are bounded. A component may be a mixture, too: its draws are
    stratified within it.

    ``estimator="dreg"`` raises: its identity holds for draws from q itself. The ELBO that
    :func:`fastvae.evaluate` reports weights the components equally: it is a lower bound, too.

    Args:
        components: C distributions, in any form that :func:`fastvae.elbo` accepts for q or for the prior.
        logits: π = softmax(logits): [B, C] for a posterior, or [C]. Default: equal weights.

    Raises:
        TypeError, ValueError: for invalid components or logits.

    References:
        Morningstar et al., Automatic Differentiation Variational Inference with Mixtures, 2021, eq. 6 and 8;
        Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.

    Example:
        >>> import torch, fastvae
        >>> x, decoder = torch.ones(4, 7), torch.nn.Linear(3, 7)
        >>> near, wide = (torch.zeros(4, 3), torch.zeros(4, 3)), fastvae.distributions.StandardNormal()
        >>> q = fastvae.distributions.Mixture([near, wide], torch.tensor([2.0, 0.0]))
        >>> fastvae.iwae(x, q, decoder, k=10, likelihood="bernoulli").shape
        torch.Size([])
    """

    logits: Tensor | None

    def __init__(self, components: Sequence[Any], logits: Tensor | None = None):
        super().__init__()
        if not isinstance(components, (list, tuple)) or not components:
            raise TypeError(
                "components must be a list of distributions, at least one; got "
                f"{'an empty one' if components in ([], ()) else type(components).__name__}"
            )
        self.components: tuple[Distribution, ...] = tuple(as_component(c) for c in components)
        for i, component in enumerate(self.components):
            if isinstance(self, nn.Module) and isinstance(component, nn.Module):
                self.add_module(f"component_{i}", component)
        count = len(components)
        batches: list[int] = []  # not a set, which would fix a compiler's symbolic sizes
        for c in self.components:
            if c.has_rows and c.batch != 1 and c.batch not in batches:
                batches.append(c.batch)
        if len(batches) > 1:
            raise ValueError(f"the components are of {sorted(batches)} examples; expected the same B of all")
        if logits is not None:
            check_tensor("logits", logits)
            shapes = [[count], *([b, count] for b in batches or [1])]
            if list(logits.shape) not in shapes:
                raise ValueError(
                    f"logits has shape {shape_of(logits)} for {count} components; expected [C] or [B, C], "
                    f"one of {shapes}"
                )
        hold(self, logits=logits)

    def _first(self) -> Distribution:
        """Return the first component among those with the most rows."""
        found: Distribution | None = None
        for c in self.components:
            if c.has_rows and (found is None or c.batch > found.batch):
                found = c
        assert found is not None
        return found

    @property
    def strata(self) -> int:  # type: ignore[override]
        return len(self.components)

    @property
    def has_rows(self) -> bool:
        return any(c.has_rows for c in self.components)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self._first().batch

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._first().device

    @property
    def support(self) -> Any:
        return support_of_mixture(self.components)

    @property
    def z_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        found = {c.z_dtype for c in self.components}
        return found.pop() if len(found) == 1 else None

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        by_row = self.logits is not None and self.logits.dim() == 2
        return by_row or any(c.per_row for c in self.components)

    @property
    def reaches_others(self) -> bool:
        return any(c.reaches_others for c in self.components)

    @property
    def known_dim(self) -> int | None:
        known = (c.known_dim for c in self.components)
        return next((dim for dim in known if dim is not None), None)

    @property
    def mean(self) -> Tensor:
        return self._mixed([c.mean for c in self.components])

    @property
    def variance(self) -> Tensor:
        means = [c.mean for c in self.components]
        mean = self._mixed(means)
        pairs = zip(self.components, means, strict=True)
        return self._mixed([c.variance + (m - mean).square() for c, m in pairs])

    def _mixed(self, values: list[Tensor]) -> Tensor:
        """Return the average of the components' values, by π; a component without rows has them for all."""
        # N(0, I) has scalars on the CPU.
        widest = max(values, key=lambda v: v.dim())
        shares = self._log_weights(widest).exp().unbind(-1)
        weighted = [s[..., None] * v for s, v in zip(shares, values, strict=True)]
        return torch.stack(torch.broadcast_tensors(*weighted)).sum(0)

    def _log_weights(self, like: Tensor) -> Tensor:
        """Return log π, [C] or [B, C]."""
        if self.logits is None:
            return like.new_full((self.strata,), -math.log(self.strata))
        return torch.log_softmax(self.logits.to(like.dtype), -1)

    def log_prob(self, z: Tensor) -> Tensor:
        values = torch.stack([c.log_prob(z) for c in self.components], -1)
        return torch.logsumexp(values + self._log_weights(values), -1)

    def prepared(self) -> Distribution:
        parts = [c.prepared() for c in self.components]
        return self if all(a is b for a, b in zip(parts, self.components, strict=True)) else self._of(parts)

    def _of(self, parts: list[Distribution], logits: Any = ...) -> Mixture:
        return Mixture(parts, self.logits if logits is ... else logits)

    def _turns(self, samples: int, seed: Tensor, sample_offset: int) -> tuple[Tensor, Tensor | int]:
        """Return each sample's turn, whose remainder by C is its component, and its randomisation's index.

        Turns start where the seed says, and are counted separately in each randomisation.
        """
        numbers = torch.arange(sample_offset, sample_offset + samples, device=seed.device)
        if not seed.dim():
            return numbers + torch.remainder(seed, self.strata), 0
        turn = torch.remainder(numbers, seed.shape[0])
        return numbers // seed.shape[0] + torch.remainder(seed, self.strata)[turn], turn

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        first, count_each, places = self._places(samples, seed, sample_offset)

        def draw(c: int, component: Distribution) -> Tensor:
            place = {"sample_offset": first, "row_offset": row_offset}
            return component.rsample_log_prob(count_each, _seed_of(component, seed, c), **place)[0]

        z = torch.cat(self._from_each(draw, seed)).index_select(0, places)
        return z, without_noise(self, self.log_prob, z)

    def _places(self, samples: int, seed: Tensor, sample_offset: int) -> tuple[int, int, Tensor]:
        """Return the first draw from each component, the number of draws, and each sample's place in these.

        They are the range that any seed could select, in each randomisation; components follow each other.
        """
        count, r = self.strata, random.randomisations_of(seed) or 1
        first = sample_offset // r // count
        last = ((sample_offset + samples - 1) // r + count - 1) // count
        turns, randomisation = self._turns(samples, seed, sample_offset)
        places = torch.remainder(turns, count) * (last - first + 1) + turns // count - first
        return r * first, r * (last - first + 1), r * places + randomisation

    def _from_each(self, draw: Callable[[int, Distribution], Tensor], seed: Tensor) -> list[Tensor]:
        """Draw z [K, B, D] from each component c by ``draw(c, component)``, expanded to all rows."""
        drawn: dict[int, Tensor] = {}
        like = None
        for c in sorted(range(self.strata), key=lambda c: not self.components[c].has_rows):
            component = self.components[c]
            if not component.has_rows or component.batch < self.batch:
                assert like is not None or component.has_rows  # components with rows come first
                like = component.rsample_log_prob(1, seed)[0] if like is None else like
                component = component.expand(self.batch, like)
            drawn[c] = like = draw(c, component)
        return [drawn[c] for c in range(self.strata)]

    def log_stratum_weights(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        dtype = torch.float32 if self.logits is None else accumulator(self.logits.dtype)
        weights = self._log_weights(torch.empty((), dtype=dtype, device=seed.device)) + math.log(self.strata)
        chosen = torch.remainder(self._turns(samples, seed, sample_offset)[0], self.strata)
        shares = weights.mT[chosen] if weights.dim() == 2 else weights[chosen][:, None]
        if all(c.strata == 1 for c in self.components):
            return shares
        # Draws of a component with strata have weights within it.
        first, count_each, places = self._places(samples, seed, sample_offset)
        within = [
            log_stratum_weights(component, count_each, _seed_of(component, seed, c), first)
            for c, component in enumerate(self.components)
        ]
        known = [shares.new_zeros(count_each, 1) if w is None else w.to(shares.dtype) for w in within]
        rows = max(w.shape[1] for w in known)
        return shares + torch.cat([w.expand(-1, rows) for w in known])[places]

    def sample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z without gradients, [k, B, D] with rows and [k, D] without; components are drawn by π.

        Args:
            k: number of draws, for each row if there are rows. Default 1.
            dim: number of latents D, if no component has them.
            device: device of the result, for components without tensors.
            generator: source of the seeds. Default: torch's own generator.
        """
        k = check_count("k", k, "the number of draws")
        with torch.no_grad():
            if self.has_rows:
                return self._sample_rows(k, generator)
            draws = [c.sample(k, dim=dim, device=device, generator=generator) for c in self.components]
            weights = self._log_weights(draws[0]).exp()
            if weights.dim() != 1:
                raise ValueError(
                    f"the prior's logits are of rows, {shape_of(weights)}; drawing from it needs [C]"
                )
            chosen = torch.multinomial(weights, k, replacement=True, generator=generator)
            return torch.stack(draws, 1)[torch.arange(k, device=chosen.device), chosen]

    def _sample_rows(self, k: int, generator: torch.Generator | None) -> Tensor:
        seed = random.draw_seed(self.device, generator)
        draws = self._from_each(lambda _, c: c.sample(k, generator=generator), seed)
        weights = self._log_weights(draws[0]).exp().expand(self.batch, -1)
        chosen = torch.multinomial(weights, k, replacement=True, generator=generator).mT  # [k, B]
        stacked = torch.stack(draws)
        return stacked.gather(0, chosen[None, ..., None].expand(1, *stacked.shape[1:]))[0]

    def rsample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Raise NotImplementedError: the choice of a component is not differentiable.

        Args:
            k: unused.
            dim: unused.
            device: unused.
            generator: unused.
        """
        raise NotImplementedError(
            f"{self.family.__name__} has no rsample: the choice of a component is not differentiable. Use "
            "sample, or rsample_log_prob, whose stratified draws log_stratum_weights weights"
        )

    def rows(self, start: int, stop: int) -> Mixture | None:
        if not is_family(self, Mixture):
            return None
        parts = [c.rows(start, stop) if c.has_rows and c.batch > 1 else c for c in self.components]
        known = [p for p in parts if p is not None]
        by_row = self.logits is not None and self.logits.dim() == 2
        logits = self.logits[start:stop] if by_row else self.logits  # type: ignore[index]
        return Mixture(known, logits) if len(known) == len(parts) else None

    def expand(self, batch: int, like: Tensor) -> Distribution:
        if not is_family(self, Mixture):
            return super().expand(batch, like)
        parts = [c if c.has_rows and c.batch == batch else c.expand(batch, like) for c in self.components]
        logits = self.logits
        return self._of(parts, logits if logits is None or logits.dim() == 1 else logits.expand(batch, -1))


class StratifiedMixture(Drawable):
    """Stratified mixture: components are drawn in a fixed cycle, from an offset that depends on the seed.

    All draws have equal weight, and each is distributed as the mixture, over random offsets.

    Args:
        parts: component distributions with rows, all with the same B.
        shares: each component's share of the draws, rounded to hundredths.
        number: index that separates its noise from that of other mixtures with the same seed. Default 1.
        stays: bool [B], the examples drawn from the first component alone, with the noise that this
            component has on its own. Default: None, no examples.
        dtype: dtype of z. Default: None, that of the first component with draws.
    """

    def __init__(
        self,
        parts: Sequence[Distribution],
        shares: Sequence[float],
        number: int = 1,
        stays: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._given, self._dtype = (parts, shares, number), dtype
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

    def rows(self, start: int, stop: int) -> StratifiedMixture | None:
        parts, shares, number = self._given
        some = [part.rows(start, stop) for part in parts]
        known = [part for part in some if part is not None]
        stays = None if self._stays is None else self._stays[start:stop]
        return (
            StratifiedMixture(known, shares, number, stays, self._dtype) if len(known) == len(some) else None
        )

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
                    yield part, mine[place], _seed_of(part, seed, period * self.number + c), first

    def draw(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        drawn, places = [], []
        for part, place, own_seed, first in self._turns(samples, seed, sample_offset):
            drawn.append(draw_z(part, len(place), own_seed, first, row_offset))
            places.append(place)
        order = torch.cat(places).argsort().to(drawn[0].device)
        dtype = self._dtype or drawn[0].dtype
        z = torch.cat([d.to(dtype) for d in drawn])[order]
        if self._stays is None:
            return z
        own = draw_z(self._own, samples, seed, sample_offset, row_offset)
        return torch.where(self._stays[:, None], own.to(dtype), z)

    def log_stratum_weights(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        """Return the log weight of each draw within a component that is itself a stratified mixture."""
        shares = torch.zeros(samples, self.batch, device=seed.device)
        for part, place, own_seed, first in self._turns(samples, seed, sample_offset):
            found = log_stratum_weights(part, len(place), own_seed, first)
            if found is not None:
                shares = shares.to(found.dtype)
                shares[place.to(seed.device)] = found.expand(-1, self.batch)
        own = log_stratum_weights(self._own, samples, seed, sample_offset)
        if self._stays is None or own is None:
            return shares if self._stays is None else torch.where(self._stays, 0.0, shares)
        return torch.where(self._stays, own.to(shares.dtype), shares)

    def log_prob(self, z: Tensor) -> Tensor:
        scores = [p.log_prob(z) + math.log(n / len(self._cycle)) for p, n in self._parts]
        value = torch.logsumexp(torch.stack(scores), 0)
        return value if self._stays is None else torch.where(self._stays, self._own.log_prob(z), value)


def derived_seed(seed: Tensor, number: int) -> Tensor:
    """Return a distinct seed for each number (multiplier of Knuth's MMIX)."""
    if torch.compiler.is_compiling():
        # A symbolic number would be printed with 2**63, which no 64-bit integer is.
        step = torch.full((), number + 1, dtype=torch.int64, device=seed.device) * 1442695040888963407
        return seed * 6364136223846793005 + (step & (2**63 - 1))
    return seed * 6364136223846793005 + 1442695040888963407 * (number + 1) % 2**63


def _seed_of(part: Distribution, seed: Tensor, number: int) -> Tensor:
    """Return the seed of a mixture's component.

    The low bits of a derived seed are a function of the seed's, which choose the component. They would choose
    the stratum within it, too: the same one for every seed that chooses this component.
    """
    own = derived_seed(seed, number)
    return own ^ (own >> 32) if part.strata > 1 else own


def expanded_at_address(prior: Distribution, batch: int, like: Tensor) -> Distribution | None:
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
