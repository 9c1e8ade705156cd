"""Repetition of a draw's networks where its densities are evaluated: the same dropout masks and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.buffers import Buffers
from ..core.torch_private import functorch_is_active
from .tensors import Holder, modules_in

_Result = TypeVar("_Result")

_FIX = "Call eval() on these networks, leave the dropout out, or use estimator='iwae', which runs them once"


class Runs:
    """Runs of networks for one draw; a run with the same key repeats the first.

    A repetition finds the random state and the buffers that the first run found, and leaves both as they are.

    Args:
        device: device of the draw.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._first: dict[Any, _Run] = {}

    @contextlib.contextmanager
    def of(self, role: str, distribution: Holder) -> Iterator[None]:
        """Context manager: a draw from a distribution or its density, first or again.

        Args:
            role: ``"q"`` or ``"p"``.
            distribution: the distribution, or a copy of it.
        """
        token = _active.set(self)
        try:
            with self._run(role, modules_in(distribution)):
                yield
        finally:
            _active.reset(token)

    def run(self, key: Any, function: Callable[..., _Result], *given: Any) -> _Result:
        with self._run(key, modules_in(function)):
            return function(*given)

    @contextlib.contextmanager
    def _run(self, key: Any, outer: list[nn.Module]) -> Iterator[None]:
        modules = [m for module in outer for m in module.modules()]
        first = self._first.get(key)
        if first is not None:
            with first.repeated(modules):
                yield
            return
        started = _Run(self._device, modules)
        yield
        started.end()
        self._first[key] = started

    def check(self, name: str, drawn: Tensor, again: Tensor) -> None:
        """Raise RuntimeError unless log q(z|x) [K, B] of a repetition is that of the draw, to rounding.

        Networks with a key are repeated one by one. Others may consume noise in another order.

        Args:
            name: name of q's family.
            drawn: log q(z|x) of the draw.
            again: that of the repetition.
        """
        if len(self._first) > 1 or not self._first["q"].is_random or not drawn.numel():
            return
        if functorch_is_active():
            return
        # A narrow q loses digits in z, in some rows: the typical difference counts.
        off = ((drawn - again).abs() / (1 + drawn.abs())).detach().float().median()
        if not bool(off < 1e-2):
            raise RuntimeError(
                f"log q(z|x) of {name} at its own draws differs from that of the draw, by {float(off):.2g} "
                "of its size: its networks are in training mode and draw noise, such as dropout masks, in "
                f"another order for a density than for a draw. {_FIX}"
            )


class _Run:
    """Random state and buffers that a run found."""

    def __init__(self, device: torch.device, modules: list[nn.Module]):
        self._device = device
        self._states = _random_states(device)
        self._buffers = Buffers(modules)
        self.is_random = False

    def end(self) -> None:
        self.is_random = _differ(self._states, _random_states(self._device))
        self._buffers.keep_changed()

    @contextlib.contextmanager
    def repeated(self, modules: list[nn.Module]) -> Iterator[None]:
        """Context manager: these modules, or copies of the first run's, repeat it."""
        with self._buffers.restored(modules):
            if not self.is_random:
                yield
                return
            device = self._device
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                state, *others = self._states
                torch.set_rng_state(state)
                for other in others:
                    torch.get_device_module(device).set_rng_state(other, device)
                yield


class _NoRuns(Runs):
    """Runs that are not repeated: nothing is in training mode, or each run is the first."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @contextlib.contextmanager
    def of(self, role: str, distribution: Holder) -> Iterator[None]:
        yield

    def check(self, name: str, drawn: Tensor, again: Tensor) -> None:
        pass


NO_RUNS = _NoRuns()
_active: ContextVar[Runs | None] = ContextVar("fastvae_runs", default=None)


def run(key: Any, function: Callable[..., _Result], *given: Any) -> _Result:
    """Call a network of a distribution, as a repetition if a density of the current draw needs it again.

    Args:
        key: identity of the network, the same for its copies.
        function: the network.
        *given: its arguments.
    """
    runs = None if torch.compiler.is_compiling() else _active.get()
    return function(*given) if runs is None else runs.run(key, function, *given)


def runs_of(q: Any, p: Holder) -> Runs:
    """Return the runs of a draw from q whose densities, and p's, are evaluated after it.

    Raises:
        RuntimeError: if they cannot be repeated, in a graph that is compiled or captured.
    """
    if _is_graph(q.device):
        _refuse_dropout(q, p)
        return NO_RUNS
    return Runs(q.device) if _in_training(q) or _in_training(p) else NO_RUNS


def _refuse_dropout(*distributions: Holder) -> None:
    """Raise RuntimeError for dropout in training mode, whose masks a graph cannot repeat."""
    for distribution in distributions:
        if any([isinstance(m, nn.modules.dropout._DropoutNd) for m in _in_training(distribution)]):
            raise RuntimeError(
                "q or the prior has networks with dropout in training mode, which this estimator runs more "
                f"than once; in a compiled or captured graph no run can repeat the masks of another. {_FIX}"
            )


def without_noise(distribution: Any, density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return the log density at draws z that other runs of the networks gave.

    Args:
        distribution: the distribution.
        density: its log density, a function of z.
        z: its draws.

    Raises:
        RuntimeError: if the networks draw noise, so that it is not the density of these draws.
    """
    if _is_graph(z.device):
        _refuse_dropout(distribution)
        return density(z)
    if not _in_training(distribution):
        return density(z)
    before = _random_states(z.device)
    value = density(z)
    if _differ(before, _random_states(z.device)):
        raise RuntimeError(
            f"the density of a {distribution.family.__name__} draws noise, such as dropout masks, in "
            "networks in training mode, so that it is not the density that z was drawn from. Call eval() on "
            "these networks, or leave the dropout out"
        )
    return value


def _in_training(distribution: Holder) -> list[nn.Module]:
    """Return the networks in training mode; a TorchScript module counts as one."""
    found, todo = [], modules_in(distribution)
    while todo:
        module = todo.pop()
        # Dynamo traces no method of a module that it has just seen constructed, such as q.
        attributes = module.__dict__
        if attributes.get("training", True) and not isinstance(module, Holder):
            found.append(module)
        todo.extend([m for m in attributes.get("_modules", {}).values() if m is not None])
    return found


def _is_graph(device: torch.device) -> bool:
    """Return True while a graph is compiled, or captured on the device."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
