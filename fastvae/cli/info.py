"""Command ``info``: installed versions, devices and the backend of each op."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__, ops
from ..core import backend as _backend
from ..core.terminal import show


def run(as_json: bool = False) -> None:
    """Print versions, devices, the extension's state and the implementation of each op, as text or JSON."""
    try:
        _backend.chosen()
    except ValueError as error:
        raise SystemExit(f"fastvae info: {error}") from None
    table = _ops()
    if as_json:
        found: dict[str, Any] = {"versions": dict(_versions()), "devices": dict(_devices())}
        found["fastvae"] = dict(_choice())
        found["ops"] = {name: {"cpu": cpu, "gpu": gpu} for name, cpu, gpu in table}
        show(json.dumps(found))
        return
    ops_width, cpu_width = (max(len(row[i]) for row in [("", "CPU tensors"), *table]) for i in range(2))
    for heading, rows in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("fastvae", _choice()),
        (f"{'ops':<{ops_width + 4}}{'CPU tensors':<{cpu_width + 2}}GPU tensors", None),
    ):
        show(heading)
        if rows is None:
            for op, cpu, gpu in table:
                show(f"  {op:<{ops_width + 2}}{cpu:<{cpu_width + 2}}{gpu}")
            continue
        width = max(18, *(len(name) for name, _ in rows))
        for name, value in rows:
            show(f"  {name:<{width + 2}}{value}")


def _versions() -> list[tuple[str, str]]:
    packages = [(name, _version(name)) for name in ("triton", "numpy")]
    return [
        ("fastvae", __version__),
        ("torch", torch.__version__),
        *packages,
        ("Python", platform.python_version()),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(count)]
    threads = torch.get_num_threads()
    return [("cpu", f"{threads} thread{'s' * (threads != 1)}"), *(gpus or [("cuda", "no GPU found")])]


def _extension() -> tuple[bool, str]:
    """Return True if the C++ extension can be imported, and its instruction set or the error."""
    try:
        extension = _backend.extension()
    except RuntimeError as error:
        return False, str(error).removeprefix("fastvae: ")
    return True, extension.isa() + ("" if extension.threaded() else ", one thread: no OpenMP runtime found")


def _choice() -> list[tuple[str, str]]:
    built, text = _extension()
    backend, variable = _backend.chosen(), os.environ.get("FASTVAE_BACKEND")
    return [
        ("C++ instructions", text if built else f"none: {text}"),
        ("FASTVAE_BACKEND", f"{backend}{'' if variable else ' (not set: the default)'}"),
    ]


def _ops() -> list[tuple[str, str, str]]:
    """List each op with its implementation for CPU and GPU tensors."""
    built, triton = _extension()[0], _backend.has_triton()
    if torch.cuda.is_available():
        on_gpu = "Triton" if triton else "fails: no triton (pip install 'fastvae[triton]')"
    else:
        on_gpu = "Triton, but there is no GPU" if triton else "nothing: no GPU, no Triton here"
    cpu, gpu = {
        "native": ("C++" if built else "PyTorch" if _backend.LEFT_OUT else "fails: no C++", on_gpu),
        "reference": ("PyTorch", "PyTorch"),
        "triton": (_interpreter(triton), on_gpu),
    }[_backend.chosen()]
    return [(name, cpu, gpu) for name in ops.__all__]


def _interpreter(triton: bool) -> str:
    if not triton:
        return "fails: no triton"
    return "Triton (slow)" if os.environ.get("TRITON_INTERPRET") == "1" else "fails: no GPU"
