"""Streamed weights: merging sums, the jackknife, errors and intervals, Pareto smoothing and k̂.

The jackknife is tested by its definition, errors and intervals by simulation, Pareto smoothing by the paper,
k̂ against ArviZ.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import genpareto as GPD
from scipy.stats import norm as normal

import fastvae
from fastvae.estimation import pareto
from fastvae.estimation.pareto import pareto_khat, tail_length
from fastvae.estimation.sums import kept_draws
from fastvae.estimation.weights import Weights, _root
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import randn

B = 5


def _fields(weights: Weights) -> tuple[torch.Tensor, ...]:
    return *vars(weights.summary()).values(), weights.elbo, weights.tail


def _jackknife(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.jackknife, weights.jackknife_stderr


@given(
    cuts=st.lists(st.integers(1, 59), max_size=6),
    level=st.sampled_from([0.0, -1e3, 7e2]),
    spread=st.sampled_from([0.0, 0.3, 5.0, 300.0]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_gives_the_same_result(cuts, level, spread, order):
    """Chunks of any sizes, merged in any order, give the whole."""
    k = 60
    log_w = level + spread * torch.randn(k, B, dtype=torch.float64, device=DEVICE)
    log_w[torch.rand(k, B, device=DEVICE) < 0.2] = -math.inf
    tail = tail_length(k) + 1  # shorter than the kept draws, so that many lie below it
    parts = [Weights.of(part, tail) for part in log_w.tensor_split(sorted(set(cuts))) if len(part)]
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    for actual, expected in zip(_fields(merged), _fields(Weights.of(log_w, tail)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    expected = torch.logsumexp(log_w, 0) - math.log(k)
    torch.testing.assert_close(merged.log_px, expected, rtol=1e-12, atol=1e-9)


def test_rows_can_be_extracted_and_put_back():
    """Rows can be extracted and put back, as when some examples continue while others have stopped."""
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


def test_only_the_tail_of_the_state_grows_with_k():
    sizes = {}
    for k in (100, 10_000):
        weights = Weights.of(torch.randn(k, B, device=DEVICE), kept_draws(k))
        sizes[k] = sum(v.numel() for v in weights.tensors)
    assert sizes[100] == B * (21 + 64)
    assert sizes[10_000] == B * (21 + 300 + 1)


@given(
    k=st.sampled_from([1, 2, 3, 5, 20, 21, 26, 64, 400, 3000]),
    spread=st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 1.0, 5.0, 300.0]),
    coefficient=st.sampled_from([0, 1, 7]),
    randomisations=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_estimates_in_cpp_equal_the_formulas(k, spread, coefficient, randomisations, dtype, seed):
    """The summary's C++ computes what the properties do, also for equal, infinite and NaN weights."""
    noise = torch.Generator().manual_seed(seed)
    log_w = (spread * torch.randn(k, 8, generator=noise, dtype=dtype) - 90).to(DEVICE)
    log_w[:, 1] = -math.inf
    log_w[0, 2], log_w[0, 3], log_w[0, 4] = math.inf, math.nan, 1e4
    log_w[1:, 5] = -math.inf
    log_w[k // 2 :, 6] = -math.inf
    total = Weights.of(log_w, kept_draws(2 * k), 0, randomisations)
    if coefficient and not randomisations:
        total = total.merge(Weights.of(log_w.flip(1), kept_draws(2 * k)).weighted(coefficient))
    in_cpp = vars(total.summary())
    for name, value in in_cpp.items():
        # Differences of rounding in the standard error grow with k where the weights are nearly equal.
        expected = getattr(total, name)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize("gap", [0.0, 30.0, 60.0, 300.0])
def test_the_jackknife_of_randomisations_of_which_one_dominates(gap):
    """Leaving it out leaves the others' sum, not a difference of nearly equal numbers."""
    k, number = 512, 8
    log_w = torch.randn(k, B, dtype=torch.float64, device=DEVICE)
    log_w[17] += gap
    found = Weights.of(log_w, kept_draws(k), 0, number).summary()
    sums = torch.stack([log_w[r::number].logsumexp(0) for r in range(number)])
    others = torch.stack([torch.cat([sums[:r], sums[r + 1 :]]).logsumexp(0) for r in range(number)])
    others = others - math.log(k - k // number)
    expected = number * (sums.logsumexp(0) - math.log(k)) - (number - 1) * others.mean(0)
    error = ((others - others.mean(0)).square().sum(0) * (number - 1) / number).sqrt()
    torch.testing.assert_close(found.jackknife, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.jackknife_stderr, error, rtol=1e-10, atol=0)


def test_a_tail_too_short_for_its_draws_gives_nan():
    """Memory beyond the tail is not read."""
    extension = pytest.importorskip("fastvae._C")
    weights = Weights.of(torch.randn(400, B, dtype=torch.float64), kept_draws(400))
    tensors = weights.log_px, weights.tail, weights.powers, weights.moments
    for count in (weights.count * 10, weights.count * 0, -weights.count):
        found = extension.weight_estimates(*tensors, count, 0.95, 1.96)
        assert len(found) == 8 and all(bool(f.isnan().all()) for f in found)
    with pytest.raises(ValueError, match="powers"):
        extension.weight_estimates(*tensors[:2], weights.powers[:2], tensors[3], weights.count, 0.95, 1.96)


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
    assert abs(float(weights.log_px_stderr.square().mean().sqrt()) / exact - 1) < 0.03
    # Bias of log p: -var / 2.
    mean = float(weights.log_px.mean()) + 600 - sigma**2 / 2
    assert abs(mean + exact**2 / 2) < 4 * spread / math.sqrt(replicates)


def test_the_error_of_one_draw_is_nan():
    weights = Weights.of(torch.zeros(1, B, device=DEVICE), 2)
    assert weights.log_px_stderr.isnan().all()
    assert weights.ess.tolist() == [1] * B


def test_the_jackknife_of_one_draw_is_nan():
    """The jackknife of one draw is NaN for any weight; of two draws of weight 0 it is −∞."""
    log_w = torch.tensor([[0.5, -math.inf]], device=DEVICE)
    assert bool(torch.stack(_jackknife(Weights.of(log_w, 2))).isnan().all())
    estimate, error = _jackknife(Weights.of(log_w.expand(2, 2), 2))
    assert estimate.tolist() == [pytest.approx(0.5), -math.inf] and error[0] == 0 and error[1].isnan()


# Jackknife, Pareto smoothing, intervals


def _folded(log_w, pieces=1):
    """Return the weights of all draws, merged from pieces of different lengths."""
    k = len(log_w)
    cuts = [k * i * i // pieces**2 for i in range(1, pieces)]
    first, *others = [Weights.of(part, kept_draws(k)) for part in log_w.tensor_split(cuts) if len(part)]
    for part in others:
        first = first.merge(part)
    return first


def _left_out(log_w):
    """Compute log p(x) of all draws [B], and without each of them [K, B], by definition."""
    k = len(log_w)
    rest = torch.stack([torch.logsumexp(torch.cat([log_w[:i], log_w[i + 1 :]]), 0) for i in range(k)])
    return torch.logsumexp(log_w, 0) - math.log(k), rest - math.log(k - 1)


@pytest.mark.parametrize("pieces", [1, 3, 7])
@pytest.mark.parametrize("k", [2, 5, 63, 64, 65, 230, 700])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
def test_the_jackknife_equals_the_definition(k, pieces, spread):
    log_w = spread * randn(k, B, seed=k, dtype=torch.float64) - 20
    estimate, error = _jackknife(_folded(log_w, pieces))
    whole, rest = _left_out(log_w)
    # The definition's own rounding, k times that of numbers of this size, and the series' truncation.
    rounding = 4 * k * torch.finfo(torch.float64).eps * float(rest.abs().max())
    series = (kept_draws(k) + 1) ** -6 * (k > kept_draws(k))
    torch.testing.assert_close(
        estimate, k * whole - (k - 1) * rest.mean(0), rtol=0, atol=rounding + series / 7
    )
    variance = (k - 1) / k * (rest - rest.mean(0)).square().sum(0)
    torch.testing.assert_close(error.square(), variance, rtol=1e-9, atol=1e-14 + 0.8 * series)


def test_the_truncation_error_of_the_jackknife_is_bounded():
    """The series' error is within its bound in the worst case.

    This is one draw more than the tail holds, all of equal weight, and the others negligible.
    """
    k, large = 400, kept_draws(400) + 1
    log_w = torch.full((k, 1), -60.0, dtype=torch.float64, device=DEVICE)
    log_w[:large] = 0.0
    (estimate,) = _folded(log_w, 4).jackknife
    share = 1 / (large + (k - large) * math.exp(-60))
    left_out = large * math.log1p(-share) - (k - large) * math.exp(-60) * share
    expected = math.log(large / k) - (k - 1) * (left_out / k - math.log1p(-1 / k))
    assert abs(float(estimate) - expected) < large**-6 / 7 / 5 + 4e-15


def test_one_draw_that_outweighs_all_others():
    """Without a dominant draw the next one counts, though negligible against it."""
    log_w = (
        torch.tensor([0.0, -900.0, -950.0], dtype=torch.float64, device=DEVICE)[:, None].expand(3, 2).clone()
    )
    log_w[1:, 1] = -math.inf
    estimate = _folded(log_w).jackknife
    expected = -math.log(3) + 2 / 3 * 900 - 2 * math.log(3 / 2)
    assert float(estimate[0]) == pytest.approx(expected, rel=1e-14)
    assert float(estimate[1]) == math.inf  # by definition


@pytest.mark.parametrize("k", [2, 20, 21, 100, 3000])
def test_equal_weights_make_all_estimates_exact(k):
    """Equal weights, as of the exact posterior, make all estimates log p(x), with an interval of width 0."""
    got = _folded(torch.full((k, B), -700.125, dtype=torch.float64, device=DEVICE), 3).summary()
    for value in (got.log_px, got.jackknife, got.psis, got.low, got.high):
        torch.testing.assert_close(value, torch.full_like(value, -700.125), rtol=0, atol=1e-6 / math.sqrt(k))
    for value in (got.log_px, got.jackknife, got.psis):
        torch.testing.assert_close(value, torch.full_like(value, -700.125), rtol=0, atol=2e-12)


# Coefficients of draws, and weights that are nearly equal

_ROUNDS = [(1, 64), (2, 31), (3, 1), (4, 304)]  # coefficient and draws of each round


def _in_rounds(log_w, rounds, groups=0):
    """Return the weights of draws in rounds, which differ in their coefficients, and these, [K, 1]."""
    k, start, total = len(log_w), 0, None
    for coefficient, draws in rounds:
        for part in log_w[start : start + draws].split(100):
            of = Weights.of(part, kept_draws(k), start, groups=groups).weighted(coefficient)
            total = of if total is None else total.merge(of)
            start += len(part)
    c = torch.cat([log_w.new_full((draws, 1), float(c)) for c, draws in rounds])
    return total.scaled(torch.log(k / c.sum(0)).expand(log_w.shape[1])), c


@pytest.mark.parametrize("spread", [1e-12, 1e-8, 1e-4, 1e-2, 1.0, 4.0])
@pytest.mark.parametrize("rounds", [[(1, 400)], _ROUNDS], ids=["equal", "rounds"])
def test_errors_are_exact_however_equal_the_weights(rounds, spread):
    """The error, the ESS and the skewness are those of centred weights, without cancellation."""
    k = 400
    log_w = spread * randn(k, B, seed=4, dtype=torch.float64)
    weights, c = _in_rounds(log_w, rounds)
    shift = log_w.mean(0)
    w = torch.expm1(log_w - shift)  # minus 1, which a mean close to 1 would round
    mean = (c * w).sum(0) / c.sum()
    terms = c * (w - mean) / (c.sum() * (1 + mean))
    variance = terms.square().sum(0)
    options = {"rtol": 1e-9 + 1e-15 / spread, "atol": 0}
    torch.testing.assert_close(weights.log_px, shift + torch.log1p(mean), rtol=0, atol=1e-13)
    torch.testing.assert_close(weights.log_px_stderr, (variance * k / (k - 1)).sqrt(), **options)
    torch.testing.assert_close(weights.ess, 1 / (1 / k + variance), rtol=1e-12, atol=0)
    assert bool((weights.ess <= k).all())
    skewness = (terms.pow(3).sum(0) / variance**1.5).clamp(min=-1, max=1)
    found = weights._central[1] / weights._central[0] ** 1.5
    torch.testing.assert_close(found.clamp(min=-1, max=1), skewness, rtol=0, atol=10 * options["rtol"])
    # An interval of about ± 1.96 errors, at any scale.
    if spread <= 1e-2:
        widths = (weights.high - weights.low) / weights.log_px_stderr
        assert spread < 1e-8 or bool(((widths > 3.7) & (widths < 4.2)).all())


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 3.0])
def test_the_jackknife_leaves_out_coefficients(spread):
    log_w = spread * randn(400, B, seed=5, dtype=torch.float64)
    weights, c = _in_rounds(log_w, _ROUNDS)
    k, (v, share) = len(c), (c * log_w.exp(), c / c.sum())
    rest = torch.log1p(-v / v.sum(0)) - torch.log1p(-share)  # minus log_px
    value = weights.log_px - (k - 1) * rest.mean(0)
    torch.testing.assert_close(weights.jackknife, value, rtol=0, atol=1e-8)
    error = ((k - 1) / k * (rest - rest.mean(0)).square().sum(0)).sqrt()
    largest = float((v / v.sum(0)).max())
    torch.testing.assert_close(weights.jackknife_stderr, error, rtol=0.2 * largest + 3 / k, atol=0)


def test_groups_leave_out_coefficients():
    log_w = 0.01 * randn(400, B, seed=6, dtype=torch.float64)
    weights, c = _in_rounds(log_w, _ROUNDS, groups=32)
    group = torch.arange(400, device=DEVICE) % 32
    expected = [((c * log_w.exp())[group != g].sum(0) / c[group != g].sum()).log() for g in range(32)]
    torch.testing.assert_close(weights.left_out, torch.stack(expected), rtol=0, atol=1e-13)


def test_the_jackknife_removes_the_bias():
    replicates, k, sigma = 20_000, 40, 0.7
    weights = _folded(sigma * randn(k, replicates, seed=4, dtype=torch.float64))
    error = float(weights.log_px.std()) / math.sqrt(replicates)
    bias, corrected = (float(v.mean()) - sigma**2 / 2 for v in (weights.log_px, weights.jackknife))
    assert bias == pytest.approx(-math.expm1(sigma**2) / 2 / k, abs=5 * error)
    assert abs(corrected) < 5 * error < abs(bias)


def _psis(log_w):
    """Compute the log mean of smoothed weights by Vehtari et al.'s algorithm for one example, in loops."""
    k = len(log_w)
    order = np.sort(log_w - log_w.max())
    length = math.ceil(min(k / 5, 3 * math.sqrt(k)))
    cutoff = order[k - length - 1]
    x = np.exp(order[k - length :]) - np.exp(cutoff)
    # Zhang & Stephens 2009, eq. 6 to 8; their k is -ξ.
    m = 30 + int(math.sqrt(length))
    theta = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(m) + 0.5))) / (3 * x[int(length / 4 + 0.5) - 1])
    k_of = np.array([-np.log1p(-t * x).mean() for t in theta])
    log_l = length * (np.log(theta / k_of) + k_of - 1)
    weight = np.array([1 / np.exp(log_l - one).sum() for one in log_l])
    best = float((theta * weight).sum() / weight.sum())
    xi = float(np.log1p(-best * x).mean())
    sigma = -xi / best
    xi = (length * xi + 5) / (length + 10)
    fitted = GPD.ppf((np.arange(length) + 0.5) / length, xi, loc=np.exp(cutoff), scale=sigma)
    smooth = np.concatenate([np.exp(order[: k - length]), np.minimum(fitted, 1.0)])
    return math.log(smooth.mean()) + log_w.max()


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("k", [21, 57, 300, 2000])
def test_psis_equals_the_paper(k, pieces):
    log_w = torch.stack([s * randn(k, seed=k, dtype=torch.float64) - 500 for s in (0.1, 1.0, 2.0, 5.0)], 1)
    weights = _folded(log_w, pieces)
    expected = [_psis(column) for column in log_w.cpu().numpy().T]
    torch.testing.assert_close(
        weights.psis.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_psis_without_a_tail_to_fit():
    for log_w in (
        randn(20, B, seed=1),
        torch.zeros(100, B, device=DEVICE),
        torch.arange(100.0)[:, None] * -400,
    ):
        weights = _folded(log_w.double())
        assert torch.equal(weights.psis, weights.log_px)


def _linear_gaussian(k, replicates, scale, latents=2):
    """Return log weights for a q with the exact posterior's mean and ``scale`` times its deviation.

    log p(x) is 0.
    """
    square = sum(randn(k, replicates, seed=d + 1, dtype=torch.float64).square() for d in range(latents))
    return (1 - scale**2) / 2 * square + latents * math.log(scale)


@pytest.mark.parametrize(("k", "scale"), [(100, 1.3), (300, 0.9), (300, 0.7), (1000, 0.5)])
def test_intervals_cover(k, scale):
    """Intervals cover for Pareto k = 1 - scale²; the delta method's fail above 1/2."""
    replicates = 1000
    weights = _folded(_linear_gaussian(k, replicates, scale))
    low, high = weights.interval()
    holds = float(((low <= 0) & (high >= 0)).double().mean())
    normal = float((weights.log_px.abs() <= 1.96 * weights.log_px_stderr).double().mean())
    # 95 % minus four standard errors of a share of 1000.
    assert holds > 0.95 - 4 * math.sqrt(0.05 * 0.95 / replicates)
    assert bool((low <= weights.log_px).all()) and bool((weights.log_px <= high).all())
    if scale == 0.5:
        assert normal < 0.75
    if scale >= 0.9:
        # For light-tailed weights it is about as narrow.
        assert float((high - low).median()) < 1.25 * float((2 * 1.96 * weights.log_px_stderr).median())
    narrower = weights.interval(0.8)
    assert bool((narrower[0] >= low).all()) and bool((narrower[1] <= high).all())


def test_intervals_are_open_for_heavy_tails():
    low, high = _folded(_linear_gaussian(500, 50, 0.3, latents=20)).interval()
    assert bool((high == math.inf).all()) and bool((low < 0).all())
    # For one draw only Markov's inequality holds.
    low, high = _folded(torch.zeros(1, B, device=DEVICE)).interval(0.9)
    torch.testing.assert_close(low, torch.full_like(low, math.log(0.05)))
    assert bool((high == math.inf).all())


@pytest.mark.parametrize("steepness", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.975])
def test_the_ends_of_an_interval_are_exact(steepness, probability):
    """Quantiles are found to rounding, however narrow the distribution within the range searched."""
    center = torch.linspace(-0.9, 0.9, 39, dtype=torch.float64, device=DEVICE)

    def excess(value):
        return torch.special.ndtr(steepness * (value - center)) - probability

    quantile = center + normal.ppf(probability) / steepness
    inside = quantile.abs() < 1
    found = _root(excess, torch.full_like(center, -1.0), torch.full_like(center, 1.0))
    torch.testing.assert_close(found[inside], quantile[inside], rtol=0, atol=1e-13)


def test_estimates_of_infinite_and_nan_weights():
    log_w = randn(100, 4, seed=1, dtype=torch.float64)
    log_w[:, 1] = -math.inf
    log_w[3, 2] = math.nan
    log_w[50:, 3] = -math.inf
    for pieces in (1, 5):
        got = _folded(log_w, pieces).summary()
        for value in (got.log_px, got.jackknife, got.psis, got.low, got.high):
            assert value.isnan().tolist() == [False, False, True, False]
        assert [float(v[1]) for v in (got.log_px, got.jackknife, got.psis, got.low)] == [-math.inf] * 4
        assert float(got.high[1]) == math.inf
        # Zero weights count like others.
        estimate, error = _left_out(log_w[:, 3:])
        expected = 100 * estimate - 99 * error.mean(0)
        torch.testing.assert_close(got.jackknife[3:], expected, rtol=0, atol=1e-11)


def test_no_examples():
    estimates = _folded(torch.zeros(100, 0, device=DEVICE), 2).summary()
    assert all(value.shape == (0,) for value in vars(estimates).values())


# Pareto k̂


def test_khat_and_interval_may_be_computed_in_pieces(monkeypatch):
    log_w = torch.randn(500, B, dtype=torch.float64, device=DEVICE)
    whole = _folded(log_w).summary()
    for name in ("_FIT_SIZE", "_FIT_SIZE_ON_GPU"):
        monkeypatch.setattr(pareto, name, 2000)
    pieces = _folded(log_w).summary()
    for name in ("khat", "low", "high"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [21, 57, 1000, 5000])
def test_khat_equals_arviz(k, dtype):
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
    # An estimate's standard error is about (1 + shape) / sqrt(M), M = 949, plus the prior's bias.
    assert abs(float(got.mean()) - shape) < 5 * (1 + shape) / math.sqrt(949 * 40) + 0.01
    assert float((got - shape).abs().max()) < 5 * (1 + shape) / math.sqrt(949)


def test_khat_without_a_tail_to_fit():
    flat = torch.zeros(100, 1, device=DEVICE)
    assert pareto_khat(flat).tolist() == [-math.inf]
    # 20 draws leave a tail of 4, 21 one of 5.
    assert pareto_khat(torch.randn(20, 3, device=DEVICE)).isnan().all()
    assert pareto_khat(torch.randn(21, 3, device=DEVICE)).isfinite().all()
    # One draw outweighs all others by more than the range of float64.
    alone = torch.full((100, 1), -900.0, dtype=torch.float64, device=DEVICE)
    alone[17] = 0.0
    assert pareto_khat(alone).tolist() == [math.inf]
    # Seven draws above a floor that underflows, as ArviZ fits them.
    some = torch.full((100, 1), -900.0, dtype=torch.float64, device=DEVICE)
    some[:7, 0] = -torch.arange(7, dtype=torch.float64)
    assert 0 < float(pareto_khat(some)) < 1
    # Rounding alone does not make a tail.
    rounded = -1000 + 1e-4 * torch.randn(1000, 3, device=DEVICE)
    assert pareto_khat(rounded).tolist() == [-math.inf] * 3
    nan = torch.randn(100, 2, device=DEVICE)
    nan[5, 1] = math.nan
    assert pareto_khat(nan).isnan().tolist() == [False, True]
    assert pareto_khat(torch.full((100, 1), -math.inf, device=DEVICE)).isnan().all()
    assert pareto_khat(torch.zeros(100, 0, device=DEVICE)).shape == (0,)


def test_khat_does_not_depend_on_a_constant():
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
    """Streamed in chunks that do not divide k, log_marginal's results equal those of a single array."""
    k, features, latent = 333, 7, 3
    decoder = torch.nn.Linear(latent, features, dtype=torch.float64, device=DEVICE)
    likelihood = Gaussian(scale=0.5)
    x = randn(B, features, seed=1, dtype=torch.float64)
    q = tuple(randn(B, latent, seed=s, dtype=torch.float64) for s in (2, 3))
    seed = torch.Generator(DEVICE).manual_seed(5)
    z, ratio = fastvae.ops.rsample_log_ratio(*q, k=k, generator=torch.Generator(DEVICE).manual_seed(5))
    whole = Weights.of(
        likelihood.log_likelihood(x, decoder(z.flatten(0, 1)), k).detach() + ratio, kept_draws(k)
    )
    expected = whole.summary()
    for k_chunk in (1, 7, 100, 1000, None):
        options = {"k": k, "k_chunk": k_chunk, "likelihood": likelihood, "generator": seed.manual_seed(5)}
        got = fastvae.log_marginal(x, q, decoder, **options)
        torch.testing.assert_close(vars(got), vars(expected), rtol=1e-8, atol=1e-8)


def test_a_small_first_chunk_is_folded_with_larger_ones():
    """A likelihood whose width is unknown draws one sample first; many draws are folded in several parts."""

    class Own(fastvae.likelihoods.Likelihood):
        def log_prob(self, x, parameters):
            return -(x - parameters).abs()

    batch, k = 40, 60_000
    x, q = torch.ones(batch, 1, device=DEVICE), torch.zeros(batch, 2, device=DEVICE)
    seed = torch.Generator(DEVICE)
    results = [
        fastvae.log_marginal(
            x, q, lambda z: z, k=k, k_chunk=chunk, likelihood=Own(), generator=seed.manual_seed(3)
        ).log_px
        for chunk in (None, 1000)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
