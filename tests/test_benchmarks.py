"""python -m benchmarks: wrong results are not timed, losses are shown, regressions are reported."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report
from benchmarks.measure import OURS, Machine, Work
from fastvae.ops.op import Op

MACHINE = Machine(copied=2e10, read=3e10, operations=5e10)
WHERE = {"device": "A Processor (R) 7", "threads": "2", "versions": "torch 9", "time": "2030-01-01 00:00 UTC"}


class Clock(measure.Host):
    """Host with simulated time, as given by the works, so that a busy machine changes nothing."""

    def __init__(self):
        self.now = 0.0

    def seconds(self, launch):
        before = self.now
        launch()
        return self.now - before


def _work(clock, peer_seconds=3e-3, wrong=False):
    turns = itertools.cycle((0.9, 1.0, 1.2))

    def ours():
        clock.now += 1e-3 * next(turns)
        return torch.empty(1000)

    def peer():
        clock.now += peer_seconds
        return torch.empty(1000), torch.empty(1000)

    def check():
        assert not wrong, "an error of 7"

    run = {OURS: ours, "peer": peer}
    target = {"peer": 2.0}
    return Work("group", "3×5", "step", run, {"peer": check}, bytes=10**6, operations=10**5, target=target)


def _rows(**options):
    clock = Clock()
    work = _work(clock, **options)
    return report.rows_of(work, measure.measure(work, budget=0, host=clock), MACHINE, WHERE)


def test_rows_have_times_ratios_and_the_share_of_the_limit():
    ours, peer = _rows()
    assert 900 <= float(ours["p20_us"]) <= float(ours["p50_us"]) <= float(ours["p80_us"]) <= 1200
    assert 2.5 <= float(peer["ratio_p20"]) <= float(peer["ratio"]) <= float(peer["ratio_p80"]) <= 3.4
    # A megabyte at 30 GB/s takes 33.3 µs, more than the operations do.
    assert ours["least_us"] == "33.3"
    assert float(ours["share_of_least"]) == pytest.approx(33.3 / float(ours["p50_us"]), rel=0.02)
    assert (ours["allocations"], peer["allocations"]) == ("1", "2")
    assert float(peer["peak_mib"]) == pytest.approx(8000 / 2**20, abs=0.01)
    assert not report.loses(peer) and not report.misses(peer)


def test_a_wrong_result_is_not_timed():
    rows = _rows(wrong=True)
    assert rows[1]["wrong"] == "AssertionError: an error of 7" and "p50_us" not in rows[1]
    assert "not timed: AssertionError: an error of 7" in report.table(rows)
    assert "not timed: group 3×5 step peer" in report.summary(rows)


def test_a_wrong_op_is_timed_neither_forward_nor_backward():
    def wrong(x):
        return x.square().sum(-1) + 1

    def unwritten(x):
        return torch.where(torch.empty_like(x).isnan(), torch.nan, x.square()).sum(-1)

    def works(ours):
        return measure.op_works(
            *("op", "3×5", lambda: (torch.randn(3, 5, requires_grad=True),)),
            {OURS: ours, "eager": lambda x: x.square().sum(-1), "peer": wrong},
            lambda outputs, x: x.square().sum(-1),
            sampling=False,
            elements=15,
            moved=(80, 160),
            operations=(15, 30),
            place=measure.Place(versions={}),
        )

    for work in works(lambda x: x.square().sum(-1)):
        results = measure.measure(work, budget=0)
        assert results["peer"].wrong.startswith("AssertionError: an error of 1") and not results[OURS].wrong
        assert len(results["eager"].seconds) and not len(results["peer"].seconds)
    # Unwritten memory is not a result.
    assert all("nan" in measure.measure(work, budget=0)[OURS].wrong for work in works(unwritten))


def test_sets_of_inputs_are_used_in_turn():
    class Two(measure.Host):
        def sets(self, moved):
            return 2

    seen = []

    def ours(x):
        seen.append(float(x.detach()[0]))
        return 2 * x

    place = measure.Place(Two(), versions={}, graphs=True)
    forward, both = measure.op_works(
        *("op", "3", lambda: (torch.randn(3, requires_grad=True),), {OURS: ours, "eager": lambda x: 2 * x}),
        lambda outputs, x: 2 * x,
        sampling=False,
        elements=3,
        moved=(24, 48),
        operations=(3, 6),
        place=place,
    )
    seen.clear()
    for _ in range(4):
        forward.run[OURS]()
    assert seen[0] != seen[1] and seen[:2] == seen[2:] and forward.sets == 2
    # A copy of as many bytes is measured too, but does not compete.
    assert measure.COPY in forward.run and forward.graphs == {OURS, "eager", measure.COPY}
    source = forward.run[measure.COPY]()
    assert 2 * source.nbytes == 24
    rows = report.rows_of(both, measure.measure(both, budget=0, host=Two()), MACHINE, WHERE)
    assert not any(report.loses(r) for r in rows if r["implementation"] == measure.COPY)


def test_times_of_a_part_are_scaled_to_the_whole():
    clock = Clock()

    def run():
        clock.now += 1e-2

    work = Work("g", "c", "evaluation", {OURS: run, "loop": run})
    work.part["loop"] = 0.1
    results = measure.measure(work, budget=0, host=clock)
    assert results["loop"].seconds == pytest.approx(0.1) and results[OURS].seconds == pytest.approx(0.01)


def test_the_time_of_a_base_is_subtracted():
    clock = Clock()

    def taking(seconds):
        def run():
            clock.now += seconds

        return run

    work = Work("g", "c", "step", {"link": taking(1e-3), OURS: taking(3e-3)}, base="link")
    results = measure.measure(work, budget=0, host=clock)
    assert set(results) == {OURS} and results[OURS].seconds == pytest.approx(2e-3)


def test_the_processor_s_time_is_counted(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(measure.time, "process_time", lambda: 7.0 * next(ticks))
    work = Work("g", "c", "step", {OURS: lambda: None}, processor=True)
    timed = measure.HOST.prepare(work, OURS, 1.0)
    assert timed.clock == "processor" and timed.seconds(timed.launch) == 7
    timed = measure.HOST.prepare(Work("g", "c", "step", {OURS: lambda: None}), OURS, 1.0)
    assert timed.clock == "host" and next(ticks) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_are_those_of_all_results(dtype):
    """A changed bit and exchanged elements change the number; the order of the calls does not."""
    sets = [torch.randn(7, 5, dtype=dtype) for _ in range(2)]
    turn = itertools.cycle(sets)
    bits = measure.bits_of(lambda: next(turn), 2)
    next(turn)
    assert measure.bits_of(lambda: next(turn), 2) == bits and len(bits) == 16
    next(turn)
    sets[0][3, 2] = torch.nextafter(sets[0][3, 2], sets[0].new_tensor(9.0))
    changed = measure.bits_of(lambda: next(turn), 2)
    assert changed != bits
    sets[1].copy_(sets[1].flip(0))
    assert measure.bits_of(lambda: next(turn), 2) not in (bits, changed)


def test_limits_of_a_machine_are_the_best_measured():
    assert Machine(1, 6, 2).best(Machine(3, 5, 1)) == Machine(3, 6, 2)


def test_report_marks_rows_slower_than_a_peer():
    rows = _rows(peer_seconds=1e-4)
    assert report.loses(rows[1]) and report.misses(rows[1])
    assert "◄ faster than fastvae" in report.table(rows)
    text = report.summary(rows)
    assert "a peer is faster than fastvae: 1" in text and "targets met: 0 of 1" in text


def test_regressions_beyond_noise_are_reported(tmp_path):
    rows = _rows()
    report.write_csv(rows, tmp_path / "x.csv")
    recorded = report.read_csv(tmp_path / "x.csv")
    assert [r["p50_us"] for r in recorded] == [r["p50_us"] for r in rows]
    assert report.got_slower(rows, recorded) == []

    def changed(factor):
        keys = ("ratio", "ratio_p20", "ratio_p80")
        return [r | {k: str(factor * float(r[k])) for k in keys} for r in rows]

    assert report.got_slower(changed(0.8), recorded) == []
    (line,) = report.got_slower(changed(0.5), recorded)
    assert line.startswith("group 3×5 step peer: ")


def test_every_op_has_a_benchmark():
    """An op has the same name in every layer, the benchmarks included."""
    root = Path(__file__).parent.parent

    def has_op(name):
        module = importlib.import_module(f"fastvae.ops.{name}")
        classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Op)]
        return any(v.__module__ == module.__name__ for v in classes)

    files = (p.stem for p in (root / "fastvae/ops").glob("*.py") if not p.stem.startswith("_"))
    # gamma.py wraps torch's own draws in an op.
    ops = [name for name in files if name not in ("op", "gamma") and has_op(name)]
    assert len(ops) >= 8
    for name in ops:
        assert callable(importlib.import_module(f"benchmarks.{name}").works)


def test_recorded_results_can_be_read():
    paths = list((Path(measure.__file__).parent / "results").glob("*.csv"))
    assert paths
    for path in paths:
        rows = report.read_csv(path)
        # Columns may have been added since.
        assert (
            rows
            and {"clock", "bits"} >= set(report.COLUMNS) - set(rows[0])
            and set(rows[0]) <= set(report.COLUMNS)
        )
        assert not [r for r in rows if r["wrong"] and r["implementation"] == OURS]


def test_the_front_end_is_timed_by_the_given_clock():
    """A round times the calls alone, and the link's time is subtracted."""
    from benchmarks import frontend

    now = [0]

    def taking(microseconds):
        def run():
            now[0] += 1000 * microseconds

        return run

    runs = {"link": taking(2), "a": taking(7)}
    assert frontend.measure(runs, 3, 4, taking(0), lambda: now[0]) == {"a": [5.0] * 3}


def test_the_picture_times_every_case(monkeypatch):
    """Every case is compiled and timed, here by stand-ins."""
    from benchmarks import frontend, picture

    names = ("link", frontend.OURS, "eager", "torch.compile", "torch.compile, fallback_random")
    seen = []

    def implementations(case, likelihood, inputs, compiled):
        assert compiled and inputs.x.shape == (case.batch, case.pixels)
        seen.append((case, likelihood))
        return dict.fromkeys(names, lambda: None)

    monkeypatch.setattr(frontend, "implementations", implementations)
    found = picture.times(3)
    assert len(found) == len(seen) == len(frontend.CASES) * len(frontend.LIKELIHOODS)
    assert all(set(columns) == set(picture.IMPLEMENTATIONS) for columns in found.values())


def test_the_table_of_the_picture(tmp_path, monkeypatch, capsys):
    """The measurements are printed and written."""
    from benchmarks import picture

    monkeypatch.setattr(picture, "TABLE", tmp_path / "front.csv")
    monkeypatch.setattr(picture, "DRAWS", (50, 200))
    case = dict.fromkeys(picture.IMPLEMENTATIONS, (1.0, 2.0, 4.0))
    monkeypatch.setattr(picture, "times", lambda rounds: {"ELBO, 8×9": case})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(picture, "keep_memory", lambda: None)
    assert picture.main(["--rounds", "1"]) == 0
    text = (tmp_path / "front.csv").read_text("utf-8")
    assert 'microseconds,"ELBO, 8×9",fastvae,1.00,2.00,4.00\n' in text
    assert re.search(r"^MiB,200,eager PyTorch,,\d+\.\d,$", text, re.M)
    printed = capsys.readouterr().out
    assert "fastvae 2 (1 to 4)" in printed and re.search(
        r"eager PyTorch: K=50 \d+ MiB, K=200 \d+ MiB", printed
    )


def test_estimators_are_compared_with_the_truth(tmp_path, monkeypatch, capsys):
    """Every estimator is a row of both tables, and the written numbers are the measured ones."""
    pytest.importorskip("sklearn")
    from docs.experiments import estimators

    def off_by_two(model, k, seed):
        value = model.log_px - 2
        return estimators.Estimate(value, value - 1, value + 1, 3 * k)

    monkeypatch.setitem(estimators.ESTIMATORS, "off by two", off_by_two)
    monkeypatch.setattr(estimators, "EXACT", [(2, 0.7, 0), (3, 1, 1.5)])
    monkeypatch.setattr(estimators, "COMPARED", [(2, 0.7, 0), (3, 1, 1.5)])
    path = tmp_path / "estimators.md"
    assert estimators.main(["--quick", "--k", "30", "--names", "D = 2", "--out", str(path)]) == 0
    text = path.read_text()
    assert "| D = 2, σ of q × 0.7 |" in text and "D = 3" not in text
    assert "trained with ELBO |" in text and "trained with IWAE-50 |" in text
    rows = [line.split("|") for line in text.splitlines() if "off by two" in line]
    assert len(rows) == 3
    for row in rows:
        assert row[4].strip() == "−2.0000 ± 0.0000" and row[6].strip() == "0.0" and row[9].strip() == "90"


def test_truth_of_the_exact_model():
    """Every weight is p(x) for the exact posterior."""
    from docs.experiments import estimators

    model = estimators.linear_gaussian(3, 1, 0, 5)
    found = estimators.marginal(model, 2, 0)
    torch.testing.assert_close(found.log_px, model.log_px, rtol=1e-12, atol=1e-12)
