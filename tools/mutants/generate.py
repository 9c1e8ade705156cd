"""Generated mutants: operators on Python's syntax trees, and seeded samples of them."""

from __future__ import annotations

import ast
import random
import subprocess
from functools import cache
from typing import NamedTuple

from .blocks import FUNCTIONS, ROOT, is_text

_words = str.split
_OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
    ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_PAIRS = _words(
    "min,max amin,amax minimum,maximum fmin,fmax any,all zeros_like,ones_like zeros,ones new_zeros,new_ones "
    "clamp_min,clamp_max floor,ceil sum,mean cumsum,cumprod"
)
_EXCHANGED = {a: b for pair in _PAIRS for a, b in (pair.split(","), pair.split(",")[::-1])}
# Methods whose result is of the same kind as their object. `.to`, `.float`, `.detach` and `.contiguous` are
# left out: their survivors are nearly always equivalent.
_DROPPED = _words(
    "abs neg clone exp log sqrt square flip cumsum cumprod sort clamp double prepared expand_as reciprocal "
    "flatten unsqueeze squeeze"
)
_KEPT_KEYWORDS = _words(
    "strict stacklevel validate_args name device dtype layout pin_memory file end flush desc"
)
# Their arguments are texts, types, or hints for compilers.
_UNTOUCHED = _words(
    "warn cast TypeVar getattr hasattr setattr isinstance issubclass static_assert static_print print "
    "static_range field dataclass"
)
_MODULES = _words("torch math tl np random functional")
_LEAST = 14  # characters of an old fragment, if its statement has as many


class Site(NamedTuple):
    """Replacement in one place: bytes `start` to `end` of the file are replaced by `text`.

    `old` and `new` are the expression around it, long enough to be recognised, with whitespace collapsed.
    """

    file: str
    function: str
    operator: str
    line: int
    start: int
    end: int
    text: str
    old: str
    new: str

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.file, self.function, self.operator, self.old, self.new

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function} ({self.operator}) {self.old} => {self.new}"


def _like(node: ast.AST, **changes: object) -> ast.AST:
    return type(node)(**{name: getattr(node, name, None) for name in node._fields} | changes)


def _may_be_swapped(a: ast.expr, b: ast.expr) -> bool:
    return not any(isinstance(n, (ast.Starred, ast.Constant)) for n in (a, b)) and ast.dump(a) != ast.dump(b)


class _Finder(ast.NodeVisitor):
    """Visits a file's functions and notes each (operator, function, ancestors, node, replacement)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, tuple[ast.AST, ...], ast.AST, ast.AST]] = []
        self.functions: list[str] = []
        self.known: list[set[str]] = []
        self.above: list[ast.AST] = []

    def visit(self, node: ast.AST) -> None:
        self.above.append(node)
        super().visit(node)
        self.above.pop()

    def add(self, operator: str, node: ast.AST, new: ast.AST | None = None, **changes: object) -> None:
        """Note a replacement: another node, or this one with some fields changed."""
        if self.known:
            name = ".".join(self.functions)
            self.found.append((operator, name, tuple(self.above), node, new or _like(node, **changes)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        declares = any("overload" in ast.dump(d) for d in node.decorator_list)
        if declares or node.name in ("__repr__", "extra_repr"):
            return
        self.known.append({a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)})
        self._visit_all(node, node.body[is_text(node.body[0]) :])
        self.known.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all(node, [s for s in node.body if isinstance(s, (*FUNCTIONS, ast.ClassDef))])

    def _visit_all(self, node: ast.FunctionDef | ast.ClassDef, body: list[ast.stmt]) -> None:
        self.functions.append(node.name)
        for statement in body:
            self.visit(statement)
        self.functions.pop()

    def _leave(self, node: ast.AST) -> None:
        """Skip code that only raises, formats messages or checks types."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = _leave

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.value or node.target)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add("statement dropped", node, ast.Pass())
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement dropped", node, ast.Pass())
        if type(node.op) in _OPERATORS:
            self.add("arithmetic", node, op=_OPERATORS[type(node.op)]())
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets if self.known else ():
            names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
            # A first assignment to a name is never omitted: the following lines would fail trivially.
            if isinstance(target, (ast.Attribute, ast.Subscript)) or names <= self.known[-1]:
                self.add("statement dropped", node, ast.Pass())
            if isinstance(target, (ast.Name, ast.Tuple)):
                self.known[-1].update(names)
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if isinstance(node.value, ast.Tuple) and node.value.elts:
            self.add("first of a tuple returned", node, value=node.value.elts[0])
        elif not isinstance(node.value, (ast.Constant, type(None))):
            self.add("None returned", node, value=ast.Constant(None))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.dump(node.test):
            return
        self.add("branch never taken", node.test, ast.Constant(False))
        if not all(isinstance(s, ast.Raise) for s in node.body):
            self.add("branch always taken", node.test, ast.Constant(True))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add("condition true", node, node.body)
        self.add("condition false", node, node.orelse)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            other = _OPERATORS[type(operator)]()
            self.add("comparison", node, ops=[*node.ops[:i], other, *node.ops[i + 1 :]])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.add("and/or", node, op=_OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.Invert)):
            self.add("negation dropped", node, node.operand)
        elif isinstance(node.operand, ast.Constant):
            if node.operand.value == 1:
                self.add("last for first", node, ast.Constant(0))
            return
        else:
            self.add("sign", node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if type(node.op) in _OPERATORS and not texts:
            self.add("arithmetic", node, op=_OPERATORS[type(node.op)]())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("bool", node, value=not value)
        elif isinstance(value, int):
            self.add("constant", node, value={0: 1, 1: 0, 2: 1}.get(value, value + 1))
        elif isinstance(value, float):
            self.add("constant", node, value=value * 2 if value else 1.0)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        for end in ("lower", "upper") if isinstance(node.slice, ast.Slice) else ():
            if getattr(node.slice, end) is not None:
                self.add("slice widened", node, slice=_like(node.slice, **{end: None}))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("T", "mT"):
            self.add("transpose dropped", node, node.value)
        self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in ("strict", "stacklevel", "validate_args"):
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        called, given = node.func, node.args
        is_method = isinstance(called, ast.Attribute)
        name = called.attr if is_method else called.id if isinstance(called, ast.Name) else ""
        of_module = is_method and isinstance(called.value, ast.Name) and called.value.id in _MODULES
        if name in _UNTOUCHED:
            return
        if name in _EXCHANGED and (is_method or name != "sum"):
            other = {"attr" if is_method else "id": _EXCHANGED[name]}
            self.add("function exchanged", node, func=_like(called, **other))
        if is_method and name in _DROPPED and not of_module:
            self.add("method dropped", node, called.value)
        if name == "where" and len(given) == 3:
            self.add("where true", node, given[1])
            self.add("where false", node, given[2])
        elif len(given) > 1 and name not in _EXCHANGED and _may_be_swapped(*given[:2]):
            self.add("arguments swapped", node, args=[given[1], given[0], *given[2:]])
        for i, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in _KEPT_KEYWORDS:
                self.add("keyword dropped", node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
        self.generic_visit(node)


def sites(file: str, source: str | None = None) -> list[Site]:
    """All mutants of a file, in the order of its functions."""
    text = (ROOT / file).read_text() if source is None else source
    raw = text.encode()
    starts = [0]
    for row in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    finder = _Finder()
    finder.visit(ast.parse(text))
    found = []
    for operator, function, above, node, new in finder.found:
        begin, end = span(node)
        bare = (ast.stmt, ast.Constant, ast.Name, ast.Call, ast.Attribute, ast.Subscript)
        replacement = ast.unparse(new) if isinstance(new, bare) else f"({ast.unparse(new)})"
        # The surrounding expression: up to its statement, but not a compound one.
        around = [n for n in above if hasattr(n, "lineno") and not hasattr(n, "body")] or [node]
        whole = node
        for outer in reversed(around):
            first, last = span(outer)
            if first <= begin and end <= last:
                whole = outer
                if last - first >= _LEAST:
                    break
        first, last = span(whole)
        changed = raw[first:begin] + replacement.encode() + raw[end:last]
        fragments = [" ".join(part.decode().split()) for part in (raw[first:last], changed)]
        if fragments[0] != fragments[1]:
            found.append(Site(file, function, operator, node.lineno, begin, end, replacement, *fragments))
    return found


def applied(site: Site, source: str) -> str:
    """Return the file's text with one mutant in it."""
    raw = source.encode()
    return (raw[: site.start] + site.text.encode() + raw[site.end :]).decode()


@cache
def _meaning(source: str) -> str:
    return ast.dump(ast.parse(source))


def parses(site: Site, source: str) -> bool:
    """Return True if a mutant parses and differs from the original."""
    try:
        return ast.dump(ast.parse(applied(site, source))) != _meaning(source)
    except SyntaxError:
        return False


def sample(found: dict[str, list[Site]], seed: int, count: int) -> list[Site]:
    """Draw mutants from the seed: a file by its number of sites, one of its operators, then a site.

    At most one per line is drawn.
    """
    draw = random.Random(seed)
    files = sorted(f for f, of_file in found.items() if of_file)
    texts = {f: (ROOT / f).read_text() for f in files}
    chosen: list[Site] = []
    used: set[tuple[str, int]] = set()
    for _ in range(50 * count if files else 0):
        if len(chosen) == count:
            break
        file = draw.choices(files, [len(found[f]) for f in files])[0]
        operator = draw.choice(sorted({s.operator for s in found[file]}))
        site = draw.choice([s for s in found[file] if s.operator == operator])
        if (file, site.line) not in used and parses(site, texts[file]):
            used.add((file, site.line))
            chosen.append(site)
    return chosen


def changed_lines(base: str) -> dict[str, set[int]]:
    """Return the lines of each source file that differ from the commit it branched from."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"base={base!r}: git finds no such branch or commit here: {done.stderr.strip()}")
        return done.stdout

    lines: dict[str, set[int]] = {}
    file = ""
    start = git("merge-base", base, "HEAD").strip()
    for row in git("diff", "-U0", "--no-ext-diff", start, "--", "fastvae", "kernels").splitlines():
        if row.startswith("+++ "):
            file = row[6:] if row.endswith(".py") else ""
        elif row.startswith("@@") and file:
            first, _, number = row.split("+")[1].split()[0].partition(",")
            lines.setdefault(file, set()).update(range(int(first), int(first) + int(number or 1)))
    return lines
