"""A recording: which tests enter which blocks, from one run of the tests on instrumented code.

Each test file's recording is a separate file in build/mutants/hits, so that one can be recorded again alone.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.machinery
import json
import os
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from .blocks import ROOT, blocks, is_text, name_of
from .run import Job, fork_all

HITS = ROOT / "build" / "mutants" / "hits"
_FOLDER, _FILE = "FASTVAE_MUTANTS_COPY", "FASTVAE_MUTANTS_HITS"
_PRELUDE = (
    "from torch.compiler import is_compiling as _hit_no\nfrom tools.mutants.record import hit as _hit\n"
)

seen: set[str] = set()
_stream: int | None = None


def hit(key: str) -> None:
    """Record a block; in a process that a test started, at once in a file, as nothing collects it at exit."""
    if key not in seen:
        seen.add(key)
        if _stream is not None:
            os.write(_stream, f"{key}\n".encode())


def instrumented(tree: ast.AST, file: str) -> ast.AST:
    for block in list(blocks(tree, file)):
        # Compilers would guard on the set of hits.
        call = ast.parse(f"_hit_no() or _hit({block.key!r})").body[0]
        for node in ast.walk(call):
            ast.copy_location(node, block.body[0])
        at = int(is_text(block.body[0]))
        block.body.insert(at, call)
    return tree


def _watch(folder: str) -> None:
    """Instrument modules imported from a copy, and functions that Triton's interpreter compiles again."""
    get_code, compiled = importlib.machinery.SourceFileLoader.get_code, builtins.compile

    def get_instrumented(self: Any, fullname: str) -> Any:
        file = name_of(self.path, Path(folder))
        if file is None:
            return get_code(self, fullname)
        tree = instrumented(ast.parse(Path(self.path).read_text()), file)
        body = tree.body
        last = max(
            (i for i, s in enumerate(body) if getattr(s, "module", None) == "__future__"),
            default=0 if body and isinstance(body[0], ast.Expr) else -1,
        )
        body[last + 1 : last + 1] = ast.parse(_PRELUDE).body
        return compiled(tree, self.path, "exec", dont_inherit=True)

    def compile_again(source: Any, filename: Any, mode: str, *rest: Any, **options: Any) -> Any:
        if isinstance(source, ast.Module) and (file := name_of(str(filename), Path(folder))) is not None:
            source = ast.fix_missing_locations(instrumented(source, file))
        return compiled(source, filename, mode, *rest, **options)

    importlib.machinery.SourceFileLoader.get_code = get_instrumented
    builtins.compile = compile_again


def _to_stream() -> None:
    global _stream
    seen.clear()
    _stream = os.open(os.environ[_FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def watch_child() -> None:
    """Take part in the recording of a parent process, if there is one."""
    if _FOLDER in os.environ and _FILE in os.environ:
        _to_stream()
        _watch(os.environ[_FOLDER])


class _Recorder:
    """A plugin of pytest: hits, duration and result of each test."""

    def __init__(self, streamed: Path) -> None:
        self.tests: dict[str, tuple[float, bool, list[str]]] = {}
        self.streamed = streamed
        self.passed = False

    def take(self) -> list[str]:
        found = set(seen)
        seen.clear()
        if self.streamed.exists():
            found.update(self.streamed.read_text().split("\n"))
            self.streamed.write_text("")
        return sorted(found - {""})

    def pytest_collection_finish(self, session: Any) -> None:
        # Blocks entered by importing the package count for every test of the file.
        self.tests[""] = 0.0, True, self.take()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.passed, start = True, time.monotonic()
        yield
        self.tests[item.nodeid] = round(time.monotonic() - start, 3), self.passed, self.take()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed = self.passed and not report.failed and not report.skipped


def _digest(test_file: str) -> str:
    return hashlib.sha256((ROOT / test_file).read_bytes()).hexdigest()[:16]


def _path(test_file: str) -> Path:
    return HITS / f"{Path(test_file).stem}.json"


def _record_one(test_file: str, folder: Path) -> int:
    """Run a file's tests in a forked process, and write the blocks that they enter."""
    streamed = folder / "hits.txt"
    os.environ.update({_FOLDER: str(folder), _FILE: str(streamed)})
    os.environ["PYTHONPATH"] += f":{folder / 'tools/mutants/child'}"
    os.register_at_fork(after_in_child=_to_stream)
    _watch(str(folder))
    recorder = _Recorder(streamed)
    code = pytest.main(["-q", "-m", "not slow", "--tb=short", *_options(), test_file], plugins=[recorder])
    if code not in (0, 1, 5):
        return int(code)
    keys = sorted({k for _, _, hits in recorder.tests.values() for k in hits})
    place = {k: i for i, k in enumerate(keys)}
    tests = {n: [s, ok, [place[k] for k in hits]] for n, (s, ok, hits) in recorder.tests.items()}
    text = json.dumps({"digest": _digest(test_file), "keys": keys, "tests": tests})
    partial = _path(test_file).with_suffix(".part")
    partial.write_text(text)
    partial.replace(_path(test_file))
    return 0


def _options() -> list[str]:
    return ["-p", "no:cacheprovider", "-o", "addopts="]


def record(test_files: list[str], jobs: int) -> int:
    """Record these test files, or all without an up-to-date recording; return 1 if one fails."""
    chosen = test_files or [
        f
        for f in sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").glob("test_*.py"))
        if not _path(f).exists() or json.loads(_path(f).read_text())["digest"] != _digest(f)
    ]
    if missing := [f for f in chosen if not (ROOT / f).is_file()]:
        raise SystemExit(f"{missing[0]}: no such test file; name it from the root, as tests/test_vae.py")
    HITS.mkdir(parents=True, exist_ok=True)
    wrong = 0
    work = [Job(f, lambda folder: None, lambda folder, f=f: _record_one(f, folder), 3600.0) for f in chosen]
    for done in fork_all(work, jobs):
        print(f"{done.name}: {done.seconds:.0f} s, {done.last()}", flush=True)
        if done.code != 0:
            wrong = 1
            print(f"{done.name}: NOT RECORDED (exit code {done.code}); its last lines:\n{done.text[-1500:]}")
    return wrong


class Recording:
    """Recorded tests by block, and the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.by_block: dict[str, list[str]] = {}
        self.files: dict[str, set[str]] = {}
        self.stale: list[str] = []
        for path in sorted(HITS.glob("*.json")):
            found = json.loads(path.read_text())
            test_file = f"tests/{path.stem}.py"
            if not (ROOT / test_file).exists():
                continue
            if found["digest"] != _digest(test_file):
                self.stale.append(test_file)
            for test, (seconds, passed, hits) in found["tests"].items():
                if test and passed:
                    self.seconds[test] = seconds
                for i in hits:
                    self.files.setdefault(found["keys"][i], set()).add(test_file)
                    if test and passed:
                        self.by_block.setdefault(found["keys"][i], []).append(test)
        if not self.seconds:
            raise SystemExit(
                f"nothing is recorded in {HITS}: `python -m tools.mutants record` runs the tests once"
            )

    def tests_of(self, key: str | None) -> list[str]:
        """Return the tests that enter a block; for one entered on import, those of files that import it."""
        if key is None:
            return []
        files = self.files.get(key, ())
        return self.by_block.get(key) or [t for t in self.seconds if t.partition("::")[0] in files]

    def choose(self, key: str | None, file: str, cap: float) -> list[str]:
        """Choose a mutant's tests within some seconds: its module's own, then those of all files in turn.

        A module's own test file has the module's name, or enters most of its blocks.
        """
        queues: dict[str, list[str]] = {}
        for test in sorted(self.tests_of(key), key=lambda t: self.seconds[t]):
            queues.setdefault(test.partition("::")[0], []).append(test)
        own = f"tests/test_{Path(file).stem.strip('_')}.py"
        if own not in queues and queues:
            entered = Counter(f for k, files in self.files.items() if k.startswith(f"{file}:") for f in files)
            own = max(queues, key=lambda q: (entered[q], q))
        first = queues.pop(own, [])
        turns = [t for turn in zip_longest(*queues.values()) for t in turn if t is not None]
        chosen: list[str] = []
        spent = 0.0
        for tests, limit in ((first, 0.6 * cap), (turns, cap)):
            for test in tests:
                if spent + self.seconds[test] <= limit and len(chosen) < 500:
                    chosen.append(test)
                    spent += self.seconds[test]
        return chosen or [*first, *turns][:1]
