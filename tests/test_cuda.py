"""Training steps on a GPU: no synchronisation, CUDA graphs, torch.compile's reduce-overhead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae.core.deferred import HiddenLayer
from fastvae.likelihoods import Gaussian
from fastvae.ops.head import Layers, linear_rows

from .conftest import CUDA, DEVICE

on_a_card = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

B, D, X, K = 6, 3, 20, 4


def _bounds():
    """Return every objective as a function of (x, q, decoder)."""
    bernoulli, gaussian = {"likelihood": "bernoulli"}, {"likelihood": Gaussian(scale=0.3)}
    bounds = {
        "elbo": lambda *a: fastvae.elbo(*a, **bernoulli, beta=0.5, free_bits=0.1),
        "elbo, monte carlo": lambda *a: fastvae.elbo(*a, **gaussian, k=2, kl="mc"),
        "iwae by chunks": lambda *a: fastvae.iwae(*a, **bernoulli, k=K, k_chunk=2),
    }
    for estimator in ("iwae", "dreg", "stl"):
        bounds[estimator] = lambda *a, e=estimator: fastvae.iwae(*a, **bernoulli, k=K, estimator=e)
        bounds[f"{estimator}, gaussian"] = lambda *a, e=estimator: fastvae.iwae(
            *a, **gaussian, k=K, estimator=e
        )
    return bounds


BOUNDS = _bounds()


class Model(nn.Module):
    def __init__(self, bound):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder, self.bound = nn.Linear(X, 2 * D), nn.Linear(D, X), bound

    def forward(self, x):
        return -self.bound(x, self.encoder(x).chunk(2, dim=1), self.decoder)


def _step_of(bound, device=DEVICE, lr=1e-2):
    """Return a model, a fixed batch, and a training step that returns the loss."""
    model = Model(bound).to(device)
    x = torch.rand(B, X, device=device).round()
    # A tensor, so that it can be changed after a graph's capture.
    rate = torch.tensor(lr, device=device) if CUDA else lr
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=CUDA)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.rate = rate
    return model, x, step


class Refusing(TorchDispatchMode):
    """Mode that fails where a number is read from the device, or a shape depends on one."""

    REFUSED = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in BOUNDS if "gaussian" in n or "monte" in n])
def test_training_steps_do_not_synchronise(backend, name):
    """Neither forward nor backward synchronises on any device, except to check Bernoulli targets on a CPU."""
    model, x, _ = _step_of(BOUNDS[name])
    with Refusing():
        model(x).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), Refusing():
        model(x).item()


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tests.test_cuda import B, BOUNDS, D, X

# Fake tensors of a card: whoever asks for a number, or mixes devices, fails.
with FakeTensorMode(), torch.no_grad():
    device = torch.device("cuda", 0)
    weight, x = torch.empty(D, X, device=device), torch.empty(B, X, device=device)
    q = torch.empty(B, D, device=device), torch.empty(B, D, device=device)
    for name, bound in BOUNDS.items():
        result = bound(x, q, lambda z: z @ weight)
        assert result.device == device and result.shape == (), name
print("fine")
"""


def test_tensors_stay_on_the_gpu():
    """On fake CUDA tensors, without a GPU: no number is read, no tensor is created on another device."""
    run = subprocess.run([sys.executable, "-c", FAKE], capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr[-3000:]


@on_a_card
@pytest.mark.parametrize("name", BOUNDS)
def test_no_synchronisation(name):
    _, _, step = _step_of(BOUNDS[name])
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_card
@pytest.mark.parametrize("name", [n for n in BOUNDS if n != "iwae by chunks"])
def test_a_step_in_a_cuda_graph(name):
    """A whole step is captured; every replay draws new noise, trains, and allocates nothing."""
    model, x, step = _step_of(BOUNDS[name])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    before = torch.cuda.memory_allocated()
    losses = []
    for _ in range(200):
        graph.replay()
        losses.append(loss.clone())
    losses = torch.stack(losses).double().cpu()
    assert torch.cuda.memory_allocated() - before <= 200 * 512
    assert bool(losses.isfinite().all()) and losses.unique().numel() > 190
    assert losses[-50:].mean() < losses[:50].mean()
    # With a learning rate of 0, the replays' losses are those of the eager model.
    step.rate.zero_()
    still = []
    for _ in range(100):
        graph.replay()
        still.append(loss.clone())
    still = torch.stack(still).double().cpu()
    with torch.no_grad():
        eager = torch.stack([model(x) for _ in range(200)]).double().cpu()
    assert abs(eager.mean() - still.mean()) < 5 * eager.std() * (1 / 100 + 1 / 200) ** 0.5


@on_a_card
@pytest.mark.parametrize("name", ["elbo", "iwae", "dreg, gaussian"])
def test_reduce_overhead(name):
    """torch.compile's CUDA graphs cover the whole step, skip nothing, and draw new noise each time."""
    from torch._dynamo.utils import counters

    model, x, _ = _step_of(BOUNDS[name])
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    counters.clear()
    losses = []
    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        loss = compiled(x)
        loss.backward()
        losses.append(float(loss))
        grads = [p.grad.clone() for p in model.parameters()]
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(set(losses)) == len(losses)
    with torch.no_grad():
        eager = torch.stack([model(x) for _ in range(200)]).double()
    assert abs(float(eager.mean()) - sum(losses) / 8) < 5 * float(eager.std()) / 8**0.5
    torch._dynamo.reset()


@on_a_card
def test_capture_draws_the_same_noise():
    """A graph whose seed is a tensor gives the eager call's result for that seed."""
    mu, logvar = (torch.randn(B, D, device=DEVICE) for _ in range(2))
    seed = torch.tensor(5, device=DEVICE)
    fastvae.ops.rsample_kl(mu, logvar, k=K, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, kl = fastvae.ops.rsample_kl(mu, logvar, k=K, seed=seed)
    for value in (5, -7):
        seed.fill_(value)
        graph.replay()
        expected = fastvae.ops.rsample_kl(mu, logvar, k=K, seed=seed)
        assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])


@on_a_card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_gpu():
    """Tensors on the second GPU are computed there while the first is current, eagerly and compiled."""
    device = torch.device("cuda", 1)
    model, x, step = _step_of(BOUNDS["iwae"], device)
    assert step().device == device and torch.cuda.current_device() == 0
    assert torch.compile(model)(x).device == device


FAST_NOISE = """
import math, torch, fastvae
from fastvae import ops

device = torch.device("cuda")
# Where the tests have the accurate noise: here as users have it.
worst, count, moments, histogram = 0.0, 0, torch.zeros(4, dtype=torch.float64, device=device), 0
edges = torch.linspace(-4, 4, 401, dtype=torch.float64, device=device)
for seed in torch.randint(2**62, (8,)).tolist():
    eps = fastvae.random.normal(seed, 4, 2**10, 2**12, device=device)
    exact = fastvae.random.normal(seed, 4, 2**10, 2**12, dtype=torch.float64, device=device)
    worst = max(worst, float((eps - exact).abs().max()))
    eps, count = eps.double().flatten(), count + eps.numel()
    moments += torch.stack([(eps**i).sum() for i in (1, 2, 3, 4)])
    histogram = histogram + torch.bucketize(eps, edges).bincount(minlength=len(edges) + 1)
assert count >= 10**8 and 0 < worst <= 1e-5, (count, worst)
# Mean, variance, and the third and fourth moments, whose variances are 1, 2, 15 and 96.
for moment, expected, variance in zip((moments / count).tolist(), (0, 1, 0, 3), (1, 2, 15, 96)):
    assert abs(moment - expected) < 5 * math.sqrt(variance / count), moments / count
distance = float((histogram.cumsum(0)[:-1] / count - torch.special.ndtr(edges)).abs().max())
# Kolmogorov and Smirnov's: beyond it once in 10^9.
assert distance < 3.3 / math.sqrt(count), distance

# The noise of z, of its gradient and of normal() is the same.
b, d, k = 33, 50, 7
mu, logvar = torch.randn(b, 2 * d, device=device).chunk(2, dim=1)
mu, logvar, seed = mu.requires_grad_(), logvar.requires_grad_(), torch.tensor(11, device=device)
eps = fastvae.random.normal(seed, k, b, d).double()
sigma, g = torch.exp(0.5 * logvar.detach().double()), torch.randn(k, b, d, device=device)
for op in (ops.rsample_kl, ops.rsample_log_ratio):
    z, _ = op(mu, logvar, k=k, seed=seed)
    torch.testing.assert_close(z.double(), mu + sigma * eps, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(z, (mu, logvar), g)
    torch.testing.assert_close(got[0].double(), g.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), (0.5 * g * sigma * eps).sum(0), rtol=1e-5, atol=1e-5)
    part, _ = op(mu[4:9], logvar[4:9], k=3, seed=seed, sample_offset=2, row_offset=4)
    assert torch.equal(part, z[2:5, 4:9])
print("fine", worst, distance * math.sqrt(count))
"""


@on_a_card
def test_fast_noise_is_accurate():
    """10^8 normals with users' settings are within 1e-5 of their words' values; the ops use the same."""
    environment = {**os.environ, "FASTVAE_NOISE": "fast"}
    run = subprocess.run([sys.executable, "-c", FAST_NOISE], env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert run.stdout.startswith("fine"), run.stderr[-3000:]


@on_a_card
@pytest.mark.parametrize("widths", [(200,), (200, 200), (128, 256, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_decoders_on_matrix_units(dtype, widths):
    """log p(x|z) is within the roundings of the products' operands."""
    k, b, latents, size = 150, 3, 50, 784
    u = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)

    pairs = zip((latents, *widths), widths, strict=False)
    hidden = tuple(HiddenLayer(randn(w, v, scale=v**-0.5), randn(w), "tanh") for v, w in pairs)
    z, weight, bias = randn(k * b, latents), randn(size, widths[-1], scale=widths[-1] ** -0.5), randn(size)
    x = torch.rand(b, size, device=DEVICE).round()
    # The largest error of each value, to first order.
    value, error = z.double(), torch.zeros_like(z, dtype=torch.float64)
    for w, c, _ in (*hidden, HiddenLayer(weight, bias, "")):
        w, c = w.double(), c.double()
        error = error @ w.abs().mT + w.shape[1] * 2.0**-23 * (value.abs() @ w.abs().mT)
        value = value @ w.mT + c
        if len(w) != size:
            value = value.tanh()
            error = error + u * value.abs()
    expected = fastvae.ops.bernoulli_log_prob(x.double(), value.view(k, b, size))
    allowed = (error.view(k, b, size) + 2.0**-21 * (1 + value.view(k, b, size).abs())).sum(2)
    with torch.no_grad():
        found = linear_rows("bernoulli", x, Layers(z, weight, bias, hidden=hidden))
    assert ((found.double() - expected).abs() <= allowed).all()
