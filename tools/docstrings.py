"""``python -m tools.docstrings``: complete docstrings from the table of shared arguments, ``arguments.txt``.

An editor, ``help()`` and the docs show a docstring as the source has it, so each function has every argument
in full. Their texts are written once, in the table; this command copies them, and ``--check`` compares.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "arguments.txt"
WIDTH = 110

_SECTION = re.compile(r"\[(?:(\S+) )?(\w+)\]")
_LINE = re.compile(r"(\w+): (.*)")
_ENTRY = re.compile(r" {8}(\w+): ")


def read_table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return the text of each argument, by file and function."""
    sections: dict[tuple[str, str], dict[str, str]] = {}
    name = ""
    for line in text.splitlines():
        if section := _SECTION.fullmatch(line):
            entries = sections[section[1] or "", section[2]] = {}
        elif entry := _LINE.fullmatch(line):
            name = entry[1]
            entries[name] = entry[2]
        elif line.startswith("    "):
            entries[name] += " " + line.strip()
        elif line and not line.startswith("#"):
            raise ValueError(f"{TABLE.name}: {line!r} is neither a section, an argument nor its continuation")
    shared = sections.pop(("", "shared"))
    functions = {function: entries for (_, function), entries in sections.items()}

    def full(name: str, text: str) -> str:
        if text.startswith("+ "):
            return f"{shared[name]} {text[2:]}"
        if text.startswith("= "):
            function, argument = text[2:].split(".")
            return full(argument, functions[function][argument])
        return text

    return {
        key: shared | {name: full(name, text) for name, text in entries.items()}
        for key, entries in sections.items()
    }


def completed(source: str, function: str, texts: dict[str, str]) -> str:
    """Return a file's source with the arguments of a function's docstring as the table has them."""
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function and ast.get_docstring(node):
            docstring = node.body[0]
            begin = lines.index("    Args:", docstring.lineno - 1, docstring.end_lineno) + 1
            end = lines.index("", begin)
            return "\n".join([*lines[:begin], *_entries(lines[begin:end], texts), *lines[end:]])
    raise ValueError(f"{TABLE.name}: no function {function} with a docstring")


def _entries(lines: list[str], texts: dict[str, str]) -> list[str]:
    out: list[str] = []
    known = False
    for line in lines:
        if entry := _ENTRY.match(line):
            known = entry[1] in texts
            if known:
                out += textwrap.wrap(
                    f"{entry[1]}: {texts[entry[1]]}",
                    WIDTH,
                    initial_indent=" " * 8,
                    subsequent_indent=" " * 12,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
        if not known:
            out.append(line)
    return out


def outdated() -> dict[Path, str]:
    """Return the files whose docstrings differ from the table, with their completed source."""
    sources: dict[Path, str] = {}
    for (file, function), texts in read_table(TABLE.read_text()).items():
        path = ROOT / file
        sources[path] = completed(sources.get(path) or path.read_text(), function, texts)
    return {path: source for path, source in sources.items() if source != path.read_text()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docstrings", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="list files that differ, and write nothing")
    options = parser.parse_args(arguments)
    found = outdated()
    for path, source in found.items():
        print(path.relative_to(ROOT))
        if not options.check:
            path.write_text(source)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
