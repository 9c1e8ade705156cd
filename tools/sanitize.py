"""The C++ tests on an extension built with the address and undefined-behaviour sanitisers, in a scratch copy.

``python -m tools.sanitize [base avx2 avx512]`` runs them for each instruction set named (default: all that
this processor has) and fails on the first report. It is not part of the test suite: it takes
some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .mutants.copies import build, copy_to

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = [
    f"tests/test_{name}.py"
    for name in ("full", "grouped", "importance", "likelihoods", "latent", "mixture", "random", "torch")
]


def _library(name: str) -> str:
    path = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(path)


def main(names: list[str]) -> int:
    from fastvae._backend import extension

    known = ["base", "avx2", "avx512"]
    if unknown := [n for n in names if n not in known]:
        print(f"unknown instruction set {unknown[0]!r}; known: {', '.join(known)}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_to(folder)
        built = build(folder, *FLAGS)
        if built.returncode:
            print(built.stderr[-2000:])
            return built.returncode
        for isa in names or known[: known.index(extension().isa()) + 1]:
            environment = {
                **os.environ,
                "PYTHONPATH": str(folder),
                # Python is not instrumented: the runtime comes first, and what Python keeps does not leak.
                "LD_PRELOAD": " ".join(map(_library, ("libasan.so", "libubsan.so"))),
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
                "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
                "FASTVAE_ISA": isa,
                "FASTVAE_TEST_PROFILE": "mutants",
                "OMP_NUM_THREADS": "2",
            }
            print(f"{isa}:", flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=",
                 "-k", "(native or cpp or threads or kernels_of_graphs) and not slow", *TESTS],
                cwd=folder, env=environment,
            )  # fmt: skip
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
