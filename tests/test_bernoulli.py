"""bernoulli_log_prob of every backend against plain PyTorch in float64."""

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
    spread = draw(st.sampled_from([0.01, 1.0, 8.0, 100.0]))
    return {
        "x": draw(strategies.tensors((b, *event), data, low=0.0, high=1.0, device=DEVICE)),
        "logits": draw(strategies.tensors((k, b, *event), parameter, spread=spread, device=DEVICE)),
        "grad": draw(strategies.tensors((k, b), torch.float32, device=DEVICE)),
        "need": draw(st.sampled_from([(True, False), (False, True), (True, True)])),
    }


NAMES = ("x", "logits")


def _run(case):
    inputs = [case[name].detach() for name in NAMES]
    for t, need in zip(inputs, case["need"], strict=True):
        t.requires_grad_(need)
    out = ops.bernoulli_log_prob(*inputs)
    asked = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, asked, case["grad"].to(out.dtype))
    assert all(g.dtype == t.dtype for g, t in zip(grads, asked, strict=True))
    return out, *grads


def results(case):
    """(name, the op's, plain PyTorch's, what is expected) of everything that a case asks for."""
    actual = _run(case)
    with fastvae.use_backend("reference"):
        eager = _run(case)
    out, grads = formulas.bernoulli(*(case[name].detach() for name in (*NAMES, "grad")))
    wanted = [(f"gradient of {n}", g) for n, g, need in zip(NAMES, grads, case["need"], strict=True) if need]
    return [(n, a, e, x) for (n, x), a, e in zip([("log prob", out), *wanted], actual, eager, strict=True)]


def _check(case):
    for result in results(case):
        assert_accurate(*result)


@given(case=cases())
def test_bernoulli_log_prob(backend, case):
    _check(case)


def test_rows_longer_than_a_tile(backend):
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(s, generator=generator).to(DEVICE)  # noqa: E731
    x = torch.sigmoid(make(3, 2500))
    _check({"x": x, "logits": make(2, 3, 2500), "grad": make(2, 3), "need": (True, True)})


def test_targets_in_float32_beside_float64_logits(backend):
    """1 - x is computed in float64, too."""
    x = torch.rand(3, 5, device=DEVICE).square()
    logits = torch.randn(2, 3, 5, device=DEVICE, dtype=torch.float64)
    expected = ops.bernoulli_log_prob(x.double(), logits)
    torch.testing.assert_close(ops.bernoulli_log_prob(x, logits), expected, rtol=1e-13, atol=0)


def test_equals_torch_distributions(backend):
    x, logits = torch.rand(4, 7, device=DEVICE).round(), 3 * torch.randn(5, 4, 7, device=DEVICE)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(2)
    torch.testing.assert_close(ops.bernoulli_log_prob(x, logits), expected)


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize(
    "x, logit, value, gradient",
    [
        (1.0, math.inf, 0.0, 0.0),
        (0.0, -math.inf, 0.0, 0.0),
        (0.0, math.inf, -math.inf, -1.0),
        (1.0, -math.inf, -math.inf, 1.0),
        (1.0, 200.0, 0.0, 0.0),
        (0.0, 200.0, -200.0, -1.0),
        (0.0, -20.0, -math.log1p(math.exp(-20.0)), -1 / (1 + math.exp(20.0))),
        (0.5, 0.0, -math.log(2), 0.0),
    ],
)
def test_certain_pixels(backend, x, logit, value, gradient, columns):
    """0 * inf is 0 here: certain and right costs nothing; certain and wrong costs everything."""
    # The other pixels of a long row cost nothing: they are right by 200 nats.
    logits, data = torch.full((1, columns), 200.0, device=DEVICE), torch.ones(1, columns, device=DEVICE)
    logits[0, -1], data[0, -1] = logit, x
    logits.requires_grad_()
    out = ops.bernoulli_log_prob(data, logits)
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([value]), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(out.sum(), logits)[0]
    torch.testing.assert_close(grad[:, -1].cpu(), torch.tensor([gradient]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("low, high, hint", [(-1.0, 1.0, r"\(x \+ 1\) / 2"), (0.0, 255.0, "x / 255")])
def test_targets_outside_the_unit_interval(backend, monkeypatch, low, high, hint):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU the check is asked for
    x = torch.rand(4, 9, device=DEVICE) * (high - low) + low
    x[0, 0], x[3, 8] = low, high
    with pytest.raises(ValueError, match=rf"\[{low:g}, {high:g}\].*\[0, 1\].*{hint}"):
        ops.bernoulli_log_prob(x, torch.randn(2, 4, 9, device=DEVICE))


@pytest.mark.parametrize("columns", [6, 300])
def test_nan_stays_in_its_row(backend, columns):
    x, logits = torch.rand(4, columns, device=DEVICE), torch.randn(3, 4, columns, device=DEVICE)
    logits[1, 2, 3] = math.nan
    out = ops.bernoulli_log_prob(x, logits)
    assert int(out.isnan().sum()) == 1 and bool(out[1, 2].isnan())
    x[3, 0] = math.nan
    out = ops.bernoulli_log_prob(x, logits)
    assert bool(out[:, 3].isnan().all()) and int(out.isnan().sum()) == 4


@pytest.mark.parametrize("k, b, size", [(2, 0, 3), (2, 3, 0), (0, 3, 2)])
def test_empty(backend, k, b, size):
    x = torch.rand(b, size, device=DEVICE, requires_grad=True)
    logits = torch.randn(k, b, size, device=DEVICE, requires_grad=True)
    out = ops.bernoulli_log_prob(x, logits)
    assert torch.equal(out, torch.zeros(k, b, device=DEVICE))
    grads = torch.autograd.grad(out.sum(), (x, logits))
    assert [g.shape for g in grads] == [x.shape, logits.shape]
    assert bool((grads[0] == 0).all())
