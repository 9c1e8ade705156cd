"""The likelihoods p(x|z): base classes, and how they read a decoder's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..core.checks import (
    as_int64,
    check_data,
    check_result,
    check_same_device,
    check_tensor,
    on_same_device,
    shape_of,
)
from ..core.deferred import LastLayer, check_unchanged, multiply_out
from ..core.fast_path import are_outputs
from ..core.hints import described, did_you_mean, explained, teaches_by
from ..core.nested import Conditioning, each, repeat, tensors
from ..ops.head import Layers, linear_rows, pays
from ..ops.likelihood import check_support
from ..ops.op import accumulator


class Likelihood(nn.Module):
    """Base class of likelihoods p(x|z).

    Subclass it for your own; it is a module, so its parameters are registered with the model's.

    A subclass needs :meth:`log_prob`, in plain PyTorch; :func:`fastvae.likelihoods.from_distribution` builds
    one from a ``torch.distributions`` constructor. Every objective accepts it, also when it runs in chunks.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.likelihoods.Likelihood):
        ...     def log_prob(self, x, location):
        ...         return -(x - location).abs() - torch.log(torch.tensor(2.0))
        >>> x, q = torch.ones(4, 7), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(x, q, torch.nn.Linear(3, 7), k=5, likelihood=Laplace()).shape
        torch.Size([])

    Attributes:
        takes_integers: x may be an integer tensor; otherwise integers raise.
        takes_size: the mean accepts a factor for each example, ``size_factor=``.
        differentiable: x may have a gradient.
        inside: a valid value of an element of x; it replaces the elements that a ``mask`` leaves out.
        reads: the meaning of the decoder's first output, for warnings about decoders that return another:
            ``"logits"``, ``"class logits"`` along axis 1, ``"event logits"`` or ``"log rates"``.
        option: the constructor argument with which the decoder returns probabilities or rates instead.
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
        """Return log p(x|z), a floating-point tensor [N, *event].

        It may be summed over the event or over its last axes; any other shape raises.

        Args:
            x: data [N, *event].
            parameters: the decoder's output for N rows of z.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log_prob(x, parameters)")

    def mean(self, parameters: Any) -> Any:
        """Return the mean of x given the decoder's output, for reconstructions and pictures."""
        raise NotImplementedError(f"{type(self).__name__} has no mean(parameters)")

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Any:
        """Draw x given the decoder's output."""
        raise NotImplementedError(f"{type(self).__name__} has no sample(parameters, generator=...)")

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("fastvae."):
            teaches_by(cls)

    # The interface that the objectives call.

    def check(self, x: Any, name: str = "x") -> None:
        """Validate the kind of the data."""
        if not isinstance(x, Mapping):
            check_data(x, self, name)
            return
        for key, part in x.items():
            check_data(part, self, f"{name}[{key!r}]")

    def log_likelihood(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] of a batch x and the decoder's output for K·B rows of z, sample-major."""
        mask, size_factor, _ = conditioning or _NOTHING
        if size_factor is not None:
            raise self.no_size()
        batch = tensors(x)[0].shape[0]
        x = each(as_int64, x)  # PyTorch's arithmetic overflows in small integer dtypes
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

    def read_output(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Any:
        """Return the decoder's output for K·B rows of z as :meth:`fused` and :meth:`log_likelihood` take it.

        A last layer stays unmultiplied if a fused op takes it, and is multiplied out otherwise.
        """
        return self.multiplied_out(parameters, x)

    def multiplied_out(self, parameters: Any, x: Any = None) -> Any:
        """Return the decoder's output with each unmultiplied last layer multiplied out."""
        if type(parameters) is LastLayer:
            outputs = multiply_out(parameters, self._event(parameters, x))
            return outputs[0] if len(outputs) == 1 else outputs
        if type(parameters) in (tuple, list) and any([type(p) is LastLayer for p in parameters]):
            return type(parameters)([self.multiplied_out(p, x) for p in parameters])
        if type(parameters) is dict and any([type(p) is LastLayer for p in parameters.values()]):
            return {name: self.multiplied_out(p, x) for name, p in parameters.items()}
        return parameters

    def _event(self, layer: LastLayer, x: Any) -> tuple[int, ...] | None:
        """Return the event shape of the layer's output; None: the shape of the layer itself."""
        return layer.event

    def fused(
        self, x: Any, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the arguments of the fused op, or None if there is no such op."""
        return None

    def all_outputs(self, x: Tensor, parameters: Any) -> tuple[str, tuple[Any, ...]] | None:
        """Return the op's name and all its arguments but x, or None if there is no op.

        The decoder's output belongs to latents that are independent of x (all pairs are evaluated).
        """
        return None

    def no_size(self) -> TypeError:
        known = ", ".join(kind.__name__ for kind in DECLARED.values() if kind.takes_size)
        return TypeError(
            f"size_factor multiplies the mean of counts, which a {type(self).__name__} likelihood does not "
            f"have; those that do: {known}. For others give it as context= and use it in the decoder"
        )

    def _check_log_prob(self, value: Any, x: Any, rows: int, mask: Any) -> None:
        """Validate that log_prob returned an entry per row, perhaps summed over last axes of the event.

        With a mask there must be one entry per element.
        """
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


_NOTHING = Conditioning()


def summed(value: Tensor, samples: int, batch: int) -> Tensor:
    """Sum elementwise log p of K·B rows over the event: [K, B], also for an empty batch."""
    return value.reshape(samples, batch, value.numel() // max(1, samples * batch)).sum(2)


def observed(x: Any, mask: Any, likelihood: Likelihood) -> Any:
    """Return x with its unobserved elements replaced by the likelihood's ``inside``."""
    if mask is None:
        return x
    if isinstance(x, Mapping):
        raise TypeError(
            f"mask is given with an x of several parts, whose elements {type(likelihood).__name__} does not "
            "tell apart; use fastvae.likelihoods.Joint, which takes a mask of each"
        )
    inside = float(likelihood.inside)
    if not (x.is_floating_point() or inside.is_integer()):
        x = x.to(torch.get_default_dtype())
    return torch.where(mask, x, torch.full((), inside, dtype=x.dtype, device=x.device))


# Arguments of fastvae.ops.reduce: the likelihood's name, x [B, X], and parameters, the first [K·B, X]; or
# those of fastvae.ops.head.
Fused = tuple[str, Tensor, tuple[Tensor, ...]] | tuple[str, Tensor, Layers]

DECLARED: dict[str, type[Declared]] = {}
# Likelihoods by the name that ``likelihood=`` accepts.
NAMED: dict[str, type[Likelihood]] = {}
# Shared instances for calls by name: creating a module costs more than the kernels of a small batch.
SHARED: dict[str, Declared] = {}


class Declared(Likelihood):
    """Likelihood with fused ops, declared by a subclass that has a ``name``.

    :class:`fastvae.ops.likelihood.Declaration` lists the fields to declare; ``mean_of`` and ``draw`` compute
    the mean and a draw of x from all outputs. The C++ and Triton implementations are
    ``csrc/likelihoods/<name>.hpp`` and ``kernels/likelihoods/<name>.py``; the rest is derived from these.

    Attributes:
        converts: the decoder returns probabilities or rates instead of the declared outputs.
        constants: the last outputs, which are constants of the likelihood and never come from a decoder.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]] = ()
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    hint: ClassVar[str] = ""

    value: ClassVar[Callable[..., Tensor]]
    gradient: ClassVar[Callable[..., tuple[Tensor | None, ...]]]
    data: ClassVar[Callable[..., Tensor] | None] = None
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
        parameters = self._natural(self.multiplied_out(parameters, x))
        return self._elements(x, parameters, 1, None)[0]

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] for the decoder's output for K·B rows of z, sample-major."""
        if type(parameters) is Layers:
            return linear_rows(self.name, _flat(x), parameters)
        if not self.is_declared:
            of_rows = [
                p for p in self._given(x) if isinstance(p, Tensor) and p.dim() == x.dim() and len(p) > 1
            ]
            if not of_rows or samples == 1:
                return super().log_likelihood(x, parameters, samples, conditioning)
            # The likelihood's own parameters [B, ...] fit one batch, not K·B rows: evaluate sample by sample.
            parts = parameters if isinstance(parameters, (tuple, list)) else (parameters,)
            drawn = [p[0] if len(p) == 1 else p for p in zip(*(p.chunk(samples) for p in parts), strict=True)]
            return torch.cat([super(Declared, self).log_likelihood(x, p, 1, conditioning) for p in drawn])
        mask, size_factor, _ = conditioning or _NOTHING
        parameters = self._natural(parameters)
        if mask is not None:
            each = self._elements(observed(x, mask, self), parameters, samples, size_factor)
            return summed(torch.where(mask, each, 0.0), samples, len(x))
        given = self._given(x)
        returned = self._sized(self._read(x, parameters, samples, given), samples, size_factor)
        spread = [p.reshape(samples, *x.shape) for p in returned]
        return self._op(x, *self._arranged(spread, given))

    def _elements(self, x: Tensor, parameters: Any, samples: int, size_factor: Tensor | None) -> Tensor:
        """Return log p of each element [K, B, *event] by calling the op on rows of one element."""
        given = self._given(x)
        returned = self._sized(self._read(x, parameters, samples, given), samples, size_factor)
        one_each = [p.reshape(samples, -1, 1) for p in returned]
        own = [p.expand(x.shape).reshape(-1, 1) if isinstance(p, Tensor) else p for p in given]
        return self._op(x.reshape(-1, 1), *self._arranged(one_each, own)).reshape(samples, *x.shape)

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
        return type(self).mean_of(*self._complete(parameters)).to(_dtype_of(parameters))

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x [N, *event], in the dtype of the first output.

        Counts are float32 (float64 for float64 outputs), since half precision represents few integers.
        """
        drawn = type(self).draw(*self._complete(parameters), generator=generator)
        return drawn if self.takes_size else drawn.to(_dtype_of(parameters))

    def _complete(self, parameters: Any) -> list[Tensor]:
        """Return all outputs, including the likelihood's own, each expanded to [N, *event]."""
        parameters = self._natural(self.multiplied_out(parameters))
        first = parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters
        if not isinstance(first, Tensor):
            raise self._wrong_output(parameters)
        given = self._given(first)
        every = self._arranged(self._read(first, parameters, 1, given), given)
        dtype = accumulator(first.dtype)
        return [torch.as_tensor(p, dtype=dtype, device=first.device).expand(first.shape) for p in every]

    def fused(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the validated arguments of the fused op, or None if they do not fit it."""
        if not self.is_declared or (conditioning is not None and conditioning.mask is not None):
            return None
        if type(parameters) is Layers:
            return self.name, _flat(x), parameters
        given = self._given(x)
        parameters = self._natural(parameters)
        returned = parameters if type(parameters) is tuple else (parameters,)
        if len(returned) + len(given) == len(self.outputs) and are_outputs(x, samples, returned):
            if not given:
                if self._bounded:
                    check_support(type(self), x)
                if conditioning is not None:
                    returned = self._sized(returned, samples, conditioning.size_factor)
                return self.name, x, returned
        else:
            returned = self._read(x, parameters, samples, given)
        if not x.numel():
            return None
        rows = [_of_the_event(p, returned[0], x) for p in given]
        if any([row is None for row in rows]):
            return None
        if conditioning is not None:
            returned = self._sized(returned, samples, conditioning.size_factor)
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
        """Convert the decoder's output to the declared outputs."""
        return parameters

    def read_output(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Any:
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
        count, size = len(self.outputs) - len(given), x.shape[1:].numel()
        # The fused op takes products for the first outputs only.
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
        own = [None if row is None else row.reshape(-1) for row in rows]
        return Layers(h, weight, bias, *own, *[None] * (2 - len(own)))

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
    return x if x.dim() == 2 else x.reshape(len(x), -1)


def _dtype_of(parameters: Any) -> torch.dtype:
    first = parameters if isinstance(parameters, Tensor) else parameters[0]
    return first.dtype


def _of_the_event(parameter: float | Tensor, first: Tensor, x: Tensor) -> Tensor | None:
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
    """Explain the mistake if a distribution over z was passed in place of a likelihood."""
    kind = likelihood if isinstance(likelihood, type) else type(likelihood)
    if not kind.__module__.startswith("fastvae.distributions."):
        return ""
    named = [c.__name__ for c in map(type, SHARED.values()) if c.__name__ == kind.__name__]
    also = f"; the likelihood of this name is fastvae.likelihoods.{named[0]}" if named else ""
    return f", fastvae.distributions.{kind.__name__}: a distribution over z{also}"


def as_likelihood(likelihood: Any, shared: bool = False) -> Likelihood:
    """Return the likelihood for a name, or the given likelihood object itself.

    Args:
        likelihood: a name or a :class:`Likelihood`.
        shared: return the shared instance of a name instead of a new module.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if shared and type(likelihood) is str and likelihood in SHARED:
        return SHARED[likelihood]
    known = ", ".join(map(repr, sorted(NAMED)))
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood must be a name ({known}) or an object such as "
            "fastvae.likelihoods.Gaussian(scale=0.1); got "
            f"{likelihood!r}{_hint(likelihood)}"
        )
    if likelihood not in NAMED:
        raise ValueError(
            f"likelihood={likelihood!r} is unknown; known: {known}{did_you_mean(likelihood, NAMED)}"
        )
    return NAMED[likelihood]()
