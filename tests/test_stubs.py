"""Stub of the declared ops: it has the signature and docstring of each."""

from __future__ import annotations

import ast

import pytest

from fastvae import ops
from fastvae.likelihoods.declared import DECLARED

tools = pytest.importorskip("tools.stubs", reason="a checkout has tools")


def test_the_stub_is_that_of_the_declarations():
    assert tools.STUB.read_text() == tools.stub(), "run python -m tools.stubs"


def test_every_op_of_the_stub_has_its_arguments_and_docstring():
    functions = {n.name: n for n in ast.parse(tools.stub()).body if isinstance(n, ast.FunctionDef)}
    assert functions.keys() == {f"{name}_log_prob" for name in DECLARED}
    arguments = ast.unparse(functions["gaussian_log_prob"].args)
    assert arguments == "x: Tensor, mean: Tensor, logvar: Tensor | float, *, mask: Tensor | None=None"
    for name, function in functions.items():
        assert ast.get_docstring(function, clean=False) == getattr(ops, name).__doc__


def test_check_writes_nothing(tmp_path, monkeypatch, capsys):
    stub = tmp_path / "fastvae" / "ops" / "_declared.pyi"
    stub.parent.mkdir(parents=True)
    stub.write_text("old")
    monkeypatch.setattr(tools, "STUB", stub)
    assert tools.main(["--check"]) == 1 and stub.read_text() == "old"
    assert tools.main([]) == 0 and stub.read_text() == tools.stub()
    assert capsys.readouterr().out.split() == ["fastvae/ops/_declared.pyi"] * 2
    assert tools.main(["--check"]) == 0
