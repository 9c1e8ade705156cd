"""What Triton is given at a launch, and what is remembered of it, without a GPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]

# In a process of its own: here kernels are compiled and launched, by a driver that does nothing.
SCRIPT = """
import torch, fastvae
from benchmarks.launches import install
from fastvae import ops
from fastvae.kernels import common

driver = install()

def launched(call):
    driver.launches.clear()
    call()
    return list(driver.launches)

def described(launch):
    # Grid and arguments, without the handles in between; addresses of results change from call to call.
    (x, y, z, stream, function, packed, *_), arguments = launch[:9], launch[9:]
    return (x, y, z), [(a.dtype, a.shape) if isinstance(a, torch.Tensor) else str(a) for a in arguments]

mu, logvar = (torch.randn(6, 40, requires_grad=True) for _ in range(2))
x, mean = torch.rand(6, 80), torch.randn(3, 6, 80, requires_grad=True)
log_w = torch.randn(3000, 4, requires_grad=True)
seed = torch.tensor(3)
ones = lambda *t: [torch.ones_like(u) for u in t]
def grad(out, *inputs):
    return torch.autograd.grad(out, inputs, ones(*out) if isinstance(out, tuple) else ones(out))

three = {"samples": 3, "seed": seed}
calls = {
    "rsample_kl": lambda k0=0, b0=0: grad(
        ops.rsample_kl(mu, logvar, **three, sample_offset=k0, row_offset=b0), mu, logvar
    ),
    "rsample_log_ratio": lambda: grad(
        ops.rsample_log_ratio(mu, logvar, **three, estimator="stl"), mu, logvar
    ),
    "gaussian": lambda: grad(ops.gaussian_log_prob(x, mean, 0.0), mean),
    "bernoulli": lambda: grad(ops.bernoulli_log_prob(x, mean), mean),
    "log_mean_exp": lambda: grad(ops.log_mean_exp(log_w), log_w),
    "normal": lambda: fastvae.random.normal(seed, 3, 6, 40),
}
with fastvae.use_backend("triton"):
    for name, call in calls.items():
        common._programs.clear()
        first = launched(call)
        known = len(common._programs)
        again = launched(call)
        assert first and [described(a) for a in first] == [described(a) for a in again], name
        assert known == len(first) == len(common._programs), (name, known, len(first))
        # What is remembered is what Triton would find by itself.
        common._programs.clear()
        assert [(a[4], a[5]) for a in launched(call)] == [(a[4], a[5]) for a in again], name
    # Another offset is another number, not another program.
    common._programs.clear()
    near, far = launched(calls["rsample_kl"]), launched(lambda: calls["rsample_kl"](7))
    assert len(common._programs) == 2
    assert described(near[0])[1][7] == "0" and described(far[0])[1][7] == "7", described(far[0])
    # One beyond 2^31 has another type, and gets a program of its own.
    launched(lambda: calls["rsample_kl"](2**31))
    assert len(common._programs) == 4
    launched(lambda: calls["rsample_kl"](0, 2**31))
    assert len(common._programs) == 6
    # Tensors that are not aligned get Triton's own choice every time.
    off = torch.randn(6 * 80 + 1)[1:].view(6, 80)
    common._programs.clear()
    launched(lambda: ops.gaussian_log_prob(off, off, 0.0))
    assert not common._programs
print("fine")
"""


def test_programs_are_remembered():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "fine", run.stderr[-4000:]


def test_another_device_is_made_current(monkeypatch):
    """Triton launches on the current device, so that is set where the tensors are elsewhere."""
    from fastvae import _backend

    entered = []

    class Entered:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    for index, expected in ((0, []), (1, [torch.device("cuda", 1)])):
        entered.clear()
        assert _backend.on_device(torch.device("cuda", index), lambda a, b: a + b, (1, 2)) == 3
        assert entered == expected


@pytest.mark.parametrize(
    "capability, hip, backend",
    [((7, 5), None, "reference"), ((8, 0), None, "triton"), ((9, 4), "6.2", "triton")],
)
def test_architectures(monkeypatch, capability, hip, backend):
    """What Triton does not know gets plain PyTorch, and is told so once."""
    from fastvae import _backend

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Card")
    monkeypatch.setattr(torch.version, "hip", hip)
    _backend._native_on_gpu.cache_clear()
    try:
        device = torch.device("cuda", 0)
        if backend == "reference":
            with pytest.warns(RuntimeWarning, match="A Card has compute capability 7.5.*need 8.0"):
                assert _backend.on_gpu(device) == backend
        assert _backend.on_gpu(device) == backend
        # What is asked for by name is done.
        import fastvae

        with fastvae.use_backend("triton"):
            assert _backend.on_gpu(device) == "triton"
        with fastvae.use_backend("reference"):
            assert _backend.on_gpu(device) == "reference"
    finally:
        _backend._native_on_gpu.cache_clear()


def test_without_triton(monkeypatch):
    from fastvae import _backend

    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    with pytest.raises(
        RuntimeError, match="need triton, which is not installed.*use_backend\\('reference'\\)"
    ):
        _backend.layer("triton", "latent")
