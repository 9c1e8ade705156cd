"""Base class of likelihoods whose positive parameters come from the decoder or the constructor."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.checks import check_same_device, check_tensor, shape_of
from .declared import DECLARED, Declared
from .outputs import describe

OwnParameter = float | Tensor | None

# Example values for error messages.
EXAMPLES = {"scale": 0.1, "df": 4.0, "inverse_dispersion": 10.0}


class Scaled(Declared):
    """Likelihood whose outputs after the first are positive, such as a scale.

    The decoder returns each as a logarithm, or the constructor takes it: a fixed number or tensor, or the
    initial value of a learned parameter. A fixed ``scale`` is the buffer ``fixed_scale``, a learned one the
    parameter ``log_scale``.

    Attributes:
        own_parameters: parameters that the constructor takes, by name, each with a description.
    """

    own_parameters: ClassVar[dict[str, str]] = {"scale": "a scale"}

    # Only one of the two is set, depending on ``learned``.
    log_scale: nn.Parameter
    fixed_scale: OwnParameter

    def __init__(self, scale: OwnParameter = None, *, learned: bool = False):
        super().__init__()
        self._holds = ()
        self._set_parameter(next(iter(self.own_parameters)), scale, learned)

    def _set_parameter(self, name: str, value: OwnParameter, learned: bool) -> None:
        """Register a parameter as learned or fixed; None leaves it to the decoder."""
        names = list(self.own_parameters)
        flag = "learned" if name == names[0] else f"learned_{name}"
        by_hand = self._example(names[names.index(name) :], f", {flag}=True")
        if isinstance(value, nn.Parameter) or (learned and isinstance(value, Tensor) and value.requires_grad):
            raise TypeError(
                f"{name} must be a value to begin training at, not a parameter, which a step of an optimiser "
                f"can make negative; use {by_hand}, which trains log_{name}, the logarithm"
            )
        if learned and value is None:
            raise ValueError(f"{flag}=True needs a {name} to begin at, such as {by_hand}")
        must = f"{name} is {self.own_parameters[name]} and must be positive and finite"
        if value is not None and not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{must}, got {value}")
            value = float(value)
        if isinstance(value, Tensor):
            check_tensor(name, value)
            values = value.detach()
            if value.device.type == "cpu" and not bool(((values > 0) & values.isfinite()).all()):
                raise ValueError(f"{must} everywhere")
        if learned:
            value = value if isinstance(value, Tensor) else torch.tensor(value)
            self.register_parameter(f"log_{name}", nn.Parameter(value.log()))
        elif isinstance(value, Tensor) and not value.requires_grad:
            self.register_buffer(f"fixed_{name}", value)
        else:
            # A number, or a network's output, which must stay in its autograd graph: not a buffer.
            self.__dict__[f"fixed_{name}"] = value
        if value is not None:
            self._holds = (*self._holds, name)

    def extra_repr(self) -> str:
        shown = []
        for name in self._holds:
            learned = f"log_{name}" in self._parameters
            flag = "learned" if name == next(iter(self.own_parameters)) else f"learned_{name}"
            shown += [f"{name}={shown_value(self._own_parameter(name))}", *[f"{flag}=True"] * learned]
        return ", ".join(shown)

    def _own_parameter(self, name: str) -> OwnParameter:
        learned: Tensor | None = self._parameters.get(f"log_{name}")
        return getattr(self, f"fixed_{name}") if learned is None else learned.exp()

    @property
    def scale(self) -> OwnParameter:
        """Scale, learned or fixed; None if the decoder returns it."""
        return self._own_parameter("scale")

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        if not self._holds:
            return ()
        return tuple([self._logarithm(name, x) for name in self._holds])

    def _logarithm(self, name: str, x: Tensor) -> float | Tensor:
        value: Tensor | None = self._parameters.get(f"log_{name}")
        if value is None:
            fixed = getattr(self, f"fixed_{name}")
            if not isinstance(fixed, Tensor):
                return math.log(fixed)
            value = fixed.log()
        check_broadcasts(name, value, x)
        return value

    def _wrong_output(self, came: Any) -> TypeError:
        returned_all = self._returned(len(self.constants))
        every, first = ", ".join(returned_all), self.outputs[0]
        if not self._holds:
            returned = 1 if isinstance(came, Tensor) else len(came) if isinstance(came, (tuple, list)) else 0
            return TypeError(
                f"the decoder of a {self.name.replace('_', ' ')} likelihood must return ({every}), got "
                f"{describe(came)}{self.completion(returned)}"
            )
        left = self._returned(len(self._holds) + len(self.constants))
        must = f"the {first} alone, a tensor" if len(left) == 1 else f"({', '.join(left)})"
        arguments = ", ".join(f"{name}=..." for name in self._holds)
        return TypeError(
            f"the decoder of {self._kind()}({arguments}) must return {must}; got {describe(came)}. For a "
            f"decoder that returns ({every}) use likelihood={self.name!r}, without "
            f"{' and '.join(f'a {name}' for name in self._holds)}"
        )

    def completion(self, returned: int) -> str:
        if self._holds or not 0 < returned < len(self._returned(len(self.constants))):
            return ""
        missing = list(self.own_parameters)[returned - 1 :]
        give = " and ".join(f"{name}, {self.own_parameters[name]}" for name in missing)
        alone = f"a {self.outputs[0]}" if returned == 1 else "these"
        return f"; for {alone} alone, give {give}: likelihood={self._example(missing)}"

    def _example(self, names: list[str], more: str = "") -> str:
        """Return the constructor call that sets these parameters, for error messages."""
        return f"fastvae.likelihoods.{self._kind()}({', '.join(f'{n}={EXAMPLES[n]}' for n in names)}{more})"

    def _kind(self) -> str:
        """Return the name of the public class."""
        return DECLARED[self.name].__name__

    @staticmethod
    def mean_of(location: Tensor, *others: Tensor) -> Tensor:
        return location


def check_broadcasts(name: str, value: Tensor, x: Tensor) -> None:
    """Validate that one number, or one per element of the event, broadcasts to x [B, *event]."""
    check_same_device(f"the {name}", value, "x", x)
    missing = x.dim() - value.dim()
    if missing < 0 or any(n not in (1, m) for n, m in zip(value.shape, x.shape[missing:], strict=True)):
        raise ValueError(
            f"{name} has shape {shape_of(value)}, which does not broadcast to an x of shape {shape_of(x)}; "
            f"expected one number, or one for each element of the event, {list(x.shape[1:])}"
        )


def shown_value(value: Any) -> str:
    """Format a number or a one-element tensor by value, and a larger tensor by shape."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() != 1:
        return f"<tensor {shape_of(value)}>"
    return repr(float(f"{float(value.detach()):.6g}"))  # 0.1, not float32's 0.10000000149


def normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)


def exponential_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return tensor.new_empty(tensor.shape).exponential_(generator=generator)
