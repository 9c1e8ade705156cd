"""Folded weights: sums that merge, standard errors by simulation, and Pareto k̂ against ArviZ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import weights as folding
from fastvae.weights import Weights, pareto_khat, tail_length

from .conftest import DEVICE
from .models import randn

B = 5


def _fields(weights: Weights) -> tuple[torch.Tensor, ...]:
    return weights.log_px, weights.stderr, weights.ess, weights.elbo, weights.khat, weights.tail


@given(
    cuts=st.lists(st.integers(1, 59), max_size=6),
    level=st.sampled_from([0.0, -1e3, 7e2]),
    spread=st.sampled_from([0.0, 0.3, 5.0, 300.0]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_gives_the_same(cuts, level, spread, order):
    """Chunks of any sizes, merged in any order, are the whole."""
    k = 60
    log_w = level + spread * torch.randn(k, B, dtype=torch.float64, device=DEVICE)
    log_w[torch.rand(k, B, device=DEVICE) < 0.2] = -math.inf
    tail = tail_length(k) + 1
    parts = [Weights.of(part, tail) for part in log_w.tensor_split(sorted(set(cuts))) if len(part)]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    for actual, expected in zip(_fields(merged), _fields(Weights.of(log_w, tail)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    expected = torch.logsumexp(log_w, 0) - math.log(k)
    torch.testing.assert_close(merged.log_px, expected, rtol=1e-12, atol=1e-9)


def test_rows_can_be_taken_out_and_put_back():
    """Examples that go on drawing while others have stopped."""
    first, second = (randn(k, B, seed=k, dtype=torch.float64) for k in (30, 40))
    tail = tail_length(70) + 1
    whole, rows = Weights.of(first, tail), torch.tensor([3, 0], device=DEVICE)
    got = whole.put(rows, whole.at(rows).merge(Weights.of(second[:, rows], tail)))
    expected = Weights.of(torch.cat([first, second]), tail)
    for b in range(B):
        reference = expected if b in (0, 3) else whole
        for actual, wanted in zip(_fields(got), _fields(reference), strict=True):
            torch.testing.assert_close(actual[..., b], wanted[..., b], rtol=1e-12, atol=1e-12)
    assert got.count.tolist() == [70, 30, 30, 70, 30]


def test_state_does_not_grow_with_k_but_for_the_tail():
    sizes = {}
    for k in (100, 10_000):
        weights = Weights.of(torch.randn(k, B, device=DEVICE), tail_length(k) + 1)
        sizes[k] = sum(v.numel() for v in weights)
    assert sizes[100] == B * (5 + 20 + 1)
    assert sizes[10_000] == B * (5 + 300 + 1)


def test_infinite_and_nan_weights():
    column = torch.tensor([-1.0, math.inf, 2.0, -math.inf], dtype=torch.float64, device=DEVICE)
    log_w = torch.stack([column, torch.full_like(column, -math.inf), column.where(column < 9, 0.0)], 1)
    log_w[2, 2] = math.nan
    halves = [Weights.of(part, 2) for part in (log_w[:2], log_w[2:])]
    for weights in (Weights.of(log_w, 2), halves[0].merge(halves[1]), halves[1].merge(halves[0])):
        assert weights.log_px[:2].tolist() == [math.inf, -math.inf]
        assert math.isnan(weights.log_px[2])


def test_standard_error_by_simulation():
    """The delta method's error is the spread of log p over replicates, for weights of a known spread."""
    replicates, k, sigma = 20_000, 400, 0.7
    log_w = sigma * randn(k, replicates, seed=4, dtype=torch.float64) - 600
    weights = Weights.of(log_w, 2)
    spread = float(weights.log_px.std())
    exact = math.sqrt(math.expm1(sigma**2) / k)
    # The standard error of a deviation over 20 000 replicates is 0.5 %; the delta method is off by O(1/k).
    assert abs(spread / exact - 1) < 0.03
    assert abs(float(weights.stderr.square().mean().sqrt()) / exact - 1) < 0.03
    # Bias of log p: -var / 2.
    mean = float(weights.log_px.mean()) + 600 - sigma**2 / 2
    assert abs(mean + exact**2 / 2) < 4 * spread / math.sqrt(replicates)


def test_one_draw_has_no_error():
    weights = Weights.of(torch.zeros(1, B, device=DEVICE), 2)
    assert weights.stderr.isnan().all()
    assert weights.ess.tolist() == [1] * B


# Pareto k̂


def test_khat_is_fitted_in_pieces(monkeypatch):
    log_w = torch.randn(500, B, dtype=torch.float64, device=DEVICE)
    whole = pareto_khat(log_w)
    monkeypatch.setattr(folding, "_FIT_SIZE", 2000)
    torch.testing.assert_close(pareto_khat(log_w), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [21, 57, 1000, 5000])
def test_khat_is_that_of_arviz(k, dtype):
    psislw = pytest.importorskip("arviz.stats.stats").psislw

    columns = [s * torch.randn(k) - 500 for s in (0.1, 1, 3, 20)]
    columns += [torch.distributions.Gamma(0.5, 0.1).sample((k,)), (3 * torch.randn(k)).round()]
    log_w = torch.stack(columns, 1).to(dtype)
    got = pareto_khat(log_w.to(DEVICE)).cpu()
    _, expected = psislw(log_w.double().numpy().T.copy())
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.5])
def test_khat_of_pareto_weights(shape):
    """Weights u^-shape have that tail index: log w = shape times an exponential."""
    k = 100_000
    generator = torch.Generator().manual_seed(5)
    log_w = shape * torch.empty(k, 40, dtype=torch.float64).exponential_(generator=generator).to(DEVICE)
    got = pareto_khat(log_w)
    # About (1 + shape) / sqrt(M) is the standard error of an estimate, M = 949; and the prior's pull.
    assert abs(float(got.mean()) - shape) < 5 * (1 + shape) / math.sqrt(949 * 40) + 0.01
    assert float((got - shape).abs().max()) < 5 * (1 + shape) / math.sqrt(949)


def test_khat_where_nothing_can_be_fitted():
    flat = torch.zeros(100, 1, device=DEVICE)
    assert pareto_khat(flat).tolist() == [-math.inf]
    # 20 draws leave a tail of 4, 21 one of 5.
    assert pareto_khat(torch.randn(20, 3, device=DEVICE)).isnan().all()
    assert pareto_khat(torch.randn(21, 3, device=DEVICE)).isfinite().all()
    # One draw outweighs all others by more than the range of float64.
    alone = torch.full((100, 1), -900.0, dtype=torch.float64, device=DEVICE)
    alone[17] = 0.0
    assert pareto_khat(alone).tolist() == [math.inf]
    # Seven draws above a floor that is out of range, as ArviZ fits them.
    some = torch.full((100, 1), -900.0, dtype=torch.float64, device=DEVICE)
    some[:7, 0] = -torch.arange(7, dtype=torch.float64)
    assert 0 < float(pareto_khat(some)) < 1
    # Rounding alone is no tail.
    rounded = -1000 + 1e-4 * torch.randn(1000, 3, device=DEVICE)
    assert pareto_khat(rounded).tolist() == [-math.inf] * 3
    nan = torch.randn(100, 2, device=DEVICE)
    nan[5, 1] = math.nan
    assert pareto_khat(nan).isnan().tolist() == [False, True]
    assert pareto_khat(torch.full((100, 1), -math.inf, device=DEVICE)).isnan().all()
    assert pareto_khat(torch.zeros(100, 0, device=DEVICE)).shape == (0,)


def test_khat_ignores_the_level():
    log_w = torch.randn(300, B, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(pareto_khat(log_w - 1e5), pareto_khat(log_w), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("log_w", "error", "words"),
    [
        (torch.zeros(0, 2), ValueError, "no draws"),
        (torch.zeros(5), ValueError, r"\[K, B\]"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "float32"),
        ([1.0], TypeError, "tensor"),
    ],
)
def test_khat_errors(log_w, error, words):
    with pytest.raises(error, match=words):
        pareto_khat(log_w)


def test_log_marginal_agrees_with_weights_of_all_draws():
    """Streamed in chunks that do not divide k, and folded now and then, all four results are those of one
    array.
    """
    k, features, latent = 333, 7, 3
    decoder = torch.nn.Linear(latent, features, dtype=torch.float64, device=DEVICE)
    likelihood = fastvae.Gaussian(scale=0.5)
    x = randn(B, features, seed=1, dtype=torch.float64)
    q = tuple(randn(B, latent, seed=s, dtype=torch.float64) for s in (2, 3))
    seed = torch.Generator(DEVICE).manual_seed(5)
    z, ratio = fastvae.ops.rsample_log_ratio(*q, samples=k, generator=torch.Generator(DEVICE).manual_seed(5))
    whole = Weights.of(
        likelihood.log_likelihood(x, decoder(z.flatten(0, 1)), k).detach() + ratio, tail_length(k) + 1
    )
    expected = (whole.log_px, whole.stderr, whole.ess, whole.khat)
    for k_chunk in (1, 7, 100, 1000, None):
        options = {"k": k, "k_chunk": k_chunk, "likelihood": likelihood, "generator": seed.manual_seed(5)}
        got = fastvae.log_marginal(x, q, decoder, **options)
        for actual, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)
