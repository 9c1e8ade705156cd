"""python -m tools.gpu: the dry run, judgements, time limits, the device and the processes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastvae
from benchmarks import report
from benchmarks.measure import COMPILE, COPY, EMPTY, OURS, Machine, Place, Result, Work, measure
from tools import device, device_tests, gpu, gpu_first, gpu_tables

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
# Maximum characters of the command's visible output.
MOST_CHARACTERS = 12_000


# Never reached, even on a busy machine; time limits are tested with a simulated clock.
HOURS = ("--seconds", 36_000, "--tests-seconds", 18_000)


def _run(*arguments):
    command = [sys.executable, "-m", "tools.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# The dry run.


def _check_dry_run(done, out, groups):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("*.csv")
    files = sorted(out.iterdir())
    assert len(files) <= 8 and all(f.name.startswith("dry-run-") for f in files)
    assert all(f.stat().st_size < 2**20 for f in files)
    rows = report.read_csv(path)
    assert {r["group"] for r in rows} == groups
    for r in rows:
        assert r["device"].startswith("DRY RUN") and "DRY RUN" in r["case"] and not r["wrong"], r
        assert "triton" in r["versions"] and r["time"] and float(r["p50_us"]) > 0
    assert "DRY RUN: the following was computed on a CPU" in done.stdout
    assert "not judged" in done.stdout and "targets met" not in done.stdout
    return rows


def test_dry_run_of_one_op(tmp_path):
    done = _run(
        *HOURS, "--dry-run", "--no-tests", "--out", tmp_path, "--only", "log_mean_exp", "--only", "evaluation"
    )
    rows = _check_dry_run(done, tmp_path, {"log_mean_exp", "evaluation"})
    ours = [r for r in rows if r["implementation"] == OURS and r["group"] == "log_mean_exp"]
    assert [r["direction"] for r in ours] == ["forward", "forward+backward"]
    assert all(r["clock"] == "stand-in for a graph" and r["share_of_copy"] for r in ours)
    assert "skipped" not in done.stdout and "failed with an error" not in done.stdout


def test_dry_run_of_the_first_minutes(tmp_path):
    """Parameters, then the last layer, then the rest of the plan; each in a table."""
    only = "parameters of gaussian_log_prob", "last layer", "log_mean_exp"
    parts = [a for part in only for a in ("--only", part)]
    done = _run(*HOURS, "--first", "--dry-run", "--no-tests", "--out", tmp_path, *parts)
    rows = _check_dry_run(done, tmp_path, {gpu_first.PARAMETERS, gpu_first.LAST_LAYER, "log_mean_exp"})
    groups = list(dict.fromkeys(r["group"] for r in rows))
    assert groups == [gpu_first.PARAMETERS, gpu_first.LAST_LAYER, "log_mean_exp"]
    names = {r["implementation"] for r in rows if r["group"] == gpu_first.PARAMETERS}
    assert names == {OURS, "tile 2048", "samples 1", "samples 4"}
    for r in rows:
        assert (len(r["bits"]) == 16) == (r["group"] == gpu_first.PARAMETERS)
    assert all(gpu_first.TABLES[group] in done.stdout for group in groups[:2])


@pytest.mark.slow
def test_dry_run_of_all_first_minutes(tmp_path):
    only = "parameters", "front end", "graphed", "last layer", "features, MSE", "decoder 5000", "code"
    parts = [a for part in only for a in ("--only", part)]
    done = _run(*HOURS, "--first", "--dry-run", "--out", tmp_path, *parts)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*.csv")
    rows = report.read_csv(path)
    assert list(dict.fromkeys(r["group"] for r in rows)) == list(gpu_first.TABLES)
    front = [r for r in rows if r["group"] == gpu_first.FRONT_END]
    assert {r["clock"] for r in front} == {"host", "processor"}
    assert {r["implementation"] for r in front} == {OURS, f"{OURS}, compiled", "eager", COMPILE, EMPTY}
    assert {r["implementation"] for r in rows if r["group"] == gpu_first.GRAPHED} == {
        *(OURS, gpu_first.BY_HAND, gpu_first.WITHOUT)
    }
    assert not any(r["wrong"] for r in rows) and all(r["p50_us"] for r in rows)
    assert " passed" in done.stdout.rpartition("tests: ")[2]


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    done = _run(*HOURS, "--dry-run", "--out", tmp_path)
    rows = _check_dry_run(done, tmp_path, {*GROUPS, "overhead", "ELBO step", "IWAE step", "evaluation"})
    assert {"fastvae, CUDA graph", "fastvae, compiled, reduce-overhead", COPY, "torch.distributions"} <= {
        r["implementation"] for r in rows
    }
    assert "tests: " in done.stdout and " passed" in done.stdout.rpartition("tests: ")[2]


GROUPS = (
    *("rsample_kl", "rsample_log_ratio", "gaussian_log_prob", "bernoulli_log_prob", "poisson_log_prob"),
    *("reduce", "log_mean_exp", "IWAE without networks"),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_missing_device_is_explained(tmp_path):
    done = _run("--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "no CUDA device" in done.stderr and "--dry-run" in done.stderr and "NVIDIA" in done.stderr


def test_a_missing_triton_is_explained(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu._backend, "has_triton", lambda: False)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_items_skipped_for_lack_of_time_are_listed(tmp_path, monkeypatch, capsys):
    """Skipped items are listed; the clock stands still, two seconds above the reserve, too few for any."""

    def in_this_process(state):
        assert state.stop == 1002 and gpu._worker(state.path) == 0
        return gpu.State.load(state.path)

    monkeypatch.setattr(gpu, "time", SimpleNamespace(time=lambda: 1000.0, perf_counter=time.perf_counter))
    monkeypatch.setattr(gpu, "_measure_all", in_this_process)
    arguments = ["--dry-run", "--no-tests", "--out", str(tmp_path), "--only", "rsample_kl"]
    assert gpu.main([*arguments, "--seconds", str(gpu.RESERVE + 2)]) == 1  # nothing was measured
    listed = capsys.readouterr().out.rpartition("skipped for lack of time: ")[2].splitlines()[1:]
    names = [item.name for item in gpu.plan(["rsample_kl"], True)]
    assert len(names) > 2 and [line.strip() for line in listed[: len(names)]] == names


@pytest.mark.parametrize("stopped", [False, True])
def test_the_first_minutes_come_before_the_tests(stopped, tmp_path, monkeypatch, capsys):
    """The tests are between the two plans; they are left out where no time remains."""
    events, now = [], [1000.0]

    def measure_all(state):
        events.append([item.what for item in state.wanted()])
        now[0] += gpu.RESERVE + 600 * stopped
        return state

    def run(seconds, dry_run):
        events.append(seconds)
        return device_tests.Outcome({"passed": 1})

    monkeypatch.setattr(gpu, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(gpu, "_measure_all", measure_all)
    monkeypatch.setattr(device_tests, "run", run)
    assert gpu.main(["--dry-run", "--first", "--out", str(tmp_path)]) == 1  # nothing was measured
    first, *tests, rest = events
    assert first == [i.what for i in gpu.plan([], True, True)] and rest == [
        i.what for i in gpu.plan([], True)
    ]
    # As ever, 200 seconds of the 600.
    assert tests == [] if stopped else tests == [200]
    assert (gpu.TESTS in capsys.readouterr().out) == stopped


def test_the_first_minutes_ask_in_order():
    assert list(dict.fromkeys(gpu_first.GROUP_OF[i.what] for i in gpu.FIRST)) == list(gpu_first.TABLES)
    layers = [i for i in gpu.FIRST if i.what.startswith("last layer")]
    precisions = dict.fromkeys((i.what, i.precision) for i in layers)
    assert len(precisions) == 3 and {i.size[0] * i.size[1] for i in layers} == {3200, 6400}


def test_an_unknown_name_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "rsample_lk"])
    error = capsys.readouterr().err
    assert "'rsample_lk'" in error and "rsample_kl 1×65536×256, float32" in error


@pytest.mark.parametrize("arguments, said", [([], "--out DIR"), (["--out", "x", "--seconds", "0"], "got 0")])
def test_a_missing_folder_and_no_time_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert said in capsys.readouterr().err


def test_names_of_a_plan_are_unique():
    names = [item.name for item in gpu.FIRST + gpu.PLAN]
    assert len(set(names)) == len(names)
    small = gpu.plan([], True, True) + gpu.plan([], True)
    assert {i.what for i in small} == set(gpu.WORKS) and {i.precision for i in small} == {
        "float32",
        "bfloat16",
    }


# Tables, from made-up rows.

WHERE = {
    "device": "A Card",
    "threads": "2",
    "versions": "torch 9",
    "time": "2030-01-01 00:00 UTC",
    "copy_gb_per_s": "4000.0",
    "read_gb_per_s": "3900.0",
    "gflop_per_s": "50000",
}
MACHINE = Machine(copied=4e12, read=3.9e12, operations=2.5e13)


def _rows(group, case, seconds, *, moved=0, operations=0, target=None, direction="forward+backward"):
    """Return rows as a run writes them; ``seconds`` maps each implementation to its time."""
    work = Work(group, case, direction, dict.fromkeys(seconds), {}, moved, operations, target=target or {})
    results = {name: Result(torch.tensor([s, s]).numpy()) for name, s in seconds.items()}
    rows = report.rows_of(work, results, MACHINE, WHERE)
    return [{**dict.fromkeys(report.COLUMNS, ""), **row} for row in rows]


def test_tables_fit_into_the_visible_output():
    """The tables of the whole plan, with the longest lines, fit into the visible output."""
    peers = (OURS, "eager", COMPILE, "torch.distributions", COPY)
    rows = []
    for item in gpu.PLAN:
        case = f"{'×'.join(map(str, item.size))}, {item.precision}"
        if item.what.endswith(("step", "evaluation")):
            names = (
                *peers,
                *(f"{OURS}, {i}" for i in ("bfloat16", "compiled", "CUDA graph", "reduce-overhead")),
            )
            direction = "evaluation" if item.what == "evaluation" else "step"
            rows += _rows(item.what, case, dict.fromkeys(names, 1e-3), direction=direction)
            continue
        for direction in ("forward", "forward+backward"):
            wanted = item.versions and direction == "forward+backward"
            target = {"eager": 4.0, COMPILE: 1.2} if wanted and not item.what.startswith("log") else {}
            group, case_of = item.what, case
            if group.startswith("overhead"):
                group, case_of = "overhead", f"{group.removeprefix('overhead of ')} {case}"
            seconds = dict.fromkeys(peers, 123e-6)
            rows += _rows(group, case_of, seconds, moved=2**28, target=target, direction=direction)
    text = gpu_tables.text(rows, False)
    assert len(text) < MOST_CHARACTERS - 1000
    assert max(map(len, text.splitlines())) < 180


def test_tables_of_the_first_minutes():
    """A case in which a peer wins is first; other bits and failures are noted."""
    rows = [
        *_rows(gpu_first.PARAMETERS, "won", {OURS: 1e-5, "tile 2048": 2e-5}),
        *_rows(gpu_first.PARAMETERS, "lost", {OURS: 1e-5, "tile 2048": 9e-6}),
        *_rows(gpu_first.FRONT_END, "floor", {OURS: 1e-5, EMPTY: 1e-6}),
        *_rows(gpu_first.LAST_LAYER, "stored", {OURS: 1e-5, f"{OURS}, output stored": 5e-6}),
    ]
    rows[0]["bits"], rows[1]["bits"] = "a", "b"
    rows[1] |= {"p50_us": "", "ratio": "", "wrong": "an error of 7"}
    text = gpu_tables.text(rows, False)
    lost, won = (
        "◄ lost: fastvae 10.0 | tile 2048 9.0 0.90×\n",
        "  won: fastvae 10.0 | tile 2048 not timed: an",
    )
    assert lost in text and won in text and text.index(lost) < text.index(won)
    assert "  floor: fastvae 10.0 | empty nodes 1.0 0.10×" in text
    assert "◄ stored: fastvae 10.0 (0) | output stored 5.0 0.50× (0)" in text
    rows[1] |= {"p50_us": "20.0", "ratio": "2.0"}
    assert "tile 2048 20.0 2.00×, other bits" in gpu_tables.text(rows, False)


def test_the_first_tables_fit_into_the_visible_output():
    names = {
        gpu_first.PARAMETERS: ("samples 1", "samples 4"),
        gpu_first.FRONT_END: (f"{OURS}, compiled", "eager", COMPILE, EMPTY),
        gpu_first.GRAPHED: (gpu_first.BY_HAND, gpu_first.WITHOUT),
        gpu_first.LAST_LAYER: (f"{OURS}, output stored", "eager"),
        gpu_first.USERS: ("eager", f"{OURS}, graphed", "eager, graphed"),
        gpu_first.DECODERS: ("layer by layer",),
        gpu_first.MORE: ("eager",),
    }
    rows = []
    for item in gpu.FIRST:
        group = gpu_first.GROUP_OF[item.what]
        others = names[group]
        # Two works each, but for steps and layers.
        twice = group in (gpu_first.PARAMETERS, gpu_first.FRONT_END, gpu_first.MORE)
        for part in ("processor", "tile 2048")[: 2 if twice else 1]:
            name = item.what if group == gpu_first.USERS else item.name.replace("parameters of ", "")
            case = f"{name}, {part}"
            rows += _rows(group, case, dict.fromkeys((OURS, *others), 1234e-6))
    text = gpu_tables.text(rows, False)
    assert len(text) < MOST_CHARACTERS - 1000 and max(map(len, text.splitlines())) < 180


# The device, with a torch.cuda that records its calls.


class FakeCuda(SimpleNamespace):
    def __init__(self, **changes):
        self.calls, self.capturing, self.clock = [], False, 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                fake.calls.append("record")
                self.at = fake.clock

            def synchronize(self):
                fake.calls.append("wait")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def replay(self):
                fake.calls.append("replay")
                fake.clock += 1.0

        @contextlib.contextmanager
        def graph(graph, stream=None):
            assert isinstance(graph, CUDAGraph) and stream == "a stream"
            fake.calls.append("capture")
            fake.capturing = True
            yield
            fake.capturing = False

        super().__init__(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=graph,
            Stream=lambda: "a stream",
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda: fake.calls.append("synchronize"),
            empty_cache=lambda: fake.calls.append("empty_cache"),
            current_device=lambda: 0,
            get_device_properties=lambda i: SimpleNamespace(name="A Card", L2_cache_size=60 * 2**20),
            reset_peak_memory_stats=lambda: fake.calls.append("reset"),
            memory_allocated=lambda: 100,
            max_memory_allocated=lambda: 164,
            memory_stats=lambda: {"allocation.all.allocated": len(fake.calls)},
        )
        self.__dict__.update(changes)


def _cuda(failed=None, **changes):
    fake = FakeCuda(**changes)
    return fake, device.Cuda(failed, fake, torch.device("cpu"))


def _work(run, direction="forward", graphs=(OURS,), sets=3):
    return Work("op", "1×2", direction, {OURS: run}, graphs=frozenset(graphs), sets=sets)


def test_graphs_are_captured_after_a_warm_up_and_timed_by_events():
    fake, cuda = _cuda()

    def run():
        fake.calls.append("captured" if fake.capturing else "warm")
        return torch.ones(1)

    timed = cuda.prepare(_work(run), OURS, once=1e-3)
    # One call per set of inputs, though two would take long enough.
    warm = ["warm"] * 3 + ["synchronize"]
    assert fake.calls == [*warm, "capture", *["captured"] * 3, "synchronize"]
    assert (timed.clock, timed.calls) == ("graph", 3)
    fake.calls.clear()
    assert timed.seconds(timed.launch) == 1.0
    assert fake.calls == ["record", "replay", "record", "wait"]


def test_a_step_has_a_graph_and_short_calls_share_one():
    _, cuda = _cuda()
    run = lambda: None  # noqa: E731
    step = cuda.prepare(_work(run, "step", sets=1), OURS, once=1e-3)
    assert step.clock == "graph" and step.calls == 5  # replays
    assert cuda.prepare(_work(run), OURS, once=1e-9).calls % device.MOST_CALLS == 0
    assert cuda.prepare(_work(run, graphs=()), OURS, once=1e-3).clock == "host"
    by_processor = replace(_work(run, graphs=()), processor=True)
    assert cuda.prepare(by_processor, OURS, once=1e-3).clock == "processor"


def test_after_a_failed_capture_the_next_process_times_without_a_graph():
    def graph(graph, stream=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    fake, cuda = _cuda(graph=graph)
    work = _work(lambda: torch.ones(1))
    with pytest.raises(device.CaptureFailed, match="not permitted") as caught:
        measure(work, 0, cuda)
    assert caught.value.key == "op: fastvae"
    fake, cuda = _cuda({caught.value.key: caught.value.reason})
    timed = cuda.prepare(work, OURS, once=1e-3)
    assert timed.clock.startswith("events: RuntimeError: operation not permitted")
    assert "capture" not in fake.calls
    _, cuda = _cuda({"machine: copy": "nothing can be captured"})
    assert cuda.prepare(work, OURS, once=1e-3).clock == "events: nothing can be captured"


def test_a_lost_device_is_raised_and_not_tabulated():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fake, cuda = _cuda()

    def run():
        fake.synchronize = fail
        fail()

    with pytest.raises(device.DeviceLost, match="illegal memory access"):
        measure(_work(run), 0, cuda)
    # Other errors are rows.
    _, cuda = _cuda()
    assert "ZeroDivisionError" in measure(_work(lambda: 1 / 0), 0, cuda)[OURS].wrong


def test_memory_is_the_peak_that_a_run_adds():
    fake, cuda = _cuda()
    assert cuda.memory(lambda: fake.calls.append("run")) == (64, 2)
    assert fake.calls == ["synchronize", "reset", "run", "synchronize"]


def test_sets_of_inputs_exceed_the_cache():
    _, cuda = _cuda()
    assert cuda.cache == 60 * 2**20
    assert cuda.sets(10**12) == 2  # never the same inputs twice in a row
    assert 4 * cuda.cache <= 20 * 2**20 * cuda.sets(20 * 2**20) < 5 * cuda.cache
    assert cuda.sets(1) == device.MOST_SETS


# The processes.


def _measure_all(monkeypatch, tmp_path, ends):
    """Run the command with processes that end as given: each changes the state and returns a code."""
    ends = iter(ends)

    class Process:
        def __init__(self, command, cwd, env):
            state = gpu.State.load(command[-1])
            changes, self.code = next(ends)
            state.save(**{name: value(state) for name, value in changes.items()})

        def wait(self, timeout=None):
            if self.code is None and timeout is not None:
                raise subprocess.TimeoutExpired("it", timeout)
            return self.code

        def kill(self):
            pass

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    state = gpu.State(
        str(tmp_path / "state.json"), time.time() + 36_000, str(tmp_path), True, ["log_mean_exp"]
    )
    state.save()
    return gpu._measure_all(state), ends


def test_after_a_crash_another_process_continues(monkeypatch, tmp_path):
    (name,) = (item.name for item in gpu.plan(["log_mean_exp"], True))
    machines = {"machines": lambda state: {"float32": {}}}
    state, ends = _measure_all(
        monkeypatch,
        tmp_path,
        [
            ({"failed": lambda state: {"machine: copy": "why"}}, gpu.AGAIN),
            ({**machines, "failed": lambda state: {**state.failed, "op: peer": "why"}}, gpu.AGAIN),
            ({"began": lambda state: name}, -signal.SIGSEGV),
            ({"done": lambda state: [i.name for i in state.wanted()]}, 0),
        ],
    )
    assert next(ends, None) is None and set(state.failed) == {"machine: copy", "op: peer"}
    assert state.lost == {name: "ended its process, code -11"} and state.done == [] and state.left_out == []


def test_after_a_timeout_the_rest_is_skipped(monkeypatch, tmp_path):
    (name,) = (item.name for item in gpu.plan(["log_mean_exp"], True))
    machines = {"machines": lambda state: {"float32": {}}}
    one, other = ({**machines, "began": lambda state, n=n: n} for n in ("one", "other"))
    state, _ = _measure_all(monkeypatch, tmp_path, [(one, -signal.SIGALRM), (other, None)])
    assert state.lost == {"one": "timed out"} and state.left_out == ["other", name]
    state, _ = _measure_all(monkeypatch, tmp_path, [({}, 1)])
    assert list(state.lost) == [gpu.MACHINE] and state.left_out == [name]


class Troubled(device.StandIn):
    """Stand-in device that cannot capture one peer's backward pass, and then fails."""

    COMPILED = 0
    failed, lost_in = (), ""

    def prepare(self, work, name, once):
        key = f"{work.group}: {name}"
        if (work.direction, name) == ("forward+backward", "eager") and key not in self.failed:
            raise device.CaptureFailed(key, "not permitted")
        if work.group == self.lost_in:
            raise ZeroDivisionError
        return super().prepare(work, name, once)

    def check_usable(self, error):
        if isinstance(error, device.CaptureFailed):
            raise error
        if isinstance(error, ZeroDivisionError):
            raise device.DeviceLost("an illegal address")


def test_an_aborted_process_keeps_its_results(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "StandIn", Troubled)
    monkeypatch.setattr(gpu.signal, "alarm", lambda seconds: None)
    only = ["log_mean_exp", "gaussian_log_prob 64×196608, float32"]
    lme, gaussian = (item.name for item in gpu.plan(only, True))
    state = gpu.State(str(tmp_path / "state.json"), time.time() + 36_000, str(tmp_path), True, only)
    state.save()
    assert gpu._worker(state.path) == gpu.AGAIN
    state = gpu.State.load(state.path)
    assert state.failed == {"log_mean_exp: eager": "not permitted"} and not state.done
    before = report.read_csv(Path(state.csv))
    assert {r["direction"] for r in before} == {"forward"}

    monkeypatch.setattr(Troubled, "failed", state.failed)
    monkeypatch.setattr(Troubled, "lost_in", "gaussian_log_prob")
    assert gpu._worker(state.path) == gpu.AGAIN
    state = gpu.State.load(state.path)
    assert state.done == [lme] and state.lost == {gaussian: "DeviceLost: an illegal address"}
    rows = report.read_csv(Path(state.csv))
    # Recorded rows are not measured again, and the machine's measured speed is kept.
    assert rows[: len(before)] == before and len(rows) == 2 * len(before)
    assert len({r["copy_gb_per_s"] for r in rows}) == 1
    assert gpu._worker(state.path) == 0 and "has lost the device" in capfd.readouterr().out


def test_an_aborted_first_item_keeps_the_rows_before_it(tmp_path, monkeypatch):
    """The next process continues with the first items; a lost device leaves the defaults of the kernels."""
    from fastvae.kernels import common

    monkeypatch.setattr(gpu, "StandIn", Troubled)
    monkeypatch.setattr(gpu.signal, "alarm", lambda seconds: None)
    only = ["parameters of gaussian_log_prob", "last layer 50×64×200×784, bfloat16"]
    *given, layer = (item.name for item in gpu.plan(only, True, True))
    defaults = dict(common.LAUNCH)
    state = gpu.State(str(tmp_path / "state.json"), time.time() + 36_000, str(tmp_path), True, only, True)
    state.save()
    assert gpu._worker(state.path) == gpu.AGAIN
    state = gpu.State.load(state.path)
    assert state.first and state.done == given and [i.name for i in state.wanted()] == [layer]
    rows = report.read_csv(Path(state.csv))
    assert {r["group"] for r in rows} == {gpu_first.PARAMETERS}
    monkeypatch.setattr(Troubled, "failed", state.failed)
    assert gpu._worker(state.path) == 0
    after = report.read_csv(Path(state.csv))
    assert after[: len(rows)] == rows and {r["group"] for r in after[len(rows) :]} == {gpu_first.LAST_LAYER}

    monkeypatch.setattr(Troubled, "lost_in", gpu_first.PARAMETERS)
    state = gpu.State(str(tmp_path / "other.json"), time.time() + 36_000, str(tmp_path), True, given, True)
    state.save()
    assert gpu._worker(state.path) == gpu.AGAIN
    state = gpu.State.load(state.path)
    assert list(state.lost) == given[:1] and defaults == common.LAUNCH


def test_the_state_is_saved_and_loaded(tmp_path):
    state = gpu.State(str(tmp_path / "state.json"), 1.0, "out", False)
    state.save(done=["a"], failed={"b": "c"})
    assert gpu.State.load(state.path) == state
    assert json.loads(Path(state.path).read_text())["done"] == ["a"]


# The first minutes of a card.


def _place():
    return Place(device.StandIn(), versions={}, graphs=True)


@pytest.mark.parametrize("name, tile", [("gaussian", 1024), ("bernoulli", 2048)])
def test_launch_parameters_are_set_in_turns(name, tile):
    """Each implementation launches with its value, whichever came before; in the end all are as before."""
    from fastvae.kernels import common, launching, likelihood_flat
    from fastvae.kernels.likelihood import log_prob_kernel

    def planned(kernel):
        plans = (ready.call for calls in launching._caches for ready in calls.values())
        return {tuple(c.constants.get(f"BLOCK_{i}", 1) for i in "KBX") for c in plans if c.kernel is kernel}

    before = dict(common.LAUNCH), likelihood_flat.SAMPLES_FLAT
    with fastvae.use_backend("triton"):
        for work in gpu_first.parameters(name, (16, 64, 8), _place()):
            for way in [*work.run, *reversed(work.run)]:
                value = int(way.split(" ")[1]) if way != OURS else tile if "tile" in work.case else 2
                work.run[way]()
                if work.direction == "forward":
                    ((k, b, x),) = planned(log_prob_kernel)
                    assert k * b * x == value
                else:
                    ((k, *_),) = planned(likelihood_flat.log_prob_flat_backward_kernel)
                    assert k == value
            for check in work.check.values():
                check()
            assert len({bits() for bits in work.bits.values()}) == 1
    assert (dict(common.LAUNCH), likelihood_flat.SAMPLES_FLAT) == before


def test_a_failed_capture_by_graphed_ends_the_process(monkeypatch):
    def graphed(step):
        def run(x):
            raise RuntimeError("fastvae.graphed: the step could not be captured")

        return run

    monkeypatch.setattr(fastvae, "graphed", graphed)
    with pytest.raises(device.DeviceLost, match="could not be captured"):
        next(gpu_first.graphed_step("ELBO step", (1, 3, 5, 4), _place()))


def test_precision_of_products_is_that_asked_for_and_then_as_before():
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        works = gpu_first.last_layer(precision, (2, 3, 4, 5), _place())
        work = next(works)
        assert torch.get_float32_matmul_precision() == precision
        assert ("TF32" in work.case) == (precision == "high") and work.graphs == set(work.run)
        assert next(works, None) is None and torch.get_float32_matmul_precision() == before


# The tests on the device.

SPREAD = """
created: 8/8 workers
8 workers [5 items]
[gw1] [ 20%] PASSED tests/test_normal_diagonal.py::test_a[x-1]
[gw0] [ 40%] FAILED tests/test_normal_diagonal.py::test_b[a b]
[gw0] [ 60%] SKIPPED tests/test_torch.py::test_c
"""
PLAIN = """
collected 3 items
tests/test_x.py::test_a PASSED                                     [ 33%]
tests/test_x.py::test_b[a b] FAILED                                [ 66%]
tests/test_x.py::test_b[a b] ERROR                                 [ 66%]

=================================== FAILURES ===================================
_________________________________ test_b[a b] __________________________________
tests/test_x.py:3: in test_b
    assert 1 == 2
E   assert 1 == 2
=========================== short test summary info ============================
FAILED tests/test_x.py::test_b[a b] - assert 1 == 2
"""


def test_the_output_of_pytest_is_parsed():
    outcome = device_tests.read(SPREAD, -2, 200)
    assert outcome.counts == {"passed": 1, "failed": 1, "skipped": 1} and not outcome.passed
    assert "interrupted after 200 s, 3 of 5 done" in outcome.summary()
    assert "tests/test_normal_diagonal.py::test_b[a b]" in outcome.summary()
    outcome = device_tests.read(PLAIN, 1, 0)
    assert outcome.counts == {"passed": 1, "errors": 1} and outcome.collected == 3
    assert "assert 1 == 2" in outcome.text() and "short test summary" not in outcome.text()
    # Output cut off without a failure counts as passed, no output at all does not.
    assert device_tests.read(SPREAD.replace("FAILED", "PASSED"), -2, 200).passed
    nothing = device_tests.read("no module named pytest", 1, 0)
    assert not nothing.passed and "no module named pytest" in nothing.text()
    assert "pytest returned 1" in nothing.summary()


def test_tests_are_stopped_at_the_time_limit(tmp_path, monkeypatch):
    """A timeout ends the whole process group; the results so far are kept."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_compare.py").write_text(
        "import pathlib, time\n\n\ndef test_a():\n    pass\n\n\n"
        "def test_b():\n    pathlib.Path('begun').touch()\n    time.sleep(36000)\n"
    )

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != 4:
                return super().wait(timeout)
            # The four seconds end when the second test has begun, however busy the machine.
            while not (tmp_path / "begun").exists() and self.poll() is None:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(device_tests.subprocess, "Popen", Process)
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    outcome = device_tests.run(4, dry_run=True)
    assert outcome.counts == {"passed": 1} and outcome.seconds == 4 and outcome.collected == 2
