"""The tables of mutants fit the code of today, and a seed gives the same mutants each time."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

from tools.mutants import __main__ as command
from tools.mutants import record
from tools.mutants.blocks import block_at, blocks, name_of, sources
from tools.mutants.generate import applied, parses, sample, sites
from tools.mutants.places import Entry, Stale, locate, mutated, read_table, scopes, stale
from tools.mutants.run import Done

ROOT = Path(__file__).parents[1]
WRITTEN = read_table(command.WRITTEN)


def test_written_mutants_apply():
    assert not (problems := stale(WRITTEN)), "\n".join(problems)
    for entry in WRITTEN:
        text = mutated(entry)
        assert text != (ROOT / entry.file).read_text(), f"{entry} changes nothing"
        if entry.file.endswith(".py"):
            ast.parse(text, entry.file)


def test_written_mutants_name_existing_tests():
    for entry in WRITTEN:
        assert entry.tests, f"{entry.table}, line {entry.line}: no tests are named"
        for test in entry.tests:
            file, _, name = test.partition("::")
            where = f"{entry.table}, line {entry.line}: {test}"
            assert (ROOT / file).is_file(), f"{where}: no such test file"
            assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{where}: no such test"


def test_accepted_survivors_are_still_generated():
    assert all(e.why for e in read_table(command.ACCEPTED)), (
        "a survivor is accepted for a reason, after ' -- '"
    )
    assert not (problems := command.stale_accepted()), "\n".join(problems)


def test_an_accepted_survivor_that_is_not_generated_is_reported(monkeypatch):
    entry = Entry("accepted.txt", 7, "fastvae/vae.py", "VAE.elbo", "comparison", "a < b", "a <= b", "why")
    monkeypatch.setattr(command, "accepted", lambda: {("fastvae/vae.py", "VAE.elbo", "", "", ""): entry})
    (problem,) = command.stale_accepted()
    assert "accepted.txt, line 7" in problem and "delete the entry" in problem
    site = sites("fastvae/vae.py")[0]
    monkeypatch.setattr(command, "accepted", lambda: {site.key: entry})
    assert command.stale_accepted() == []


def test_a_seed_gives_the_same_mutants():
    found = {file: sites(file) for file in sources()}
    first, again = sample(found, 5, 40), sample(found, 5, 40)
    assert first == again and len(first) == 40 and sample(found, 6, 5) != first[:5]
    assert len({(s.file, s.line) for s in first}) == 40
    for site in first:
        text = (ROOT / site.file).read_text()
        assert parses(site, text) and applied(site, text) != text, f"{site} changes nothing"
        assert block_at(ast.parse(text), site.file, site.line), f"{site} lies in no block"


SOURCE = textwrap.dedent(
    '''
    def f(x, k, *, keep=True):
        """A docstring with 1 < 2."""
        if TYPE_CHECKING:
            k = 3
        if k > 1:
            raise ValueError(f"k={k} is not {1 + 1}")
        x = torch.where(x == 0, -x, x[1:]).sum(-1)
        self.seen = x @ x.mT
        return g(x, k, keep=not keep, generator=None), x.detach().float()
    '''
)


def test_operators():
    found = {(s.operator, s.old, s.new) for s in sites("fastvae/f.py", SOURCE)}
    assert found >= {
        ("branch never taken", "k > 1", "False"),
        ("comparison", "k > 1", "(k >= 1)"),
        ("where true", "torch.where(x == 0, -x, x[1:])", "(-x)"),
        ("slice widened", "torch.where(x == 0, -x, x[1:])", "torch.where(x == 0, -x, x[:])"),
        ("last for first", "torch.where(x == 0, -x, x[1:]).sum(-1)", "torch.where(x == 0, -x, x[1:]).sum(0)"),
        ("statement dropped", "self.seen = x @ x.mT", "pass"),
        (
            "arguments swapped",
            "g(x, k, keep=not keep, generator=None)",
            "g(k, x, keep=not keep, generator=None)",
        ),
        ("keyword dropped", "g(x, k, keep=not keep, generator=None)", "g(x, k, generator=None)"),
    }
    # Messages, docstrings, code for type checkers and trivial code are not mutated.
    assert not [m for m in found if any(text in m[1] for text in ("ValueError", "docstring", "k = 3"))]
    assert "method dropped" not in {operator for operator, _, _ in found}


def test_keys_survive_moving_and_reformatting():
    moved = "import math\n\n\n" + SOURCE.replace("torch.where(x == 0,", "torch.where(\n        x == 0,")
    before, after = ({s.key[1:3] for s in sites("f.py", text)} for text in (SOURCE, moved))
    assert before == after
    keys = [{b.key for b in blocks(ast.parse(text), "f.py")} for text in (SOURCE, moved)]
    assert keys[0] == keys[1] == {"f.py:f:0", "f.py:f:1", "f.py:f:2"}


CPP = """
namespace fastvae {
#define OPEN {
// a comment with { and "
template <class C, class D = Pair<C>>
struct Noise : Base<C> {
  Noise(int n) : n_{n} {}
  void draw(int n) const { for (int i = 0; i < n; ++i) { call([&](int j) { use(j, '{'); }); } }
  bool operator()(int i) const { return i < n_; }
};
template <class C>
inline int draw(C x) { return x +
    1; }
}  // namespace fastvae
"""


@pytest.fixture
def entry(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/noise.hpp").write_text(CPP)
    return lambda function, old: Entry("written.txt", 3, "csrc/noise.hpp", function, "latent", old, "?", "")


def test_functions_of_headers_are_found(entry, tmp_path):
    names = {name for name, _, _ in scopes("csrc/noise.hpp", tmp_path)}
    expected = {"Noise", "Noise::Noise", "Noise::draw", "Noise::operator()", "draw"}
    assert names == {"fastvae", *(f"fastvae::{name}" for name in expected)}
    first, last = locate(entry("draw", "return x+1;"), tmp_path)
    assert CPP[first:last] == "return x +\n    1;"
    assert "[&](int j) { ?(j" in mutated(entry("Noise::draw", "use"), tmp_path)


@pytest.mark.parametrize(
    ("function", "old", "message"),
    [
        ("Noise::draws", "use", "no function of this name in the file: name the one that does this now"),
        ("Nois::draw", "use", "it has fastvae::Noise::draw, fastvae::draw"),
        ("Noise::draw", "used(j)", "does not occur in this function: write what the code says now"),
        ("-", "return", "occurs 2 times in this function: lengthen it"),
    ],
)
def test_a_stale_entry_is_explained(entry, tmp_path, function, old, message):
    with pytest.raises(Stale, match=re.escape(message)) as caught:
        locate(entry(function, old), tmp_path)
    assert "written.txt, line 3 (csrc/noise.hpp" in str(caught.value)


def test_entries_without_a_file_or_an_arrow_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.mutants.places.HERE", tmp_path)
    for text in ("f (latent) a => b", "[f.py]\nf (latent) a -> b"):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(SystemExit, match="line . *: .* is not 'function .tests. old => new'"):
            read_table("t.txt")
    (tmp_path / "t.txt").write_text(
        "# why\n[f.py]\nf (latent) i-- > 0 =>\nC.g (comparison) a => b -- equal\n"
    )
    found = [(e.function, e.old, e.new, e.why) for e in read_table("t.txt")]
    assert found == [("f", "i-- > 0", "", ""), ("C.g", "a", "b", "equal")]


def test_instrumented_code_counts_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "seen", set())
    code = 'def f(x):\n    """Text."""\n    if x:\n        return 1\n    return 2\n'
    tree = record.instrumented(ast.parse(code), "fastvae/f.py")
    scope = {"_hit": record.hit, "_hit_no": lambda: False}
    exec(compile(tree, "f.py", "exec"), scope)
    assert scope["f"](0) == 2 and record.seen == {"fastvae/f.py:f:0"} and scope["f"].__doc__ == "Text."
    assert scope["f"](1) == 1 and record.seen == {"fastvae/f.py:f:0", "fastvae/f.py:f:1"}
    assert block_at(ast.parse(code), "fastvae/f.py", 4) == "fastvae/f.py:f:1"
    assert name_of("/copy/fastvae/kernels/a.py", Path("/copy")) == "kernels/a.py"


@pytest.mark.parametrize(
    ("code", "text", "noticed"),
    [
        (0, "3 passed", False),
        (1, "FAILED tests/test_a.py::test_b", True),
        (-11, "", True),
        (None, "", True),
        (2, "ERROR tests/test_a.py - NameError", True),
        (4, "ERROR: not found", False),
        (5, "no tests ran", False),
    ],
)
def test_verdicts(code, text, noticed):
    assert Done("m", code, 1.0, text).verdict()[0] is noticed
