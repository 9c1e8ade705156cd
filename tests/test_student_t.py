"""Tests specific to student_t_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import fastvae
from fastvae import ops

from .conftest import DEVICE
from .models import randn

X = (0.25, 0.2500001, 0.5, 1.0, 3.0, 10.0, 1e3, 1e8)
LOCATION, LOG_SCALE = 0.25, 0.3


def exact(x: float, location: float, log_scale: float, log_df: float) -> tuple[list, list]:
    """Return log p, the gradients by location, log_scale and log_df, and the sizes of each one's terms."""
    with mpmath.workdps(60):
        x, location, log_scale, log_df = (mpmath.mpf(v) for v in (x, location, log_scale, log_df))
        df, s = mpmath.exp(log_df), mpmath.exp(log_scale)
        white = (x - location) / s
        t = white**2 / df
        share, tail = t / (1 + t), (df + 1) / 2 * mpmath.log1p(t)
        gammas = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2) - mpmath.log(df * mpmath.pi) / 2
        slope = df / 2 * (mpmath.digamma((df + 1) / 2) - mpmath.digamma(df / 2)) - mpmath.mpf(1) / 2
        excess = df * (mpmath.log1p(t) - share)
        values = [
            gammas - log_scale - tail,
            (df + 1) / df * white / (1 + t) / s,
            (df + 1) * share - 1,
            slope + (share - excess) / 2,
        ]
        sizes = [abs(gammas) + 1 + abs(log_scale) + tail, abs(values[1]), (df + 1) * share + 1]
        sizes.append(slope + (share + excess) / 2)
        return [float(v) for v in values], [float(v) for v in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("df", [1e-8, 1e-2, 0.5, 1.0, 1.99, 2.01, 4.0, 31.0, 33.0, 1e3, 1e8, 1e12])
def test_any_degrees_of_freedom(backend, dtype, full, df):
    """Results are accurate to a few roundings of their terms, which are not differences of log Γ."""
    log_df = torch.tensor(math.log(df), dtype=dtype, device=DEVICE)
    x = torch.tensor(X, dtype=dtype, device=DEVICE)[:, None]
    if full:
        log_df = log_df.expand(x.shape).clone()
    given = [torch.full_like(x, LOCATION), torch.full_like(x, LOG_SCALE), log_df]
    outs = []
    for i in range(len(x)):
        leaves = [p[i : i + 1].clone() if p.dim() else p.clone() for p in given]
        out = ops.student_t_log_prob(x[i : i + 1], *(p.requires_grad_() for p in leaves))
        outs.append([out, *torch.autograd.grad(out.sum(), leaves)])
    u = torch.finfo(dtype).eps / 2
    for value, found in zip(x.flatten().tolist(), outs, strict=True):
        log_scale, exponent = float(given[1][0, 0]), float(log_df.flatten()[0])
        expected, sizes = exact(value, LOCATION, log_scale, exponent)
        for name, got, e, size in zip(
            ("log p", "location", "scale", "df"), found, expected, sizes, strict=True
        ):
            assert abs(float(got.detach()) - e) <= 24 * u * size, (name, value)


def test_the_limit_is_the_normal_distribution(backend):
    """The normal distribution is the limit, also where e^log_df overflows."""
    x, location, log_scale = randn(4, 7, seed=1), randn(3, 4, 7, seed=2), 0.3 * randn(3, 4, 7, seed=3)
    normal = ops.gaussian_log_prob(x, location, 2 * log_scale)
    for log_df in (30.0, 80.0, 200.0, math.inf):
        found = ops.student_t_log_prob(x, location, log_scale, log_df)
        torch.testing.assert_close(found, normal, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize("x, white", [(2e19, 2e19), (1e30, 1e30), (-3e38, -3e38), (math.inf, math.inf)])
def test_squares_that_overflow(backend, columns, x, white):
    """log p is finite where the square of (x - location) / s overflows."""
    data = torch.zeros(1, columns, device=DEVICE)
    data[0, -1] = x
    given = [torch.zeros(1, columns, device=DEVICE, requires_grad=True) for _ in range(3)]
    out = ops.student_t_log_prob(data, *given)
    expected = -columns * math.log(math.pi) - 2 * math.log(abs(white))
    assert float(out.detach()) == pytest.approx(expected, rel=1e-5)
    location, scale, df = (float(g[0, -1]) for g in torch.autograd.grad(out.sum(), given))
    assert abs(location) < 1e-18 and scale == 1.0
    slope, log_df = math.log(2) - 0.5, -math.log(abs(white))  # ½ (ψ(1) - ψ(½)) - ½, and ½ (1 - 2 log r + 1)
    assert df == pytest.approx(slope + 1 + log_df, rel=1e-5)


@pytest.mark.parametrize("scale", [-30.0, -44.0, -60.0])
def test_the_location_of_a_far_value_has_a_gradient(backend, scale):
    """Far out it is (df + 1) / (x - location), whatever the scale, also where squares overflow."""
    data = torch.tensor([[1.0, -3.0, 2e9]], device=DEVICE)
    location = torch.zeros(1, 3, device=DEVICE, requires_grad=True)
    out = ops.student_t_log_prob(data, location, scale, math.log(2.0))
    (found,) = torch.autograd.grad(out.sum(), location)
    torch.testing.assert_close(found, 3 / data, rtol=1e-5, atol=0)


def test_nan_reaches_values_and_gradients(backend):
    for at in range(4):
        values = [torch.full((1, 1), 0.5, device=DEVICE) for _ in range(4)]
        values[at].fill_(math.nan)
        leaves = [v.requires_grad_() for v in values]
        out = ops.student_t_log_prob(*leaves)
        found = [out, *torch.autograd.grad(out.sum(), leaves)]
        assert all(bool(f.isnan().all()) for f in found), at


FORMS = {
    "nothing": ({}, ("location", "log_scale", "log_df")),
    "df": ({"df": 4.0}, ("location", "log_scale")),
    "df of a pixel": ({"df": torch.linspace(1.0, 9.0, 7)}, ("location", "log_scale")),
    "learned df": ({"df": 4.0, "learned_df": True}, ("location", "log_scale")),
    "df and scale": ({"df": 4.0, "scale": 0.3}, ("location",)),
    "scale of a pixel": ({"df": 4.0, "scale": torch.linspace(0.1, 0.9, 7), "learned": True}, ("location",)),
    "both learned": ({"df": 4.0, "scale": 0.3, "learned": True, "learned_df": True}, ("location",)),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_fixed_or_learned_in_the_likelihood(backend, form):
    """The likelihood's fixed or learned parameters act as the op's, fused and by log_prob, with gradients."""
    options, returned = FORMS[form]
    options = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    likelihood = fastvae.likelihoods.StudentT(**options).to(DEVICE)
    x, outputs = randn(4, 7, seed=1), [0.5 * randn(3 * 4, 7, seed=2 + i) for i in range(3)]
    outputs = tuple(outputs[: len(returned)])
    full = [o.view(3, 4, 7) for o in outputs]
    logs = {n: torch.as_tensor(v, device=DEVICE).log() for n, v in options.items() if "learned" not in n}
    full += [logs[n] for n in ("scale", "df") if n in logs]
    expected = ops.student_t_log_prob(x, *full)
    given = outputs if len(outputs) > 1 else outputs[0]
    torch.testing.assert_close(likelihood.log_likelihood(x, given, 3), expected)
    q = torch.zeros(4, 2, device=DEVICE)
    terms = fastvae.elbo(x, q, lambda z: given, k=3, likelihood=likelihood, terms=True)
    torch.testing.assert_close(terms.log_likelihood, expected.mean(0))
    names = [n for n, _ in likelihood.named_parameters()]
    assert names == [f"log_{n}" for n, f in (("scale", "learned"), ("df", "learned_df")) if options.get(f)]
    if names:
        grads = torch.autograd.grad(terms.bound.sum(), list(likelihood.parameters()))
        assert all(bool((grad != 0).all()) for grad in grads)
    for name in ("df", "scale"):
        fixed = getattr(likelihood, name)
        assert (fixed is None) == (name not in options)
        if fixed is not None:
            torch.testing.assert_close(torch.as_tensor(fixed).detach(), torch.as_tensor(options[name]))


def test_a_scale_needs_degrees_of_freedom():
    with pytest.raises(ValueError, match=r"a scale needs df.*likelihoods.StudentT\(df=4.0, scale=0.1\)"):
        fastvae.likelihoods.StudentT(scale=0.1)
