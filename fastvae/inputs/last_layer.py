"""Fusion of the decoder's last linear layers into the objective, automatic or requested by the user."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..core import fast_path
from ..core.checks import FLOATING, shape_of
from ..core.deferred import PLAIN, LastLayer, deferred_layer, is_allocated
from ..core.torch_private import (
    has_hooks,
    is_torchs,
    runs_torchs_call,
    torch_function_depth,
)

__all__ = ["FusedHead", "LastLayer"]


# Automatic fusion, where the structure proves it safe


def run_to_last_layer(decoder: nn.Module, *args: Any) -> Any:
    """Call a decoder, and defer its last layer where this is unobservable.

    The decoder must be exactly an ``nn.Linear``, or an ``nn.Sequential`` that ends in one. Other modules are
    called as usual. The last layer is also called if a call of it or of the containers has side effects (a
    hook, a replaced method, a mode, a sharded weight).
    """
    if len(args) != 1 or not _is_forward_alone(decoder):
        return decoder(*args)
    (value,) = args
    if type(decoder) is nn.Sequential:
        last = len(decoder) - 1
        for i, module in enumerate(decoder):
            if i == last:
                return run_to_last_layer(module, value)
            value = module(value)
        return value
    layer: Any = decoder
    if not _is_product_alone(value, layer.weight, layer.bias):
        return layer(value)
    return deferred_layer(value, (layer.weight,), (layer.bias,), tuple(layer.weight.shape[:1]))


def may_end_in_a_layer(decoder: Any) -> bool:
    """Return True if :func:`run_to_last_layer` may defer the decoder's last layer."""
    return type(decoder) in (nn.Linear, nn.Sequential)


def called_by(function: Any) -> Any:
    """Return the module of a :func:`run_to_last_layer` partial, a method's owner, or the function itself."""
    if type(function) is functools.partial and function.func is run_to_last_layer:
        return function.args[0]
    return function.__self__ if type(function) is MethodType else function


def _is_forward_alone(module: nn.Module) -> bool:
    """Return True for an ``nn.Linear`` or ``nn.Sequential`` whose call runs only torch's own forward."""
    kind = type(module)
    if kind is not nn.Linear and kind is not nn.Sequential:
        return False
    return not has_hooks(module) and runs_torchs_call(module) and is_torchs(kind)


def _is_product_alone(h: Any, weight: Any, bias: Any) -> bool:
    """Return True if ``functional.linear`` of these is a plain matrix product of compatible tensors."""
    tensors = (h, weight) if bias is None else (h, weight, bias)
    if not all([type(t) in PLAIN for t in tensors]):
        return False
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    for t in tensors:
        if t.dtype != h.dtype or t.dtype not in FLOATING or t.layout != torch.strided or t.device != h.device:
            return False
    if torch.is_autocast_enabled(h.device.type) or torch_function_depth():
        return False
    return torch.compiler.is_compiling() or (
        bool(fast_path.plain(tensors) & fast_path.PLACES) and all([is_allocated(t) for t in tensors])
    )


# Fusion on the user's request


class FusedHead(nn.Module):
    r"""Decoder whose last linear layers are fused into the objective, so that their outputs are never stored.

    It returns not a tensor but a record of the layers and their input, which every objective, evaluation
    and likelihood accepts in place of the parameters: values and gradients equal those of the layers'
    outputs, to rounding. For K·B samples of a large event these outputs are the largest tensors of a training
    step. Where the likelihood has no fused op, and with ``mask=`` or ``size_factor=``, they are computed as
    usual. On a GPU the sum or mean of a batch's bounds takes three products, as with outputs that are stored;
    other reductions take four.

    Args:
        body: module z [N, D] -> h [N, H], which is called.
        layers: one or more ``nn.Linear`` with H inputs, which are not called. Their outputs, in order, are
            the likelihood's parameters; one layer may have several parameters, concatenated, as in
            ``layer(h).chunk(2, dim=1)``.
        event: shape of each parameter's row, such as (1, 28, 28). Default: that of an example of x, and
            flat without x, as for samples of the model.

    Raises:
        TypeError, ValueError: for a body that is not a module or does not return h, for layers that are not
            ``nn.Linear`` or are incompatible; in a call, for a layer with hooks, which would not run.

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    Example:
        >>> import torch, fastvae
        >>> body = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU())
        >>> decoder = fastvae.FusedHead(body, torch.nn.Linear(16, 8), torch.nn.Linear(16, 8))  # mean, logvar
        >>> x, q = torch.rand(32, 8), torch.zeros(32, 2 * 2)
        >>> bound = fastvae.iwae(x, q, decoder, k=50, likelihood="gaussian")
        >>> (-bound).backward()
        >>> decoder.layers[0].weight.grad.shape
        torch.Size([8, 16])
    """

    event: tuple[int, ...] | None

    def __init__(self, body: nn.Module, *layers: nn.Linear, event: int | tuple[int, ...] | None = None):
        super().__init__()
        if not isinstance(body, nn.Module):
            raise TypeError(
                f"body must be an nn.Module z [N, D] -> h [N, H], got {type(body).__name__}; "
                "torch.nn.Identity() is one that returns z"
            )
        if not layers:
            raise TypeError(
                "FusedHead needs the last layers after the body, such as FusedHead(body, "
                "torch.nn.Linear(200, 784)); got none"
            )
        for i, layer in enumerate(layers):
            if (
                not isinstance(layer, nn.Linear)
                or type(layer).forward is not nn.Linear.forward
                or not runs_torchs_call(layer)
            ):
                raise TypeError(
                    f"layer {i} must be an nn.Linear with nn.Linear's own forward, it is not called; got "
                    f"{type(layer).__name__}. Make it a part of the body, or use no FusedHead"
                )
            if layer.in_features != layers[0].in_features:
                raise ValueError(
                    f"layer {i} has in_features={layer.in_features} and layer 0 {layers[0].in_features}; "
                    "expected layers of the same input"
                )
        self.body, self.layers = body, nn.ModuleList(layers)
        self.event = None if event is None else tuple(event) if isinstance(event, (tuple, list)) else (event,)
        if self.event is None:
            return
        if not all([type(n) is int and n > 0 for n in self.event]):
            raise ValueError(f"event must be a size or a tuple of sizes, such as (1, 28, 28); got {event!r}")
        size = torch.Size(self.event).numel()
        for i, layer in enumerate(layers):
            if layer.out_features % size:
                raise ValueError(
                    f"layer {i} has out_features={layer.out_features}; expected a multiple of {size}, the "
                    f"numbers of event={event!r}"
                )

    def forward(self, *args: Any) -> LastLayer:
        """Return the layers and their input, the body's output for z."""
        h = self.body(*args)
        layers: list[Any] = list(self.layers)
        for i, layer in enumerate(layers):
            self._check(i, layer, h)
        keep = _attached if torch.is_grad_enabled() else torch.Tensor.detach
        kind = h.device.type
        if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
            # Cast as autocast would for the layers.
            dtype = torch.get_autocast_dtype(kind)
            weights = tuple([keep(layer.weight).to(dtype) for layer in layers])
            biases = tuple([None if layer.bias is None else keep(layer.bias).to(dtype) for layer in layers])
            return deferred_layer(keep(h).to(dtype), weights, biases, self.event)
        for t in (t for layer in layers for t in (layer.weight, layer.bias) if t is not None):
            if t.dtype != h.dtype:
                raise TypeError(f"h has dtype {h.dtype} and a last layer {t.dtype}; cast one of them")
        weights = tuple([keep(layer.weight) for layer in layers])
        biases = tuple([None if layer.bias is None else keep(layer.bias) for layer in layers])
        return deferred_layer(keep(h), weights, biases, self.event)

    def extra_repr(self) -> str:
        return "" if self.event is None else f"event={self.event}"

    @staticmethod
    def _check(i: int, layer: Any, h: Any) -> None:
        """Reject a layer whose call is more than its product, and an incompatible input."""
        hooks = has_hooks(layer)
        if hooks or _is_replaced(layer):
            what = "hooks" if hooks else f"a forward of its own ({type(layer).__name__})"
            raise TypeError(
                f"layer {i} of FusedHead has {what}, but it is not called; use "
                "torch.nn.utils.parametrizations for weight_norm and spectral_norm and "
                "torch.nn.utils.prune.remove after pruning, or the decoder without FusedHead"
            )
        if not isinstance(h, Tensor) or h.dim() != 2 or h.shape[1] != layer.in_features:
            came = shape_of(h) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"the body of FusedHead returned {came}; expected h [N, {layer.in_features}], the input of "
                f"layer {i}; torch.nn.Flatten() at its end makes a picture such"
            )
        if layer.bias is not None and layer.bias.shape != layer.weight.shape[:1]:
            raise ValueError(
                f"layer {i} of FusedHead has a bias {shape_of(layer.bias)}; expected [X] = "
                f"{list(layer.weight.shape[:1])}"
            )


def _attached(tensor: Tensor) -> Tensor:
    """Return a view, which a later ``tensor.data = ...`` does not affect."""
    return tensor.view_as(tensor)


def _is_replaced(layer: nn.Linear) -> bool:
    """Return True if a call of the layer runs another forward than ``nn.Linear``'s."""
    return type(layer).forward is not nn.Linear.forward or not runs_torchs_call(layer)
