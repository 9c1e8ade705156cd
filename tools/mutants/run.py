"""Test runs in processes forked from one that has imported torch, each in a scratch copy."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .blocks import ROOT
from .copies import copy_extension, copy_to

NOT_COMPILED, UNKNOWN = 98, 99


class Job(NamedTuple):
    """Worker process: the parent prepares the copy, the child works and gives an exit code."""

    name: object
    prepare: Callable[[Path], Callable[[], None] | None]
    work: Callable[[Path], int]
    limit: float


class Done(NamedTuple):
    """Result of a job: its exit code (None after a timeout), seconds and output."""

    name: object
    code: int | None
    seconds: float
    text: str

    def last(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1][:160] if lines else ""

    def verdict(self) -> tuple[bool, str]:
        """Return whether a mutant was caught, and by which test."""
        named = [row for row in self.text.splitlines() if row.startswith(("FAILED", "ERROR"))]
        first = (named or [self.last()])[0][:110]
        if self.code is None:
            return True, f"TIMES OUT after {self.seconds:.0f} s"
        if self.code < 0:
            return True, f"CRASHES: signal {-self.code}"
        if self.code == 1 and named:
            return True, first
        if self.code in (1, 2) and named or "ImportError while loading conftest" in self.text:
            return True, f"DOES NOT IMPORT: {first}"
        if self.code == 0:
            return False, self.last()
        return False, f"TESTS DO NOT RUN (exit code {self.code}): {first}"


def _preload() -> None:
    # Every run of a test draws the same inputs.
    os.environ.update(CI="1", FASTVAE_TEST_PROFILE="mutants", OMP_NUM_THREADS="1")
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    import hypothesis.extra.numpy
    import pytest
    import scipy.stats
    import torch._dynamo
    import torch._inductor

    try:
        import triton.language
    except ImportError:
        triton = None
    del hypothesis, pytest, scipy, torch, triton
    loaded = [m for m in sys.modules if m.partition(".")[0] in ("fastvae", "tests", "benchmarks")]
    assert not loaded, f"{loaded[0]} is imported before the fork: a mutant in it would not be seen"


def _child(job: Job, folder: Path, log: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, out), (2, out)):
        os.dup2(source, target)
    code = UNKNOWN
    try:
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *[p for p in sys.path if p not in ("", str(ROOT))]]
        code = job.work(folder)
    except BaseException as error:
        print(f"ERROR in the child process: {error!r}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork_all(work: list[Job], jobs: int) -> Iterator[Done]:
    """Run several jobs at a time, each in a scratch copy; yield results as they finish."""
    if not work:
        return
    _preload()
    # End the processes, which have separate sessions, and delete the copies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="mutants") as scratch:
        free = []
        for i in range(min(jobs, len(work))):
            folder = Path(scratch) / str(i) / "copy"
            copy_to(folder)
            copy_extension(folder)
            free.append(folder)
        running: dict[int, tuple[Job, Path, float, Any]] = {}
        waiting = list(reversed(work))
        try:
            while waiting or running:
                while waiting and free:
                    job, folder = waiting.pop(), free.pop()
                    restore = job.prepare(folder)
                    sys.stdout.flush()
                    pid = os.fork()
                    if pid == 0:
                        _child(job, folder, folder.parent / "log.txt")
                    running[pid] = job, folder, time.monotonic(), restore
                time.sleep(0.05)
                for pid, (job, folder, start, restore) in list(running.items()):
                    seconds = time.monotonic() - start
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    code = os.waitstatus_to_exitcode(status) if ended else None
                    if not ended:
                        if seconds < job.limit:
                            continue
                        _kill(pid)
                        os.waitpid(pid, 0)
                    del running[pid]
                    if restore:
                        restore()
                    free.append(folder)
                    yield Done(
                        job.name, code, seconds, (folder.parent / "log.txt").read_text(errors="replace")
                    )
        finally:
            for pid in running:
                _kill(pid)
                os.waitpid(pid, 0)


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # before its setsid
        os.kill(pid, signal.SIGKILL)


def replace(path: Path, text: str) -> Callable[[], None]:
    """Write a file of a copy; return a function that restores the old text."""
    before = path.read_text()

    def write(content: str) -> None:
        path.write_text(content)
        # A file of equal size within the same second would count as up to date.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    write(text)
    return lambda: write(before)


class Only:
    """A plugin of pytest that selects these tests, the module's own file's first."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {t: i for i, t in enumerate(tests)}
        files = list(dict.fromkeys(t.partition("::")[0] for t in tests))
        self.files = {f: i for i, f in enumerate(files)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [i for i in items if i.nodeid in self.place]
        items.sort(key=lambda i: (self.files[i.nodeid.partition("::")[0]], self.place[i.nodeid]))


def run_tests(arguments: list[str], chosen: list[str] | None = None) -> int:
    """Run tests in this process until one fails."""
    import pytest

    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:doctest", "-o", "addopts="]
    if chosen is not None:
        files = list(dict.fromkeys(t.partition("::")[0] for t in chosen))
        return int(pytest.main([*options, "-m", "not slow", *files], plugins=[Only(chosen)]))
    return int(pytest.main([*options, *arguments]))
