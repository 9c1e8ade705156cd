"""Python blocks of the README and of the documentation's pages run, in order, in one namespace a page."""

from __future__ import annotations

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
