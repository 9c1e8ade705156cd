"""Density of mixtures of normals: every backend against float64 and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import fastvae
from fastvae import ops
from fastvae.distributions import DiagonalNormal

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE
from .models import randn

SIZES = strategies.distinct_sizes(3, largest=40, elements=4000)


@st.composite
def cases(draw, sizes=SIZES):
    """Draw z [N, D], wide or narrow components [U, D], log weights [U], and an upstream gradient [N]."""
    n, u, d = draw(sizes)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed, spread = draw(st.integers(0, 999)), draw(st.sampled_from([0.0, -6.0, -18.4, 3.0]))
    mu = 2 * randn(u, d, seed=seed)
    logvar = spread + 0.3 * randn(u, d, seed=seed + 1)
    near = mu[torch.arange(n, device=DEVICE) % u] + math.exp(spread / 2) * randn(n, d, seed=seed + 2)
    z = near if draw(st.booleans()) else randn(n, d, seed=seed + 3)
    log_weight = torch.log_softmax(randn(u, seed=seed + 4), 0)
    tensors = [t.to(dtype) for t in (z, mu, logvar, log_weight, randn(n, seed=seed + 5))]
    if draw(st.booleans()):
        tensors[:3] = [t.t().contiguous().t() for t in tensors[:3]]
    return tensors


def _run(*tensors):
    *inputs, grad = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = ops.mixture._mixture_log_prob(*leaves)[0]
    return value, *torch.autograd.grad(value, leaves, grad)


def results(case):
    """Return (name, actual, plain PyTorch's, expected) for all results."""
    actual = _run(*case)
    with fastvae.use_backend("reference"):
        eager = _run(*case)
    value, grads = formulas.mixture(*case)
    names = "log_prob", "grad_z", "grad_mu", "grad_logvar", "grad_log_weight"
    return list(zip(names, actual, eager, (value, *grads), strict=True))


@given(case=cases())
def test_mixture_is_accurate(backend, case):
    for name, actual, _, expected in results(case):
        # The scores of a row share errors.
        assert_accurate(name, actual, None, expected)


@pytest.mark.parametrize(
    ("n", "u", "d"),
    [(3, 300, 2), (16, 513, 5), (300, 17, 3), (2300, 2, 7), (129, 31, 1), (5, 1, 130), (33, 70, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_beyond_a_block_a_unit_and_a_part(backend, n, u, d, dtype):
    """Accurate for more components, rows and dimensions than a block, a unit of work or a partial sum."""
    tensors = [randn(*s, seed=i).to(dtype) for i, s in enumerate([(n, d), (u, d), (u, d), (u,), (n,)])]
    tensors[3] = torch.log_softmax(tensors[3], 0)
    for name, actual, _, expected in results(tensors):
        assert_accurate(name, actual, None, expected)


def _torch(mu, logvar, logits):
    components = td.Independent(td.Normal(mu, torch.exp(0.5 * logvar)), 1)
    return td.MixtureSameFamily(td.Categorical(logits=logits), components)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_density_equals_torch(backend, weighted):
    k, b, u, d = 4, 3, 7, 2
    z = randn(k, b, d, seed=1).double().requires_grad_()
    mu, logvar = (randn(u, d, seed=s).double().requires_grad_() for s in (2, 3))
    logits = randn(u, seed=4).double().requires_grad_() if weighted else None
    got = ops.mixture_log_prob(z, mu, logvar, logits)
    expected = _torch(mu, logvar, torch.zeros_like(mu[:, 0]) if logits is None else logits).log_prob(z)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    leaves = [z, mu, logvar] + ([logits] if weighted else [])
    grads, wanted = (torch.autograd.grad(o.sin().sum(), leaves) for o in (got, expected))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_in_single_precision(backend, dtype):
    z, mu, logvar, logits = (
        randn(*s, seed=i).to(dtype) for i, s in enumerate([(9, 3), (4, 3), (4, 3), (4,)])
    )
    leaves = [t.requires_grad_() for t in (z, mu, logvar, logits)]
    got = ops.mixture_log_prob(*leaves)
    assert got.dtype == torch.float32
    expected = ops.mixture_log_prob(*(t.detach().double() for t in leaves))
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    assert all(g.dtype == dtype for g in torch.autograd.grad(got.sum(), leaves))


def test_narrow_components_are_accurate(backend):
    """Standard deviations of 1e-4 at means of 1 stay accurate; a matrix product in float32 would not."""
    n, u, d = 40, 9, 50
    mu = randn(u, d, seed=1)
    logvar = torch.full((u, d), 2 * math.log(1e-4), device=DEVICE)
    z = mu[torch.arange(n, device=DEVICE) % u] + 1e-4 * randn(n, d, seed=2)
    exact = ops.mixture_log_prob(z.double(), mu.double(), logvar.double())
    off = (ops.mixture_log_prob(z, mu, logvar).double() - exact).abs().max()
    assert float(off) < 1e-4 * float(exact.abs().max() / 100)
    precision = torch.exp(-logvar)
    product = mu.square() @ precision[0]
    square = (z.square() @ precision.T) - 2 * z @ (mu * precision).T + product
    naive = torch.logsumexp(-0.5 * (square + (logvar + math.log(2 * math.pi)).sum(1)), 1) - math.log(u)
    assert float((naive.double() - exact).abs().max()) > 1


def test_a_single_component_is_a_normal_distribution(backend):
    z, mu, logvar = randn(5, 4, 3, seed=1), randn(1, 3, seed=2), randn(1, 3, seed=3)
    got = ops.mixture_log_prob(z, mu, logvar, torch.tensor([-3.0], device=DEVICE))
    torch.testing.assert_close(got, DiagonalNormal(mu, logvar).log_prob(z), rtol=1e-6, atol=1e-5)


def test_a_component_of_zero_weight_is_ignored(backend):
    z, mu, logvar = randn(6, 3, seed=1), randn(4, 3, seed=2), randn(4, 3, seed=3)
    logits = torch.tensor([0.5, -math.inf, 1.0, -1.0], device=DEVICE)
    leaves = [t.requires_grad_() for t in (z, mu, logvar)]
    kept = [0, 2, 3]
    got, expected = (
        ops.mixture_log_prob(z, mu, logvar, logits),
        ops.mixture_log_prob(z, mu[kept], logvar[kept], logits[kept]),
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(got.sum(), leaves)
    assert not grads[1][1].any() and not grads[2][1].any() and bool(grads[0].isfinite().all())


def test_zero_probability(backend):
    """Zero probability gives −∞ and zero gradient, and does not affect other rows."""
    z = randn(5, 2, seed=1)
    expected = ops.mixture_log_prob(z, mu := randn(3, 2, seed=2), logvar := randn(3, 2, seed=3))
    far = z.clone()
    far[1] = 1e25
    far.requires_grad_()
    got = ops.mixture_log_prob(far, mu, logvar)
    assert got[1] == -math.inf
    rest = [0, 2, 3, 4]
    assert torch.equal(got[rest], expected[rest])
    grad = torch.autograd.grad(got.sum(), far)[0]
    assert not grad[1].any() and bool(grad[rest].all())


def test_nan_stays_in_its_row(backend):
    z, mu, logvar = randn(20, 2, seed=1), randn(3, 2, seed=2), randn(3, 2, seed=3)
    z[4, 1] = math.nan
    got = ops.mixture_log_prob(z, mu, logvar)
    assert bool(got[4].isnan()) and int(got.isnan().sum()) == 1
    mu[1, 0] = math.nan
    assert bool(ops.mixture_log_prob(z, mu, logvar).isnan().all())


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (3,), (2, 1, 5, 3)])
def test_any_shape(backend, shape):
    mu, logvar = randn(5, 3, seed=2).requires_grad_(), randn(5, 3, seed=3)
    z = randn(*shape, seed=1).requires_grad_()
    got = ops.mixture_log_prob(z, mu, logvar)
    assert got.shape == shape[:-1]
    grads = torch.autograd.grad(got.sum(), (z, mu))
    assert grads[0].shape == shape and grads[1].shape == (5, 3)


def test_without_dimensions(backend):
    """Without dimensions the density is 1."""
    z, mu = torch.zeros(4, 0, device=DEVICE), torch.zeros(3, 0, device=DEVICE)
    logits = randn(3, seed=1).requires_grad_()
    got = ops.mixture_log_prob(z, mu, mu, logits)
    torch.testing.assert_close(got, torch.zeros(4, device=DEVICE))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), logits)[0], torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (0, 3), (1, 2)])
def test_each_gradient_alone(backend, wanted):
    tensors = [randn(*s, seed=i) for i, s in enumerate([(21, 3), (5, 3), (5, 3), (5,)])]
    every = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(ops.mixture_log_prob(*every).sum(), every)
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    got = torch.autograd.grad(ops.mixture_log_prob(*some).sum(), [some[i] for i in wanted])
    for i, one in zip(wanted, got, strict=True):
        torch.testing.assert_close(one, grads[i], rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_a_bit():
    tensors = [randn(*s, seed=i) for i, s in enumerate([(700, 9), (40, 9), (40, 9), (40,)])]

    def run():
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = ops.mixture_log_prob(*leaves)
        return value, *torch.autograd.grad(value.sum(), leaves)

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
        ops.mixture_log_prob(z.requires_grad_(), mu.requires_grad_(), logvar).sum().backward()
    made = sum(max(0, e.cpu_memory_usage) + max(0, e.device_memory_usage) for e in seen.events())
    # At least the gradient of z is allocated.
    assert 4 * n * d <= made < 10 * 4 * (n * d + u * d)


Z, MU = torch.zeros(4, 3), torch.zeros(5, 3)
MISTAKES = {
    "z of another D": ((torch.zeros(4, 2), MU, MU), ValueError, ["[4, 2]", "[5, 3]", "same D"]),
    "logvar of another U": ((Z, MU, torch.zeros(4, 3)), ValueError, ["logvar", "[4, 3]", "[5, 3]"]),
    "a mean for every row": ((Z, torch.zeros(2, 5, 3), MU), ValueError, ["mu", "[U, D]"]),
    "too few logits": ((Z, MU, MU, torch.zeros(4)), ValueError, ["logits", "[4]", "[5]"]),
    "logits of two axes": ((Z, MU, MU, torch.zeros(1, 5)), ValueError, ["logits", "[U]"]),
    "no component": ((Z, torch.zeros(0, 3), torch.zeros(0, 3)), ValueError, ["at least one"]),
    "integers": ((Z.int(), MU, MU), TypeError, ["z", "int32"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, error, words = MISTAKES[name]
    with pytest.raises(error) as raised:
        ops.mixture_log_prob(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value
