"""Compile the C++ for other systems, without linking: ``python -m tools.cross [TARGET...]``.

It needs ``pip install ziglang``: clang with the headers of Linux and macOS. A target takes half a minute
of a core, and a minute more the first time, for these headers.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
TARGETS = ("aarch64-linux-gnu", "aarch64-macos", "x86_64-linux-gnu")


def python_headers(folder: Path) -> Path:
    """Return the folder of Python's headers.

    Debian's pyconfig.h includes one for each processor, of which only this one's is installed. Then the
    headers are copied to ``folder``, with this one's.
    """
    include = Path(sysconfig.get_paths()["include"])
    own = include.parent / str(sysconfig.get_config_var("MULTIARCH")) / include.name / "pyconfig.h"
    if not own.exists():
        return include
    copied = folder / "python"
    shutil.copytree(include, copied)
    shutil.copy(own, copied / "pyconfig.h")
    return copied


def main() -> int:
    """Print the errors of each file that does not compile for a target; return whether any failed."""
    import pybind11

    wanted = sys.argv[1:] or TARGETS
    with tempfile.TemporaryDirectory() as generated:
        units = runpy.run_path(str(CSRC / "generate.py"))["write"](generated)
        includes = [generated, CSRC, pybind11.get_include(), python_headers(Path(generated))]
        flags = ["-std=c++17", "-O0", "-fPIC", "-fopenmp-simd", *(f"-I{i}" for i in includes)]

        def problems(job: tuple[str, Path]) -> str:
            target, source = job
            command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, "-c", str(source)]
            made = str(Path(generated) / f"{source.stem}_{target}.o")
            done = subprocess.run([*command, "-o", made], capture_output=True, text=True)
            return done.stderr[-2000:] if done.returncode else ""

        jobs = [(target, source) for target in wanted for source in (CSRC / "bindings.cpp", *units)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(jobs, pool.map(problems, jobs), strict=True))
    failed = {job: text for job, text in found.items() if text}
    for (target, source), text in failed.items():
        print(f"{source.name} does not compile for {target}:\n{text}")
    print(f"{len(jobs) - len(failed)} of {len(jobs)} files compile for {', '.join(wanted)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
