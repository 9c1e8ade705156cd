"""Signal-to-noise ratios of gradients: for known gradients, and compared with theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastvae
from fastvae.diagnostics import GradientMonitor, gradient_snr

from .conftest import DEVICE
from .models import LinearGaussian, generator, randn

pytestmark = pytest.mark.usefixtures("one_thread")

N = 40


def known(n=N, dtype=torch.float64):
    """Return gradients [n, 3] and [n, 2, 2], one element of which is always 0."""
    first, second = randn(n, 3, seed=1, dtype=dtype) + 2, 0.5 * randn(n, 2, 2, seed=2, dtype=dtype) - 1
    first[:, 1] = 0
    return first, second


def expected(first, second, weights=None):
    """Return snr and squared by definition, for gradients whose weights sum to 1."""
    n = len(first)
    w = torch.full((n,), 1 / n, dtype=torch.float64, device=DEVICE) if weights is None else weights
    squares = w.square().sum()
    parts = {"a.first": first.double(), "b": second.double().flatten(1)}
    snr, squared = {}, {}
    for name, g in parts.items():
        mean = w @ g
        variance = w @ (g - mean).square() / (1 - squares)
        ratios = (mean.abs() / variance.sqrt())[variance > 0]
        snr[name] = float(ratios.mean())
        squared[name] = float((mean.square().sum() - squares * variance.sum()) / variance.sum())
    return {**snr, "a": snr["a.first"]}, {**squared, "a": squared["a.first"]}, float(squares)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_equal_the_definition(dtype):
    first, second = known(dtype=dtype)
    p, q = torch.zeros(3, dtype=dtype, device=DEVICE), torch.zeros(2, 2, dtype=dtype, device=DEVICE)
    p.requires_grad_(), q.requires_grad_()
    p.grad = torch.ones_like(p)
    rows = iter(zip(first, second, strict=True))

    def bound():
        a, b = next(rows)
        return (p * a).sum() + (q * b).sum()

    found = gradient_snr(bound, {"a": {"first": p}, "b": q}, evaluations=N)
    snr, squared, squares = expected(first, second)
    # n roundings of the running mean and of the running square.
    rel = 4 * N * torch.finfo(dtype).eps
    assert found.snr == pytest.approx(snr, rel=rel) and found.squared == pytest.approx(squared, rel=rel)
    assert found.floor == pytest.approx(math.sqrt(2 / (math.pi * N))) and found.evaluations == pytest.approx(
        N
    )
    assert torch.equal(p.grad, torch.ones_like(p)) and q.grad is None
    assert "a.first" in str(found) and "40 evaluations" in str(found)


@pytest.mark.parametrize("window", [None, 7, 1000])
def test_a_monitor_averages_over_a_window(window):
    """A monitor averages over all steps at first, and then over a window."""
    first, second = known()
    p, q = (
        torch.zeros(t.shape[1:], dtype=t.dtype, device=DEVICE, requires_grad=True) for t in (first, second)
    )
    monitor = GradientMonitor([("a.first", p), ("b", q)], window=window)
    weights = torch.zeros(N, dtype=torch.float64, device=DEVICE)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        p.grad, q.grad = a, b
        monitor.update()
        share = 1 / (i + 1 if window is None else min(i + 1, window))
        weights *= 1 - share
        weights[i] = share
    found = monitor.result()
    snr, squared, squares = expected(first, second, weights)
    assert found.snr == pytest.approx(snr, rel=1e-11) and found.squared == pytest.approx(squared, rel=1e-11)
    assert found.evaluations == pytest.approx(1 / squares)
    monitor.reset()
    with pytest.raises(ValueError, match="two gradients or more.*got 0"):
        monitor.result()


def test_the_ratio_of_pure_noise_is_the_floor():
    """For 400 elements of noise, snr is within 6 standard errors of the floor, the pooled square of 0."""
    n, size = 50, 400
    noise = randn(n, size, seed=3, dtype=torch.float64)
    p = torch.zeros(size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    monitor = GradientMonitor({"p": p})
    for row in noise:
        monitor.update([row])
    found = monitor.result()
    # |N(0, 1/n)| has variance (1 − 2/π)/n; Student's t is wider by (n − 1)/(n − 3).
    error = math.sqrt((1 - 2 / math.pi) / n / size)
    assert abs(found.snr["p"] - found.floor) < 6 * error + found.floor / n
    assert abs(found.squared["p"]) < 6 * math.sqrt(2 / size) / n


def test_missing_gradients_count_as_0():
    module = nn.Linear(2, 2).to(DEVICE)
    module.bias.requires_grad_(False)
    unused = torch.zeros(3, device=DEVICE, requires_grad=True)
    found = gradient_snr(
        lambda: (module.weight * torch.randn(2, 2, device=DEVICE)).sum(),
        {"net": module, "shared": module, "unused": unused},
        evaluations=3,
    )
    assert set(found.snr) == {"net", "net.weight", "unused"}
    assert math.isnan(found.snr["unused"]) and math.isnan(found.squared["unused"])
    same = gradient_snr(lambda: module.weight.sum(), module, evaluations=2)
    assert same.snr["weight"] == math.inf and same.squared["weight"] == math.inf


@pytest.mark.parametrize(("estimator", "slope", "evaluations"), [("iwae", -1, 400), ("dreg", 1, 100)])
def test_slopes_over_k(estimator, slope, evaluations):
    """The encoder's squared ratio scales as 1/K with IWAE's gradient and as K with DReG's.

    The decoder's scales as K with both (Rainforth et al. 2018, theorem 1; Tucker et al. 2019).
    """
    model = LinearGaussian(2, 3)
    x = model.sample(100)
    mu, logvar = model.posterior(x, 1.0, 0.5)
    shift, stretch = (
        torch.zeros(2, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2)
    )
    weight = model.weight.clone().requires_grad_()
    noise = generator(11)

    def at(k):
        return gradient_snr(
            lambda: fastvae.iwae(
                x, (mu + shift, logvar + stretch), lambda z: z @ weight.T + model.offset, k=k,
                likelihood=model.likelihood, estimator=estimator, generator=noise,
            ),
            {"encoder": {"shift": shift, "stretch": stretch}, "decoder": weight},
            evaluations=evaluations,
        ).squared  # fmt: skip

    few, many = at(16), at(256)
    slopes = {name: math.log(many[name] / few[name]) / math.log(16) for name in ("encoder", "decoder")}
    # IWAE's ratio at K = 256 is about 0.35: 400 gradients give its mean to 7 standard errors, the slope to
    # 0.1. For the others the variances' error dominates, √(2/100) and less: 0.07. Four of these, plus a tenth
    # for the distance of K = 16 from the limit.
    assert abs(slopes["encoder"] - slope) < (0.5 if estimator == "iwae" else 0.4)
    assert abs(slopes["decoder"] - 1) < 0.4


def test_a_vae_is_reported_by_its_parts():
    vae = fastvae.VAE(nn.Linear(7, 6), nn.Linear(3, 7), likelihood="bernoulli").to(DEVICE)
    x = torch.rand(9, 7, device=DEVICE)
    found = gradient_snr(lambda: vae.iwae(x, k=5, k_chunk=2), vae, evaluations=4)
    assert {"encoder", "decoder", "encoder.weight", "decoder.bias"} <= set(found.snr)
    assert all(p.grad is None for p in vae.parameters())
    with torch.no_grad():
        assert set(gradient_snr(lambda: vae.elbo(x), vae, evaluations=2).snr) == set(found.snr)


def _variance_of_one(p):
    monitor = GradientMonitor({"p": p}, window=1)
    for _ in range(3):
        monitor.update([torch.ones_like(p)])
    monitor.result()


WRONG = {
    "a value": (lambda p: gradient_snr(p.sum(), {"p": p}), TypeError, "bound must be a function"),
    "no number": (
        lambda p: gradient_snr(lambda: p, {"p": p}),
        ValueError,
        r"shape \[2\]; expected a tensor \[\]",
    ),
    "terms": (lambda p: gradient_snr(lambda: (p,), {"p": p}), ValueError, "bound returned tuple"),
    "one evaluation": (
        lambda p: gradient_snr(p.sum, {"p": p}, evaluations=1),
        ValueError,
        "evaluations must be at least 2",
    ),
    "no gradient": (
        lambda p: gradient_snr(lambda: p.detach().sum(), {"p": p}),
        ValueError,
        "without a gradient",
    ),
    "no name": (lambda p: gradient_snr(p.sum, p), TypeError, "a tensor without a name"),
    "no names": (lambda p: gradient_snr(p.sum, [p]), TypeError, r"pairs \(name, tensor\)"),
    "numbers": (lambda p: GradientMonitor({"p": 3}), TypeError, r"parameters\['p'\] must be a module.*int"),
    "a number": (lambda p: GradientMonitor(3), TypeError, "parameters must be a module.*int"),
    "nothing": (
        lambda p: GradientMonitor({"p": p.detach()}),
        ValueError,
        "no tensor that requires a gradient",
    ),
    "a window of one": (_variance_of_one, ValueError, "takes two gradients or more, and a window of as many"),
    "no window": (lambda p: GradientMonitor({"p": p}, window=0), ValueError, "window must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call(torch.zeros(2, device=DEVICE, requires_grad=True))
