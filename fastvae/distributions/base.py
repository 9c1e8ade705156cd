"""What a distribution over z is, in both of its roles: q(z|x), and the prior p(z)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributions as td


class Distribution(nn.Module):
    r"""A distribution over z: a posterior q(z|x), which has a row of parameters for each example, or a prior.

    Subclass it for a family that neither fastvae nor ``torch.distributions`` has; an object of the latter
    needs no subclass. A prior needs :meth:`log_prob`; a posterior needs ``batch``, ``device`` and
    :meth:`rsample`, and for ``estimator="stl"`` and ``"dreg"`` :meth:`log_prob` too. A module, so that a
    learned prior's parameters are found.

    Attributes:
        batch: the number of examples B, of a posterior.
        device: where z is drawn, of a posterior.
        mean: of a posterior: the mean of each row [B, D], or None where it is not known.
        latent: of a posterior: the shape of an example's latents where they have axes of their own, such as
            (C, H, W): the decoder is given z as [N, C, H, W]. Everywhere else, in the methods of q and of the
            prior, z is flat, D = C·H·W. Default: None, the decoder is given z [N, D].
        per_row: of a prior: whether each row of the batch has parameters of its own.
        strata: of a posterior: how many parts its draws come from in turn; 1 where each is drawn from q.
        own_prior: of a posterior that is made together with its prior: this prior, which ``prior=None`` then
            stands for; None for N(0, I).

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.Distribution):
        ...     def log_prob(self, z):
        ...         return -(z.abs() + torch.log(torch.tensor(2.0))).sum(-1)
        >>> x, q = torch.ones(4, 7), (torch.zeros(4, 3), torch.zeros(4, 3))
        >>> decoder = torch.nn.Linear(3, 7)
        >>> fastvae.iwae(x, q, decoder, k=5, likelihood="bernoulli", prior=Laplace()).shape
        torch.Size([])
    """

    batch: int
    device: torch.device
    mean: Tensor | None = None
    latent: tuple[int, ...] | None = None
    per_row: ClassVar[bool] = False
    strata: ClassVar[int] = 1
    own_prior: Distribution | None = None

    @property
    def has_rows(self) -> bool:
        """Whether it is one distribution for each example, as a posterior is."""
        return hasattr(self, "batch") and hasattr(self, "device")

    def log_prob(self, z: Tensor) -> Tensor:
        """log of the density at z [K, B, D], summed over D: [K, B], in nats.

        z is flat, whatever the shape of its latents. A prior that needs the shape knows it, and views z by
        ``z.unflatten(2, (C, H, W))``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    def rsample(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """z [K, B, D], a differentiable function of the parameters, and its log density [K, B].

        Args:
            samples: K.
            seed: int64 tensor of no dimensions, or of ``noise="qmc"`` [R], to be passed on. The noise of
                sample k and row b is a function of (seed, sample_offset + k, row_offset + b), as that of
                :func:`fastvae.random.normal` is.
            sample_offset, row_offset: place of the first sample and row; one that is 0 may be left out of the
                call.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rsample, which a posterior needs")

    def rsample_log_ratio(
        self, p: Distribution, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """z [K, B, D] and log p(z) − log q(z|x) [K, B] in one pass, where q has a better way to this prior
        than :meth:`rsample` and p's :meth:`log_prob`; or None.

        Args:
            p: the prior.
            samples, seed, sample_offset, row_offset: as :meth:`rsample` takes them.
        """
        return None

    def rsample_kl(
        self,
        p: Distribution,
        samples: int,
        seed: Tensor,
        *,
        row_offset: int = 0,
        per_dimension: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """z [K, B, D] and KL(q ‖ p), [B], or [K, B] where it is analytic given a part of the draw, such as
        the levels above; or None where q knows no such KL to this prior.

        Args:
            p: the prior.
            samples, seed, row_offset: as :meth:`rsample` takes them.
            per_dimension: the KL of each dimension [B, D], the mean over the samples, for free bits.
        """
        return None

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n draws of a prior [n, dim], for :meth:`fastvae.VAE.sample`."""
        raise NotImplementedError(f"{type(self).__name__} has no sample, which drawing from the prior needs")

    def rows(self, start: int, stop: int) -> Distribution | None:
        """The posterior of these examples alone, or None where that is not known."""
        return None

    def expand(self, batch: int, like: Tensor) -> Distribution:
        """The same distribution for each of so many examples, as a posterior: a component of a
        :class:`fastvae.Mixture` that also has others.

        Args:
            batch: B.
            like: a tensor [..., D], on whose device and in whose dtype z will be.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no expand, which a component of a mixture needs that has no rows of "
            "its own: give it a row of parameters for each example"
        )

    def prepared(self) -> Distribution:
        """The same prior with what all draws of a call have in common computed, such as a VampPrior's
        components; an objective asks once.
        """
        return self

    def log_shares(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        """log of what each draw counts, [K, B] or [K, 1], where there are ``strata``: 1 on average."""
        raise NotImplementedError(f"{type(self).__name__} has strata, but no log_shares")

    @property
    def reaches_others(self) -> bool:
        """Whether the density may reach parameters that are no attributes, as a family of the user's may."""
        return not type(self).__module__.startswith("fastvae.distributions.")

    def as_torch(self) -> td.Distribution | None:
        """The same as an object of torch.distributions, whose table of KLs is asked; None for none."""
        return None


class Located(Distribution):
    """A family whose parameters have the axes of its location, [B, D] or, of a prior, [D]."""

    @property
    def location(self) -> Tensor:
        raise NotImplementedError

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.location.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.location.device

    @property
    def has_rows(self) -> bool:
        return self.location.dim() == 2

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.location.dim() > 1 and self.location.shape[0] > 1


def hold(module: nn.Module, **values: Tensor | None) -> None:
    """Make tensors attributes: parameters and buffers of the module, but what a network computed, which is no
    state of it and must stay in its graph.
    """
    for name, value in values.items():
        if isinstance(value, nn.Parameter):
            setattr(module, name, value)
        elif value is None or value.requires_grad:
            module.__dict__[name] = value
        else:
            module.register_buffer(name, value)


# What is read as a tensor's holder when a distribution's parameters are held fixed.
_HOLDERS = (nn.Module, td.Distribution, td.Transform)


def held(value: Any) -> Any:
    """A copy with the same values, through whose parameters no gradient passes."""
    return _held(value, {})


def _held(value: Any, seen: dict[int, Any]) -> Any:
    copied: Any
    if isinstance(value, Tensor):
        return value.detach()
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, weakref.ref):  # a transform's, to its inverse, which is made anew
        return None
    if isinstance(value, _HOLDERS):
        seen[id(value)] = copied = object.__new__(type(value))
        attributes = copied.__dict__
        for name in value.__dict__:
            attributes[name] = _held(value.__dict__[name], seen)
        return copied
    if type(value) in (tuple, list):
        return type(value)([_held(v, seen) for v in value])
    if isinstance(value, dict) and hasattr(value, "copy"):
        copied = seen[id(value)] = value.copy()
        copied.update({name: _held(v, seen) for name, v in value.items()})
        return copied
    return value


# Closed forms

_Closed = Callable[[Any, Any], Tensor]
_closed: dict[tuple[type, type], _Closed] = {}


def register_kl(q: type[Distribution], p: type[Distribution]) -> Callable[[_Closed], _Closed]:
    r"""Register a closed form of KL(q ‖ p) for two families, as ``torch.distributions.register_kl`` does.

    The function takes the two distributions and returns the KL of each dimension [B, D], or their sum [B].
    It serves subclasses too, if they leave ``log_prob`` and ``rsample`` as they are.

    Args:
        q, p: the families.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.Distribution):
        ...     pass
        >>> @fastvae.register_kl(fastvae.DiagonalNormal, Laplace)
        ... def _(q, p):
        ...     return torch.zeros_like(q.mu)
    """

    for family in (q, p):
        if not (isinstance(family, type) and issubclass(family, Distribution)):
            raise TypeError(
                f"register_kl takes subclasses of fastvae.Distribution, got {family!r}; for families of "
                "torch.distributions use torch.distributions.register_kl, which is asked too"
            )

    def register(function: _Closed) -> _Closed:
        _closed[q, p] = function
        return function

    return register


def closed_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q ‖ p), [B, D] or [B], where a closed form is known."""
    for a in type(q).__mro__:
        for b in type(p).__mro__:
            function = _closed.get((a, b))
            if function is not None and is_still(q, a) and is_still(p, b):
                kl = function(q, p)
                if kl is None:
                    raise TypeError(
                        f"the registered KL of {a.__name__} and {b.__name__} returned None; expected a "
                        "tensor, [B, D] or [B]"
                    )
                return kl
    one, other = q.as_torch(), p.as_torch()
    if one is None or other is None:
        return None
    try:
        return td.kl_divergence(one, other)
    except NotImplementedError:
        return None


def is_still(distribution: Distribution, family: type) -> bool:
    """Whether a subclass leaves the density and the draws of this family as they are."""
    kind = type(distribution)
    return kind.log_prob is family.log_prob and kind.rsample is family.rsample  # type: ignore[attr-defined]
