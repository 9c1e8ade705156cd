"""The fast path's checks: they accept only correct tensors, and accept the usual ones."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae.core import fast_path as _glance

from .conftest import CUDA

b, d, n, k = 5, 3, 7, 4


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def tensors():
    wanted = torch.zeros(2, requires_grad=True)
    yield "plain", (torch.zeros(2), None, torch.tensor(3))
    yield "wanted", (torch.zeros(2), None, wanted, torch.zeros(3))
    yield "parameter", (torch.nn.Parameter(torch.zeros(2)),)
    yield "nothing", (None, None)
    yield "none", ()
    yield "subclass", (torch.zeros(2), torch.zeros(2).as_subclass(Own))
    yield "no tensor", (torch.zeros(2), 3.0)
    yield "meta", (torch.zeros(2, device="meta"),)
    yield "negative", (torch.zeros(2), torch._neg_view(torch.ones(2)))
    yield "list", (torch.zeros(2), [1])
    if CUDA:
        yield "on a GPU", (torch.zeros(2, device="cuda"), None)
        yield "on both", (torch.zeros(2, device="cuda"), wanted)


@pytest.mark.parametrize("name, given", tensors())
def test_plain(name, given):
    found = _glance.plain(given)
    on_cpu = {"plain": 1, "wanted": 5, "parameter": 5}
    assert found == (on_cpu | {"on a GPU": 2}).get(name, 0)


def test_plain_detects_transforms_and_modes():
    t = torch.zeros(2)
    leaked = []

    def seen(v):
        leaked.append(v)
        assert _glance.plain((t,)) == 0
        return v.sum()

    torch.func.grad(seen)(t)
    # Still wrapped, outside the transform.
    assert _glance.plain((t,)) == 1
    assert _glance.plain((t, *leaked)) == 0
    with Mode():
        assert _glance.plain((t,)) == 0
    with forward_ad.dual_level():
        assert _glance.plain((t,)) == 0
    torch.jit.trace(lambda v: seen(v) * 1, t, check_trace=False)
    assert _glance.plain((t,)) == 1


@pytest.mark.skipif(CUDA, reason="native is Triton there")
def test_the_fast_path_uses_the_selected_backend():
    """The fast path gives the dispatcher's bits under the selected backend, not another's."""
    mu, logvar = torch.randn(2, 300, 40)
    seed = torch.tensor(5)
    found = {}
    for name in ("native", "reference"):
        with fastvae.use_backend(name):
            found[name], _ = fastvae.ops.rsample_kl(mu, logvar, seed=seed)
            with Mode():
                assert torch.equal(fastvae.ops.rsample_kl(mu, logvar, seed=seed)[0], found[name])
    # The backends' normals differ in the last digits.
    assert not torch.equal(found["native"], found["reference"])


@pytest.mark.parametrize("event", [(n,), (), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_batches(event, dtype):
    mu = torch.zeros(b, d, dtype=dtype)
    logvar = torch.nn.Parameter(torch.zeros(b, 2 * d, dtype=dtype)[:, :d])
    assert _glance.are_batch(torch.zeros(b, *event), mu, logvar)


WRONG = {
    "x: no tensor": {"x": [[0.0]]},
    "x: no axes": {"x": torch.zeros(())},
    "x: another batch": {"x": torch.zeros(b + 1, n)},
    "x: integers": {"x": torch.zeros(b, n, dtype=torch.uint8)},
    "x: complex": {"x": torch.zeros(b, n, dtype=torch.complex64)},
    "x: elsewhere": {"x": torch.zeros(b, n, device="meta")},
    "x: a subclass": {"x": torch.zeros(b, n).as_subclass(Own)},
    "mu: no tensor": {"mu": None},
    "mu: three axes": {"mu": torch.zeros(b, d, 1), "logvar": torch.zeros(b, d, 1)},
    "mu: integers": {
        "mu": torch.zeros(b, d, dtype=torch.int32),
        "logvar": torch.zeros(b, d, dtype=torch.int32),
    },
    "logvar: another dtype": {"logvar": torch.zeros(b, d, dtype=torch.float64)},
    "logvar: another shape": {"logvar": torch.zeros(b, d + 1)},
    "logvar: one row": {"logvar": torch.zeros(1, d)},
    "logvar: elsewhere": {"logvar": torch.zeros(b, d, device="meta")},
}


@pytest.mark.parametrize("name", WRONG)
def test_malformed_batches_are_rejected(name):
    given = {"x": torch.zeros(b, n), "mu": torch.zeros(b, d), "logvar": torch.zeros(b, d)}
    assert _glance.are_batch(*given.values())
    assert not _glance.are_batch(*(given | WRONG[name]).values())


def test_outputs():
    x, first = torch.zeros(b, n), torch.zeros(k * b, n)
    assert _glance.are_outputs(x, k, (first,))
    assert _glance.are_outputs(x, k, (first, first.bfloat16()))
    assert _glance.are_outputs(x.to(torch.uint8), k, (first,))
    wrong = [
        first[:-1],
        first.view(k, b, n),
        torch.zeros(b * n, k),
        torch.zeros(k * b, 1),
        first.int(),
        first.to("meta"),
        first.as_subclass(Own),
        [first],
        None,
    ]
    for w in wrong:
        assert not _glance.are_outputs(x, k, (w,))
        assert not _glance.are_outputs(x, k, (first, w))
    assert not _glance.are_outputs(x, k + 1, (first,))
    assert not _glance.are_outputs(x[0], k, (first,))
    assert not _glance.are_outputs(x.view(b, n, 1), k, (first.view(k * b, n, 1),))
    # They are empty.
    assert not _glance.are_outputs(x[:0], k, (first[:0],))
    assert not _glance.are_outputs(x[:, :0], k, (first[:, :0],))
