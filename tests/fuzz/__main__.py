"""Command line of the fuzzer: python -m tests.fuzz --minutes 10 [--seed S] [--index I] [--only NAME]."""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time

TIMEOUT = 600.0  # seconds per case, enough on a busy machine


def child(seed: int, start: int, count: int, only: str) -> None:
    """Run cases, printing a line before and after each."""
    import torch

    from . import case as cases
    from . import check

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    out = os.fdopen(os.dup(1), "w", buffering=1)
    for index in range(start, start + count):
        case = cases.draw(seed, index)
        if only and only not in str(case):
            continue
        print(f"start\t{index}", file=out)
        try:
            kind, text = check.outcome(case)
        except Exception as error:
            kind, text = "failed", f"in the oracle: {type(error).__name__}: {error}"
        print(f"{kind}\t{index}\t{text}".replace("\n", " "), file=out)
    print("end", file=out)


class Report:
    """Counts, failures and refusals."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.failures: list[tuple[int, str]] = []


def run(seed: int, start: int, count: int, only: str = "", deadline: float = math.inf) -> Report:
    """Run cases in child processes that may crash; a crash is a failure of the running case."""
    report, index = Report(), start
    while index < start + count and time.monotonic() < deadline:
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--child", "--seed", str(seed)]
        command += ["--index", str(index), "--count", str(start + count - index), "--only", only]
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read after the child)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            bufsize=0,  # select does not see data in Python's buffer
        )
        assert process.stdout is not None
        running, ended = None, False
        while True:
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
            line = process.stdout.readline().decode().rstrip("\n") if ready else None
            if not line:
                process.kill()
                code = process.wait()
                errors.seek(0)
                error = errors.read()[-4000:]
                if running is not None and not ended:
                    what = (
                        f"took longer than {TIMEOUT:g} s" if line is None else f"killed the process ({code})"
                    )
                    _failed(report, seed, running, what)
                    print(error, flush=True)
                elif not ended:
                    raise RuntimeError(f"the child ended ({code}) outside of a case: {error}")
                index = (running if running is not None else index) + 1
                break
            kind, *rest = line.split("\t", 2)
            if kind == "end":
                ended, running = True, start + count
                continue
            if kind == "start":
                running = int(rest[0])
                if time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    return report
                continue
            report.counts[kind] += 1
            if kind == "failed":
                _failed(report, seed, int(rest[0]), rest[1], counted=True)
            if kind == "refused":
                report.refused[re.sub(r"\d+", "#", rest[1])[:110]] += 1
    return report


def _failed(report: Report, seed: int, index: int, what: str, counted: bool = False) -> None:
    if not counted:
        report.counts["failed"] += 1
    report.failures.append((index, what))
    print(f"python -m tests.fuzz --seed {seed} --index {index}  # {what[:400]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--index", type=int, default=None, help="run this case alone")
    parser.add_argument("--only", default="", help="cases whose record has this text, such as 'q=low rank'")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if args.child:
        child(seed, args.index, args.count, args.only)
        return 0
    if args.index is not None:
        from . import case as cases

        print(cases.draw(seed, args.index))
        report = run(seed, args.index, args.count, args.only)
    else:
        report = run(seed, 0, 10**9, args.only, time.monotonic() + 60 * args.minutes)
    print(f"seed {seed}: {dict(report.counts)}")
    for text, count in report.refused.most_common():
        print(f"refused {count}: {text}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
