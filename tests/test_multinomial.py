"""Counts over an event: every backend against torch.distributions and the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastvae
from fastvae import ops
from fastvae.likelihoods import Joint, Multinomial

from . import strategies
from .compare import assert_near
from .conftest import DEVICE
from .models import generator, rand, randn

B, K, X = 3, 4, 7


def naive(x, logits, mask=None, coefficient=True):
    """Return log p [K, B] of counts x [B, X] and logits [K, B, X], in float64."""
    counts = x.double()
    if mask is not None:
        counts, logits = torch.where(mask, counts, 0.0), torch.where(mask, logits, -math.inf)
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    value = torch.where(counts > 0, counts * log_p, torch.zeros_like(log_p) * 0).sum(-1)
    value = torch.where(counts.sum(-1) == 0, 0.0, value)
    own = torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
    return value + own * coefficient


def as_layout(x, layout):
    if layout == "coo":
        return x.to_sparse()
    return x.to_sparse_csr() if layout == "csr" else strategies.laid_out(x, layout)


@st.composite
def counts(draw):
    k, b, x = draw(strategies.distinct_sizes(3, largest=70, elements=6000))
    dtype, seed = draw(strategies.dtypes), draw(st.integers(0, 99))
    rate = draw(st.sampled_from([0.1, 1.0, 300.0]))
    data = (rate * -torch.log(rand(b, x, seed=seed))).floor()
    data[0] = 0
    kinds = [torch.int64, torch.int32, torch.uint8, torch.float32]
    data = data.clamp(max=255).to(draw(st.sampled_from(kinds)))
    logits = (draw(st.sampled_from([0.1, 10.0])) * randn(k, b, x, seed=seed + 1)).to(dtype)
    logits = strategies.laid_out(logits + draw(st.sampled_from([0.0, 50.0])), draw(strategies.layouts))
    mask = rand(b, x, seed=seed + 2) < draw(st.sampled_from([0.0, 0.5, 0.9])) if draw(st.booleans()) else None
    layout = draw(st.sampled_from([*strategies.LAYOUTS, "coo", "csr"]))
    return data, layout, logits, mask, draw(st.booleans())


@given(counts())
def test_multinomial(backend, case):
    x, layout, logits, mask, coefficient = case
    if layout == "expanded":
        x = x[:1].expand(x.shape)
    logits = logits.detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got = ops.multinomial_log_prob(as_layout(x, layout), logits, mask=mask, coefficient=coefficient)
    expected = naive(x, wide, mask, coefficient)
    assert got.shape == logits.shape[:2]
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    single = torch.float32 if logits.dtype != torch.float64 else got.dtype
    # Roundings of the terms x (a - L), and of log n!, which the coefficient's terms cancel.
    total = x.double().sum(1)
    spread = 1 + float((wide.detach().amax(-1) - wide.detach().amin(-1)).max()) + math.log(x.shape[1])
    scale = 1 + total * spread + torch.lgamma(total + 1) * coefficient
    assert_near(got.detach(), expected.detach(), single, scale, "value")
    weight = randn(*got.shape, seed=7).to(got.dtype)
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weight.double()).sum(), wide)
    size = (total[:, None] + 1) * 3 * (1 + float(wide.detach().abs().amax()))
    assert_near(grad, wanted.nan_to_num(), logits.dtype, size, "gradient")
    if mask is not None:
        assert not bool(grad[:, ~mask].any())


def test_multinomial_equals_torch(backend):
    logits = randn(K, B, X, seed=1)
    x = torch.randint(5, (B, X), device=DEVICE, generator=generator(2))
    got = Multinomial().log_likelihood(x, logits.reshape(K * B, X), K)
    for b in range(B):
        oracle = torch.distributions.Multinomial(int(x[b].sum()), logits=logits[:, b])
        torch.testing.assert_close(got[:, b], oracle.log_prob(x[b].float()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("layout", ["contiguous", "csr"])
def test_long_rows(backend, rows, layout):
    """Events longer than a tile, of a common offset and a few clicks."""
    size = 3001
    if backend == "triton" and DEVICE.type == "cpu":
        rows = min(rows, 3)
    x = (rand(rows, size, seed=1) < 0.01).float() * (1 + (300 * rand(rows, size, seed=2)).floor())
    x[:, [0, 1023, 1024, 2047, 2048, size - 1]] = 2  # at the ends of tiles
    logits = (randn(2, rows, size, seed=3) + 20).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got = ops.multinomial_log_prob(as_layout(x, layout), logits)
    expected = naive(x, wide)
    total = x.double().sum(1)
    assert_near(got.detach(), expected.detach(), torch.float32, 20 * total + torch.lgamma(total + 1), "value")
    (grad,) = torch.autograd.grad(got.sum(), logits)
    (wanted,) = torch.autograd.grad(expected.sum(), wide)
    assert_near(grad, wanted, torch.float32, total[:, None] * 30, "gradient")


def test_counts_that_are_not_whole(backend):
    """Weighted clicks: the coefficient is that of the gamma function."""
    x = torch.tensor([[0.5, 0.0, 2.25], [0.3, 0.4, 0.3]], device=DEVICE)
    logits = randn(2, 3, seed=1)
    torch.testing.assert_close(
        ops.multinomial_log_prob(x, logits).double(), naive(x, logits.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["contiguous", "coo", "csr"])
@pytest.mark.parametrize("options", [{}, {"k": 5, "k_chunk": 2}], ids=str)
def test_objectives(backend, layout, options):
    """Objectives accept dense and sparse clicks, alone and as a part of a Joint."""
    d = 2
    x = (3 * rand(B, X, seed=1)).floor()
    decoder = nn.Linear(d, X).to(DEVICE)
    q = randn(B, d, seed=3), randn(B, d, seed=4)
    call = fastvae.iwae if options else fastvae.elbo

    def run(data, decode, likelihood):
        value = call(data, q, decode, likelihood=likelihood, generator=generator(5), **options)
        return value, *torch.autograd.grad(value, list(decoder.parameters()))

    expected = run(x, decoder, "multinomial")
    given = as_layout(x, layout)
    both = run({"clicks": given, "age": x[:, :1]}, lambda z: {"clicks": decoder(z), "age": decoder(z)[:, :1]},
               Joint(clicks="multinomial", age="poisson"))  # fmt: skip
    dense = run({"clicks": x, "age": x[:, :1]}, lambda z: {"clicks": decoder(z), "age": decoder(z)[:, :1]},
                Joint(clicks="multinomial", age="poisson"))  # fmt: skip
    for found, wanted in ((run(given, decoder, "multinomial"), expected), (both, dense)):
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_without_the_coefficient(backend):
    x, logits = torch.tensor([[1, 0, 3], [2, 2, 0]], device=DEVICE), randn(2, 3, seed=1)
    plain = (x * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(Multinomial(coefficient=False).log_prob(x, logits), plain)
    own = torch.tensor([math.log(4), math.log(6)], device=DEVICE)
    torch.testing.assert_close(Multinomial().log_prob(x, logits), plain + own)
    assert repr(Multinomial(coefficient=False)) == "Multinomial(coefficient=False)"


def test_impossible_classes(backend):
    """A class of logit −∞ adds 0 where its count is 0, and −∞ elsewhere."""
    x = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], device=DEVICE)
    logits = randn(2, 3, seed=1)
    logits[:, 1] = -math.inf
    out = ops.multinomial_log_prob(x, logits)
    torch.testing.assert_close(out[:1], ops.multinomial_log_prob(x[:1, [0, 2]], logits[:1, [0, 2]]))
    assert out[1] == -math.inf


@pytest.mark.parametrize("width", [3, 20, 1100])
def test_equal_logits_are_uniform_however_large(backend, width):
    """Classes of −1e30 or 1e30 each have probability 1 / width; +inf gives no finite value."""
    x = (torch.arange(3 * width, device=DEVICE).reshape(3, width) % 4).float()
    logits = torch.tensor([[-1e30], [1e30], [0.0]], device=DEVICE).repeat(1, width)
    logits[2, 1] = math.inf
    out = ops.multinomial_log_prob(x, logits, coefficient=False)
    torch.testing.assert_close(out[:2], -x[:2].sum(1) * math.log(width))
    assert not bool(out[2].isfinite())


@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_in_its_row(backend, masked):
    """NaN in gives NaN out, in its row alone; what a mask leaves out is never read."""
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 0.0]], device=DEVICE)
    logits = randn(K, 2, 3, seed=1)
    logits[:, 0, 1] = math.nan
    logits.requires_grad_()
    mask = torch.tensor([[True, not masked, True], [True, True, True]], device=DEVICE)
    out = ops.multinomial_log_prob(x, logits, mask=mask)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert bool(out[:, 0].isnan().all()) != masked and not bool(out[:, 1].isnan().any())
    assert not bool(grad[:, 1].isnan().any())
    if masked:
        assert bool(grad.isfinite().all()) and not bool(grad[:, 0, 1].any())


WRONG = {
    "counts below 0": (lambda x: x - 2, {}, ["x holds -2", "at or above 0"]),
    "sparse counts below 0": (lambda x: (x - 2).to_sparse(), {}, ["x holds -2", "at or above 0"]),
    "another event": (lambda x: x[:, :-1], {}, ["[3, 7]", "[3, 6]"]),
    "columns beyond": (
        lambda x: torch.sparse_csr_tensor([0, 1, 1, 1], [9], [1.0], (3, 7), device=DEVICE,
                                          check_invariants=False), {}, ["columns that ascend", "from 0 to 6"],
    ),
    "columns out of order": (
        lambda x: torch.sparse_csr_tensor([0, 2, 2, 2], [3, 1], [1.0, 1.0], (3, 7), device=DEVICE,
                                          check_invariants=False), {}, ["columns that ascend"],
    ),
    "a sparse stack": (lambda x: x[None].to_sparse(), {}, ["sparse", "a matrix [B, X]"]),
    "a mask of numbers": (lambda x: x, {"mask": torch.ones(3, 7, device=DEVICE)}, ["mask", "bool"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case, backend, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU data are checked on request only
    of, options, words = WRONG[case]
    x = torch.arange(21.0, device=DEVICE).reshape(3, 7) % 5
    with pytest.raises((TypeError, ValueError)) as raised:
        ops.multinomial_log_prob(of(x), torch.zeros(3, 7, device=DEVICE), **options)
    for word in words:
        assert word in str(raised.value)
    if options:
        return
    with pytest.raises((TypeError, ValueError)):
        fastvae.elbo(of(x), torch.zeros(3, 4, device=DEVICE), lambda z: torch.zeros(len(z), 7, device=DEVICE),
                     likelihood="multinomial")  # fmt: skip


@pytest.mark.parametrize("event", [None, (3, 4)])
def test_a_fused_head_of_shaped_counts(event):
    """Without ``event`` the head's outputs have the shape of an example of x."""
    x, layer = torch.randint(0, 5, (B, 3, 4), device=DEVICE), nn.Linear(2, 12, device=DEVICE)
    q = randn(B, 4, seed=1)
    head = fastvae.FusedHead(nn.Identity(), layer, event=event)

    def decoder(z):
        return layer(z).unflatten(1, (3, 4))

    found, expected = (
        fastvae.elbo(x, q, d, likelihood="multinomial", generator=generator(2)) for d in (head, decoder)
    )
    torch.testing.assert_close(found, expected)
