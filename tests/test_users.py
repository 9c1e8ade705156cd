"""python -m benchmarks users: both losses of each case are the same function, and every case is measured."""

from __future__ import annotations

import copy

import pytest
import torch

import benchmarks.__main__
from benchmarks import report, users
from benchmarks.measure import COMPILE, OURS, measure
from benchmarks.users import CASES
from benchmarks.users.case import check, losses, step_of, works

# Relative to the sum of the loss's terms in float64: a thousand terms, each of tens of roundings of 1e-16.
ROUNDING = 1e-11
# scvi-tools adds 1e-8 to means and inverse dispersions under the logarithms of each count.
OWN_EPSILON = {"SCVI, 2000 genes": 1e-5}
NAMES = [case.name for case in CASES]


def _tiny(case):
    torch.manual_seed(1)
    model, batch = case.build(**case.tiny)
    return copy.deepcopy(model).to(torch.get_default_dtype()).eval(), _cast(batch)


def _cast(batch):
    """Return the batch's floating-point tensors in the default dtype."""
    if isinstance(batch, torch.Tensor):
        return batch.to(torch.get_default_dtype()) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: _cast(part) for name, part in batch.items()}
    return tuple(_cast(part) for part in batch)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_both_losses_are_the_same_function(case, float64):
    """Value and gradients agree in float64 for the same noise, the constants included."""
    model, batch = _tiny(case)
    theirs, ours = losses(case, model, batch, 5)
    tolerance = OWN_EPSILON.get(case.name, ROUNDING)
    assert float((theirs - ours).detach().abs()) <= tolerance * (1 + abs(float(theirs.detach())))
    if not case.trains:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (theirs, ours)), strict=True):
        assert float((a - b).norm()) <= 100 * tolerance * (1e-3 + float(a.norm()))
    assert sum(p.numel() for p in parameters) > 0


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_case_is_measured(case):
    """Each implementation's training step is checked, timed and profiled."""
    (work,) = works([case], tiny=True, compiled=False)
    results = measure(work, budget=0)
    assert list(results) == [OURS, "eager"]
    assert not any(result.wrong for result in results.values()), results
    assert all(len(result.seconds) and result.peak_bytes for result in results.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.trains], ids=lambda case: case.name)
def test_a_step_trains_every_parameter(case):
    model, batch = _tiny(case)
    model.train()
    before = copy.deepcopy(model)
    step = step_of(model, lambda: case.ours(model, batch))
    assert step().isfinite()
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) != a.requires_grad, name


def test_a_wrong_loss_is_not_timed():
    """A loss without its factor, and one with another gradient of the same value, are found."""
    case = users.images.BCE
    wrong = copy.copy(case)
    object.__setattr__(wrong, "ours", lambda model, batch: 1.01 * case.ours(model, batch))
    other = copy.copy(case)
    object.__setattr__(
        other, "ours", lambda m, b: 1.1 * case.ours(m, b) - 0.1 * case.ours(m, b).detach()
    )  # fmt: skip
    model, batch = _tiny(case)
    check(case, model, batch)
    with pytest.raises(AssertionError, match="the loss is"):
        check(wrong, model, batch)
    with pytest.raises(AssertionError, match="differs by|the loss is"):
        check(other, model, batch)


def _rows(case, ratio, wrong=""):
    common = {"group": "users", "case": case, "direction": "step", "peak_mib": "3.25", "wrong": wrong}
    ours = {"implementation": OURS, "p20_us": "1900", "p50_us": "2000", "p80_us": "2600", "ratio": "1.000"}
    peers = [
        {
            "implementation": name,
            "ratio": f"{r:.3f}",
            "ratio_p20": f"{r - 0.1:.3f}",
            "ratio_p80": f"{r + 0.2:.3f}",
        }
        for name, r in (("eager", ratio), (COMPILE, 2 * ratio))
    ]
    return [common | row for row in (ours, *peers)]


def test_the_table_shows_losing_rows_first():
    text = users.table([*_rows("wins", 1.5), *_rows("loses", 0.6), *_rows("wrong", 9.0, "an error")])
    _, first, second, third = text.splitlines()
    cells = "loses 2.00 ms (1.90 to 2.60) 0.60 (0.50 to 0.80) 1.20 (1.10 to 1.40) 3.2 / 3.2"
    assert " ".join(first.split()) == cells
    assert second.startswith("wins ") and third.startswith("wrong ") and "not timed: an error" in third
    lines = users.table(_rows("loses", 0.6), markdown=True).splitlines()
    assert (
        lines[0].startswith("| training step | fastvae |") and lines[1] == "| --- | --- | --- | --- | --- |"
    )
    assert lines[2].startswith("| loses | 2.00 ms (1.90 to 2.60) | **0.60** (0.50 to 0.80) | 1.20 ")


def test_the_command_writes_and_reads_its_rows(tmp_path, monkeypatch, capsys):
    """The rows replace those of the same cases; --recorded prints them without measuring."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(users, "keep_memory", lambda: None)
    monkeypatch.setattr(users, "measured", lambda cases, *_: [r for c in cases for r in _rows(c.name, 0.7)])
    arguments = ["users", "--out", str(tmp_path), "--threads", "3"]
    assert benchmarks.__main__.main([*arguments, "--cases", "2", "3"]) == 0
    (path,) = tmp_path.glob("*-3-threads.csv")
    other = {"group": "rsample_kl", "case": NAMES[1]}
    report.write_csv([*report.read_csv(path), other], path)
    assert benchmarks.__main__.main([*arguments, "--cases", "2"]) == 0
    groups = [r["group"] for r in report.read_csv(path)]
    assert groups.count("users") == 6 and groups.count("rsample_kl") == 1
    capsys.readouterr()
    assert benchmarks.__main__.main([*arguments, "--recorded", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "3 threads" in printed and printed.count("**0.70**") == 2
    assert benchmarks.__main__.main([*arguments[:-1], "4", "--recorded"]) == 2
    with pytest.raises(SystemExit):
        benchmarks.__main__.main([*arguments, "--cases", "99"])
