"""The comparison must fail on wrong kernels, and only on these, or every other test is worthless."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae.likelihoods.declared import DECLARED

from . import cases
from .compare import Rounded, assert_accurate, total

F32 = torch.float32


def _case():
    """Return a formula of a few roundings, over magnitudes 1e-6 to 1e6, and plain PyTorch's result."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, 7, generator=generator)
    a = a * 10 ** torch.linspace(-6, 6, 7)
    x, y = Rounded.exact(a, F32), Rounded.exact(b, F32)
    return x * y.exp(), a * b.exp()


def test_accepts_a_right_kernel():
    expected, eager = _case()
    assert_accurate("right", eager.clone(), eager, expected)
    some = torch.arange(7) == 3
    one_off = torch.where(some, torch.nextafter(eager, torch.tensor(torch.inf)), eager)
    assert_accurate("an ulp off here and there", one_off, eager, expected)
    # Plain PyTorch may by chance be closer than any kernel could be.
    assert_accurate("luck", eager[:5], expected.value.float()[:5], expected[:5])


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("sign", lambda v: torch.where(v == v[3, 0], -v, v)),
        ("one small element", lambda v: torch.where(v == v[5, 0], v * (1 + 1e-6), v)),
        ("constant", lambda v: v * 0.5),
        ("unwritten", lambda v: torch.where(v == v[0, 6], torch.nan, v)),
        ("shape", lambda v: v.T.contiguous()),
        ("dtype", lambda v: v.double()),
        ("infinite", lambda v: torch.where(v == v[0, 6], torch.inf, v)),
        ("zero", lambda v: torch.where(v == v[1, 0], 0.0, v)),
    ],
)
def test_refuses_a_wrong_kernel(name, spoil):
    expected, eager = _case()
    with pytest.raises(AssertionError):
        assert_accurate(name, spoil(eager), eager, expected)


def test_refuses_a_kernel_that_is_worse_in_the_bulk():
    """An error of a quarter of the bound in every element of a long sum is refused."""
    a, b = torch.randn(2, 70, 64)
    expected = (Rounded.exact(a, F32) * Rounded.exact(b, F32)).sum(1)
    eager = (a * b).sum(1)
    assert_accurate("right", (a * b).flip(1).sum(1), eager, expected)
    worse = eager + (0.25 * expected.error).float()
    with pytest.raises(AssertionError, match="root mean square"):
        assert_accurate("worse", worse, eager, expected)
    assert_accurate("too few to tell", worse[:8], eager[:8], expected[:8])


def test_nan_must_stay_nan():
    exact = torch.tensor([torch.nan, 1.0])
    with pytest.raises(AssertionError):
        assert_accurate("lost", torch.tensor([0.0, 1.0]), exact, Rounded.exact(exact, F32))
    assert_accurate("kept", exact, exact, Rounded.exact(exact, F32))


def test_infinity_is_accepted_only_near_the_largest_number():
    largest = torch.finfo(torch.float16).max
    values = torch.tensor([largest + 10, largest / 2], dtype=torch.float64)
    expected = Rounded.exact(values, F32)
    half = values.to(torch.float16)
    assert_accurate("rounded down", half, half, expected)
    half[0] = torch.inf
    assert_accurate("rounded up", half, half, expected)
    for wrong in ([-torch.inf, largest / 2], [largest, torch.inf]):
        with pytest.raises(AssertionError):
            assert_accurate("infinite", torch.tensor(wrong).half(), half, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_bounds_are_valid_for_arithmetic(dtype):
    """Every operation of Rounded bounds that of the dtype, for cancelling, small and large inputs."""
    wide = torch.float64
    a, b = (torch.randn(2000, dtype=wide) * 10 ** (4 * torch.randn(2000, dtype=wide) / 3) for _ in range(2))
    b = torch.where(torch.rand(2000) < 0.3, a * (1 + 1e-3 * b.sign()), b)
    a, b = a.to(dtype), b.to(dtype)
    x, y = Rounded.exact(a, dtype), Rounded.exact(b, dtype)
    small, v = x * Rounded.exact(torch.full_like(a, 1 / 8), dtype), a * (1 / 8)
    clipped, c = Rounded.exact(a.clamp(-80, 80), dtype), a.clamp(-80, 80)
    for name, actual, expected in (
        ("sum", a + b, x + y),
        ("difference, product", (a - b) * b, (x - y) * y),
        ("quotient of a sum", b / (a + b), y / (x + y)),
        ("exp", c.exp(), clipped.exp()),
        ("log", (v * v + 1).log(), (small.square() + Rounded.exact(torch.ones_like(a), dtype)).log()),
        ("expm1", torch.expm1(c), clipped.expm1()),
        ("sigmoid", torch.sigmoid(a), x.sigmoid()),
        ("sums", (a.view(20, 100) * b.view(20, 100)).sum(1), _rows(x * y).sum(1)),
        ("sums of sums", (a + b).view(20, 100).sum(1), total([_rows(x), _rows(y)], 1)),
    ):
        assert_accurate(name, actual, actual, expected)


def _rows(x):
    return Rounded(x.value.view(20, 100), x.error.view(20, 100), x.u)


def test_infinity_is_required_beyond_the_range_of_the_dtype():
    nan = torch.tensor([math.nan, math.nan], dtype=torch.float64)
    expected = Rounded(torch.tensor([3.3e39, -3.3e39], dtype=torch.float64), nan, 2.0**-24)
    assert_accurate("right", torch.tensor([math.inf, -math.inf]), None, expected)
    for wrong in ([-math.inf, -math.inf], [math.inf, 3.3e38], [math.nan, -math.inf]):
        with pytest.raises(AssertionError, match="wrong: 1 of 2 elements are off"):
            assert_accurate("wrong", torch.tensor(wrong), None, expected)


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
def test_error_bounds_of_finite_values_are_not_nan(likelihood):
    """No NaN bounds, even where float32 exponentials overflow: these would refuse a correct kernel."""
    declared = DECLARED[likelihood]
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        spreads = 10 ** (4 * torch.rand(len(declared.outputs), generator=generator) - 2)
        outputs = [spread * torch.randn(4, 5, generator=generator) for spread in spreads]
        x = cases.data(likelihood, 4, 5, seed=seed).cpu()
        if seed % 2 and declared.takes_integers and declared.low <= 0:
            x = torch.zeros_like(x)  # a count of 0 times an overflow
        terms = [Rounded.exact(t, F32) for t in (x, *outputs)]
        g = Rounded.exact(torch.ones(4, 5), F32)
        results = [declared.value(*terms), *declared.gradient(g, *terms)]
        for name, result in zip(("log prob", "x", *declared.outputs), results, strict=True):
            if result is not None:
                bad = result.value.isfinite() & result.error.isnan()
                assert not bool(bad.any()), f"{name}, seed {seed}: {[t[bad][:3].tolist() for t in outputs]}"
