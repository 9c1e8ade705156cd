"""What a likelihood p(x|z) is: what the decoder's output means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import (
    as_int64,
    check_data,
    check_result,
    check_same_device,
    check_tensor,
    is_dense,
    on_same_device,
    shape_of,
)
from .._glance import are_outputs, are_outputs_in_python
from .._nested import Beside, each, repeat, tensors
from .._teach import described, did_you_mean, explained, teaches_by
from ..head import LastLayer, check_unchanged, multiply_out
from ..ops.head import Layers, linear_rows, pays
from ..ops.likelihood import check_support
from ..ops.op import accumulator


class Likelihood(nn.Module):
    """What the objectives ask of p(x|z), for one of your own; a module, so that its parameters are found.

    A subclass needs :meth:`log_prob`, in plain PyTorch; for a ``torch.distributions`` constructor
    :func:`fastvae.likelihoods.from_distribution` makes one. Every objective takes it, in chunks too.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.Likelihood):
        ...     def log_prob(self, x, location):
        ...         return -(x - location).abs() - torch.log(torch.tensor(2.0))
        >>> x, q = torch.ones(4, 7), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(x, q, torch.nn.Linear(3, 7), k=5, likelihood=Laplace()).shape
        torch.Size([])

    Attributes:
        takes_integers: x may be a tensor of integers; else these are refused.
        takes_size: the mean may have a factor for each example, ``size=``.
        inside: a value that an element of x may have: it stands where a ``mask`` says that none was observed.
        reads: for warnings, what the decoder's first output is where other codes return something else:
            ``"logits"``, ``"class logits"`` along axis 1, ``"event logits"`` or ``"log rates"``.
        option: the argument that makes it read probabilities or rates.
        counts: x are counts, whole numbers.
    """

    takes_integers: ClassVar[bool] = False
    takes_size: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    inside: ClassVar[float] = 0.0
    reads: ClassVar[str] = ""
    option: ClassVar[str] = ""
    counts: ClassVar[bool] = False

    def log_prob(self, x: Any, parameters: Any) -> Tensor:
        """log p(x|z), a floating-point tensor [N, *event], of x [N, *event] and what the decoder returned for
        N rows of z. It may be summed over the event, or last axes of it; another shape is refused.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob(x, parameters)")

    def mean(self, parameters: Any) -> Any:
        """The mean of x given the decoder's output, for reconstructions and pictures."""
        raise NotImplementedError(f"{type(self).__name__} has no mean(parameters)")

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Any:
        """A draw of x given the decoder's output."""
        raise NotImplementedError(f"{type(self).__name__} has no sample(parameters, generator=...)")

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("fastvae."):
            teaches_by(cls)

    # What fastvae asks.

    def check(self, x: Any, name: str = "x") -> None:
        """Refuse data of another kind."""
        if not isinstance(x, Mapping):
            check_data(x, self, name)
            return
        for key, part in x.items():
            check_data(part, self, f"{name}[{key!r}]")

    def log_likelihood(self, x: Any, parameters: Any, samples: int, beside: Beside | None = None) -> Tensor:
        """log p(x|z) [K, B] of x, a batch, and what the decoder returned for K·B rows of z, sample-major."""
        mask, size, _ = beside or _NOTHING
        if size is not None:
            raise self.no_size()
        batch = tensors(x)[0].shape[0]
        x = each(as_int64, x)  # arithmetic of PyTorch's wraps around in the small ones
        given = repeat(observed(x, mask, self), samples), parameters

        def note() -> str:
            what = f"with x {described(given[0])} and parameters {described(parameters)}"
            return f"fastvae called {type(self).__name__}.log_prob(x, parameters) {what}"

        value = explained(self.log_prob, given, note)
        self._check_log_prob(value, x, samples * batch, mask)
        value = value.to(accumulator(value.dtype))
        if mask is not None:
            value = torch.where(repeat(mask, samples), value, 0.0)
        return summed(value, samples, batch)

    def read_output(self, x: Any, parameters: Any, samples: int, beside: Beside | None = None) -> Any:
        """Return the decoder's output for K·B rows of z as :meth:`fused` and :meth:`log_likelihood` take it,
        a last layer as the fused op does, where there is one, else multiplied out.
        """
        return self.multiplied_out(parameters, x)

    def multiplied_out(self, parameters: Any, x: Any = None) -> Any:
        """Return the decoder's output with tensors in place of last layers that were left out."""
        if type(parameters) is LastLayer:
            outputs = multiply_out(parameters, self._event(parameters, x))
            return outputs[0] if len(outputs) == 1 else outputs
        if type(parameters) in (tuple, list) and any([type(p) is LastLayer for p in parameters]):
            return type(parameters)([self.multiplied_out(p, x) for p in parameters])
        if type(parameters) is dict and any([type(p) is LastLayer for p in parameters.values()]):
            return {name: self.multiplied_out(p, x) for name, p in parameters.items()}
        return parameters

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        """The shape of an output's row; None for the layer's own."""
        return layer.event

    def fused(self, x: Any, parameters: Any, samples: int, beside: Beside | None = None) -> Fused | None:
        """What the fused op takes; None where there is none."""
        return None

    def all_outputs(self, x: Tensor, parameters: Any) -> tuple[str, tuple[Any, ...]] | None:
        """The name of the op, and all that it takes beside x, of what the decoder returned for z that is not
        of these x; None where there is no op.
        """
        return None

    def no_size(self) -> TypeError:
        known = ", ".join(kind.__name__ for kind in DECLARED.values() if kind.takes_size)
        return TypeError(
            f"size is a factor of the mean of counts, which a {type(self).__name__} likelihood does not "
            f"have; those that do: {known}. For others give it as context= and use it in the decoder"
        )

    def _check_log_prob(self, value: Any, x: Any, rows: int, mask: Any) -> None:
        """That it is of each row, summed over last axes of the event or not; with a mask of each element."""
        shape = (rows, *(() if isinstance(x, Mapping) else x.shape[1:]))
        fits = isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape[: value.dim()]
        axes = "[N, *event]"
        fix = "an entry for each row, sample times batch, summed over axes of the event alone"
        if mask is not None:
            fits = fits and value.shape == shape
            fix = "a mask needs log p of each element of the event"
        elif len(shape) > 1:
            axes = f"summed over the event, [{rows}]; or of each element, {axes}"
        check_result(
            self, "log_prob", "log p(x|z)", value, axes, value.shape if fits else shape, tensors(x)[0].device,
            fix,
        )  # fmt: skip


_NOTHING = Beside()


def summed(value: Tensor, samples: int, batch: int) -> Tensor:
    """Sum log p of each element, K·B rows of them, over the event: [K, B], also of an empty batch."""
    return value.reshape(samples, batch, value.numel() // max(1, samples * batch)).sum(2)


def observed(x: Any, mask: Any, likelihood: Likelihood) -> Any:
    """x with a value that its elements may have where none was observed."""
    if mask is None:
        return x
    if isinstance(x, Mapping):
        raise TypeError(
            f"mask is given with an x of several parts, whose elements {type(likelihood).__name__} does not "
            "tell apart; use fastvae.Joint, which takes a mask of each"
        )
    inside = float(likelihood.inside)
    if not (x.is_floating_point() or inside.is_integer()):
        x = x.to(torch.get_default_dtype())
    return torch.where(mask, x, torch.full((), inside, dtype=x.dtype, device=x.device))


# What fastvae.ops.weigh takes: the likelihood's name, x [B, X], and parameters, the first [K·B, X]; or what
# fastvae.ops.head takes.
Fused = tuple[str, Tensor, tuple[Tensor, ...]] | tuple[str, Tensor, Layers]

DECLARED: dict[str, type[Declared]] = {}
# What a name may mean.
NAMED: dict[str, type[Likelihood]] = {}
# For a call that gives a name: making a module costs more than the kernels of a small batch.
SHARED: dict[str, Declared] = {}


class Declared(Likelihood):
    """A likelihood with fused ops, declared by a subclass that has a ``name``.

    What it declares stands at :class:`fastvae.ops.likelihood.Declaration`; ``mean_of`` and ``draw`` are the
    mean and a draw of x, of all outputs. Its twins are
    ``csrc/likelihoods/<name>.hpp`` and ``kernels/likelihoods/<name>.py``; everything else is made of these.

    Attributes:
        converts: the decoder's output is not what was declared, but probabilities or rates.
        constants: the last outputs, which the likelihood itself has and no decoder returns.
        hazards: for the tests: how far each output is drawn from 0, beside the usual spreads.
        oracle: for the tests: an independent distribution of x, of the outputs.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]] = ()
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    hint: ClassVar[str] = ""
    hazards: ClassVar[dict[str, tuple[float, ...]]] = {}

    value: ClassVar[Callable[..., Tensor]]
    gradient: ClassVar[Callable[..., tuple[Tensor | None, ...]]]
    data: ClassVar[Callable[..., Tensor] | None] = None
    oracle: ClassVar[Callable[..., torch.distributions.Distribution]]
    mean_of: ClassVar[Callable[..., Tensor]]
    draw: ClassVar[Callable[..., Tensor]]
    _bounded: ClassVar[bool]
    converts: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls._bounded = cls.low > -math.inf or cls.high < math.inf
        if "name" in cls.__dict__:
            ops.declare(cls)
            DECLARED[cls.name] = NAMED[cls.name] = cls
            SHARED[cls.name] = cls()

    def check(self, x: Any, name: str = "x") -> None:
        """Refuse data of another kind."""
        if isinstance(x, Mapping):
            parts = ", ".join(f'{part}="{self.name}"' for part in list(x)[:3])
            raise TypeError(
                f"{name} is a dict, but a {type(self).__name__} likelihood takes one tensor; for several "
                f"parts use fastvae.Joint({parts})"
            )
        check_data(x, self, name)

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """log p of each element [N, *event], of x [N, *event] and what the decoder returned for N rows."""
        parameters = self._natural(self.multiplied_out(parameters, x))
        return self._elements(x, parameters, 1, None)[0]

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, beside: Beside | None = None
    ) -> Tensor:
        """log p(x|z) [K, B] of what the decoder returned for K·B rows of z, sample-major."""
        if type(parameters) is Layers:
            return linear_rows(self.name, _flat(x), parameters)
        if not self.is_declared:
            of_rows = [
                p for p in self._given(x) if isinstance(p, Tensor) and p.dim() == x.dim() and len(p) > 1
            ]
            if not of_rows or samples == 1:
                return super().log_likelihood(x, parameters, samples, beside)
            # What it holds of each example goes with a batch, not with samples of it.
            parts = parameters if isinstance(parameters, (tuple, list)) else (parameters,)
            drawn = [p[0] if len(p) == 1 else p for p in zip(*(p.chunk(samples) for p in parts), strict=True)]
            return torch.cat([super(Declared, self).log_likelihood(x, p, 1, beside) for p in drawn])
        mask, size, _ = beside or _NOTHING
        parameters = self._natural(parameters)
        if mask is not None:
            each = self._elements(observed(x, mask, self), parameters, samples, size)
            return summed(torch.where(mask, each, 0.0), samples, len(x))
        given = self._given(x)
        returned = self._sized(self._read(x, parameters, samples, given), samples, size)
        spread = [p.reshape(samples, *x.shape) for p in returned]
        return self._op(x, *self._arranged(spread, given))

    def _elements(self, x: Tensor, parameters: Any, samples: int, size: Tensor | None) -> Tensor:
        """log p of each element [K, B, *event]: the op, of rows of one element."""
        given = self._given(x)
        returned = self._sized(self._read(x, parameters, samples, given), samples, size)
        one_each = [p.reshape(samples, -1, 1) for p in returned]
        held = [p.expand(x.shape).reshape(-1, 1) if isinstance(p, Tensor) else p for p in given]
        return self._op(x.reshape(-1, 1), *self._arranged(one_each, held)).reshape(samples, *x.shape)

    @property
    def _op(self) -> Callable[..., Tensor]:
        return getattr(ops, f"{self.name}_log_prob")  # type: ignore[no-any-return]

    @property
    def is_declared(self) -> bool:
        """Whether log_prob is what was declared, and no subclass's own."""
        return type(self).log_prob is Declared.log_prob

    def _sized(self, returned: Sequence[Tensor], samples: int, size: Tensor | None) -> tuple[Tensor, ...]:
        """With the examples' factors of the mean, whose logarithm the first is."""
        if size is None:
            return tuple(returned)
        if not self.takes_size:
            raise self.no_size()
        first, *others = returned
        log_size = repeat(size.log(), samples)
        return first + log_size.reshape(-1, *[1] * (first.dim() - 1)), *others

    def mean(self, parameters: Any) -> Tensor:
        """The mean of x [N, *event], in the dtype of the first output."""
        return type(self).mean_of(*self._complete(parameters)).to(_dtype_of(parameters))

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x [N, *event], in the dtype of the first output; of counts in float32 (or float64), since
        half precision holds few of them.
        """
        drawn = type(self).draw(*self._complete(parameters), generator=generator)
        return drawn if self.takes_size else drawn.to(_dtype_of(parameters))

    def _complete(self, parameters: Any) -> list[Tensor]:
        """All outputs, those that the likelihood holds too, each [N, *event]."""
        parameters = self._natural(self.multiplied_out(parameters))
        first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
        if not isinstance(first, Tensor):
            raise self._wrong_output(parameters)
        given = self._given(first)
        every = self._arranged(self._read(first, parameters, 1, given), given)
        dtype = accumulator(first.dtype)
        return [torch.as_tensor(p, dtype=dtype, device=first.device).expand(first.shape) for p in every]

    def fused(self, x: Tensor, parameters: Any, samples: int, beside: Beside | None = None) -> Fused | None:
        """What the fused op takes, checked; None where it does not fit."""
        if not self.is_declared or (beside is not None and beside.mask is not None):
            return None
        if type(parameters) is Layers:
            return self.name, _flat(x), parameters
        given = self._given(x)
        parameters = self._natural(parameters)
        returned = parameters if type(parameters) is tuple else (parameters,)
        glance = are_outputs_in_python if torch.compiler.is_compiling() else are_outputs
        dense = all([not isinstance(p, Tensor) or is_dense(p) for p in returned])
        if dense and len(returned) + len(given) == len(self.outputs) and glance(x, samples, returned):
            if not given:
                if self._bounded:
                    check_support(type(self), x)
                if beside is not None:
                    returned = self._sized(returned, samples, beside.size)
                return self.name, x, returned
        else:
            returned = self._read(x, parameters, samples, given)
        if not x.numel():
            return None
        rows = [_of_the_event(p, returned[0], x) for p in given]
        if any([row is None for row in rows]):
            return None
        if beside is not None:
            returned = self._sized(returned, samples, beside.size)
        if x.dim() != 2:
            x, returned = x.reshape(len(x), -1), tuple([p.reshape(len(p), -1) for p in returned])
        check_support(type(self), x)
        return self.name, x, self._arranged(returned, rows)

    def all_outputs(self, x: Tensor, parameters: Any) -> tuple[str, tuple[Any, ...]] | None:
        if not self.is_declared:
            return None
        given = self._given(x)
        if any(isinstance(p, Tensor) and p.dim() == x.dim() and len(p) > 1 for p in given):
            return None
        parameters = self._natural(parameters)
        first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
        of_z = first if isinstance(first, Tensor) else x
        return self.name, self._arranged(self._read(of_z, parameters, 1, given), given)

    def _natural(self, parameters: Any) -> Any:
        """The outputs declared, of what the decoder returned."""
        return parameters

    def read_output(self, x: Tensor, parameters: Any, samples: int, beside: Beside | None = None) -> Any:
        if type(parameters) is LastLayer:
            layers = self._layers(x, parameters, samples, beside)
            if layers is not None:
                return layers
        return self.multiplied_out(parameters, x)

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        return tuple(x.shape[1:]) if layer.event is None and isinstance(x, Tensor) else layer.event

    def _layers(self, x: Tensor, layer: LastLayer, samples: int, beside: Beside | None) -> Layers | None:
        """A last layer as the fused op takes it; None where that does not fit or pay."""
        unfit = self.converts or not self.is_declared or x.requires_grad or not x.numel()
        if unfit or (beside is not None and not (beside.mask is None and beside.size is None)):
            return None
        given = self._given(x)
        count, size = len(self.outputs) - len(given), x.shape[1:].numel()
        # The first outputs must be the layers'.
        if self._arranged(self.outputs[:count], self.outputs[count:]) != self.outputs:
            return None
        features = [len(w) for w in layer.weights]
        if any([n % size for n in features]) or sum(features) != count * size:
            return None
        h = layer.input
        fits = self._event(layer, x) == tuple(x.shape[1:]) and len(h) == samples * len(x)
        if not fits or not on_same_device(x.device, h.device) or not pays(len(h), size, h):
            return None
        if any([type(t) not in (Tensor, nn.Parameter) or t.dtype != h.dtype for t in layer.tensors]):
            return None
        rows = [_of_the_event(p, h, x) for p in given]
        if any([row is None for row in rows]):
            return None
        check_unchanged(layer)
        check_support(type(self), x)
        weight, bias = layer.weights[0], layer.biases[0]
        if len(features) > 1:
            weight = torch.cat(layer.weights)
            if any([b is not None for b in layer.biases]):
                pairs = zip(layer.weights, layer.biases, strict=True)
                bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
        held = [None if row is None else row.reshape(-1) for row in rows]
        return Layers(h, weight, bias, *held, *[None] * (2 - len(held)))

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


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(len(x), -1)


def _dtype_of(parameters: Any) -> torch.dtype:
    first = parameters if isinstance(parameters, Tensor) else parameters[0]
    return first.dtype


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
    if type(value) is LastLayer:
        return "the output of a FusedHead"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _hint(likelihood: Any) -> str:
    """Where a family over z is given for the likelihood of its name."""
    kind = likelihood if isinstance(likelihood, type) else type(likelihood)
    if not kind.__module__.startswith("fastvae.distributions."):
        return ""
    named = [c.__name__ for c in map(type, SHARED.values()) if c.__name__ == kind.__name__]
    also = f"; the likelihood of this name is fastvae.likelihoods.{named[0]}" if named else ""
    return f", fastvae.{kind.__name__}: a distribution over z{also}"


def as_likelihood(likelihood: Any, shared: bool = False) -> Likelihood:
    """A name or a likelihood object; of a name a module of its own, or ``shared`` with others."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if shared and type(likelihood) is str and likelihood in SHARED:
        return SHARED[likelihood]
    known = ", ".join(map(repr, sorted(NAMED)))
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood must be a name ({known}) or an object such as fastvae.Gaussian(scale=0.1); got "
            f"{likelihood!r}{_hint(likelihood)}"
        )
    if likelihood not in NAMED:
        raise ValueError(
            f"likelihood={likelihood!r} is unknown; known: {known}{did_you_mean(likelihood, NAMED)}"
        )
    return NAMED[likelihood]()
