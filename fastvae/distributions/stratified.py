"""Stratified mixture: each sample is drawn from a known component."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from .. import random
from ..core.checks import check_tensor, shape_of
from ..ops.op import accumulator
from .base import Distribution, hold, is_family, is_real
from .read import as_component


class Mixture(Distribution):
    r"""Mixture of a few distributions of any families, as a posterior or a prior.

    .. math:: q(z|x) = \sum_c π_c(x)\, q_c(z|x)

    A posterior's draws are stratified: they cycle through the C components, starting at one that the seed
    chooses. A draw from component c has weight C π_c, so that gradients reach the logits, too, and is
    evaluated under the mixture's density. The weights are unbiased for any number of samples; a multiple of C
    draws equally often from each component. Components that are the same for all examples, such as the prior,
    make it a defensive proposal, whose weights are bounded.

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
        batches = {c.batch for c in self.components if c.has_rows} - {1}
        if len(batches) > 1:
            raise ValueError(f"the components are of {sorted(batches)} examples; expected the same B of all")
        if logits is not None:
            check_tensor("logits", logits)
            shapes = [[count], *([b, count] for b in batches or {1})]
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
        supports = [c.support for c in self.components]
        return td.constraints.real if any(is_real(s) for s in supports) else supports[0]

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
    def mean(self) -> Tensor | None:  # type: ignore[override]
        known = [c.mean for c in self.components]
        means = [m for m in known if m is not None]
        if len(means) < len(known):
            return None
        shares = self._log_weights(means[0]).exp().unbind(-1)
        return torch.stack([s[..., None] * m for s, m in zip(shares, means, strict=True)]).sum(0)

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

    def rsample(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        count, batch = self.strata, self.batch
        # Draw from each component the range that any seed could select, in each randomisation.
        r = random.randomisations_of(seed) or 1
        first = sample_offset // r // count
        last = ((sample_offset + samples - 1) // r + count - 1) // count
        parts, like = [], None
        for c in sorted(range(count), key=lambda c: not self.components[c].has_rows):
            component = self.components[c]
            if not component.has_rows or component.batch < batch:
                assert like is not None or component.has_rows  # components with rows come first
                component = component.expand(batch, component.rsample(1, seed)[0] if like is None else like)
            z, _ = component.rsample(
                r * (last - first + 1), derived_seed(seed, c), sample_offset=r * first, row_offset=row_offset
            )
            like = z
            parts.append((c, z))
        turns, randomisation = self._turns(samples, seed, sample_offset)
        places = torch.remainder(turns, count) * (last - first + 1) + turns // count - first
        places = r * places + randomisation
        z = torch.cat([z for _, z in sorted(parts, key=lambda p: p[0])]).index_select(0, places)
        return z, self.log_prob(z)

    def log_shares(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        dtype = torch.float32 if self.logits is None else accumulator(self.logits.dtype)
        weights = self._log_weights(torch.empty((), dtype=dtype, device=seed.device)) + math.log(self.strata)
        chosen = torch.remainder(self._turns(samples, seed, sample_offset)[0], self.strata)
        return weights.mT[chosen] if weights.dim() == 2 else weights[chosen][:, None]

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        draws = [c.sample(n, dim, device=device, generator=generator) for c in self.components]
        weights = self._log_weights(draws[0]).detach().exp()
        if weights.dim() != 1:
            raise ValueError(
                f"the prior's logits are of rows, {shape_of(weights)}; drawing from it needs [C]"
            )
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        return torch.stack(draws, 1)[torch.arange(n, device=chosen.device), chosen]

    def rows(self, start: int, stop: int) -> Mixture | None:
        if not is_family(self, Mixture):
            return None
        parts = [c.rows(start, stop) if c.has_rows and c.batch > 1 else c for c in self.components]
        known = [p for p in parts if p is not None]
        by_row = self.logits is not None and self.logits.dim() == 2
        logits = self.logits[start:stop] if by_row else self.logits  # type: ignore[index]
        return Mixture(known, logits) if len(known) == len(parts) else None


def derived_seed(seed: Tensor, number: int) -> Tensor:
    """Return a distinct seed for each number (multiplier of Knuth's MMIX)."""
    return seed * 6364136223846793005 + 1442695040888963407 * (number + 1) % 2**63
