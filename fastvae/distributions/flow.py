"""Normalizing flows from other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.checks import check_tensor
from ..core.seeding import seeded
from .base import Distribution, hold, is_family
from .runs import without_noise
from .words import check_latents
from .wrapped import TorchDistribution, at_address


class Flow(Distribution):
    r"""Normalizing flow as a posterior or a prior, such as zuko's.

    .. math:: \log p(z) = \log p_0(f(z)) + \log |\det ∂f/∂z|

    ``flow(context)`` must return an object with ``log_prob`` and ``rsample``. It is called for every density
    and draw, so that gradients reach its parameters. If the object has a ``transform`` to a ``base`` of
    normal noise, as zuko's has, a sample's noise is a function of its address, and one pass gives z and its
    density; otherwise torch's generator draws, from a state that the seed determines.

    For a posterior choose a flow whose inverse is fast: zuko's ``NSF`` and ``MAF`` take D passes per draw,
    unless ``passes=2``.

    Args:
        flow: a module, context -> distribution; for a prior without a context, () -> distribution.
        context: [B, …], for a posterior or a conditional prior.

    Raises:
        TypeError: if flow is not callable.

    References:
        Rezende & Mohamed, Variational Inference with Normalizing Flows, 2015, eq. 5; Kingma et al. 2016.

    Example:
        >>> import torch, fastvae, zuko  # doctest: +SKIP
        >>> encoder, flow = torch.nn.Linear(7, 5), zuko.flows.NSF(3, 5, passes=2)  # doctest: +SKIP
        >>> q = fastvae.distributions.Flow(flow, encoder(torch.rand(4, 7)))  # doctest: +SKIP
    """

    context: Tensor | None

    def __init__(self, flow: Callable[..., Any], context: Tensor | None = None):
        super().__init__()
        if not callable(flow):
            raise TypeError(
                "flow must be a module, context -> distribution, such as zuko.flows.NSF(...); got "
                f"{type(flow).__name__}"
            )
        self.flow = flow
        if context is not None:
            check_tensor("context", context)
        hold(self, context=context)

    def _made(self) -> Any:
        made = self.flow() if self.context is None else self.flow(self.context)
        if not (hasattr(made, "log_prob") and hasattr(made, "rsample")):
            raise TypeError(
                f"flow {type(self.flow).__name__} returned {type(made).__name__}; expected an object with "
                "log_prob and rsample, such as a torch.distributions object"
            )
        return made

    @property
    def reaches_others(self) -> bool:
        return True

    @property
    def has_rows(self) -> bool:
        return self.context is not None

    @property
    def batch(self) -> int:  # type: ignore[override]
        if self.context is None:
            raise AttributeError("a flow without a context has no rows")
        return self.context.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        tensor = next(self.parameters(), None) if self.context is None else self.context
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.context is not None and self.context.shape[0] > 1

    def log_prob(self, z: Tensor) -> Tensor:
        value: Tensor = self._made().log_prob(z)
        return value

    def _draw(self, made: Any, samples: int, seed: Tensor, place: dict[str, Any]) -> tuple[Tensor, Tensor]:
        transform, base = getattr(made, "transform", None), getattr(made, "base", None)
        if hasattr(getattr(transform, "inv", None), "call_and_ladj") and isinstance(base, td.Distribution):
            shape = (samples, *base.batch_shape, *base.event_shape)
            eps = at_address(base, shape, seed, place)
            if eps is not None:
                z, ladj = transform.inv.call_and_ladj(eps)  # type: ignore[union-attr]
                extra = ladj.dim() - len(shape[:-1])
                return z, base.log_prob(eps) - (ladj.flatten(-extra).sum(-1) if extra > 0 else ladj)
        if isinstance(made, td.Distribution) and at_address(made, (1, 1, 1), seed, {}) is not None:
            return TorchDistribution(made).rsample_log_prob(samples, seed, **place)
        if isinstance(made, td.Distribution) and not made.has_rsample:
            raise TypeError(
                f"flow {type(self.flow).__name__} returned a {type(made).__name__}, which has no rsample "
                "(reparameterised draws): it can be a prior, but not q"
            )
        with seeded(seed, self.device, place.get("sample_offset", 0), place.get("row_offset", 0)):
            z = made.rsample((samples,))
        return z, without_noise(self, made.log_prob, z)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        made = self._made()
        if self.context is not None and tuple(made.batch_shape) == ():
            made = made.expand((self.batch,))
        return self._draw(made, samples, seed, place)

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        z = self._draw(self._made().expand((1,)), k, seed, {})[0][:, 0]
        check_latents("Flow", z.shape[1], dim)
        return z

    def rows(self, start: int, stop: int) -> Flow | None:
        if not is_family(self, Flow) or self.context is None:
            return None
        return Flow(self.flow, self.context[start:stop])
