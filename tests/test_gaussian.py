"""gaussian_log_prob of every backend against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import ops

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE

SIZES = strategies.distinct_sizes(3)


@st.composite
def cases(draw, sizes=SIZES):
    k, b, size = draw(sizes)
    event = (size,) if size % 4 else (size // 4, 4)
    parameter = draw(strategies.dtypes)
    data = draw(st.sampled_from([parameter, torch.float32]))
    spread = 1.0 if parameter == torch.float16 else draw(st.sampled_from([0.01, 1.0, 5.0]))
    shape = draw(
        st.sampled_from(
            [(k, b, *event), event, (), (b, *event), (b,) + (1,) * len(event), (k, 1) + (1,) * len(event)]
        )
    )
    # One number or one row often stays in float32 beside half-precision means.
    wide = draw(st.booleans()) and parameter != torch.float64
    make = lambda s, dtype, f=1.0: draw(strategies.tensors(s, dtype, spread=f, device=DEVICE))  # noqa: E731
    return {
        "x": make((b, *event), data, 3.0),
        "mean": make((k, b, *event), parameter),
        "logvar": make(shape, torch.float32 if wide else parameter, spread),
        "grad": make((k, b), torch.float32),
        "need": draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any)),
    }


NAMES = ("x", "mean", "logvar")


def _run(case):
    inputs = [case[name].detach() for name in NAMES]
    for t, need in zip(inputs, case["need"], strict=True):
        t.requires_grad_(need)
    out = ops.gaussian_log_prob(*inputs)
    asked = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, asked, case["grad"].to(out.dtype))
    assert all(g.dtype == t.dtype for g, t in zip(grads, asked, strict=True))
    return out, *grads


def results(case):
    """(name, the op's, plain PyTorch's, what is expected) of everything that a case asks for."""
    actual = _run(case)
    with fastvae.use_backend("reference"):
        eager = _run(case)
    out, grads = formulas.gaussian(*(case[name].detach() for name in (*NAMES, "grad")))
    wanted = [(f"gradient of {n}", g) for n, g, need in zip(NAMES, grads, case["need"], strict=True) if need]
    return [(n, a, e, x) for (n, x), a, e in zip([("log prob", out), *wanted], actual, eager, strict=True)]


def _check(case):
    for result in results(case):
        assert_accurate(*result)


@given(case=cases())
def test_gaussian_log_prob(backend, case):
    _check(case)


@pytest.mark.parametrize("shape", [(2, 3, 2500), (2500,), (3, 1)])
def test_rows_longer_than_a_tile(backend, shape):
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(s, generator=generator).to(DEVICE)  # noqa: E731
    _check(
        {
            "x": make(3, 2500),
            "mean": make(2, 3, 2500),
            "logvar": make(*shape),
            "grad": make(2, 3),
            "need": [True] * 3,
        }
    )


def test_many_rows_of_a_learned_scale(backend):
    """More rows than there are partial sums."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(s, generator=generator).to(DEVICE)  # noqa: E731
    _check(
        {
            "x": make(150, 6),
            "mean": make(3, 150, 6),
            "logvar": make(6),
            "grad": make(3, 150),
            "need": [True] * 3,
        }
    )


def test_large_inputs(backend):
    """A bias added once per tile, or a constant dropped, hides behind tiny inputs; here x - mean is 1 at
    1e4.
    """
    x = torch.full((2, 3), 10001.0, device=DEVICE)
    mean = torch.full((5, 2, 3), 10000.0, device=DEVICE)
    out = ops.gaussian_log_prob(x, mean, 2 * math.log(0.5))
    expected = 3 * (-0.5 * math.log(2 * math.pi) + math.log(2) - 2.0)
    torch.testing.assert_close(out, torch.full((5, 2), expected, device=DEVICE), rtol=1e-6, atol=0)


def test_samples_that_fill_a_tile_up_have_no_gradient(backend):
    """A fourth sample would have mean 0, 1e3 away from x: 0 times the square, infinite, is NaN."""
    x, mean = torch.full((5, 6), 1e3, device=DEVICE), torch.full((3, 5, 6), 1e3, device=DEVICE)
    logvar = torch.full((6,), -80.0, device=DEVICE, requires_grad=True)
    grad = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar).sum(), logvar)[0]
    torch.testing.assert_close(grad, torch.full((6,), -7.5, device=DEVICE))


def test_half_precision_subtracts_in_float32(backend):
    """256.5 - 256 is lost when x is rounded to bfloat16 first."""
    x = torch.full((1, 1), 256.5, device=DEVICE)
    mean = torch.full((1, 1), 256.0, device=DEVICE, dtype=torch.bfloat16)
    out = ops.gaussian_log_prob(x, mean, 0.0)
    torch.testing.assert_close(out, torch.full((1,), -0.5 * (math.log(2 * math.pi) + 0.25), device=DEVICE))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5)])
def test_a_float64_log_variance_widens_the_result(backend, shape):
    """Eager, compiled and every backend must agree on the dtype."""
    x, mean = torch.randn(3, 5, device=DEVICE), torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    logvar = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = ops.gaussian_log_prob(x, mean, logvar)
    exact = -0.5 * (math.log(2 * math.pi) + logvar + (x - mean.double()) ** 2 * torch.exp(-logvar)).sum(2)
    torch.testing.assert_close(out, exact)
    grads = torch.autograd.grad(out.sum(), (mean, logvar))
    assert [g.dtype for g in grads] == [torch.float32, torch.float64]


def test_a_float32_log_variance_beside_float64_means(backend):
    """Its exponential is computed in float64, too."""
    x, mean = torch.randn(3, 5, device=DEVICE), torch.randn(2, 3, 5, device=DEVICE, dtype=torch.float64)
    logvar = torch.randn(5, device=DEVICE)
    expected = ops.gaussian_log_prob(x.double(), mean, logvar.double())
    torch.testing.assert_close(ops.gaussian_log_prob(x, mean, logvar), expected, rtol=1e-12, atol=0)


def test_without_an_event_axis(backend):
    x, mean = torch.randn(5, device=DEVICE), torch.randn(3, 5, device=DEVICE)
    expected = torch.distributions.Normal(mean, 1.0).log_prob(x)
    torch.testing.assert_close(ops.gaussian_log_prob(x, mean, 0.0), expected)


@pytest.mark.parametrize("k, b, size", [(2, 0, 3), (2, 3, 0), (0, 3, 2)])
@pytest.mark.parametrize("logvar", ["full", "row", "number"])
def test_empty(backend, k, b, size, logvar):
    x, mean = torch.randn(b, size, device=DEVICE), torch.randn(k, b, size, device=DEVICE, requires_grad=True)
    shape = {"full": (k, b, size), "row": (size,), "number": ()}[logvar]
    logvar = torch.zeros(shape, device=DEVICE, requires_grad=True)
    out = ops.gaussian_log_prob(x, mean, logvar)
    assert torch.equal(out, torch.zeros(k, b, device=DEVICE))
    grads = torch.autograd.grad(out.sum(), (mean, logvar))
    assert [g.shape for g in grads] == [mean.shape, logvar.shape]
    assert all(bool((g == 0).all()) for g in grads)


def test_nan_stays_in_its_row(backend):
    x, mean = torch.randn(4, 6, device=DEVICE), torch.randn(3, 4, 6, device=DEVICE, requires_grad=True)
    spoiled = mean.detach().clone()
    spoiled[1, 2, 3] = math.nan
    out = ops.gaussian_log_prob(x, spoiled, 0.3)
    assert int(out.isnan().sum()) == 1 and bool(out[1, 2].isnan())


def test_the_gradients_of_a_shared_log_variance_are_summed_before_they_are_rounded(backend):
    """Samples of opposite gradients cancel but for a thousandth, which roundings to bfloat16 would bury."""
    k, b, n = 64, 3, 5
    x = torch.zeros(b, n, dtype=torch.bfloat16, device=DEVICE)
    mean = torch.randn(1, b, n, device=DEVICE).bfloat16().expand(k, b, n)
    logvar = torch.zeros(b, n, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    sign = torch.tensor([1.0, -0.999], device=DEVICE).repeat(k // 2)[:, None].expand(k, b)
    (grad,) = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar), logvar, sign)
    square = mean.double().square()
    exact = (sign.double()[:, :, None] * 0.5 * (square - 1)).sum(0)
    # One rounding to bfloat16, and those of a sum of k terms in float32, in any order.
    bound = 2**-9 * exact.abs() + k * 2**-23 * (square + 1).sum(0)
    assert bool(((grad.double() - exact).abs() <= bound).all())
