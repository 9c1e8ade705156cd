"""Decoders that return probabilities or rates: read as such if declared, otherwise with a warning."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastvae
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    Joint,
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K, CLASSES = 5, 3, 12, 4, 3


class Decoder(nn.Module):
    """Decoder of logits or log rates [N, *event], through an activation."""

    def __init__(self, shape, activation=None):
        super().__init__()
        self.shape, self.activation = shape, activation
        self.weight = nn.Parameter(0.7 * randn(D, math.prod(shape), seed=3))

    def forward(self, z):
        natural = (z @ self.weight).reshape(len(z), *self.shape)
        return natural if self.activation is None else self.activation(natural)


def _softmax_of_rows(logits):
    return logits.flatten(1).softmax(1).reshape(logits.shape)


# Likelihood of the activation's output, likelihood of logits, x, the decoder's shape, activation.
CASES = {
    "bernoulli": (Bernoulli(probs=True), Bernoulli(), rand(B, X, seed=1), (X,), torch.sigmoid),
    "continuous_bernoulli": (
        ContinuousBernoulli(probs=True), ContinuousBernoulli(), rand(B, X, seed=1), (X,), torch.sigmoid,
    ),
    "categorical": (
        Categorical(probs=True), Categorical(), (3 * rand(B, X, seed=1)).long(), (CLASSES, X),
        lambda t: t.softmax(1),
    ),
    "multinomial": (
        Multinomial(probs=True), Multinomial(), (4 * rand(B, X, seed=1)).floor(), (X,), _softmax_of_rows,
    ),
    "poisson": (Poisson(rate=True), Poisson(), (4 * rand(B, X, seed=1)).int(), (X,), torch.exp),
}  # fmt: skip


def _objectives(x, q, decoder, likelihood, mask):
    options = {"likelihood": likelihood, "mask": mask}
    for name, call in {
        "elbo": lambda **o: fastvae.elbo(x, q, decoder, k=2, **o),
        "iwae": lambda **o: fastvae.iwae(x, q, decoder, k=K, **o),
        "chunks": lambda **o: fastvae.iwae(x, q, decoder, k=K, k_chunk=3, estimator="dreg", **o),
        "beta_tc": lambda **o: fastvae.beta_tc(x, q, decoder, **o),
    }.items():
        value = call(generator=generator(5), reduction="none", **options)
        yield name, (value, *torch.autograd.grad(value.sum(), [*decoder.parameters(), *q]))
    found = fastvae.log_marginal(x, q, decoder, k=9, k_chunk=4, generator=generator(5), **options)
    yield "log_marginal", (found.log_px,)
    score = fastvae.reconstruction_log_prob(x, q, decoder, k=9, generator=generator(5), **options)
    yield "reconstruction", (score,)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_every_objective_equals_that_of_logits(name, masked):
    read, plain, x, shape, activation = CASES[name]
    q = randn(B, D, seed=4).requires_grad_(), (0.3 * randn(B, D, seed=5)).requires_grad_()
    mask = rand(B, X, seed=6) < 0.6 if masked else None
    expected = dict(_objectives(x, q, Decoder(shape), plain, mask))
    for objective, got in _objectives(x, q, Decoder(shape, activation), read, mask):
        for one, other in zip(got, expected[objective], strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-4, msg=lambda m, o=objective: f"{o}: {m}"
            )


@pytest.mark.parametrize("name", ["bernoulli", "poisson"])
def test_every_backend(backend, name):
    read, plain, x, shape, activation = CASES[name]
    q, results = randn(B, 2 * D, seed=4), []
    for likelihood, decoder in ((plain, Decoder(shape)), (read, Decoder(shape, activation))):
        value = fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, generator=generator(5))
        results.append((value, *torch.autograd.grad(value, decoder.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_means_and_draws_and_all_pairs(name):
    read, plain, x, shape, activation = CASES[name]
    logits = Decoder(shape)(randn(6, D, seed=7)).detach()
    natural = activation(logits)
    torch.testing.assert_close(read.mean(natural), plain.mean(logits))
    drawn = read.sample(natural, generator=generator(1))
    assert drawn.shape == plain.sample(logits, generator=generator(1)).shape
    if name != "continuous_bernoulli":
        assert bool((drawn == plain.sample(logits, generator=generator(1))).float().mean() > 0.95)
    found = fastvae.ops.all_pairs_log_prob(x, natural, likelihood=read)
    torch.testing.assert_close(
        found, fastvae.ops.all_pairs_log_prob(x, logits, likelihood=plain), rtol=1e-4, atol=1e-4
    )
    one, other = (likelihood.log_prob(x, p[:B]) for likelihood, p in ((read, natural), (plain, logits)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "=True" in repr(read) and "=True" not in repr(plain)


def test_a_joint_of_probabilities_and_logits():
    part = CASES["bernoulli"]
    q = randn(B, 2 * D, seed=4)
    decoder = Decoder((X,), torch.sigmoid)
    joint = Joint(a=Bernoulli(probs=True), b="bernoulli")
    logits = Decoder((X,))
    got = fastvae.elbo(
        {"a": part[2], "b": part[2]}, q, lambda z: {"a": decoder(z), "b": logits(z)}, likelihood=joint,
        generator=generator(1),
    )  # fmt: skip
    both = Joint(a="bernoulli", b="bernoulli")
    expected = fastvae.elbo(
        {"a": part[2], "b": part[2]}, q, lambda z: {"a": logits(z), "b": logits(z)}, likelihood=both,
        generator=generator(1),
    )  # fmt: skip
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bernoulli_equals_binary_cross_entropy(dtype):
    """Values and gradients equal binary cross entropy's, also at 0 and 1."""
    p = torch.tensor(
        [0.0, 1e-44, 1e-30, 1e-13, 1e-6, 0.3, 0.5, 0.9, 1 - 2**-20, 1.0], dtype=dtype, device=DEVICE
    )
    p = p.repeat(4, 1).requires_grad_()
    x = torch.tensor([0.0, 1.0, 0.25, 0.9], dtype=dtype, device=DEVICE)[:, None].expand(p.shape)
    expected = F.binary_cross_entropy(p, x, reduction="none").neg()
    got = Bernoulli(probs=True).log_prob(x, p)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (grad,), (wanted,) = (torch.autograd.grad(v.sum(), p) for v in (got, expected))
    # x differs from p everywhere: the cancellation in x - p adds a rounding.
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_finite_at_0_and_1(name, dtype):
    """All is finite at 0 and 1, also through the activation, whose slope is 0 there."""
    read, _, x, shape, activation = CASES[name]
    logits = torch.full((B, *shape), -3.0, device=DEVICE, dtype=dtype)
    logits[0], logits[1], logits[2, ..., ::2] = -200.0, 80.0 if name == "poisson" else 200.0, -200.0
    if dtype == torch.float16 and name == "poisson":
        logits.clamp_(max=9)
    logits.requires_grad_()
    natural = activation(logits)
    q, z = torch.zeros(B, 2 * D, device=DEVICE), []

    def decoder(rows):
        z.append(rows)
        return natural

    bound = fastvae.elbo(x, q, decoder, likelihood=read, reduction="none")
    assert bool(bound.isfinite().all())
    for grad in torch.autograd.grad(bound.sum(), [natural, logits]):
        assert bool(grad.isfinite().all())


def test_a_poisson_at_rate_0():
    rate = torch.tensor([[0.0, 0.0, 1e-20, 2.0]], device=DEVICE, requires_grad=True)
    x = torch.tensor([[0, 3, 1, 2]], device=DEVICE)
    got = Poisson(rate=True).log_prob(x, rate)
    expected = torch.tensor(
        [[0.0, -300 - math.log(6), -20 * math.log(10), 2 * math.log(2) - 2 - math.log(2)]]
    )
    torch.testing.assert_close(got, expected.to(DEVICE), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(got[:, 2:].sum(), rate)
    torch.testing.assert_close(grad[:, 2:], torch.tensor([[1e20, 0.0]], device=DEVICE), rtol=1e-5, atol=1e-6)


def test_a_rate_accepts_a_size_factor():
    x, rate = torch.tensor([[1, 4]], device=DEVICE), torch.tensor([[0.5, 2.0]], device=DEVICE)
    q = torch.zeros(1, 2 * D, device=DEVICE)
    size = torch.tensor([3.0], device=DEVICE)
    got, expected = (
        fastvae.elbo(
            x, q, lambda z, o=o: o, likelihood=likelihood, size_factor=size, terms=True
        ).log_likelihood
        for likelihood, o in ((Poisson(rate=True), rate), (Poisson(), rate.log()))
    )
    torch.testing.assert_close(got, expected)


WRONG = {
    "logits": (Bernoulli(probs=True), torch.tensor([[-1.0, 0.5]]), r"values in \[-1, 0.5\], but Bernoulli"),
    "bytes": (Bernoulli(probs=True), torch.tensor([[0.0, 255.0]]), r"\[0, 255\].*in \[0, 1\]; for a decoder"),
    "log rates": (Poisson(rate=True), torch.tensor([[-1.0, 0.5]]), "rates at or above 0"),
    "class logits": (Categorical(probs=True), torch.tensor([[[-1.0, 0.5]]]), "probabilities at or above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_outputs_out_of_range_are_refused(name, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    likelihood, outputs, message = WRONG[name]
    x, q = torch.zeros(1, 2, device=DEVICE), torch.zeros(1, 2 * D, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        fastvae.elbo(x, q, lambda z: outputs.to(DEVICE), likelihood=likelihood)


def test_the_flag_is_a_bool():
    for kind, option in (
        (Bernoulli, "probs"),
        (Categorical, "probs"),
        (Poisson, "rate"),
        (Multinomial, "probs"),
    ):
        with pytest.raises(TypeError, match=f"{option} must be True or False; got 1"):
            kind(**{option: 1})


def test_compiled_and_differentiated_by_func():
    torch._dynamo.reset()
    read, _, x, shape, activation = CASES["bernoulli"]
    decoder, q = Decoder(shape, activation), randn(B, 2 * D, seed=4)

    def step():
        return fastvae.iwae(x, q, decoder, k=K, likelihood=read)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        value = run()
        results.append((value, *torch.autograd.grad(value, decoder.parameters())))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    p = 0.1 + 0.8 * rand(B, X, seed=8)
    function = torch.func.grad(lambda p: read.log_prob(x, p).sum())
    p.requires_grad_()
    torch.testing.assert_close(function(p.detach()), torch.autograd.grad(read.log_prob(x, p).sum(), p)[0])


# Warnings


def _said(decoder, likelihood="bernoulli", x=None, calls=2, vae=False):
    """Return fastvae's warnings in ``calls`` calls."""
    x = rand(B, X, seed=1).round() if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if vae:
            model = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood=likelihood).to(DEVICE)
            for _ in range(calls):
                model.elbo(x)
        else:
            for seed in range(calls):
                fastvae.elbo(x, randn(B, 2 * D, seed=seed), decoder, likelihood=likelihood)
    return [str(w.message) for w in caught if "fastvae" in str(w.message)]


class Nested(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first = nn.Linear(D, 6)
        self.net = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(6, X), last))

    def forward(self, z):
        return self.net(self.first(z))


@pytest.mark.parametrize(
    ("likelihood", "last"),
    [
        ("bernoulli", nn.Sigmoid()),
        ("bernoulli", nn.LogSigmoid()),
        ("bernoulli", nn.Softmax(1)),
        ("bernoulli", nn.LogSoftmax(1)),
        ("continuous_bernoulli", nn.Sigmoid()),
        ("multinomial", nn.Softmax(1)),
        ("poisson", nn.Softplus()),
        (NegativeBinomial(2.0), nn.Softplus()),
    ],
    ids=str,
)
@pytest.mark.parametrize("vae", [False, True])
def test_a_final_activation_is_warned_of_once(likelihood, last, vae):
    for decoder in (nn.Sequential(nn.Linear(D, X), last, nn.Unflatten(1, (X,))), Nested(last)):
        said = _said(decoder.to(DEVICE), likelihood, vae=vae)
        assert len(said) == 1
        assert type(last).__name__ in said[0] and "Leave the last activation out" in said[0]
        if not isinstance(likelihood, str):
            continue
        assert "(rate=True)" in said[0] if likelihood == "poisson" else "(probs=True)" in said[0]


def test_a_softmax_of_classes():
    x = (3 * rand(B, X, seed=1)).long()

    def decoder(*last):
        return nn.Sequential(nn.Linear(D, CLASSES * X), nn.Unflatten(1, (CLASSES, X)), *last).to(DEVICE)

    assert len(_said(decoder(nn.Softmax(1)), "categorical", x)) == 1
    assert not _said(decoder(nn.LogSoftmax(1)), "categorical", x)
    assert not _said(decoder(), "categorical", x)
    net = decoder()
    said = _said(lambda z: net(z).softmax(1), "categorical", x)
    assert ("Categorical(probs=True)" in said[0]) if DEVICE.type == "cpu" else not said


def test_outputs_between_0_and_1_are_warned_of_once(monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    net = nn.Linear(D, X).to(DEVICE)

    def decoder(z):
        return net(z).sigmoid()

    class Method:
        def decode(self, z):
            return decoder(z)

    said = _said(decoder)
    assert (
        len(said) == 1
        and "Bernoulli(probs=True)" in said[0]
        and "all outputs of the decoder lie in" in said[0]
    )
    assert len(_said(Method().decode, calls=1)) == 1
    joint = Joint(a="bernoulli")
    q = torch.zeros(B, 2 * D, device=DEVICE)
    with pytest.warns(UserWarning, match="probs=True"):
        fastvae.elbo({"a": rand(B, X, seed=1)}, q, lambda z: {"a": net(z).sigmoid()}, likelihood=joint)


def test_no_false_alarms(monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    zero = nn.Linear(D, X).to(DEVICE)
    nn.init.zeros_(zero.weight), nn.init.constant_(zero.bias, 0.25)
    sigmoid = nn.Sequential(nn.Linear(D, X), nn.Sigmoid()).to(DEVICE)
    counts = (4 * rand(B, X, seed=1)).floor()
    assert not _said(zero)
    assert not _said(nn.Linear(D, X).to(DEVICE))
    assert not _said(nn.Sequential(nn.Linear(D, 6), nn.Sigmoid(), nn.Linear(6, X)).to(DEVICE))
    assert not _said(sigmoid, Bernoulli(probs=True))
    assert not _said(sigmoid, ContinuousBernoulli(probs=True))
    assert not _said(sigmoid, Gaussian(0.1))
    assert not _said(nn.Sequential(nn.Linear(D, X), nn.Softplus()).to(DEVICE), Poisson(rate=True), counts)


@pytest.mark.parametrize(
    "likelihood",
    [
        "poisson", Poisson(rate=True), NegativeBinomial(2.0),
        ZeroInflatedNegativeBinomial(2.0), "multinomial",
    ],
    ids=str,
)  # fmt: skip
def test_fractional_counts_are_warned_of_once(likelihood, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")

    def decoder(*, outputs):
        net = nn.Linear(D, X).to(DEVICE)
        if outputs == 1:
            return lambda z: net(z).square()
        return lambda z: (net(z), net(z))

    outputs = 2 if isinstance(likelihood, ZeroInflatedNegativeBinomial) else 1
    counts = (4 * rand(B, X, seed=1)).floor()
    said = _said(decoder(outputs=outputs), likelihood, counts + 0.5)
    assert not said or len(said) == 1
    for x, number in ((counts, 0), (counts.int(), 0), (counts / 3, 1)):
        net = nn.Linear(D, outputs * X).to(DEVICE)
        module = nn.Sequential(net, Square(outputs))
        said = _said(module, likelihood, x)
        assert len(said) == number
        assert all("is not a whole number" in text for text in said)
    if likelihood == "multinomial":
        return
    vae = fastvae.VAE(
        nn.Linear(X, 2 * D), nn.Sequential(nn.Linear(D, outputs * X), Square(outputs)), likelihood=likelihood
    )
    with pytest.warns(UserWarning, match="is not a whole number"):
        vae.to(DEVICE).iwae(counts / 7, k=2)


class Square(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, h):
        h = h.square()
        return h if self.outputs == 1 else tuple(h.chunk(self.outputs, 1))
