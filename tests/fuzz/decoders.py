"""Decoders: modules z -> parameters that use their output in all ways users do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..decoders import DECODERS

HIDDEN = 5


class Cast(nn.Module):
    """Flatten z and cast it to the network's dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, z: Tensor) -> Tensor:
        return z.flatten(1).to(self.dtype)


class Halve(torch.autograd.Function):
    """Identity whose gradient is halved."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.5 * grad


def _in_place(out: Tensor) -> Tensor:
    out.clamp_(-1.5, 1.5)
    return out


def _slices(out: Tensor) -> Tensor:
    out[:, :1] = 0.25
    return out


def _hooked(out: Tensor) -> Tensor:
    if out.requires_grad:
        out.register_hook(lambda g: 0.5 * g)
    return out


def _checked(out: Tensor) -> Tensor:
    assert isinstance(out, Tensor) and type(out) is Tensor
    return out


def _printed(out: Tensor) -> Tensor:
    print(end="")
    return out


def _looked_at(out: Tensor) -> Tensor:
    return out if out.numel() == 0 or out.detach().float().abs().max().item() < 1e30 else out * 2


@torch.compiler.disable
def _disabled(out: Tensor) -> Tensor:
    return out * 1.5


# Uses of the last layer's output.
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp_": _in_place,
    "mul_": lambda out: out.mul_(0.5),
    "slices": _slices,
    "iadd": lambda out: out.__iadd__(0.1),
    "tensor hook": _hooked,
    "function": Halve.apply,
    "isinstance": _checked,
    "print": _printed,
    "item": _looked_at,
    "disabled": _disabled,
    "tanh": lambda out: 2 * torch.tanh(out),
    "vmap": lambda out: torch.vmap(lambda row: row * 0.5)(out) if len(out) else out * 0.5,
    "chunks": lambda out: torch.cat(out.split(2)) if len(out) else out,
    "detached in part": lambda out: 0.5 * out + 0.5 * out.detach(),
    "float": lambda out: out.float(),
    "twice": lambda out: out + out,
    "strided": lambda out: torch.stack([out, out], -1)[..., 0],
    "transposed": lambda out: out.t().contiguous().t(),
}
INSIDE = ("dropout", "checkpoint", "reentrant", "weights change", "module hook", "backward hook",
          "batch norm", "tied", "frozen", "no grad", "autocast", "weight norm")  # fmt: skip
POOL = ("module", "sequential", "linear", *AFTER, *INSIDE)
# Decoders of tests/decoders.py with one float32 output of features, except those that raise, tested there.
RAISE = ("too few features", "too many features", "wrong inputs", "an axis too many", "a float64 last layer",
         "input changed after the layer")  # fmt: skip
MISUSED = tuple(f"pool: {name}" for name in DECODERS if name not in RAISE)
BREAKS = ("print", "item", "disabled")


def fits(name: str, compiled: str, by_sample: bool, batch: int, learned: bool) -> bool:
    """Return True if a decoder can be used with the other settings.

    PyTorch itself must compile it and it must have enough rows; a batch norm, which mixes rows, excludes
    estimators that scale each sample's gradient; reentrant checkpoints need a z that requires a gradient.
    """
    if name == "dropout" and compiled == "eager":  # torch's checkpoints draw another mask there
        return False
    if (name == "reentrant" and not learned) or (name == "pool: a list of rows" and not batch):
        return False
    if name == "pool: tensor hook" and by_sample:  # it clamps gradients, of which estimators have others
        return False
    if name.endswith("batch norm") and (by_sample or batch < 2):
        return False
    uncompiled = ("reentrant", "backward hook", "vmap", "weight norm", "tensor hook", "weights change")
    return not (compiled and name in uncompiled)


def dtype(name: str, of_parameters: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that the decoder computes in."""
    return torch.float16 if "float16" in name else torch.bfloat16 if "autocast" in name else of_parameters


class Decoder(nn.Module):
    """Decoder z [N, *latent] -> parameters [N, ...] of given shapes."""

    def __init__(
        self, name: str, latent: int, shapes: list[tuple[int, ...]], combine: Any, dtype: torch.dtype
    ):
        super().__init__()
        self.name, self.shapes, self.combine = name, shapes, combine
        width = sum(math.prod(s) for s in shapes)
        self.body = nn.Sequential(Cast(dtype), nn.Linear(latent, HIDDEN), nn.Tanh())
        if name == "dropout":
            self.body.append(nn.Dropout(0.3))
        if name == "batch norm":
            self.body.append(nn.BatchNorm1d(HIDDEN))
        self.head = nn.Linear(HIDDEN, width)
        self.to(dtype)
        if name == "weight norm":
            nn.utils.parametrizations.weight_norm(self.head)
        if name == "module hook":
            self.head.register_forward_hook(lambda module, given, out: 0.5 * out)
        if name == "backward hook":
            self.head.register_full_backward_hook(
                lambda module, g, out: tuple(v if v is None else 0.5 * v for v in g)
            )
        if name == "frozen":
            self.head.requires_grad_(False)

    def raw(self, z: Tensor) -> Tensor:
        name = self.name
        if name == "no grad":
            with torch.no_grad():
                return self.head(self.body(z))
        if name == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.head(self.body(z))
        if name == "weights change":
            with torch.no_grad():
                self.head.bias.add_(0.25)
            out = self.head(self.body(z))
            with torch.no_grad():
                self.head.bias.sub_(0.25)
            return out
        if name in ("checkpoint", "reentrant"):
            return checkpoint(lambda z: self.head(self.body(z)), z, use_reentrant=name == "reentrant")
        if name == "tied":
            return self.head(self.body(z)) + 0.1 * self.head(2 * self.body(z))
        out = self.head(self.body(z))
        return AFTER[name](out) if name in AFTER else out

    def forward(self, z: Tensor, context: Tensor | None = None) -> Any:
        if context is not None:
            z = z + 0.1 * torch.cos(context.double()).reshape(-1, *[1] * (z.dim() - 1)).to(z.dtype)
        out = self.raw(z)
        parts = out.split([math.prod(s) for s in self.shapes], 1)
        return self.combine(
            [p.unflatten(1, s) if len(s) != 1 else p for p, s in zip(parts, self.shapes, strict=True)]
        )


def around(name: str, decoder: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return the context of modes and patches that a decoder is called under."""
    if name not in MISUSED:
        return contextlib.nullcontext()
    return DECODERS[name.removeprefix("pool: ")].around(decoder)


def make(
    name: str, latent: int, shapes: list[tuple[int, ...]], combine: Any, dtype: torch.dtype, plain: bool
) -> nn.Module:
    """Build the decoder of a name; if ``plain``, a ``nn.Sequential`` where it can return the shapes."""
    if name in MISUSED:
        return DECODERS[name.removeprefix("pool: ")].make(latent, math.prod(shapes[0]))
    if plain and name in ("sequential", "linear") and len(shapes) == 1:
        shape = shapes[0]
        layers = [Cast(dtype)]
        if name == "sequential":
            layers += [nn.Sequential(nn.Linear(latent, HIDDEN), nn.Tanh())]
        layers += [nn.Linear(HIDDEN if name == "sequential" else latent, math.prod(shape))]
        if len(shape) != 1:
            layers += [nn.Unflatten(1, shape)]
        return nn.Sequential(*layers).to(dtype)
    return Decoder(name, latent, shapes, combine, dtype)
