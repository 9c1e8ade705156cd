"""Scratch copies of the project, and extensions built in them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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


def build(folder: Path, *options: str, jobs: int = 1) -> subprocess.CompletedProcess[str]:
    """Compile the extension of a copy, with further options, `jobs` files at a time."""
    import pybind11

    target = folder / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = folder / "build"
    units = runpy.run_path(str(folder / "csrc/generate.py"))["write"](objects)
    if "-DFASTVAE_BASE_ONLY" in options:
        units = [unit for unit in units if unit.stem.endswith("_base")]
    python = sysconfig.get_paths()["include"]
    includes = [f"-I{p}" for p in (folder / "csrc", pybind11.get_include(), python, objects)]
    flags = "-O3 -fno-math-errno -fno-trapping-math -std=c++17 -fPIC -fopenmp-simd -fvisibility=hidden"

    def compiled(source: Path) -> subprocess.CompletedProcess[str]:
        command = ["c++", *flags.split(), *options, *includes, "-c", str(source), "-o"]
        return subprocess.run([*command, str(objects / f"{source.stem}.o")], capture_output=True, text=True)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(compiled, [folder / "csrc/bindings.cpp", *units]))
    if failed := [one for one in done if one.returncode]:
        return failed[0]
    command = ["c++", "-shared", *options, *map(str, sorted(objects.glob("*.o"))), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def copy_extension(folder: Path) -> None:
    """Copy the extension already built into a copy, for mutants that do not change the C++."""
    built = ROOT / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        raise SystemExit(f"no extension at {built}: `pip install --editable .` builds it there")
    shutil.copy(built, folder / "fastvae")
