"""A failed allocation in the C++ is a MemoryError, in any thread, and leaks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fastvae.core import backend as _backend

# Replaces operator new of fastvae._C only: fails at the n-th call after being armed.
SHIM = r"""
#include <dlfcn.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
static std::atomic<long> left{-1}, seen{0};
extern "C" void arm(long n) { seen = 0, left = n; }
extern "C" long calls() { return seen; }
static void* allocate(const void* caller, std::size_t size, std::size_t alignment) {
  Dl_info info;
  if (left >= 0 && dladdr(caller, &info) && std::strstr(info.dli_fname, "fastvae/_C")) {
    if (seen++ == left) throw std::bad_alloc();
  }
  void* p = nullptr;
  if (posix_memalign(&p, alignment, size ? size : 1) == 0) return p;
  throw std::bad_alloc();
}
void* operator new(std::size_t size) { return allocate(__builtin_return_address(0), size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(__builtin_return_address(0), size, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
"""

SCRIPT = r"""
import ctypes, sys, torch, fastvae
from fastvae import ops
from fastvae.ops.head import Layers, reduce_linear
from fastvae.ops.reduce import BoundReduction, reduce
shim = ctypes.CDLL(sys.argv[1]); threads = int(sys.argv[2]); torch.set_num_threads(threads)
K, B, D, X = 4, 64, 40, 512
leaf = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(0)).requires_grad_()
seed = torch.tensor(3)
how = BoundReduction(1.0, "log_mean_exp", "sum", 0.5, 2, 0.25)
x = torch.ones(B, X)
mu, tril, z = leaf(B, D), leaf(B, D * (D + 1) // 2), leaf(K * B, D)
parts, logits, weight = leaf(300, D), leaf(K * B, X), leaf(X, D)
classes = leaf(K, B, 15, 64)
CALLS = {
    "tril": lambda: ops.rsample_tril(mu, tril, k=100, seed=seed)[0].sum(),
    "mixture": lambda: ops.mixture_log_prob(z, parts, parts).sum(),
    "reduce": lambda: reduce("bernoulli", x, (logits,), None, None, how)[0],
    "shared": lambda: ops.gaussian_log_prob(x, logits.view(K, B, X), weight[:, :1].T.expand(1, X)[0]).sum(),
    "linear": lambda: reduce_linear("bernoulli", x, Layers(z, weight, None, None, None), None, None, how)[0],
    "classes": lambda: ops.categorical_log_prob(torch.ones(B, 64), classes).sum(),
}
for name, call in CALLS.items():
    def both():
        value = call(); value.backward(); return value.item()
    expected = both(); shim.arm(10**9); both(); total = shim.calls(); assert total > 0, name
    for n in range(0, total, max(1, total // 12)):
        shim.arm(n)
        try: both()
        except MemoryError: pass
        else:
            # With two threads their turns differ: a call may be the last of none.
            assert shim.calls() <= n, f"{name}: allocation {n} of {total} failed, and nothing was raised"
        shim.arm(-1)
        assert both() == expected, name
    print(name, total, "allocations", threads, "threads", flush=True)
"""


@pytest.mark.skipif(_backend.LEFT_OUT, reason="the C++ was left out")
@pytest.mark.parametrize("threads", [1, 2])
def test_failed_allocations_are_survived(threads, tmp_path):
    compiler = shutil.which("c++")
    assert compiler is not None, "no C++ compiler, which built the extension"
    source, library = tmp_path / "shim.cpp", tmp_path / "shim.so"
    source.write_text(SHIM)
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(threads)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == 6
