"""Draws of normal distributions with a full covariance: every backend against float64 and torch's own."""

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
from fastvae.ops.normal_full import flat_tril

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE
from .models import randn, seed_of

# A program takes milliseconds in Triton's interpreter, and every row has one.
SIZES = strategies.distinct_sizes(3, largest=33, elements=1200)


def _size(d):
    return d * (d + 1) // 2


def _eps(seed, k, b, d, k0=0, b0=0):
    with fastvae.use_backend("reference"):
        return fastvae.random.normal(seed, k, b, d, sample_offset=k0, row_offset=b0, dtype=torch.float64)


def _matrix(tril, d):
    """Return L [B, D, D], differentiably."""
    rows, columns = torch.tril_indices(d, d, device=tril.device)
    scale = tril.new_zeros(len(tril), d, d)
    scale[:, rows, columns] = torch.where(rows == columns, tril.exp(), tril)
    return scale


@st.composite
def cases(draw, sizes=SIZES):
    k, b, d = draw(sizes)
    dtype = draw(strategies.dtypes)
    spread = draw(st.sampled_from([0.01, 1.0]))
    make = lambda shape, s=1.0, t=dtype: draw(strategies.tensors(shape, t, spread=s, device=DEVICE))  # noqa: E731
    return {
        "inputs": [make((b, d)), make((b, _size(d)), spread)],
        "samples": k,
        "seed": torch.tensor(draw(st.integers(-(2**63), 2**63 - 1)), device=DEVICE),
        "offsets": (draw(st.sampled_from([0, 3, 2**32 - k])), draw(st.sampled_from([0, 9, 2**31 + 5]))),
        "need": draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        "grads": [make((k, b, d)), make((k, b), t=formulas.computation(torch.empty(0, dtype=dtype)))],
        "which": draw(st.sampled_from([(True, True), (True, False), (False, True)])),
    }


def _run(case):
    """Return z, log q, and the needed gradients."""
    leaves = [t.detach().requires_grad_(n) for t, n in zip(case["inputs"], case["need"], strict=True)]
    k0, b0 = case["offsets"]
    place = {"seed": case["seed"], "sample_offset": k0, "row_offset": b0}
    outputs = ops.rsample_tril(*leaves, k=case["samples"], **place)
    asked = [t for t in leaves if t.requires_grad]
    pairs = [p for p, w in zip(zip(outputs, case["grads"], strict=True), case["which"], strict=True) if w]
    # The density alone does not depend on mu.
    pairs = [(out, g) for out, g in pairs if out.requires_grad]
    outs, arriving = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, asked, arriving)
    assert all(g.dtype == t.dtype for g, t in zip(grads, asked, strict=True))
    return *outputs, *grads


def results(case):
    """Return (name, actual, plain PyTorch's, expected) for every result of a case."""
    actual = _run(case)
    with fastvae.use_backend("reference"):
        eager = _run(case)
    mu, tril = case["inputs"]
    eps = _eps(case["seed"], case["samples"], *mu.shape, *case["offsets"])
    arriving = [g.detach() if w else None for g, w in zip(case["grads"], case["which"], strict=True)]
    z, log_q, grads = formulas.full(mu, tril, eps, *arriving)
    wanted = [g for g, n in zip(grads, case["need"], strict=True) if n]
    names = ["z", "log_q"] + [
        f"gradient of {name}" for name, n in zip(("mu", "tril"), case["need"], strict=True) if n
    ]
    return list(zip(names, actual, eager, [z, log_q, *wanted], strict=True))


@given(case=cases())
def test_draws(backend, case):
    for name, actual, eager, expected in results(case):
        assert_accurate(name, actual, eager, expected)


def _case(k, b, d, dtype, spread=0.3):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "inputs": [randn(b, d, seed=1).to(dtype), (spread * randn(b, _size(d), seed=2)).to(dtype)],
        "samples": k,
        "seed": seed_of(7),
        "offsets": (0, 0),
        "need": (True, True),
        "grads": [randn(k, b, d, seed=3).to(dtype), randn(k, b, seed=4).to(wide)],
        "which": (True, True),
    }


@pytest.mark.parametrize(
    ("k", "b", "d"),
    [
        (1, 3, 1),
        (1, 2, 50),
        (67, 1, 3),
        (130, 2, 5),
        (1100, 2, 3),
        (2, 3, 64),
        (3, 2, 65),
        (5, 1, 131),
        (2, 1, 200),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sizes_beyond_a_tile_a_panel_and_a_block(backend, k, b, d, dtype):
    for name, actual, eager, expected in results(_case(k, b, d, dtype)):
        assert_accurate(name, actual, eager, expected)


@pytest.mark.parametrize("d", [1027])
def test_more_columns_than_a_tile(d):
    """More columns than a tile, with fewer samples per unit of work; sizes of the CPU's tiles."""
    for name, actual, eager, expected in results(_case(18, 1, d, torch.float32, spread=0.03)):
        assert_accurate(name, actual, eager, expected)


def test_equals_torch_multivariate_normal(backend):
    """The density at the draws, and the draws' moments, are torch's MultivariateNormal's."""
    k, b, d = 6, 4, 5
    mu, tril = randn(b, d, seed=1).double(), 0.5 * randn(b, _size(d), seed=2).double()
    z, log_q = ops.rsample_tril(mu, tril, k=k, seed=seed_of(3))
    expected = td.MultivariateNormal(mu, scale_tril=_matrix(tril, d)).log_prob(z)
    torch.testing.assert_close(log_q, expected, rtol=1e-11, atol=1e-11)


def test_draws_have_the_covariance():
    k, d = 200_000, 3
    mu, tril = randn(1, d, seed=1), 0.5 * randn(1, _size(d), seed=2)
    z, _ = ops.rsample_tril(mu, tril, k=k, seed=seed_of(3))
    scale = _matrix(tril, d)[0]
    covariance = scale @ scale.T
    off = (torch.cov(z[:, 0].T) - covariance).abs()
    # The standard error of an entry is at most sqrt(2 / K) times both deviations.
    deviations = covariance.diagonal().sqrt()
    assert bool((off < 6 * math.sqrt(2 / k) * deviations[:, None] * deviations).all())
    assert bool(((z.mean((0, 1)) - mu[0]).abs() < 6 * deviations / math.sqrt(k)).all())


def test_gradients_equal_autograd_of_the_formula(backend):
    k, b, d = 5, 3, 7
    leaves = [randn(b, d, seed=1).double(), 0.5 * randn(b, _size(d), seed=2).double()]
    leaves = [t.requires_grad_() for t in leaves]
    eps = _eps(seed_of(3), k, b, d)
    scale = _matrix(leaves[1], d)
    z = leaves[0] + torch.einsum("bij,kbj->kbi", scale, eps)
    logs = scale.diagonal(dim1=1, dim2=2).log().sum(1)
    log_q = -0.5 * (eps.square().sum(2) + d * math.log(2 * math.pi)) - logs

    def loss(z, log_q):
        return (z.sin() * log_q[..., None]).sum() + log_q.cos().sum()

    expected = torch.autograd.grad(loss(z, log_q), leaves)
    got = torch.autograd.grad(loss(*ops.rsample_tril(*leaves, k=k, seed=seed_of(3))), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_diagonal_scale_is_a_diagonal_normal(backend):
    """A diagonal L gives rsample_kl's draws, from the same noise."""
    k, b, d = 4, 3, 6
    mu, logvar = randn(b, d, seed=1), randn(b, d, seed=2)
    rows, columns = torch.tril_indices(d, d, device=DEVICE)
    tril = torch.where(rows == columns, 0.5 * logvar[:, rows], 0.0)
    place = {"k": k, "seed": seed_of(3), "sample_offset": 2, "row_offset": 5}
    z, log_q = ops.rsample_tril(mu, tril, **place)
    expected, _ = ops.rsample_kl(mu, logvar, **place)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)
    density = DiagonalNormal(mu, logvar).log_prob(expected)
    torch.testing.assert_close(log_q, density, rtol=1e-5, atol=1e-5)


def test_a_shard_with_offsets_equals_that_part_of_the_whole(backend):
    k, b, d = 70, 5, 19
    mu, tril, upstream = randn(b, d, seed=1), 0.3 * randn(b, _size(d), seed=2), randn(k, b, d, seed=3)
    # The other backends use library products, whose order of sums depends on the shape.
    same = torch.equal if backend == "native" else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-5)

    def run(rows, draws):
        leaves = [t[rows].clone().requires_grad_() for t in (mu, tril)]
        z, log_q = ops.rsample_tril(
            *leaves, k=len(range(k)[draws]), seed=seed_of(3), sample_offset=draws.start,
            row_offset=rows.start,
        )  # fmt: skip
        loss = (z * upstream[draws, rows]).sum() + log_q.square().sum()
        return z.detach(), log_q.detach(), *torch.autograd.grad(loss, leaves)

    whole = run(slice(0, b), slice(0, k))
    part = run(slice(2, 4), slice(0, k))
    assert same(part[0], whole[0][:, 2:4]) and same(part[1], whole[1][:, 2:4])
    assert same(part[2], whole[2][2:4]) and same(part[3], whole[3][2:4])
    parts = [run(slice(3, b), draws) for draws in (slice(0, 33), slice(33, k))]
    for i in range(2):
        assert same(torch.cat([p[i] for p in parts]), whole[i][:, 3:])
        torch.testing.assert_close(parts[0][2 + i] + parts[1][2 + i], whole[2 + i][3:], rtol=1e-4, atol=1e-4)


def test_threads_do_not_change_a_bit():
    mu, tril, upstream = randn(30, 70, seed=1), 0.2 * randn(30, _size(70), seed=2), randn(80, 30, 70, seed=3)

    def run():
        leaves = [t.clone().requires_grad_() for t in (mu, tril)]
        z, log_q = ops.rsample_tril(*leaves, k=80, seed=seed_of(4))
        return z, log_q, *torch.autograd.grad((z * upstream).sum() + log_q.sum(), leaves)

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


def test_the_flat_form_equals_the_op(backend):
    k, b, d = 4, 3, 5
    mu, tril, upstream = randn(b, d, seed=1), randn(b, _size(d), seed=2), randn(k, b, d, seed=3)
    found = []
    for op in (
        lambda *q: ops.rsample_tril(*q, k=k, seed=seed_of(3), sample_offset=2, row_offset=4),
        lambda *q: flat_tril(*q, seed_of(3), k, 2, 4),
    ):
        leaves = [t.clone().requires_grad_() for t in (mu, tril)]
        z, log_q = op(*leaves)
        assert not z._is_view()
        loss = (z.reshape(k, b, d) * upstream).sum() + log_q.square().sum()
        found.append((z.reshape(k, b, d), log_q, *torch.autograd.grad(loss, leaves)))
    assert z.shape == (k * b, d)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_gradient_alone(backend, wanted):
    """Each gradient may be computed alone, and for the mean's alone no noise is stored."""
    tensors = [randn(3, 6, seed=1), randn(3, _size(6), seed=2)]

    def run(*leaves):
        z, log_q = ops.rsample_tril(*leaves, k=4, seed=seed_of(3))
        return z, z.square().sum() + log_q.sin().sum()

    every = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(run(*every)[1], every)[wanted]
    some = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    z, loss = run(*some)
    kept = sum(t is not None and t.shape == (3, 4, 6) for t in z.grad_fn.saved_tensors)
    assert kept == (wanted == 1 and backend == "native" and DEVICE.type == "cpu")
    got = torch.autograd.grad(loss, some[wanted])[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("b", "d"), [(0, 3), (4, 0), (0, 0)])
def test_empty(backend, b, d):
    mu, tril = torch.zeros(b, d, device=DEVICE), torch.zeros(b, _size(d), device=DEVICE)
    leaves = [t.requires_grad_() for t in (mu, tril)]
    z, log_q = ops.rsample_tril(*leaves, k=5)
    assert z.shape == (5, b, d) and log_q.shape == (5, b) and not log_q.any()
    grads = torch.autograd.grad(z.sum() + log_q.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


def test_nan_stays_in_its_column(backend):
    """NaN or infinity in a row of L affects only that column of z, and the density if on the diagonal."""
    k, b, d = 3, 2, 5
    mu, tril = randn(b, d, seed=1), randn(b, _size(d), seed=2)
    tril[1, _size(3) + 1] = math.nan  # L_31
    tril[0, _size(2) - 1] = math.inf  # log L_11
    z, log_q = ops.rsample_tril(mu, tril, k=k, seed=seed_of(3))
    assert bool(z[:, 1, 3].isnan().all()) and bool(z[:, 0, 1].isinf().all())
    assert int(z.isfinite().sum()) == z.numel() - 2 * k
    assert bool((log_q[:, 0] == -math.inf).all()) and bool(log_q[:, 1].isfinite().all())


def test_elements_above_the_diagonal_are_ignored(backend):
    """A column of z depends neither on later columns of the noise nor on memory above the diagonal."""
    mu = torch.zeros(2, 37, device=DEVICE, dtype=torch.float64)
    tril = 0.3 * randn(2, _size(37), seed=2).double()
    z, _ = ops.rsample_tril(mu, tril, k=3, seed=seed_of(3))
    first, _ = ops.rsample_tril(mu[:, :9], tril[:, : _size(9)], k=3, seed=seed_of(3))
    torch.testing.assert_close(z[:, :, :9], first, rtol=1e-13, atol=1e-13)


def test_halves_of_an_encoder_output(backend):
    """Halves of one output, whose rows are not contiguous in memory, work, also with differing dtypes."""
    k, b, d = 3, 4, 5
    out = randn(b, d + _size(d), seed=1)
    mu, tril = out.split([d, _size(d)], 1)
    z, log_q = ops.rsample_tril(mu, tril.double(), k=k, seed=seed_of(3))
    assert z.dtype == log_q.dtype == torch.float64
    expected = ops.rsample_tril(mu.contiguous().double(), tril.contiguous().double(), k=k, seed=seed_of(3))
    assert torch.equal(z, expected[0]) and torch.equal(log_q, expected[1])


MU, TRIL = torch.zeros(4, 3), torch.zeros(4, 6)
MISTAKES = {
    "a matrix": ((MU, torch.zeros(4, 3, 3)), {}, ValueError, ["tril", "[B, D(D+1)/2]"]),
    "another triangle": ((MU, torch.zeros(4, 5)), {}, ValueError, ["[4, 5]", "[4, 3]", "[4, 6]"]),
    "another batch": ((MU, torch.zeros(1, 6)), {}, ValueError, ["[1, 6]", "[4, 6]"]),
    "integers": ((MU, TRIL.int()), {}, TypeError, ["tril", "int32"]),
    "no sample": ((MU, TRIL), {"k": 0}, ValueError, ["k", "0"]),
    "an address": ((MU, TRIL), {"row_offset": 2**32}, ValueError, ["row_offset"]),
    "a seed": ((MU, TRIL), {"seed": torch.zeros(())}, TypeError, ["seed", "int64"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, options, error, words = MISTAKES[name]
    with pytest.raises(error) as raised:
        ops.rsample_tril(*arguments, **{"k": 2, **options})
    assert all(word in str(raised.value) for word in words), raised.value
