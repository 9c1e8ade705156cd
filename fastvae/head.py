"""A decoder's last linear layer, not multiplied out: what it returns then, and the ways to ask for it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["FusedHead", "LinearOutput", "fuse_head"]


class LinearOutput:
    r"""The output of a linear layer, [N, \*event], that is not computed unless something asks for its
    numbers.

    .. math:: a_n = W h_n + c

    The objectives take it in place of a decoder's output, and then never store it. It can be reshaped and
    cut along axis 1, as decoders do at their end; whatever else is done with it is done with the ordinary
    tensor, which is computed then (:meth:`tensor`).

    Args:
        h: what comes into the layer, [N, H].
        weight: [X, H].
        bias: [X], or None.

    Raises:
        ValueError: if h and weight do not fit.

    Example:
        >>> import torch, fastvae
        >>> layer = torch.nn.Linear(3, 2 * 7)
        >>> def decoder(z):
        ...     return fastvae.LinearOutput(z, layer.weight, layer.bias).chunk(2, dim=1)  # mean, logvar
        >>> fastvae.elbo(torch.ones(4, 7), torch.zeros(4, 2 * 3), decoder).shape
        torch.Size([])
    """

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None = None):
        if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
            raise ValueError(
                f"h has shape {list(h.shape)} and weight {list(weight.shape)}; expected [N, H] and [X, H]"
            )
        # As the layer would have computed here, wherever it is computed.
        kind = h.device.type
        if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            h, weight, bias = h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        self._grad = torch.is_grad_enabled()
        if not self._grad:
            h, weight, bias = _detached(h), _detached(weight), None if bias is None else _detached(bias)
        self.h, self.weight, self.bias = h, weight, bias
        self._tensor: Tensor | None = None
        self._start, self._event = 0, torch.Size(weight.shape[:1])
        self._version = _version(self.h)

    def tensor(self) -> Tensor:
        """The output itself, computed once."""
        if self._tensor is None:
            self.check_unchanged()
            with torch.autocast(self.device.type, enabled=False), torch.set_grad_enabled(self._grad):
                self._tensor = linear(self.h, *self.layer()).reshape(self.shape)
        return self._tensor

    def check_unchanged(self) -> None:
        """Refuse an h that was changed in place after the layer."""
        if _version(self.h) != self._version:
            raise RuntimeError(
                "what came into the decoder's last layer was changed in place after the layer was called, so "
                "its output cannot be computed later. Change it out of place (such as nn.ReLU() for "
                "nn.ReLU(inplace=True)), or do not fuse: VAE(..., fuse=False), or the decoder without "
                "fuse_head"
            )

    def layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight [X, H] and bias [X] of this part of the layer."""
        stop = self._start + self._event.numel()
        if stop - self._start == self.weight.shape[0]:
            return self.weight, self.bias
        part = slice(self._start, stop)
        return self.weight[part], None if self.bias is None else self.bias[part]

    def through(self, last: LinearOutput) -> LinearOutput:
        """This part and those that follow, to the last one, flat."""
        return self._part(self._start, (last._start + last._event.numel() - self._start,))

    def follows(self, other: LinearOutput) -> bool:
        """Whether it is the part of the same layer that comes next."""
        same = self.h is other.h and self.weight is other.weight and self.bias is other.bias
        return same and self._start == other._start + other._event.numel()

    # What is known without the numbers.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.h.shape[0], *self._event))

    @property
    def dtype(self) -> torch.dtype:
        return self.h.dtype

    @property
    def device(self) -> torch.device:
        return self.h.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self.h.requires_grad or self.weight.requires_grad

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.h.shape[0]

    def __repr__(self) -> str:
        return f"LinearOutput(shape={list(self.shape)}, of h {list(self.h.shape)})"

    # What decoders do at their end.

    def reshape(self, *shape: Any) -> Any:
        """Of another event shape; if N changes, the ordinary tensor."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        total = self.shape.numel()
        if sizes.count(-1) == 1:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = total // known if known else -1
        rows = self.h.shape[0]
        if not sizes or sizes[0] != rows or math.prod(sizes) != total:
            return self.tensor().reshape(*shape)
        return self._part(self._start, sizes[1:])

    def view(self, *shape: Any) -> Any:
        return self.tensor().view(*shape) if isinstance(shape[0], torch.dtype) else self.reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        first, last = start_dim % self.ndim, end_dim % self.ndim
        if first == 0 and last > 0:
            return self.tensor().flatten(start_dim, end_dim)
        sizes = list(self.shape)
        return self.reshape(*sizes[:first], math.prod(sizes[first : last + 1]), *sizes[last + 1 :])

    def unflatten(self, dim: int, sizes: Any) -> Any:
        axis = dim % self.ndim
        if axis == 0:
            return self.tensor().unflatten(dim, sizes)
        sizes = list(sizes)
        if -1 in sizes:
            sizes[sizes.index(-1)] = self.shape[axis] // max(1, -math.prod(sizes))
        return self.reshape(*self.shape[:axis], *sizes, *self.shape[axis + 1 :])

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def split(self, split_size: Any, dim: int = 0) -> Any:
        if dim % self.ndim != 1:
            return self.tensor().split(split_size, dim)
        length = self.shape[1]
        if isinstance(split_size, int):
            split_size = [min(split_size, length - i) for i in range(0, length, max(1, split_size))]
        if sum(split_size) != length:
            return self.tensor().split(split_size, dim)
        parts, at = [], 0
        for size in split_size:
            parts.append(self._cut(at, at + size))
            at += size
        return tuple(parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2:
            rows, columns = index
            whole = rows is Ellipsis and self.ndim == 2 or rows == slice(None)
            if whole and isinstance(columns, slice) and columns.step in (None, 1):
                start, stop, _ = columns.indices(self.shape[1])
                return self._cut(start, max(start, stop))
        return self.tensor()[index]

    def _cut(self, start: int, stop: int) -> LinearOutput:
        rest = self._event[1:].numel()
        return self._part(self._start + start * rest, (stop - start, *self._event[1:]))

    def _part(self, start: int, event: Any) -> LinearOutput:
        part = object.__new__(LinearOutput)
        part.h, part.weight, part.bias = self.h, self.weight, self.bias
        part._grad, part._version, part._tensor = self._grad, self._version, None
        part._start, part._event = start, torch.Size(event)
        return part

    # Everything else is done with the tensor.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = getattr(cls, _OWN.get(function, ""), None)
        if own is not None and isinstance(args[0], cls):
            return own(*args, **kwargs)
        return function(*made(args), **made(kwargs))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _version(tensor: Tensor) -> int:
    """How often it was changed in place, where that is counted."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


_OWN = {
    getattr(where, name): name
    for where in (torch, Tensor)
    for name in ("reshape", "flatten", "unflatten", "chunk", "split")
}


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LinearOutput, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*made(others))

    apply.__name__ = name
    return apply


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs lt le gt ge iter bool float"
)
for _name in _OPERATORS.split():  # noqa: SIM905
    setattr(LinearOutput, f"__{_name}__", _operator(f"__{_name}__"))


def made(value: Any) -> Any:
    """With tensors in place of outputs that are not computed yet."""
    if isinstance(value, LinearOutput):
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(map(made, value))
    if isinstance(value, Mapping):
        return {name: made(part) for name, part in value.items()}
    return value


def is_lazy(value: Any) -> bool:
    """Whether a decoder returned an output that is not computed yet."""
    if isinstance(value, (tuple, list)):
        return any([is_lazy(part) for part in value])
    if isinstance(value, Mapping):
        return any([is_lazy(part) for part in value.values()])
    return isinstance(value, LinearOutput)


def _lazily(layer: nn.Linear, h: Any) -> Any:
    """A layer's forward."""
    if isinstance(h, LinearOutput):
        h = h.tensor()
    plain = type(h) is Tensor and h.dim() == 2 and h.shape[1] == layer.in_features
    if plain and (h.dtype == layer.weight.dtype or torch.is_autocast_enabled(h.device.type)):
        return LinearOutput(h, layer.weight, layer.bias)
    return linear(h, layer.weight, layer.bias)


@contextlib.contextmanager
def _lazy_layers(decoder: nn.Module) -> Iterator[None]:
    """Linear layers return what is not computed yet; those whose output goes on into the network compute it
    there. A thread that finds them ordinary gets the same numbers.
    """
    layers = [m for m in decoder.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    for layer in layers:
        layer.__dict__["forward"] = functools.partial(_lazily, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class FusedHead(nn.Module):
    """A decoder whose last linear layers are not multiplied out; see :func:`fuse_head`.

    It is the decoder in all but its output: parameters, buffers, submodules and the keys of ``state_dict``
    are the same.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        # Unregistered, or each parameter would have two names.
        self.__dict__["decoder"] = decoder
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = decoder.__dict__[name]
        self.training = decoder.training

    def forward(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return _by_structure(self.__dict__["decoder"], args)
        decoder = self.__dict__["decoder"]
        with _lazy_layers(decoder):
            return decoder(*args)

    def train(self, mode: bool = True) -> FusedHead:
        self.__dict__["decoder"].train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"of {type(self.__dict__['decoder']).__name__}"


def _by_structure(decoder: nn.Module, args: tuple[Any, ...]) -> Any:
    """The decoder's output, lazy where its structure tells the last layer: a compiler follows no layer whose
    forward is exchanged.
    """
    if _has_hooks(decoder):
        return decoder(*args)
    if type(decoder) is nn.Linear:
        return _lazily(decoder, *args)
    if type(decoder) is nn.Sequential and len(args) == 1:
        layers = list(decoder)
        end = _end_of(layers)
        if end is not None:
            (value,) = args
            for layer in layers[:end]:
                value = layer(value)
            value = _by_structure(layers[end], (value,))
            for layer in layers[end + 1 :]:
                value = _reshaped(layer, value)
            return value
    return decoder(*args)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _end_of(layers: list[nn.Module]) -> int | None:
    """Where the last layer is that does more than give its output a shape, if it can be left to the end."""
    for i in range(len(layers) - 1, -1, -1):
        if type(layers[i]) not in _SHAPES:
            return i if type(layers[i]) in (nn.Linear, nn.Sequential) else None
    return None


_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)


def _reshaped(layer: nn.Module, value: Any) -> Any:
    if not isinstance(value, LinearOutput):
        return layer(value)
    if isinstance(layer, nn.Flatten):
        return value.flatten(layer.start_dim, layer.end_dim)
    return value.unflatten(layer.dim, layer.unflattened_size) if isinstance(layer, nn.Unflatten) else value


def fuse_head(decoder: nn.Module) -> FusedHead:
    r"""The same decoder, whose last linear layer is left to the objective, which never stores its output.

    For K·B samples of a large event this output is the largest tensor of a training step. Value and gradients
    are those of the decoder itself, to rounding. Anything may come before the last layer; after it views,
    and cutting it in parts along axis 1 (mean and logvar of one layer); or there are several last layers, of
    the same input. Where something else comes after it, or the likelihood has no such op, the output is
    computed as always. Under torch.compile the last layer must be seen: decoder is an ``nn.Linear`` or an
    ``nn.Sequential`` that ends in one (and ``nn.Unflatten``, ``nn.Flatten``), else it is computed as always.

    Args:
        decoder: a module z [N, D] -> parameters. It is used, not copied: what trains one trains the other.

    Returns:
        A module with the decoder's parameters under the decoder's names.

    Raises:
        TypeError: if decoder is no module, has no linear layer, or is an ``nn.Sequential`` that ends in
            something else.

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    Example:
        >>> import torch, fastvae
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> x, q = torch.rand(32, 8).round(), torch.zeros(32, 2 * 2)
        >>> bound = fastvae.iwae(x, q, fastvae.fuse_head(decoder), k=50, likelihood="bernoulli")
        >>> (-bound).backward()
        >>> decoder[2].weight.grad.shape
        torch.Size([8, 16])
    """
    if isinstance(decoder, FusedHead):
        return decoder
    if not isinstance(decoder, nn.Module):
        raise TypeError(
            f"decoder must be an nn.Module, whose layers are known; got {type(decoder).__name__}. A function "
            "can return fastvae.LinearOutput(h, layer.weight, layer.bias) in place of layer(h)"
        )
    reason = _why_not(decoder)
    if reason:
        raise TypeError(f"fuse_head cannot fuse this {type(decoder).__name__}: {reason}")
    return FusedHead(decoder)


def _why_not(decoder: nn.Module) -> str | None:
    """One sentence, if its structure tells."""
    if type(decoder) is nn.Sequential:
        rest = [layer for layer in decoder if type(layer) not in _SHAPES]
        last = rest[-1] if rest else decoder
        if isinstance(last, nn.modules.conv._ConvNd):
            return (
                f"it ends in {type(last).__name__}, whose input is as large as its output, so that nothing "
                "would be saved"
            )
        if type(last).__module__.startswith("torch.nn") and type(last) not in (nn.Linear, nn.Sequential):
            return (
                f"it ends in {type(last).__name__}, which needs the output of the layer before; let the "
                "decoder return that layer's output (likelihoods take logits and logarithms)"
            )
        if type(last) is nn.Sequential and last is not decoder:
            return _why_not(last)
    if not any(type(m) is nn.Linear for m in decoder.modules()):
        return "it has no nn.Linear to end in"
    return None
