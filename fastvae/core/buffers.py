"""Buffers of modules as a forward pass found them, for its repetition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Parameters, and the tensors that functional_call puts in their place.
_OWN = (Tensor, nn.Parameter)


class Buffers:
    """Buffers of modules before a forward pass, which may update or replace them, and which parameters."""

    def __init__(self, modules: list[nn.Module]):
        # Sharding exchanges parameters of its own kinds around each call.
        self._parameters = [
            (module, name, parameter)
            for module in modules
            if not isinstance(module, torch.jit.ScriptModule)
            for name, parameter in module._parameters.items()
            if type(parameter) in _OWN
        ]
        self._modules = modules
        # A buffer that is registered twice stays one tensor.
        copies: dict[int, Tensor] = {}
        self._entries = []
        for place, module in enumerate(modules):
            for name, tensor in module.named_buffers(recurse=False):
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().clone()
                self._entries.append((place, name, tensor, copies[id(tensor)]))

    def keep_changed(self) -> None:
        """Drop the copies of buffers that still have their value."""
        self._entries = [
            (place, name, tensor, copy)
            for place, name, tensor, copy in self._entries
            if getattr(self._modules[place], name, None) is not tensor
            or not _is_still(tensor, copy, self._modules[place].training)
        ]

    @contextlib.contextmanager
    def restored(self, copies_of: list[nn.Module] | None = None) -> Iterator[None]:
        """Context manager: the modules have these parameters and copies of these buffers.

        A repetition may update the copies.

        Args:
            copies_of: copies of the modules, in their order, that get the buffers in their place.
        """
        modules = self._modules if copies_of is None else copies_of
        replaced = []
        for module, name, parameter in self._parameters:
            current = module._parameters.get(name)
            if current is not parameter and type(current) in _OWN:
                replaced.append((module, name, current))
                module._parameters[name] = parameter
        now = [(modules[place], name, getattr(modules[place], name)) for place, name, _, _ in self._entries]
        copies: dict[int, Tensor] = {}
        for place, name, _, copy in self._entries:
            if id(copy) not in copies:
                copies[id(copy)] = copy.clone()
            setattr(modules[place], name, copies[id(copy)])
        try:
            yield
        finally:
            for module, name, tensor in now:
                setattr(module, name, tensor)
            for module, name, current in replaced:
                module._parameters[name] = current


def _is_still(tensor: Tensor, copy: Tensor, training: bool) -> bool:
    """Return True if a buffer still has the value of its copy.

    A comparison would wait for a GPU and fail in a captured graph; there, buffers of modules in training mode
    count as changed.
    """
    if tensor.device.type != "cpu":
        return not training
    try:
        return torch.equal(tensor, copy)
    except RuntimeError:  # a kind of tensor that cannot be compared
        return False
