"""Blocks of statements, the unit of recordings and of the choice of tests.

A block's key is its file, its function and its number in that function, so changes elsewhere in the file do
not affect it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BODIES = ("body", "orelse", "finalbody")


class Block(NamedTuple):
    """The statements of a function, a branch or a loop, from the first one's line to the last one's."""

    key: str
    body: list[ast.stmt]
    first: int
    last: int


def sources() -> list[str]:
    """List the Python files that are mutated, as paths from the root; kernels lie in their own folder."""
    found = [*(ROOT / "fastvae").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {name_of(p) for p in found}
    return sorted(n for n in names if n is not None)


def name_of(path: str | Path, root: Path = ROOT) -> str | None:
    """Return a source file's path from the root; kernels may be reached through fastvae/kernels, too."""
    try:
        name = Path(path).relative_to(root).as_posix()
    except ValueError:
        return None
    name = name.replace("fastvae/kernels/", "kernels/", 1)
    return name if name.startswith(("fastvae/", "kernels/")) else None


def is_text(node: ast.stmt) -> bool:
    """Return True if a statement is a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def blocks(tree: ast.AST, file: str) -> Iterator[Block]:
    """All blocks within functions, an outer one before those inside it."""

    def walk(node: ast.AST, names: tuple[str, ...], counts: dict[str, int]) -> Iterator[Block]:
        inside = isinstance(node, FUNCTIONS)
        if inside or isinstance(node, ast.ClassDef):
            names = (*names, node.name)
            counts = dict(counts, number=0) if inside else {}
        if "number" in counts and not isinstance(node, (ast.Lambda, ast.IfExp)):
            for field in _BODIES:
                body = getattr(node, field, None)
                if not isinstance(body, list) or not body or not isinstance(body[0], ast.stmt):
                    continue
                first = body[1] if is_text(body[0]) and len(body) > 1 else body[0]
                key = f"{file}:{'.'.join(names)}:{counts['number']}"
                yield Block(key, body, first.lineno, body[-1].end_lineno or first.lineno)
                counts["number"] += 1
        for child in ast.iter_child_nodes(node):
            yield from walk(child, names, counts)

    return walk(tree, (), {})


def block_at(tree: ast.AST, file: str, line: int) -> str | None:
    """Return the key of the innermost block with this line; None outside functions."""
    found = [b for b in blocks(tree, file) if b.first <= line <= b.last]
    return max(found, key=lambda b: (b.first, -b.last)).key if found else None
