"""Noise: published vectors, equality of the backends, and the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvae
from fastvae.core import backend as _backend
from fastvae.reference import random as reference

from . import strategies
from .conftest import DEVICE

# The known-answer vectors of Random123 for philox4x32-10 (kat_vectors in its tests): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers_in_pytorch(counter, key, words):
    tensors = [torch.tensor(v) for v in (*counter, *key)]
    assert tuple(int(w) for w in reference.philox(tuple(tensors[:4]), tuple(tensors[4:]))) == words


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers_in_cpp(counter, key, words):
    assert _backend.extension().philox(*counter, key[1] << 32 | key[0]) == words


def test_the_address_is_the_counter():
    """Word w of column block j, row b, sample k, level l: word w of Philox((j, b, k, l), seed)."""
    seed = 0x299F31D0A4093822
    for level in (0, 1, 2**32 - 1):
        words = reference.words(torch.tensor(seed), 3, 4, 9, 2**31, 2**32 - 4, level)
        for k, b, d in ((0, 0, 0), (2, 3, 8), (1, 2, 5), (2, 0, 3)):
            expected = _backend.extension().philox(d // 4, 2**32 - 4 + b, 2**31 + k, level, seed)[d % 4]
            assert int(words[k, b, d]) == expected


@settings(max_examples=10)
@given(sizes=strategies.distinct_sizes(3, 17), seed=st.integers(-(2**63), 2**63 - 1), data=st.data())
def test_triton_words_equal_pytorch(sizes, seed, data):
    k0, b0 = data.draw(st.sampled_from([0, 5, 2**32 - 17])), data.draw(st.sampled_from([0, 2**31 - 3]))
    seed, level = torch.tensor(seed, device=DEVICE), data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1]))
    triton_words = _backend.layer("triton", "random").words(seed, *sizes, k0, b0, level)
    assert torch.equal(triton_words.long() & 0xFFFFFFFF, reference.words(seed, *sizes, k0, b0, level))


@settings(max_examples=15)
@given(sizes=strategies.distinct_sizes(3, 33), seed=st.integers(-(2**63), 2**63 - 1), data=st.data())
def test_normals_agree_to_ulps(backend, sizes, seed, data):
    """float32 normals are within 4 ulps of the float64 definition, for small values and tails alike."""
    k0, b0 = data.draw(st.sampled_from([0, 5, 2**32 - 70])), data.draw(st.sampled_from([0, 2**31 - 3]))
    level = data.draw(st.sampled_from([0, 1, 2**32 - 1]))
    address = {"sample_offset": k0, "row_offset": b0, "level": level, "device": DEVICE}
    eps = fastvae.random.normal(seed, *sizes, **address)
    with fastvae.use_backend("reference"):
        exact = fastvae.random.normal(seed, *sizes, **address, dtype=torch.float64)
    assert eps.shape == tuple(sizes)
    assert bool(((eps.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all())
    wide = fastvae.random.normal(seed, *sizes, **address, dtype=torch.float64)
    torch.testing.assert_close(wide, exact, rtol=1e-14, atol=1e-15)


def test_a_million_normals_to_ulps():
    """Rare words are accurate too: a million draws reach |eps| of 5 and radii of 1e-3."""
    eps = fastvae.random.normal(1, 1, 1000, 1000)
    with fastvae.use_backend("reference"):
        exact = fastvae.random.normal(1, 1, 1000, 1000, dtype=torch.float64)
    ulps = ((eps.double() - exact).abs() / (torch.finfo(torch.float32).eps * exact.abs())).max()
    assert ulps <= 4, f"{float(ulps):.2f} ulps"


@pytest.mark.parametrize(("seed", "row_offset"), [(1, 7), (-(2**63), -1), (2**63 - 1, 2**31)])
def test_normals_of_a_compiled_graph(seed, row_offset):
    """In one loop in float32; sine and cosine of a rounded angle in (-π, π) err by up to π 2^-24."""
    address = (torch.tensor(seed), 3, 200, 333, 5, row_offset, 2)
    eps, exact = reference._elementwise_normal(*address), reference.normal(*address, dtype=torch.float64)
    assert eps.shape == exact.shape and exact.abs().max() > 3
    # Radius and function, three roundings each, and the angle's.
    bound = 2.0**-24 * (6 * exact.abs() + 6.8 * math.pi)
    assert bool(((eps.double() - exact).abs() <= bound).all())


def test_tails_reach_six_sigma():
    """The radius of the smallest word is sqrt(2 ln 2^33) = 6.76: no cut below 6.6 sigma."""
    assert math.sqrt(2 * math.log(2**33)) > 6.6
    # 2^24 normals have 0.2 beyond 5.77 sigma, where a 24-bit uniform would end; one of 24 draws has one.
    draws = torch.stack([fastvae.random.normal(s, 1, 2**12, 2**12).abs().amax() for s in range(24)])
    assert draws.max() > 5.77


@pytest.mark.slow
def test_distribution_in_cpp():
    """Moments and Kolmogorov-Smirnov distance are right at n = 1.6e7, also per column of a block of four."""
    n = 2**24
    eps = fastvae.random.normal(44, 4, 2**10, 2**12).double()
    for part in (eps.flatten(), *(eps[..., w::4].flatten() for w in range(4))):
        size = part.numel()
        # The standard errors of the sample's moments: 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n; five of them.
        for power, value, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
            moment = (part**power).mean()
            assert abs(moment - value) < 5 * deviation / size**0.5, f"moment {power}: {float(moment)}"
        cdf = torch.special.ndtr(part.sort().values)
        grid = torch.arange(1, size + 1, dtype=torch.float64) / size
        distance = torch.maximum((grid - cdf).max(), (cdf - grid + 1 / size).max())
        # P(sqrt(n) D > 1.95) = 0.001
        assert distance * size**0.5 < 1.95, f"KS {float(distance * size**0.5):.2f}"
    assert eps.numel() == n


def test_neighbours_are_independent():
    """Correlations between columns, rows and samples, and between their squares, vanish as 1 / sqrt(n)."""
    eps = fastvae.random.normal(7, 16, 256, 512).double()
    for values in (eps, eps**2 - 1, eps.abs() - (2 / math.pi) ** 0.5):
        variance = (values**2).mean()
        for dim in range(3):
            for shift in (1, 2, 3, 4):
                pairs = (values * values.roll(shift, dim)).mean() / variance
                assert abs(pairs) < 5 / values.numel() ** 0.5, f"axis {dim}, shift {shift}: {float(pairs)}"


def test_chunks_shards_and_threads_give_the_same_bits(backend):
    whole = fastvae.random.normal(3, 6, 7, 9, device=DEVICE)
    part = fastvae.random.normal(3, 2, 3, 9, sample_offset=3, row_offset=4, device=DEVICE)
    assert torch.equal(whole[3:5, 4:7], part)
    # Fewer columns are a prefix too.
    assert torch.equal(whole[..., :5], fastvae.random.normal(3, 6, 7, 5, device=DEVICE))


def test_levels_have_different_noise(backend):
    """Level 0 is that of the sampling ops, and levels share no noise."""
    levels = [fastvae.random.normal(3, 6, 7, 9, level=n, device=DEVICE) for n in range(3)]
    zeros = torch.zeros(7, 9, device=DEVICE)
    z, _ = fastvae.ops.rsample_kl(zeros, zeros, k=6, seed=torch.tensor(3, device=DEVICE))
    assert torch.equal(levels[0], z)
    assert torch.equal(levels[0], fastvae.random.normal(3, 6, 7, 9, device=DEVICE))
    part = fastvae.random.normal(3, 2, 3, 9, sample_offset=3, row_offset=4, level=2, device=DEVICE)
    assert torch.equal(levels[2][3:5, 4:7], part)
    assert len(torch.stack(levels).unique()) > 3 * 6 * 7 * 9 - 4


def test_levels_are_independent():
    """Correlations between levels, and between their squares, vanish as 1 / sqrt(n)."""
    one, other = (fastvae.random.normal(7, 16, 256, 512, level=n, dtype=torch.float64) for n in (0, 1))
    for f in (lambda e: e, lambda e: (e**2 - 1) / 2**0.5):
        assert abs((f(one) * f(other)).mean()) < 5 / one.numel() ** 0.5


def test_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fastvae.random.normal(3, 5, 301, 130))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_torch_manual_seed_determines_the_noise():
    torch.manual_seed(5)
    first = fastvae.random.draw_seed()
    second = fastvae.random.draw_seed()
    torch.manual_seed(5)
    assert torch.equal(first, fastvae.random.draw_seed())
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (("0", 1, 1, 1), TypeError, "seed must be an int64 tensor"),
        ((torch.tensor(0.5), 1, 1, 1), TypeError, "seed must be an int64 tensor"),
        ((torch.tensor([[1]]), 1, 1, 1), TypeError, "seed must be an int64 tensor"),
    ],
)
def test_bad_seeds(arguments, kind, message):
    with pytest.raises(kind, match=message):
        fastvae.random.normal(*arguments)


def test_addresses_beyond_the_counter_are_refused():
    with pytest.raises(ValueError, match="2\\^32 samples"):
        fastvae.random.normal(0, 2, 1, 1, sample_offset=2**32 - 1)
    with pytest.raises(ValueError, match="2\\^32 rows"):
        fastvae.random.normal(0, 1, 1, 1, row_offset=-2)
    with pytest.raises(ValueError, match="level must lie in 0 … 2"):
        fastvae.random.normal(0, 1, 1, 1, level=2**32)
    with pytest.raises(TypeError, match="level must be an int"):
        fastvae.random.normal(0, 1, 1, 1, level=True)
