"""The backend is chosen per thread and per task, and a backward pass follows its forward pass."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastvae
from fastvae import ops
from fastvae.core import backend as _backend

from . import cases
from .conftest import CUDA, DEVICE

# Two backends whose bits differ.
PAIR = ("native", "reference")


def _sample():
    """Return a function that samples and reduces fixed inputs, and the inputs."""
    torch.manual_seed(5)
    mu, logvar = (torch.randn(40, 70, device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.tensor(3, device=DEVICE)

    def run():
        return ops.rsample_log_ratio(mu, logvar, k=3, seed=seed)

    return run, (mu, logvar)


def _in_thread(function):
    """Return a function's result in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_do_not_see_each_others_backend():
    run, _ = _sample()
    expected = {}
    for name in PAIR:
        with fastvae.use_backend(name):
            expected[name] = run()[1].detach()
    assert not torch.equal(*expected.values())
    wrong, barrier = [], threading.Barrier(2, timeout=600)

    def loop(name):
        for _ in range(50):
            with fastvae.use_backend(name):
                barrier.wait()  # until the other is in its block, too
                if not torch.equal(run()[1], expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=loop, args=(name,)) for name in PAIR]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_new_threads_use_the_default_and_contexts_carry_the_choice():
    default = _backend.chosen()
    other = next(name for name in PAIR if name != default)
    with fastvae.use_backend(other):
        assert _in_thread(_backend.chosen) == default
        context = contextvars.copy_context()
        assert _in_thread(lambda: context.run(_backend.chosen)) == other
        with pytest.raises(ZeroDivisionError), fastvae.use_backend(default):
            assert _backend.chosen() == default
            1 / 0  # noqa: B018
        assert _backend.chosen() == other
    assert _backend.chosen() == default


def test_tasks_do_not_see_each_others_backend():
    async def loop(name):
        for _ in range(5):
            with fastvae.use_backend(name):
                await asyncio.sleep(0)
                assert _backend.chosen() == name

    async def stream():
        with fastvae.use_backend("reference"):
            yield _backend.chosen()

    async def main():
        before = _backend.chosen()
        await asyncio.gather(*map(loop, PAIR))
        generator = stream()
        assert await anext(generator) == "reference"
        # Closed by a different task than the one that opened it.
        await asyncio.create_task(generator.aclose())
        return before

    assert asyncio.run(main()) == _backend.chosen()


@pytest.mark.parametrize("where", ["here", "thread"])
@pytest.mark.parametrize("forward, backward", [PAIR, PAIR[::-1]])
def test_backward_follows_forward(forward, backward, where):
    """A backward pass uses its forward pass's backend, bit for bit, in any thread and under any choice."""
    run, inputs = _sample()

    def differentiate(results):
        return torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])

    with fastvae.use_backend(forward):
        expected = differentiate(run())
        results = run()
    with fastvae.use_backend(backward):
        other = differentiate(run())
        found = differentiate(results) if where == "here" else _in_thread(lambda: differentiate(results))
    assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, found, other))


@pytest.mark.skipif(CUDA, reason="Triton's interpreter is chosen before triton is imported")
def test_chunks_are_recomputed_on_the_backend_of_the_forward_pass():
    """Checkpointed chunks are recomputed on the forward pass's backend, in a thread without a choice."""
    linear = torch.nn.Linear(4, 6)
    mu, logvar, x = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4), torch.rand(5, 6)

    def bound():
        torch.manual_seed(3)
        return fastvae.iwae(x, (mu, logvar), linear, likelihood="bernoulli", k=7, k_chunk=2)

    def differentiate(value):
        return torch.autograd.grad(value, [mu, *linear.parameters()])

    with fastvae.use_backend("triton"):
        expected, value = differentiate(bound()), bound()
    assert all(map(torch.equal, _in_thread(lambda: differentiate(value)), expected))


@pytest.mark.skipif(sys.platform != "linux", reason="signgam is a variable of glibc")
@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "beta"])
def test_signgam_is_unchanged(likelihood):
    """The global signgam, which C's lgamma writes and another thread may be reading, is unchanged."""
    signgam = ctypes.c_int.in_dll(ctypes.CDLL("libm.so.6"), "signgam")
    x = cases.data(likelihood, 4, 5, seed=1, dtype=torch.float64).cpu()
    parameters = [
        p.cpu().requires_grad_() for p in cases.parameters(likelihood, 3, 4, 5, seed=2, dtype=torch.float64)
    ]
    signgam.value = 7
    with fastvae.use_backend("native"):
        getattr(ops, f"{likelihood}_log_prob")(x, *parameters).sum().backward()
    assert signgam.value == 7


SMALL_STACK = """
import sys, threading, torch
from fastvae import ops
def leaf(*shape): return torch.randn(*shape, dtype=torch.float64).requires_grad_()
K, B, D, X = 3, 40, 8, 700
def run():
    mu, logvar, seed = leaf(B, D), leaf(B, D), torch.tensor(3)
    prior = leaf(B, D), leaf(B, D)
    sum(r.sum() for r in ops.rsample_log_ratio(mu, logvar, k=K, seed=seed, prior=prior)).backward()
    each = leaf(K, B, 5, 3, X)
    pixels = torch.zeros(B, 3, X, dtype=torch.float64)
    ops.discretized_logistic_mixture_log_prob(pixels, leaf(K, B, 5, X), each, each, each).sum().backward()
    x = torch.ones(B, X, dtype=torch.float64)
    ops.negative_binomial_log_prob(x, leaf(K, B, X), leaf(X)).sum().backward()
    ops.negative_binomial_log_prob(x, leaf(K, B, X), leaf(K, B, X)).sum().backward()
    done.append(True)
done = []
threading.stack_size(512 * 1024)
thread = threading.Thread(target=run)
thread.start()
thread.join()
sys.exit(not done)
"""


def test_a_small_stack_suffices():
    """A stack of 512 KiB, as for threads on macOS, suffices for the largest frames, in float64."""
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
