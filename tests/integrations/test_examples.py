"""Examples of docs/examples that need no other library's model: they run, and print what the docs say."""

from __future__ import annotations

import re

from . import run_example as run


def number(label: str, text: str) -> float:
    """Return the number after a label."""
    return float(re.search(rf"{re.escape(label)}\s+(-?[\d.]+)", text)[1])  # type: ignore[index]


def test_missing_data():
    """MIWAE is better than the mean, and not-MIWAE better than MIWAE where large values are missing."""
    text = run("missing_data")
    at_random, by_size = text.split("missing: above")
    assert number("MIWAE", at_random) < 0.65 * number("mean of the column", at_random)
    assert (
        number("not-MIWAE", by_size) < 0.9 * number(" MIWAE", by_size) < number("mean of the column", by_size)
    )


def test_mutants():
    """Shared noise makes fitness more exact, and its standard error is the spread."""
    text = run("mutants")
    independent, shared = number("independent", text), number("  shared", text)
    assert shared < 0.6 * independent
    assert 0.5 < number("expected of shared", text) / shared < 2
