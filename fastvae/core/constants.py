"""Cache of constant tensors, such as tables of indices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling

from .torch_private import dispatch_mode_depth, functorch_is_active

_Result = TypeVar("_Result")


def cached_constant(most: int) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Cache a function's tensors, which depend on its arguments alone, up to ``most`` times.

    Autograd saves no tensor of inference mode, and a tensor of a fake mode or of a transform ends with it:
    cached tensors belong to no mode. The function must name the device of each tensor that it creates.
    """

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        known: dict[tuple[Any, ...], _Result] = {}

        @functools.wraps(function)
        def cached(*arguments: Any) -> _Result:
            if is_compiling() or dispatch_mode_depth() or functorch_is_active():
                return function(*arguments)
            found = known.get(arguments)
            if found is None:
                with torch.inference_mode(False):
                    found = function(*arguments)
                # While a CUDA graph is captured nothing is computed, only at its replays.
                if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
                    if len(known) >= most:
                        known.clear()
                    known[arguments] = found
            return found

        cached.cache_clear = known.clear  # type: ignore[attr-defined]
        return cached

    return decorate
