"""Modules of a callable: search, hash, and eval mode."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.parameter import is_lazy

from ..core.digest import digest
from ..core.nested import all_tensors
from ..distributions import Distribution
from ..distributions.tensors import modules_in, tensors_of
from ..likelihoods.base import Likelihood
from .last_layer import called_by


def modules_of(function: Callable[..., Any] | Distribution) -> list[nn.Module]:
    """Return the module that a callable is, or whose method it is, or those of a distribution.

    The modules that another callable reaches are unknown: its caller names them.
    """
    owner: Any = called_by(function)
    return modules_in(owner) if isinstance(owner, (nn.Module, Distribution)) else []


def is_known(function: Callable[..., Any] | Distribution) -> bool:
    """Return True for a callable whose modules :func:`modules_of` knows."""
    return isinstance(called_by(function), (nn.Module, Distribution))


def check_modules(modules: Any) -> list[nn.Module]:
    """Validate the argument ``modules=``, the modules that functions reach."""
    if isinstance(modules, nn.Module) or not isinstance(modules, Iterable):
        came = type(modules).__name__
        raise TypeError(f"modules must be a list of modules that functions reach, such as [net]; got {came}")
    named = list(modules)
    for module in named:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be a list of nn.Modules; one of them is a {type(module).__name__}")
    return named


def check_repeatable(function: Callable[..., Any], call: Callable[[], Any]) -> None:
    """Validate that ``call``, of a decoder, returns the same tensors twice, as it does in eval mode.

    A module and a module's method have been put into eval mode, and need no call.

    Raises:
        ValueError: if it does not.
    """
    if is_known(function) or torch.compiler.is_compiling():
        return
    one, other = (all_tensors(call()) for _ in range(2))
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)):
        raise ValueError(
            "decoder is a function that returns another output when it is called again with the same z, as a "
            "module with dropout does in training mode. Name the modules that it reaches, such as "
            "modules=[net], to put them into eval mode, or call .eval() on them before"
        )


def parameters_digest(*callables: Callable[..., Any] | Distribution) -> str:
    """Hash the state and the representation of the modules of all callables."""
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
        if isinstance(function, Distribution) and not isinstance(function, nn.Module):
            names.append(function.family.__name__)
            add(function)
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
