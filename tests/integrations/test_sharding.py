"""FSDP2 and torch.compile: docs/examples print what they should."""

import pytest

from .test_training import check_example

pytestmark = pytest.mark.slow


def test_fsdp2():
    """Each of two ranks has half of the parameters."""
    (line,) = check_example("fsdp2_vae")
    mine, whole = line.removeprefix("parameters: ").removesuffix(" on rank 0").split(" of ")
    assert int(whole) == 2 * int(mine)


def test_compiled():
    """Every value of β is served by the same graph."""
    assert check_example("compile_vae") == ["graphs: 1"]
