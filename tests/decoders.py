"""Pool of decoders as users write them, including every misuse of a last layer, for differential tests.

``DECODERS[name].make(latent, features)`` returns a seeded module z [N, latent] -> logits [N, features];
``DECODERS[name].around(decoder)`` is a context for the call and its backward pass. ``EVENTS`` counts the
calls of a decoder's hooks and functions. Some decoders raise on purpose: the same error is expected wherever
the same decoder is called.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

HIDDEN = 8
EVENTS: Counter[str] = Counter()


class Case(NamedTuple):
    make: Callable[[int, int], nn.Module]
    around: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


DECODERS: dict[str, Case] = {}


def _nothing(_: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def add(name: str, make: Callable[[int, int], nn.Module], around: Any = _nothing) -> None:
    def seeded(latent: int, features: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return make(latent, features)

    assert name not in DECODERS, name
    DECODERS[name] = Case(seeded, around)


def plain(latent: int, features: int, *end: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(latent, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, features), *end)


class Written(nn.Module):
    """Decoder with a custom forward: ``ending(self, h)`` computes the output."""

    def __init__(self, latent: int, features: int, ending: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.first, self.last, self.ending = nn.Linear(latent, HIDDEN), nn.Linear(HIDDEN, features), ending

    def forward(self, z: Tensor) -> Any:
        return self.ending(self, torch.tanh(self.first(z)))


def written(name: str, ending: Callable[[Any, Tensor], Any], around: Any = _nothing) -> None:
    add(name, lambda latent, features: Written(latent, features, ending), around)


def changed(name: str, change: Callable[[nn.Sequential], nn.Module | None], around: Any = _nothing) -> None:
    """Register a plain Sequential modified, or replaced, by ``change``."""

    def make(latent: int, features: int) -> nn.Module:
        decoder = plain(latent, features)
        return change(decoder) or decoder

    add(name, make, around)


def count(name: str) -> Callable[..., None]:
    def hook(*_: Any, **__: Any) -> None:
        EVENTS[name] += 1

    return hook


# Structures

add("linear", lambda d, x: nn.Linear(d, x))
add("linear without bias", lambda d, x: nn.Linear(d, x, bias=False))
add("sequential", plain)
add("sequential of one", lambda d, x: nn.Sequential(nn.Linear(d, x)))
add(
    "nested", lambda d, x: nn.Sequential(nn.Linear(d, HIDDEN), nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, x)))
)
add("relu in place", lambda d, x: nn.Sequential(nn.Linear(d, 8), nn.ReLU(inplace=True), nn.Linear(8, x)))
add("ends in identity", lambda d, x: plain(d, x, nn.Identity()))
add("ends in unflatten, flatten", lambda d, x: plain(d, x, nn.Unflatten(1, (x, 1)), nn.Flatten()))
add("flattened into the batch", lambda d, x: plain(d, x, nn.Flatten(0), nn.Unflatten(0, (-1, x))))
add("ends in a softplus", lambda d, x: plain(d, x, nn.Softplus()))
add("ends in dropout", lambda d, x: plain(d, x, nn.Dropout(0.0)))
add("batch norm", lambda d, x: nn.Sequential(nn.Linear(d, 8), nn.BatchNorm1d(8), nn.Linear(8, x)))
add("dropout", lambda d, x: nn.Sequential(nn.Linear(d, 8), nn.Dropout(0.5), nn.Linear(8, x)))
add("too few features", lambda d, x: plain(d, x - 1))
add("too many features", lambda d, x: plain(d, 2 * x))
add("wrong inputs", lambda d, x: nn.Sequential(nn.Linear(d, 8), nn.Linear(9, x)))
add("an axis too many", lambda d, x: plain(d, x, nn.Unflatten(1, (1, x))))
add("rows in axes", lambda d, x: nn.Sequential(nn.Unflatten(0, (-1, 1)), *plain(d, x), nn.Flatten(0, 1)))
written("a module", lambda self, h: self.last(h))
written("a float64 decoder", lambda self, h: self.last.double()(h.double()))
changed("a float64 last layer", lambda d: d[2].double() and None)


class Subclass(nn.Sequential):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class Scaled(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return 0.5 * super().forward(h)


add("a subclass of Sequential", lambda d, x: Subclass(*plain(d, x)))
add("a subclass of Linear", lambda d, x: nn.Sequential(nn.Linear(d, HIDDEN), Scaled(HIDDEN, x)))


# Uses of the output


def _sliced(self: Any, h: Tensor) -> Tensor:
    out = self.last(h)
    out[:, ::2] = out[:, ::2] * 0.5
    out[:5] = 0.25
    return out


def _hooked_tensor(self: Any, h: Tensor) -> Tensor:
    out = self.last(h)
    if out.requires_grad:
        out.register_hook(lambda g: count("tensor hook")() or g.clamp(-1e-4, 1e-4))
    return out


def _kept(self: Any, h: Tensor) -> Tensor:
    out = self.last(h)
    if out.requires_grad:
        out.retain_grad()
    return out


def _isinstance(self: Any, h: Tensor) -> Tensor:
    out = self.last(h)
    assert isinstance(out, Tensor) and type(out) is Tensor
    return out


def _rearranged(self: Any, h: Tensor) -> Tensor:
    out = torch.einsum("nx->xn", self.last(h))
    return out.transpose(0, 1).contiguous().view(len(h), 1, -1).squeeze(1)


def _through_a_list(self: Any, h: Tensor) -> Tensor:
    return torch.stack(list(self.last(h)))


written("clamp_", lambda self, h: self.last(h).clamp_(-0.05, 0.05))
written("mul_", lambda self, h: self.last(h).mul_(0.1))
written("add_ a parameter", lambda self, h: self.last(h).add_(self.last.bias))
written("an in-place change whose result is dropped", lambda self, h: [o := self.last(h), o.clamp_(0)][0])
written("slice assignment", _sliced)
written("a view changed in place", lambda self, h: [o := self.last(h), o.view(-1).mul_(0.5)][0])
written("input changed after the layer", lambda self, h: [self.last(h), h.mul_(0.5)][0])
written("tensor hook", _hooked_tensor)
written("retain_grad", _kept)
written("isinstance", _isinstance)
written("einsum and views", _rearranged)
written("a list of rows", _through_a_list)
written("detached", lambda self, h: self.last(h).detach())
written("without gradients", lambda self, h: torch.no_grad()(self.last)(h))
written("float16 and back", lambda self, h: self.last(h).half().float())
written("to numpy and back", lambda self, h: torch.from_numpy(self.last(h).detach().numpy().copy()))
written("vmap", lambda self, h: torch.vmap(self.last)(h))
written("a layer that is used twice", lambda self, h: self.last(h) + 0.1 * self.last(h.square()))


class Damp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        EVENTS["function"] += 1
        return t.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        EVENTS["function's backward"] += 1
        return 0.1 * g


written("autograd function after", lambda self, h: Damp.apply(self.last(h)))
written("autograd function before", lambda self, h: self.last(Damp.apply(h)))
written("checkpoint", lambda self, h: checkpoint(self.last, h, use_reentrant=False))
written("reentrant checkpoint", lambda self, h: checkpoint(self.last, h, use_reentrant=True))
changed("checkpoint of all", lambda d: Called(d, lambda f, z: checkpoint(f, z, use_reentrant=False)))
changed("reentrant checkpoint of all", lambda d: Called(d, lambda f, z: checkpoint(f, z, use_reentrant=True)))


class Called(nn.Module):
    """Module whose ``inner`` is called by ``call``."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Any]):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, z: Tensor) -> Any:
        return self.call(self.inner, z)


# Changes to the layer


def _shifted(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.last.bias.add_(1.0)
    out = self.last(h)
    with torch.no_grad():
        self.last.bias.sub_(1.0)
    return out


def _swapped(self: Any, h: Tensor) -> Tensor:
    kept = self.last.weight.data
    self.last.weight.data = 2 * kept
    out = self.last(h)
    self.last.weight.data = kept
    return out


class Shift(nn.Module):
    """Part of the body that changes the last layer."""

    def __init__(self, layer: nn.Linear, change: Callable[[nn.Linear], Any]):
        super().__init__()
        self.__dict__["layer"] = layer
        self.change = change

    def forward(self, h: Tensor) -> Tensor:
        self.change(self.layer)
        return h


def _with_shift(change: Callable[[nn.Linear], Any]) -> Callable[[nn.Sequential], nn.Module]:
    return lambda d: nn.Sequential(d[0], d[1], Shift(d[2], change), d[2])


def _hook_once(layer: nn.Linear) -> None:
    if not layer._forward_hooks:
        layer.register_forward_hook(lambda *args: 0.5 * args[2])


written("weights changed while the layer runs", _shifted)
written("weights swapped while the layer runs", _swapped)
changed("the body doubles the last layer", _with_shift(lambda m: m.weight.data.mul_(1.01)))
changed("the body hooks the last layer", _with_shift(_hook_once))


def _lent(decoder: nn.Sequential) -> nn.Module:
    def call(inner: nn.Module, z: Tensor) -> Any:
        values = {n: 0.5 * p for n, p in inner.named_parameters()}
        return torch.func.functional_call(inner, values, (z,))

    return Called(decoder, call)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h) + self.up(self.down(h))


def _last(change: Callable[[nn.Linear], Any]) -> Callable[[nn.Sequential], None]:
    def apply(decoder: nn.Sequential) -> None:
        result = change(decoder[2])
        decoder[2] = result if isinstance(result, nn.Module) else decoder[2]

    return apply


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        EVENTS["parametrization"] += 1
        return 2 * weight


class MyParameter(nn.Parameter):
    pass


class Tagged(Tensor):
    """Tensor whose functions are counted."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        EVENTS["subclass"] += function is nn.functional.linear
        return super().__torch_function__(function, types, args, kwargs or {})


def _plain_weight(layer: nn.Linear) -> None:
    weight = layer.weight
    del layer.weight
    layer.raw = weight
    layer.weight = 2 * weight.detach()


def _tied(latent: int, features: int) -> nn.Module:
    last = nn.Linear(features, features)
    middle = nn.Linear(features, features)
    middle.weight = last.weight
    return nn.Sequential(nn.Linear(latent, features), middle, nn.Tanh(), last)


changed("functional_call", _lent)
changed("LoRA", _last(Lora))
changed("weight_norm", _last(lambda m: nn.utils.weight_norm(m)))
changed("weight_norm, parametrised", _last(lambda m: parametrizations.weight_norm(m)))
changed("spectral_norm", _last(lambda m: nn.utils.spectral_norm(m)))
changed("spectral_norm, parametrised", _last(lambda m: parametrizations.spectral_norm(m)))
changed("pruned", _last(lambda m: prune.l1_unstructured(m, "weight", 0.5)))
changed("parametrised", _last(lambda m: parametrize.register_parametrization(m, "weight", Doubled())))
changed("bias parametrised", _last(lambda m: parametrize.register_parametrization(m, "bias", Doubled())))
changed("a subclass of Parameter", _last(lambda m: setattr(m, "weight", MyParameter(m.weight.detach()))))
changed(
    "a subclass of Tensor",
    _last(lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().as_subclass(Tagged)))),
)
changed("a weight that is not a parameter", _last(_plain_weight))
changed("frozen last layer", _last(lambda m: m.requires_grad_(False)))
changed("frozen weight", _last(lambda m: setattr(m.weight, "requires_grad", False)))
changed("frozen body", lambda d: d[0].requires_grad_(False) and None)
changed("frozen", lambda d: d.requires_grad_(False))
changed("weight tensor hook", _last(lambda m: m.weight.register_hook(count("weight hook")) and None))
changed(
    "post-accumulate hook",
    _last(lambda m: m.weight.register_post_accumulate_grad_hook(count("accumulated")) and None),
)
add("tied", _tied)
changed("a transposed weight", _last(lambda m: setattr(m.weight, "data", m.weight.data.mT.contiguous().mT)))
changed("a bias of one number", _last(lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1)))))


def _quantised(decoder: nn.Sequential) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear}, dtype=torch.qint8)


changed("quantised", _quantised)


# Hooks and replaced methods


def _hooks(register: Callable[[nn.Module], Any], where: Callable[[nn.Sequential], nn.Module]) -> Any:
    def change(decoder: nn.Sequential) -> None:
        register(where(decoder))

    return change


def _last_of(decoder: nn.Sequential) -> nn.Module:
    return decoder[2]


def _itself(decoder: nn.Sequential) -> nn.Module:
    return decoder


def _first_of(decoder: nn.Sequential) -> nn.Module:
    return decoder[0]


for _place, _where in {"last layer": _last_of, "container": _itself, "body": _first_of}.items():
    for _kind, _register in {
        "forward hook": lambda m: m.register_forward_hook(count("forward")),
        "forward hook that replaces": lambda m: m.register_forward_hook(lambda _, __, out: 0.5 * out),
        "forward hook with kwargs": lambda m: m.register_forward_hook(count("kwargs"), with_kwargs=True),
        "forward hook always": lambda m: m.register_forward_hook(count("always"), always_call=True),
        "forward pre-hook": lambda m: m.register_forward_pre_hook(count("before")),
        "full backward hook": lambda m: m.register_full_backward_hook(count("backward")),
        "full backward hook that scales": lambda m: m.register_full_backward_hook(
            lambda _, grads, __: tuple(None if g is None else 0.5 * g for g in grads)
        ),
        "full backward pre-hook": lambda m: m.register_full_backward_pre_hook(count("before backward")),
    }.items():
        changed(f"{_kind} on the {_place}", _hooks(_register, _where))


@contextlib.contextmanager
def _global(register: Any, hook: Any) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


_module = nn.modules.module
for _kind, _register in {
    "forward": _module.register_module_forward_hook,
    "forward pre": _module.register_module_forward_pre_hook,
    "full backward": _module.register_module_full_backward_hook,
    "full backward pre": _module.register_module_full_backward_pre_hook,
}.items():

    def _count_linear(module: nn.Module, *_: Any, kind: str = _kind) -> None:
        EVENTS[f"global {kind}"] += type(module) is nn.Linear

    changed(
        f"global {_kind} hook",
        lambda d: None,
        lambda _, register=_register, hook=_count_linear: _global(register, hook),
    )


@contextlib.contextmanager
def _patched(owner: Any, name: str) -> Iterator[None]:
    """Replace a function of torch, as profilers and tracers do."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        EVENTS[f"patched {name}"] += 1
        return original(*args, **kwargs)

    setattr(owner, name, replaced)
    try:
        yield
    finally:
        setattr(owner, name, original)


changed("F.linear patched", lambda d: None, lambda _: _patched(nn.functional, "linear"))
changed("Linear.forward patched", lambda d: None, lambda _: _patched(nn.Linear, "forward"))
changed("Sequential.forward patched", lambda d: None, lambda _: _patched(nn.Sequential, "forward"))
changed("Module._call_impl patched", lambda d: None, lambda _: _patched(nn.Module, "_call_impl"))


def _replaced(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda h: 0.5 * original(h)


changed("forward of the layer replaced", _last(_replaced))
changed("forward of the container replaced", lambda d: _replaced(d))


# Per-sample gradients as by opacus: a layer's input, from a forward hook, times its upstream gradient.


def _opacus(decoder: nn.Sequential) -> None:
    seen: dict[nn.Module, Tensor] = {}

    def forward(module: nn.Module, args: Any, _: Any) -> None:
        seen[module] = args[0].detach()

    def backward(module: nn.Module, _: Any, grads: Any) -> None:
        per_sample = torch.einsum("nx,nh->nxh", grads[0][:4], seen[module][:4])
        EVENTS["per-sample"] += per_sample.shape[0]
        module.per_sample = per_sample.sum((1, 2))

    for module in decoder:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(forward)
            module.register_full_backward_hook(backward)


changed("opacus", _opacus)


# Modes, autocast, compilers, copies


class CountFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        EVENTS["function mode"] += function is nn.functional.linear
        return function(*args, **(kwargs or {}))


class CountProducts(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        EVENTS["dispatch mode"] += "addmm" in str(function)
        return function(*args, **(kwargs or {}))


def _autocast_inside(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.last(h)


changed("torch function mode", lambda d: None, lambda _: CountFunctions())
changed("torch dispatch mode", lambda d: None, lambda _: CountProducts())
changed("a device context", lambda d: None, lambda _: torch.device("cpu"))
changed("autocast outside", lambda d: None, lambda _: torch.autocast("cpu", torch.bfloat16))
changed("bfloat16 under autocast", lambda d: d.bfloat16(), lambda _: torch.autocast("cpu", torch.bfloat16))
changed("saved on the CPU", lambda d: None, lambda _: torch.autograd.graph.save_on_cpu())
changed(
    "anomaly detection", lambda d: None, lambda _: torch.autograd.set_detect_anomaly(True, check_nan=False)
)
written("autocast inside", _autocast_inside)
changed("jit.script", lambda d: torch.jit.script(d))
changed("jit.trace", lambda d: torch.jit.trace(d, torch.zeros(2, d[0].in_features)))
changed("deepcopied", copy.deepcopy)
changed("pickled", lambda d: pickle.loads(pickle.dumps(d)))


def _saved(decoder: nn.Sequential) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(decoder, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


changed("saved and loaded", _saved)
changed("torch.compile", lambda d: torch.compile(d, backend="eager"))
changed("compiled in place", lambda d: d.compile(backend="eager"))
changed("last layer compiled in place", _last(lambda m: m.compile(backend="eager")))
changed("compiled body", lambda d: nn.Sequential(torch.compile(d[0], backend="eager"), d[1], d[2]))
changed("compiled last layer", _last(lambda m: torch.compile(m, backend="aot_eager")))
