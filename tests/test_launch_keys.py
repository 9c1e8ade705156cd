"""Which launches share a compiled program, shown by a kernel that counts how often it is compiled."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton")


class Kernel:
    """Triton's side of a launch: compiles something that notes by which program it is run."""

    arg_names = ("p_x", "p_y", "offset", "n", "BLOCK")
    pre_run_hooks = ()

    def __init__(self):
        self.programs = 0
        self.ran = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.programs += 1
            self.ran.append(self.programs)
            return Program(self, self.programs)

        return compile_and_run


class Program:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.ran.append(self.number)


def tensor(dtype=torch.float32, device="cuda:0", address=4096):
    """What a launch asks of a tensor."""
    return types.SimpleNamespace(dtype=dtype, device=torch.device(device), data_ptr=lambda: address)


@pytest.fixture
def run():
    """Launch one kernel, and say which of its programs ran."""
    from fastvae.kernels import common

    kernel = Kernel()

    def launch(x, offset=0, n=8, block=16, grid=(3, 1), num_warps=4):
        common.launch(kernel, grid, (x, None), (n,), {"BLOCK": block}, num_warps, (offset,))
        return kernel.ran[-1]

    yield launch
    common._programs.clear()


def test_a_program_belongs_to_its_device(run):
    assert run(tensor()) == run(tensor()) == 1
    assert run(tensor(device="cuda:1")) == 2
    assert run(tensor()) == 1


def test_a_program_belongs_to_the_width_of_its_numbers(run):
    """An offset beyond 2^31 is an int64 in the program, one below it an int32; within them it may change."""
    assert run(tensor(), offset=0) == run(tensor(), offset=2**31 - 1) == 1
    assert run(tensor(), offset=2**31) == 2
    assert run(tensor(), offset=5) == 1


def test_a_program_belongs_to_its_dtypes_and_constants(run):
    assert run(tensor()) == 1
    assert run(tensor(torch.bfloat16)) == 2
    assert run(tensor(), block=32) == 3
    assert run(tensor(), n=9) == 4
    assert run(tensor(), grid=(4, 1)) == 5
    assert run(tensor(), num_warps=8) == 6
    assert run(tensor()) == 1
