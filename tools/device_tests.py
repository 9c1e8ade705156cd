"""Test suite on a device, with a time limit: failures and progress."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tests that run on the device itself, in order, before the rest.
FIRST = (
    "normal_diagonal",
    "likelihoods",
    "reduce",
    "gaussian",
    "bernoulli",
    "poisson",
    "logsumexp",
    "random",
    "shapes",
    "cuda",
    "mathematics",
    "torch",
    "mistakes",
    "chunks",
)
# Tests that compile, start processes or build, without the device.
WITHOUT_DEVICE = ("package", "kernels_compile", "ptx", "launches", "readme", "benchmarks", "gpu_runner")
# The tests of a dry run.
QUICK = "compare"
MOST_SHOWN = 20


@dataclass
class Outcome:
    """Outcome of the tests.

    Attributes:
        counts: outcome, such as ``"passed"`` → number of tests.
        failures: names of the failed tests.
        seconds: the time limit in seconds, if it was reached; else 0.
        collected: number of tests; 0 if unknown.
        log: pytest's output.
        code: pytest's exit code.
    """

    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0
    collected: int = 0
    log: str = ""
    code: int = 0

    @property
    def passed(self) -> bool:
        """True if none failed and some passed."""
        failed = self.failures or (self.code and not self.seconds)
        return not failed and self.counts.get("passed", 0) > 0

    def summary(self) -> str:
        """Summary line, and the names of the failed tests."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.counts.items()) or "none ran"
        line = f"tests: {counts}"
        if self.seconds:
            done = sum(self.counts.values())
            line += f"; interrupted after {self.seconds:.0f} s, {done} of {self.collected} done"
        elif self.code and not self.failures:
            line += f"; pytest returned {self.code}"
        shown = [f"  {name}" for name in self.failures[:MOST_SHOWN]]
        if len(self.failures) > MOST_SHOWN:
            shown.append(f"  and {len(self.failures) - MOST_SHOWN} more")
        return "\n".join([line, *shown])

    def text(self) -> str:
        """Return the summary, and pytest's reports of the first failures."""
        trouble = self.code and not self.seconds
        reports = re.findall(r"^_{3,} .+? _{3,}$.*?(?=^_{3,} |^={3,} |\Z)", self.log, re.M | re.S)
        shown = [r.strip()[-1500:] for r in reports[:3]]
        if trouble and not shown:
            shown = [self.log[-3000:]]
        return "\n".join([self.summary(), *shown])


def run(seconds: float, dry_run: bool) -> Outcome:
    """Run the suite, or in a dry run one quick file.

    Args:
        seconds: time limit in seconds.
        dry_run: True without a device.
    """
    tests = ROOT / "tests"
    rest = sorted(p.stem.removeprefix("test_") for p in tests.glob("test_*.py"))
    names = [*FIRST, *(n for n in rest if n not in FIRST and n not in WITHOUT_DEVICE)]
    files = [str(tests / f"test_{name}.py") for name in ([QUICK] if dry_run else names)]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "-v", "--tb=short", "-rfE"]
    command += ["-p", "no:cacheprovider", *files]
    environment = {**os.environ, "FASTVAE_TEST_PROFILE": "device"}
    cores = os.cpu_count() or 1
    workers = min(8, cores // 2)
    if not dry_run and workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
        # Otherwise each worker would use all cores, and start as many compilers.
        environment |= {"OMP_NUM_THREADS": str(cores // workers), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        # A separate process group, so that its workers end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code, in_time = _wait(process, seconds)
        output.seek(0)
        log = output.read()
    return read(log, code, 0 if in_time else seconds)


def _wait(process: subprocess.Popen, seconds: float) -> tuple[int, bool]:
    try:
        return process.wait(seconds), True
    except subprocess.TimeoutExpired:
        pass
    finally:
        for ending, patience in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, ending)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
    return process.returncode, False


def read(log: str, code: int, seconds: float) -> Outcome:
    """Parse the output of ``pytest -v``, with or without xdist.

    Args:
        log: pytest's output.
        code: pytest's exit code.
        seconds: the time limit in seconds, if it was reached; else 0.
    """
    word = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    word |= {"XFAIL": "failed as expected", "XPASS": "passed unexpectedly"}
    # "tests/test_x.py::test_y PASSED [ 3%]", or with xdist "[gw1] [ 3%] PASSED tests/test_x.py::test_y".
    plain = re.compile(rf"^(\S+::.+?) ({'|'.join(word)})(?: .*)?$")
    spread = re.compile(rf"^\[gw\d+\] (?:\[ *\d+%\] )?({'|'.join(word)}) (\S+::.+?)\s*$")
    outcomes: dict[str, str] = {}
    for line in log.splitlines():
        if found := spread.match(line):
            outcomes[found[2]] = found[1]
        elif found := plain.match(line):
            outcomes[found[1]] = found[2]
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        counts[word[outcome]] = counts.get(word[outcome], 0) + 1
    failures = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    collected = re.search(r"(?:collected |\[)(\d+) items", log)
    return Outcome(counts, failures, seconds, int(collected[1]) if collected else 0, log, code)
