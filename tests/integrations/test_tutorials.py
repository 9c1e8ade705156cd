"""Tutorials whose numbers stand on pages of the documentation: methods are in the order stated there."""

from __future__ import annotations

import re

import pytest

from . import ROOT, run_tutorial

pytestmark = pytest.mark.usefixtures("one_thread")


def number(label: str, text: str) -> float:
    """Return the number after a label."""
    return float(re.search(rf"{re.escape(label)}:?\s+(-?[\d.]+)", text)[1])  # type: ignore[index]


def test_missing_data():
    """MIWAE is better than the mean, and not-MIWAE better than MIWAE where dark pixels are missing."""
    names, _ = run_tutorial("3_data/12_missing_data")
    at_random, by_size = names["random_errors"], names["size_errors"]
    assert at_random["MIWAE"] < 0.8 * at_random["mean of the pixel"]
    assert by_size["not-MIWAE"] < 0.8 * by_size["MIWAE"] < by_size["mean of the pixel"]
    page = (ROOT / "docs" / "missing_data.md").read_text("utf-8").replace("*", "")
    rows = re.findall(r"^\| ([\w -]+) \| (0\.\d\d)? ?\| (0\.\d\d) \|$", page, re.M)
    assert {name for name, *_ in rows} == set(by_size)
    for name, first, second in rows:
        assert not first or abs(float(first) - at_random[name]) < 0.02
        assert abs(float(second) - by_size[name]) < 0.03


def test_mutants():
    """Shared noise makes scores more exact, and its standard error is the spread."""
    names, text = run_tutorial("3_data/15_mutants")
    independent, shared = number("independent noise", text), number("\nshared noise", text)
    assert shared < 0.6 * independent
    assert 0.5 < number("standard error with shared noise", text) / shared < 2
    page = " ".join((ROOT / "docs" / "mutants.md").read_text("utf-8").replace("*", "").split())
    stated = re.search(
        r"by (0\.\d+) nats with independent noise and by (0\.\d+) with shared noise, "
        r"whose own standard errors say (0\.\d+)",
        page,
    )
    expected = number("standard error with shared noise", text)
    for value, found in zip(stated.groups(), (independent, shared, expected), strict=True):  # type: ignore[union-attr]
        assert 0.8 < float(value) / found < 1.25
    score = {name: names["spearman"](values, names["true"]) for name, values in names["found"].items()}
    assert score["VAE"] > score["frequency at the site"] + 0.1
