"""Model that predicts kernel times: traces of known duration, and the command."""

from __future__ import annotations

import csv
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tools import gpu_tables, predict  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
WARPS, LENGTH, STARTS = 8, 400, 150 * 8
# The completion of the last instructions is not waited for.
LAST = 10


def instruction(text, stall=1, wait=0, write=7, read=7):
    return predict.Instruction.of(text, stall | write << 5 | read << 8 | wait << 11)


def cycles(issued, warps=WARPS, total=WARPS, scale=1.0, bandwidth=1e9):
    return predict.simulate(issued, warps, total, scale, bandwidth)


def test_control_codes_are_parsed():
    found = instruction("LDG.E.128 R4, [R2]", stall=5, wait=0b101, write=2, read=3)
    assert (found.stall, found.wait, found.write, found.read) == (5, 0b101, 2, 3)
    assert (found.pipe, found.bytes) == ("memory", 16)
    assert [instruction(t).pipe for t in ("MUFU.EX2 R1", "FFMA R1", "IMAD.WIDE R1", "LOP3.LUT R1")] == [
        *("special", "float", "wide", "integer"),
    ]


@pytest.mark.parametrize(
    "text, busy", [("FFMA R0", 1), ("LOP3.LUT R0", 2), ("IMAD R0", 2), ("MUFU.EX2 R0", 8)]
)
def test_pipes_limit_throughput(text, busy):
    """A pipe takes an instruction per ``busy`` cycles for any number of warps; floats have two pipes."""
    least = WARPS * LENGTH * busy
    assert least - LAST <= cycles([instruction(text)] * LENGTH) <= least + STARTS


def test_a_single_warp_waits_for_its_stall_counts():
    found = cycles([instruction("FFMA R0", stall=4)] * LENGTH, 1, 1)
    assert 4 * LENGTH - LAST <= found <= 4 * LENGTH


def test_instructions_wait_for_the_barrier_of_a_load():
    pair = [instruction("LDG.E R0", write=0), instruction("FFMA R1", wait=1)]
    apart = [instruction("LDG.E R0", write=0), instruction("FFMA R1", wait=2)]
    assert cycles(pair * 20, 1, 1) >= 20 * predict.LATENCY
    assert cycles(apart * 20, 1, 1) < 20 * predict.LATENCY / 5


def test_bandwidth_limits_loads():
    """Loads alone are limited by the required bytes, independent of the bytes in the trace."""
    loads = [instruction("LDG.E.128 R0", write=0), instruction("FFMA R1", wait=1)] * 50
    moved = 0.5 * WARPS * 3 * 50 * 32 * 16
    found = cycles(loads, WARPS, 3 * WARPS, scale=0.5, bandwidth=2.0)
    assert moved / 2.0 <= found <= 1.1 * moved / 2.0 + STARTS + predict.LATENCY


def test_loops_run_once_per_step_of_the_launch():
    texts = ["MOV R0", "FFMA R1", "FFMA R2", "@P0 BRA `(.L_x_1)", "EXIT"]
    code = [instruction(t.removeprefix("@P0 ")) for t in texts]
    issued = [i.text for i in predict.trace(code, {".L_x_1": 1}, 3.2)]
    assert issued == [code[0].text, *[i.text for i in code[1:4]] * 3, "EXIT"]
    assert predict.trace(code[:2], {}, 5) == code[:2]


def test_nested_loops_run_as_often_as_their_launch_says():
    texts = [
        "MOV",
        "FFMA R1",
        "FFMA R2",
        "@P0 BRA `(.L_x_2)",
        "@P0 BRA `(.L_x_1)",
        "FADD",
        "@P0 BRA `(.L_x_3)",
    ]
    code = [instruction(t.removeprefix("@P0 ")) for t in texts]
    labels = {".L_x_1": 1, ".L_x_2": 2, ".L_x_3": 5}
    inner = [code[2], code[3]] * 3
    expected = [code[0], *[code[1], *inner, code[4]] * 2, *code[5:] * 4]
    assert predict.trace(code, labels, 1, [2, 3, 4]) == expected
    with pytest.raises(ValueError, match="the code has 3 loops, and TRIPS 1"):
        predict.trace(code, labels, 1, [2])


def test_predictions_agree_with_measurements(tmp_path):
    """A kernel's prediction is within a factor of two of a GPU's measurement, or the model is useless."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "predicted.csv"
    command = [sys.executable, "-m", "tools.predict", "bernoulli.*1024×784, float32 forward$"]
    run = subprocess.run([*command, "--out", out], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (row,) = csv.DictReader(out.open())
    assert row["group"] == "bernoulli_log_prob" and row["date"]
    assert 4 * 50 * 1024 * 784 < int(row["bytes"]) < 1.1 * 4 * 51 * 1024 * 784
    (took, _) = predict.measured(predict.RESULTS / "gpu-nvidia-h100-80gb-hbm3.csv")[
        tuple(row[name] for name in ("group", "case", "direction"))
    ]
    assert 0.5 < float(row["h100_us"]) / took < 2
    assert float(row["h200_us"]) <= float(row["h100_us"])
    assert "1 of them measured" in run.stdout


def test_measurements_are_printed_with_their_predictions(tmp_path):
    path = tmp_path / "predicted.csv"
    values = ["some_op", "1×2, float32", "forward", 32, 100, "50.0", "40.0", "0.9", "2030-01-01"]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([predict.COLUMNS, values])
    row = {"group": "some_op", "case": "1×2, float32", "direction": "forward", "implementation": "fastvae"}
    text = gpu_tables.predictions([{**row, "p50_us": "40.0", "device": "NVIDIA H100 80GB HBM3"}], path)
    assert "some_op 1×2, float32 forward" in text and "40.0" in text and "50.0" in text and "+25%" in text
    assert gpu_tables.predictions([{**row, "p50_us": "40.0", "device": "Another card"}], path) == ""
