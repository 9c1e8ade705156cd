"""Modules that a callable refers to: search, hash, and eval mode."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.parameter import is_lazy

from ..core.digest import digest
from ..distributions import Distribution, tensors_of
from ..likelihoods.base import Likelihood


def modules_of(function: Callable[..., Any] | Distribution) -> list[nn.Module]:
    """Return the modules that a callable is or refers to, within three steps.

    References are a method's object, attributes, default arguments, closure variables and globals named in
    its code.
    """
    owner = function.__self__ if inspect.ismethod(function) else function
    if torch.compiler.is_compiling() and isinstance(owner, nn.Module):
        return [owner]  # the compiler cannot trace the search
    return reached(function, nn.Module)


def reached(function: Callable[..., Any] | Distribution, kinds: type | tuple[type, ...]) -> list[Any]:
    """Return the objects of these kinds that a callable is or refers to; found objects are not searched."""
    found: dict[int, Any] = {}
    seen: dict[int, int] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, kinds):
            found[id(value)] = value
        elif seen.get(id(value), 0) < depth and not isinstance(value, (type, ModuleType, Tensor)):
            seen[id(value)] = depth
            for part in _reached(value):
                visit(part, depth - (not inspect.ismethod(value)))

    visit(function, 4)
    return list(found.values())


def _reached(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from list(value.values())[:1000]
    elif isinstance(value, (tuple, list)):
        yield from value[:1000]
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that is not set yet
                yield cell.cell_contents
        yield from (value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__)
        yield getattr(value, "__wrapped__", None)
    elif hasattr(value, "__dict__"):
        yield vars(value)
        yield inspect.getattr_static(type(value), "__call__", None)


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function's code and in its inner functions."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def parameters_digest(*callables: Callable[..., Any] | Distribution) -> str:
    """Hash the state and the representation of all modules that the callables refer to."""
    tensors: list[Tensor] = []
    names: list[str] = []

    def add(part: Any) -> None:
        """Add state outside a state_dict, such as a fixed scale or a computed tensor."""
        plain = {k: v for k, v in sorted(vars(part).items()) if k != "training"}
        names.extend(f"{k}={v}" for k, v in plain.items() if isinstance(v, (int, float, str)))
        for value in plain.values():
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, (td.Distribution, Distribution)) and not isinstance(value, nn.Module):
                tensors.extend(tensors_of(value))

    for function in callables:
        for distribution in reached(function, Distribution):
            if not isinstance(distribution, nn.Module):
                names.append(distribution.family.__name__)
                add(distribution)
        for module in modules_of(function):
            module = getattr(module, "_orig_mod", module)  # compiled or not
            names.append(repr(module))
            for part in module.modules():
                if isinstance(part, (Likelihood, Distribution)):
                    add(part)
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                if not is_lazy(value):
                    names.append(name.replace("_orig_mod.", ""))
                    tensors.append(value)
    tensors.append(torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8, device="cpu"))
    return digest(tensors).tobytes().hex()


# Modules under evaluation: number of evaluations, and mode before the first.
_evaluated: dict[nn.Module, tuple[int, bool]] = {}
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Put all modules into eval mode; restore each when its last evaluation ends, in any thread."""
    # A frozen ScriptModule has no mode.
    parts = {m for module in modules for m in module.modules() if hasattr(m, "training")}
    with _evaluated_lock:
        for m in parts:
            count, mode = _evaluated.get(m, (0, m.training))
            _evaluated[m] = count + 1, mode
            m.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            for m in parts:
                count, mode = _evaluated.pop(m)
                if count > 1:
                    _evaluated[m] = count - 1, mode
                else:
                    m.training = mode
