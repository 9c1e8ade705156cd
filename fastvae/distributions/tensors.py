"""Tensors within distributions, transforms and modules: found, replaced, frozen."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch import distributions as td

_Same = TypeVar("_Same", bound="Holder")


class Holder:
    """Object whose attributes are searched for tensors, as those of torch's modules and distributions are."""


# Types that are searched for tensors when a distribution's parameters are frozen.
_HOLDERS = (Holder, nn.Module, td.Distribution, td.Transform)

# Attribute in which a transform caches its last input and output, matched by identity.
_CACHE = "_cached_x_y"


def tensors_of(value: Any, depth: int = 6, cached: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of distributions, transforms and modules; optionally those in transforms' caches."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _HOLDERS) and depth:
        attributes = value.__dict__  # whose values torch 2.11 cannot trace
        for name in attributes:
            if name != _CACHE or cached:
                yield from tensors_of(attributes[name], depth - 1, cached)
    elif isinstance(value, dict):
        for name in value:
            yield from tensors_of(value[name], depth, cached)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part, depth, cached)


def modules_in(part: Any) -> list[nn.Module]:
    """Return the modules of a distribution and of containers, without those inside them."""
    if isinstance(part, nn.Module):
        return [part]
    if isinstance(part, Holder):
        return [m for each in vars(part).values() for m in modules_in(each)]
    if isinstance(part, (tuple, list)):
        return [m for each in part for m in modules_in(each)]
    return []


def frozen(value: Any) -> Any:
    """Return a frozen copy: the same values, with every parameter detached."""
    return mapped(value, lambda t: t.detach() if t.requires_grad else t)


def fixed_at(distribution: _Same, z: Tensor) -> tuple[_Same, Tensor]:
    """Return the distribution and a detached z that its transforms' caches still recognise."""
    if not any(t is z for t in tensors_of(distribution, cached=True)):
        return distribution, z.detach()
    detached: dict[int, Tensor] = {}

    def detach(tensor: Tensor) -> Tensor:
        return detached.setdefault(id(tensor), tensor.detach()) if tensor.requires_grad else tensor

    return mapped(distribution, lambda t: t, None, detach), detach(z)


def mapped(
    value: Any,
    function: Callable[[Tensor], Tensor],
    seen: dict[int, Any] | None = None,
    in_cache: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Return a copy with ``function`` applied to each tensor.

    A transform whose tensors are all unchanged is not copied: its inverse must still recognise its cached
    output.

    Args:
        value: a tensor, distribution, transform or module, or a container of these.
        function: applied to each tensor.
        seen: copies by the identity of the original; copies are added to it.
        in_cache: applied to the tensors in transforms' caches, if given.
    """
    seen = {} if seen is None else seen
    copied: Any
    if isinstance(value, Tensor):
        return function(value)
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, weakref.ref):  # a transform's reference to its inverse, which is recreated
        return None
    cache: Any = (None, None)
    if isinstance(value, td.Transform):
        if in_cache is None and all(function(t) is t for t in tensors_of(value)):
            return value
        # A cached preimage under learned parameters depends on them and must not be detached.
        if in_cache is not None and not any(t.requires_grad for t in tensors_of(value)):
            cache = tuple(t if t is None else in_cache(t) for t in value.__dict__.get(_CACHE, ()))
    if isinstance(value, _HOLDERS):
        seen[id(value)] = copied = object.__new__(type(value))
        attributes = copied.__dict__
        for name in value.__dict__:
            part = cache if name == _CACHE else mapped(value.__dict__[name], function, seen, in_cache)
            attributes[name] = part
        return copied
    if type(value) in (tuple, list):
        return type(value)([mapped(v, function, seen, in_cache) for v in value])
    if isinstance(value, dict) and hasattr(value, "copy"):
        copied = seen[id(value)] = value.copy()
        copied.update({name: mapped(v, function, seen, in_cache) for name, v in value.items()})
        return copied
    return value
