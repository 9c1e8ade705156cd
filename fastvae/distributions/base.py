"""Base class of distributions over z, for both roles: posterior q(z|x) and prior p(z)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch import distributions as td
from typing_extensions import Self

from ..core.checks import check_count
from ..random import draw_seed
from .tensors import Holder, mapped, tensors_of
from .words import Moment, known_mean, no_closed_form

# Where fastvae's own families are.
_OWN = "fastvae.distributions."

# Methods that a module takes from nn.Module, not from Distribution.
_OF_MODULES = ("__setattr__", "__repr__", "to", "parameters", "state_dict")


class Distribution(Holder):
    """Distribution over z: a posterior q(z|x), with a row of parameters for each example, or a prior p(z).

    It has the words of ``torch.distributions``: ``mean``, ``variance``, ``stddev`` and :meth:`entropy`, in
    closed form where there is one, :meth:`sample`, :meth:`rsample` and :meth:`log_prob`, and, in families
    with a location and a scale, ``loc`` and ``scale``. The D latents are one event: :meth:`log_prob` and
    :meth:`entropy` are summed over them. Moments are [B, D] for a posterior and [D] for a prior.

    Subclass it for a family that is in neither fastvae nor ``torch.distributions``; torch's objects are
    accepted as they are. A prior needs :meth:`log_prob`, and :meth:`sample` to be drawn from; a posterior
    needs ``batch``, ``device`` and :meth:`rsample_log_prob`, and for ``estimator="stl"`` and ``"dreg"``
    :meth:`log_prob` too.

    A distribution is an ``nn.Module`` only if it owns state, so that a learned prior's parameters are
    registered, saved and moved: if it is constructed from an ``nn.Parameter``, a module, or the fixed tensors
    [D] of a prior. Otherwise it is a plain object. A subclass that creates parameters itself inherits from
    both: ``class Mine(fastvae.distributions.Distribution, nn.Module)``.

    Attributes:
        family: the class of the distribution, the same for a plain object and for a module.
        batch: posterior: the number of examples B.
        device: posterior: the device on which z is drawn.
        mean: the mean, [B, D] for a posterior. Without a closed form a NotImplementedError, as the next two.
        variance: the variance of each dimension, [B, D] for a posterior.
        stddev: the square root of the variance.
        latent: posterior: the shape of an example's latents if they have several axes, such as (C, H, W): the
            decoder gets z as [N, C, H, W]. The methods of q and of the prior use flat z, D = C·H·W. Default:
            None, the decoder gets z [N, D].
        z_dtype: posterior: the dtype of the decoder's z if it is narrower than the draws, as for torch's
            distributions in half precision. Default: None, the dtype of the draws.
        support: the support of z, a constraint of torch.distributions. A posterior over a subset of R^D needs
            a prior with the same support: N(0, I) is rejected. Default: ``constraints.real``.
        per_row: prior: whether parameters differ between the rows of the batch.
        strata: posterior: the number of strata that successive draws cycle through; 1 if each draw is from q.
        own_prior: posterior: the prior that belongs to it, used for ``prior=None``; None for N(0, I).

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.distributions.Distribution):
        ...     def log_prob(self, z):
        ...         return -(z.abs() + torch.log(torch.tensor(2.0))).sum(-1)
        >>> x, q = torch.ones(4, 7), (torch.zeros(4, 3), torch.zeros(4, 3))
        >>> decoder = torch.nn.Linear(3, 7)
        >>> fastvae.iwae(x, q, decoder, k=5, likelihood="bernoulli", prior=Laplace()).shape
        torch.Size([])
    """

    family: ClassVar[type[Distribution]]
    batch: int
    device: torch.device
    mean: Any = Moment()
    variance: Any = Moment()
    latent: tuple[int, ...] | None = None
    z_dtype: torch.dtype | None = None
    support: Any = td.constraints.real
    per_row: ClassVar[bool] = False
    strata: ClassVar[int] = 1
    own_prior: Distribution | None = None

    _as_module: ClassVar[type[Distribution]]

    def __init_subclass__(cls, as_module: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.family = cls.__bases__[0] if as_module else cls
        if issubclass(cls, nn.Module):
            cls._as_module = cls
            for name in _OF_MODULES:
                if getattr(cls, name) is getattr(Distribution, name):
                    setattr(cls, name, getattr(nn.Module, name))
        else:
            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
            cls._as_module = type(cls.__name__, (cls, nn.Module), names, as_module=True)
        is_users = not cls.__module__.startswith(_OWN)
        if is_users and not {"log_prob", "rsample_log_prob"}.isdisjoint(vars(cls)):
            # The moments of the family that it overrides are not those of the subclass.
            for name in {"variance", "stddev", "entropy"} - set(vars(cls)):
                setattr(cls, name, vars(Distribution)[name])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        given = (*args, *kwargs.values())
        return object.__new__(cls._as_module if _owns_state(given) else cls)  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A module's class is generated and cannot be pickled by name; its family can.
        state = getattr(self, "__getstate__", lambda: self.__dict__)()  # object's since Python 3.11
        return _new, (self.family, isinstance(self, nn.Module)), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for tensor in tensors_of(self, cached=True):
            if tensor.grad_fn is not None:  # torch refuses to deepcopy it; the clone stays in the graph
                memo[id(tensor)] = tensor.clone()
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    # Counterparts of nn.Module's methods, for plain objects.

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Parameter, nn.Module)):
            own = self.family.__name__
            raise TypeError(
                f"{own}.{name} is of class {type(value).__name__}, but {own} is not an nn.Module, so that no "
                "optimiser would find it. Inherit from both: class "
                f"{own}(fastvae.distributions.Distribution, nn.Module)"
            )
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"{self.family.__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Return the attributes as ``repr`` shows them; a module's children follow."""
        shown = {name: value for name, value in self._set().items() if value is not None}
        return ", ".join(f"{name}={_brief(value)}" for name, value in shown.items())

    def _set(self) -> dict[str, Any]:
        """Return public attributes by name, without a module's children."""
        values = dict(self.__dict__)
        if isinstance(self, nn.Module):
            del values["training"]
            values |= {**self._parameters, **self._buffers}
        return {name: value for name, value in values.items() if not name.startswith("_")}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy on another device or in another floating-point dtype; a module is changed in place.

        Args:
            *args: as for ``nn.Module.to``.
            **kwargs: as for ``nn.Module.to``.
        """

        def convert(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor.to(tensor.new_empty(0).to(*args, **kwargs).device)
            converted = tensor.to(*args, **kwargs)
            if not converted.is_floating_point():
                raise TypeError(f"to takes floating-point dtypes, got {converted.dtype}")
            return converted

        return mapped(self, convert)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return no parameters: a plain object has none."""
        return iter(())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an empty dict: a plain object has no state."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Apply ``fn`` to a module's state, and to its tensors that are part of an autograd graph."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        done = {id(module): module for module in self.modules()}  # type: ignore[attr-defined]
        for name, value in self.__dict__.items():
            if not name.startswith("_"):
                self.__dict__[name] = mapped(value, fn, done)
        return self

    @property
    def has_rows(self) -> bool:
        """True if it has one distribution per example, as a posterior has."""
        return hasattr(self, "batch") and hasattr(self, "device")

    @property
    def known_dim(self) -> int | None:
        """Number of latents D, or None if the family cannot name it without a draw."""
        mean = known_mean(self)
        return None if mean is None or not mean.dim() else mean.shape[-1]

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density at z, summed over D: [K, B], in nats.

        A prior that needs the shape of the latents restores it with ``z.unflatten(2, (C, H, W))``.

        Args:
            z: [K, B, D], flat whatever the shape of the latents.
        """
        raise NotImplementedError(f"{self.family.__name__} has no log_prob")

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draw z [K, B, D], differentiable in the parameters, and return it with its log density [K, B].

        Args:
            samples: number of draws per row, K.
            seed: int64 tensor with no dimensions, or [R] for ``noise="qmc"``; pass it on unchanged. The noise
                of sample k and row b is a function of (seed, sample_offset + k, row_offset + b), as in
                :func:`fastvae.random.normal`.
            sample_offset: index of the first sample. Default: 0, and callers may omit it.
            row_offset: index of the first row. Default: 0, and callers may omit it.
        """
        raise NotImplementedError(f"{self.family.__name__} has no rsample_log_prob, which a posterior needs")

    def rsample_log_ratio(
        self, p: Distribution, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """Draw z [K, B, D] and return it with log p(z) − log q(z|x) [K, B], computed in one pass, or None.

        None means that q has no better method for this prior than :meth:`rsample_log_prob` and p's
        :meth:`log_prob`.

        Args:
            p: the prior.
            samples: as in :meth:`rsample_log_prob`.
            seed: as in :meth:`rsample_log_prob`.
            sample_offset: as in :meth:`rsample_log_prob`.
            row_offset: as in :meth:`rsample_log_prob`.
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
        """Draw z [K, B, D] and return it with KL(q ‖ p), or None if q knows no such KL to this prior.

        The KL is [B], or [K, B] if it is analytic given a part of the draw, such as the levels above.

        Args:
            p: the prior.
            samples: as in :meth:`rsample_log_prob`.
            seed: as in :meth:`rsample_log_prob`.
            row_offset: as in :meth:`rsample_log_prob`.
            per_dimension: return the KL of each dimension [B, D], averaged over the samples, for free bits.
        """
        return None

    def _flat_kl(
        self, p: Distribution, samples: int, seed: Tensor, row_offset: int, per_dimension: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return :meth:`rsample_kl` with z [K·B, D], as a decoder gets it."""
        drawn = self.rsample_kl(p, samples, seed, row_offset=row_offset, per_dimension=per_dimension)
        return None if drawn is None else (drawn[0].flatten(0, 1), drawn[1])

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each dimension, [B, D], or [D] for a prior."""
        try:
            variance: Tensor = self.variance
        except NotImplementedError:
            raise no_closed_form(self, "stddev") from None
        return variance.sqrt()

    def entropy(self) -> Tensor:
        """Return the differential entropy, summed over D: [B], or [] for a prior, in nats.

        Raises:
            NotImplementedError: if the family has none in closed form, such as a mixture.
        """
        family = self.family.__name__
        raise NotImplementedError(
            f"{family} has no entropy in closed form; the mean of -{family}.log_prob over draws estimates it"
        )

    def sample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z without gradients, [k, B, D] with rows and [k, D] without.

        Args:
            k: number of draws, for each row if there are rows. Default 1.
            dim: number of latents D, for a prior whose parameters do not determine it, such as N(0, I).
            device: device of the result, for a prior without tensors.
            generator: source of the seed. Default: torch's own generator.
        """
        if not self.has_rows and type(self)._draw_alone is Distribution._draw_alone:
            raise NotImplementedError(
                f"{self.family.__name__} has no sample, which drawing from the prior needs"
            )
        with torch.no_grad():
            return self.rsample(k, dim=dim, device=device, generator=generator)

    def rsample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z, differentiable in the parameters, [k, B, D] with rows and [k, D] without.

        Args:
            k: number of draws, for each row if there are rows. Default 1.
            dim: number of latents D, for a prior whose parameters do not determine it, such as N(0, I).
            device: device of the result, for a prior without tensors.
            generator: source of the seed. Default: torch's own generator.

        Raises:
            NotImplementedError: if the draws are not differentiable, as those of a mixture.
        """
        k = check_count("k", k, "the number of draws")
        if self.strata > 1:
            raise NotImplementedError(
                f"{self.family.__name__} has strata, whose draws follow q only with the weights of "
                "log_stratum_weights"
            )
        if self.has_rows:
            return self.rsample_log_prob(k, draw_seed(self.device, generator))[0]
        return self._draw_alone(k, dim, draw_seed(self._device_or(device), generator))

    def _device_or(self, device: torch.device | str | None) -> torch.device:
        """Return the device of the parameters, or the given one, or the CPU."""
        tensor = next(tensors_of(self), None)
        return torch.device(device or "cpu") if tensor is None else tensor.device

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        """Draw z [k, D] of a distribution without rows."""
        raise NotImplementedError(f"{self.family.__name__} has no rsample, draws with gradients")

    def rows(self, start: int, stop: int) -> Distribution | None:
        """Return the posterior of the examples start to stop, or None if the family does not support it.

        Args:
            start: index of the first example.
            stop: index after the last example.
        """
        return None

    def expand(self, batch: int, like: Tensor) -> Distribution:
        """Return this distribution as a posterior that is the same for every example.

        :class:`Mixture` calls it on a component without rows if another component has rows.

        Args:
            batch: number of examples B.
            like: a tensor [..., D] with the device and dtype of z.
        """
        raise NotImplementedError(
            f"{self.family.__name__} has no expand, which a component of a mixture needs that has no rows of "
            "its own: give it a row of parameters for each example"
        )

    def prepared(self) -> Distribution:
        """Return the prior with everything precomputed that all draws of a call share.

        An example is a VampPrior's components. An objective calls it once.
        """
        return self

    def log_stratum_weights(self, samples: int, seed: Tensor, *, sample_offset: int = 0) -> Tensor:
        """Return the log of each draw's weight, [K, B] or [K, 1], for a q with ``strata``; mean weight 1.

        Args:
            samples: as in :meth:`rsample_log_prob`.
            seed: as in :meth:`rsample_log_prob`.
            sample_offset: as in :meth:`rsample_log_prob`.
        """
        raise NotImplementedError(f"{self.family.__name__} has strata, but no log_stratum_weights")

    @property
    def is_own(self) -> bool:
        """True for fastvae's own families, False for a user's."""
        return self.family.__module__.startswith(_OWN)

    @property
    def reaches_others(self) -> bool:
        """True if the density may use parameters that are not attributes, as in a user's family."""
        return not self.is_own

    def as_torch(self) -> td.Distribution | None:
        """Return the equivalent torch.distributions object, for torch's KL registry, or None."""
        return None


Distribution.family = Distribution._as_module = Distribution

_Family = TypeVar("_Family", bound=Distribution)


def is_family(distribution: Distribution, family: type[_Family]) -> TypeGuard[_Family]:
    """Return True for this family itself, plain or a module, and False for its subclasses."""
    return distribution.family is family


def innermost(support: Any) -> Any:
    """Return the constraint of each number: that inside an independent one, or of a mixture's components."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def is_real(support: Any) -> bool:
    """Return True if the support is all of R^D."""
    return isinstance(innermost(support), type(td.constraints.real))


def support_of_mixture(parts: Sequence[Distribution]) -> Any:
    """Return the support of a mixture: all of R^D if that of any part is, else the first part's."""
    supports = [part.support for part in parts]
    return td.constraints.real if any(is_real(s) for s in supports) else supports[0]


class Located(Distribution):
    """Family whose parameters have the axes of its location, [B, D], or [D] for a prior."""

    loc: Tensor

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.loc.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.loc.device

    @property
    def has_rows(self) -> bool:
        return self.loc.dim() == 2

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.loc.dim() > 1 and self.loc.shape[0] > 1


def _owns_state(given: Any) -> bool:
    """Return True if the arguments make a module: parameters, modules, or a prior's tensors [D]."""
    for value in given:
        if isinstance(value, (nn.Parameter, nn.Module)):
            return True
        if isinstance(value, (tuple, list)) and _owns_state(value):
            return True
    first = next((value for value in given if isinstance(value, Tensor)), None)
    return first is not None and first.dim() < 2 and not first.requires_grad


def _new(family: type[Distribution], is_module: bool) -> Distribution:
    made: Distribution = object.__new__(family._as_module if is_module else family)
    return made


def as_module(distribution: Distribution) -> Distribution:
    """Return the distribution as a module that owns its fixed tensors; itself if it has none."""
    values = distribution.__dict__
    fixed = any(isinstance(v, Tensor) and not v.requires_grad for v in values.values())
    if isinstance(distribution, nn.Module) or not fixed:
        return distribution
    made = _new(distribution.family, True)
    nn.Module.__init__(made)  # type: ignore[arg-type]
    hold(made, **{name: value for name, value in values.items() if isinstance(value, Tensor)})
    made.__dict__.update({name: value for name, value in values.items() if not isinstance(value, Tensor)})
    return made


def hold(distribution: Distribution, **values: Tensor | None) -> None:
    """Set tensors as attributes, a module's as parameters and buffers.

    A network's output is not state and must stay in its autograd graph: it becomes a plain attribute.
    """
    for name, value in values.items():
        if not isinstance(distribution, nn.Module):
            distribution.__dict__[name] = value
        elif isinstance(value, nn.Parameter):
            setattr(distribution, name, value)
        elif value is None or value.requires_grad:
            distribution.__dict__[name] = value
        else:
            distribution.register_buffer(name, value)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        learned = "learned " if isinstance(value, nn.Parameter) else ""
        if value.dim() == 0 and value.device.type == "cpu" and type(value) in (Tensor, nn.Parameter):
            return f"{learned}{value.item()}"
        return f"{learned}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__qualname__", None) or repr(value)


def is_still(distribution: Distribution, family: type) -> bool:
    """Return True if a subclass overrides neither the density nor the draws of this family."""
    kind = distribution.family
    return kind.log_prob is family.log_prob and kind.rsample_log_prob is family.rsample_log_prob  # type: ignore[attr-defined]
