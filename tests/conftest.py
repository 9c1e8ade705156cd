"""Shared fixtures: Triton's interpreter where there is no GPU, poisoned memory, one device, all backends.

With the fake card (tools/fakecard) CUDA is available, and every test computes on it.
"""

from __future__ import annotations

import os
import secrets
import zlib

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers of two threads each wait for each other on two cores. Tests of threads set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

CUDA = torch.cuda.is_available()
if CUDA:
    # The tests compare to ulps; fast noise is tested separately.
    os.environ.setdefault("FASTVAE_NOISE", "accurate")
else:
    # Must be set before triton is imported: the real kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import fastvae  # noqa: E402
from tools import fakecard, integrations, interpreter  # noqa: E402

from .cases import DEVICE  # noqa: E402

hypothesis.settings.register_profile(
    "fastvae",
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
# For tools/mutants: a failure is enough, it need not be shrunk.
hypothesis.settings.register_profile(
    "mutants",
    hypothesis.settings.get_profile("fastvae"),
    phases=[hypothesis.Phase.generate],
    derandomize=True,
)
# For python -m tools.gpu: on a GPU every new shape compiles a kernel, which takes a second.
hypothesis.settings.register_profile("device", hypothesis.settings.get_profile("fastvae"), max_examples=6)
# For tests that are repeated in another set-up, such as with an older processor's instructions.
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("fastvae"), max_examples=8)
hypothesis.settings.load_profile(os.environ.get("FASTVAE_TEST_PROFILE", "fastvae"))


if not CUDA:
    interpreter.quicken()

# The first look at the fake card itself: neither a CPU nor a real GPU has what they count. The others import
# libraries that the tests' environment does not have.
LEFT_OUT = {
    "gpu_host": (CUDA, "python -m tools.fakecard -- python -m pytest tests/gpu_host"),
    "integrations": (integrations.is_active(), "python -m tools.integrations"),
}
collect_ignore = [folder for folder, (is_active, _) in LEFT_OUT.items() if not is_active]
collect_ignore += ["typed"]  # read by pyright, not run
if CUDA and not fakecard.is_active():
    # They count launches, or draw from torch's own generators, whose numbers are not those of the CPU.
    collect_ignore += ["gpu_host/test_host.py", "gpu_host/test_compiled.py"]

if fakecard.is_active():
    from tools.fakecard import device as fake_device

    @pytest.fixture(autouse=True)
    def card():
        """Let the fake card compute, by emulation; yields the launches of Triton's kernels."""
        with fake_device.computing() as ran:
            yield ran


def pytest_terminal_summary(terminalreporter):
    # Not a header, which `-q` hides.
    for folder in (f for f in LEFT_OUT if f in collect_ignore):
        terminalreporter.write_line(f"tests/{folder}: left out, run by `{LEFT_OUT[folder][1]}`")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN, so that an element no kernel writes is detected."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded(request):
    """Seed torch afresh for each test, in CI by the test's name; a failure prints the seed."""
    seed = os.environ.get("FASTVAE_TEST_SEED")
    if seed is None:
        seed = zlib.crc32(request.node.nodeid.encode()) if os.environ.get("CI") else secrets.randbits(32)
    torch.manual_seed(int(seed))
    print(f"FASTVAE_TEST_SEED={seed}")


@pytest.fixture(params=["native", "reference"] if CUDA else ["native", "triton", "reference"])
def backend(request):
    """Run under each backend: C++, Triton's interpreter, PyTorch; on a GPU native is Triton."""
    with fastvae.use_backend(request.param):
        yield request.param


@pytest.fixture
def always(monkeypatch):
    """Fuse a decoder's last layers however small."""
    head = fastvae.ops.head
    limits = "FEWEST_NUMBERS", "FEWEST_BY_BLAS", "NUMBERS_PER_INPUT", "ROWS_PER_INPUT", "FEWEST_HIDDEN_ROWS"
    for name in limits:
        monkeypatch.setattr(head, name, 0)
    monkeypatch.setattr(head, "HAS_TILES", True)
    monkeypatch.setattr(fastvae.vae, "FEWEST_NUMBERS", 0)


@pytest.fixture
def float64():
    """Make float64 the default dtype, so that equal functions agree to 1e-10."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def one_thread():
    """Use one thread: with two, small models are many times slower if another process has the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device():
    return DEVICE
