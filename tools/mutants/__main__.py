"""Commands: record which tests enter what, then break the code in one place at a time.

``record`` runs the tests once, those without the mark `slow`, and notes the blocks that each one enters; a
test file that changed is recorded again, or the files that are named. ``sample`` breaks places drawn by a
seed, ``changed`` places on lines that a branch touched, ``written`` those of the list by hand. One mutant a
line; exit code 1 if one survives that is not accepted.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from functools import cache
from pathlib import Path

from .blocks import ROOT, block_at, sources
from .copies import build, in_copy
from .generate import Site, applied, changed_lines, sample, sites
from .places import Entry, locate, mutated, read_table, stale
from .record import Recording, record
from .run import Done, Job, fork_all, replace, run_tests

WRITTEN, ACCEPTED = "written.txt", "accepted.txt"
NOT_COMPILED = 98
# The other implementations' tests say nothing about a mutant.
_RELEVANT = {"cpp": "not triton and not reference", "triton": "not native and not reference", "python": ""}


@cache
def accepted() -> dict[tuple[str, ...], Entry]:
    """Survivors that are accepted, by what a generated mutant has for a key."""
    return {(e.file, e.function, e.words, e.old, e.new): e for e in read_table(ACCEPTED)}


def stale_accepted() -> list[str]:
    """Accepted survivors that the generator no longer makes."""
    made = {file: {s.key for s in sites(file)} for file in {key[0] for key in accepted()} & set(sources())}
    return [
        f"{e.table}, line {e.line}: no mutant of {e.file} {e.function} [{e.words}] is "
        f"{e.old!r} => {e.new!r} now: delete the entry, or write the one that took its place"
        for key, e in accepted().items()
        if key not in made.get(key[0], ())
    ]


def _generated(chosen: list[Site], jobs: int, cap: float, only_list: bool) -> int:
    """Run generated mutants, each against recorded tests that enter its block."""
    if only_list:
        print("\n".join(map(str, chosen)))
        return 0
    recording = Recording()
    for file in recording.stale:
        print(f"{file} has changed since it was recorded: `python -m tools.mutants record {file}`")
    for problem in stale_accepted():
        print(f"STALE {problem}")
    named: dict[str, Site] = {}
    work, survivors, unseen = [], [], []
    known = 0
    for number, site in enumerate(chosen):
        if site.key in accepted():
            known += 1
            continue
        source = (ROOT / site.file).read_text()
        tests = recording.choose(block_at(ast.parse(source), site.file, site.line), site.file, cap)
        if not tests:
            unseen.append(site)
            print(f"NOT EXECUTED {site}", flush=True)
            continue
        seconds = sum(recording.seconds[t] for t in tests)
        text = applied(site, source)
        named[str(number)] = site
        work.append(
            Job(
                str(number),
                lambda folder, site=site, text=text: replace(in_copy(folder, site.file), text),
                lambda folder, tests=tests: run_tests([], tests),
                60 + 3 * seconds,
            )
        )
    caught = 0
    for done in fork_all(work, jobs):
        noticed, message = done.verdict()
        caught += noticed
        if not noticed:
            survivors.append(named[done.name])
        print(f"{'caught  ' if noticed else 'SURVIVED'} {named[done.name]}: {message}", flush=True)
    for site in (*unseen, *survivors):
        print(f"not caught: {site}")
    print(f"caught {caught}, survived {len(survivors)}, not executed {len(unseen)}, accepted {known}")
    return int(bool(survivors or unseen))


def _work_on(entry: Entry | None, kind: str, tests: list[str]) -> Job:
    def compile_and_test(folder: Path) -> int:
        if kind == "cpp":
            # Unoptimised, in a quarter of the time: what a line means is the same. Products are AVX-512's.
            every = entry is None or entry.file == "csrc/gemm.hpp"
            built = build(folder, *([] if every else ["-DFASTVAE_BASE_ONLY"]), "-O0")
            if built.returncode:
                print(built.stderr[-2000:], f"ERROR does not compile: {built.stderr[-300:]!r}", sep="\n")
                return NOT_COMPILED
        return run_tests(["-k", _RELEVANT[kind], *tests])

    def prepare(folder: Path) -> object:
        return replace(in_copy(folder, entry.file), mutated(entry)) if entry else None

    return Job(str(entry.line) if entry else "", prepare, compile_and_test, 3600.0)


def _written(kinds: list[str], only: str, jobs: int) -> int:
    """Run the mutants written by hand, after the same tests on code without one."""
    entries = read_table(WRITTEN)
    problems = stale(entries, locate)
    for problem in problems:
        print(f"STALE {problem}")
    caught = survived = 0
    for kind in kinds:
        chosen = {
            str(e.line): e for e in entries if e.kind == kind and only in str(e) and not stale([e], locate)
        }
        work = [_work_on(e, kind, e.tests) for e in chosen.values()]
        if work:
            tests = list(dict.fromkeys(t for e in chosen.values() for t in e.tests))
            work.insert(0, _work_on(None, kind, tests))
        for done in fork_all(work, jobs):
            if not done.name:
                if done.code != 0:
                    survived += 1
                print(
                    f"{kind}: unchanged code {'passes' if done.code == 0 else f'FAILS {done.verdict()[1]}'}"
                )
                continue
            noticed, message = _verdict(done)
            caught += noticed
            survived += not noticed
            print(f"{'caught  ' if noticed else 'SURVIVED'} {chosen[done.name]}: {message}", flush=True)
    print(f"caught {caught}, survived {survived}, stale {len(problems)}")
    return int(survived > 0 or bool(problems))


def _verdict(done: Done) -> tuple[bool, str]:
    noticed, message = done.verdict()
    # Such a mutant was written wrongly: it says nothing about the tests.
    if done.code == NOT_COMPILED or message.startswith("DOES NOT IMPORT"):
        return False, message
    return noticed, message


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
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--seed", type=int, default=None, help="of the sample; printed where none is given")
    drawn.add_argument("--cap", type=float, default=60.0, help="seconds of tests for each mutant (60)")
    drawn.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    part = commands.add_parser("record", parents=[options], help="run the tests, note what each one enters")
    part.add_argument("files", nargs="*", help="test files (default: those without a recording of today's)")
    part = commands.add_parser("sample", parents=[options, drawn], help="mutants drawn by a seed")
    part.add_argument("--count", type=int, default=150)
    part.add_argument("files", nargs="*", help="source files (default: fastvae/ and kernels/)")
    part = commands.add_parser("changed", parents=[options, drawn], help="mutants on lines of this branch")
    part.add_argument("--base", default="main", help="the branch that it is compared with (main)")
    part.add_argument("--functions", action="store_true", help="anywhere in a function with such a line")
    part.add_argument("--count", type=int, default=150)
    part = commands.add_parser("written", parents=[options], help="the mutants written by hand")
    part.add_argument("kind", nargs="?", choices=list(_RELEVANT))
    part.add_argument("--only", default="", help="only entries whose first line has this text")
    given = parser.parse_args(words)
    if given.command == "record":
        return record(given.files, given.jobs)
    if given.command == "written":
        return _written([given.kind] if given.kind else list(_RELEVANT), given.only, given.jobs)
    if given.command == "sample":
        if unknown := [f for f in given.files if f not in sources()]:
            raise SystemExit(f"{unknown[0]}: not a source file; name one from the root, as fastvae/vae.py")
        found = {f: sites(f) for f in given.files or sources()}
    else:
        found = _changed(given.base, given.functions)
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}")
    return _generated(sample(found, seed, given.count), given.jobs, given.cap, given.list)


if __name__ == "__main__":
    sys.exit(main())
