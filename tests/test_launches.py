"""Arguments of Triton launches and their caching, without a GPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]

# In a separate process, where kernels are compiled and launched by a stand-in driver.
SCRIPT = """
import torch, fastvae
from tools.launches import install
from fastvae import ops
from fastvae.kernels import launching, likelihood

driver = install()

def launched(call):
    driver.launches.clear()
    call()
    return list(driver.launches)

def described(launch):
    # Grid and arguments, without the handles in between; addresses of results change from call to call.
    (x, y, z, stream, function, packed, *_), arguments = launch[:9], launch[9:]
    # By Triton's own way a tensor is given, by ours its address, which is beyond the numbers here.
    is_address = lambda a: isinstance(a, torch.Tensor) or type(a) is int and a > 2**20
    return (x, y, z), ["address" if is_address(a) else str(a) for a in arguments]


def known():
    return sum(map(len, launching._caches))

mu, logvar = (torch.randn(6, 40, requires_grad=True) for _ in range(2))
x, mean = torch.rand(6, 80), torch.randn(3, 6, 80, requires_grad=True)
log_w = torch.randn(3000, 4, requires_grad=True)
components = torch.randn(7, 80, requires_grad=True)
tril = torch.randn(6, 820, requires_grad=True)
seed = torch.tensor(3)
ones = lambda *t: [torch.ones_like(u) for u in t]
def grad(out, *inputs):
    return torch.autograd.grad(out, inputs, ones(*out) if isinstance(out, tuple) else ones(out))

three = {"k": 3, "seed": seed}
calls = {
    "rsample_kl": lambda k0=0, b0=0: grad(
        ops.rsample_kl(mu, logvar, **three, sample_offset=k0, row_offset=b0), mu, logvar
    ),
    "rsample_log_ratio": lambda: grad(
        ops.rsample_log_ratio(mu, logvar, **three, estimator="stl"), mu, logvar
    ),
    "rsample_tril": lambda: grad(ops.rsample_tril(mu, tril, **three), mu, tril),
    "gaussian": lambda: grad(ops.gaussian_log_prob(x, mean, 0.0), mean),
    "bernoulli": lambda: grad(ops.bernoulli_log_prob(x, mean), mean),
    "log_mean_exp": lambda: grad(ops.log_mean_exp(log_w), log_w),
    "mixture": lambda: grad(ops.mixture_log_prob(mean, components, components), components),
    "aggregate": lambda: grad(ops.aggregate_log_prob(mean.detach(), components, components), components),
    "normal": lambda: fastvae.random.normal(seed, 3, 6, 40),
}
with fastvae.use_backend("triton"):
    for name, call in calls.items():
        launching.clear_caches()
        first = launched(call)
        before = known()
        again = launched(call)
        assert first and [described(a) for a in first] == [described(a) for a in again], name
        assert before == len(first) == known(), (name, before, len(first))
        # The cached arguments equal those that Triton computes.
        launching.clear_caches()
        assert [(a[4], a[5]) for a in launched(call)] == [(a[4], a[5]) for a in again], name
    # Another offset is another number, not another program.
    launching.clear_caches()
    near, far = launched(calls["rsample_kl"]), launched(lambda: calls["rsample_kl"](7))
    assert known() == 2
    assert described(near[0])[1][8] == "0" and described(far[0])[1][8] == "7", described(far[0])
    # An offset beyond 2^31 has another type, and needs another program.
    launched(lambda: calls["rsample_kl"](2**31))
    assert known() == 4
    launched(lambda: calls["rsample_kl"](0, 2**31))
    assert known() == 6
print("fine")
"""

# Each loaded program has its own handle, and the calls of Triton's own run are counted.
HANDLES = (
    SCRIPT.partition("mu, logvar = ")[0]
    + """
import itertools, triton
from fastvae.kernels import likelihood

handles = itertools.count(1)
driver.load_binary = lambda *_: (1, next(handles), 32, 0, 1024)
asked = []
run = triton.JITFunction.run
triton.JITFunction.run = lambda *a, **k: (asked.append(1), run(*a, **k))[1]

def handle(call):
    (launch,) = launched(call)
    return launch[4]

def is_remembered(call):
    asked.clear()
    handle(call)
    return not asked
"""
)

ALIGNMENT = (
    HANDLES
    + """
x, mean = (torch.randn(6, 80) for _ in range(2))
x_off, mean_off = (torch.randn(6 * 80 + 1)[1:].view(6, 80) for _ in range(2))
calls = [
    lambda a=a, b=b: ops.gaussian_log_prob(a, b, 0.0) for a in (x, x_off) for b in (mean, mean_off)
]
# The flagship: the second half begins at half of 100 columns, 8 bytes off.
halves = torch.randn(6, 100).chunk(2, dim=1)
assert halves[1].data_ptr() % 16 == 8
wide = [torch.randn(6, 100)[:, :50] for _ in range(2)]
pairs = [lambda p=p: ops.rsample_kl(*p) for p in (halves, wide)]
with fastvae.use_backend("triton"):
    for group in (calls, pairs):
        found = [handle(call) for call in group]
        assert len(set(found)) == len(group), found
        assert all(map(is_remembered, group))
        assert [handle(call) for call in group] == found
        # Each is the program that Triton would choose for these pointers.
        launching.clear_caches()
        assert [handle(call) for call in reversed(group)] == found[::-1]
        assert not any(launching.clear_caches() or is_remembered(call) for call in group)
    # Another batch, or another number of samples, needs no other program; another number of columns does.
    wide = torch.randn(40, 100)
    for op in (ops.rsample_kl, ops.rsample_log_ratio):
        halves = lambda b: wide[:b].chunk(2, dim=1)
        found = {handle(lambda: op(*halves(b), k=k)) for b, k in ((20, 9), (21, 9), (21, 11))}
        assert len(found) == 1, found
        assert handle(lambda: op(wide[:20, :48], wide[:20, 50:98], k=9)) not in found
print("fine")
"""
)

WATCHED = (
    HANDLES
    + """
from triton import knobs

x = torch.randn(6, 80)
call = lambda: ops.gaussian_log_prob(x, x, 0.0)
kernel = likelihood.log_prob_kernel
with fastvae.use_backend("triton"):
    plain = handle(call)
    assert is_remembered(call)

    # Another program.
    knobs.runtime.debug = True
    assert handle(call) != plain and not is_remembered(call)
    knobs.runtime.debug = False
    assert handle(call) == plain and is_remembered(call)

    knobs.runtime.add_stages_inspection_hook = lambda *of_a_compilation: ("key", "hash")
    assert handle(call) != plain
    knobs.runtime.add_stages_inspection_hook = None
    assert handle(call) == plain and is_remembered(call)

    # The same one, by Triton's own way.
    seen = []
    kernel.add_pre_run_hook(lambda *a, **k: seen.append(len(a)))
    call(), call()
    assert len(seen) == 2
    kernel.pre_run_hooks.clear()
    assert is_remembered(call)

    # Hooks around a launch are handed to it, remembered or not.
    enter = lambda metadata: None
    before, knobs.runtime.launch_enter_hook = knobs.runtime.launch_enter_hook, enter
    (launch,) = launched(call)
    assert launch[7] is enter and launch[6].get()["name"] == kernel.__name__
    knobs.runtime.launch_enter_hook = before

    assert not launching._is_watched(kernel)
    knobs.compilation.instrumentation_mode = "consan"
    assert launching._is_watched(kernel)
print("fine")
"""
)

# Kernels of the bit-manipulating functions only, so that any assertion of a debug program is theirs.
OVERFLOWS = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastvae.kernels import elementary, random

@triton.jit
def noise(p_seed, p_out):
    o = tl.arange(0, 4)
    o_j = o[None, None, :]
    b_0, b_1, b_2, b_3 = random.philox_words(tl.load(p_seed), o_j.to(tl.int64), o_j.to(tl.int64), o_j, 0)
    b_x, b_y = random.box_muller(b_0, b_1, tl.float32)
    b_u, b_v = random.box_muller(b_2, b_3, tl.float32)
    tl.store(p_out + o_j, b_x + b_y + b_u + b_v)

@triton.jit
def functions(p_x, p_out):
    o = tl.arange(0, 4)
    b_x = tl.load(p_x + o)
    b_y, b_z = elementary.expm1_parts(b_x)
    b_y += b_z + elementary.exp(b_x) + elementary.exp_of_negative(b_x)
    b_y += elementary.log(b_x) + elementary.log1p(b_x) + elementary.log1p_of_odds(b_x)
    tl.store(p_out + o, b_y)

@triton.jit
def sums(p_x, p_out):
    o = tl.arange(0, 4)
    tl.store(p_out + o, tl.load(p_x + o) + 1)

def asserts(kernel, *types):
    signature = dict(zip(kernel.arg_names, types))
    source = ASTSource(fn=kernel, signature=signature, constexprs={}, attrs={})
    options = {"num_warps": 4, "debug": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ttir"].count("tt.assert")

assert asserts(sums, "*i32", "*i32") == 1
assert asserts(noise, "*i64", "*fp32") == 0
assert asserts(functions, "*fp32", "*fp32") == 0
print("fine")
"""


@pytest.mark.parametrize("name", ["SCRIPT", "ALIGNMENT", "WATCHED", "OVERFLOWS"])
def test_programs_are_cached_by_alignment(name, tmp_path):
    """Programs are cached by the alignment of each pointer, but not while Triton is in debug mode.

    Its overflow checks accept the operations that may wrap.
    """
    script = tmp_path / "script.py"
    script.write_text(globals()[name])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "fine", run.stderr[-4000:]


def test_the_device_of_the_tensors_becomes_current(monkeypatch):
    """Triton launches on the current device, so the tensors' device is made current."""
    from fastvae.core import backend as _backend

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
def test_unsupported_architectures_use_plain_pytorch(monkeypatch, capability, hip, backend):
    """Architectures that Triton does not support use plain PyTorch, with one warning."""
    from fastvae.core import backend as _backend

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
        # A backend selected by name is used.
        import fastvae

        with fastvae.use_backend("triton"):
            assert _backend.on_gpu(device) == "triton"
        with fastvae.use_backend("reference"):
            assert _backend.on_gpu(device) == "reference"
    finally:
        _backend._native_on_gpu.cache_clear()


def test_a_missing_triton_is_an_error(monkeypatch):
    from fastvae.core import backend as _backend

    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    with pytest.raises(
        RuntimeError, match="need triton, which is not installed.*use_backend\\('reference'\\)"
    ):
        _backend.layer("triton", "normal_diagonal")
