"""The code that the compiler emits for NVIDIA's cards, run without one, computes what the definition says."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# In a process of its own: with TRITON_INTERPRET set, as the other tests need it, nothing is compiled.
SCRIPT = """
import math, sys
import torch
import fastvae
from fastvae import ops
from tests.compare import assert_accurate
from tests.ptx import emulated

target, group = sys.argv[1:]
torch.manual_seed(3)
seed = torch.tensor(-1234567890123456789)
f32, bf16 = torch.float32, torch.bfloat16


def compare(name, function, inputs, scales):
    # The results of function(*inputs) and their gradients against float64, beside plain PyTorch. ``scales``
    # of the exact results and the inputs gives the magnitudes of the terms that each is the sum of.
    def run(dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        weights = [torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
        loss = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        grads = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])
        return [r.detach() for r in (*results, *grads)]

    with emulated(target) as ran, fastvae.use_backend("triton"):
        actual = run()
    assert len(ran) >= 2, ran
    with fastvae.use_backend("reference"):
        eager, exact = run(), run(torch.float64)
    sizes = scales(exact, *(t.detach().double() for t in inputs))
    for i, (a, e, x, s) in enumerate(zip(actual, eager, exact, sizes, strict=True)):
        # On a card PyTorch's own exp is off by an ulp, before anything is done with it.
        assert_accurate(f"{name}: result {i}", a, e, x, s.broadcast_to(x.shape), least=2)
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
        options = {n: v for n, v in extra.items() if n != "prior"} | {"samples": k, "seed": seed}

        def call(op, mu, logvar, *prior, **more):
            return op(mu, logvar, prior=prior or None, **options, **more)

        zero = torch.zeros(b, d, dtype=torch.float64)

        def scales(exact, mu, logvar, prior_mu=zero, prior_logvar=zero):
            logvar = logvar.clamp(*extra.get("logvar_range", (-99, 99)))
            sigma, precision = torch.exp(0.5 * logvar), torch.exp(-prior_logvar)
            z, delta = exact[0], (mu - prior_mu).abs()
            eps, far = ((z - mu) / sigma).abs(), (z - prior_mu).abs()
            pull = 1.5 * (1 + far * precision + eps / sigma)
            logs = logvar.abs() + prior_logvar.abs()
            spread = delta**2 * precision + torch.exp(logvar - prior_logvar) + 1 + logs
            ratio = eps**2 + far**2 * precision + logs
            second = (spread if exact[1].dim() == 1 else ratio).sum(-1)
            grads = [
                pull.sum(0) + 1.5 * delta * precision,
                (0.5 * sigma * eps * pull + 1.5).sum(0) + spread,
                (1.5 * far * precision).sum(0) + 1.5 * delta * precision,
                (far**2 * precision + 1.5).sum(0) + spread,
            ]
            return [sigma * eps + mu.abs(), second, *grads[: len(exact) - 2]]

        name = f"[{k}, {b}, {d}], {dtype}"
        compare(f"rsample_kl {name}", lambda *t: call(ops.rsample_kl, *t), inputs, scales)
        for estimator in ("iwae", "stl"):
            compare(
                f"rsample_log_ratio {name}, {estimator}",
                lambda *t, e=estimator: call(ops.rsample_log_ratio, *t, estimator=e),
                inputs,
                scales,
            )


def likelihoods():
    shapes = ((3, 5, 80, f32), (2, 6, 131, f32), (1, 2, 1500, f32), (5, 3, 64, bf16), (1, 33, 3, f32))
    for k, b, x, dtype in shapes:
        data = torch.rand(b, x)
        (mean,) = leaves(1, k, b, x, dtype=dtype, scale=3.0)

        def of_coins(exact, data, logits):
            return [(torch.nn.functional.softplus(-logits.abs()) + logits.abs()).sum(-1), 1.5 + 0 * logits]

        compare(f"bernoulli [{k}, {b}, {x}], {dtype}", ops.bernoulli_log_prob, (data, mean), of_coins)
        for shape in ((k, b, x), (x,), ()):
            (logvar,) = leaves(1, *shape, dtype=dtype)

            def of_normals(exact, data, mean, logvar):
                square = (data - mean) ** 2 * torch.exp(-logvar)
                slope = (data.abs() + mean.abs()) * torch.exp(-logvar)
                grads = [1.5 * slope, (1.5 * (square + 1)).sum_to_size(logvar.shape)]
                if len(exact) == 4:
                    grads.insert(0, slope.sum(0) * 1.5)
                return [(2 + logvar.abs() + square).sum(-1), *grads]

            name = f"gaussian [{k}, {b}, {x}], {dtype}, {list(shape)}"
            compare(name, ops.gaussian_log_prob, (data, mean, logvar), of_normals)
            if shape == (x,):
                inputs = (data.clone().requires_grad_(), mean, logvar)
                compare(name + ", x", ops.gaussian_log_prob, inputs, of_normals)


def importance():
    for k, n in ((70, 5), (3000, 3), (5, 600), (50, 17)):
        (log_w,) = leaves(1, k, n, scale=20.0)
        with torch.no_grad():
            log_w[:, 1] = -math.inf
            log_w[k // 2, 2] = -math.inf

        def scales(exact, log_w):
            return [1 + exact[0].abs(), 1.5 + 0 * exact[1]]

        compare(f"log_mean_exp [{k}, {n}]", ops.log_mean_exp, (log_w,), scales)
    log_w = torch.tensor([[math.inf, 0.0], [1.0, math.nan]])
    with emulated(target), fastvae.use_backend("triton"):
        bound = ops.log_mean_exp(log_w)
    assert bound[0] == math.inf and bound[1].isnan()


def noise():
    from fastvae.kernels import random
    from fastvae.reference import random as reference

    with emulated(target):
        words = random.words(seed, 3, 5, 40, 2**31 + 7, 2**32 - 9)
        normals = random.normal(seed, 40, 6, 70)
    # The same integers, bit by bit.
    assert torch.equal(words, reference.words(seed, 3, 5, 40, 2**31 + 7, 2**32 - 9))
    exact = reference.normal(seed, 40, 6, 70, dtype=torch.float64)
    ulps = ((normals - exact).abs() / (torch.finfo(f32).eps * exact.abs())).max()
    print(f"normals: {float(ulps):.2f} eps")
    assert ulps <= 4


{"latent": latent, "likelihoods": likelihoods, "importance": importance, "noise": noise}[group]()
print("fine")
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("group", ["noise", "latent", "likelihoods", "importance"])
def test_emitted_code(target, group):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, target, group],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.stdout.endswith("fine\n"), run.stderr[-4000:]
