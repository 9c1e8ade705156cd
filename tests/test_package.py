"""The extension as it is shipped: instruction sets, threads, forks, and what an import does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastvae
from fastvae import _backend, ops

from .conftest import CUDA

WORK = """
import sys, torch, fastvae
from fastvae import ops
generator = torch.Generator().manual_seed(0)
make = lambda *s: torch.randn(s, generator=generator).requires_grad_()
mu, logvar, mean, scale = make(37, 70), make(37, 70), make(3, 37, 131), make(131)
x, seed = torch.rand(37, 131, generator=generator), torch.tensor(7)
z, kl = ops.rsample_kl(mu, logvar, samples=5, seed=seed)
y, ratio = ops.rsample_log_ratio(mu, logvar, samples=5, seed=seed)
log_px = ops.gaussian_log_prob(x, mean, scale), ops.bernoulli_log_prob(x, mean)
terms = [z, kl, ratio, *log_px, ops.log_mean_exp(ratio)]
grads = torch.autograd.grad(sum(t.sum() for t in terms), [mu, logvar, mean, scale])
torch.save([t.detach() for t in (*terms, *grads)], sys.argv[1])
print(fastvae._backend.extension().isa())
"""


def _run(path, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", WORK, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), torch.load(path)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_instruction_sets_agree(tmp_path, isa):
    """A wheel runs on another machine: the code for older processors gives the same to rounding."""
    best = _backend.extension().isa()
    used, results = _run(tmp_path / "older.pt", FASTVAE_ISA=isa)
    assert used == (isa if best != "base" else "base")
    _, expected = _run(tmp_path / "best.pt")
    for a, b in zip(results, expected, strict=True):
        # Sums in another order: a few ulps of the largest terms.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_the_kernels_on_an_older_processor(isa):
    """Vectors of another length take other paths: every op's own tests, in float64 and half precision too."""
    names = ("random", "latent", "gaussian", "bernoulli", "importance")
    folder = os.path.dirname(__file__)
    tests = [os.path.join(folder, f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=", "-k", "(native or cpp) and not slow", *tests]
    # Without a GPU: there "native" is another thing.
    environment = {**os.environ, "FASTVAE_ISA": isa, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["FASTVAE_TEST_PROFILE"] = "few"
    root = os.path.dirname(folder)
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_bits_do_not_depend_on_the_number_of_threads(tmp_path):
    results = [_run(tmp_path / f"{n}.pt", OMP_NUM_THREADS=str(n))[1] for n in (1, 2, 3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_torch_and_the_extension_share_one_openmp():
    """Two OpenMP runtimes in one process fight over the cores."""
    code = "import fastvae; fastvae._backend.extension(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_hang():
    """A DataLoader's worker is forked after OpenMP ran, and has one thread."""
    code = """
import os, torch, fastvae
mu = torch.randn(5000, 64)
torch.set_num_threads(2)
fastvae.ops.rsample_kl(mu, mu)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    fastvae.ops.rsample_kl(mu, mu)
    os._exit(0)
_, status = os.waitpid(child, 0)
print("exit", os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "exit 0", done.stderr


@pytest.mark.skipif(CUDA, reason="for machines without a GPU")
def test_import_without_a_gpu_does_not_import_triton():
    seen = "print(sorted(m for m in ('triton', 'matplotlib', 'sklearn', 'argparse') if m in sys.modules))"
    ours = f"import sys, torch, fastvae; mu = torch.zeros(2, 3); fastvae.ops.rsample_kl(mu, mu); {seen}"
    torchs = f"import sys, torch; {seen}"
    ours, torchs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout
        for c in (ours, torchs)
    )
    assert ours == torchs


def test_typed_and_complete():
    from importlib.resources import files

    assert files("fastvae").joinpath("py.typed").is_file()
    assert all(hasattr(fastvae, name) for name in fastvae.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
