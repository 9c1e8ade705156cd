"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="no README beside the tests")
def test_python_blocks_run():
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text := README.read_text("utf-8"), re.S | re.M))
    assert blocks
    namespace = {"__name__": "readme"}
    for block in blocks:
        # Blank lines in front give tracebacks the README's line numbers.
        lines = "\n" * (text[: block.start(1)].count("\n"))
        exec(compile(lines + block[1], str(README), "exec"), namespace)
