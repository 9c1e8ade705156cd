"""``python -m tools.stubs``: write ``fastvae/ops/_declared.pyi``, which editors and type checkers read.

``fastvae.ops.<likelihood>_log_prob`` is defined when its likelihood is declared, which only a running program
sees. The stub has the signature and docstring of each; ``--check`` compares.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvae import ops
from fastvae.likelihoods.declared import DECLARED

STUB = Path(__file__).parents[1] / "fastvae" / "ops" / "_declared.pyi"
_HEADER = '''"""Ops of the declared likelihoods, written by ``python -m tools.stubs``."""

from torch import Tensor

'''


def stub() -> str:
    """Return the source of the stub, as ``ruff format`` would write it."""
    names = sorted(f"{name}_log_prob" for name in DECLARED)
    exported = "".join(f'    "{name}",\n' for name in names)
    functions = "\n".join(_function(getattr(ops, name)) for name in names)
    return f"{_HEADER}__all__ = [\n{exported}]\n\n{functions}"


def _function(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    named = [p.kind is p.KEYWORD_ONLY for p in parameters]
    lines = [str(p) for p in parameters]
    if any(named):
        lines.insert(named.index(True), "*")
    arguments = "".join(f"    {line},\n" for line in lines)
    result = inspect.formatannotation(signature.return_annotation)
    head = f"def {function.__name__}(\n{arguments}) -> {result}:".replace("torch.Tensor", "Tensor")
    return f'{head}\n    """{function.__doc__}"""\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stubs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="name the stub if it differs; write nothing")
    options = parser.parse_args(arguments)
    source = stub()
    if STUB.exists() and STUB.read_text() == source:
        return 0
    print(STUB.relative_to(STUB.parents[2]))
    if not options.check:
        STUB.write_text(source)
    return 1 if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
