"""Commands: record which tests enter what, then break the code in one place at a time.

``record`` runs the tests that are not marked `slow` once, and records the blocks that each one enters: of
changed test files, or of the files given. ``sample`` mutates places drawn from a seed, ``changed`` a
branch's lines, ``written`` the entries written by hand. Output: one line per mutant. The exit code is 1 if a
mutant that is not accepted survives.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

from .blocks import ROOT, block_at, sources
from .copies import build, in_copy
from .generate import Site, applied, changed_lines, sample, sites
from .places import Entry, mutated, read_table, stale
from .record import Recording, record
from .run import NOT_COMPILED, Job, fork_all, replace, run_tests

WRITTEN, ACCEPTED = "written.txt", "accepted.txt"
# Tests of the other implementations do not run the mutant.
_RELEVANT = {"cpp": "not triton and not reference", "triton": "not native and not reference", "python": ""}


@cache
def accepted() -> dict[tuple[str, ...], Entry]:
    """Return the accepted survivors by the keys of their mutants."""
    return {(e.file, e.function, e.words, e.old, e.new): e for e in read_table(ACCEPTED)}


def stale_accepted() -> list[str]:
    """List accepted survivors that are no longer generated."""
    today = {file: {s.key for s in sites(file)} for file in {key[0] for key in accepted()} & set(sources())}
    return [
        f"{e.table}, line {e.line}: no mutant of {e.file} {e.function} ({e.words}) is "
        f"{e.old!r} => {e.new!r} now: delete the entry, or write the one that took its place"
        for key, e in accepted().items()
        if key not in today.get(key[0], ())
    ]


def _caught_and_not(work: list[Job], jobs: int) -> tuple[int, list[Any]]:
    """Run mutants and print a line for each; return the number caught, and the survivors."""
    survivors = []
    for done in fork_all(work, jobs):
        noticed, message = done.verdict()
        if not noticed:
            survivors.append(done.name)
        print(f"{'caught  ' if noticed else 'SURVIVED'} {str(done.name)[:200]}: {message}", flush=True)
    return len(work) - len(survivors), survivors


def _generated(chosen: list[Site], jobs: int, cap: float) -> int:
    """Run generated mutants, each against recorded tests that enter its block."""
    recording = Recording()
    for file in recording.stale:
        print(f"{file} has changed since it was recorded: `python -m tools.mutants record {file}`")
    for problem in stale_accepted():
        print(f"STALE {problem}")
    known = [s for s in chosen if s.key in accepted()]
    work, unseen = [], []
    for site in chosen:
        source = (ROOT / site.file).read_text()
        tests = recording.choose(block_at(ast.parse(source), site.file, site.line), site.file, cap)
        limit = 60 + 3 * sum(recording.seconds[t] for t in tests)

        def prepare(folder: Path, site: Site = site, text: str = applied(site, source)) -> Any:
            return replace(in_copy(folder, site.file), text)

        if tests and site not in known:
            work.append(Job(site, prepare, lambda _, tests=tests: run_tests([], tests), limit))
        elif site not in known:
            unseen.append(site)
            print(f"NOT EXECUTED {site}", flush=True)
    caught, survivors = _caught_and_not(work, jobs)
    if unseen:
        print("not executed: no recorded test enters it; if its function changed, record its tests again")
    for site in (*unseen, *survivors):
        print(f"not caught: {site}")
    print(f"caught {caught}, survived {len(survivors)}, not executed {len(unseen)}, accepted {len(known)}")
    return int(bool(survivors or unseen))


def _job(entry: Entry | None, kind: str, tests: list[str]) -> Job:
    """Return a function that runs an entry's tests on its mutant, or on unchanged code."""

    def work(folder: Path) -> int:
        if kind == "cpp":
            # Unoptimised, which compiles in a quarter of the time. Products use AVX-512.
            every = entry is None or entry.file == "csrc/gemm.hpp"
            built = build(folder, *([] if every else ["-DFASTVAE_BASE_ONLY"]), "-O0")
            if built.returncode:
                print(built.stderr[-2000:], f"ERROR: {built.stderr[-300:]!r}", sep="\n")
                return NOT_COMPILED
        return run_tests(["-k", _RELEVANT[kind], *tests])

    def prepare(folder: Path) -> Any:
        return replace(in_copy(folder, entry.file), mutated(entry)) if entry else None

    return Job(entry or f"{kind}: unchanged code", prepare, work, 3600.0)


def _written(kinds: list[str], only: list[str], jobs: int) -> int:
    """Run the mutants written by hand, after their tests have passed on unchanged code."""
    entries = read_table(WRITTEN)
    problems = stale(entries)
    for problem in problems:
        print(f"STALE {problem}")
    caught, survivors = 0, []
    for kind in kinds:
        chosen = [e for e in entries if e.kind == kind and any(t in str(e) for t in only) and not stale([e])]
        tests = list(dict.fromkeys(t for e in chosen for t in e.tests))
        for done in fork_all([_job(None, kind, tests)] if chosen else [], 1):
            print(f"{done.name}: {'passes' if done.code == 0 else 'FAILS'}, {done.last()}", flush=True)
            survivors += [done.name] if done.code else []
        found = _caught_and_not([_job(e, kind, e.tests) for e in chosen], jobs)
        caught, survivors = caught + found[0], survivors + found[1]
    print(f"caught {caught}, survived {len(survivors)}, stale {len(problems)}")
    return int(bool(survivors or problems))


def _changed(base: str, functions: bool) -> dict[str, list[Site]]:
    found = {}
    for file, lines in changed_lines(base).items():
        of_file = sites(file) if (ROOT / file).exists() else []
        touched = {s.function for s in of_file if s.line in lines}
        found[file] = [s for s in of_file if s.line in lines or functions and s.function in touched]
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    options, drawn = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    options.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    drawn.add_argument("--seed", type=int, default=None, help="seed of the sample (random, and printed)")
    drawn.add_argument("--count", type=int, default=150, help="mutants at most (150)")
    drawn.add_argument("--cap", type=float, default=60.0, help="seconds of tests for each mutant (60)")
    drawn.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    part = commands.add_parser("record", parents=[options], help="record which blocks each test enters")
    part.add_argument("files", nargs="*", help="test files (default: those without an up-to-date recording)")
    part = commands.add_parser("sample", parents=[options, drawn], help="mutants drawn from a seed")
    part.add_argument("files", nargs="*", help="source files (default: fastvae/ and kernels/)")
    part = commands.add_parser("changed", parents=[options, drawn], help="mutants on this branch's lines")
    part.add_argument("--base", default="main", help="the branch to compare with (main)")
    part.add_argument("--functions", action="store_true", help="anywhere in a function with a changed line")
    part = commands.add_parser("written", parents=[options], help="the mutants written by hand")
    part.add_argument("kind", nargs="?", choices=list(_RELEVANT))
    part.add_argument("--only", nargs="+", default=[""], help="only entries that contain one of these texts")
    given = parser.parse_args(words)
    if given.command == "record":
        return record(given.files, given.jobs)
    if given.command == "written":
        return _written([given.kind] if given.kind else list(_RELEVANT), given.only, given.jobs)
    if given.command == "changed":
        found = _changed(given.base, given.functions)
    elif unknown := [f for f in given.files if f not in sources()]:
        raise SystemExit(f"{unknown[0]}: not a source file; name one from the root, as fastvae/vae.py")
    else:
        found = {f: sites(f) for f in given.files or sources()}
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    chosen = sample(found, seed, given.count)
    print(f"seed {seed}")
    if given.list:
        print(*chosen, sep="\n")
        return 0
    return _generated(chosen, given.jobs, given.cap)


if __name__ == "__main__":
    sys.exit(main())
