"""Python blocks of the README and of the documentation's pages run, in order, in one namespace a page."""

from __future__ import annotations

import csv
import doctest
import re
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", *(f"docs/start/{p}.md" for p in ("quickstart", "faq"))]
PAGES += [f"docs/guide/{p}.md" for p in ("arguments", "evaluation", "last_layer", "ops", "numbers")]
PAGES += ["docs/theory.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page):
    file = ROOT / page
    text = file.read_text("utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M))
    namespace = {"__name__": "page"}
    for block in blocks:
        # Blank lines in front give tracebacks the page's line numbers.
        lines = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines + block[1], str(file), "exec"), namespace)
    assert blocks or page.endswith("faq.md")


def words(page):
    return " ".join((ROOT / page).read_text("utf-8").split())


def table(name):
    with (ROOT / "docs" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_of_the_overhead():
    median = {
        (row["implementation"], row["case"]): float(row["median"])
        for row in table("front")
        if row["quantity"] == "microseconds"
    }
    ours = {case: value for (which, case), value in median.items() if which == "fastvae"}
    ratios = {
        other: [median[other, case] / value for case, value in ours.items()]
        for other in ("eager PyTorch", "torch.compile")
    }
    eager, compiled = ratios["eager PyTorch"], ratios["torch.compile"]
    text = words("docs/benchmarks.md")
    assert f"{min(eager):.1f} to {max(eager):.1f} times as fast as the same lines of eager PyTorch" in text
    assert f"{min(compiled):.2f} to {max(compiled):.2f} times as fast as torch.compile" in text


def test_numbers_of_the_last_layer():
    at = {
        row["implementation"]: (float(row["MiB"]), float(row["seconds"]))
        for row in table("head")
        if row["K"] == "500"
    }
    mib, seconds = at["fastvae, fused head"]

    def ratios(which):
        return [f"{a / b:.1f}" for a, b in zip(at[which], (mib, seconds), strict=True)]

    eager, compiled, stored = map(ratios, ("eager PyTorch", "torch.compile", "fastvae, output stored"))
    expected = (
        f"At K = 500: {mib:.0f} MiB and {1e3 * seconds:.0f} ms; eager PyTorch takes {eager[0]} times the "
    )
    expected += (
        f"memory and {eager[1]} times the time, torch.compile {compiled[0]} and {compiled[1]}, fastvae "
    )
    expected += f"with the output stored {stored[0]} and {stored[1]} times."
    assert expected in words("docs/guide/last_layer.md")


def test_numbers_of_the_proposals():
    """Draws from q miss half a nat, the fit takes about 30 ms, and refined draws agree with annealing."""
    rows = {(row["method"], int(row["draws or steps"])): row for row in table("proposals")}
    log_px = {key: float(row["log p(x)"]) for key, row in rows.items()}
    assert 0.45 < log_px["refined", 20_000] - log_px["posterior", 20_000] < 0.65
    assert abs(log_px["refined", 5000] - log_px["AIS", 1000]) < 0.02
    assert 0.02 < float(rows["refined", 500]["CPU seconds per image"]) < 0.045
    assert "draws from q miss half a nat" in words("README.md")
    assert "the fit takes about 30 ms an image" in words("docs/proposals.md")


def test_numbers_of_the_demo():
    log_px = {row["model"]: float(row["log p(x)"]) for row in table("demo")}
    low, high = re.search(
        r"IWAE-50 beats the ELBO by ([\d.]+) to ([\d.]+) nats", words("docs/start/install.md")
    ).groups()
    assert float(low) <= log_px["IWAE-50"] - log_px["ELBO"] <= float(high)


def test_the_report_of_an_evaluation():
    """The report in the guide is that of the picture's data."""
    report = str(fastvae.Evaluation.load(ROOT / "docs" / "evaluation.npz"))
    assert " ".join(report.split()) in words("docs/guide/evaluation.md")


@pytest.mark.parametrize("name", ["front", "head", "proposals", "demo", "evaluation", "published"])
def test_pictures_are_drawn_from_their_data(name, tmp_path):
    """In a light and a dark variant, of equal size, as docs/ has them."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from docs import pictures

    for path in pictures.save(name, tmp_path):
        header = path.read_bytes()[:24]
        assert header == (ROOT / "docs" / path.name).read_bytes()[:24]  # the size, too


def test_the_readme_is_short():
    """The README is read in three minutes; all else is in the documentation."""
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900


@pytest.mark.parametrize("name", fastvae.ops.__all__)
def test_every_op_has_an_example_that_runs(name):
    """The likelihoods' functions are defined at run time, where doctest does not look for them."""
    op = getattr(fastvae.ops, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(op, name, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
