"""What a likelihood p(x|z) is: what the decoder's output means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_same_device, check_tensor, shape_of
from .._glance import are_outputs, are_outputs_in_python
from ..ops.likelihood import check_support
from ..ops.op import accumulator


class Likelihood(nn.Module):
    """What the objectives ask of p(x|z); a module, so that its own parameters are found.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.Likelihood):
        ...     def log_prob(self, x, location, samples):
        ...         location = location.reshape(samples, *x.shape)
        ...         return torch.distributions.Laplace(location, 1.0).log_prob(x).sum(-1)
        >>> x, q = torch.ones(4, 7), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(x, q, torch.nn.Linear(3, 7), k=5, likelihood=Laplace()).shape
        torch.Size([])

    Attributes:
        takes_integers: x may be a tensor of integers; else these are refused.
    """

    takes_integers: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def log_prob(self, x: Tensor, parameters: Any, samples: int) -> Tensor:
        """log p(x|z) [K, B], a floating-point tensor, from x [B, *event] and what the decoder returned for
        K·B rows of z, sample-major. It is summed over the event alone; another shape is refused.
        """
        raise NotImplementedError

    def fused(self, x: Tensor, parameters: Any, samples: int) -> Fused | None:
        """What the fused op takes; None where there is none."""
        return None

    def mean(self, parameters: Any) -> Tensor:
        """The mean of x given the decoder's output, for reconstructions and pictures."""
        raise NotImplementedError


# What fastvae.ops.weigh takes: the likelihood's name, x [B, X], and parameters, the first [K·B, X].
Fused = tuple[str, Tensor, tuple[Tensor, ...]]

DECLARED: dict[str, type[Declared]] = {}
# For a call that gives a name: making a module costs more than the kernels of a small batch.
SHARED: dict[str, Declared] = {}


class Declared(Likelihood):
    """A likelihood with fused ops, declared by a subclass that has a ``name``.

    What it declares stands at :class:`fastvae.ops.likelihood.Declaration`. Its twins are
    ``csrc/likelihoods/<name>.hpp`` and ``kernels/likelihoods/<name>.py``; everything else is made of these.

    Attributes:
        hazards: for the tests: how far each output is drawn from 0, beside the usual spreads.
        oracle: for the tests: an independent distribution of x, of the outputs.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    hint: ClassVar[str] = ""
    hazards: ClassVar[dict[str, tuple[float, ...]]] = {}

    value: ClassVar[Callable[..., Tensor]]
    gradient: ClassVar[Callable[..., tuple[Tensor | None, ...]]]
    data: ClassVar[Callable[..., Tensor] | None] = None
    oracle: ClassVar[Callable[..., torch.distributions.Distribution]]
    _bounded: ClassVar[bool]

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls._bounded = cls.low > -math.inf or cls.high < math.inf
        if "name" in cls.__dict__:
            ops.declare(cls)
            DECLARED[cls.name] = cls
            SHARED[cls.name] = cls()

    def log_prob(self, x: Tensor, parameters: Any, samples: int) -> Tensor:
        given = self._given(x)
        returned = self._read(x, parameters, samples, given)
        spread = [p.reshape(samples, *x.shape) for p in returned]
        return getattr(ops, f"{self.name}_log_prob")(x, *self._arranged(spread, given))  # type: ignore[no-any-return]

    def fused(self, x: Tensor, parameters: Any, samples: int) -> Fused | None:
        """What the fused op takes, checked; None where it does not fit."""
        if type(self).log_prob is not Declared.log_prob:  # a subclass's own
            return None
        given = self._given(x)
        returned = parameters if type(parameters) is tuple else (parameters,)
        glance = are_outputs_in_python if torch.compiler.is_compiling() else are_outputs
        if len(returned) + len(given) == len(self.outputs) and glance(x, samples, returned):
            if not given:
                if self._bounded:
                    check_support(type(self), x)
                return self.name, x, returned
        else:
            returned = self._read(x, parameters, samples, given)
        if not x.numel():
            return None
        rows = [_of_the_event(p, returned[0], x) for p in given]
        if any([row is None for row in rows]):
            return None
        if x.dim() != 2:
            x, returned = x.reshape(len(x), -1), tuple([p.reshape(len(p), -1) for p in returned])
        check_support(type(self), x)
        return self.name, x, self._arranged(returned, rows)

    def _returned(self, held: int) -> tuple[str, ...]:
        """The outputs that the decoder returns, if so many are held by the likelihood."""
        return self.outputs[: len(self.outputs) - held]

    def _arranged(self, returned: Sequence[Any], held: Sequence[Any]) -> tuple[Any, ...]:
        """All in the order of the outputs."""
        return (*returned, *held)

    def _read(self, x: Tensor, parameters: Any, samples: int, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What the decoder returned, each [K·B, *event], checked."""
        names = self._returned(len(given))
        if len(names) == 1:
            if not isinstance(parameters, Tensor):
                raise self._wrong_output(parameters)
            parameters = (parameters,)
        elif not (isinstance(parameters, (tuple, list)) and len(parameters) == len(names)):
            raise self._wrong_output(parameters)
        for name, value in zip(names, parameters, strict=True):
            check_rows(name, value, x, samples)
            check_same_device(f"the decoder's {name}", value, "x", x)
        return tuple(parameters)

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        """The outputs that the decoder does not return, broadcastable to the event."""
        return ()

    def _wrong_output(self, came: Any) -> TypeError:
        names = ", ".join(self.outputs)
        expected = f"{names}, one tensor" if len(self.outputs) == 1 else f"({names})"
        kind = self.name.replace("_", " ")
        return TypeError(f"the decoder of a {kind} likelihood must return {expected}; got {describe(came)}")


def _of_the_event(parameter: float | Tensor, first: Tensor, x: Tensor) -> Tensor | None:
    """A parameter as one number or one row [X]; None where the rows of the batch have their own."""
    if not isinstance(parameter, Tensor):
        # Not in half precision, which the decoder may compute in.
        return torch.full((), parameter, dtype=accumulator(first.dtype), device=first.device)
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.dim() == x.dim():
        if parameter.shape[0] != 1:
            return None
        parameter = parameter[0]
    return parameter.expand(x.shape[1:]).reshape(-1)


def check_rows(name: str, value: Any, x: Tensor, samples: int) -> None:
    """Check a decoder's output [K·B, *event] against x [B, *event]."""
    check_tensor(f"the decoder's {name}", value)
    expected = (samples * x.shape[0], *x.shape[1:])
    if value.shape != expected:
        same = value.shape[:1] == expected[:1] and value.shape[1:].numel() == x.shape[1:].numel()
        hint = (
            f"; the event's {x.shape[1:].numel()} values are there in another shape: reshape the decoder's "
            "output or flatten x"
            if same
            else ""
        )
        raise ValueError(
            f"the decoder's {name} has shape {shape_of(value)}; expected [{', '.join(map(str, expected))}]: "
            f"K·B = {samples}·{x.shape[0]} rows (samples times batch), each shaped like an x of shape "
            f"{shape_of(x)}{hint}"
        )


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {shape_of(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def as_likelihood(likelihood: Any, shared: bool = False) -> Likelihood:
    """A name or a likelihood object; of a name a module of its own, or ``shared`` with others."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if shared and type(likelihood) is str and likelihood in SHARED:
        return SHARED[likelihood]
    known = ", ".join(map(repr, DECLARED))
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood must be a name ({known}) or an object such as fastvae.Gaussian(scale=0.1); got "
            f"{likelihood!r}"
        )
    if likelihood not in DECLARED:
        raise ValueError(f"likelihood={likelihood!r} is unknown; known: {known}")
    return DECLARED[likelihood]()
