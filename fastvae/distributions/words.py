"""Words of torch.distributions: moments that a family may lack, and the number of latents of a draw."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.checks import check_count


class NoClosedForm(NotImplementedError, AttributeError):
    """Request for a moment that a family does not have in closed form.

    It is an AttributeError, too, so that ``hasattr`` is False and a module may own a parameter of that name.
    """


class Moment:
    """Attribute that a family may define, as a property or in its constructor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, distribution: Any, kind: type | None = None) -> Any:
        if distribution is None:
            return self
        raise no_closed_form(distribution, self.name)


def no_closed_form(distribution: Any, name: str) -> NotImplementedError:
    """Return the error for a moment that this family does not have in closed form."""
    family = distribution.family.__name__
    error: type[NotImplementedError] = NotImplementedError if distribution.is_own else NoClosedForm
    return error(f"{family} has no {name} in closed form; estimate it from {family}.sample(k)")


def known_mean(distribution: Any) -> Tensor | None:
    """Return the mean, or None if the family has none in closed form."""
    try:
        mean: Tensor | None = distribution.mean
    except (NotImplementedError, AttributeError):  # a module's __getattr__ raises the latter
        return None
    return mean


def count_latents(name: str, shape: tuple[int, ...], dim: int | None) -> int:
    """Return D for a prior's parameters of this shape, which broadcast to [D].

    Args:
        name: name of the family, for messages.
        shape: shape of the parameters.
        dim: number of latents requested, or None.

    Raises:
        ValueError: if ``dim`` does not fit, or is needed and missing.
    """
    if dim is not None:
        dim = check_count("dim", dim, "the number of latents")
    if len(shape) > 1 or (dim is not None and shape not in ((), (1,), (dim,))):
        raise ValueError(
            f"the prior, {name}, has parameters {list(shape)}; to draw z [k, {dim or 'D'}] from it, they "
            f"must broadcast to [{dim or 'D'}]"
        )
    if dim is None and not shape:
        raise ValueError(f"{name} has parameters [], which do not determine the number of latents; pass dim=")
    return shape[-1] if dim is None else dim


def check_latents(name: str, own: int, dim: int | None) -> None:
    """Validate a requested number of latents of a distribution that has ``own``."""
    if dim not in (None, own):
        raise ValueError(f"dim is {dim}, but the prior, {name}, has D = {own} latents")
