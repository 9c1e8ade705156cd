"""Fusion of the decoder's last linear layers into the objective, automatic or requested by the user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core import fast_path
from ..core.checks import FLOATING, shape_of
from ..core.deferred import PLAIN, HiddenLayer, LastLayer, deferred_layer, is_allocated
from ..core.torch_private import (
    forward_ad_is_active,
    functorch_is_active,
    has_hooks,
    is_torchs,
    runs_torchs_call,
    torch_function_depth,
)
from ..ops.head import MOST_HIDDEN, hidden_may_pay, hidden_pay

__all__ = ["FusedHead", "LastLayer"]


# Automatic fusion, where the structure proves it safe


def run_to_last_layer(decoder: nn.Module, *args: Any) -> Any:
    """Call a decoder, and defer its last layer, and hidden layers before it, where this is unobservable.

    The decoder must be exactly an ``nn.Linear``, or an ``nn.Sequential`` that ends in one. Other modules are
    called as usual. Layers are also called if a call of them or of the containers has side effects (a hook,
    a replaced method, a mode, a sharded weight).
    """
    if len(args) != 1 or not _is_forward_alone(decoder):
        return decoder(*args)
    modules = _opened(decoder)
    if not modules or type(modules[-1]) is not nn.Linear:
        return decoder(*args)
    value, rest = _run_to_hidden_layers(lambda: _opened(decoder)[:-1], args[0])
    # The modules before it may have changed it.
    layer: Any = _opened(decoder)[-1]
    if type(layer) is nn.Linear and _is_forward_alone(layer):
        weights, biases = (layer.weight,), (layer.bias,)
        hidden = _deferrable(value, rest, weights, biases)
        if not hidden:
            value, rest = _run(rest, value), ()
        # On a GPU the last layer alone is not faster.
        if hidden or (_are_products_alone(value, (), weights, biases) and value.is_cpu):
            return deferred_layer(value, weights, biases, tuple(layer.weight.shape[:1]), hidden)
    return layer(_run(rest, value))


def _run(modules: Sequence[nn.Module], value: Any) -> Any:
    for module in modules:
        value = module(value)
    return value


def _opened(module: nn.Module) -> list[nn.Module]:
    """Return the modules that a call runs one after the other: those of containers that do no more."""
    if type(module) is not nn.Sequential or not _is_forward_alone(module):
        return [module]
    return [inner for part in module for inner in _opened(part)]


def _run_to_hidden_layers(
    modules: Callable[[], Sequence[nn.Module]], value: Any
) -> tuple[Any, Sequence[nn.Module]]:
    """Call modules one after the other, up to hidden layers that may be deferred.

    Returns:
        The value so far, and the modules of the hidden layers, which are not called.
    """
    done = 0
    while True:
        # Read anew after each call, which may have changed the modules to come.
        rest = modules()[done:]
        first = len(rest)
        if not torch.compiler.is_compiling() and type(value) is Tensor and hidden_may_pay(value):
            first, _ = _hidden_layers(rest)
        if first == 0:
            return value, rest
        value = _run(rest[:first], value)
        done += first


def _deferrable(
    value: Any,
    modules: Sequence[nn.Module],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
) -> tuple[HiddenLayer, ...]:
    """Return the hidden layers of these modules, before layers with these weights; () if they must run."""
    _, hidden = _hidden_layers(modules)
    widths = [layer.weight.shape[0] for layer in hidden]
    if not hidden or not hidden_pay(value, widths):
        return ()
    return hidden if _are_products_alone(value, hidden, weights, biases) else ()


def _hidden_layers(modules: Sequence[nn.Module]) -> tuple[int, tuple[HiddenLayer, ...]]:
    """Return the index of the first hidden layer at the end of a sequence of modules, and the layers."""
    first, i = len(modules), len(modules) - 1
    found: list[HiddenLayer] = []
    while len(found) < MOST_HIDDEN:
        activation = "identity"
        while i >= 0 and type(modules[i]) is not nn.Linear:
            its = _activation(modules[i])
            if its is None or (its != "identity" and activation != "identity"):
                return first, tuple(found)
            activation = activation if its == "identity" else its
            i -= 1
        if i < 0 or not _is_forward_alone(modules[i]):
            break
        layer: Any = modules[i]
        found.insert(0, HiddenLayer(layer.weight, layer.bias, activation))
        first, i = i, i - 1
    return first, tuple(found)


def _elu(module: Any) -> str | None:
    return f"elu:{module.alpha!r}" if type(module.alpha) in (int, float) and module.alpha >= 0 else None


def _leaky_relu(module: Any) -> str | None:
    slope = module.negative_slope
    return f"leaky_relu:{slope!r}" if type(slope) in (int, float) and slope >= 0 else None


def _softplus(module: Any) -> str | None:
    return "softplus" if (module.beta, module.threshold) == (1, 20) else None


# By the module's type: the activation of an object, None if it is another, and what its forward calls.
_KNOWN: dict[type[nn.Module], tuple[Callable[[Any], str | None], Any, str]] = {
    nn.Identity: (lambda m: "identity", None, ""),
    nn.Dropout: (lambda m: None if m.training else "identity", None, ""),
    nn.ReLU: (lambda m: "relu", functional, "relu"),
    nn.Tanh: (lambda m: "tanh", torch, "tanh"),
    nn.Sigmoid: (lambda m: "sigmoid", torch, "sigmoid"),
    nn.SiLU: (lambda m: "silu", functional, "silu"),
    nn.GELU: (lambda m: {"none": "gelu", "tanh": "gelu_tanh"}.get(m.approximate), functional, "gelu"),
    nn.ELU: (_elu, functional, "elu"),
    nn.LeakyReLU: (_leaky_relu, functional, "leaky_relu"),
    nn.Softplus: (_softplus, functional, "softplus"),
}
_CALLED = {kind: getattr(owner, name) for kind, (_, owner, name) in _KNOWN.items() if owner is not None}


def _activation(module: nn.Module) -> str | None:
    """Return the activation that a call of the module computes and nothing else, or None."""
    kind = type(module)
    if kind not in _KNOWN or has_hooks(module) or not runs_torchs_call(module) or not is_torchs(kind):
        return None
    name_of, owner, name = _KNOWN[kind]
    if owner is not None and getattr(owner, name) is not _CALLED[kind]:
        return None
    return name_of(module)


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


def _are_products_alone(
    h: Any,
    hidden: Sequence[HiddenLayer],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> bool:
    """Return True if ``functional.linear`` of each layer in turn is a plain product of compatible tensors."""
    every = [h, *weights, *biases]
    for layer in hidden:
        every += layer[:2]
    tensors = [t for t in every if t is not None]
    if not all([type(t) in PLAIN for t in tensors]) or h.dim() != 2:
        return False
    width = h.shape[1]
    pairs = [*[layer[:2] for layer in hidden], *zip(weights, biases, strict=True)]
    for i, (weight, bias) in enumerate(pairs):
        if weight.dim() != 2 or weight.shape[1] != width:
            return False
        if bias is not None and bias.shape != weight.shape[:1]:
            return False
        width = weight.shape[0] if i < len(hidden) else width
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
        layers: list[Any] = list(self.layers)
        hidden: tuple[HiddenLayer, ...] = ()
        if len(args) == 1 and _is_forward_alone(self.body):
            h, rest = _run_to_hidden_layers(lambda: _opened(self.body), args[0])
            weights, biases = _read_once(layers)
            hidden = _deferrable(h, rest, weights, biases)
            h = h if hidden else _run(rest, h)
        else:
            h = self.body(*args)
            weights, biases = _read_once(layers)
        for i, layer in enumerate(layers):
            self._check(i, layer, weights[i], biases[i], None if hidden else h)
        keep = _attached if torch.is_grad_enabled() or _in_transform() else torch.Tensor.detach
        kind = h.device.type
        if torch.is_autocast_enabled(kind) and h.dtype != torch.float64:
            # Cast as autocast would for the layers.
            dtype = torch.get_autocast_dtype(kind)
            weights = tuple([keep(w).to(dtype) for w in weights])
            biases = tuple([None if b is None else keep(b).to(dtype) for b in biases])
            return deferred_layer(keep(h).to(dtype), weights, biases, self.event, requested=True)
        for t in (t for t in (*weights, *biases) if t is not None):
            if t.dtype != h.dtype:
                raise TypeError(f"h has dtype {h.dtype} and a last layer {t.dtype}; cast one of them")
        weights = tuple([keep(w) for w in weights])
        biases = tuple([None if b is None else keep(b) for b in biases])
        hidden = tuple([HiddenLayer(keep(w), None if b is None else keep(b), a) for w, b, a in hidden])
        return deferred_layer(keep(h), weights, biases, self.event, hidden, requested=True)

    def extra_repr(self) -> str:
        return "" if self.event is None else f"event={self.event}"

    @staticmethod
    def _check(i: int, layer: Any, weight: Tensor, bias: Tensor | None, h: Any) -> None:
        """Reject a layer whose call is more than its product, and an incompatible input, if one is given."""
        hooks = has_hooks(layer)
        if hooks or _is_replaced(layer):
            what = "hooks" if hooks else f"a forward of its own ({type(layer).__name__})"
            raise TypeError(
                f"layer {i} of FusedHead has {what}, but it is not called; use "
                "torch.nn.utils.parametrizations for weight_norm and spectral_norm and "
                "torch.nn.utils.prune.remove after pruning, or the decoder without FusedHead"
            )
        if h is None:
            return
        if not isinstance(h, Tensor) or h.dim() != 2 or h.shape[1] != layer.in_features:
            came = shape_of(h) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"the body of FusedHead returned {came}; expected h [N, {layer.in_features}], the input of "
                f"layer {i}; torch.nn.Flatten() at its end makes a picture such"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {i} of FusedHead has a bias {shape_of(bias)}; expected [X] = {list(weight.shape[:1])}"
            )


def _read_once(layers: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Return the layers' weights and biases; a parametrisation computes one in each access."""
    weights, biases = zip(*[(layer.weight, layer.bias) for layer in layers], strict=True)
    return weights, biases


def _attached(tensor: Tensor) -> Tensor:
    """Return a view, which a later ``tensor.data = ...`` does not affect."""
    return tensor.view_as(tensor)


def _in_transform() -> bool:
    """Return True in forward mode and in transforms, whose derivatives do not end with ``no_grad``."""
    return not torch.compiler.is_compiling() and (forward_ad_is_active() or functorch_is_active())


def _is_replaced(layer: nn.Linear) -> bool:
    """Return True if a call of the layer runs another forward than ``nn.Linear``'s."""
    return type(layer).forward is not nn.Linear.forward or not runs_torchs_call(layer)
