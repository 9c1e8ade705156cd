"""iwae by chunks: the gradient of all samples in the memory of a few."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian
from fastvae.objectives import chunks
from fastvae.ops.normal_diagonal import ESTIMATORS

from . import models
from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K = 4, 3, 7, 11


def _parts(dtype=torch.float32):
    """Return a bound and everything it can learn."""
    encoder, decoder = models.networks(X, D, "bernoulli", dtype=dtype)
    decoder = nn.Sequential(decoder, nn.Tanh(), nn.Linear(X, X, device=DEVICE, dtype=dtype))
    likelihood = Gaussian(torch.full((X,), 0.7, device=DEVICE, dtype=dtype), learned=True)
    prior = [nn.Parameter(0.3 * randn(D, seed=s, dtype=dtype)) for s in (1, 2)]
    learned = [*encoder.parameters(), *decoder.parameters(), *likelihood.parameters(), *prior]
    x = randn(B, X, seed=3, dtype=dtype)

    def bound(**options):
        model = {"likelihood": likelihood, "prior": DiagonalNormal(*prior)}
        return fastvae.iwae(x, encoder(x), decoder, k=K, **model, generator=generator(4), **options)

    return bound, learned, x


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k_chunk", [1, 4, K - 1])
def test_gradients_in_chunks_equal_the_whole(backend, estimator, k_chunk):
    """Gradients agree for encoder, decoder, learned scale and learned prior; 4 and 10 do not divide 11."""
    dtype, tolerance = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-12)
    bound, learned, _ = _parts(dtype)
    whole, chunked = (bound(estimator=estimator, k_chunk=n, reduction="none") for n in (None, k_chunk))
    torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)
    upstream = randn(B, seed=5, dtype=dtype)
    expected = torch.autograd.grad(whole, learned, upstream)
    for actual, wanted in zip(torch.autograd.grad(chunked, learned, upstream), expected, strict=True):
        assert bool(wanted.any())
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("k_chunk", [K, K + 1, 1000])
def test_a_single_chunk_equals_no_chunks(k_chunk):
    bound, _, _ = _parts()
    assert torch.equal(bound(k_chunk=k_chunk), bound())


def test_terms_and_reductions():
    bound, _, _ = _parts(torch.float64)
    in_chunks, whole = bound(k_chunk=4, terms=True), bound(terms=True)
    for name in ("bound", "log_likelihood", "kl"):
        parts = getattr(in_chunks, name), getattr(whole, name)
        torch.testing.assert_close(*parts, rtol=1e-12, atol=1e-12)
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {}):
        torch.testing.assert_close(bound(k_chunk=4, **options), bound(**options), rtol=1e-12, atol=1e-12)


def test_dropout_is_the_same_in_both_passes(monkeypatch):
    """The second pass repeats the decoder's own noise, and leaves torch's random state unchanged."""
    encoder, _ = models.networks(X, D)
    decoder = nn.Sequential(nn.Linear(D, 30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, X)).to(DEVICE)
    x = rand(B, X, seed=6)
    learned = [*encoder.parameters(), *decoder.parameters()]

    def run():
        torch.manual_seed(7)
        bound = fastvae.iwae(
            x, encoder(x), decoder, k=K, k_chunk=4, likelihood="bernoulli", generator=generator(8)
        )
        grads = torch.autograd.grad(bound, learned)
        return bound, *grads, torch.rand(3)

    chunked = run()
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "checkpoint", lambda function, *args, **options: function(*args))
        expected = run()
    for actual, wanted in zip(chunked, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


class MovingScale(nn.Module):
    """A layer with a buffer that each call replaces by another tensor, as moving averages are often kept."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scale", torch.ones(width))
        self.twin = nn.Module()
        self.twin.register_buffer("scale", self.scale)

    def forward(self, h):
        self.scale = 0.5 * self.scale + 0.5 * h.detach().abs().mean(0)
        self.twin.scale.data.mul_(0.9)  # not detected by autograd's version counters
        return h * self.scale * self.twin.scale.clone()


STATEFUL = {
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(D, 9)), nn.Tanh()),
    "spectral_norm, parametrised": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(D, 9)), nn.Tanh()
    ),
    "batch_norm": lambda: nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9)),
    "moving_scale": lambda: nn.Sequential(nn.Linear(D, 9), MovingScale(9)),
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, 9))),
    "script, batch_norm": lambda: torch.jit.script(nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9))),
}


class Calling:
    """Callable that is not a module."""

    def __init__(self, module):
        self.module = module

    def __call__(self, z):
        return self.module(z)


def _nested(module):
    def inner(z):
        return module(z)

    return lambda z: inner(z)


CALLS = {
    "module": lambda module: module,
    "method": lambda module: module.forward,
    "function": lambda module: lambda z: module(z),
    "nested": _nested,
    "partial": functools.partial,
    "object": Calling,
}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_both_passes_see_the_same_buffers(kind, call, monkeypatch):
    """The second pass finds the buffers that the first found, and leaves them as the first left them."""
    x = rand(B, X, seed=6)

    def run():
        torch.manual_seed(12)
        body = STATEFUL[kind]()
        decoder = nn.Sequential(body, nn.Linear(9, X)).to(DEVICE)
        encoder, _ = models.networks(X, D)
        results = []
        for _ in range(3):  # TorchScript optimises functions that were called twice
            bound = fastvae.iwae(
                x, encoder(x), CALLS[call](decoder), k=K, k_chunk=4,
                likelihood="bernoulli", generator=generator(8),
            )  # fmt: skip
            learned = [*encoder.parameters(), *decoder.parameters()]
            results += [bound, *torch.autograd.grad(bound, learned, retain_graph=True)]
            results += torch.autograd.grad(bound, learned)
            results += [b.clone() for b in decoder.buffers()]
        return results

    chunked = run()
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "checkpoint", lambda function, *args, **options: function(*args))
        expected = run()
    for actual, wanted in zip(chunked, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_decoder_that_cannot_be_repeated_is_an_error(monkeypatch):
    """State that is neither a buffer of a module nor torch's random state."""
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x, hidden, calls = rand(B, X, seed=6), nn.Linear(D, 9, device=DEVICE), []
    head, noise = nn.Linear(9, X, device=DEVICE), generator(3)

    def counts(z):
        calls.append(1)
        return head(hidden(z)) * len(calls)

    def draws(z):
        return head(hidden(z)) + torch.randn(X, generator=noise, device=z.device)

    for decoder in (counts, draws):
        encoder, _ = models.networks(X, D)
        bound = fastvae.iwae(x, encoder(x), decoder, k=K, k_chunk=4, likelihood="bernoulli")
        with pytest.raises(RuntimeError, match="gave other outputs for the same z"):
            bound.backward()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activations_are_freed_after_each_chunk(estimator):
    """No more rows of the decoder's activations than a chunk's are alive at any time."""
    alive, most = [0], [0]

    class Watch(nn.Module):
        def forward(self, h):
            h = torch.tanh(h)
            rows = h.shape[0]
            alive[0] += rows
            most[0] = max(most[0], alive[0])
            weakref.finalize(h.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - rows))
            return h

    encoder, _ = models.networks(X, D)
    decoder = nn.Sequential(nn.Linear(D, 30), Watch(), nn.Linear(30, 30), Watch(), nn.Linear(30, X)).to(
        DEVICE
    )
    x = rand(B, X, seed=9)
    peaks = {}
    for k_chunk in (None, 5):
        alive[0] = most[0] = 0
        bound = fastvae.iwae(
            x, encoder(x), decoder, k=100, k_chunk=k_chunk, likelihood="bernoulli", estimator=estimator
        )
        bound.backward()
        peaks[k_chunk] = most[0]
    # Two layers of 100 or 5 samples.
    assert peaks[None] == 2 * 100 * B
    assert peaks[5] <= 2 * 5 * B


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_compiled(estimator):
    from torch._inductor import config

    encoder, decoder = models.networks(X, D, "bernoulli")
    x = rand(B, X, seed=10)
    learned = [*encoder.parameters(), *decoder.parameters()]

    def loss(x):
        return -fastvae.iwae(
            x, encoder(x), decoder, k=K, k_chunk=4, estimator=estimator, likelihood="bernoulli"
        )

    torch._dynamo.reset()
    results = []
    with config.patch(fallback_random=True):
        for function in (loss, torch.compile(loss, fullgraph=True)):
            torch.manual_seed(11)
            value = function(x)
            results.append((value, *torch.autograd.grad(value, learned)))
    torch._dynamo.reset()
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


class Breaking(nn.Module):
    """A layer at which a compiler breaks its graph."""

    def forward(self, h):
        torch._dynamo.graph_break()
        return h


class Averaging(nn.Module):
    """A layer that divides by a moving average, and updates it in place."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scale", torch.ones(width))

    def forward(self, h):
        out = h / self.scale.square().cumsum(0)
        with torch.no_grad():
            self.scale.lerp_(h.abs().mean(0), 0.3)
        return out


class AveragingData(Averaging):
    def forward(self, h):
        out = h / self.scale.square().cumsum(0)
        self.scale.data.mul_(0.9)
        return out


COMPILED = {
    "constant": lambda: nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9).eval()),
    "batch_norm": lambda: nn.Sequential(nn.Linear(D, 9), nn.BatchNorm1d(9), nn.Dropout(0.5)),
    "batch_norm, broken": lambda: nn.Sequential(
        nn.Linear(D, 9), nn.BatchNorm1d(9), Breaking(), nn.Dropout(0.5)
    ),
    "spectral_norm": STATEFUL["spectral_norm"],
    "moving_scale": STATEFUL["moving_scale"],
    "averaging": lambda: nn.Sequential(nn.Linear(D, 9), Averaging(9)),
    "averaging, data": lambda: nn.Sequential(nn.Linear(D, 9), AveragingData(9)),
}
WHOLE = ("constant", "batch_norm")


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_decoders_with_buffers(kind):
    """Gradients, buffers and random state equal those of eager code, in a graph and where it breaks."""
    x, options = rand(B, X, seed=6), {"backend": "aot_eager", "fullgraph": kind in WHOLE}

    def run(wrap):
        torch._dynamo.reset()
        torch.manual_seed(12)
        decoder = nn.Sequential(COMPILED[kind](), nn.Linear(9, X)).to(DEVICE)
        encoder = nn.Linear(X, 2 * D, device=DEVICE)
        learned = [*encoder.parameters(), *decoder.parameters()]
        bound = wrap(lambda x: fastvae.iwae(x, encoder(x), decoder, k=K, k_chunk=4, likelihood="bernoulli"))
        results, compiled = [], []
        for _ in range(3):
            value = bound(x)
            results += [value, *torch.autograd.grad(value, learned)]
            results += [b.clone() for b in decoder.buffers()] + [torch.rand(3)]
            compiled.append(torch._dynamo.utils.counters["frames"]["total"])
        assert compiled[0] == compiled[2]
        return results

    with torch._inductor.config.patch(fallback_random=True):
        expected = run(lambda bound: bound)
        found = run(lambda bound: torch.compile(bound, **options))
    torch._dynamo.reset()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_compiled_decoders_that_cannot_be_repeated(monkeypatch):
    """The errors of eager code, where the graph breaks; an error of the compiler if it must not break."""
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x, noise = rand(B, X, seed=6), generator(3)
    encoder = nn.Linear(X, 2 * D, device=DEVICE)
    decoder = nn.Sequential(nn.Linear(D, 9), Breaking(), nn.Tanh(), nn.Linear(9, X)).to(DEVICE)

    def compiled(decoder, **options):
        torch._dynamo.reset()
        return torch.compile(
            lambda: fastvae.iwae(x, encoder(x), decoder, k=K, k_chunk=4, likelihood="bernoulli"),
            backend="aot_eager", **options,
        )()  # fmt: skip

    bound = compiled(decoder)
    with torch.no_grad():
        decoder[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"decoder\.3\.weight, .* was changed in place"):
        bound.backward()
    bound = compiled(lambda z: decoder(z) + torch.randn(X, generator=noise, device=z.device))
    with pytest.raises(RuntimeError, match="gave other outputs for the same z"):
        bound.backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads a buffer and changes it in place"):
        compiled(nn.Sequential(nn.Linear(D, X), Averaging(X)).to(DEVICE), fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("backends", [("reference", "native"), ("native", "reference")])
def test_the_second_pass_uses_the_backend_of_the_first(backends):
    results = []
    bound, learned, _ = _parts()
    for forward, backward in (backends, backends[:1] * 2):
        with fastvae.use_backend(forward):
            value = bound(k_chunk=4, estimator="dreg")
        with fastvae.use_backend(backward):
            results.append(torch.autograd.grad(value, learned))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_errors():
    bound, _, x = _parts()
    with pytest.raises(ValueError, match="k_chunk must be at least 1"):
        bound(k_chunk=0)
    with pytest.raises(TypeError, match="k_chunk must be an int"):
        bound(k_chunk=2.5)
    _, decoder = models.networks(X, D, "bernoulli")
    q = randn(B, D, seed=12), randn(B, D, seed=13)

    def objective(weight):
        call = lambda z: torch.func.functional_call(decoder, {"weight": weight}, z)  # noqa: E731
        return fastvae.iwae(x.sigmoid(), q, call, k=K, k_chunk=4, likelihood="bernoulli")

    with pytest.raises(RuntimeError, match=r"k_chunk does not work under torch\.func"):
        torch.func.grad(objective)(decoder.weight.detach())


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
def test_a_custom_posterior_works_in_chunks(estimator):
    class Own(DiagonalNormal):
        pass

    _, decoder = models.networks(X, D, "bernoulli")
    x = rand(B, X, seed=3)
    results = []
    for kind, k_chunk in ((DiagonalNormal, None), (Own, None), (Own, 4)):
        mu, logvar = (randn(B, D, seed=s).requires_grad_() for s in (1, 2))
        value = fastvae.iwae(
            x, kind(mu, logvar), decoder, k=K, k_chunk=k_chunk, likelihood="bernoulli", estimator=estimator,
            generator=generator(5),
        )  # fmt: skip
        results.append([value, *torch.autograd.grad(value, [mu, logvar, *decoder.parameters()])])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_paths_need_both_gradients():
    mu, logvar = (randn(B, D, seed=s).requires_grad_() for s in (14, 15))
    z, ratio, paths = fastvae.ops.rsample_log_ratio(mu, logvar, k=K, paths=True)
    assert paths.shape == (K, B)
    assert not paths.any()
    with pytest.raises(RuntimeError, match="one did not arrive"):
        fastvae.ops.log_mean_exp(ratio + z.sum(2)).sum().backward()


def test_a_random_decoder_is_called_once_for_each_chunk():
    """k_chunk=1 draws a Bayesian decoder's weights for every sample; without it one draw serves all."""
    calls = []

    def decoder(z):
        calls.append(len(z))
        return z @ torch.randn(3, 7, device=DEVICE)

    x, q = torch.rand(5, 7, device=DEVICE), torch.zeros(5, 6, device=DEVICE)
    with torch.no_grad():
        fastvae.iwae(x, q, decoder, k=4, likelihood="bernoulli")
        assert calls == [20]
        fastvae.iwae(x, q, decoder, k=4, k_chunk=1, likelihood="bernoulli")
        assert calls == [20, 5, 5, 5, 5]


def test_parameters_replaced_for_one_call():
    """The backward pass after functional_call has returned computes with the parameters of the call."""
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli").double().to(DEVICE)
    x = rand(B, X, seed=1, dtype=torch.float64).round()
    fast = {n: (p.detach() * 1.001 + 1e-3).requires_grad_() for n, p in vae.named_parameters()}

    def gradients(k_chunk):
        options = {"objective": "iwae", "k": K, "k_chunk": k_chunk, "generator": generator(2)}
        loss = torch.func.functional_call(vae, fast, (x,), options)
        return torch.autograd.grad(loss.sum(), list(fast.values()))

    current = [id(p) for p in vae.parameters()]
    for found, expected in zip(gradients(4), gradients(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert [id(p) for p in vae.parameters()] == current


@pytest.mark.parametrize("factor", [1.001, 1.1])
def test_parameters_whose_data_is_exchanged_are_noticed(factor):
    """Data exchanged between the passes, as helpers for averaged weights do, raise an error."""
    decoder = nn.Linear(D, 784, device=DEVICE)
    q = randn(B, D, seed=1).requires_grad_(), randn(B, D, seed=2)
    x = rand(B, 784, seed=3).round()
    loss = fastvae.iwae(x, q, decoder, k=K, k_chunk=4, likelihood="bernoulli")
    decoder.weight.data = decoder.weight.data * factor
    with pytest.raises(RuntimeError, match="gave other outputs for the same z"):
        loss.backward()
