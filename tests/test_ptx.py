"""The code emitted for NVIDIA's GPUs, emulated without one, computes the definitions."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# In a separate process: with TRITON_INTERPRET set, as the other tests need it, nothing is compiled.
SCRIPT = """
import math, sys
import torch
import fastvae
from fastvae import ops
from fastvae.ops.head import Layers, linear_rows
from fastvae.ops.reduce import BoundReduction, reduce
from fastvae.reference import random as reference
from tests import cases, formulas
from tests.compare import Rounded, assert_accurate
from tests.ptx import emulated

(target,) = sys.argv[1:]
torch.manual_seed(3)
seed = torch.tensor(-1234567890123456789)
f32, bf16 = torch.float32, torch.bfloat16


def compare(name, function, inputs, expected):
    # Compare the results of function(*inputs) and their gradients with plain PyTorch's. ``expected`` maps the
    # upstream gradients to the expected results and gradients of the inputs.
    def run():
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        arriving = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        grads = torch.autograd.grad(results, [t for t in leaves if t.requires_grad], arriving)
        return [r.detach() for r in (*results, *grads)], arriving

    with emulated(target) as ran, fastvae.use_backend("triton"):
        actual, arriving = run()
    assert len(ran) >= 2, ran
    with fastvae.use_backend("reference"):
        eager, _ = run()
    for i, result in enumerate(zip(actual, eager, expected(*arriving), strict=True)):
        assert_accurate(f"{name}: result {i}", *result)
    print(name, *ran)


def leaves(count, *shape, dtype=f32, scale=1.0):
    return [(scale * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(count)]


def latent():
    for k, b, d, dtype, extra in (
        (1, 6, 40, f32, {}),
        (3, 5, 70, f32, {"prior": True}),
        (2, 1, 1100, f32, {}),
        (9, 3, 2, f32, {}),
        (3, 6, 64, bf16, {"prior": True, "logvar_range": (-1.0, 0.5)}),
    ):
        inputs = leaves(4 if extra.get("prior") else 2, b, d, dtype=dtype)
        clamp = {"logvar_range": extra.get("logvar_range")}
        eps = reference.normal(seed, k, b, d, dtype=torch.float64)

        def call(op, mu, logvar, *prior, **more):
            return op(mu, logvar, prior=prior or None, k=k, seed=seed, **clamp, **more)

        def expected(grad_z, grad, second, arrives, **more):
            tensors = [t.detach() for t in inputs] + [None] * (4 - len(inputs))
            results, grads = formulas.rsample(tensors, eps, grad_z, **{arrives: grad}, **clamp, **more)
            return [results["z"], results[second], *grads[: len(inputs)]]

        name = f"[{k}, {b}, {d}], {dtype}"
        compare(
            f"rsample_kl {name}",
            lambda *t: call(ops.rsample_kl, *t),
            inputs,
            lambda *g: expected(*g, "kl", "grad_kl"),
        )
        for estimator in ("iwae", "stl"):
            compare(
                f"rsample_log_ratio {name}, {estimator}",
                lambda *t, e=estimator: call(ops.rsample_log_ratio, *t, estimator=e),
                inputs,
                lambda *g, e=estimator: expected(*g, "ratio", "grad_ratio", estimator=e),
            )


def likelihoods():
    shapes = ((3, 5, 80, f32), (2, 6, 131, f32), (1, 2, 1500, f32), (5, 3, 64, bf16), (1, 33, 3, f32))
    for k, b, x, dtype in shapes:
        for name, declared in cases.DECLARED.items():
            others = len(declared.outputs) - 1
            for shape in ((k, b, x), (x,), ()) if others else ((),):
                (first,) = leaves(1, k, b, x, dtype=dtype, scale=3.0)
                given = [first, *leaves(others, *shape, dtype=dtype)]
                data = cases.data(name, b, x).requires_grad_(declared.differentiable and shape in ((), (x,)))

                def expected(grad, name=name, inputs=(data, *given)):
                    out, grads = formulas.rows(name, *inputs, grad)
                    return [out, *(g for g, t in zip(grads, inputs, strict=True) if t.requires_grad)]

                label = f"{name} [{k}, {b}, {x}], {dtype}, {list(shape)}"
                compare(label, getattr(ops, f"{name}_log_prob"), (data, *given), expected)


def importance():
    for k, n in ((70, 5), (3000, 3), (5, 600), (50, 17)):
        (log_w,) = leaves(1, k, n, scale=20.0)
        with torch.no_grad():
            log_w[:, 1] = -math.inf
            log_w[k // 2, 2] = -math.inf
        name = f"log_mean_exp [{k}, {n}]"
        compare(name, ops.log_mean_exp, (log_w,), lambda g, w=log_w: formulas.log_mean_exp(w.detach(), g))
    for k, b, how in (
        (70, 5, BoundReduction(1.0, "log_mean_exp", "none")),
        (3, 11, BoundReduction(-0.7, "log_mean_exp", "mean")),
        (9, 4, BoundReduction(-0.7, "mean", "sum")),
    ):
        x, (logits,), (term,) = torch.rand(b, 6), leaves(1, k * b, 6), leaves(1, k, b, scale=5.0)
        beta = torch.rand(b) if how.reduction == "sum" else None

        def bound(logits, term):
            return reduce("bernoulli", x, (logits,), term, beta, how)[0]

        def expected(grad):
            rows = logits.detach().unflatten(0, (k, b))
            values, grads = formulas.reduce("bernoulli", x, [rows], term.detach(), beta, how, grad, None)
            flat = formulas.Rounded(grads[1].value.flatten(0, 1), grads[1].error.flatten(0, 1), grads[1].u)
            return [values[0], flat, grads[2]]

        compare(f"reduce [{k}, {b}], {how.over}", bound, (logits, term), expected)
    log_w = torch.tensor([[math.inf, 0.0], [1.0, math.nan]])
    with emulated(target), fastvae.use_backend("triton"):
        bound = ops.log_mean_exp(log_w)
    assert bound[0] == math.inf and bound[1].isnan()


def noise():
    from fastvae.kernels import random

    with emulated(target):
        words = random.words(seed, 3, 5, 40, 2**31 + 7, 2**32 - 9)
        normals = random.normal(seed, 40, 6, 70)
    # The same integers, bit by bit.
    assert torch.equal(words, reference.words(seed, 3, 5, 40, 2**31 + 7, 2**32 - 9))
    exact = reference.normal(seed, 40, 6, 70, dtype=torch.float64)
    ulps = ((normals - exact).abs() / (torch.finfo(f32).eps * exact.abs())).max()
    print(f"normals: {float(ulps):.2f} eps")
    assert ulps <= 4


def last_layer():
    k, b, inner, size = 5, 14, 23, 70
    x = torch.rand(b, size).round()
    for name, count in (("bernoulli", 1), ("gaussian", 2)):
        inputs = leaves(1, k * b, inner) + leaves(1, count * size, inner, scale=0.3) + leaves(1, count * size)

        def call(h, weight, bias):
            return linear_rows(name, x, Layers(h, weight, bias, None, None))

        def expected(grad):
            h, weight, bias = (t.detach() for t in inputs)
            made = formulas.linear(h, weight, bias, f32)
            parts = zip(made.value.split(size, 1), made.error.split(size, 1))
            rows = [Rounded(v.view(k, b, size), e.view(k, b, size), made.u) for v, e in parts]
            value, (_, *grads) = formulas.rows(name, x, *rows, grad)
            flat = [(g.value.flatten(0, 1), g.error.flatten(0, 1)) for g in grads]
            arrives = Rounded(*(torch.cat(part, 1) for part in zip(*flat)), made.u)
            return [value, *formulas.linear_backward(arrives, h, weight)]

        compare(f"last layer, {name}", call, inputs, expected)


for group in (noise, latent, likelihoods, importance, last_layer):
    group()
print("fine")
"""

# In a file, since Triton reads a kernel's source from its file.
FAST = """
import math, sys
import torch, triton
import triton.language as tl
from fastvae.kernels.random import box_muller
from tests.ptx import emulated

@triton.jit
def transform(p_u, p_v, p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x, b_y = box_muller(tl.load(p_u + o).to(tl.uint32), tl.load(p_v + o).to(tl.uint32), tl.float32)
    tl.store(p_x + o, b_x)
    tl.store(p_y + o, b_y)

(target,) = sys.argv[1:]
torch.manual_seed(4)
# Words at both ends, at what the branches compare with, at eighths of a turn, and anywhere.
edges = [base + sign * step for base in (0, 2**31, 2**32 - 2**24, 2**32) for sign in (-1, 1)
         for step in (0, 1, 2, 3, 5, 100, 2**9, 2**14, 2**20, 2**23 + 1)]
edges += [2**32 - 2**i for i in range(32)] + [2**i for i in range(32)]
edges += [i * 2**29 + j for i in range(9) for j in (-1, 0, 1)]
edges = torch.tensor([w for w in edges if 0 <= w < 2**32])
count = 2**14
u = torch.cat([edges, edges, torch.randint(2**32, (count - 2 * len(edges),))])
v = torch.cat([torch.randint(2**32, (len(edges),)), edges, torch.randint(2**32, (count - 2 * len(edges),))])
x, y = torch.empty(count), torch.empty(count)
with emulated(target):
    transform[(count // 512,)](u, v, x, y, BLOCK=512, num_warps=4)
f = u.double().add(0.5) / 2**32
# log1p where u is near 1.
radius = torch.where(u < 2**31, torch.log(f), torch.log1p(-(2**32 - u.double() - 0.5) / 2**32)).mul(-2).sqrt()
angle = 2 * math.pi * v.double().add(0.5) / 2**32
error = torch.stack([x - radius * angle.cos(), y - radius * angle.sin()]).abs().amax(0)
assert radius.max() > 6.6 and radius.min() < 2e-5
small = (error / radius)[u >= 2**32 - 2**24].max()
print(f"normals: {float(error.max()):.3g}, {float(small):.3g} of a small radius")
assert error.max() <= 1e-5 and small <= 2e-6
print("fine")
"""


def _run(target: str, *script: str, **variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, *script, target], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    print(run.stdout)
    assert run.stdout.endswith("fine\n"), run.stderr[-4000:]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_emitted_code_is_accurate(target):
    """The emitted code is accurate to its own roundings, with the noise that is accurate to ulps."""
    _run(target, "-c", SCRIPT, FASTVAE_NOISE="accurate")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_fast_normals_are_accurate(target, tmp_path):
    """Fast normals are within 1e-5 from the tail to the smallest radius, for the worst documented errors."""
    (tmp_path / "fast.py").write_text(FAST)
    _run(target, str(tmp_path / "fast.py"), FASTVAE_NOISE="fast")
