"""``python -m tools.gpu``: tests on the device, then every op, step and evaluation, in limited time.

The command itself touches no device. It runs the tests, and then a process that measures, the most important
items first. That process writes rows as they come; if it cannot continue (an illegal address, a failed
capture), another does the rest. Items that failed, or for which there was no time, are listed by name.
``--first`` takes the measurements of :mod:`.gpu_first` before all that.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import distributions as td

from benchmarks import frontend, report, users
from benchmarks.likelihood import log_prob
from benchmarks.logsumexp import log_mean_exp
from benchmarks.measure import (
    COMPILE,
    OURS,
    REDUCE_OVERHEAD,
    Host,
    Machine,
    Place,
    Work,
    describe,
    measure,
    measure_machine,
)
from benchmarks.normal_diagonal import rsample_kl, rsample_log_ratio
from benchmarks.objectives import evaluated, evaluation, iwae_without_networks, steps
from benchmarks.reduce import bound
from fastvae.core import backend as _backend

from . import device_tests, gpu_first, gpu_tables
from .device import CaptureFailed, Cuda, DeviceLost, StandIn

ROOT = Path(__file__).parents[1]
# Exit code of a measuring process when another must continue.
AGAIN = 3
# Names of a loss, and of what there was no time for, that are not items.
MACHINE, TESTS = "the machine's own speed", "the tests"
MOST_PROCESSES = 10
# Seconds reserved for tables and plots at the end, and for the work in progress when the time is up.
RESERVE, GRACE = 15, 10
# Seconds of rounds per work; in a dry run two rounds are enough.
BUDGET = 0.3
# Seconds beyond the expected time after which an item counts as hanging, and its process is ended.
PATIENCE = 60

# Compiled versions and their options, and those to measure.
VERSIONS = {COMPILE: {}, REDUCE_OVERHEAD: {"mode": "reduce-overhead"}}
COMPILED = (COMPILE,)
ALL = tuple(VERSIONS)

# Required speed-up of fastvae over each peer, forward and backward.
FAST = {"eager": 4.0, COMPILE: 1.2}
LEVEL = {COMPILE: 1.0}


# The same by torch.distributions, as in Pyro.


def _normal(mu, logvar):
    return td.Independent(td.Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1)


def _rsample_kl(mu, logvar, samples):
    q = _normal(mu, logvar)
    p = _normal(torch.zeros_like(mu), torch.zeros_like(mu))
    return q.rsample(() if samples is None else (samples,)), td.kl_divergence(q, p)


def _bernoulli(x, logits):
    return td.Independent(td.Bernoulli(logits=logits, validate_args=False), 1).log_prob(x)


def _gaussian(x, mean, logvar):
    return _normal(mean, logvar).log_prob(x)


def _by(function):
    return {"torch.distributions": function}


def _overhead(works, place):
    """Yield works of tiny tensors, dominated by Python's overhead; the target is for the forward pass too."""
    for work in works(replace(place, graphs=False)):
        yield replace(work, group="overhead", case=f"{work.group} {work.case}", target=LEVEL)


# Measurable works, as functions of size and place.
WORKS = {
    "rsample_kl": lambda size, place: rsample_kl(
        *size, FAST if size[0] == 1 else {}, place, _by(_rsample_kl)
    ),
    "rsample_kl, chunked": lambda size, place: rsample_kl(*size, {}, place, chunked=True),
    "rsample_log_ratio": lambda size, place: rsample_log_ratio(*size, {}, place),
    "rsample_log_ratio, chunked": lambda size, place: rsample_log_ratio(*size, {}, place, chunked=True),
    "gaussian_log_prob": lambda size, place: log_prob("gaussian", size, LEVEL, place, _by(_gaussian)),
    "bernoulli_log_prob": lambda size, place: log_prob("bernoulli", size, LEVEL, place, _by(_bernoulli)),
    "poisson_log_prob": lambda size, place: log_prob("poisson", size, {}, place),
    "reduce": lambda size, place: bound(*size, FAST, place),
    "log_mean_exp": lambda size, place: log_mean_exp(*size, {}, place),
    "IWAE without networks": lambda size, place: iwae_without_networks(*size, FAST, place, chunked=True),
    "overhead of rsample_kl": lambda size, place: _overhead(lambda p: rsample_kl(*size, {}, p), place),
    "overhead of bernoulli_log_prob": lambda size, place: _overhead(
        lambda p: log_prob("bernoulli", size, {}, p), place
    ),
    "ELBO step": lambda size, place: steps("ELBO step", *size[:2], size[2:-1], size[-1], {}, place),
    "IWAE step": lambda size, place: steps("IWAE step", *size[:2], size[2:-1], size[-1], {}, place),
    "evaluation": lambda size, place: evaluation(
        *size[:2], (200,), 50, evaluated, size[3:], by_hand=size[2], place=place
    ),
    **gpu_first.WORKS,
}


@dataclass(frozen=True)
class Item:
    """Item to measure.

    Attributes:
        what: a key of WORKS.
        size: its sizes.
        precision: float32 or bfloat16.
        versions: keys of VERSIONS.
        seconds: time that must remain to start it.
        small: its sizes in a dry run. Default: small, distinct numbers along each axis.
    """

    what: str
    size: tuple[int, ...]
    precision: str = "float32"
    versions: tuple[str, ...] = ()
    seconds: float = 5
    small: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.what} {'×'.join(map(str, self.size))}", self.precision, *self.versions]
        return ", ".join(parts)

    @property
    def rate(self) -> str:
        """Precision of the matrix products that limit the time; an op's arithmetic is always float32."""
        return self.precision if self.what in ("IWAE step", "evaluation") else "float32"

    def works(self, host: Host, dry_run: bool) -> Iterator[Work]:
        versions = {name: VERSIONS[name] for name in self.versions}
        # An evaluation covers both precisions.
        size, label = self.size, "" if self.what == "evaluation" else f", {self.precision}"
        if dry_run:
            label += f", DRY RUN of {'×'.join(map(str, size))}"
            size = self.small or tuple(map(min, size, (3, 6, 5, 20, 4)))
        place = Place(host, getattr(torch, self.precision), versions, True, label)
        yield from WORKS[self.what](size, place)


def _plan() -> list[Item]:
    """Return all items, the most important first."""

    def main(precision):
        for what, *size in (
            ("rsample_log_ratio, chunked", 50, 1024, 50),
            ("reduce", 50, 1024, 784),
            ("IWAE without networks", 50, 1024, 50, 784),
            ("bernoulli_log_prob", 50, 1024, 784),
            ("gaussian_log_prob", 50, 1024, 784),
            ("rsample_kl", 1, 65536, 256),
            ("rsample_kl, chunked", 1, 65536, 50),
        ):
            yield Item(what, tuple(size), precision, COMPILED, 12)

    def others(precision):
        for what, *size in (
            ("gaussian_log_prob", 50, 4096, 100),
            ("bernoulli_log_prob", 50, 65536, 8),
            ("gaussian_log_prob", 50, 65536, 8),
            ("gaussian_log_prob", 64, 196608),
            ("poisson_log_prob", 50, 1024, 2000),
            ("rsample_kl", 1, 4194304, 8),
            ("rsample_log_ratio, chunked", 50, 8192, 10),
            ("rsample_log_ratio", 50, 4096, 64),
            ("bernoulli_log_prob", 16384, 784),
        ):
            yield Item(what, tuple(size), precision)

    def step(what, *arguments):
        return Item(what, *arguments, small=(2, 3, 5, 20, 4))

    return [
        *main("float32"),
        Item("log_mean_exp", (50, 1048576), versions=COMPILED, seconds=12),
        step("IWAE step", (50, 64, 200, 200, 50), "float32", ALL, 30),
        step("ELBO step", (1, 128, 200, 200, 50), "float32", ALL, 30),
        Item("overhead of rsample_kl", (1, 128, 32), versions=ALL, seconds=15),
        Item("overhead of bernoulli_log_prob", (128, 784), versions=ALL, seconds=15),
        *others("float32"),
        *main("bfloat16"),
        Item("evaluation", (5000, 10000, 500, 500), "bfloat16", seconds=25, small=(8, 4, 3, 4)),
        Item("log_mean_exp", (5000, 16384)),
        step("IWAE step", (50, 1024, 200, 200, 50), "bfloat16", ALL, 30),
        Item("rsample_log_ratio", (50, 4096, 64), "bfloat16"),
        Item("gaussian_log_prob", (50, 4096, 100), "bfloat16"),
    ]


def _first() -> list[Item]:
    """Return the items of ``--first`` that are measured before the tests, in order."""
    sizes = (50, 1024, 784), (50, 4096, 100), (50, 65536, 8)
    layers = (50, 64, 200, 784), (50, 128, 200, 784), (50, 64, 512, 3072)
    layer = functools.partial(Item, small=(3, 4, 5, 6))
    return [
        *(
            Item(f"parameters of {name}_log_prob", size, precision)
            for name in ("gaussian", "bernoulli")
            for size in sizes
            for precision in ("float32", "bfloat16")
        ),
        # An ELBO has one sample here.
        *(
            Item("front end", (max(1, c.k), *c[1:]), seconds=20, small=(min(max(1, c.k), 2), 3, 5, 4))
            for c in frontend.CASES
        ),
        Item("graphed ELBO step", (1, 128, 200, 200, 50), seconds=8, small=(1, 3, 5, 20, 4)),
        Item("graphed IWAE step", (50, 64, 200, 200, 50), seconds=8, small=(2, 3, 5, 20, 4)),
        *(layer("last layer", size) for size in layers),
        *(layer("last layer, TF32", size) for size in layers),
        *(layer("last layer", size, "bfloat16") for size in layers),
        *(
            Item(c.name, tuple(c.sizes.values()), seconds=8, small=tuple(c.tiny.values()))
            for c in users.CASES
        ),
        *(
            Item(what, (5000, 10000, 50), precision, seconds=10, small=(8, 4, 3))
            for what in ("whole decoder of two hidden layers", "whole decoder")
            for precision in ("float32", "bfloat16")
        ),
        *(
            Item(what, size, small=small)
            for what, size, small in (
                ("classes", (500, 4000, 1), (3, 5, 1)),
                ("classes", (500, 8, 200), (3, 5, 4)),
                ("clicks", (500, 4000), (3, 5)),
                ("negative_binomial", (128, 2000), (3, 5)),
                ("zero_inflated_negative_binomial", (128, 2000), (3, 5)),
                ("discretized logistic mixture", (64, 10, 1024), (2, 3, 4)),
                ("mixture", (5000, 500, 50), (3, 4, 5)),
                ("mixture", (128, 500, 50), (3, 4, 5)),
                ("aggregate", (512, 64), (4, 3)),
                ("aggregate", (64, 16), (4, 3)),
                ("nearest code", (65536, 512, 64), (5, 4, 3)),
                ("full covariance", (50, 128, 50), (2, 3, 4)),
            )
        ),
    ]


PLAN, FIRST = _plan(), _first()


def plan(only: list[str], dry_run: bool, first: bool = False) -> list[Item]:
    """Return the items whose names contain one of ``only``, or all if it is empty.

    A dry run has one size of each kind, as all are tiny there.

    Args:
        only: parts of names.
        dry_run: True without a device.
        first: the items of ``--first`` that are measured before the tests. Default: the others.
    """
    items = [i for i in (FIRST if first else PLAN) if not only or any(part in i.name for part in only)]
    if not dry_run:
        return items
    kinds = {(i.what, i.precision, len(i.size), i.size[0] == 1): i for i in reversed(items)}
    return [item for item in items if item in kinds.values()]


@dataclass
class State:
    """State shared by the command and the measuring processes, in a file.

    Attributes:
        path: the file's path.
        stop: deadline of the last work, in seconds since the epoch.
        only: parts of names; items without any of them are not measured. All if empty.
        first: the items of ``--first`` are measured now, those before the tests.
        csv: path of the rows.
        machines: precision → the GPU's best speed.
        began: the item being measured.
        done: the items measured.
        left_out: the items for which there was no time.
        lost: item that ended in an error → the error.
        failed: work that could not be captured in a CUDA graph → reason.
        budget: seconds of rounds per work.
    """

    path: str
    stop: float
    out: str
    dry_run: bool
    only: list[str] = field(default_factory=list)
    first: bool = False
    csv: str = ""
    machines: dict[str, dict[str, float]] = field(default_factory=dict)
    began: str = ""
    done: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    budget: float = BUDGET

    def save(self, **changes: object) -> None:
        """Change fields and write the file."""
        for name, value in changes.items():
            setattr(self, name, value)
        path = Path(self.path)
        # Atomically: the process may be ended at any moment.
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def load(cls, path: str) -> State:
        return cls(**json.loads(Path(path).read_text()))

    def wanted(self) -> list[Item]:
        """Return the items still to be measured, in order."""
        over = {*self.done, *self.left_out, *self.lost}
        return [item for item in plan(self.only, self.dry_run, self.first) if item.name not in over]


# The measuring process


def _worker(path: str) -> int:
    warnings.filterwarnings("ignore")
    state = State.load(path)
    host = StandIn() if state.dry_run else Cuda(state.failed)
    with host.active():
        try:
            where, machines = _machines(host, state)
            for item in state.wanted():
                if time.time() + item.seconds > state.stop:
                    state.save(left_out=[*state.left_out, item.name])
                    print(f"{item.name}: skipped for lack of time", flush=True)
                    continue
                state.save(began=item.name)
                # This signal is not handled: it ends the process, even one that waits for the device. Not in
                # a dry run, which may be slow on a busy machine.
                if not state.dry_run:
                    signal.alarm(int(PATIENCE + 4 * item.seconds))
                _try(item, host, machines[item.rate], where[item.rate], state)
                signal.alarm(0)
                state.save(began="")
                host.release()
        except CaptureFailed as error:
            print(f"a CUDA graph could not be captured: {error}; retrying without", flush=True)
            state.save(failed={**state.failed, error.key: error.reason})
            return AGAIN
        except DeviceLost as error:
            print(f"this process has lost the device: {error}", flush=True)
            state.save(lost={**state.lost, state.began or MACHINE: describe(error)})
            return AGAIN if state.machines else 1
    return 0


def _try(item: Item, host: Host, machine: Machine, where: report.Row, state: State) -> None:
    """Measure an item; record an error that the device survives."""
    try:
        _measure(item, host, machine, where, state)
    except (CaptureFailed, DeviceLost):
        raise
    except Exception as error:
        traceback.print_exc(limit=-8)
        state.save(lost={**state.lost, item.name: describe(error)})
        host.check_usable(error)
    else:
        state.save(done=[*state.done, item.name])


def _machines(host: Host, state: State) -> tuple[dict[str, report.Row], dict[str, Machine]]:
    """Return each row's entries about the GPU, and its speed, by precision; the first process measures it."""
    if not state.machines:
        numbers, sizes = (2**16, (64, 64)) if state.dry_run else (2**26, (8192, 16384))
        machines = {
            name: asdict(measure_machine(host, numbers, size, getattr(torch, name)))
            for name, size in zip(("float32", "bfloat16"), sizes, strict=True)
        }
        state.save(machines=machines)
        host.release()
    machines = {name: Machine(**values) for name, values in state.machines.items()}
    device, versions = host.describe()
    where = {name: report.environment(machine, device, versions) for name, machine in machines.items()}
    if not state.csv:
        name = f"dry-run-{report.slug(report.processor())}" if state.dry_run else f"gpu-{report.slug(device)}"
        csv = Path(state.out) / f"{name}.csv"
        csv.unlink(missing_ok=True)
        state.save(csv=str(csv))
        row, half = where["float32"], where["bfloat16"]
        print(
            f"{device}, {row['versions']}, {row['time']}\na copy moves {row['copy_gb_per_s']} GB/s, a sum "
            f"reads {row['read_gb_per_s']} GB/s, a matrix product does {row['gflop_per_s']} GFLOP/s in "
            f"float32, {half['gflop_per_s']} in bfloat16\n\n{report.HEAD}",
            flush=True,
        )
    return where, machines


def _measure(item: Item, host: Host, machine: Machine, where: report.Row, state: State) -> None:
    """Measure, print and write those works of an item that are not written yet."""
    csv = Path(state.csv)
    key = lambda row: (row["group"], row["case"], row["direction"])  # noqa: E731
    written = {key(row) for row in report.read_csv(csv)} if csv.exists() else set()
    began = time.perf_counter()
    for work in item.works(host, state.dry_run):
        if (work.group, work.case, work.direction) in written:
            continue
        rows = report.rows_of(work, measure(work, state.budget, host), machine, where)
        report.append_csv(rows, csv)
        print(report.table(rows), flush=True)
    print(f"  ({item.name}: {time.perf_counter() - began:.1f} s)", flush=True)


# The command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description="On a machine with a CUDA device: run the tests there, then measure every op, IWAE "
        "training steps and the evaluation of log p(x), with eager PyTorch, torch.compile, "
        "torch.distributions and Pyro (where installed) as peers. Ends with short tables; writes CSV and "
        "plots.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where CSV and plots go")
    parser.add_argument(
        "--first",
        action="store_true",
        help="before the tests, take the first measurements of a new card: launch parameters in turns, the "
        "front end, fastvae.graphed, the last layer",
    )
    parser.add_argument("--seconds", type=float, help="total time limit (default 420, with --first 600)")
    parser.add_argument(
        "--tests-seconds", type=float, default=200, help="time limit of the tests (default 200)"
    )
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help="measure only items whose names contain this (may be repeated)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a device: run every line on tiny CPU tensors with Triton's interpreter; the output is "
        "marked as a dry run, and its numbers mean nothing",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help=f"seconds of rounds per computation (default {BUDGET}); 0 compiles and checks, with few rounds",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _worker(options.worker)
    if options.out is None:
        parser.error("--out DIR is missing: the folder for CSV and plots")
    if options.seconds is None:
        options.seconds = 600 if options.first else 420
    if options.seconds <= 0:
        parser.error(f"--seconds must be greater than 0, got {options.seconds:g}")
    orders = (True, False) if options.first else (False,)
    if not any(plan(options.only, options.dry_run, first) for first in orders):
        names = "\n  ".join(item.name for item in (FIRST if options.first else []) + PLAN)
        parser.error(f"--only {options.only[0]!r} matches none of the names:\n  {names}")
    if reason := _unfit(options.dry_run):
        print(f"python -m tools.gpu: {reason}", file=sys.stderr)
        return 2
    began = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    tests = None
    with tempfile.TemporaryDirectory() as folder:
        state = State(
            path=str(Path(folder) / "state.json"),
            stop=began + max(options.seconds - RESERVE, 0),
            out=str(options.out.resolve()),
            dry_run=options.dry_run,
            budget=0 if options.dry_run else options.budget,
            only=options.only,
            first=options.first,
        )
        state.save()
        if options.first:
            state = _measure_all(state)
            state.save(first=False)
        seconds = min(options.tests_seconds, options.seconds / 2, state.stop - time.time())
        if not options.no_tests and seconds > 0:
            tests = device_tests.run(seconds, options.dry_run)
            print(tests.text(), flush=True)
        elif not options.no_tests:
            state.save(left_out=[*state.left_out, TESTS])
        state = _measure_all(state)
    return _conclude(state, tests, options.out, began)


def _unfit(dry_run: bool) -> str:
    """Return why this machine cannot run the command, and a remedy; empty if it can."""
    if not _backend.has_triton():
        return (
            "triton is not installed, and the kernels to measure need it; install the version that "
            "matches this torch (`pip install triton`)"
        )
    if not dry_run and not torch.cuda.is_available():
        return (
            f"no CUDA device was found (torch {torch.__version__}); expected a machine with an NVIDIA GPU, "
            "a driver, and a torch built for CUDA. To test the command without a device, add "
            "--dry-run; to measure the CPU, run `python -m benchmarks`"
        )
    return ""


def _measure_all(state: State) -> State:
    """Run measuring processes until everything is done or the time is up."""
    command = [sys.executable, "-m", "tools.gpu", "--worker", state.path]
    # Measure the GPU's default backend, whatever is selected for other work.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTVAE_BACKEND")}
    if state.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "FASTVAE_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    elif torch.version.hip:
        print("this is ROCm: CUDA's names refer to HIP here; untested", flush=True)
    for _ in range(MOST_PROCESSES if state.wanted() else 0):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            code = process.wait(max(state.stop + GRACE - time.time(), GRACE))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        state = State.load(state.path)
        if code == 0:
            return state
        if code == AGAIN:
            continue
        name = state.began or MACHINE
        if code is None:
            print(f"{name}: interrupted, the time is up", flush=True)
            state.save(left_out=[*state.left_out, name], began="")
            break
        reason = "timed out" if code == -signal.SIGALRM else f"ended its process, code {code}"
        print(f"{name}: {reason}", flush=True)
        # The process's own message is more informative.
        state.save(lost={name: reason, **state.lost}, began="")
        if not state.machines:
            break
    state.save(left_out=[*state.left_out, *(item.name for item in state.wanted())])
    return state


def _conclude(state: State, tests: device_tests.Outcome | None, out: Path, began: float) -> int:
    """Write plots, and print the final tables."""
    csv = Path(state.csv) if state.csv else None
    rows = report.read_csv(csv) if csv and csv.exists() else []
    files = [csv, *gpu_tables.plots(rows, csv.with_suffix(""))] if rows else []
    if tests is not None and tests.log:
        log = out / f"{csv.stem if csv else 'gpu'}-tests.txt"
        log.write_text(tests.log[-200_000:])
        files.append(log)
    print("\n" + gpu_tables.text(rows, state.dry_run))
    for heading, lines in (
        ("skipped for lack of time", state.left_out),
        ("failed with an error", [f"{name}: {reason}" for name, reason in state.lost.items()]),
        ("timed without a CUDA graph", [f"{name}: {reason}" for name, reason in state.failed.items()]),
    ):
        if lines:
            print(f"{heading}: {len(lines)}", *lines, sep="\n  ")
    if tests is not None:
        print(tests.summary())
    print(*(f"{path} ({path.stat().st_size / 1024:.0f} KiB)" for path in files), sep="\n")
    mark = ", A DRY RUN: no number was measured on a GPU" if state.dry_run else ""
    print(f"{(time.time() - began) / 60:.1f} minutes{mark}")
    wrong = any(row["wrong"] and row["implementation"].split(",")[0] == OURS for row in rows)
    failed = tests is not None and not tests.passed
    return 1 if wrong or failed or state.lost or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
