"""Compile every C++ header by itself, as an editor opens it: ``python -m tools.headers``."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"


def main() -> int:
    """Print the first errors of each header that does not compile alone, and return whether there was any."""
    import pybind11

    with tempfile.TemporaryDirectory() as generated:
        runpy.run_path(str(CSRC / "generate.py"))["write"](generated)
        includes = [generated, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = ["-std=c++17", "-fsyntax-only", "-fopenmp-simd", "-DFASTVAE_BASE_ONLY"]

        def problems(header: Path) -> str:
            name = "_".join(header.relative_to(CSRC).with_suffix("").parts)
            source = Path(generated) / f"{name}_alone.cpp"
            source.write_text(f'#include "{header}"\n')
            command = [os.environ.get("CXX", "c++"), *flags, *(f"-I{i}" for i in includes), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            return done.stderr[:2000] if done.returncode else ""

        headers = sorted(CSRC.rglob("*.hpp"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(headers, pool.map(problems, headers), strict=True))
    failed = {header: text for header, text in found.items() if text}
    for header, text in failed.items():
        print(f"{header.relative_to(CSRC.parent)} does not compile by itself:\n{text}")
    print(f"{len(headers) - len(failed)} of {len(headers)} headers compile by themselves")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
