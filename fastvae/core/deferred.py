"""Layers that are not computed yet: the record that stands for a decoder's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import shape_of
from .torch_private import (
    is_functorch_wrapped,
)

PLAIN = (Tensor, nn.Parameter)


class HiddenLayer(NamedTuple):
    """Deferred hidden layer: a linear map and an activation.

    Attributes:
        weight: [W, V].
        bias: [W], or None.
        activation: a name of ACTIVATIONS, with its parameter if it has one, such as ``"elu:1.0"``.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str


# By name: torch's function of the argument and the parameter.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda a: a,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda a: functional.gelu(a, approximate="tanh"),
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "softplus": functional.softplus,
}


def activate(activation: str, argument: Tensor) -> Tensor:
    """Compute an activation, given as in :class:`HiddenLayer`."""
    name, _, parameter = activation.partition(":")
    return ACTIVATIONS[name](argument, float(parameter)) if parameter else ACTIVATIONS[name](argument)


class LastLayer(NamedTuple):
    r"""Deferred linear layers of one input, which objectives and likelihoods read as a decoder's output.

    .. math:: a_n = W h_n + c

    Attributes:
        input: h, [N, H]; with hidden layers, the first one's input.
        weights: W of each layer, [X, H].
        biases: c of each layer, [X], or None.
        event: shape of an output's row; a layer with n times as many features has n outputs, concatenated.
            None: the shape of an example of x, or one flat output per layer if x is not known.
        versions: in-place version of each tensor at the time of the call.
        hidden: deferred layers before these, in their order.
        requested: True if the user requested it, to save memory; False where it is deferred to be faster.
    """

    input: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    event: tuple[int, ...] | None
    versions: tuple[int, ...]
    hidden: tuple[HiddenLayer, ...] = ()
    requested: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = [self.input, *self.weights, *self.biases]
        for layer in self.hidden:
            every += [layer.weight, layer.bias]
        return tuple([t for t in every if t is not None])


def deferred_layer(
    h: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    event: tuple[int, ...] | None,
    hidden: tuple[HiddenLayer, ...] = (),
    requested: bool = False,
) -> LastLayer:
    layer = LastLayer(h, weights, biases, event, (), hidden, requested)
    return layer._replace(versions=tuple([_version(t) for t in layer.tensors]))


def _version(tensor: Tensor) -> int:
    """Return a tensor's in-place version, or 0 where versions are not tracked."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def is_allocated(tensor: Tensor) -> bool:
    """Return True unless the tensor's storage has been freed, as sharding does."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN or not tensor.numel():
        return True
    if is_functorch_wrapped(tensor):  # by torch.func, whose tensors have no storage
        return True
    reach = tensor.storage_offset() + 1
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        reach += (n - 1) * stride
    return tensor.untyped_storage().nbytes() >= reach * tensor.itemsize


def check_unchanged(layer: LastLayer) -> None:
    """Validate that the record's tensors have not changed since the call.

    Raises:
        RuntimeError: if one was changed in place, or its storage was freed.
    """
    fix = "let the decoder call the layer itself instead of fastvae.FusedHead"
    of = "of the decoder's last layers" if layer.hidden else "of the decoder's last layer"
    for t, version in zip(layer.tensors, layer.versions, strict=True):
        name = "input" if t is layer.input else "weight or bias"
        if _version(t) > version:
            raise RuntimeError(
                f"the {name} {shape_of(t)} {of} was changed in place after the layer "
                f"was called, so its output cannot be computed any more; change it out of place, or {fix}"
            )
        if not is_allocated(t):
            raise RuntimeError(
                f"the {name} {shape_of(t)} {of} was freed after the call, as sharding "
                f"does; shard the module that holds the decoder and calls the objective, or {fix}"
            )


def multiply_out(layer: LastLayer, event: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    r"""Compute the outputs, each [N, \*event], or one flat output per layer without an event.

    Raises:
        ValueError: if a layer's features are not a multiple of the event's numbers.
    """
    check_unchanged(layer)
    outputs: list[Tensor] = []
    with torch.autocast(layer.input.device.type, enabled=False):  # the record has the dtypes of the call
        h = layer.input
        for weight, bias, activation in layer.hidden:
            h = activate(activation, functional.linear(h, weight, bias))
        products = [functional.linear(h, w, b) for w, b in zip(layer.weights, layer.biases, strict=True)]
    for product in products:
        if event is None:
            outputs.append(product)
            continue
        size = math.prod(event)
        features = product.shape[1]
        if features % size if size else features:
            raise ValueError(
                f"a last layer of FusedHead has {features} outputs; expected a multiple of {size}, the "
                f"numbers of an event {list(event)}"
            )
        parts = (product,) if features == size else product.split(size, 1)
        outputs += [
            part if part.shape[1:] == event else part.reshape(part.shape[0], *event) for part in parts
        ]
    return tuple(outputs)
