"""Last layer fused with the likelihood, against storing its output; a step and an evaluation with it.

"Least" is the time of the matrix products alone. The fused head's own blocks (some MiB per thread) are not in
"peak": ``python -m benchmarks head_memory`` measures processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvae
from fastvae.ops.head import Layers, reduce_linear
from fastvae.ops.reduce import BoundReduction, reduce

from .measure import COMPILE, CPU, OURS, TOLERANCE, Place, Work, assert_near, compiled, keep_memory
from .objectives import (
    PIXELS,
    _eager,
    _name,
    _products,
    _pythae,
    log_marginal_by_hand,
    log_sum_by_hand,
    model_of,
)

HOW = BoundReduction(1.0, "log_mean_exp", "mean")
STORED = "fastvae, output stored"
# Samples, batch, inputs and outputs of the layer.
SHAPES = (
    (500, 100, 200, 784),
    (50, 64, 200, 784),
    (50, 64, 500, 784),
    (10, 128, 512, 3072),
    (1, 4096, 200, 784),
)


def works():
    keep_memory()
    for k, b, inner, size in SHAPES:
        target = {"eager": 1.4, COMPILE: 1.1, STORED: 1.1} if (k, b) == (500, 100) else {}
        yield head(k, b, inner, size, target)
        torch._dynamo.reset()
    yield step()
    for hidden in ((200,), (200, 200)):
        yield evaluation(hidden)


def inputs(k: int, b: int, inner: int, size: int, place: Place = CPU) -> tuple[Tensor, ...]:
    """Return x, the layer's input, weight and bias, and a log-ratio; all but x and it in the precision."""
    torch.manual_seed(0)
    x, h = torch.rand(b, size).round(), torch.randn(k * b, inner).relu()
    layer, log_ratio = nn.Linear(inner, size), torch.randn(k, b)
    h, weight, bias = (t.detach().to(place.device, place.dtype) for t in (h, layer.weight, layer.bias))
    log_ratio = log_ratio.to(place.device)
    learned = (t.requires_grad_() for t in (h, weight, bias, log_ratio))
    return x.to(place.device), *learned


def eager(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, log_ratio: Tensor) -> Tensor:
    """Compute the bound in plain PyTorch."""
    logits = functional.linear(h, weight, bias).unflatten(0, log_ratio.shape)
    loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return (torch.logsumexp(log_ratio - loss.sum(-1), 0) - math.log(len(log_ratio))).mean()


def fused(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, log_ratio: Tensor) -> Tensor:
    return reduce_linear("bernoulli", x, Layers(h, weight, bias, None, None), log_ratio, None, HOW)[0]


def stored(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, log_ratio: Tensor) -> Tensor:
    return reduce("bernoulli", x, (functional.linear(h, weight, bias),), log_ratio, None, HOW)[0]


def head(k: int, b: int, inner: int, size: int, target: dict[str, float], place: Place = CPU) -> Work:
    """Return the work of the bound and all gradients from the layer's input."""
    given = inputs(k, b, inner, size, place)
    functions = {OURS: fused, STORED: stored, "eager": eager} | compiled(eager, False, place)
    run = {name: lambda f=f: torch.autograd.grad(f(*given), given[1:]) for name, f in functions.items()}

    def check(name: str) -> None:
        # In half precision eager PyTorch's output has eight bits, too few for a reference.
        wide = [t.detach().float().requires_grad_(t.requires_grad) for t in given]
        for got, want in zip(run[name](), torch.autograd.grad(eager(*wide), wide[1:]), strict=True):
            assert_near(got, want, tolerance)

    # Without TF32, the order of sums is the only difference.
    exact = place.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tolerance = TOLERANCE[torch.float32 if exact else torch.bfloat16]
    checked = run if place.dtype == torch.float32 else (OURS, STORED)
    checks = {name: lambda name=name: check(name) for name in checked}
    case = f"{k}×{b}, {inner} to {size}{place.label}"
    moved = place.dtype.itemsize * (4 * k * b * inner + 3 * inner * size)
    operations = 3 * k * b * inner * size
    graphs = frozenset(run) if place.graphs else frozenset()
    return Work(
        "head", case, "forward+backward", run, checks, moved, operations, target=target, graphs=graphs
    )


def step() -> Work:
    """Return the work of a whole VAE's step, with the head fused and not."""
    model, x = model_of((200,), 50), torch.rand(64, PIXELS).round()
    parts = model["encoder"], model["decoder"]
    losses: dict[str, Callable[[], Tensor]] = {"eager": lambda: _eager(model, x, 50)}
    for name in (OURS, STORED):
        vae = fastvae.VAE(*parts, likelihood="bernoulli", fuse=name == OURS)
        losses[name] = lambda vae=vae: -vae.iwae(x, k=50)
    parameters = list(model.parameters())
    run = {
        name: lambda f=losses[name]: torch.autograd.grad(f(), parameters) for name in (OURS, STORED, "eager")
    }
    operations = 3 * (3200 * (200 * PIXELS + 50 * 200) + 64 * (PIXELS * 200 + 200 * 100))
    return Work(
        "IWAE step, head", "784-200-50, K=50, batch 64", "step", run, {}, 0, operations, target={STORED: 1.15}
    )


def evaluation(hidden: tuple[int, ...]) -> Work:
    """Return the work of log p(x) of 16 images by 5000 draws each.

    Args:
        hidden: widths of the encoder's and the decoder's hidden layers.
    """
    images, latent, k = 16, 50, 5000
    model, x = model_of(hidden, latent).eval(), torch.rand(images, PIXELS).round()
    encoder, decoder = model["encoder"], model["decoder"]

    @torch.no_grad()
    def ours(decoder: nn.Module) -> Tensor:
        torch.manual_seed(1)
        q = encoder(x).chunk(2, dim=1)
        return fastvae.log_marginal(x, q, decoder, k=k, likelihood="bernoulli").log_px

    run = {OURS: lambda: ours(fastvae.FusedHead(decoder[:-1], decoder[-1])), STORED: lambda: ours(decoder)}
    checks = {STORED: lambda: assert_near(run[STORED](), run[OURS]())}
    by_chunk = torch.compile(log_sum_by_hand)
    run["eager loop"] = lambda: log_marginal_by_hand(encoder, decoder, x, k, 50)
    run[COMPILE] = lambda: log_marginal_by_hand(encoder, decoder, x, k, 50, by_chunk)
    if (pythae := _pythae(model, hidden, latent)) is not None:
        run["pythae"] = lambda: pythae(x, k)
    operations = images * k * _products(hidden, latent)[1]
    case, target = f"{_name(hidden, latent)}, K={k}, {images} images", {STORED: 1.2, "pythae": 8.0}
    return Work("evaluation, head", case, "evaluation", run, checks, 0, operations, target=target)
