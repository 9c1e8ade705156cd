"""Likelihoods over a component axis, classes and mixtures: every backend against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastvae
from fastvae import ops
from fastvae.likelihoods import Categorical, DiscretizedLogisticMixture, Multinomial

from . import strategies
from .compare import assert_near
from .conftest import DEVICE
from .models import evaluate_parts, generator, rand, randn

B, D, K, C = 3, 2, 4, 5
EVENT = (3, 4)


def naive_mixture(x, logits, location, log_scale, coefficients=None, levels=256):
    """Return log p [K, B] of x [B, E, P], logits [K, B, M, P], others [K, B, M, E, P], as in PixelCNN++."""
    x = x[:, None]
    if coefficients is not None:
        t = torch.tanh(coefficients)
        first, second, third = location.unbind(3)
        second = second + t[:, :, :, 0] * x[:, :, 0]
        third = third + t[:, :, :, 1] * x[:, :, 0] + t[:, :, :, 2] * x[:, :, 1]
        location = torch.stack([first, second, third], 3)
    inverse, half = torch.exp(-log_scale), 1 / (levels - 1)
    plus, minus = (x - location + half) * inverse, (x - location - half) * inverse
    log_sigmoid = torch.nn.functional.logsigmoid
    # σ(a) − σ(b) from the side where both are small.
    flip = minus > 0
    a, b = torch.where(flip, -minus, plus), torch.where(flip, -plus, minus)
    middle = log_sigmoid(a) + torch.log1p(-torch.exp((log_sigmoid(b) - log_sigmoid(a)).clamp(max=-1e-300)))
    value = torch.where(
        x < -1 + half, log_sigmoid(plus), torch.where(x > 1 - half, log_sigmoid(-minus), middle)
    )
    return (torch.logsumexp(logits + value.sum(3), 2) - torch.logsumexp(logits, 2)).sum(2)


SIZES = strategies.distinct_sizes(4, largest=20, elements=4000)


@st.composite
def mixtures(draw):
    k, b, m, p = draw(strategies.distinct_sizes(4, largest=12, elements=1500))
    e = draw(st.sampled_from([1, 2, 3, 3]))
    dtype = draw(strategies.dtypes)
    seed = draw(st.integers(0, 99))
    levels = draw(st.sampled_from([2, 16, 256]))
    x = (rand(b, e, p, seed=seed) * levels).floor().clamp(max=levels - 1) * (2 / (levels - 1)) - 1
    parameters = [
        randn(k * b, m, p, seed=seed + 1),
        0.7 * randn(k * b, m, e, p, seed=seed + 2),
        draw(st.sampled_from([-6.0, -3.0, 0.0])) + randn(k * b, m, e, p, seed=seed + 3),
    ]
    if e == 3 and draw(st.booleans()):
        parameters.append(randn(k * b, m, 3, p, seed=seed + 4))
    return x, [q.to(dtype) for q in parameters], (k, b, m, e, p), levels


@given(mixtures())
def test_mixture(backend, case):
    x, parameters, (k, b, m, e, p), levels = case
    dtype = parameters[0].dtype
    given = [q.detach().requires_grad_() for q in parameters]
    wide = [q.detach().double().reshape(k, b, *q.shape[1:]).requires_grad_() for q in parameters]
    got = ops.discretized_logistic_mixture_log_prob(
        x, *[q.reshape(k, b, *q.shape[1:]) for q in given], levels=levels
    )
    expected = naive_mixture(x.double(), *wide, levels=levels)
    # Error of a bin's ends, in units of the scale, from rounding x, location and scale.
    steep = float(torch.exp(-wide[2].detach().amin()))
    scale = (1 + 8 * steep) * p * e
    total = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(got.detach(), expected.detach(), total, scale, "value")
    weight = randn(k, b, seed=7).to(got.dtype)
    grads = torch.autograd.grad((got * weight).sum(), given)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), wide)
    for name, one, other in zip(
        ("logits", "location", "log_scale", "coefficients"), grads, wanted, strict=False
    ):
        assert one.dtype == dtype
        size = (1 + 8 * steep) * (1 + float(other.abs().amax()))
        assert_near(one.reshape(other.shape), other, dtype, size, name)


def test_coupled_colours_are_accurate(backend):
    """Coupled colours' value and gradients are accurate to float64, also at the ends of the grid."""
    k, b, m, p = 2, 3, 4, 9
    x = (rand(b, 3, p, seed=1, dtype=torch.float64) * 8).floor().clamp(max=7) * (2 / 7) - 1
    shapes = ((m, p), (m, 3, p), (m, 3, p), (m, 3, p))
    leaves = [randn(k, b, *s, seed=2 + i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    got = ops.discretized_logistic_mixture_log_prob(x, *leaves, levels=8)
    expected = naive_mixture(x, *leaves, levels=8)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weight = randn(k, b, seed=7, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad((v * weight).sum(), leaves) for v in (got, expected))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("levels", [2, 4, 256])
@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 3.0])
def test_probabilities_of_all_levels_sum_to_one(backend, levels, log_scale):
    x = (torch.arange(levels, device=DEVICE, dtype=torch.float32) * 2 / (levels - 1) - 1).reshape(
        levels, 1, 1
    )
    logits, location = randn(1, C, 1, seed=1), randn(1, C, 1, 1, seed=2)
    log_p = ops.discretized_logistic_mixture_log_prob(
        x, logits.expand(levels, -1, -1), location.expand(levels, -1, -1, -1),
        torch.full_like(location, log_scale).expand(levels, -1, -1, -1), levels=levels,
    )  # fmt: skip
    assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_extreme_scales_and_locations(backend):
    """Values and gradients are finite for extreme scales and locations."""
    location = torch.tensor([0.0, 1e4, -1e4, 3.0], device=DEVICE)
    log_scale = torch.tensor([-90.0, -20.0, 0.0, 20.0, 90.0], device=DEVICE)
    shape = (1, 1, 1, 20)
    location, log_scale = (
        t.reshape(shape).requires_grad_() for t in torch.meshgrid(location, log_scale, indexing="ij")
    )
    for x in (-1.0, 0.0, 1.0):
        data = torch.full((1, 1, 20), x, device=DEVICE)
        out = ops.discretized_logistic_mixture_log_prob(
            data, torch.zeros(1, 1, 20, device=DEVICE), location, log_scale, levels=3
        )
        grads = torch.autograd.grad(out.sum(), (location, log_scale))
        assert not bool(out.isnan().any()) and not any(bool(g.isnan().any()) for g in grads)


class Decoder(nn.Module):
    """Linear decoder with outputs of given shapes."""

    def __init__(self, *shapes, scale=0.5):
        super().__init__()
        self.shapes = shapes
        self.weight = nn.Parameter(scale * randn(D, sum(math.prod(s) for s in shapes), seed=9))

    def forward(self, z):
        parts = (z @ self.weight).split([math.prod(s) for s in self.shapes], 1)
        outputs = tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]


def _models():
    pixels = torch.randint(16, (B, 3, *EVENT), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mixture = DiscretizedLogisticMixture(levels=16)
    colours = [(C, *EVENT), (C, 3, *EVENT), (C, 3, *EVENT), (C, 3, *EVENT)]
    return {
        "categorical": (pixels[:, 0] % C, Decoder((C, *EVENT)), Categorical()),
        "one class": (pixels[:, 0, 0, 0] % C, Decoder((C,)), "categorical"),
        "multinomial": (pixels[:, 0], Decoder(EVENT), "multinomial"),
        "grey": (pixels[:, 0], Decoder(*[(C, *EVENT)] * 3), mixture),
        "colours": (pixels, Decoder(*colours[:3]), mixture),
        "coupled": (pixels, Decoder(*colours), mixture),
    }


@pytest.mark.parametrize("model", _models())
def test_every_objective(model, backend):
    """Every objective is the same in chunks, and equals the sum over elements where it factorises."""
    x, decoder, likelihood = _models()[model]
    q = randn(B, D, seed=2), 0.2 * randn(B, D, seed=3)
    options = {"likelihood": likelihood, "generator": None}

    def run(function, **more):
        return function(x, q, decoder, **{**options, "generator": generator(4), **more})

    whole, chunks = run(fastvae.iwae, k=K), run(fastvae.iwae, k=K, k_chunk=3)
    torch.testing.assert_close(whole, chunks, rtol=1e-5, atol=1e-4)
    one, other = (torch.autograd.grad(v, decoder.parameters())[0] for v in (whole, chunks))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    parts = run(fastvae.log_weights, k=K)
    log_w = parts.log_likelihood + parts.log_ratio
    torch.testing.assert_close(log_w.logsumexp(0).mean() - math.log(K), whole)
    terms = run(fastvae.elbo, k=K, terms=True)
    torch.testing.assert_close(terms.log_likelihood, parts.log_likelihood.mean(0), rtol=1e-5, atol=1e-4)
    got = run(fastvae.log_marginal, k=9, k_chunk=4)
    assert bool(got.log_px.isfinite().all())
    z = randn(2 * B, D, seed=5)
    known = fastvae.likelihoods.read.as_likelihood(likelihood)
    rows = known.log_likelihood(x, decoder(z), 2)
    each = known.log_prob(torch.cat([x, x]), decoder(z))
    torch.testing.assert_close(each.reshape(2, B, -1).sum(2), rows, rtol=1e-5, atol=1e-4)
    result = evaluate_parts(
        lambda x: tuple(p[: len(x)] for p in q), decoder, x, k=9, likelihood=likelihood, progress=False
    )
    assert bool(result.log_px.isfinite().all())


@pytest.mark.parametrize("model", _models())
def test_masks(model, backend):
    """Unobserved elements are ignored; a mask of all True changes nothing."""
    x, decoder, likelihood = _models()[model]
    known = fastvae.likelihoods.read.as_likelihood(likelihood)
    q = randn(B, D, seed=2), 0.2 * randn(B, D, seed=3)
    run = lambda **o: fastvae.iwae(  # noqa: E731
        x, q, decoder, k=K, likelihood=known, generator=generator(4), reduction="none", **o
    )
    everything = torch.ones(x.shape, dtype=torch.bool, device=DEVICE)
    torch.testing.assert_close(run(mask=everything), run(), rtol=1e-5, atol=1e-4)
    z = randn(K * B, D, seed=5)
    nothing = known.log_likelihood(x, decoder(z), K, fastvae.core.nested.Conditioning(~everything))
    assert bool((nothing == 0).all())
    if model == "multinomial":
        # Equals the op with the observed classes only.
        mask = everything.clone()
        mask[:, :, 1] = False
        got = known.log_likelihood(x, decoder(z), K, fastvae.core.nested.Conditioning(mask))
        kept = torch.tensor([True, False, True, True], device=DEVICE)
        expected = known.log_likelihood(x[..., kept], decoder(z)[..., kept], K)
        torch.testing.assert_close(got, expected)
    elif x.dim() > 1:
        # Only the first row of pixels.
        mask = everything.clone()
        mask[..., 1:, :] = False
        got = known.log_likelihood(x, decoder(z), K, fastvae.core.nested.Conditioning(mask))
        outputs = decoder(z)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        few = tuple(o[..., :1, :] for o in outputs)
        expected = known.log_likelihood(x[..., :1, :].contiguous(), few if len(few) > 1 else few[0], K)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        if model == "coupled":  # an unobserved channel is marginalised if no other depends on it
            mask = everything.clone()
            mask[:, 2] = False
            two = known.log_likelihood(x, decoder(z), K, fastvae.core.nested.Conditioning(mask))
            wide = [
                o.flatten(2 + (i > 0)).reshape(K, B, C, *([3] if i else []), -1)
                for i, o in enumerate(outputs)
            ]
            data = x.flatten(2) * (2 / 15) - 1
            t = torch.tanh(wide[3])
            green = wide[1][:, :, :, 1] + t[:, :, :, 0] * data[:, None, 0]
            location = torch.stack([wide[1][:, :, :, 0], green], 3)
            expected = naive_mixture(data[:, :2], wide[0], location, wide[2][:, :, :, :2], levels=16)
            torch.testing.assert_close(two, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_and_means_of_half_precision_logits(dtype):
    """Draws and means of half-precision logits are computed in float32, as from float32 logits."""
    logits = 3 * randn(500, 7, seed=1).to(dtype)
    for likelihood in (Multinomial(), Categorical()):
        drawn = [likelihood.sample(t, generator=generator(2)) for t in (logits, logits.float())]
        assert drawn[0].dtype == drawn[1].dtype and torch.equal(*drawn)
    mean = Multinomial().mean(logits)
    torch.testing.assert_close(mean.float(), logits.float().softmax(1), rtol=1e-2, atol=1e-3)


def test_draws_follow_their_distributions():
    n = 20_000
    logits = randn(1, C, 6, seed=1)
    classes = Categorical().sample(logits.expand(n, -1, -1), generator=generator(2))
    assert classes.dtype == torch.int64 and classes.shape == (n, 6)
    shares = torch.stack([(classes == c).float().mean(0) for c in range(C)])
    p = logits[0].softmax(0)
    assert bool(((shares - p).abs() < 6 * (p / n).sqrt()).all())
    mean = Categorical().mean(logits)
    torch.testing.assert_close(mean[0], (p * torch.arange(C, device=DEVICE)[:, None]).sum(0))
    # A mixture's score has mean 0 over draws, for each parameter.
    mixture = DiscretizedLogisticMixture(levels=16, low=-1.0)
    shapes = [(C, 2), (C, 3, 2), (C, 3, 2), (C, 3, 2)]
    one = [
        0.3 * randn(1, *s, seed=i, dtype=torch.float64) - (1.0 if i == 2 else 0) for i, s in enumerate(shapes)
    ]
    given = [p.expand(n, *p.shape[1:]).clone().requires_grad_() for p in one]
    torch.manual_seed(3)
    x = mixture.sample(given).detach()
    assert x.shape == (n, 3, 2) and float(x.abs().max()) <= 1
    mixture.check(x)
    scores = torch.autograd.grad(mixture.log_likelihood(x, given, 1).sum(), given)
    for score in scores:
        assert bool((score.mean(0).abs() < 6 * score.std(0) / math.sqrt(n)).all())
    drawn = [mixture.sample(given, generator=generator(5)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], x)
    assert mixture.mean(given).shape == (n, 3, 2)
    one_hot = Multinomial().sample(randn(9, 4, seed=3))
    assert torch.equal(one_hot.sum(1), torch.ones(9, device=DEVICE))
    # Each row has its own probabilities, on any scale.
    certain = torch.tensor([[40.0, 0.0, 0.0], [90.0, 130.0, 0.0], [90.0, 0.0, 200.0]], device=DEVICE)
    assert Multinomial().sample(certain).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("op", ["categorical", "mixture"])
def test_under_compilers_and_transforms(op):
    torch._dynamo.reset()
    if op == "categorical":
        x, parameters = torch.randint(C, (B, 9), device=DEVICE), [randn(K, B, C, 9, seed=1)]
        function = ops.categorical_log_prob
    else:
        x = torch.randint(256, (B, 3, 9), device=DEVICE) * (2 / 255) - 1
        parameters = [randn(K, B, C, *([3] if i else []), 9, seed=i) for i in range(4)]
        function = ops.discretized_logistic_mixture_log_prob
    value = lambda *p: function(x, *p).sum()  # noqa: E731
    expected = torch.func.grad(value, tuple(range(len(parameters))))(*parameters)
    leaves = [p.clone().requires_grad_() for p in parameters]
    for run in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        got = torch.autograd.grad(run(*leaves), leaves)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
    if len(parameters) > 1:  # some alone
        (alone,) = torch.autograd.grad(value(parameters[0], leaves[1], *parameters[2:]), leaves[1])
        torch.testing.assert_close(alone, expected[1])
    registered = getattr(
        torch.ops.fastvae,
        f"{'categorical' if op == 'categorical' else 'discretized_logistic_mixture'}_log_prob",
    )
    flat = [p.reshape(K * B, -1, 9).clone().requires_grad_() for p in parameters]
    given = (x.float(), *flat, 1 / 255) if len(flat) > 1 else (x, None, *flat, False, -100)
    torch.library.opcheck(registered.default, given)


def _zeros(*shape):
    return torch.zeros(*shape, device=DEVICE)


WRONG = {
    "class too large": (
        "categorical", lambda: torch.full((B, 9), 5, device=DEVICE), lambda n: _zeros(n, 5, 9),
        ["x holds 5", "whole numbers from 0 to 4", "ignore_index=-100"],
    ),
    "a class between": (
        "categorical", lambda: _zeros(B, 9) + 1.5, lambda n: _zeros(n, 5, 9), ["x holds 1.5"],
    ),
    "classes last": (
        "categorical", lambda: _zeros(B, 9).long(), lambda n: _zeros(n, 9, 5),
        ["pass axis=-1", "[6, C, 9]"],
    ),
    "no class axis": ("categorical", lambda: _zeros(B, 9).long(), lambda n: _zeros(n, 9), ["[N, C, *event]"]),
    "counts below 0": ("multinomial", lambda: _zeros(B, 9) - 1, lambda n: _zeros(n, 9), ["x holds -1"]),
    "bytes as floats": (
        "discretized_logistic_mixture", lambda: _zeros(B, 3, 9) + 100.0,
        lambda n: (_zeros(n, 2, 9), _zeros(n, 2, 3, 9), _zeros(n, 2, 3, 9)),
        ["values in [100, 100]", "grid of 256 values from 0 to 1", "low= and high="],
    ),
    "one value below the grid": (
        "discretized_logistic_mixture", lambda: _zeros(B, 3, 9) - torch.eye(9, device=DEVICE)[:3] / 255,
        lambda n: (_zeros(n, 2, 9), _zeros(n, 2, 3, 9), _zeros(n, 2, 3, 9)), ["values in [-0.00392157, 0]"],
    ),
    "noise": (
        "discretized_logistic_mixture", lambda: _zeros(B, 3, 9) + 0.501,
        lambda n: (_zeros(n, 2, 9), _zeros(n, 2, 3, 9), _zeros(n, 2, 3, 9)), ["data with noise"],
    ),
    "two outputs": (
        "discretized_logistic_mixture", lambda: _zeros(B, 3, 9),
        lambda n: (_zeros(n, 2, 9), _zeros(n, 2, 3, 9)),
        ["(logits, location, log_scale) or", "a tuple of 2"],
    ),
    "another scale": (
        "discretized_logistic_mixture", lambda: _zeros(B, 3, 9),
        lambda n: (_zeros(n, 2, 9), _zeros(n, 2, 3, 9), _zeros(n, 2, 9)), ["log_scale has shape [6, 2, 9]"],
    ),
    "coefficients without colours": (
        "discretized_logistic_mixture", lambda: _zeros(B, 2, 9),
        lambda n: (_zeros(n, 2, 9), *[_zeros(n, 2, 2, 9)] * 3),
        ["coefficients, which are of colours", "[3, 2, 9]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU data are checked on request only
    likelihood, x, decoder, words = WRONG[case]
    q = _zeros(B, D), _zeros(B, D)
    with pytest.raises((TypeError, ValueError)) as raised:
        fastvae.iwae(x(), q, lambda z: decoder(len(z)), k=2, likelihood=likelihood)
    for word in words:
        assert word in str(raised.value)


def test_chunk_sizes_count_the_decoder_output():
    """Chunk sizes count the decoder's output, 64 times x for 64 classes."""
    x = torch.zeros(B, 500, dtype=torch.int64, device=DEVICE)
    rows = []

    def decoder(z):
        rows.append(len(z))
        return _zeros(1, 1, 1).expand(len(z), 64, 500)

    q = _zeros(B, D), _zeros(B, D)
    fastvae.log_marginal(x, q, decoder, k=200, likelihood="categorical")
    assert sum(rows) == 200 * B and rows[0] == B
    if DEVICE.type == "cpu":
        assert max(rows) <= 2**22 // (64 * 500) and len(rows) < 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model", _models())
def test_a_wider_decoder_output_gives_the_same_numbers(model, dtype, backend):
    """A decoder output in a wider dtype gives the same numbers."""
    x, decoder, likelihood = _models()[model]
    decoder = decoder.to(dtype)
    q = randn(B, D, seed=2).to(dtype), (0.2 * randn(B, D, seed=3)).to(dtype)
    outer = torch.float64 if dtype == torch.float64 else torch.float32

    def wide(z):
        outputs = decoder(z)
        return tuple(o.double() for o in outputs) if isinstance(outputs, tuple) else outputs.double()

    for call in (
        lambda f: fastvae.elbo(x, q, f, likelihood=likelihood, k=2, generator=generator(4)),
        lambda f: fastvae.iwae(x, q, f, likelihood=likelihood, k=K, k_chunk=3, generator=generator(4)),
        lambda f: fastvae.log_marginal(x, q, f, likelihood=likelihood, k=K, generator=generator(4)).log_px,
    ):
        got = call(decoder)
        assert got.dtype == outer
        torch.testing.assert_close(got.double(), call(wide).double(), rtol=1e-5, atol=1e-3)
