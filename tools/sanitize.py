"""Run the C++ tests, or the fuzzer, on an extension with GCC's address and undefined-behaviour sanitisers.

``python -m tools.sanitize [--fuzz MINUTES] [base avx2 avx512]`` builds a copy of the project, runs it for
each instruction set named (default: all that this processor supports) and fails on the first report.
``--fuzz`` runs random calls of the objectives instead of the tests. The suite does not include it: it takes
minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .mutants.copies import build, copy_to

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "normal_full",
        "components",
        "categorical",
        "multinomial",
        "columns",
        "logsumexp",
        "likelihoods",
        "normal_diagonal",
        "mixture",
        "aggregate",
        "random",
        "torch",
    )
]


def _library(name: str) -> str:
    path = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(path)


def main() -> int:
    """Build, run, and return the exit status of the first instruction set that fails."""
    from fastvae.core.backend import extension

    known = ["base", "avx2", "avx512"]
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__)
    parser.add_argument("isa", nargs="*", help=f"instruction sets, of {', '.join(known)}")
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help="run the fuzzer for that long")
    parser.add_argument("--seed", type=int, help="seed of the fuzzer")
    args = parser.parse_args()
    if unknown := [n for n in args.isa if n not in known]:
        parser.error(f"unknown instruction set {unknown[0]!r}; known: {', '.join(known)}")
    command = [
        *("-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", "-o", "addopts=", "-k"),
        "(native or cpp or threads or kernels_of_graphs) and not slow",
        *TESTS,
    ]
    if args.fuzz is not None:
        command = ["-m", "tests.fuzz", "--minutes", str(args.fuzz), "--only", "backend=native"]
        command += ["--seed", str(args.seed)] if args.seed is not None else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_to(folder)
        built = build(folder, *FLAGS, jobs=os.cpu_count() or 1)
        if built.returncode:
            print(built.stderr[-2000:])
            return built.returncode
        for isa in args.isa or known[: known.index(extension().isa()) + 1]:
            environment = {
                **os.environ,
                "PYTHONPATH": str(folder),
                # Python is not instrumented: preload the runtime, and ignore memory kept by Python as leaks.
                "LD_PRELOAD": " ".join(map(_library, ("libasan.so", "libubsan.so"))),
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
                "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
                "FASTVAE_ISA": isa,
                "FASTVAE_TEST_PROFILE": "mutants",
                "OMP_NUM_THREADS": "2",
            }
            print(f"{isa}:", flush=True)
            done = subprocess.run([sys.executable, *command], cwd=folder, env=environment)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
