"""Mixtures: of normal distributions, of posteriors of pseudo-inputs or data, and of any distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, random
from ..core.checks import check_count, shape_of
from ..core.reductions import stratified_log_weights
from ..ops.mixture import check_components
from .base import Distribution, hold, is_family, support_of_mixture
from .covariance import FullNormal, LowRankNormal
from .draws import sample_as_stored
from .normal import DiagonalNormal
from .words import check_latents

# Elements of [N, U, D] computed at a time without a fused op.
MOST = 1 << 22


class _Components(Distribution):
    """Prior with many components, p(z) = Σ_u π_u p_u(z)."""

    logits: Tensor | None

    def _parts(self) -> Sequence[Distribution]:
        """Return distributions with rows, whose concatenation is the components."""
        raise NotImplementedError

    def _weights(self, like: Tensor, count: int) -> Tensor:
        """Return log π [U]."""
        if self.logits is None:
            return like.new_full((count,), -math.log(count))
        if self.logits.shape[0] != count:
            raise ValueError(
                f"logits has shape {shape_of(self.logits)}, but there are {count} components; expected [U] = "
                f"[{count}]"
            )
        return torch.log_softmax(self.logits.to(like.dtype), 0)

    def log_prob(self, z: Tensor) -> Tensor:
        scores = self._scores(z)
        return torch.logsumexp(scores + self._weights(scores, scores.shape[-1]), -1)

    def _scores(self, z: Tensor) -> Tensor:
        """Return log p_u(z) [..., U]."""
        parts = self._parts()
        rows, found = z.reshape(-1, z.shape[-1]), []
        for part in parts:
            size = max(1, MOST // max(1, part.batch * z.shape[-1]))
            pieces = (piece[:, None].expand(-1, part.batch, -1) for piece in rows.split(size))
            found.append(torch.cat([part.log_prob(piece) for piece in pieces]))
        return torch.cat(found, 1).reshape(*z.shape[:-1], -1)

    @torch.no_grad()
    def sample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        k = check_count("k", k, "the number of draws")
        parts = self._parts()
        where, count = parts[0].device, sum(part.batch for part in parts)
        weights = self._weights(torch.empty((), device=where), count).exp()
        chosen = torch.multinomial(weights, k, replacement=True, generator=generator)
        seed = random.draw_seed(where, generator)
        z, first = None, 0
        for part in parts:
            for u in torch.unique(chosen[(chosen >= first) & (chosen < first + part.batch)]).tolist():
                row = part.rows(u - first, u - first + 1)
                if row is None:
                    raise NotImplementedError(
                        f"the components are of the family {type(part).__name__}, whose rows(start, stop) is "
                        "not implemented; drawing from the mixture needs it"
                    )
                places = (chosen == u).nonzero()[:, 0]
                draws = sample_as_stored(row, places.shape[0], seed, generator, row_offset=u)[0][:, 0]
                z = draws.new_empty(k, draws.shape[1]) if z is None else z
                z[places] = draws
            first += part.batch
        assert z is not None
        check_latents(self.family.__name__, z.shape[1], dim)
        return z

    @property
    def mean(self) -> Tensor:
        return self._moments(False)[0]

    @property
    def variance(self) -> Tensor:
        return self._moments(True)[1]

    def _moments(self, both: bool) -> tuple[Tensor, Tensor]:
        """Return the mean [D], and the variance [D] if ``both``."""
        parts = self._parts()
        means = torch.cat([part.mean for part in parts])
        shares = self._weights(means, means.shape[0]).exp()
        mean = shares @ means
        if not both:
            return mean, mean
        variances = torch.cat([part.variance for part in parts])
        return mean, shares @ (variances + (means - mean).square())


class NormalMixture(_Components, nn.Module):  # type: ignore[misc]
    r"""Mixture of diagonal normal distributions, as a prior, fixed or learned.

    .. math:: p(z) = \sum_u π_u\, N(z; μ_u, \operatorname{diag} e^{\mathrm{logvar}_u})

    Args:
        mu, logvar: means and log variances of the components, [U, D] each; ``nn.Parameter`` if learned.
        logits: π = softmax(logits), [U]. Default: equal weights.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.

    References:
        Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders,
        2016.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar, logits = (torch.nn.Parameter(t) for t in (torch.randn(9, 3), torch.zeros(9, 3),
        ...                                                       torch.zeros(9)))
        >>> prior = fastvae.distributions.NormalMixture(mu, logvar, logits)
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood="bernoulli",
        ...                   prior=prior)
        >>> (-vae.iwae(torch.rand(4, 7), k=5)).backward()
        >>> mu.grad.shape
        torch.Size([9, 3])
    """

    mu: Tensor
    logvar: Tensor

    def __init__(self, mu: Tensor, logvar: Tensor, logits: Tensor | None = None):
        super().__init__()
        check_components(mu, logvar, logits)
        hold(self, mu=mu, logvar=logvar, logits=logits)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    @property
    def has_rows(self) -> bool:
        return False

    def log_prob(self, z: Tensor) -> Tensor:
        return ops.mixture_log_prob(z, self.mu, self.logvar, self.logits)

    def _parts(self) -> Sequence[Distribution]:
        return [DiagonalNormal(self.mu, self.logvar)]


class _Rows(_Components):
    """Mixture of the rows of posteriors of other families."""

    def __init__(self, parts: list[Distribution], logits: Tensor | None):
        super().__init__()
        self.parts = tuple(parts)
        hold(self, logits=logits)

    def _parts(self) -> Sequence[Distribution]:
        return self.parts

    @property
    def support(self) -> Any:
        return support_of_mixture(self.parts)

    @property
    def reaches_others(self) -> bool:
        return any(part.reaches_others for part in self._parts())


def _log_aggregate_of_rows(parts: list[Distribution], z: Tensor, dataset_size: int | None) -> Tensor:
    """Return log q(z) [...] of posteriors of any family, by the scores of all pairs."""
    rows = _Rows(parts, None)
    if dataset_size is None:
        return rows.log_prob(z)
    scores = rows._scores(z)  # [K, B, B]
    batch = scores.shape[-1]
    return torch.logsumexp(scores + stratified_log_weights(0, batch, batch, dataset_size, scores), -1)


def mixture_of_rows(parts: list[Distribution], logits: Tensor | None) -> NormalMixture | _Rows:
    """Return the mixture of the concatenated rows of posteriors."""
    pairs = [part.wide() for part in parts if is_family(part, DiagonalNormal)]
    if len(pairs) < len(parts):
        return _Rows(parts, logits)
    mu, logvar = (t[0] if len(t) == 1 else torch.cat(t) for t in zip(*pairs, strict=True))
    return NormalMixture(mu, logvar, logits)


def log_aggregate(
    parts: list[Distribution], z: Tensor, dataset_size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return log q(z) [...] of z [..., D], and the marginals log q(z_d) [..., D].

    q is the equally weighted mixture of all rows of posteriors. With ``dataset_size`` they are one batch, z
    [K, B, D] its draws, and the weights those of :func:`fastvae.ops.aggregate_log_prob`. The marginals are
    known for normal distributions, and are None otherwise.
    """
    if not sum(q.batch for q in parts):
        return z.sum(-1), z  # no rows: z is empty
    moments = [_marginals(q) for q in parts]
    known = [m for m in moments if m is not None]
    if len(known) < len(moments):
        return _log_aggregate_of_rows(parts, z, dataset_size), None
    mu, logvar = (torch.cat(m) if len(m) > 1 else m[0] for m in zip(*known, strict=True))
    whole, each = ops.aggregate_log_prob(z, mu, logvar, dataset_size=dataset_size)
    if all(is_family(q, DiagonalNormal) for q in parts):
        return whole, each
    return _log_aggregate_of_rows(parts, z, dataset_size), each


def _marginals(q: Distribution) -> tuple[Tensor, Tensor] | None:
    """Return mean and log variance of each dimension [B, D], or None if q is not normal."""
    if is_family(q, DiagonalNormal):
        return q.wide()
    if is_family(q, FullNormal):
        mu, scale, _ = q._parts()
        return mu, scale.square().sum(-1).log()
    if is_family(q, LowRankNormal):
        mu, logvar, factor = q.wide()
        return mu, (logvar.exp() + factor.square().sum(-1)).log()
    return None
