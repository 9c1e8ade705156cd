"""A few hundred fixed cases of the differential fuzzer; ``python -m tests.fuzz`` runs more."""

from __future__ import annotations

import pytest
import torch

from .fuzz import case as cases
from .fuzz import check
from .fuzz.__main__ import run

COUNT = 110


@pytest.mark.parametrize("seed", [101, 102])
def test_random_calls_equal_the_formulas(seed):
    """Values, gradients, shapes and dtypes equal the formulas'; a crash of the separate process fails."""
    report = run(seed, 0, COUNT)
    assert not report.failures, "\n".join(f"--seed {seed} --index {i}: {text}" for i, text in report.failures)
    assert report.counts["ok"] > COUNT // 3


def test_a_wrong_result_is_detected(monkeypatch):
    """The fuzzer's comparison detects a value or gradient off by a few roundings more than allowed."""
    usual = next(c for c in map(lambda i: cases.draw(7, i), range(3000)) if _is_plain(c))
    assert check.outcome(usual) == ("ok", "")
    right = check.results_of
    for name in ("value", "grad q0"):
        monkeypatch.setattr(
            check, "results_of", lambda built, n=name: {**(r := right(built)), n: r[n] * (1 + 1e-4)}
        )
        kind, text = check.outcome(usual)
        assert kind == "failed" and text.startswith(name)


def _is_plain(case: cases.Case) -> bool:
    wide = {*case.q_dtypes, case.x_dtype, case.net_dtype, case.prior_dtype} == {torch.float32}
    plain = not (case.frozen or case.compiled or case.batch < 2)
    return wide and plain and (case.entry, case.q, case.backend) == ("iwae", "pair", "native")
