"""Scratch copies of the project, and extensions built in them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

from .blocks import ROOT

_LEFT_OUT = (".git", ".venv*", "build", "demo", "*.so", ".hypothesis", "*.egg-info", "results", "__pycache__")


def copy_to(folder: Path) -> None:
    """Copy the project in the editable layout without an installation: the kernels are a subpackage."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    # In such a layout itself it may be a link to that folder.
    if (folder / "fastvae" / "kernels").exists():
        shutil.rmtree(folder / "fastvae" / "kernels")
    shutil.move(folder / "kernels", folder / "fastvae" / "kernels")


def in_copy(folder: Path, file: str) -> Path:
    """Return the path of a source file in a copy."""
    return folder / file.replace("kernels/", "fastvae/kernels/", 1 if file.startswith("kernels/") else 0)


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile the extension of a copy, with further options."""
    import pybind11

    target = folder / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    runpy.run_path(str(folder / "csrc/list_likelihoods.py"))["write"](target.parent)
    python = sysconfig.get_paths()["include"]
    includes = [f"-I{p}" for p in (folder / "csrc", pybind11.get_include(), python, target.parent)]
    flags = (
        "-O3 -fno-math-errno -fno-trapping-math -std=c++17 -shared -fPIC -fopenmp-simd -fvisibility=hidden"
    )
    command = [
        "c++",
        *flags.split(),
        *options,
        *includes,
        str(folder / "csrc/bindings.cpp"),
        "-o",
        str(target),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def copy_extension(folder: Path) -> None:
    """Copy the extension already built into a copy, for mutants that do not change the C++."""
    built = ROOT / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        raise SystemExit(f"no extension at {built}: `pip install --editable .` builds it there")
    shutil.copy(built, folder / "fastvae")
