"""Likelihoods with fused ops, and how they read a decoder's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..core.checks import check_data, check_same_device, check_tensor, on_same_device, shape_of
from ..core.deferred import LastLayer, check_unchanged
from ..core.fast_path import are_outputs
from ..core.nested import Conditioning, repeat
from ..core.numbers import as_tensor
from ..ops.head import Layers, in_one_kernel, linear_rows, pays
from ..ops.likelihood import check_support, flat_mask
from ..ops.op import accumulator
from .base import NAMED, Fused, Likelihood
from .outputs import KNOWN, by_name, describe

DECLARED: dict[str, type[Declared]] = {}
# Shared instances for calls by name: creating a module costs more than the kernels of a small batch.
SHARED: dict[str, Declared] = {}

_NOTHING = Conditioning()


class Declared(Likelihood):
    """Likelihood with fused ops, declared by a subclass that has a ``name``.

    :class:`fastvae.ops.likelihood.Declaration` lists the fields to declare; ``mean_of`` and ``draw`` compute
    the mean and a draw of x from all outputs. The C++ and Triton implementations are
    ``csrc/likelihoods/<name>.hpp`` and ``kernels/likelihoods/<name>.py``; the rest is derived from these.

    Attributes:
        converts: the decoder returns probabilities or rates instead of the declared outputs.
        constants: the last outputs, which are constants of the likelihood and never come from a decoder.
        information: function of all outputs that returns the Fisher information of each, where it is known
            and diagonal, else None.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]] = ()
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    elementary: ClassVar[bool] = False
    hint: ClassVar[str] = ""

    value: ClassVar[Callable[..., Tensor]]
    gradient: ClassVar[Callable[..., tuple[Tensor | None, ...]]]
    data: ClassVar[Callable[..., Tensor] | None] = None
    mean_of: ClassVar[Callable[..., Tensor]]
    draw: ClassVar[Callable[..., Tensor]]
    information: ClassVar[Callable[..., tuple[Tensor, ...]] | None] = None
    _bounded: ClassVar[bool]
    converts: ClassVar[bool] = False
    _holds: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls._bounded = cls.low > -math.inf or cls.high < math.inf
        if "outputs" in cls.__dict__ and "information" not in cls.__dict__:
            cls.information = None  # that of the base is of other outputs
        if "name" in cls.__dict__:
            ops.declare(cls)
            DECLARED[cls.name] = NAMED[cls.name] = cls
            SHARED[cls.name] = cls()
            KNOWN.update(dict.fromkeys(cls.outputs))

    def check(self, x: Any, name: str = "x") -> None:
        """Validate that x is one tensor of the declared kind."""
        if isinstance(x, Mapping):
            parts = ", ".join(f'{part}="{self.name}"' for part in list(x)[:3])
            raise TypeError(
                f"{name} is a dict, but a {type(self).__name__} likelihood takes one tensor; for several "
                f"parts use fastvae.likelihoods.Joint({parts})"
            )
        check_data(x, self, name)

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p [N, *event] of each element of x, given the decoder's output for N rows.

        Args:
            x: data [N, *event].
            parameters: the decoder's output for N rows of z.
        """
        parameters = self._natural(self.read(parameters, x))
        return self._elements(x, parameters)

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] for the decoder's output for K·B rows of z, sample-major."""
        if type(parameters) is Layers:
            return linear_rows(self.name, _flat(x), parameters)
        if not self.is_declared:
            of_rows = [
                p for p in self._given(x) if isinstance(p, Tensor) and p.dim() == x.dim() and p.shape[0] > 1
            ]
            if not of_rows or samples == 1:
                return super().log_likelihood(x, parameters, samples, conditioning)
            # The likelihood's own parameters [B, ...] fit one batch, not K·B rows: evaluate sample by sample.
            parts = parameters if isinstance(parameters, (tuple, list)) else (parameters,)
            drawn = [p[0] if len(p) == 1 else p for p in zip(*(p.chunk(samples) for p in parts), strict=True)]
            return torch.cat([super(Declared, self).log_likelihood(x, p, 1, conditioning) for p in drawn])
        mask, size_factor, _ = conditioning or _NOTHING
        parameters = self._natural(parameters, mask)
        given = self._given(x)
        returned = self._sized(self._read(x, parameters, samples, given), samples, size_factor)
        spread = [p.reshape(samples, *x.shape) for p in returned]
        return self._op(x, *self._arranged(spread, given), mask=mask)

    def _elements(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p of each element [N, *event] by calling the op on rows of one element."""
        given = self._given(x)
        one_each = [p.reshape(-1, 1) for p in self._read(x, parameters, 1, given)]
        own = [p.expand(x.shape).reshape(-1, 1) if isinstance(p, Tensor) else p for p in given]
        return self._op(x.reshape(-1, 1), *self._arranged(one_each, own)).reshape(x.shape)

    @property
    def _op(self) -> Callable[..., Tensor]:
        return getattr(ops, f"{self.name}_log_prob")  # type: ignore[no-any-return]

    @property
    def is_declared(self) -> bool:
        """True unless a subclass overrides log_prob."""
        return type(self).log_prob is Declared.log_prob

    def _sized(
        self, returned: Sequence[Tensor], samples: int, size_factor: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Multiply each example's mean by its size factor: add its log to the first output, a log mean."""
        if size_factor is None:
            return tuple(returned)
        if not self.takes_size:
            raise self.no_size()
        first, *others = returned
        log_size = repeat(size_factor.log(), samples)
        return first + log_size.reshape(-1, *[1] * (first.dim() - 1)), *others

    def mean(self, parameters: Any) -> Tensor:
        """Return the mean of x [N, *event], in the dtype of the first output."""
        parameters = self.read(parameters)
        return type(self).mean_of(*self._complete(parameters)).to(_dtype_of(parameters))

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x [N, *event], in the dtype of the first output.

        Counts are float32 (float64 for float64 outputs), since half precision represents few integers.
        """
        parameters = self.read(parameters)
        drawn = type(self).draw(*self._complete(parameters), generator=generator)
        return drawn if self.takes_size else drawn.to(_dtype_of(parameters))

    def information_of(
        self, parameters: Any, conditioning: Conditioning | None = None
    ) -> tuple[Tensor, ...] | None:
        """Return the Fisher information of each tensor that the decoder returned, or None if unknown."""
        known = type(self).information
        if known is None or self.converts or not self.is_declared:
            return None
        mask, size_factor, _ = conditioning or _NOTHING
        every = dict(
            zip(self.outputs, known(*self._sized(self._complete(parameters), 1, size_factor)), strict=True)
        )
        found = [every[name] for name in self.outputs if name not in self.own_names]
        return tuple(found) if mask is None else tuple([torch.where(mask, v, 0.0) for v in found])

    def _complete(self, parameters: Any) -> list[Tensor]:
        """Return all outputs, including the likelihood's own, each expanded to [N, *event]."""
        parameters = self._natural(parameters)
        first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
        if not isinstance(first, Tensor):
            raise self._wrong_output(parameters)
        given = self._given(first)
        every = self._arranged(self._read(first, parameters, 1, given), given)
        dtype = accumulator(first.dtype)
        return [as_tensor(p, dtype, first.device).expand(first.shape) for p in every]

    def fused(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the validated arguments of the fused op, or None if they do not fit it."""
        if not self.is_declared:
            return None
        if type(parameters) is Layers:
            return self.name, _flat(x), parameters, None
        mask, size_factor, _ = conditioning or _NOTHING
        given = self._given(x)
        parameters = self._natural(parameters, mask)
        returned = parameters if type(parameters) is tuple else (parameters,)
        if len(returned) + len(given) == len(self.outputs) and are_outputs(x, samples, returned):
            if not given:
                if self._bounded:
                    check_support(type(self), x, mask)
                if size_factor is not None:
                    returned = self._sized(returned, samples, size_factor)
                return self.name, x, returned, mask
        else:
            returned = self._read(x, parameters, samples, given)
        if not x.numel():
            return None
        rows = [of_the_event(p, returned[0], x) for p in given]
        if any([row is None for row in rows]):
            return None
        if size_factor is not None:
            returned = self._sized(returned, samples, size_factor)
        if x.dim() != 2:
            x, returned = x.reshape(x.shape[0], -1), tuple([p.reshape(p.shape[0], -1) for p in returned])
            mask = flat_mask(mask)
        check_support(type(self), x, mask)
        return self.name, x, self._arranged(returned, rows), mask

    def all_outputs(self, x: Tensor, parameters: Any) -> tuple[str, tuple[Any, ...]] | None:
        if not self.is_declared:
            return None
        given = self._given(x)
        if any(isinstance(p, Tensor) and p.dim() == x.dim() and p.shape[0] > 1 for p in given):
            return None
        parameters = self._natural(parameters)
        first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
        of_z = first if isinstance(first, Tensor) else x
        return self.name, self._arranged(self._read(of_z, parameters, 1, given), given)

    def _natural(self, parameters: Any, seen: Tensor | None = None) -> Any:
        """Convert the decoder's output to the declared outputs; ``seen`` is a mask [B, *event] or None."""
        return parameters

    def read_output(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Any:
        parameters = by_name(self, parameters)
        if type(parameters) is LastLayer:
            layers = self._layers(x, parameters, samples, conditioning)
            if layers is not None:
                return layers
        return self.multiplied_out(parameters, x)

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        return tuple(x.shape[1:]) if layer.event is None and isinstance(x, Tensor) else layer.event

    def _layers(
        self, x: Tensor, layer: LastLayer, samples: int, conditioning: Conditioning | None
    ) -> Layers | None:
        """Return a last layer in the fused op's form, or None if it does not fit or would not pay."""
        unfit = self.converts or not self.is_declared or x.requires_grad or not x.numel()
        if unfit or (
            conditioning is not None and not (conditioning.mask is None and conditioning.size_factor is None)
        ):
            return None
        given = self._given(x)
        count, size = len(self.outputs) - len(given), math.prod(x.shape[1:])
        # The fused op takes products for the first outputs only.
        if self._arranged(self.outputs[:count], self.outputs[count:]) != self.outputs:
            return None
        features = [w.shape[0] for w in layer.weights]
        if any([n % size for n in features]) or sum(features) != count * size:
            return None
        h = layer.input
        fits = self._event(layer, x) == tuple(x.shape[1:]) and h.shape[0] == samples * x.shape[0]
        if not fits or not on_same_device(x.device, h.device):
            return None
        if not pays(h.shape[0], size, h, layer.weights[0].shape[1]):
            return None
        if any([type(t) not in (Tensor, nn.Parameter) or t.dtype != h.dtype for t in layer.tensors]):
            return None
        rows = [of_the_event(p, h, x) for p in given]
        if any([row is None for row in rows]):
            return None
        check_unchanged(layer)
        check_support(type(self), x)
        weight, bias = layer.weights[0], layer.biases[0]
        if len(features) > 1:
            weight = torch.cat(layer.weights)
            if any([b is not None for b in layer.biases]):
                pairs = zip(layer.weights, layer.biases, strict=True)
                bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in pairs])
        own = [None if row is None else row.reshape(-1) for row in rows]
        first, second = [*own, None, None][:2]
        layers = Layers(h, weight, bias, first, second, layer.hidden)
        pays_there = layer.requested or h.is_cpu or in_one_kernel(self.name, _flat(x), layers)
        return layers if pays_there else None

    @property
    def expected_names(self) -> tuple[str, ...]:
        """Names of the tensors that the decoder returns; none if a subclass overrides log_prob."""
        if not self.is_declared:
            return ()
        return (self.option,) if self.converts else self._returned(len(self._holds) + len(self.constants))

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the outputs that the likelihood itself has."""
        if self.converts:
            return ()
        others = (*self.expected_names, *self.constants)
        return tuple([name for name in self.outputs if name not in others])

    def _returned(self, own: int) -> tuple[str, ...]:
        """Return the names of the decoder's outputs if the likelihood itself has ``own`` outputs."""
        return self.outputs[: len(self.outputs) - own]

    def _arranged(self, returned: Sequence[Any], own: Sequence[Any]) -> tuple[Any, ...]:
        """Return all outputs in the declared order."""
        return (*returned, *own)

    def _read(self, x: Tensor, parameters: Any, samples: int, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Validate the decoder's outputs, each [K·B, *event], and return them as a tuple."""
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
        """Return the outputs that the likelihood itself has, each broadcastable to the event."""
        return ()

    def _wrong_output(self, came: Any) -> TypeError:
        names = ", ".join(self.outputs)
        expected = f"{names}, one tensor" if len(self.outputs) == 1 else f"({names})"
        kind = self.name.replace("_", " ")
        return TypeError(f"the decoder of a {kind} likelihood must return {expected}; got {describe(came)}")


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[0], -1)


def _dtype_of(parameters: Any) -> torch.dtype:
    first = parameters if isinstance(parameters, Tensor) else parameters[0]
    return first.dtype


def of_the_event(parameter: float | Tensor, first: Tensor, x: Tensor) -> Tensor | None:
    """Return a parameter as one number or one row [X], or None if it differs by example."""
    if not isinstance(parameter, Tensor):
        # The decoder may compute in half precision, which would round the parameter.
        return torch.full((), parameter, dtype=accumulator(first.dtype), device=first.device)
    if parameter.numel() == 1:
        return parameter.reshape(())
    if parameter.dim() == x.dim():
        if parameter.shape[0] != 1:
            return None
        parameter = parameter[0]
    return parameter.expand(x.shape[1:]).reshape(-1)


def check_rows(name: str, value: Any, x: Tensor, samples: int) -> None:
    """Validate the shape of a decoder's output [K·B, *event] against x [B, *event]."""
    check_tensor(f"the decoder's {name}", value)
    expected = (samples * x.shape[0], *x.shape[1:])
    if value.shape != expected:
        same = value.shape[:1] == expected[:1] and math.prod(value.shape[1:]) == math.prod(x.shape[1:])
        hint = (
            f"; the event's {math.prod(x.shape[1:])} values are there in another shape: reshape the "
            "decoder's output or flatten x"
            if same
            else ""
        )
        raise ValueError(
            f"the decoder's {name} has shape {shape_of(value)}; expected [{', '.join(map(str, expected))}]: "
            f"K·B = {samples}·{x.shape[0]} rows (samples times batch), each shaped like an x of shape "
            f"{shape_of(x)}{hint}"
        )
