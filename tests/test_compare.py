"""The comparison helper must fail on wrong kernels, or every other test is worth nothing."""

from __future__ import annotations

import pytest
import torch

from .compare import assert_accurate


def _case():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 7, generator=generator, dtype=torch.float64) * 10 ** torch.linspace(-6, 6, 7)
    return exact, exact.float()


def test_accepts_a_right_kernel():
    exact, eager = _case()
    assert_accurate("right", eager.clone(), eager, exact)
    assert_accurate("one ulp off", torch.nextafter(eager, torch.tensor(torch.inf)), eager, exact)


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("sign", lambda v: torch.where(v == v[3, 0], -v, v)),
        ("one small element", lambda v: torch.where(v == v[5, 0], v * (1 + 1e-5), v)),
        ("constant", lambda v: v * 0.5),
        ("unwritten", lambda v: torch.where(v == v[0, 6], torch.nan, v)),
        ("shape", lambda v: v.T.contiguous()),
        ("dtype", lambda v: v.double()),
        ("infinite", lambda v: torch.where(v == v[0, 6], torch.inf, v)),
        ("zero", lambda v: torch.where(v == v[1, 0], 0.0, v)),
    ],
)
def test_refuses_a_wrong_kernel(name, spoil):
    exact, eager = _case()
    with pytest.raises(AssertionError):
        assert_accurate(name, spoil(eager), eager, exact)


def test_nan_must_stay_nan():
    exact = torch.tensor([torch.nan, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_accurate("lost", torch.tensor([0.0, 1.0]), exact.float(), exact)
