"""The objectives' usual call: the same bits, warnings and errors as the general path."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.core.backend import LEFT_OUT
from fastvae.likelihoods.declared import SHARED
from fastvae.objectives import usual

from .models import rand

B, D, X, K = 5, 3, 7, 4
# The package's attributes of these names are the functions.
MODULES = [sys.modules[f"fastvae.objectives.{name}"] for name in ("elbo", "iwae")]


pytestmark = pytest.mark.skipif(LEFT_OUT, reason="without the C++ extension no call is usual")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def _data(name):
    """Return x in the likelihood's support."""
    x = rand(B, X, seed=1, dtype=torch.float32).cpu()
    return (3 * x).floor() if SHARED[name].counts else 0.1 + 0.8 * x


def _networks(name, dtype=torch.float32):
    count = len(SHARED[name].outputs)
    encoder = nn.Linear(X, 2 * D).to(dtype)
    layer = nn.Linear(D, count * X).to(dtype)
    return encoder, layer, (lambda z: layer(z)) if count == 1 else (lambda z: layer(z).chunk(count, 1))


class _Count:
    """Counts the calls that take the fast path to its end."""

    def __init__(self, monkeypatch):
        self.calls, reduce = 0, usual.direct_reduce

        def counted(*args):
            self.calls += 1
            return reduce(*args)

        monkeypatch.setattr(usual, "direct_reduce", counted)


def _general(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "usual_bound", lambda *args: None)


def _run(objective, x, q, decoder, parameters, **options):
    value = getattr(fastvae, objective)(x, q, decoder, generator=generator(3), **options)
    return value, torch.autograd.grad(value.sum(), parameters, allow_unused=True)


USUAL = sorted(name for name, likelihood in SHARED.items() if not likelihood.constants)


@pytest.mark.parametrize("whole", [True, False], ids=["tensor", "pair"])
@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("name", USUAL)
def test_bits_are_those_of_the_general_path(name, objective, whole, monkeypatch):
    """Value and every gradient are equal bit for bit, for each likelihood and both forms of q."""
    count = _Count(monkeypatch)
    x = _data(name)
    encoder, layer, decoder = _networks(name)
    parameters = [*encoder.parameters(), *layer.parameters()]
    options = {"likelihood": name, "k": K}

    def run():
        q = encoder(x)
        return _run(objective, x, q if whole else q.chunk(2, 1), decoder, parameters, **options)

    fast = run()
    assert count.calls == 1
    _general(monkeypatch)
    general = run()
    assert count.calls == 1
    torch.testing.assert_close(fast, general, rtol=0, atol=0)


OBJECTS = {
    "a number": lambda: likelihoods.Gaussian(scale=0.7),
    "a row": lambda: likelihoods.Laplace(scale=0.5 + torch.arange(X) / X),
    "a learned number": lambda: likelihoods.Logistic(scale=0.7, learned=True),
    "a learned row": lambda: likelihoods.NegativeBinomial(0.5 + torch.arange(X) / X, learned=True),
    "between the decoder's": lambda: likelihoods.ZeroInflatedNegativeBinomial(2.0),
    "two": lambda: likelihoods.StudentT(df=4.0, scale=0.3),
    "none": lambda: likelihoods.Bernoulli(),
    "probabilities": lambda: likelihoods.Bernoulli(probs=True),
    "a subclass": lambda: type("Own", (likelihoods.Gaussian,), {})(scale=0.7),
    "an optimal scale": lambda: likelihoods.Gaussian(scale="optimal"),
    "a row for each example": lambda: likelihoods.Gaussian(scale=torch.ones(B, X)),
}
GENERAL = ("probabilities", "a subclass", "an optimal scale", "a row for each example")


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_likelihoods_with_parameters_of_their_own(kind, objective, monkeypatch):
    """Objects that own parameters, fixed or learned, have the bits of the general path, in a VAE, too."""
    count = _Count(monkeypatch)
    likelihood = OBJECTS[kind]()
    number = {"between the decoder's": 2}.get(kind, 1)
    x = _data("poisson") if likelihood.counts else _data("gaussian")
    encoder, layer = nn.Linear(X, 2 * D), nn.Linear(D, number * X)

    def decoder(z):
        h = layer(z).sigmoid() if kind == "probabilities" else layer(z)
        return h if number == 1 else h.chunk(number, 1)

    vae = fastvae.VAE(encoder, decoder, likelihood=likelihood, modules=[layer], fuse=False)
    parameters = list(vae.parameters())

    def run():
        options = {"k": K, "generator": generator(3)}
        by_function = _run(objective, x, encoder(x), decoder, parameters, likelihood=likelihood, k=K)
        value = getattr(vae, objective)(x, **options)
        return *by_function, value, torch.autograd.grad(value, parameters)

    fast = run()
    assert count.calls == (0 if kind in GENERAL else 2)
    torch.testing.assert_close(fast[:2], fast[2:], rtol=0, atol=0)
    _general(monkeypatch)
    torch.testing.assert_close(fast, run(), rtol=0, atol=0)


@pytest.mark.parametrize("prior", [None, "standard_normal", "object", "pair"])
def test_only_the_standard_prior_is_usual(prior, monkeypatch):
    """N(0, I) as None or an object is usual; a name or a pair is not, and has the same value."""
    count = _Count(monkeypatch)
    x = _data("gaussian")
    encoder, _, decoder = _networks("gaussian")
    zeros = torch.zeros(D)
    given = {"object": fastvae.distributions.StandardNormal(), "pair": (zeros, zeros)}.get(prior, prior)
    value = fastvae.elbo(x, encoder(x), decoder, prior=given, generator=generator(3))
    assert count.calls == (prior in (None, "object"))
    expected = fastvae.elbo(x, encoder(x), decoder, generator=generator(3))
    # Another prior's KL has one more product in each term.
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_a_number_of_inference_mode_can_be_trained_with(monkeypatch):
    """The tensor of a fixed scale, shared by later calls, may first be needed in inference mode."""
    usual._shared_number.cache_clear()
    x, layer = _data("gaussian"), nn.Linear(D, X)
    likelihood = likelihoods.Gaussian(scale=0.123)
    with torch.inference_mode():
        first = fastvae.elbo(x, torch.zeros(B, 2 * D), layer, likelihood=likelihood, generator=generator(3))
    second = fastvae.elbo(x, torch.zeros(B, 2 * D), layer, likelihood=likelihood, generator=generator(3))
    second.backward()
    assert first == second.detach() and layer.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1}, {"beta": 0.3}, {"reduction": "none"}, {"reduction": "sum", "beta": 4.0},
        {"k": 2, "beta": 1e-3},
        {"kl": "mc"}, {"beta": 0.0}, {"free_bits": 0.1}, {"beta": 2}, {"row_offset": 3},
        {"estimator": "stl"}, {"estimator": "dreg"}, {"noise": "qmc"}, {"k_chunk": 2},
    ],
    ids=str,
)  # fmt: skip
def test_options_change_nothing(options, monkeypatch):
    """Each option has the general path's value, whether the fast path takes it or not."""
    objective = "iwae" if {"estimator", "noise", "k_chunk"} & set(options) else "elbo"
    x = _data("bernoulli")
    encoder, layer, decoder = _networks("bernoulli", torch.float64)
    x = x.double()
    parameters = [*encoder.parameters(), *layer.parameters()]
    options = {"likelihood": "bernoulli", "k": K} | options
    fast = _run(objective, x, encoder(x), decoder, parameters, **options)
    _general(monkeypatch)
    general = _run(objective, x, encoder(x), decoder, parameters, **options)
    torch.testing.assert_close(fast, general, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "poisson"])
def test_data_that_needs_a_gradient_gets_it(name, monkeypatch):
    """x gets the general path's gradient, or its refusal for counts."""
    x = _data(name).requires_grad_()
    encoder, _, decoder = _networks(name)
    q = encoder(x.detach()).detach()

    def run():
        try:
            return _run("iwae", x, q, decoder, [x], likelihood=name, k=K)
        except ValueError as error:
            return str(error)

    fast = run()
    _general(monkeypatch)
    general = run()
    if name == "poisson":
        assert "has none for x" in fast and fast == general
    else:
        assert general[1][0] is not None
        torch.testing.assert_close(fast, general, rtol=0, atol=0)


class _Output:
    def __init__(self, sample):
        self.sample = sample


RETURNED = {
    "dict": lambda h: {"logits": h},
    "object": _Output,
    "list": lambda h: [h],
    "tuple": lambda h: (h,),
    "transposed": lambda h: h.t().contiguous().t(),
    "float64": torch.Tensor.double,
    "half": torch.Tensor.half,
    "negative view": lambda h: torch._neg_view(-h),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_decoders_may_return_anything(kind, monkeypatch):
    """A decoder is called once, and its output is read, or refused, as the general path does it."""
    x = _data("bernoulli")
    encoder, layer, _ = _networks("bernoulli")
    calls = []

    def decoder(z):
        calls.append(len(z))
        return RETURNED[kind](layer(z))

    def run():
        calls.clear()
        try:
            return _run("elbo", x, encoder(x), decoder, list(layer.parameters()), likelihood="bernoulli")
        except (TypeError, ValueError) as error:
            return str(error)
        finally:
            assert calls == [B]

    fast = run()
    _general(monkeypatch)
    general = run()
    if isinstance(general, str):
        assert fast == general
    else:
        torch.testing.assert_close(fast, general, rtol=0, atol=0)


@pytest.mark.parametrize(
    "why", ["rows", "columns", "integers", "support", "decoder", "odd", "batch", "dtypes"]
)
def test_errors_are_those_of_the_general_path(why, monkeypatch):
    """A mistake has the same message and note."""
    x = _data("bernoulli")
    encoder, layer, _ = _networks("bernoulli")
    q = encoder(x).detach()
    decoder = {
        "rows": lambda z: layer(z)[:-1],
        "columns": lambda z: layer(z)[:, :-1],
        "integers": lambda z: layer(z).long(),
        "decoder": nn.Linear(D + 1, X),
    }.get(why, layer)
    if why == "support":
        x = x + 1
    q = {"odd": q[:, :-1], "batch": q[:-1], "dtypes": (q[:, :D], q[:, D:].long())}.get(why, q)

    def message():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as info:
            fastvae.elbo(x, q, decoder, likelihood="bernoulli")
        return str(info.value), getattr(info.value, "__notes__", [])

    fast = message()
    _general(monkeypatch)
    assert fast == message()


def test_a_misread_decoder_is_reported(monkeypatch):
    """A decoder that ends in a sigmoid is warned about, once."""
    x, q = _data("bernoulli"), torch.zeros(B, 2 * D)
    decoder = nn.Sequential(nn.Linear(D, X), nn.Sigmoid())
    with pytest.warns(UserWarning, match="ends in Sigmoid"):
        fastvae.elbo(x, q, decoder, likelihood="bernoulli")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastvae.elbo(x, q, decoder, likelihood="bernoulli")


SHAPED = {
    "one output": lambda event: "bernoulli",
    "two outputs": lambda event: "gaussian",
    "a fixed scale": lambda event: likelihoods.Gaussian(scale=0.3),
    "a learned scale of each element": lambda event: likelihoods.Laplace(
        rand(*event, seed=5) + 0.5, learned=True
    ),
}


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("kind", SHAPED)
def test_shaped_data_have_the_bits_of_the_general_path(kind, objective, monkeypatch):
    """Images [B, C, H, W] and layouts whose rows are not contiguous."""
    count, event = _Count(monkeypatch), (2, 3, 5)
    likelihood = SHAPED[kind](event)
    likelihood = likelihood.cpu() if isinstance(likelihood, nn.Module) else likelihood
    x = rand(B, 3, 5, 2, seed=1).cpu().movedim(-1, 1)
    outputs = 2 if kind == "two outputs" else 1
    encoder, layer = nn.Linear(30, 2 * D), nn.Linear(D, outputs * 30)
    learned = [*encoder.parameters(), *layer.parameters()]
    learned += list(likelihood.parameters()) if isinstance(likelihood, nn.Module) else []

    def decoder(z):
        h = layer(z).reshape(-1, 3, 5, outputs * 2).movedim(-1, 1)
        return tuple(h.chunk(2, 1)) if outputs == 2 else h

    def run():
        return _run(objective, x, encoder(x.flatten(1)), decoder, learned, likelihood=likelihood, k=K)

    fast = run()
    assert count.calls == 1
    _general(monkeypatch)
    general = run()
    assert count.calls == 1
    assert torch.equal(fast[0], general[0])
    assert all(map(torch.equal, fast[1], general[1]))


def test_a_fused_head_and_an_empty_batch_take_the_general_path(monkeypatch):
    """A last layer left to the objective and an empty batch are not usual."""
    count = _Count(monkeypatch)
    x = _data("bernoulli")
    encoder, layer, _ = _networks("bernoulli")
    head = fastvae.FusedHead(nn.Identity(), layer)
    one = fastvae.elbo(x, encoder(x), head, likelihood="bernoulli", generator=generator(3))
    two = fastvae.elbo(x, encoder(x), layer, likelihood="bernoulli", generator=generator(3))
    # Products of another order of summation.
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert count.calls == 1
    assert fastvae.elbo(x[:0], encoder(x[:0]), layer, likelihood="bernoulli", reduction="none").shape == (0,)
    assert count.calls == 1


def test_only_the_native_backend_in_eager_mode_is_usual(monkeypatch):
    """Other backends, transforms and deterministic gradients of gradients take the general path."""
    count = _Count(monkeypatch)
    x = _data("bernoulli")
    encoder, layer, _ = _networks("bernoulli")

    def loss(q):
        return fastvae.elbo(x, q, layer, likelihood="bernoulli", generator=generator(3))

    q = encoder(x).detach()
    with fastvae.use_backend("reference"):
        reference = loss(q)
    assert count.calls == 0
    torch.testing.assert_close(loss(q), reference, rtol=1e-5, atol=1e-5)
    assert count.calls == 1
    wanted = torch.autograd.grad(loss(leaf := q.clone().requires_grad_()), leaf)[0]
    assert count.calls == 2
    torch.testing.assert_close(torch.func.grad(loss)(q), wanted, rtol=1e-6, atol=1e-6)
    assert count.calls == 2
    with torch.no_grad():
        assert not loss(encoder(x)).requires_grad
    value = loss(leaf := q.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="second derivatives|does not require grad"):
        (first,) = torch.autograd.grad(value, leaf, create_graph=True)
        torch.autograd.grad(first.sum(), leaf)
