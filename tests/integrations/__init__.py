"""Tests with other people's libraries, as they are; a library that is not installed skips its file."""

import math
import os
import subprocess
import sys
from pathlib import Path

import torch

import fastvae
from fastvae.random import draw_seed

ROOT = Path(__file__).parents[2]


def run_example(name: str) -> str:
    """Run ``docs/examples/<name>.py`` on one thread and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "docs" / "examples" / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw the normals [K, B, ...] that fastvae's next draw takes from the same random state."""
    k, b, *latent = shape
    return fastvae.random.normal(draw_seed(), k, b, math.prod(latent), dtype=dtype).view(shape)


def assert_same(one: torch.Tensor, other: torch.Tensor, parameters, rtol: float = 1e-10) -> None:
    """Assert that two losses have the same value and the same gradients, each relative to its norm."""
    parameters = list(parameters)
    assert parameters and one.shape == other.shape == ()
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (one, other)]
    values = one.detach(), other.detach()
    for a, b in (values, *zip(*gradients, strict=True)):
        assert float((a - b).norm()) <= rtol * float(a.norm()) > 0
