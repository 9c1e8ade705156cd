"""Places in the code by function and fragment, and the tables that name them.

A table has a line for each entry, below a line that names its file::

    [fastvae/estimation/weights.py]
    Sums.log_px (weights qmc) square / (number * (number - 1)) => square / (number * number)

The fields are the function (or a class, a namespace, or ``-`` for the whole file), the tests, the fragment to
replace, which occurs once in the function up to whitespace, and its replacement. For an accepted survivor the
operator replaces the tests, and `` -- `` and the reason follow.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .blocks import FUNCTIONS, ROOT

HERE = Path(__file__).parent
_ENTRY = re.compile(r"(\S+) +\(([^)]*)\) +(.*?) =>(?: (.*?))??(?: -- (.*))?")
_CONTROL = ("if", "for", "while", "switch", "do", "else", "try", "catch", "return", "constexpr")


class Entry(NamedTuple):
    """Entry of a table; `words` are tests, or the operator of an accepted survivor."""

    table: str
    line: int
    file: str
    function: str
    words: str
    old: str
    new: str
    why: str

    @property
    def kind(self) -> str:
        return {"csrc": "cpp", "kernels": "triton"}.get(self.file.partition("/")[0], "python")

    @property
    def tests(self) -> list[str]:
        """Tests in pytest's notation: "vae" is tests/test_vae.py."""
        parts = (word.partition("::") for word in self.words.split())
        return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in parts]

    def __str__(self) -> str:
        return f"{self.file} {self.function} ({self.words}) {self.old} => {self.new}"


class Stale(Exception):
    """An entry that does not match the code; the message explains how to repair it."""

    def __init__(self, entry: Entry, problem: str) -> None:
        super().__init__(f"{entry.table}, line {entry.line} ({entry.file} {entry.function}): {problem}")


def read_table(name: str) -> list[Entry]:
    """Read the entries of a table in this folder."""
    entries, file = [], ""
    for number, row in enumerate((HERE / name).read_text().splitlines(), 1):
        if row.startswith("["):
            file = row.strip("[] ")
        elif row.strip() and not row.startswith("#"):
            match = _ENTRY.fullmatch(row.strip())
            if match is None or not file:
                raise SystemExit(f"{name}, line {number}: {row!r} is not 'function (tests) old => new'")
            entries.append(Entry(name, number, file, *(part or "" for part in match.groups())))
    return entries


@cache
def _source(file: str, root: Path) -> str:
    path = root / file
    return path.read_text() if path.is_file() else ""


@cache
def scopes(file: str, root: Path = ROOT) -> list[tuple[str, int, int]]:
    """Functions, classes and namespaces of a file: (qualified name, first character, last one)."""
    text = _source(file, root)
    return _python_scopes(text) if file.endswith(".py") else _cpp_scopes(text)


def _python_scopes(text: str) -> list[tuple[str, int, int]]:
    starts = [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    found: list[tuple[str, int, int]] = []

    def walk(node: ast.AST, names: tuple[str, ...]) -> None:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names = (*names, node.name)
            first = min((d.lineno for d in node.decorator_list), default=node.lineno)
            found.append((".".join(names), starts[first - 1], starts[node.end_lineno or 0]))
        for child in ast.iter_child_nodes(node):
            walk(child, names)

    walk(ast.parse(text), ())
    return found


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _cpp_scopes(text: str) -> list[tuple[str, int, int]]:
    """Find scopes by braces, with comments and strings blanked; the text before a brace names its scope."""
    skipped = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:\\\n|[^\n])*'
    code = re.sub(skipped, _blank, text, flags=re.S | re.M)
    found: list[tuple[str, int, int]] = []
    open_ones: list[tuple[str, int, int]] = []  # name, start, parentheses open around it
    names: list[str] = []
    depth, since = 0, 0
    for i, letter in enumerate(code):
        if letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == ";" and depth == 0:
            since = i + 1
        elif letter == "{":
            name = _name_before(code[since:i]) if depth == 0 else ""
            open_ones.append((name, since, depth))
            names.append(name)
            depth, since = 0, i + 1
        elif letter == "}" and open_ones:
            name, start, depth = open_ones.pop()
            if name:
                found.append(("::".join(n for n in names if n), start, i + 1))
            names.pop()
            since = since if depth else i + 1
    return found


def _name_before(header: str) -> str:
    header = re.sub(r"^\s*template\s*<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>", "", header.strip())
    kind = re.match(r"\s*(?:inline\s+)?(?:struct|class|namespace|union|enum)\s+(?:class\s+)?(\w+)", header)
    if kind:
        return kind[1]
    function = re.search(r"(operator\s*(?:\(\s*\)|[^\s\w(]+)|~?\w+)\s*(?:<[^<>()]*>)?\s*\(", header)
    name = "".join(function[1].split()) if function else ""
    return "" if name in _CONTROL else name


def pattern(fragment: str) -> re.Pattern[str]:
    """Compile a fragment in any layout: its words and signs in order, whitespace between them optional."""
    words = re.findall(r"\w+|[^\w\s]", fragment)
    text = re.escape(words[0])
    for before, word in zip(words, words[1:], strict=False):
        both = re.match(r"\w", before) and re.match(r"\w", word)
        text += (r"\s+" if both else r"\s*") + re.escape(word)
    left = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    return re.compile(left + text + (r"(?!\w)" if re.match(r"\w", words[-1]) else ""))


def locate(entry: Entry, root: Path = ROOT) -> tuple[int, int]:
    """Find the first and last character of an entry's fragment in its file."""
    text = _source(entry.file, root)
    if not text:
        raise Stale(entry, "no such file; where its function went, name that file, or delete the entry")
    sign = "." if entry.file.endswith(".py") else "::"
    spans = [(0, len(text))]
    if entry.function != "-":
        name = entry.function
        spans = [(a, b) for n, a, b in scopes(entry.file, root) if n == name or n.endswith(sign + name)]
    if not spans:
        last = entry.function.split(sign)[-1]
        elsewhere = sorted({n for n, _, _ in scopes(entry.file, root) if n.split(sign)[-1] == last})
        hint = f"it has {', '.join(elsewhere)}" if elsewhere else "name the one that does this now"
        raise Stale(entry, f"no function of this name in the file: {hint}, or delete the entry")
    found = {(m.start(), m.end()) for a, b in spans for m in pattern(entry.old).finditer(text, a, b)}
    if len(found) != 1:
        counted = "does not occur" if not found else f"occurs {len(found)} times"
        mend = "write what the code says now, or delete the entry" if not found else "lengthen it"
        raise Stale(entry, f"{entry.old!r} {counted} in this function: {mend}")
    return found.pop()


def mutated(entry: Entry, root: Path = ROOT) -> str:
    """Return the file's text with an entry's change in it."""
    text = _source(entry.file, root)
    first, last = locate(entry, root)
    return text[:first] + entry.new + text[last:]


def stale(entries: list[Entry]) -> list[str]:
    """Explain each entry that does not match the code."""
    problems = []
    for entry in entries:
        try:
            locate(entry)
        except Stale as problem:
            problems.append(str(problem))
    return problems
