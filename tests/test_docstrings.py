"""Public docstrings: every argument is documented in full, from one table."""

from __future__ import annotations

import inspect
import re

import pytest

import fastvae

tools = pytest.importorskip("tools.docstrings", reason="a checkout has tools")

FUNCTIONS = {
    **{
        name: getattr(fastvae, name) for name in fastvae.__all__ if inspect.isfunction(getattr(fastvae, name))
    },
    **{f"audit.{name}": getattr(fastvae.audit, name) for name in ("ais", "bdmc", "lattice")},
}


def test_docstrings_match_the_table():
    assert not tools.outdated(), "run python -m tools.docstrings"


def test_changed_texts_are_copied_into_docstrings():
    source = (
        'def f(a):\n    """Do.\n\n    Args:\n        a: old\n            text.\n        b: kept.\n\n    """\n'
    )
    table = tools.read_table("[shared]\na: new\n    text.\n[f.py f]\na: + More.\n[f.py g]\nc: = f.a")
    assert table["f.py", "g"] == {"a": "new text.", "c": "new text. More."}
    expected = source.replace("a: old\n            text.", "a: new text. More.")
    assert tools.completed(source, "f", table["f.py", "f"]) == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented_in_place(name):
    """No argument is missing, and none is described by a reference to another function alone."""
    documented = inspect.getdoc(FUNCTIONS[name])
    entries = dict(re.findall(r"^    (\w+): (.*)$", documented.partition("Args:")[2], re.M))
    assert set(inspect.signature(FUNCTIONS[name]).parameters) <= set(entries)
    assert not [n for n, text in entries.items() if text.startswith(("as in", "like in", "see "))]
