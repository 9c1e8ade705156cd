"""Every Triton kernel compiles for NVIDIA and AMD without a GPU, as it is launched, and does not spill."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def reports():
    # A process of its own: the other tests import triton with TRITON_INTERPRET set, and then it cannot
    # compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def _spilling(reports):
    return [f"{r['target']}: {r['launch']}: {r['spills']}" for r in reports if r["spills"]]


def test_a_planted_spill_is_flagged(reports):
    planted = [r for r in reports if r["kernel"] == "planted_spill"]
    assert {r["target"] for r in planted} == set(TARGETS)
    assert len(_spilling(planted)) == len(TARGETS)


def test_nothing_spills(reports):
    assert not _spilling(r for r in reports if r["kernel"] != "planted_spill")


def test_every_kernel_is_compiled_for_every_target(reports):
    names = {
        line.split("(")[0].removeprefix("def ")
        for file in (ROOT / "kernels").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(names) >= 10
    for target in TARGETS:
        assert names <= {r["kernel"] for r in reports if r["target"] == target}


def test_loads_are_wide(reports):
    """Contiguous float32 rows are read 16 bytes at a time, unless a mask or an offset hides the alignment."""
    for r in reports:
        # A tile of [4, 32] has no more than one element of a row a thread.
        if r["target"] != "gfx942" and "float32" in r["launch"] and "[50, 4, 32]" not in r["launch"]:
            assert any(".v4" in load for load in r["loads"]), r
