"""A step or evaluation shaped like a public code, written twice: in plain PyTorch and with fastvae."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.random import draw_seed, normal

from ..measure import COMPILE, CPU, OURS, Place, Work

GROUP = "users"
# On a CPU torch.compile's own random numbers are slow.
COMPILED = {"fallback_random": True}
Noise = Callable[..., Tensor]
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Case:
    """Model, data and the two losses of a training step, or of an evaluation.

    Attributes:
        name: row of the table.
        sizes: sizes of the benchmark, such as ``{"batch": 128}``.
        tiny: sizes of the quick test.
        build: ``build(**sizes)`` returns the model and a batch.
        eager: ``eager(model, batch, noise)`` is the loss as the code's authors write it; ``noise(*shape)``
            draws standard normals, [B, D] or [K, B, D].
        ours: ``ours(model, batch)`` is the loss by fastvae.
        constant: ``constant(batch)`` is fastvae's loss less the authors', who leave constants out.
        trains: False for an evaluation, which has no gradients.
    """

    name: str
    sizes: dict[str, int]
    tiny: dict[str, int]
    build: Callable[..., tuple[nn.Module, Any]]
    eager: Callable[[Any, Any, Noise], Tensor]
    ours: Callable[[Any, Any], Tensor]
    constant: Callable[[Any], float] = field(default=lambda batch: 0.0)
    trains: bool = True


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for n, m in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1])


def standard_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) ‖ N(0, I)), [B]."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), -1)


def log_normal(z: Tensor, mu: Tensor | float, logvar: Tensor) -> Tensor:
    """Return the log density of each number."""
    return -0.5 * (LOG_2PI + logvar + (z - mu).pow(2) / logvar.exp())


def fastvae_noise(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the normals that fastvae's next draw takes from the same random state."""
    dtype = torch.get_default_dtype()
    return normal(draw_seed(device), *shape[:-2] or (1,), *shape[-2:], dtype=dtype).reshape(shape)


def on(device: torch.device, batch: Any) -> Any:
    """Return a batch, a tensor or a tuple or mapping of tensors, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: on(device, part) for name, part in batch.items()}
    return tuple(on(device, part) for part in batch)


def losses(case: Case, model: nn.Module, batch: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Return the authors' loss, with its missing constant, and fastvae's, of the same noise."""
    torch.manual_seed(seed)
    noise = functools.partial(fastvae_noise, device=next(model.parameters()).device)
    theirs = case.eager(model, batch, noise) + case.constant(batch)
    torch.manual_seed(seed)
    return theirs, case.ours(model, batch)


def check(case: Case, model: nn.Module, batch: Any) -> None:
    """Raise AssertionError if the two losses, or their gradients, differ for the same noise.

    In float32, where a sum of thousands of terms has a relative error of some 1e-6; tests compare in float64.
    """
    model = copy.deepcopy(model).eval()
    # cuDNN convolves in TF32, and has no backward pass of a recurrent layer in evaluation.
    with torch.backends.cudnn.flags(enabled=False):
        _check(case, model, batch)


def _check(case: Case, model: nn.Module, batch: Any) -> None:
    theirs, ours = losses(case, model, batch, 3)
    value, expected = float(ours.detach()), float(theirs.detach())
    assert abs(value - expected) <= 1e-4 * (1 + abs(expected)), f"the loss is {value}, eager {expected}"
    if not case.trains:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (theirs, ours)), strict=True):
        apart, size = float((a - b).norm()), float(a.norm())
        assert apart <= 1e-3 * size + 1e-6, f"a gradient of norm {size:.3g} differs by {apart:.3g}"


def step_of(model: nn.Module, loss: Callable[[], Tensor], capturable: bool = False) -> Callable[[], Tensor]:
    """Return a training step: zero_grad, forward, loss, backward and Adam, which a CUDA graph may capture."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, capturable=capturable)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def works(cases: list[Case], tiny: bool = False, compiled: bool = True, place: Place = CPU) -> Iterator[Work]:
    """Yield the work of each case; each implementation trains its own copy of the model."""
    randn = functools.partial(torch.randn, device=place.device)
    for case in cases:
        torch.manual_seed(0)
        model, batch = case.build(**(case.tiny if tiny else case.sizes))
        model, batch = model.to(place.device), on(place.device, batch)
        functions = {OURS: case.ours, "eager": lambda m, b, case=case: case.eager(m, b, randn)}
        if compiled:
            torch._dynamo.reset()
            functions[COMPILE] = torch.compile(functions["eager"], dynamic=False, options=COMPILED)
        run = {}
        for name, function in functions.items():
            own = copy.deepcopy(model)
            call = functools.partial(function, own, batch)
            run[name] = step_of(own, call) if case.trains else torch.no_grad()(call)
        checks = {OURS: lambda case=case, m=model, b=batch: check(case, m, b)}
        name = f"{case.name}{place.label}"
        yield Work(GROUP, name, "step" if case.trains else "evaluation", run, checks)
