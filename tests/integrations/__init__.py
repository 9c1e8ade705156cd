"""Tests with other people's libraries, as they are: ``python -m tools.integrations``."""

import contextlib
import functools
import io
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@functools.cache
def run_tutorial(path: str) -> tuple[dict[str, Any], str]:
    """Run ``docs/tutorials/<path>.py``, and return its names and what it prints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(ROOT / "docs" / "tutorials" / f"{path}.py"))
    pyplot.close("all")
    return names, printed.getvalue()


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw the normals [K, B, ...] that fastvae's next draw takes from the same random state."""
    k, b, *latent = shape
    return fastvae.random.normal(draw_seed(), k, b, math.prod(latent), dtype=dtype).view(shape)


def gradient(loss: torch.Tensor, parameters) -> torch.Tensor:
    """Return the gradient of all parameters as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters))])


def assert_same(one: torch.Tensor, other: torch.Tensor, parameters, rtol: float = 1e-11) -> None:
    """Assert that two losses have the same value and, relative to the norm of all, the same gradients."""
    parameters = list(parameters)
    assert one.shape == other.shape == ()
    assert abs(float(one.detach()) / float(other.detach()) - 1) <= rtol
    a, b = (gradient(loss, parameters) for loss in (one, other))
    assert float((a - b).norm()) <= rtol * float(b.norm()) > 0
