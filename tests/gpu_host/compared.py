"""Comparison of the card, whose kernels are emulated, with the C++ on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compare import assert_near
from tools import fakecard

# What counts launches or orders errors, or draws seeds on the card in a graph: not those of the CPU.
simulated = pytest.mark.skipif(not fakecard.is_active(), reason="needs the fake card")

# Sizes that all differ, so that a swapped axis shows.
K, B, D, X, U, H = 3, 5, 7, 11, 4, 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return normals on the CPU."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_launched(card: Sequence[Any] | None, count: int, *names: str) -> None:
    """Assert that ``count`` kernels or more were launched, and those named; a real card is not watched."""
    if card is not None:
        assert len(card) >= count and {launch.name for launch in card} >= set(names), card


def assert_same(
    what: str, function: Callable[..., object], tensors: Sequence[Tensor | None], magnified: float = 1.0
) -> None:
    """Assert that results and gradients on the card are those of the C++ on the CPU.

    The first call on the card plans the launches, the second one replays them.

    Args:
        what: name for messages.
        function: function of the tensors, on any device; returns a tensor or several. Its random numbers are
            those of one seed of torch's.
        tensors: on the CPU; gradients are compared of those that require them.
        magnified: factor by which the function magnifies roundings: importance weights have a relative error
            as large as the absolute one of their logarithms. Default: 1.
    """
    expected = _run(function, tensors, "cpu")
    for call in ("planned", "replayed"):
        actual = _run(function, tensors, "cuda")
        assert len(expected) == len(actual), what
        for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
            which = f"{what}, {call}, result {i}"
            assert a.dtype == e.dtype and a.shape == e.shape, f"{which}: {a.dtype} {tuple(a.shape)}"
            if not e.is_floating_point():
                assert torch.equal(a, e), which
                continue
            scale = magnified * (1 + float(e.double().abs().max()) if e.numel() else 1.0)
            assert_near(a, e.double(), e.dtype, scale, which)


def _run(function: Callable[..., object], tensors: Sequence[Tensor | None], device: str) -> list[Tensor]:
    torch.manual_seed(17)
    given = [None if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
    results = function(*given)
    results = [r for r in (results if isinstance(results, (tuple, list)) else [results]) if r is not None]
    leaves = [t for t in given if t is not None and t.requires_grad]
    grads: Sequence[Tensor | None] = ()
    if leaves:
        wanted = [r for r in results if r.requires_grad]
        arriving = [torch.linspace(0.5, 1.5, r.numel()).view(r.shape).to(r) for r in wanted]
        grads = torch.autograd.grad(wanted, leaves, arriving)
    assert all(t.device.type == device for t in (*results, *grads))
    return [t.detach().cpu() for t in (*results, *grads)]
