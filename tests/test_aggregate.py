"""Density of an aggregate posterior and its marginals: every backend against float64 and torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import fastvae
from fastvae import ops

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE
from .models import randn

SIZES = strategies.distinct_sizes(3, largest=40, elements=4000)


@st.composite
def cases(draw, sizes=SIZES):
    """Draw z [N, D], wide or narrow posteriors [U, D], the data set's size, and upstream gradients."""
    n, u, d = draw(sizes)
    size = 0
    if u > 1 and draw(st.booleans()):
        n, size = u * max(1, min(3, n // u)), u + draw(st.sampled_from([0, 1, 17, 60_000]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed, spread = draw(st.integers(0, 999)), draw(st.sampled_from([0.0, -6.0, -18.4, 3.0]))
    mu = 2 * randn(u, d, seed=seed)
    logvar = spread + 0.3 * randn(u, d, seed=seed + 1)
    near = mu[torch.arange(n, device=DEVICE) % u] + math.exp(spread / 2) * randn(n, d, seed=seed + 2)
    z = near if draw(st.booleans()) else randn(n, d, seed=seed + 3)
    tensors = [t.to(dtype) for t in (z, mu, logvar, randn(n, seed=seed + 4), randn(n, d, seed=seed + 5))]
    if draw(st.booleans()):
        tensors = [t.t().contiguous().t() for t in tensors]
    wanted = draw(st.sampled_from(["both", "whole", "each"]))
    grads = [None if wanted == "each" else tensors[3], None if wanted == "whole" else tensors[4]]
    return *tensors[:3], size, *grads


def _run(z, mu, logvar, size, *grads):
    leaves = [t.detach().requires_grad_() for t in (z, mu, logvar)]
    results = ops.aggregate._aggregate_log_prob(*leaves, size)
    outputs, grads = zip(*[p for p in zip(results, grads, strict=True) if p[1] is not None], strict=True)
    return *results, *torch.autograd.grad(outputs, leaves, grads)


def results(case):
    """Return (name, actual, plain PyTorch's, expected) for all results."""
    actual = _run(*case)
    with fastvae.use_backend("reference"):
        eager = _run(*case)
    whole, each, grads = formulas.aggregate(*case)
    names = "log_q", "log_q_each", "grad_z", "grad_mu", "grad_logvar"
    return list(zip(names, actual, eager, (whole, each, *grads), strict=True))


@given(case=cases())
def test_aggregate_is_accurate(backend, case):
    for name, actual, _, expected in results(case):
        # The scores of a row share errors.
        assert_accurate(name, actual, None, expected)


@pytest.mark.parametrize(
    ("n", "u", "d", "size"),
    [
        (3, 300, 2, 0), (600, 300, 2, 301), (16, 513, 5, 0), (300, 17, 3, 0), (2300, 2, 7, 90),
        (129, 31, 1, 0), (5, 1, 130, 0), (33, 70, 3, 0), (140, 70, 3, 4000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_beyond_a_block_a_unit_and_a_part(backend, n, u, d, size, dtype):
    """Accurate for more components, rows and dimensions than a block, a unit of work or a partial sum."""
    shapes = [(n, d), (u, d), (u, d), (n,), (n, d)]
    z, mu, logvar, *grads = (randn(*s, seed=i).to(dtype) for i, s in enumerate(shapes))
    for name, actual, _, expected in results((z, mu, logvar, size, *grads)):
        assert_accurate(name, actual, None, expected)


def _log_weights(batch, n):
    """Compute eq. S8 of Chen et al. 2018: one row for each example."""
    weights = torch.full((batch, batch), 1 / (batch - 1), dtype=torch.float64, device=DEVICE)
    for b in range(batch):
        weights[b, b] = 1 / n
        weights[b, (b + 1) % batch] = (n - batch + 1) / (n * (batch - 1))
    return weights.log()


@pytest.mark.parametrize("size", [None, 7, 50])
def test_densities_equal_torch(backend, size):
    k, b, d = 4, 7, 3
    z = randn(k, b, d, seed=1).double().requires_grad_()
    mu, logvar = (randn(b, d, seed=s).double().requires_grad_() for s in (2, 3))
    got = ops.aggregate_log_prob(z, mu, logvar, dataset_size=size)
    weights = (
        torch.zeros(b, b, device=DEVICE).double() - math.log(b) if size is None else _log_weights(b, size)
    )
    pairs = td.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z[:, :, None])  # [K, B, U, D]
    expected = (
        torch.logsumexp(weights + pairs.sum(3), 2),
        torch.logsumexp(weights[:, :, None] + pairs, 2),
    )
    assert got[0].shape == (k, b) and got[1].shape == (k, b, d)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    grads, wanted = (
        torch.autograd.grad(whole.sin().sum() + each.cos().sum(), (z, mu, logvar))
        for whole, each in (got, expected)
    )
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_marginals_equal_mixtures_of_one_dimension(backend):
    z, mu, logvar = randn(9, 3, seed=1), randn(5, 3, seed=2), randn(5, 3, seed=3)
    whole, each = ops.aggregate_log_prob(z, mu, logvar)
    torch.testing.assert_close(whole, ops.mixture_log_prob(z, mu, logvar), rtol=1e-6, atol=1e-5)
    for d in range(3):
        column = (t[:, d : d + 1] for t in (z, mu, logvar))
        torch.testing.assert_close(each[:, d], ops.mixture_log_prob(*column), rtol=1e-6, atol=1e-6)


def test_stratified_weights_are_unbiased():
    """The mean of q(z) over the batches that contain an example is that of the data set."""
    n, b, d = 5, 3, 2
    mu, logvar = (randn(n, d, seed=s).double() for s in (1, 2))
    z = randn(1, d, seed=3).double()
    full = [t.exp() for t in ops.aggregate_log_prob(z, mu, logvar)]
    batches = [list(batch) for batch in itertools.permutations(range(n), b) if batch[0] == 2]
    means = [
        ops.aggregate_log_prob(z.expand(b, d), mu[batch], logvar[batch], dataset_size=n) for batch in batches
    ]
    for i in (0, 1):
        mean = torch.stack([one[i][0].exp() for one in means]).mean(0)
        torch.testing.assert_close(mean, full[i][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_single_precision(backend, dtype):
    leaves = [randn(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate([(9, 3), (4, 3), (4, 3)])]
    got = ops.aggregate_log_prob(*leaves)
    expected = ops.aggregate_log_prob(*(t.detach().double() for t in leaves))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    assert all(g.dtype == dtype for g in torch.autograd.grad(got[0].sum() + got[1].sum(), leaves))


def test_a_single_posterior(backend):
    z, mu, logvar = randn(5, 4, 3, seed=1), randn(1, 3, seed=2), randn(1, 3, seed=3)
    whole, each = ops.aggregate_log_prob(z, mu, logvar)
    expected = td.Normal(mu[0], torch.exp(0.5 * logvar[0])).log_prob(z)
    torch.testing.assert_close(each, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(whole, expected.sum(-1), rtol=1e-6, atol=1e-5)


def test_zero_probability(backend):
    """Zero probability gives −∞ and zero gradient, and does not affect other rows and dimensions."""
    z, mu, logvar = randn(5, 2, seed=1), randn(3, 2, seed=2), randn(3, 2, seed=3)
    expected = ops.aggregate_log_prob(z, mu, logvar)
    far = z.clone()
    far[1, 0] = 1e25
    far.requires_grad_()
    whole, each = ops.aggregate_log_prob(far, mu, logvar)
    assert whole[1] == -math.inf and each[1, 0] == -math.inf
    rest = [0, 2, 3, 4]
    assert torch.equal(whole[rest], expected[0][rest]) and torch.equal(each[rest], expected[1][rest])
    assert torch.equal(each[1, 1], expected[1][1, 1])
    grad = torch.autograd.grad(whole.sum() + each.sum(), far)[0]
    assert grad[1, 0] == 0 and bool(grad[1, 1] != 0) and bool(grad[rest].all())


def test_nan_stays_in_its_row(backend):
    z, mu, logvar = randn(20, 2, seed=1), randn(3, 2, seed=2), randn(3, 2, seed=3)
    z[4, 1] = math.nan
    whole, each = ops.aggregate_log_prob(z, mu, logvar)
    assert bool(whole[4].isnan()) and int(whole.isnan().sum()) == 1
    assert bool(each[4, 1].isnan()) and int(each.isnan().sum()) == 1
    mu[1, 0] = math.nan
    whole, each = ops.aggregate_log_prob(z, mu, logvar)
    assert bool(whole.isnan().all()) and bool(each[:, 0].isnan().all())
    assert int(each[:, 1].isnan().sum()) == 1


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (3,), (2, 1, 5, 3)])
def test_any_shape(backend, shape):
    mu, logvar = randn(5, 3, seed=2).requires_grad_(), randn(5, 3, seed=3)
    z = randn(*shape, seed=1).requires_grad_()
    whole, each = ops.aggregate_log_prob(z, mu, logvar)
    assert whole.shape == shape[:-1] and each.shape == shape
    grads = torch.autograd.grad(whole.sum() + each.sum(), (z, mu))
    assert grads[0].shape == shape and grads[1].shape == (5, 3)


def test_without_dimensions(backend):
    """Without dimensions the density is 1."""
    z, mu = torch.zeros(4, 0, device=DEVICE), torch.zeros(3, 0, device=DEVICE)
    whole, each = ops.aggregate_log_prob(z, mu, mu)
    torch.testing.assert_close(whole, torch.zeros(4, device=DEVICE))
    assert each.shape == (4, 0)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("result", [0, 1])
def test_each_gradient_alone(backend, wanted, result):
    tensors = [randn(*s, seed=i) for i, s in enumerate([(21, 3), (7, 3), (7, 3)])]
    every = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(ops.aggregate_log_prob(*every)[result].sum(), every)
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    got = torch.autograd.grad(ops.aggregate_log_prob(*some)[result].sum(), [some[i] for i in wanted])
    for i, one in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, grads[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, 30])
def test_shares_in_pieces_of_rows(monkeypatch, size):
    """The Triton kernels store the gradients of the scores for some rows at a time."""
    backward = pytest.importorskip("fastvae.kernels.aggregate_backward")
    shapes = [(35, 3), (7, 3), (7, 3), (35,), (35, 3)]
    z, mu, logvar, *grads = (randn(*s, seed=i) for i, s in enumerate(shapes))
    with fastvae.use_backend("triton"):
        whole = _run(z, mu, logvar, size, *grads)
        monkeypatch.setattr(backward, "MAX_SHARES", 10 * 7)
        pieces = _run(z, mu, logvar, size, *grads)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_a_bit():
    tensors = [randn(*s, seed=i) for i, s in enumerate([(700, 9), (40, 9), (40, 9)])]

    def run():
        leaves = [t.clone().requires_grad_() for t in tensors]
        whole, each = ops.aggregate_log_prob(*leaves)
        return whole, each, *torch.autograd.grad(whole.sum() + each.sum(), leaves)

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_tensor_of_all_pairs_is_not_materialised():
    """No tensor [N, U, D], of 2 GB, is materialised (the reference computes slices of it)."""
    n, u, d = 4000, 500, 250
    z, mu, logvar = randn(n, d, seed=1), randn(u, d, seed=2), randn(u, d, seed=3)
    with torch.profiler.profile(profile_memory=True) as seen:
        whole, each = ops.aggregate_log_prob(z.requires_grad_(), mu.requires_grad_(), logvar)
        (whole.sum() + each.sum()).backward()
    made = sum(max(0, e.cpu_memory_usage) + max(0, e.device_memory_usage) for e in seen.events())
    # At least the marginals and the gradient of z are allocated.
    assert 2 * 4 * n * d <= made < 10 * 4 * (n * d + u * d)


Z, MU = torch.zeros(4, 3), torch.zeros(5, 3)
MISTAKES = {
    "z of another D": ((torch.zeros(4, 2), MU, MU), {}, ValueError, ["[4, 2]", "[5, 3]", "same D"]),
    "logvar of another U": ((Z, MU, Z), {}, ValueError, ["logvar", "[4, 3]", "[5, 3]"]),
    "no posterior": ((Z, torch.zeros(0, 3), torch.zeros(0, 3)), {}, ValueError, ["at least one"]),
    "integers": ((Z.int(), MU, MU), {}, TypeError, ["z", "int32"]),
    "fewer than the batch": ((MU, MU, MU), {"dataset_size": 4}, ValueError, ["dataset_size is 4", "the 5"]),
    "a batch of one": ((Z[:1],) * 3, (sizes := {"dataset_size": 9}), ValueError, ["at least 2 examples"]),
    "z of another batch": ((Z, MU, MU), sizes, ValueError, ["[4, 3]", "[..., B, D]", "B = 5"]),
    "no data": ((MU, MU, MU), {"dataset_size": 0}, ValueError, ["dataset_size must be at least 1"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, options, error, words = MISTAKES[name]
    with pytest.raises(error) as raised:
        ops.aggregate_log_prob(*arguments, **options)
    assert all(word in str(raised.value) for word in words), raised.value
