"""Launches repeated by the C++: whatever changes between two calls reaches the kernels."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
from torch import nn

import fastvae
from fastvae import _C, ops
from fastvae.kernels import launching
from fastvae.ops import normal_diagonal
from tools.fakecard import control

from .compared import DTYPES, B, D, K, X, assert_same, draw, simulated


@pytest.fixture(autouse=True)
def no_plans():
    """Begin without plans."""
    launching.clear_caches()


def _inputs(dtype=torch.float32, seed=1):
    mu, logvar = (draw(B, D, seed=seed + i, dtype=dtype).requires_grad_() for i in range(2))
    return (draw(B, X, seed=seed + 2, dtype=dtype) > 0).to(dtype), mu, logvar


def _step(x, mu, logvar, weight=None, **options):
    weight = torch.ones(X, D, dtype=mu.dtype, device=mu.device) if weight is None else weight
    return fastvae.iwae(x, (mu, logvar), lambda z: z @ weight.T, k=K, likelihood="bernoulli", **options)


def _on_card(*tensors):
    return [t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]


_OURS = tuple(str(Path(m.__file__).resolve().parent) for m in (fastvae, launching))


def _frames(call):
    """Return the Python functions of fastvae and of its kernels that a call enters."""
    found = []

    def profile(frame, event, _):
        name = str(Path(frame.f_code.co_filename).resolve())
        if event == "call" and name.startswith(_OURS):
            found.append(f"{name}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


# What is replayed


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "poisson"])
def test_objectives_are_replayed_whole(objective, likelihood):
    x, mu, logvar = _on_card(*_inputs())
    outputs = 2 if likelihood == "gaussian" else 1

    def decoder(z):
        return (
            (z[:, :1].expand(-1, X), z[:, 1:2].expand(-1, X))[:outputs]
            if outputs > 1
            else z[:, :1].expand(-1, X)
        )

    options = {} if objective == "elbo" else {"k": K}

    def step():
        bound = getattr(fastvae, objective)(x, (mu, logvar), decoder, likelihood=likelihood, **options)
        bound.backward()

    step()
    assert _C.count_plans() == (4, 4)
    step()
    assert _C.count_plans() == (4, 4)


@simulated
def test_no_python_between_the_node_and_the_launch():
    tensors = _on_card(*_inputs(), torch.tensor(3))
    call = ops.normal_diagonal._rsample_kl._gpu
    place = ops.normal_diagonal.Draw(K, 0, 0, -10.0, 10.0, False)
    arguments = (*tensors[1:3], None, None, tensors[3], place, False, False)
    assert _frames(lambda: call(*arguments))
    with control.launches() as found:
        assert _frames(lambda: call(*arguments)) == []
    assert [launch.name for launch in found if launch.kind == "driver"] == ["rsample_kl_kernel"]


@simulated
def test_no_python_in_a_compiled_graph():
    torch._dynamo.reset()
    inputs = _on_card(*_inputs(), draw(X, D, seed=9))
    compiled = torch.compile(_step)
    for _ in range(2):
        bound = compiled(*inputs)
        torch.autograd.grad(bound, inputs[1:3])
    bound = []
    entered = _frames(lambda: bound.append(compiled(*inputs)))
    # In this thread, where frames are seen.
    with torch.autograd.set_multithreading_enabled(False):
        entered += _frames(lambda: torch.autograd.grad(bound[0], inputs[1:3]))
    assert entered == []


# What the key has


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes_in_turns(dtype):
    for rows in (B, 2, B, B + 2):
        x, mu, logvar = (t.detach()[:1].expand(rows, -1).clone() for t in _inputs(dtype))
        x, mu, logvar = x * torch.arange(rows)[:, None].remainder(2).to(dtype), mu.requires_grad_(), logvar
        assert_same(f"{rows} rows", _step, [x, mu, logvar, draw(X, D, seed=5, dtype=dtype)])


def test_layouts_in_turns():
    seed = torch.tensor(5)

    def kl(mu, logvar, seed):
        return ops.rsample_kl(mu, logvar, k=K, seed=seed)

    def transposed(mu, logvar, seed):
        return kl(mu.T.contiguous().T, logvar, seed)

    def shifted(mu, logvar, seed):
        # By one element: addresses that are no multiples of 16.
        wide = torch.stack([mu, logvar], 2).flatten(1)
        return kl(torch.cat([wide.new_zeros(1), mu.flatten()])[1:].view(mu.shape), logvar, seed)

    def strided(mu, logvar, seed):
        both = torch.stack([mu, logvar], 2)
        return kl(both[..., 0], both[..., 1], seed)

    mu, logvar = (draw(B, D, seed=i).requires_grad_() for i in (1, 2))
    for call in (kl, transposed, shifted, strided, kl, shifted, transposed):
        assert_same(call.__name__, call, [mu, logvar, seed])


def test_inputs_that_are_one_tensor_and_later_are_not():
    seed = torch.tensor(5)

    def same(mu, other, seed):
        return ops.rsample_kl(mu, mu, k=K, prior=(mu, mu), seed=seed)

    def two(mu, other, seed):
        return ops.rsample_kl(mu, mu, k=K, prior=(other, other), seed=seed)

    def four(mu, other, seed):
        return ops.rsample_kl(mu, mu + 1, k=K, prior=(other, other + 1), seed=seed)

    mu, other = (draw(B, D, seed=i).requires_grad_() for i in (1, 2))
    for call in (same, two, four, two, same):
        # The other one's gradient is needed of all.
        assert_same(call.__name__, lambda *t, call=call: (*call(*t), 0 * t[1]), [mu, other, seed])


def test_offsets_vary_within_a_plan():
    mu, logvar = (draw(B, D, seed=i).requires_grad_() for i in (1, 2))
    counts = set()
    for sample, row in ((0, 0), (3, 0), (1, 7), (2**31 - 1, 2**30)):
        assert_same(
            f"offsets {sample}, {row}",
            lambda mu, logvar, seed, a=sample, b=row: ops.rsample_kl(
                mu, logvar, k=K, seed=seed, sample_offset=a, row_offset=b
            ),
            [mu, logvar, torch.tensor(11)],
        )
        counts.add(_C.count_plans())
    assert len(counts) == 1
    assert_same(
        "an offset of 64 bits",
        lambda mu, logvar, seed: ops.rsample_kl(mu, logvar, k=K, seed=seed, row_offset=2**31),
        [mu, logvar, torch.tensor(11)],
    )
    assert _C.count_plans() not in counts


def test_beta_varies_within_a_plan():
    counts = []
    # A step's warm-up: none of it plans anew but the special values.
    for beta in (0.25, 0.5, 1e-3, 3.0, 1.0, 0.75, 0.0, 1e-310, 0.125):
        assert_same(
            f"beta {beta}",
            lambda x, mu, logvar, beta=beta: fastvae.elbo(
                x, (mu, logvar), lambda z: z[:, :1].expand(-1, X), likelihood="bernoulli", beta=beta
            ),
            _inputs(),
        )
        counts.append(_C.count_plans()[0])
    assert counts[0] == counts[3] and counts[-1] == counts[-2]


def test_beta_as_a_tensor():
    for beta in (0.5, 2.0, 0.0):
        for shape in ((), (B,)):
            assert_same(
                f"beta {beta} {shape}",
                lambda x, mu, logvar, beta: fastvae.elbo(
                    x, (mu, logvar), lambda z: z[:, :1].expand(-1, X), likelihood="bernoulli", beta=beta
                ),
                [*_inputs(), torch.full(shape, beta)],
            )


def test_float64_factors_keep_their_digits():
    assert_same(
        "beta 0.1 in float64",
        lambda x, mu, logvar: fastvae.elbo(
            x, (mu, logvar), lambda z: z[:, :1].expand(-1, X), likelihood="bernoulli", beta=0.1
        ),
        _inputs(torch.float64),
    )


# What leaves a call to Python


@simulated
def test_the_backend_is_asked_at_each_call(card):
    x, mu, logvar = _on_card(*_inputs())
    for _ in range(2):
        _step(x, mu, logvar)
    card.clear()
    with fastvae.use_backend("reference"):
        _step(x, mu, logvar)
    assert not card
    _step(x, mu, logvar)
    assert card


def test_hooks_see_every_launch():
    inputs = _on_card(*_inputs())
    _step(*inputs)
    _step(*inputs)
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        _step(*inputs)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["rsample_log_ratio_kernel", "log_prob_kernel"]
    _step(*inputs)
    assert len(seen) == 2


def test_cleared_caches_have_no_plans():
    inputs = _on_card(*_inputs())
    _step(*inputs)
    assert _C.count_plans()[0] > 0
    launching.clear_caches()
    assert _C.count_plans() == (0, 0)
    _step(*inputs)
    assert _C.count_plans()[0] > 0


def test_freed_memory_is_reported():
    x, mu, logvar = _on_card(*_inputs())
    for _ in range(2):
        ops.bernoulli_log_prob(x, mu[:, :1].expand(-1, X))
    logits = draw(B, X, seed=3).cuda()
    ops.bernoulli_log_prob(x, logits)
    ops.bernoulli_log_prob(x, logits)
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage, which was freed"):
        ops.bernoulli_log_prob(x, logits)


def test_empty_batches_between_others():
    for rows in (B, 0, B):
        x, mu, logvar = (t.detach()[:rows].requires_grad_(t.requires_grad) for t in _inputs())
        assert_same(
            f"{rows} rows",
            lambda x, mu, logvar: fastvae.elbo(
                x, (mu, logvar), lambda z: z[:, :1].expand(-1, X), likelihood="bernoulli", reduction="sum"
            ),
            [x, mu, logvar],
        )


# Errors, threads


@simulated
@pytest.mark.parametrize("compiled", [False, True])
def test_a_failed_launch_names_the_op(compiled, monkeypatch):
    monkeypatch.setattr(normal_diagonal, "FEW_DRAWS", 0)  # for the compiler calls the op of large draws
    torch._dynamo.reset()
    x, mu, logvar = _on_card(*_inputs())
    call = torch.compile(ops.rsample_kl) if compiled else ops.rsample_kl
    seed = torch.tensor(1).cuda()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for _ in range(2):
            call(mu.detach(), logvar.detach(), k=K, seed=seed)
    with (
        control.failing("driver", 700),
        pytest.raises(RuntimeError, match=r"fastvae::rsample_kl: the launch of rsample_kl_kernel failed"),
    ):
        call(mu.detach(), logvar.detach(), k=K, seed=seed)
    call(mu.detach(), logvar.detach(), k=K, seed=seed)


@simulated
@pytest.mark.parametrize("compiled", [False, True])
def test_memory_that_is_not_there(compiled):
    torch._dynamo.reset()
    call = torch.compile(ops.rsample_kl) if compiled else ops.rsample_kl
    mu = torch.zeros(2048, 2048, device="cuda")  # results beyond the cached blocks
    seed = torch.tensor(1).cuda()
    with control.device(lambda *_: None):
        for _ in range(2):
            call(mu, mu, k=2, seed=seed)
        torch.cuda.empty_cache()
        # The allocator tries again after it has freed its cache.
        with control.failing("malloc", 2, times=100), pytest.raises(RuntimeError, match="out of memory"):
            call(mu, mu, k=2, seed=seed)
        call(mu, mu, k=2, seed=seed)


def test_a_thread_that_asked_nothing_of_the_card():
    inputs = _on_card(*_inputs())
    expected = ops.bernoulli_log_prob(inputs[0], inputs[0])
    ops.bernoulli_log_prob(inputs[0], inputs[0])
    found = []
    thread = threading.Thread(target=lambda: found.append(ops.bernoulli_log_prob(inputs[0], inputs[0])))
    thread.start()
    thread.join()
    assert torch.equal(found[0].cpu(), expected.cpu())


@simulated
def test_training_by_a_graph_of_replayed_calls():
    """Captured when every call is replayed: the graph has the launches, and computes with new data."""
    layer = nn.Linear(D, X).cuda().requires_grad_(False)
    x, mu, logvar = _on_card(*_inputs())
    weight = layer.weight

    def step(x):
        seed = torch.full((), 3, dtype=torch.int64, device="cuda")
        z, kl = ops.rsample_kl(mu.detach(), logvar.detach(), seed=seed)
        return ops.bernoulli_log_prob(x, z @ weight.T) - kl

    for _ in range(2):
        step(x)
    plans = _C.count_plans()
    run = fastvae.graphed(step)
    for data in (x, 1 - x, x):
        assert torch.allclose(run(data).cpu(), step(data).cpu(), atol=1e-5)
    assert _C.count_plans() == plans
