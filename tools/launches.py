"""``python -m tools.launches``: the Python path from a call to its launch, without a GPU.

At small sizes that path is the whole cost. Triton compiles as for an H100, with a stand-in driver that
accepts launches and does nothing, so that everything is measured except the launch by CUDA's driver.
torch.compile runs its CPU programs on tensors of two numbers, whose cost is negligible against its own path.
Times are this processor's; a GPU's host has a different one.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

import fastvae
from fastvae import ops

B, D, PIXELS = 128, 32, 784


class NoDriver:
    """Stand-in for Triton's driver, for a GPU of compute capability 9.0, that counts launches."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.utils = self
        self.count = 0
        # Only the last few: keeping all would keep their tensors.
        self.launches: collections.deque[tuple] = collections.deque(maxlen=8)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def load_binary(self, *_) -> tuple[int, ...]:
        """Return (module, function, registers, spills, threads)."""
        return 1, 1, 32, 0, 1024

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return self.launched

    def launched(self, *arguments) -> None:
        self.count += 1
        self.launches.append(arguments)


def install() -> NoDriver:
    """Make Triton use a :class:`NoDriver`; kernels then launch on CPU tensors, and do nothing."""
    from triton.runtime.driver import driver

    stand_in = NoDriver()
    driver.set_active(stand_in)
    return stand_in


def _microseconds(calls: list[Callable[[], object]], rounds: int = 15, repeats: int = 200) -> np.ndarray:
    """Return each call's percentiles 20, 50 and 80, over interleaved rounds, of the mean over repeats."""
    times = np.empty((rounds, len(calls)))
    for i in range(rounds):
        for j, call in enumerate(calls):
            call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[i, j] = (time.perf_counter() - start) / repeats * 1e6
    return np.percentile(times, (20, 50, 80), axis=0).T


def _eager_rsample_kl(mu, logvar):
    z = torch.addcmul(mu, torch.exp(0.5 * logvar), torch.randn_like(mu))
    return z, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def _eager_gaussian_log_prob(x, mean, logvar):
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() * torch.exp(-logvar)).sum(-1)


# Op → ours, the same in PyTorch, the shape of its inputs, and whether each needs a gradient.
CASES = {
    "rsample_kl": (ops.rsample_kl, _eager_rsample_kl, (B, D), (True, True)),
    "gaussian_log_prob": (ops.gaussian_log_prob, _eager_gaussian_log_prob, (B, PIXELS), (False, True, True)),
}


def _calls(function: Callable, shape: tuple[int, ...], wanted: tuple[bool, ...]) -> dict[str, Callable]:
    inputs = [torch.randn(shape, requires_grad=w) for w in wanted]
    leaves = [t for t in inputs if t.requires_grad]
    outputs = function(*inputs)
    grads = [torch.ones_like(t) for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]

    def without_grad():
        with torch.no_grad():
            function(*inputs)

    return {
        "no grad": without_grad,
        "forward": lambda: function(*inputs),
        "forward+backward": lambda: torch.autograd.grad(function(*inputs), leaves, grads),
    }


def _text(percentiles: np.ndarray) -> str:
    p20, p50, p80 = percentiles
    return f"{p50:.0f} ({p20:.0f} – {p80:.0f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.launches",
        description="The Python path from a call to its launch, and torch.compile's, without a GPU.",
    )
    parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels are not launched: unset it")
    torch.set_num_threads(1)
    driver = install()
    print(f"microseconds per call: p50 (p20 – p80); one thread, torch {torch.__version__}")
    for name, (ours, eager, shape, wanted) in CASES.items():
        theirs = _calls(torch.compile(eager, dynamic=False), (1, 2), wanted)
        with fastvae.use_backend("triton"):
            for way, call in _calls(ours, shape, wanted).items():
                before = driver.count
                call()
                count = driver.count - before
                us, peer = map(_text, _microseconds([call, theirs[way]]))
                size = "×".join(map(str, shape))
                print(
                    f"{name} {size}, {way}: fastvae {us}, {count} launched; torch.compile {peer}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
