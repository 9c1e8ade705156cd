"""Hierarchical latents: the prior over several levels, and its top-down posterior."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, random
from ..core.checks import on_same_device, shape_of
from ..core.nested import repeat
from ..ops.normal_arguments import options as options_of
from ..ops.normal_diagonal import flat_kl
from ..ops.op import accumulator
from .base import Distribution, is_family
from .draws import STANDARD, fused_prior
from .level import Level, Step, draw_direct, draw_relative, precision_weighted
from .normal import DiagonalNormal
from .runs import run


class Hierarchy(Distribution, nn.Module):  # type: ignore[misc]
    r"""Hierarchical prior over latents :math:`z_1 … z_L`, top-down; it also builds the posterior.

    .. math:: p(z) = \prod_l p(z_l | z_{<l}), \quad q(z|x) = \prod_l q(z_l | x, z_{<l}), \quad
              \mathrm{KL} = \sum_l E_q\big[ ½ \sum_d Δμ^2 / s^2 + e^{u} - 1 - u \big]

    with Δμ the difference of the means of q and p, and u that of their log variances. Calling the module with
    a bottom-up encoder's features returns the posterior. The module is also that posterior's prior: for a q
    from a hierarchy, every objective's ``prior=None`` means this hierarchy. The decoder gets all levels
    concatenated, z [N, D_1 + … + D_L]; :meth:`split` separates them.

    The ELBO's KL is analytic within each level, given the levels drawn above it. With ``free_bits`` the KL of
    each dimension is averaged over batch and samples.

    The networks run when an objective draws: once for its draws, and for ``"stl"`` and ``"dreg"``, which
    freeze q's parameters in its density, once more for each density. These runs repeat the first: they have
    its dropout masks, and update no buffers.

    Args:
        levels: a list of :class:`Level` from the top, whose latents are drawn first, to the bottom.

    Raises:
        TypeError, ValueError: for levels that do not fit together.

    References:
        Sønderby et al., Ladder Variational Autoencoders, 2016; Vahdat & Kautz, NVAE, 2020.

    Example:
        >>> import torch, fastvae
        >>> class Encoder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bottom, self.top = torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)
        ...         self.hierarchy = fastvae.distributions.Hierarchy([
        ...             fastvae.distributions.Level(2, torch.nn.Linear(4, 4)),
        ...             fastvae.distributions.Level(
        ...                 3, torch.nn.Linear(6, 6), prior=torch.nn.Linear(2, 6), merge="precision"
        ...             ),
        ...         ])
        ...     def forward(self, x):
        ...         h = self.bottom(x).relu()
        ...         return self.hierarchy([self.top(h).relu(), h])
        >>> x, encoder, decoder = torch.rand(16, 8), Encoder(), torch.nn.Linear(5, 8)
        >>> (-fastvae.elbo(x, encoder(x), decoder, likelihood="bernoulli")).backward()
        >>> fastvae.iwae(x, encoder(x), decoder, k=50, likelihood="bernoulli").shape
        torch.Size([])
        >>> [tuple(z.shape) for z in encoder.hierarchy.split(encoder.hierarchy.sample(7))]
        [(7, 2), (7, 3)]
    """

    def __init__(self, levels: Sequence[Level]):
        super().__init__()
        if isinstance(levels, Level) or not all(isinstance(level, Level) for level in levels):
            raise TypeError(
                "levels must be a list of fastvae.distributions.Level, from the top to the bottom"
            )
        if not levels:
            raise ValueError("levels is empty; expected one fastvae.distributions.Level at least")
        first = levels[0]
        if first.has_conditional_prior:
            raise ValueError(
                "level 1 has a prior that is a function of the levels above, and there are none: leave prior "
                "out for N(0, I), or give a fastvae.distributions.DiagonalNormal, whose parameters may be "
                "learned"
            )
        if first.top_down is not None:
            raise ValueError("level 1 has a top_down, but no level above it; leave it out")
        for i, level in enumerate(levels[1:], 2):
            above = [upper.event for upper in levels[: i - 1]]
            if level.top_down is None and len({event[1:] for event in above}) > 1:
                raise ValueError(
                    f"the levels above level {i} have the shapes {', '.join(map(str, above))}, which cannot "
                    f"be put side by side along their first axis; give level {i} a top_down, a module that "
                    "takes the level above, and its state, to the state of this level"
                )
        self.levels = nn.ModuleList(levels)
        self.dims = tuple(level.dim for level in levels)
        self._networks = object()  # the same in frozen copies, and another one in a deepcopy

    @property
    def dim(self) -> int:
        """Number of latents of all levels."""
        return sum(self.dims)

    def forward(self, features: Tensor | Sequence[Tensor]) -> HierarchicalPosterior:
        """Return q(z|x) given a bottom-up encoder's features of x.

        Args:
            features: one tensor for all levels, or a list with one for each level, from the top to the
                bottom; batch first.
        """
        return HierarchicalPosterior(self, features)

    @property
    def reaches_others(self) -> bool:
        return True  # the levels' modules are the user's

    def split(self, z: Tensor) -> list[Tensor]:
        r"""Split z into its levels, each [..., \*dim].

        Args:
            z: [..., D_1 + … + D_L].
        """
        self._check_latents(z)
        parts = z.split(self.dims, -1)
        return [part.unflatten(-1, self._level(i).event) for i, part in enumerate(parts)]

    def log_prob(self, z: Tensor) -> Tensor:
        self._check_latents(z)
        parts = z.reshape(-1, self.dim).split(self.dims, 1)
        terms: list[Tensor] = []

        def visit(index: int, level: Level, state: Any) -> Tensor:
            z_l: Tensor = parts[index]
            terms.append(self._p(index, level, state, z_l.shape[0]).log_prob(z_l))
            return z_l

        self._descend(visit)
        return _added(terms).reshape(z.shape[:-1])

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        if dim not in (None, self.dim):
            raise ValueError(f"dim is {dim}, but the hierarchy has {self.dim} latents, {self._listed()}")
        own = next(self.parameters(), torch.empty(()))

        def visit(index: int, level: Level, state: Any) -> Tensor:
            p = self._p(index, level, state, k)
            eps = random.normal(seed, 1, k, level.dim, level=index, dtype=accumulator(own.dtype))[0]
            if isinstance(p, DiagonalNormal):
                mu, logvar = p.wide()
                eps = mu + torch.exp(0.5 * logvar) * eps
            return eps.to(own.dtype)

        return self._descend(visit)

    def _descend(self, visit: Callable[[int, Level, Any], Tensor]) -> Tensor:
        """Concatenate each level's latents [N, D], returned by ``visit(index, level, state)``, top-down."""
        parts: list[Tensor] = []
        shaped: list[Tensor] = []
        state = None
        levels: Any = self.levels
        for index, level in enumerate(levels):
            if level.top_down is not None:
                given = (shaped[-1],) if index == 1 else (shaped[-1], state)
                state = self._run(index, level, "top_down", *given)
            elif index:
                state = shaped[0] if index == 1 else torch.cat(shaped, 1)
            parts.append(visit(index, level, state))
            shaped.append(parts[-1].unflatten(1, level.event) if len(level.event) > 1 else parts[-1])
        return torch.cat(parts, 1)

    def _run(self, index: int, level: Level, name: str, *given: Any) -> Any:
        """Call a level's network; the densities of a draw repeat the draw's runs."""
        return run((self._networks, index, name), getattr(level, name), *given)

    def _level(self, index: int) -> Level:
        return self.levels[index]  # type: ignore[return-value]

    def _p(self, index: int, level: Level, state: Any, rows: int) -> Distribution:
        """Return a level's prior for these rows, with parameters broadcastable to [N, D]."""
        prior = level.prior
        if prior is None:
            return STANDARD
        if isinstance(prior, Distribution):
            return level.fixed_prior or STANDARD
        return level.read(self._run(index, level, "prior", state), rows, ("prior", index))

    def _check_latents(self, z: Tensor) -> None:
        if z.shape[-1] != self.dim:
            raise ValueError(
                f"z has shape {shape_of(z)}; its last axis must be the {self.dim} latents of all levels, "
                f"{self._listed()}"
            )

    def _listed(self) -> str:
        return " + ".join(map(str, self.dims))


class HierarchicalPosterior(Distribution):
    """Posterior q(z|x) of a :class:`Hierarchy`, returned by ``hierarchy(features)``.

    Args:
        hierarchy: the hierarchy of levels.
        features: as for :meth:`Hierarchy.forward`.

    Attributes:
        own_prior: the hierarchy.
        mean: chained means [B, D]: each level's mean given the means of the levels above.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import Level
        >>> hierarchy = fastvae.distributions.Hierarchy([
        ...     fastvae.distributions.Level(2, torch.nn.Linear(8, 4)),
        ...     Level(3, lambda h, z: (h[:, :3], 0 * h[:, 3:6]), prior=torch.nn.Linear(2, 6)),
        ... ])
        >>> q = hierarchy(torch.rand(16, 8))
        >>> q.batch, q.mean.shape
        (16, torch.Size([16, 5]))
    """

    features: list[Tensor]

    def __init__(self, hierarchy: Hierarchy, features: Tensor | Sequence[Tensor]):
        super().__init__()
        levels = len(hierarchy.levels)
        several = isinstance(features, (tuple, list))
        each: list[Any] = list(features) if several else [features] * levels
        if len(each) != levels:
            raise ValueError(
                f"features is a list of {len(each)}, but the hierarchy has {levels} levels; expected one "
                "tensor for each, from the top to the bottom, or one tensor for all"
            )
        for i, h in enumerate(each):
            if (
                type(h) is Tensor
                and h.dim()
                and h.shape[:1] == each[0].shape[:1]
                and h.device == each[0].device
            ):
                continue  # without the words of errors
            name = f"features[{i}]" if several else "features"
            if not isinstance(h, Tensor):
                raise TypeError(f"{name} must be a tensor, batch first; got {type(h).__name__}")
            if h.dim() < 1 or h.shape[0] != each[0].shape[0]:
                raise ValueError(
                    f"{name} has shape {shape_of(h)}, but features[0] has {shape_of(each[0])}; the first "
                    "axis of all must be the batch"
                )
            if not on_same_device(h.device, each[0].device):
                raise ValueError(f"{name} is on {h.device} but features[0] is on {each[0].device}; move it")
        self.hierarchy = hierarchy
        # A module's own way of setting them costs as much as a small operation.
        self.__dict__["features"], self.__dict__["batch"] = each, each[0].shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.features[0].device

    @property
    def own_prior(self) -> Distribution:  # type: ignore[override]
        return self.hierarchy

    @property
    def reaches_others(self) -> bool:
        return True  # the levels' modules are the user's

    @property
    def known_dim(self) -> int:
        return self.hierarchy.dim  # the mean would run the networks

    @property
    def mean(self) -> Tensor:
        def visit(index: int, level: Level, state: Any) -> Tensor:
            step, dtype = self._step(level, *self._networks(index, level, state, 1), 1)
            return (step.mean + step.shift).expand(1, self.batch, level.dim)[0].to(dtype)

        return self.hierarchy._descend(visit)

    def log_prob(self, z: Tensor) -> Tensor:
        self.hierarchy._check_latents(z)
        samples = z.shape[0]
        terms: list[Tensor] = []
        parts = z.split(self.hierarchy.dims, -1)

        def visit(index: int, level: Level, state: Any) -> Tensor:
            step, _ = self._step(level, *self._networks(index, level, state, samples), samples)
            z_l: Tensor = parts[index]
            terms.append(step.log_q_of(z_l).sum(-1))
            return z_l.flatten(0, 1)

        self.hierarchy._descend(visit)
        return _added(terms)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        z, terms = self._draw(Step.log_q, samples, seed, place)
        return z.unflatten(0, (samples, self.batch)), _added(terms)

    def rsample_log_ratio(
        self, p: Distribution, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        if p is not self.hierarchy:
            return None
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        z, terms = self._draw(Step.log_ratio, samples, seed, place)
        return z.unflatten(0, (samples, self.batch)), _added(terms)

    def rsample_kl(
        self,
        p: Distribution,
        samples: int,
        seed: Tensor,
        *,
        row_offset: int = 0,
        per_dimension: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        drawn = self._drawn_kl(p, samples, seed, row_offset, per_dimension)
        if drawn is None:
            return None
        z, kl = drawn
        alone = samples == 1 and kl.dim() == 1
        return z.unflatten(0, (samples, self.batch)), kl[None] if alone else kl

    def _flat_kl(
        self, p: Distribution, samples: int, seed: Tensor, row_offset: int, per_dimension: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not is_family(self, HierarchicalPosterior):
            return super()._flat_kl(p, samples, seed, row_offset, per_dimension)
        return self._drawn_kl(p, samples, seed, row_offset, per_dimension)

    def _drawn_kl(
        self, p: Distribution, samples: int, seed: Tensor, row_offset: int, per_dimension: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return z [K·B, D] and the KL of :meth:`rsample_kl`, which may be [B] for a single sample."""
        if p is not self.hierarchy:
            return None
        z, terms = self._draw(Step.kl, samples, seed, {"row_offset": row_offset}, summed=not per_dimension)
        if per_dimension:
            return z, torch.cat([t.mean(0) for t in terms], -1)
        kl = _added(terms)
        return z, kl if kl.dim() == 1 or kl.shape[0] == samples else kl[0]

    def rows(self, start: int, stop: int) -> HierarchicalPosterior | None:
        if not is_family(self, HierarchicalPosterior):
            return None
        return HierarchicalPosterior(self.hierarchy, [h[start:stop] for h in self.features])

    def _draw(
        self,
        term: Callable[[Step, Tensor], Tensor],
        samples: int,
        seed: Tensor,
        place: dict[str, int],
        summed: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return z [K·B, D_1 + … + D_L] and each level's term, [K, B], or [K, B, D] without ``summed``.

        A term that all samples share, or that of a single sample, may be [1, B] or [B], or [1, B, D].
        """
        terms = []
        batch = self.batch

        def visit(index: int, level: Level, state: Any) -> Tensor:
            if index == 0 and level.merge is None and not seed.dim():
                z, value = self._fused(level, term, samples, seed, place, summed)
                terms.append(value)
                return z if z.dim() == 2 else z.flatten(0, 1)
            q, p = self._networks(index, level, state, samples)

            def noise(dtype: torch.dtype) -> Tensor:
                return random.normal(
                    seed, samples, batch, level.dim, level=index, dtype=dtype, **place,  # type: ignore[arg-type]
                )  # fmt: skip

            usual = term is Step.kl and not torch.compiler.is_compiling()
            parameters = _alike(q, p, samples * batch) if usual else None
            if parameters is not None and level.merge == "precision":
                mu, logvar, mean, scale = parameters
                parameters = None
                if mean is not None and scale is not None:
                    parameters = *precision_weighted(mu, logvar, mean, scale), mean, scale
            if parameters is not None:
                eps = noise(q.mu.dtype).flatten(0, 1)
                draw = draw_direct if level.merge is None else draw_relative
                z_l: Tensor
                z_l, value = draw(*parameters, eps, summed)
                one = samples == 1 and summed
                terms.append(value if one else value.reshape(samples, batch, *value.shape[1:]))
                return z_l
            step, dtype = self._step(level, q, p, samples)
            eps = noise(accumulator(step.shift.dtype))
            z, value = step.draw(eps).to(dtype), term(step, eps)
            terms.append(value.sum(-1) if summed else value)
            return z.flatten(0, 1)

        return self.hierarchy._descend(visit), terms

    def _fused(
        self,
        level: Level,
        term: Callable[..., Tensor],
        samples: int,
        seed: Tensor,
        place: dict[str, int],
        summed: bool,
    ) -> tuple[Tensor, Tensor]:
        """Draw the first level, whose q and p are shared by all samples, with the fused ops.

        z is [K, B, D] or [K·B, D].
        """
        q, p = self._networks(0, level, None, samples)
        if term is Step.log_q:
            return q.rsample_log_prob(samples, seed, **place)
        prior = fused_prior(q, p, seed)
        if term is Step.log_ratio:
            options: dict[str, Any] = {"k": samples, "seed": seed, **options_of(q.form), **place}
            z, log_ratio, *_ = ops.rsample_log_ratio(q.mu, q.logvar, prior=prior, **options)
            return z, log_ratio
        z, kl = flat_kl((q.mu, q.logvar, q.form), prior, seed, samples, place["row_offset"], not summed)
        return z, kl if summed else kl[None]

    def _networks(
        self, index: int, level: Level, state: Any, samples: int
    ) -> tuple[DiagonalNormal, Distribution]:
        """Return what a level's networks make of the state of the levels above, for q and for p."""
        h, hierarchy = self.features[index], self.hierarchy
        by_features = index == 0 or level.merge == "precision"
        if not by_features:
            h = repeat(h, samples)
        output = hierarchy._run(index, level, "posterior", *((h,) if by_features else (h, state)))
        q = level.read(output, h.shape[0], ("posterior", index))
        return q, hierarchy._p(index, level, state, samples * self.batch)

    def _step(
        self, level: Level, q: DiagonalNormal, p: Distribution, samples: int
    ) -> tuple[Step, torch.dtype]:
        """Return a level's q and p from its networks' normals, and z's dtype."""
        dtype = torch.promote_types(q.mu.dtype, q.logvar.dtype)
        mu, logvar = (t.unflatten(0, (-1, self.batch)) if self.batch else t[None] for t in q.wide())
        mean = scale = mu.new_zeros(())
        if isinstance(p, DiagonalNormal):
            mean, scale = p.wide()
            if level.has_conditional_prior:
                mean, scale = (t.reshape(samples, self.batch, level.dim) for t in (mean, scale))
        if level.merge == "residual":
            return Step(mean, scale, mu, logvar), dtype
        if level.merge is None:
            return Step(mean, scale, mu - mean, logvar - scale), dtype
        return Step(mean, scale, *precision_weighted(mu, logvar, mean, scale)), dtype


def _alike(
    q: DiagonalNormal, p: Distribution, rows: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Return mean and log variance of q and of p, None for those of N(0, I); or None if they are not usual.

    Usual is one row of parameters for each row of z, all in one dtype of single or double precision.
    """
    mu, logvar, dtype = q.mu, q.logvar, q.mu.dtype
    if q.form is not None or logvar.dtype != dtype or dtype.itemsize < 4 or not rows or mu.shape[0] != rows:
        return None
    if p is STANDARD:
        return mu, logvar, None, None
    if not isinstance(p, DiagonalNormal) or p.form is not None:
        return None
    mean, scale = p.mu, p.logvar
    # A fixed prior has one axis.
    if mean.shape != mu.shape or scale.shape != mu.shape or not mean.dtype == scale.dtype == dtype:
        return None
    return mu, logvar, mean, scale


def _added(terms: list[Tensor]) -> Tensor:
    """Return the sum of the levels' terms, from the top; a single term is returned itself."""
    return functools.reduce(torch.add, terms)
