"""Launches that share a plan and a program, shown by a kernel that counts its compilations."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton")

from fastvae.kernels import common, launching  # noqa: E402


class Kernel:
    """Stand-in for a Triton kernel whose compiled programs record that they ran."""

    arg_names = ("p_x", "p_y", "p_out", "offset", "n", "BLOCK")
    pre_run_hooks = ()

    def __init__(self):
        self.programs = 0
        self.ran = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.programs += 1
            number = self.programs
            self.ran.append(number)
            return types.SimpleNamespace(
                run=lambda *arguments: self.ran.append(number), function=0, packed_metadata=()
            )

        return compile_and_run


@pytest.fixture
def run(monkeypatch):
    """Launch one kernel, and return the number of the program that ran."""
    kernel, planned = Kernel(), []
    monkeypatch.setattr(launching, "_stream_of", lambda device: 0)

    @launching.planned
    def launch(x, y, n, block, grid, warps):
        planned.append(n)
        return launching.Call(kernel, grid, (launching.Result((n,), x.dtype),), (n,), {"BLOCK": block}, warps)

    def call(x, offset=0, n=8, block=16, grid=(3, 1), warps=4):
        (out,) = launch((x, None), (n, block, grid, warps), (offset,))
        assert out.shape == (n,) and out.dtype == x.dtype
        assert len(planned) == kernel.programs
        return kernel.ran[-1]

    return call


def test_programs_depend_on_the_alignment_of_addresses(run):
    x = torch.zeros(16)
    assert run(x[:8]) == run(x[4:12]) == 1
    assert run(x[2:10]) == 2
    assert run(x[3:11]) == 3
    assert run(x[:8]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [2, 8, 10, 20, 50, 51, 64, 100])
def test_alignment_of_rows(columns, dtype):
    whole = torch.zeros(6, 2 * columns, dtype=dtype)
    parts = [
        *whole.chunk(2, dim=1),
        whole[1:, 3 : 3 + columns],
        whole[::2, columns:],
        whole[:, columns - 1 :],
    ]
    for t in parts:
        addresses = {row.data_ptr() for row in t}
        expected = max(n for n in (1, 2, 4, 8, 16) if all(a % n == 0 for a in addresses))
        assert common.row_alignment(t) == expected


def test_programs_depend_on_shapes_and_strides(run):
    x = torch.zeros(64)
    assert run(x[:8]) == run(x[8:16]) == 1
    assert run(x[:9]) == 2
    assert run(x[:16:2]) == 3
    assert run(x[:8].view(2, 4)) == 4
    assert run(x[:8]) == 1


def test_programs_depend_on_the_width_of_offsets(run):
    """Offsets above and below 2^31 need programs with int64 and int32; within each they share one."""
    x = torch.zeros(8)
    assert run(x, offset=0) == run(x, offset=2**31 - 1) == 1
    assert run(x, offset=2**31) == 2
    assert run(x, offset=5) == 1


def test_programs_depend_on_dtypes_and_constants(run):
    x = torch.zeros(8)
    assert run(x) == 1
    assert run(x.bfloat16()) == 2
    assert run(x, block=32) == 3
    assert run(x, n=9) == 4
    assert run(x, grid=(4, 1)) == 5
    assert run(x, warps=8) == 6
    assert run(x) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_programs_depend_on_the_device(run):
    assert run(torch.zeros(8)) == 1
    assert run(torch.zeros(8, device="cuda")) == 2
    assert run(torch.zeros(8)) == 1


def test_described_agrees_in_cpp_and_python():
    x = torch.zeros(48)
    tensors = [x[:8], x[4:12], x[1:9], x[:9], x[:16:2], x[:8].view(2, 4), x[:8].double(), None]
    tensors += [x[:0], torch.tensor(3), x[:6].view(1, 2, 3), x[:6].view(1, 3, 2).mT]
    for i, a in enumerate(tensors):
        for j, b in enumerate(tensors):
            for function in (launching.described, launching.described_in_python):
                (first, one), (second, other) = function((a, x, None)), function((b, x, None))
                # The first two differ only in address.
                assert (first == second) == (i == j or {i, j} == {0, 1}), (i, j)
                assert one[1:] == other[1:] == (x.data_ptr(), None)
                assert one[0] == (None if a is None else a.data_ptr())


def test_programs_are_specialised_for_a_few_shapes_only(monkeypatch):
    """A new batch compiles nothing; nor do new shapes of data, after the first few."""
    monkeypatch.setattr(launching, "_known", {})
    monkeypatch.setattr(launching, "INTERPRETED", types.SimpleNamespace(value=False))
    kernel = Kernel()

    def numbers(*numbers):
        return launching._limit_specialisations(launching.Call(kernel, (1,), (), numbers, {}, 4)).numbers

    for n in range(launching.MAX_FIXED):
        assert numbers(7, launching.fixed(n))[1].value == n
    assert numbers(8, launching.fixed(3))[1].value == 3
    # Not a tl.constexpr, which would compare equal too.
    assert list(map(type, numbers(8, launching.fixed(1000)))) == [int, int]
