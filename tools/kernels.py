"""``python -m tools.kernels``: compiled code of every Triton kernel, without a GPU.

The ops are called on meta tensors of realistic shapes, and launches are recorded instead of run, so tiles,
flags and specialisation are the launcher's, without a second table to maintain. Recorded launches are
compiled for each architecture, and the code is analysed: registers, spills, shared memory, widths of loads
and stores by argument, and instructions per element.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch

# Compute capabilities 8.0 (A100), 9.0 (H100, H200), 10.0 (B200), and AMD's MI300.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Registers and maximum threads of a multiprocessor; for AMD's vector units, registers of a lane and maximum
# wavefronts.
REGISTERS, THREADS = 65536, 2048
AMD_REGISTERS, AMD_WAVES = 512, 8
# Maximum shared memory of a program: 163 KiB on the smallest NVIDIA target, 64 on AMD's.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass
class Report:
    """Compiled code of one launch for one target.

    Attributes:
        kernel: name of the kernel.
        launch: label of the launch.
        target: label of the target.
        registers: registers per thread.
        spills: spilled bytes (AMD: registers) per thread.
        shared: bytes of shared memory per program.
        occupancy: fraction of a multiprocessor's threads that the registers allow.
        widths: argument → minimum bytes of a thread's loads and stores of it; for AMD, where the argument is
            unknown, "widest" → maximum.
        narrow: large arguments accessed by fewer bytes than their alignment allows.
        loop: instructions per element in the innermost loop, 0 without a loop. NaN, like the next two, if not
            requested.
        instructions: instructions per element in total; those outside loops are shared by all tiles of a
            program, those of tiles' empty lanes included.
        bytes: bytes per element, over all arguments as large as the largest.
    """

    kernel: str
    launch: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    widths: dict[str, int]
    narrow: list[str]
    loop: float
    instructions: float
    bytes: float


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def of_likelihood(engine, declared, dtype, size, shape, needs, data=torch.float32, masked=False) -> Iterator:
    """Yield a likelihood's launches: parameters after the first of a given shape, x's gradient or not."""
    k, b, pixels = size
    mask = tensor(b, pixels, dtype=torch.bool) if masked else None
    x, first = tensor(b, pixels, dtype=data), tensor(*size, dtype=dtype)
    given = [first, *(tensor(*shape, dtype=dtype) for _ in declared.outputs[1:])]
    grad = tensor(k, b, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    label = f"{str(dtype)[6:]} {list(size)}"
    for output, parameter in zip(declared.outputs[1:], given[1:], strict=True):
        label += f", {output} {list(parameter.shape)}"
    label += "" if data.is_floating_point else f", {str(data)[6:]} data"
    label += ", masked" if masked else ""
    name = f"{declared.name}_log_prob"
    yield f"{name} {label}", lambda: engine.log_prob(declared, x, mask, *given)
    for need_x in needs:
        need = [need_x] + [True] * len(given)
        yield (
            f"{name}_backward {label}, need={need}",
            lambda n=need: engine.log_prob_backward(declared, grad, x, mask, *given, n),
        )
    if shape == size and False in needs and dtype == torch.float32 and data == dtype and pixels == 784:
        yield from of_bounds(engine, declared, grad, x, mask, given, label)


def of_bounds(engine, declared, grad, x, mask, given, label) -> Iterator:
    """Yield the launches of a likelihood's gradient of a bound, with the term's."""
    from fastvae.ops.reduce import BoundReduction

    how, mean, bound = ("log_mean_exp", "mean"), grad.new_empty(()), grad.new_empty(grad.shape[1])
    need = [False] + [True] * len(given)
    for over, upstream, weights, beta, axes in (
        (how[0], mean, grad, None, 2),
        (how[1], bound, None, bound, 1),
    ):
        reduction = BoundReduction(-0.5 if beta is None else 1.0, over, "mean" if axes == 2 else "none")
        yield (
            f"{declared.name}_bound_backward {label}, {over}",
            lambda u=upstream, w=weights, b=beta, h=reduction, a=axes: engine.bound_backward(
                declared, (u, None, w), x, mask, given, b, h, need, a
            ),
        )


def with_bounds(engine, declared, dtype) -> Iterator:
    """Yield the launches of rows and their bound."""
    from fastvae.ops.reduce import BoundReduction

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    counter = tensor(1, dtype=torch.int32)
    for k, b, x in ((5, 128, 784), (1, 128, 784), (1, 2, 6144)):
        data, given = tensor(b, x), [tensor(k, b, x, dtype=dtype) for _ in declared.outputs]
        for over, term, beta in (
            ("log_mean_exp", tensor(k, b, dtype=wide), None),
            ("mean", tensor(b, dtype=wide), tensor(b, dtype=wide)),
        ):
            how = BoundReduction(-0.5 if beta is None else 1.0, over, "mean" if beta is None else "none")
            yield (
                f"{declared.name}_log_prob and its bound {str(dtype)[6:]} [{k}, {b}, {x}], {over}",
                lambda d=data, g=given, t=term, b=beta, h=how: engine.log_prob_bound(
                    declared, d, g, t, b, h, counter
                ),
            )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a label and a call for every kernel, in the relevant configurations: dtypes, flags, shapes."""
    from fastvae.kernels import likelihood, logsumexp, normal_diagonal, random, reduce
    from fastvae.kernels.likelihood_parameters import is_heavy
    from fastvae.likelihoods.declared import DECLARED
    from fastvae.ops.normal_arguments import Draw, Form
    from fastvae.ops.reduce import BoundReduction

    def draw_in(form, k):
        return Draw(k, 0, 0, form.logvar_min, form.logvar_max, scale=form.scale, floor=form.floor)

    seed = tensor(dtype=torch.int64)
    free, clamped = Form(), Form(-10.0, 4.0)
    softplus = Form(scale="softplus")
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64

    yield "normal", lambda: random.normal(seed, 50, 128, 64)
    yield "normal, float64", lambda: random.normal(seed, 50, 128, 64, dtype=f64)
    yield "normal, qmc", lambda: random.normal(tensor(8, dtype=torch.int64), 50, 128, 64)
    yield "words", lambda: random.words(seed, 50, 128, 64)
    shapes = ((50, 1024, 64), (50, 4, 32), (50, 64, 2048), (1, 65536, 64), (1, 2, 196608), (1, 8192, 784))
    for dtype, prior, form, sizes in (
        (f32, False, free, shapes),
        (bf16, True, clamped, ((50, 1024, 64), (50, 64, 2048), (1, 65536, 64))),
        (f64, True, free, ((50, 128, 64),)),
        (f32, False, softplus, ((50, 1024, 64), (1, 65536, 64))),
        (bf16, True, softplus, ((50, 1024, 64),)),
        (f64, True, softplus, ((50, 128, 64),)),
    ):
        for k, b, d in sizes:
            q = (tensor(b, d, dtype=dtype), tensor(b, d, dtype=dtype))
            p = q if prior else (None, None)
            wide = f64 if dtype == f64 else f32
            grad_z, grad_ratio = tensor(k, b, d, dtype=dtype), tensor(k, b, dtype=wide)
            grad_kl = tensor(b, dtype=wide)
            need = [True, True, prior, prior]
            arguments = (*q, *p, seed, draw_in(form, k))
            label = f"{str(dtype)[6:]} [{k}, {b}, {d}]" + (
                "" if form.scale == "logvar" else f", {form.scale}"
            )
            yield f"rsample_kl {label}", lambda a=arguments: normal_diagonal.rsample_kl(*a, False)
            yield (
                f"rsample_log_ratio {label}",
                lambda a=arguments: normal_diagonal.rsample_log_ratio(*a, "iwae"),
            )
            yield (
                f"rsample_kl_backward {label}",
                lambda a=arguments, n=need, z=grad_z, g=grad_kl: normal_diagonal.rsample_kl_backward(
                    z, g, *a, n
                ),
            )
            for path, weight in ((False, None), (True, grad_ratio)):
                yield (
                    f"rsample_log_ratio_backward {label}, path={path}",
                    lambda a=arguments, n=need, z=grad_z, g=grad_ratio, w=weight, p=path: (
                        normal_diagonal.rsample_log_ratio_backward(z, g, w, *a, p, n)
                    ),
                )
    q = (tensor(128, 64), tensor(128, 64))
    yield (
        "rsample_kl float32 [1, 128, 64], per dimension",
        lambda: normal_diagonal.rsample_kl(*q, None, None, seed, draw_in(free, 1), True),
    )
    # A likelihood's parameters after the first: one per element, per pixel or per row; the needed gradients.
    full, column, row = (lambda k, b, x: (k, b, x)), (lambda k, b, x: (1, 1, x)), (lambda k, b, x: (1, 1, 1))
    for dtype, size, layouts in (
        (f32, (50, 128, 784), (full, column, row)),
        (bf16, (50, 128, 784), (full, column, row)),
        (f64, (50, 128, 784), (full, column, row)),
        (f32, (1, 4096, 64), (full, row)),
        (f32, (1, 65536, 64), (column,)),
        (f32, (1, 8, 196608), (full,)),
    ):
        for declared in DECLARED.values():
            alone = len(declared.outputs) == 1
            # Heavy likelihoods take long to compile: two forms only.
            chosen = layouts
            if is_heavy(declared.name):
                chosen = (full, column)[: 2 if dtype == f32 and size[0] > 1 else int(size[0] > 1)]
            for layout in (full,) if alone else chosen:
                needs = [alone, not alone and layout is column] if alone else [layout is column]
                needs = sorted({n and declared.differentiable for n in needs})
                yield from of_likelihood(likelihood, declared, dtype, size, layout(*size), needs)
        if dtype != f64 and size[0] > 1:
            for declared in DECLARED.values():
                if declared.takes_integers and not (is_heavy(declared.name) and dtype == bf16):
                    yield from of_likelihood(likelihood, declared, dtype, size, size, [False], torch.uint8)
    for declared in DECLARED.values():
        # Masks: of all, and for the common ones in all ways.
        size, common = (50, 128, 784), declared.name in ("bernoulli", "gaussian", "poisson")
        for dtype in (f32, bf16, f64) if common else (f32,):
            needs = sorted({False, common and declared.differentiable})
            yield from of_likelihood(likelihood, declared, dtype, size, size, needs, masked=True)
        for dtype in (f32, bf16, f64) if common else (f32,):
            yield from with_bounds(likelihood, declared, dtype)
    yield from softmax_launches((f32, bf16, f64))
    yield from components_launches((f32, bf16, f64))
    yield from mixture_launches((f32, f64))
    yield from aggregate_launches((f32, f64))
    yield from full_launches((f32, bf16, f64))
    yield from head_launches((f32, bf16))
    for dtype in (f32, bf16, f64):
        for k, n in ((5000, 128), (50, 65536)):
            log_w, column = tensor(k, n, dtype=dtype), tensor(n, dtype=f64 if dtype == f64 else f32)
            label = f"{str(dtype)[6:]} [{k}, {n}]"
            yield f"log_mean_exp {label}", lambda w=log_w: logsumexp.log_mean_exp(w)
            yield (
                f"log_mean_exp_backward {label}",
                lambda w=log_w, c=column: logsumexp.log_mean_exp_backward(c, w, c, c),
            )
    for dtype in (f32, f64):
        for k, b in ((1, 1024), (50, 128), (5000, 16)):
            likelihood, row = tensor(k, b, dtype=dtype), tensor(b, dtype=dtype)
            parts = tensor(7, k, b, dtype=dtype)
            beta = None if k == 50 else row
            for how, term, weights in (
                (BoundReduction(-1.0, "mean", "none" if k == 50 else "mean"), row, None),
                (BoundReduction(1.0, "log_mean_exp", "none"), likelihood, likelihood),
            ):
                label = f"{str(dtype)[6:]} [{k}, {b}], {how.over}, {how.reduction}"
                yield (
                    f"reduce {label}",
                    lambda v=likelihood, t=term, b=beta, h=how: reduce.reduce(v, t, b, h, True),
                )
                yield (
                    f"reduce of parts {label}",
                    lambda v=parts, t=term, b=beta, h=how: reduce.reduce(v, t, b, h, True),
                )
                yield (
                    f"reduce_backward {label}",
                    lambda g=row, w=weights, b=beta, h=how, n=(k, b), t=term: reduce.reduce_backward(
                        g, None, w, b, h, *n, t.dim()
                    ),
                )
    yield from odd_launches()


def softmax_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for classes of pixels and of tokens, classes last or not, and for counts of clicks."""
    from fastvae.kernels import categorical, multinomial

    for dtype in dtypes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for n, c, p, last in (
            (64, 256, 784, False),
            (320, 5000, 32, True),
            (500, 8, 1, True),
            (500, 3, 40, True),
        ):
            x, logits = tensor(n, p), tensor(n, *((p, c) if last else (c, p)), dtype=dtype)
            sums = tensor(n, dtype=wide), tensor(n, p, dtype=wide)
            label = f"{str(dtype)[6:]} {list(logits.shape)}{' classes last' if last else ''}"
            given = (x, None, logits, last, -100)
            yield f"categorical {label}", lambda a=given: categorical.categorical_log_prob(*a)
            yield (
                f"categorical_backward {label}",
                lambda a=given, s=sums: categorical.categorical_log_prob_backward(*s, *a),
            )
        x, logits, wide_sums = tensor(500, 20), tensor(500, 160, dtype=dtype), tensor(500, 20, dtype=wide)
        table = (x, torch.arange(0, 161, 8, device=x.device), logits, True, -100)
        label, column = f"{str(dtype)[6:]} [500, 160] of 20 columns", tensor(500, dtype=wide)
        yield f"categorical {label}", lambda a=table: categorical.categorical_log_prob(*a)
        yield (
            f"categorical_backward {label}",
            lambda a=table, s=wide_sums, g=column: categorical.categorical_log_prob_backward(g, s, *a),
        )
        for n, size, masked in ((500, 4000, False), (500, 4000, True), (1000, 30, False)):
            x, logits = tensor(n, size), tensor(n, size, dtype=dtype)
            mask = tensor(n, size, dtype=torch.bool) if masked else None
            counts = (x, None, None, mask, logits)
            column = tensor(n, dtype=wide)
            label = f"{str(dtype)[6:]} {list(logits.shape)}{' masked' if masked else ''}"
            yield f"multinomial {label}", lambda a=counts: multinomial.multinomial_log_prob(*a, True)
            yield (
                f"multinomial_backward {label}",
                lambda a=counts, g=column: multinomial.multinomial_log_prob_backward(g, g, g, *a),
            )


def components_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for mixtures of colours and of grey."""
    from fastvae.kernels import components

    for dtype in dtypes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for n, c, channels, p in ((64, 10, 3, 1024), (50, 10, 1, 784)):
            x, logits = tensor(n, channels, p), tensor(n, c, p, dtype=dtype)
            sums = tensor(n, dtype=wide), tensor(n, p, dtype=wide), tensor(n, p, dtype=wide)
            others = [tensor(n, c * channels, p, dtype=dtype)] * 2
            coupling = others[0] if channels == 3 else None
            arguments = (x, logits, *others, coupling, 1 / 255)
            need = [False, *[t is not None for t in arguments[1:-1]]]
            label = f"{str(dtype)[6:]} [{n}, {c}, {channels}, {p}]"
            yield (
                f"discretized_logistic_mixture {label}",
                lambda a=arguments: components.discretized_logistic_mixture_log_prob(*a),
            )
            yield (
                f"discretized_logistic_mixture_backward {label}",
                lambda a=arguments, s=sums, o=need: components.discretized_logistic_mixture_log_prob_backward(
                    *s, *a, o
                ),
            )


def mixture_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for a training batch with a VampPrior, many samples, and spatial latents."""
    from fastvae.kernels import mixture

    for dtype in dtypes:
        for n, u, d in ((128, 500, 50), (6400, 500, 64), (5000, 10, 2), (64, 100, 4096)):
            z, column = tensor(n, d, dtype=dtype), tensor(n, dtype=dtype)
            components = tensor(u, d, dtype=dtype), tensor(u, d, dtype=dtype), tensor(u, dtype=dtype)
            label = f"{str(dtype)[6:]} [{n}, {u}, {d}]"
            yield f"mixture_log_prob {label}", lambda z=z, c=components: mixture.mixture_log_prob(z, *c)
            yield (
                f"mixture_log_prob_backward {label}",
                lambda z=z, c=components, g=column: mixture.mixture_log_prob_backward(
                    g, g, g, z, *c, [True] * 4
                ),
            )


def aggregate_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for batches of training, with equal and stratified weights, and for a report."""
    from fastvae.kernels import aggregate

    for dtype in dtypes:
        for n, u, d, size in ((128, 128, 16, 0), (512, 512, 64, 60000), (2000, 5000, 50, 0)):
            z, each, column = (tensor(*s, dtype=dtype) for s in ((n, d), (n, d), (n,)))
            components = tensor(u, d, dtype=dtype), tensor(u, d, dtype=dtype)
            label = f"{str(dtype)[6:]} [{n}, {u}, {d}]{', stratified' if size else ''}"
            yield (
                f"aggregate_log_prob {label}",
                lambda z=z, c=components, s=size: aggregate.aggregate_log_prob(z, *c, s),
            )
            yield (
                f"aggregate_log_prob_backward {label}",
                lambda z=z, e=each, g=column, c=components, s=size: aggregate.aggregate_log_prob_backward(
                    g, e, g, e, z, *c, s, [True] * 3
                ),
            )


def full_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for full-covariance latents: few and many, and few rows of many samples."""
    from fastvae.kernels import normal_full
    from fastvae.ops.normal_full import Draw

    seed = tensor(dtype=torch.int64)
    for dtype in dtypes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for k, b, d in ((50, 128, 2), (50, 128, 50), (5000, 4, 64), (50, 128, 128), (1, 64, 300)):
            mu, tril = tensor(b, d, dtype=dtype), tensor(b, d * (d + 1) // 2, dtype=dtype)
            grads = tensor(k, b, d, dtype=dtype), tensor(k, b, dtype=wide)
            label, draw = f"{str(dtype)[6:]} {[k, b, d]}", Draw(k, 0, 0)
            yield f"rsample_tril {label}", lambda q=(mu, tril), d=draw: normal_full.rsample_tril(*q, seed, d)
            for need in ([True, True], [True, False]):
                yield (
                    f"rsample_tril_backward {label}, need={need}",
                    lambda g=grads, q=(mu, tril), d=draw, n=need: normal_full.rsample_tril_backward(
                        *g, *q, seed, d, n
                    ),
                )


def head_launches(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches for a decoder's last layer: one output, two, and one with a fixed parameter."""
    from fastvae.kernels import head
    from fastvae.kernels.likelihood_parameters import is_heavy
    from fastvae.likelihoods.declared import DECLARED

    for dtype in dtypes:
        for k, b, inner, size in ((50, 64, 200, 784), (50, 1024, 512, 3072)):
            for declared in DECLARED.values():
                one_is_enough = size > 784 or dtype != torch.float32
                if declared.name not in ("bernoulli", "gaussian") and one_is_enough:
                    continue
                # Heavy ones use torch's products; the named ones are like a Gaussian.
                if is_heavy(declared.name) or declared.name in (
                    "laplace",
                    "logistic",
                    "log_normal",
                ):
                    continue
                outputs = len(declared.outputs)
                least = len(declared.constants)
                for fixed_count in sorted({least, outputs - 1}) if declared.name == "gaussian" else [least]:
                    count = outputs - fixed_count
                    h, x = tensor(k * b, inner, dtype=dtype), tensor(b, size)
                    weights = (tensor(size, inner, dtype=dtype),) * count
                    row = tensor(size, dtype=dtype)
                    layers = SimpleNamespace(
                        weights=weights, biases=(row,) * count, constants=(row,) * fixed_count
                    )
                    label = f"{declared.name} {str(dtype)[6:]} [{k * b}, {inner}, {count}·{size}]"
                    yield (
                        f"linear_log_prob {label}",
                        lambda d=declared, x=x, h=h, g=layers: head.linear_log_prob(d, x, h, g),
                    )

    yield from _chains()


def _chains() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield evaluations of whole decoders of one to three hidden layers."""
    from fastvae.core.deferred import HiddenLayer
    from fastvae.kernels import chain
    from fastvae.likelihoods.declared import DECLARED

    k, b, latents, size = 200, 100, 50, 784
    cases = [(widths, "tanh") for widths in ((200,), (200, 200), (128, 256, 200))]
    cases += [((200, 200), "relu"), ((200, 200), "gelu")]
    for dtype in (torch.float16, torch.bfloat16):
        x, z = tensor(b, size), tensor(k * b, latents, dtype=dtype)
        for widths, activation in cases:
            pairs = zip((latents, *widths), widths, strict=False)
            hidden = [
                HiddenLayer(tensor(w, v, dtype=dtype), tensor(w, dtype=dtype), activation) for v, w in pairs
            ]
            for name in ("bernoulli", "gaussian"):
                declared = DECLARED[name]
                count = len(declared.outputs)
                layers = SimpleNamespace(
                    weights=(tensor(size, widths[-1], dtype=dtype),) * count,
                    biases=(tensor(size, dtype=dtype),) * count,
                    constants=(),
                    hidden=hidden,
                )
                sizes = "-".join(map(str, (latents, *widths, size)))
                label = f"chain {name} {str(dtype)[6:]} [{k * b}, {sizes}] {activation}"
                run = functools.partial(chain.chain_log_prob, declared, x, z, layers)
                yield label, run


# Common sizes, many not powers of two: latents of a pair (mu, logvar) chunked from one tensor, whose second
# half begins 8 bytes off for D = 50; events of 8 features to 2000 genes.
LATENTS = (2, 8, 10, 20, 50, 64, 100, 128)
EVENTS = (8, 64, 100, 784, 1568, 2000, 3072)


def odd_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield launches of those sizes, with a batch and number of samples that fill a GPU."""
    from fastvae.kernels import likelihood, normal_diagonal
    from fastvae.likelihoods.declared import DECLARED
    from fastvae.ops.normal_arguments import Draw

    seed, need = tensor(dtype=torch.int64), [True, True, False, False]
    for dtype in (torch.float32, torch.bfloat16):
        for d in LATENTS:
            for k, b in ((50, 1024), (1, 65536)):
                q = tensor(b, 2 * d, dtype=dtype).chunk(2, dim=1)
                given = (*q, None, None, seed, Draw(k, 0, 0, -math.inf, math.inf))
                z = tensor(k, b, d, dtype=dtype)
                label = f"{str(dtype)[6:]} [{k}, {b}, {d}], chunked"
                if k == 1:
                    yield f"rsample_kl {label}", lambda g=given: normal_diagonal.rsample_kl(*g, False)
                    yield (
                        f"rsample_kl_backward {label}",
                        lambda g=given, z=z, b=b: normal_diagonal.rsample_kl_backward(z, tensor(b), *g, need),
                    )
                else:
                    yield (
                        f"rsample_log_ratio {label}",
                        lambda g=given: normal_diagonal.rsample_log_ratio(*g, "iwae"),
                    )
                    yield (
                        f"rsample_log_ratio_backward {label}, path=False",
                        lambda g=given, z=z, k=k, b=b: normal_diagonal.rsample_log_ratio_backward(
                            z, tensor(k, b), None, *g, False, need
                        ),
                    )
        for x in EVENTS:
            for declared in DECLARED.values():
                # All share the loops: other likelihoods than these, which compile fast, have one size.
                if declared.name not in ("bernoulli", "gaussian", "poisson") and x != 2000:
                    continue
                yield from of_likelihood(likelihood, declared, dtype, (50, 1024, x), (50, 1024, x), [False])


class Fixed(int):
    """Number that is a compile-time constant."""


def named(kernel, args: tuple, kwargs: dict) -> tuple[dict, dict]:
    """Split the arguments of ``JITFunction.run`` into arguments by name, and options."""
    import triton.language as tl

    names = kernel.arg_names
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    arguments = {n: Fixed(v.value) if isinstance(v, tl.constexpr) else v for n, v in given.items()}
    return arguments, {n: v for n, v in kwargs.items() if n not in names}


def recorded(call: Callable[[], object]) -> list[tuple]:
    """Return the kernels that a call would launch: (kernel, arguments by name, options, grid)."""
    import triton

    from fastvae.kernels import launching

    found = []

    def run(self, *args, grid, warmup, **kwargs):
        found.append((self, *named(self, args, kwargs), grid))

    # Other targets have other warp sizes, and each shape is to be compiled as for a first call.
    launching.clear_caches()
    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        call()
    finally:
        triton.JITFunction.run = original
    return found


def specialisation(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """Return the launcher's specialisation: types, constants, and arguments known to be divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        known = parameter.is_constexpr or value is None or isinstance(value, Fixed)
        if known or (specialize and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = int(value) if isinstance(value, Fixed) else value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if _aligned(value.storage_offset() * value.element_size()) == 16:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


@functools.cache
def _settle_keys() -> None:
    """Make Triton hash every function after its callees.

    Otherwise its cache keys would depend on the order of launches, since a callee that is not hashed yet does
    not pass on the constants it uses.
    """
    from fastvae.kernels import (
        common,
        elementary,
        likelihood,
        likelihood_flat,
        logsumexp,
        normal_diagonal,
        normal_diagonal_backward,
        normal_tiles,
        random,
        reduce,
    )
    from fastvae.likelihoods.declared import DECLARED

    twins = [importlib.import_module(f"fastvae.kernels.likelihoods.{name}") for name in sorted(DECLARED)]
    for module in (
        common,
        elementary,
        random,
        normal_tiles,
        normal_diagonal_backward,
        normal_diagonal,
        *twins,
        logsumexp,
        reduce,
        likelihood_flat,
        likelihood,
    ):
        for value in vars(module).values():
            if hasattr(value, "cache_key"):
                value.cache_key  # noqa: B018


def compiled(kernel, arguments: dict, options: dict, target: str):
    """Compile a launch for a target."""
    _settle_keys()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.driver import driver

    signature, constants, attributes = specialisation(kernel, arguments)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu, before = GPUTarget(*TARGETS[target]), driver._active
    # A kernel asks the driver for its target.
    driver.set_active(SimpleNamespace(get_current_target=lambda: gpu))
    try:
        # For NVIDIA only.
        options = {n: v for n, v in options.items() if n != "maxnreg" or gpu.backend == "cuda"}
        return triton.compile(source, target=gpu, options=options)
    finally:
        driver.set_active(before)


def report(kernel, arguments: dict, options: dict, grid: tuple[int, ...], target: str, label: str) -> Report:
    """Compile one launch and analyse its code."""
    (found,) = _reports_of_one((kernel, arguments, options), [(arguments, grid, label)], target, True)
    return found


def _reports_of_one(program: tuple, launches: list[tuple], target: str, count: bool) -> list[Report]:
    """Compile one program, (kernel, arguments, options), and report on each of its launches.

    With ``count``, its instructions are counted too.
    """
    kernel, arguments, options = program
    code = compiled(kernel, arguments, options, target)
    backend, capability, threads = TARGETS[target]
    threads *= options.get("num_warps", 4)
    if backend == "hip":
        text = code.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        # Spilled scalar registers go to a vector's lanes, not to memory.
        registers, spills = field("vgpr_count"), field("vgpr_spill_count")
        widths = _amd_widths(text)
        occupancy = AMD_REGISTERS // _rounded(registers) / AMD_WAVES
        loops = _loops(*_instructions(text, *AMD))
    else:
        registers, spills, assembly = _assembled(code.asm["ptx"], capability, count)
        pointers = [p.name for p in kernel.params if isinstance(arguments[p.name], torch.Tensor)]
        widths = access_widths(code.asm["ptx"], pointers)
        occupancy = REGISTERS // (threads * _rounded(registers)) * threads / THREADS
        loops = _loops(*_instructions(assembly, *NVIDIA))
    common = {
        "kernel": kernel.__name__,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared": code.metadata.shared,
        "occupancy": min(1.0, occupancy),
        "widths": widths,
    }
    return [
        Report(launch=label, **common, **_costs(a, grid, threads, loops, widths, count))
        for a, grid, label in launches
    ]


def _costs(
    arguments: dict, grid: tuple[int, ...], threads: int, loops: tuple, widths: dict[str, int], count: bool
) -> dict:
    """Return the report's fields that depend on shapes: instructions per element, large arguments."""
    per_thread, steps, k_steps, waste = _tiling(arguments, grid, threads)
    inner, outer, all_ = loops

    def of_element(count: Callable[[list[str]], float]) -> float:
        i, o, a = map(count, (inner, outer, all_))
        shared = (o - i) / k_steps + (a - o) / steps if inner else a
        return (i + shared) / per_thread * waste

    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    largest = max(t.numel() for t in tensors.values())
    # One tensor under several names stands for several tensors.
    moved = sum(t.numel() * t.element_size() for t in tensors.values()) / largest
    large = {n: _widest(t) for n, t in tensors.items() if t.dim() and 32 * t.numel() >= largest}
    if "widest" in widths:  # of all
        large = {"widest": max(_widest(t) for t in tensors.values() if t.numel() == largest)} if large else {}
    counts = {
        "loop": round(len(inner) / per_thread, 1),
        "instructions": round(of_element(len), 1),
        "bytes": round(moved, 1),
    }
    return {
        "narrow": [n for n, most in large.items() if widths.get(n, 0) < most],
        **(counts if count else dict.fromkeys(counts, math.nan)),
    }


def _aligned(*numbers: int) -> int:
    """Return the largest power of two, up to 16, that divides all the byte counts."""
    return math.gcd(16, *numbers)


def _widest(t: torch.Tensor) -> int:
    """Return the maximum bytes of a row accessible at once: no access may straddle rows, or 16 bytes."""
    size = t.element_size()
    return _aligned(*(size * n for n in (t.storage_offset(), t.shape[-1], *t.stride()[:-1])))


def _rounded(registers: int) -> int:
    """Round up to the allocation unit of eight registers."""
    return 8 * math.ceil(registers / 8)


def _tiling(arguments: dict, grid: tuple[int, ...], threads: int) -> tuple[float, float, float, float]:
    """Return elements of a tile per thread; tiles of a program, in total and along K; lanes per element."""
    blocks = {n.removeprefix("BLOCK_"): v for n, v in arguments.items() if n.startswith("BLOCK")}
    sizes = {n: arguments.get(n, block) for n, block in blocks.items()}
    tiles = {n: math.ceil(size / blocks[n]) for n, size in sizes.items()}
    tile = math.prod(blocks.values()) * arguments.get("VECTOR", 1)
    steps = math.prod(tiles.values()) / math.prod(grid)
    k_steps = math.ceil(min(sizes.get("K", 1), arguments.get("k_per_program", 1)) / blocks.get("K", 1))
    waste = math.prod(tiles.values()) * math.prod(blocks.values()) / math.prod(sizes.values())
    return max(tile / threads, 1.0), max(steps, 1.0), max(k_steps, 1), waste


def _assembled(ptx: str, capability: int, disassemble: bool) -> tuple[int, int, str]:
    """Return registers and spilled bytes per thread, and the disassembly, by NVIDIA's assembler.

    Disassembling takes ten times as long as the rest.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        arch = f"-arch={sm_arch_from_capability(capability)}"
        log = _output([get_ptxas(capability).path, "-v", arch, source, "-o", binary])
        assembly = _output([knobs.nvidia.nvdisasm.path, "-c", binary]) if disassemble else ""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return int(re.search(r"Used (\d+) registers", log)[1]), spills, assembly


def _output(command: list) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def access_widths(ptx: str, pointers: list[str]) -> dict[str, int]:
    """Return the minimum bytes that a thread loads or stores at once through each pointer argument.

    An address is traced back to the argument that it was computed from.
    """
    # PTX numbers the arguments in the order of the pointers among all.
    declared = re.findall(
        r"\.param \.\w+ (\.ptr)?[^\n]*?_param_(\d+)", ptx.partition(".entry")[2].partition("{")[0]
    )
    numbers = [n for is_pointer, n in declared if is_pointer]
    names = dict(zip(numbers, pointers, strict=False))
    origin: dict[str, str] = {}
    lines = ptx.splitlines()
    for _ in range(3):  # loop-carried addresses are known in the second pass
        for line in lines:
            if m := re.search(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
                if m[2] in names:
                    origin[m[1]] = names[m[2]]
            elif (m := re.search(r"(?:add|sub|mov|mad|selp|cvta|or)[\w.]*\s+(%rd\d+), (.+);", line)) and m[
                1
            ] not in origin:
                known = [origin[r] for r in re.findall(r"%rd\d+", m[2]) if r in origin]
                if known:
                    origin[m[1]] = known[0]
    widths: dict[str, int] = {}
    for line in lines:
        if m := re.search(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\s.*?\[ ?(%rd\d+)", line):
            name = origin.get(m[3], m[3])
            width = int(m[1] or 1) * int(m[2]) // 8
            widths[name] = min(widths.get(name, width), width)
        elif m := re.search(
            r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[ (%rd\d+).*?\], (0x[0-9a-f]+)", line
        ):
            name = origin.get(m[1], m[1])
            widths[name] = min(widths.get(name, 16), int(m[2], 16))
    return widths


def _amd_widths(text: str) -> dict[str, int]:
    """Return the maximum bytes that a thread loads or stores at once."""
    units = {"dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    found = re.findall(r"\b(?:global|buffer)_(?:load|store)_(dword|u?short|u?byte)(?:x(\d))?", text)
    return {"widest": max((units[unit] * int(n or 1) for unit, n in found), default=0)}


# Patterns of an instruction without its predicate, and of a label, in NVIDIA's and in AMD's disassembly.
NVIDIA = (r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(\S.*?)\s*;", r"(\.L_x_\d+):")
AMD = (r"\s+((?:[vs]|ds|global|buffer)_\w.*)", r"(\.LBB\d+_\d+):")


def _instructions(assembly: str, instruction: str, label: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions, and each label's index among them."""
    instructions, labels = [], {}
    for line in assembly.splitlines():
        if m := re.match(instruction, line):
            instructions.append(m[1])
        elif m := re.match(label, line):
            labels[m[1]] = len(instructions)
    return instructions, labels


def _loops(instructions: list[str], labels: dict[str, int]) -> tuple[list[str], list[str], list[str]]:
    """Return the longest innermost loop, the outermost loop around it, and all instructions."""
    loops = []
    for i, text in enumerate(instructions):
        m = re.match(r"(?:BRA|s_c?branch)\S*.*?(\.L\w+)", text)
        # A kernel ends with a branch to itself.
        if m and labels.get(m[1], i) < i:
            loops.append((labels[m[1]], i + 1))

    def within(a, b):
        return b[0] <= a[0] and a[1] <= b[1]

    def length(loop):
        return loop[1] - loop[0]

    innermost = [a for a in loops if not any(a != b and within(b, a) for b in loops)]
    inner = max(innermost, key=length, default=(0, 0))
    outer = max((a for a in loops if within(inner, a)), key=length, default=(0, 0))
    return instructions[slice(*inner)], instructions[slice(*outer)], instructions


def _programs(target: str, patterns: list[re.Pattern]) -> list[list[tuple[int, int]]]:
    """Return launches grouped by compiled program, as (index of the call, index of the launch in it)."""
    from fastvae.kernels import common

    common.LANES = TARGETS[target][2]
    programs: dict[str, list[tuple[int, int]]] = {}
    for i, (label, call) in enumerate(launches()):
        # float64 for one target only: it is not tuned.
        if (target == "sm_90" or "float64" not in label) and all(
            p.search(f"{target} {label}") for p in patterns
        ):
            for j, (kernel, arguments, options, _) in enumerate(recorded(call)):
                key = f"{kernel.__name__} {specialisation(kernel, arguments)} {options}"
                programs.setdefault(key, []).append((i, j))
    return list(programs.values())


def _reports(job: tuple[str, list[tuple[int, int]], re.Pattern]) -> list[Report]:
    """Compile one program for one target, and report on its launches."""
    from fastvae.kernels import common

    target, numbers, counted = job
    common.LANES = TARGETS[target][2]
    calls = list(launches())
    found = [(calls[i][0], recorded(calls[i][1])[j]) for i, j in numbers]
    (kernel, arguments, options, _) = found[0][1]
    shapes = [(launch[1], launch[3], label) for label, launch in found]
    count = any(counted.search(f"{target} {label}") for *_, label in shapes)
    return _reports_of_one((kernel, arguments, options), shapes, target, count)


def reports(patterns: list[str] = (), jobs: int | None = None, counted: str = "") -> Iterator[Report]:
    """Yield a report for every launch and target whose "target label" all the patterns match.

    Instructions are counted where ``counted`` matches.
    """
    chosen = [re.compile(p) for p in patterns]
    work = [
        (target, numbers, re.compile(counted)) for target in TARGETS for numbers in _programs(target, chosen)
    ]
    jobs = jobs or min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(_reports, work):
            yield from found


HEAD = (
    f"{'target':7} {'kernel and launch':91} {'reg':>3} {'occ':>4} {'spill':>5} {'shared':>6}"
    f" {'loop':>6} {'instr':>6} {'bytes':>5}  narrowest access"
)


def row(r: Report) -> str:
    widths = " ".join(f"{n.removeprefix('p_')} {w}" for n, w in r.widths.items())
    name = r.launch if r.launch.partition(" ")[0] in r.kernel else f"{r.kernel}: {r.launch}"
    return (
        f"{r.target:7} {name:91} {r.registers:3} {r.occupancy:4.0%} {r.spills:5} {r.shared:6}"
        f" {r.loop:6.1f} {r.instructions:6.1f} {r.bytes:5.1f}  {widths}"
        + (f"  ◄ narrow: {', '.join(r.narrow)}" if r.narrow else "")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description="Compile every Triton kernel as it is launched, without a GPU, and print its resources: "
        "registers per thread (reg) and the share of a multiprocessor's threads that they allow (occ); "
        "bytes spilled and shared; instructions per element, in the innermost loop and in total (loop, "
        "instr); bytes per element; and the narrowest access of a thread to each argument. "
        "`python -m tools.predict` predicts the times.",
    )
    parser.add_argument("patterns", nargs="*", help='regular expressions that "target launch" must match')
    parser.add_argument(
        "--count",
        default="",
        metavar="PATTERN",
        help="count instructions only where this matches; counting takes most of the time",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of the table")
    parser.add_argument(
        "--jobs", type=int, help="number of processes; default: the number of processors, at most 8"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    if not options.json:
        print(HEAD)
    for r in reports(options.patterns, options.jobs, options.count):
        print(json.dumps(asdict(r)) if options.json else row(r), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
