"""rsample_kl and rsample_log_ratio of every backend against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvae
from fastvae import ops
from fastvae.core.fast_path import ON_CPU

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE


def _eps(seed, k, b, d, k0=0, b0=0):
    with fastvae.use_backend("reference"):
        return fastvae.random.normal(seed, k, b, d, sample_offset=k0, row_offset=b0, dtype=torch.float64)


# Triton's interpreter takes 7 ms per program to draw a thousand normals.
USUAL = {"scale": "logvar", "floor": 0.0}
FORMS = [
    USUAL,
    {"scale": "log_scale", "floor": 0.0},
    {"scale": "scale", "floor": 0.0},
    {"scale": "softplus", "floor": 0.0},
    {"scale": "softplus", "floor": 0.01},
]
SIZES = strategies.distinct_sizes(3, elements=6000)


@st.composite
def cases(draw, sizes=SIZES):
    k, b, d = draw(sizes)
    dtype = draw(strategies.dtypes)
    spread = 2.0 if dtype == torch.float16 else draw(st.sampled_from([0.01, 1.0, 6.0]))
    make = lambda shape, s=1.0: draw(strategies.tensors(shape, dtype, spread=s, device=DEVICE))  # noqa: E731
    estimator = draw(st.sampled_from(["iwae", "stl", "dreg"]))
    # DReG's weights are shares of the upstream gradient, which has one sign, as from a log-mean-exp.
    ends = {"low": 0.0, "high": 1.0} if estimator == "dreg" else {}
    form = draw(st.one_of(st.just(USUAL), st.sampled_from(FORMS)))
    # A log sigma doubles the spread of log variances, which would overflow half-precision gradients.
    wide = spread / 2 if form["scale"] == "log_scale" else spread
    values = {"low": 0.05, "high": 3.0} if form["scale"] == "scale" else {"spread": wide}
    prior = draw(st.sampled_from(["standard", "row", "full"]))
    prior_shape = (d,) if prior == "row" else (b, d)
    return {
        "inputs": [
            make((b, d)),
            draw(strategies.tensors((b, d), dtype, device=DEVICE, **values)),
            None if prior == "standard" else make(prior_shape),
            None if prior == "standard" else make(prior_shape),
        ],
        "samples": k,
        "seed": torch.tensor(draw(st.integers(-(2**63), 2**63 - 1)), device=DEVICE),
        "offsets": (draw(st.sampled_from([0, 3, 2**32 - k])), draw(st.sampled_from([0, 9, 2**31 + 5]))),
        "form": form,
        "logvar_range": draw(st.sampled_from([None, (-1.0, 1.5), (0.25, 1.5)])) if form is USUAL else None,
        "need": draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any)),
        "per_dimension": draw(st.booleans()),
        "estimator": estimator,
        "grads": [
            make((k, b, d)),
            make((b, d)),
            draw(strategies.tensors((k, b), dtype, device=DEVICE, **ends)),
        ],
        "which": draw(st.sampled_from(["both", "first", "second"])),
    }


def _results_with_gradients(case):
    """Return the results with an upstream gradient; DReG needs the log-ratio's."""
    which = {"both": ("z", "second"), "first": ("z",), "second": ("second",)}[case["which"]]
    return ("z", "second") if case["estimator"] == "dreg" and which == ("z",) else which


def _run(case, op, dtype):
    """Run forward and backward in one dtype; return outputs and the needed gradients."""
    inputs = [None if t is None else t.detach().to(dtype) for t in case["inputs"]]
    for t, need in zip(inputs, case["need"], strict=True):
        if t is not None:
            t.requires_grad_(need)
    mu, logvar, prior_mu, prior_logvar = inputs
    options = (
        {"estimator": case["estimator"]}
        if op is ops.rsample_log_ratio
        else {"per_dimension": case["per_dimension"]}
    )
    outputs = op(
        mu,
        logvar,
        k=case["samples"],
        prior=None if prior_mu is None else (prior_mu, prior_logvar),
        logvar_range=case["logvar_range"],
        **case.get("form", USUAL),
        seed=case["seed"],
        sample_offset=case["offsets"][0],
        row_offset=case["offsets"][1],
        **options,
    )
    z, other = outputs
    asked = [t for t in inputs if t is not None and t.requires_grad]
    if not asked:
        return outputs, ()
    grad_z, grad_kl, grad_ratio = case["grads"]
    grad_other = (
        grad_ratio if op is ops.rsample_log_ratio else grad_kl if case["per_dimension"] else grad_kl[:, 0]
    )
    # The second result's upstream gradient is float32 or float64 for any inputs.
    pairs = [(z, grad_z.to(z.dtype)), (other, grad_other.to(other.dtype))]
    pairs = [
        pair
        for name, pair in zip(("z", "second"), pairs, strict=True)
        if name in _results_with_gradients(case)
    ]
    pairs = [(o, g) for o, g in pairs if o.requires_grad]
    outs, arriving = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, asked, arriving, allow_unused=True)
    assert all(g is None or g.dtype == t.dtype for g, t in zip(grads, asked, strict=True))
    return outputs, tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, asked, strict=True))


def results(case, op):
    """Return (name, actual, plain PyTorch's, expected) for every result of a case."""
    inputs, dtype = case["inputs"], case["inputs"][0].dtype
    actual = sum(_run(case, op, dtype), ())
    with fastvae.use_backend("reference"):
        eager = sum(_run(case, op, dtype), ())
    grad_z, grad_kl, grad_ratio = (g.detach() for g in case["grads"])
    if op is ops.rsample_kl:
        other = {"grad_kl": grad_kl if case["per_dimension"] else grad_kl[:, 0]}
        other["per_dimension"] = case["per_dimension"]
    else:
        other = {"grad_ratio": grad_ratio, "estimator": case["estimator"]}
    differentiated = _results_with_gradients(case)
    if "second" not in differentiated:
        other |= {name: None for name in ("grad_kl", "grad_ratio") if name in other}
    eps = _eps(case["seed"], case["samples"], *inputs[0].shape, *case["offsets"])
    expected, grads = formulas.rsample(
        inputs,
        eps,
        grad_z if "z" in differentiated else None,
        logvar_range=case["logvar_range"],
        **case.get("form", USUAL),
        **other,
    )
    second = "kl" if op is ops.rsample_kl else "ratio"
    wanted = [("z", expected["z"]), (second, expected[second])]
    names = ("mu", "logvar", "prior mu", "prior logvar")
    wanted += [
        (f"gradient of {name}", grad)
        for name, grad, need in zip(names, grads, case["need"], strict=True)
        if grad is not None and need
    ]
    return [(name, a, e, x) for (name, x), a, e in zip(wanted, actual, eager, strict=True)]


def _check(case, op):
    for result in results(case, op):
        assert_accurate(*result)


@given(case=cases())
def test_rsample_kl(backend, case):
    _check({**case, "estimator": "iwae"}, ops.rsample_kl)


@given(case=cases())
def test_rsample_log_ratio(backend, case):
    _check(case, ops.rsample_log_ratio)


@pytest.mark.parametrize("columns", [1025, 2500])
@pytest.mark.parametrize("op", [ops.rsample_kl, ops.rsample_log_ratio])
def test_rows_longer_than_a_tile(backend, op, columns):
    generator = torch.Generator().manual_seed(columns)
    make = lambda *s: torch.randn(s, generator=generator).to(DEVICE)  # noqa: E731
    case = {
        "inputs": [make(3, columns), make(3, columns), make(columns), make(columns)],
        "samples": 2,
        "seed": torch.tensor(11, device=DEVICE),
        "offsets": (0, 0),
        "logvar_range": None,
        "need": [True] * 4,
        "per_dimension": False,
        "estimator": "stl" if columns == 2500 else "iwae",
        "grads": [make(2, 3, columns), make(3, columns), make(2, 3)],
        "which": "both",
    }
    _check(case, op)


def test_z_is_mu_plus_sigma_eps(backend):
    mu, logvar = torch.randn(6, 9, device=DEVICE), torch.randn(6, 9, device=DEVICE)
    seed = torch.tensor(5, device=DEVICE)
    z, _ = ops.rsample_kl(mu, logvar, k=4, seed=seed)
    again, _ = ops.rsample_log_ratio(mu, logvar, k=4, seed=seed)
    assert torch.equal(z, again)
    expected = mu.double() + torch.exp(logvar.double() / 2) * _eps(seed, 4, 6, 9)
    torch.testing.assert_close(z.double(), expected, rtol=1e-6, atol=1e-6)


def test_without_k_the_axis_of_samples_is_omitted(backend):
    mu, logvar = torch.randn(6, 9, device=DEVICE), torch.randn(6, 9, device=DEVICE)
    seed = torch.tensor(5, device=DEVICE)
    assert torch.equal(
        ops.rsample_kl(mu, logvar, seed=seed)[0], ops.rsample_kl(mu, logvar, k=1, seed=seed)[0][0]
    )


def test_kl_is_accurate_near_the_prior(backend):
    """exp(u) - 1 - u at u = 1e-3 is 5e-7, lost by exp and expm1 in float32."""
    logvar = torch.full((2, 3), 1e-3, device=DEVICE)
    _, kl = ops.rsample_kl(torch.zeros(2, 3, device=DEVICE), logvar)
    exact = 1.5 * (torch.expm1(logvar[0, 0].double()) - logvar[0, 0].double())
    torch.testing.assert_close(kl.double(), exact.expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-30, -88.0, 88.0, -104.0, 200.0, math.inf, -math.inf, math.nan]
)
def test_extreme_log_variances(backend, value):
    """Extreme log variances give plain PyTorch's zeros, infinities and NaN, only in their row."""
    mu = torch.randn(3, 5, device=DEVICE)
    logvar = torch.randn(3, 5, device=DEVICE)
    logvar[1, 2] = value
    seed = torch.tensor(1, device=DEVICE)

    def run():
        m, v = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        z, kl = ops.rsample_kl(m, v, k=2, seed=seed)
        y, ratio = ops.rsample_log_ratio(m, v, k=2, seed=seed)
        grads = torch.autograd.grad(z.sum() + kl.sum() + y.sum() + ratio.sum(), (m, v))
        return [z, kl, y, ratio, *grads]

    results = run()
    with fastvae.use_backend("reference"):
        expected = run()
    for result, reference in zip(results, expected, strict=True):
        # Terms of up to 20 cancel: an ulp of them is 2e-6.
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("form", "values"),
    [
        # From underflow to overflow of exp(raw) in float32.
        ({"scale": "softplus"}, (-150.0, -104.0, -88.0, -40.5, -39.5, -15.0, 0.0, -0.0, 20.0, 1e4)),
        ({"scale": "softplus", "floor": 1e-4}, (-1e30, -150.0, -20.0, 0.0, 30.0, 1e4)),
        ({"scale": "log_scale"}, (-40.0, 0.0, 1e-3, 20.0)),
        ({"scale": "scale"}, (1e-18, 1e-5, 1.0, 1e9)),
    ],
)
def test_extreme_scales(backend, form, values):
    """Extreme scales agree with float64: z relative to sigma, KL and log-ratio relative to their terms."""
    k, d = 3, len(values)
    raw = torch.tensor(values, device=DEVICE).expand(2, d).clone().requires_grad_()
    mu, seed = torch.zeros(2, d, device=DEVICE, requires_grad=True), torch.tensor(4, device=DEVICE)
    wide = raw.detach().double()
    if form["scale"] == "softplus":
        variance = torch.log1p(wide.exp()).where(wide < 30, wide) + form.get("floor", 0.0)
        slope = torch.sigmoid(wide) / variance
    else:
        variance = (2 * wide).exp() if form["scale"] == "log_scale" else wide**2
        slope = 2 * torch.ones_like(wide) if form["scale"] == "log_scale" else 2 / wide
    eps = _eps(seed, k, 2, d)
    z, kl = ops.rsample_kl(mu, raw, k=k, per_dimension=True, seed=seed, **form)
    torch.testing.assert_close(z.double(), variance.sqrt() * eps, rtol=3e-6, atol=1e-37)
    excess = variance - 1 - variance.log()
    torch.testing.assert_close(kl.double(), 0.5 * excess, rtol=2e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(kl.sum(), raw, retain_graph=True)
    torch.testing.assert_close(grad.double(), 0.5 * (variance - 1) * slope, rtol=3e-6, atol=1e-37)
    (grad,) = torch.autograd.grad(z.sum(), raw)
    expected = (0.5 * variance.sqrt() * eps).sum(0) * slope
    size = (0.5 * variance.sqrt() * eps).abs().sum(0) * slope
    assert bool(((grad.double() - expected).abs() <= 4e-6 * size + 1e-37).all())
    for i in range(d):
        one = {"k": k, "seed": seed, **form}
        _, ratio = ops.rsample_log_ratio(mu[:, i : i + 1], raw[:, i : i + 1], **one)
        noise = _eps(seed, k, 2, 1)[..., 0]
        square, constant = variance[:, i] * noise**2, variance[:, i].log()
        terms = noise**2 + square + constant.abs()
        expected = 0.5 * (noise**2 - square + constant)
        assert bool(((ratio.double() - expected).abs() <= 3e-6 * terms).all())


def test_kl_of_a_scale_is_accurate_near_the_prior(backend):
    """exp(u) - 1 - u at u = 1e-3 is as accurate as an ulp of sigma^2 or sigma allows."""
    variance = torch.tensor(1.001, dtype=torch.float64)
    for form, raw in (
        ({"scale": "scale"}, variance.sqrt()),
        ({"scale": "log_scale"}, variance.log() / 2),
        ({"scale": "softplus"}, torch.log(torch.expm1(variance))),
    ):
        given = raw.float()
        sigma2 = torch.nn.functional.softplus(given.double()) if form["scale"] == "softplus" else None
        sigma2 = given.double() ** 2 if form["scale"] == "scale" else sigma2
        sigma2 = torch.exp(2 * given.double()) if form["scale"] == "log_scale" else sigma2
        exact = 1.5 * (sigma2 - 1 - sigma2.log())
        logvar = given.expand(2, 3).to(DEVICE)
        _, kl = ops.rsample_kl(torch.zeros(2, 3, device=DEVICE), logvar, **form)
        # An ulp of sigma^2 is 1.2e-7 in 1e-3.
        rtol = 1e-6 if form["scale"] == "log_scale" else 5e-4
        torch.testing.assert_close(kl.double().cpu(), exact.expand(2), rtol=rtol, atol=0)


def test_a_negative_scale_gives_nan(backend):
    sigma = torch.tensor([[0.5, -0.5], [0.5, 0.5]], device=DEVICE)
    mu, seed = torch.zeros(2, 2, device=DEVICE), torch.tensor(4, device=DEVICE)
    _, kl = ops.rsample_kl(mu, sigma, seed=seed, scale="scale")
    _, ratio = ops.rsample_log_ratio(mu, sigma, k=3, seed=seed, scale="scale")
    assert kl.isnan().tolist() == [True, False]
    assert ratio.isnan().tolist() == [[True, False]] * 3


def test_nan_log_variance_survives_a_clamp(backend):
    logvar = torch.full((1, 2), math.nan, device=DEVICE, requires_grad=True)
    z, kl = ops.rsample_kl(torch.zeros(1, 2, device=DEVICE), logvar, logvar_range=(-1.0, 1.0))
    assert z.isnan().all() and kl.isnan().all()
    assert torch.autograd.grad(kl.sum(), logvar)[0].isnan().all()


@pytest.mark.parametrize("columns", [1, 5, 1030])
def test_a_clamp_that_excludes_zero_adds_no_kl_outside_the_row(backend, columns):
    """Padding zeros of a tile are clamped too, and must not add their KL."""
    zeros = torch.zeros(3, columns, device=DEVICE)
    _, kl = ops.rsample_kl(zeros, zeros, k=2, logvar_range=(0.25, 1.5))
    exact = columns * (math.expm1(0.25) - 0.25) / 2
    torch.testing.assert_close(kl, torch.full((3,), exact, device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
def test_empty(backend, shape):
    mu = torch.randn(shape, device=DEVICE, requires_grad=True)
    logvar = torch.randn(shape, device=DEVICE, requires_grad=True)
    for op in (ops.rsample_kl, ops.rsample_log_ratio):
        z, other = op(mu, logvar, k=2)
        assert z.shape == (2, *shape)
        assert torch.equal(other, torch.zeros_like(other))
        grads = torch.autograd.grad(z.sum() + other.sum(), (mu, logvar))
        assert [g.shape for g in grads] == [torch.Size(shape)] * 2


def test_a_chunk_and_a_shard_are_parts_of_the_whole(backend):
    mu, logvar = torch.randn(7, 10, device=DEVICE), torch.randn(7, 10, device=DEVICE)
    seed = torch.tensor(-3, device=DEVICE)
    z, ratio = ops.rsample_log_ratio(mu, logvar, k=9, seed=seed)
    part, part_ratio = ops.rsample_log_ratio(
        mu[2:6], logvar[2:6], k=4, seed=seed, sample_offset=5, row_offset=2
    )
    assert torch.equal(z[5:, 2:6], part)
    if DEVICE.type == "cuda":  # another tile size sums a row in another order
        torch.testing.assert_close(part_ratio, ratio[5:, 2:6], rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(ratio[5:, 2:6], part_ratio)


def test_mixed_dtypes_are_promoted(backend):
    mu = torch.randn(3, 4, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    logvar = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    z, kl = ops.rsample_kl(mu, logvar)
    assert z.dtype == torch.float32 and kl.dtype == torch.float32
    (z.sum() + kl.sum()).backward()
    assert mu.grad.dtype == torch.bfloat16 and logvar.grad.dtype == torch.float32


@settings(max_examples=10)
@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_the_seed_alone_decides(backend, seed):
    mu, logvar = torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 5, device=DEVICE)
    draw = lambda s: ops.rsample_kl(mu, logvar, seed=torch.tensor(s, device=DEVICE))[0]  # noqa: E731
    assert torch.equal(draw(seed), draw(seed))
    assert not torch.equal(draw(seed), draw(seed ^ 1))
    # The high word counts too.
    assert not torch.equal(draw(seed), draw(seed ^ (1 << 40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(backend, dtype):
    """Half-precision z is the float32 z rounded once, to nearest even."""
    mu, logvar = (torch.randn(64, 33, device=DEVICE).to(dtype) for _ in range(2))
    seed = torch.tensor(3, device=DEVICE)
    z, kl = ops.rsample_kl(mu, logvar, seed=seed)
    wide, wide_kl = ops.rsample_kl(mu.float(), logvar.float(), seed=seed)
    assert torch.equal(z, wide.to(dtype))
    assert torch.equal(kl, wide_kl)


@pytest.mark.parametrize("op", ["rsample_kl", "rsample_log_ratio"])
@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_backward_may_run_on_another_backend(op, estimator):
    """Another backend's backward pass recomputes what the forward pass saved for its own."""
    options = {} if op == "rsample_kl" else {"estimator": estimator}
    seed = torch.tensor(7, device=DEVICE)

    def run(forward, backward, samples):
        torch.manual_seed(0)
        mu, logvar = (torch.randn(5, 6, device=DEVICE, requires_grad=True) for _ in range(2))
        with fastvae.use_backend(forward):
            results = getattr(ops, op)(mu, logvar, k=samples, seed=seed, **options)
        weights = [torch.randn_like(r).square() for r in results]
        with fastvae.use_backend(backward):
            return torch.autograd.grad(results, (mu, logvar), weights)

    for samples in (3, None) if op == "rsample_kl" else (3,):
        expected = run("reference", "reference", samples)
        for pair in (("reference", "native"), ("native", "reference"), ("native", "native")):
            torch.testing.assert_close(run(*pair, samples), expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_saved_without_gradients(monkeypatch):
    """Large-K evaluation without gradients saves nothing for a backward pass."""
    mu, logvar = torch.randn(2, 4, 3, requires_grad=True)
    z, _ = ops.rsample_log_ratio(mu, logvar, k=5)
    assert any(t is not None and t.numel() == 5 * 4 * 3 for t in z.grad_fn.saved_tensors)
    op, kept = ops.normal_diagonal._rsample_log_ratio, []
    way = ON_CPU, "native"
    function, *others = op._ways[way]
    monkeypatch.setitem(op._ways, way, (lambda *a: kept.append(a[-1]) or function(*a), *others))
    with torch.no_grad():
        ops.rsample_log_ratio(mu, logvar, k=5)
    assert kept == [False]


@pytest.mark.parametrize("shape", [(1, 3), (70, 1), (33, 50), (64, 17), (5, 513), (3, 1025)])
def test_tiles_cover_every_row(backend, shape):
    """Every row is computed for sizes around a tile of rows, with a full or short last row or tile."""
    k = 18 if backend != "triton" else 3
    mu, logvar = torch.randn(2, *shape, device=DEVICE)
    prior = torch.randn(2, *shape, device=DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    eps = _eps(seed, k, *shape)
    z, ratio = ops.rsample_log_ratio(mu, logvar, k=k, prior=tuple(prior), seed=seed)
    exact = mu.double() + torch.exp(0.5 * logvar.double()) * eps
    m, v = prior.double()
    terms = eps**2 - (exact - m) ** 2 * torch.exp(-v) + logvar.double() - v
    torch.testing.assert_close(z.double(), exact, rtol=1e-6, atol=2e-6)
    # Rounding of the terms, and that of z and z - m in float32, magnified by (z - m)^2 / s^2.
    rounding = (exact - m).abs() * torch.exp(-v) * (mu.abs() + exact.abs() + m.abs())
    bound = (1e-6 * terms.abs() + 4e-7 * rounding).sum(-1) + 1e-6
    assert bool(((ratio.double() - 0.5 * terms.sum(-1)).abs() <= bound).all())
