"""Hidden layers of a decoder and their gradients in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.deferred import HiddenLayer, activate

_aten = torch.ops.aten
# By name: the argument's gradient, from that of the value g, the argument a, the value y and the parameter.
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "identity": lambda g, a, y: g,
    "relu": lambda g, a, y: _aten.threshold_backward(g, a, 0),
    "tanh": lambda g, a, y: _aten.tanh_backward(g, y),
    "sigmoid": lambda g, a, y: _aten.sigmoid_backward(g, y),
    "silu": lambda g, a, y: _aten.silu_backward(g, a),
    "gelu": lambda g, a, y: _aten.gelu_backward(g, a),
    "gelu_tanh": lambda g, a, y: _aten.gelu_backward(g, a, approximate="tanh"),
    "elu": lambda g, a, y, p: _aten.elu_backward(g, p, 1, 1, False, a),
    "leaky_relu": lambda g, a, y, p: _aten.leaky_relu_backward(g, a, p, False),
    "softplus": lambda g, a, y: _aten.softplus_backward(g, a, 1, 20),
}


def forward(h: Tensor, layers: Sequence[HiddenLayer]) -> Tensor:
    """Return the last layer's value [N, W] for the first one's input h [N, V]."""
    for weight, bias, activation in layers:
        h = activate(activation, linear(h, weight, bias))
    return h


def backward(grad: Tensor, h: Tensor, layers: Sequence[HiddenLayer]) -> list[Tensor]:
    """Return the gradients of h and of each layer's weight and bias, given that of the last value."""
    inputs, arguments = [h], []
    for weight, bias, activation in layers:
        arguments.append(linear(inputs[-1], weight, bias))
        inputs.append(activate(activation, arguments[-1]))
    found: list[Tensor] = []
    for i in reversed(range(len(layers))):
        name, _, parameter = layers[i].activation.partition(":")
        given = [float(parameter)] if parameter else []
        grad = _BACKWARD[name](grad, arguments[i], inputs[i + 1], *given)
        found = [grad.mT @ inputs[i], grad.sum(0), *found]
        grad = grad @ layers[i].weight
    return [grad, *found]
