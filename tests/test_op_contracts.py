"""Every op, via torch's dispatcher or C++ directly, with each tensor invalid in each way.

The outcome is an error or the correct result, never a crash.
"""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastvae
from fastvae import ops
from fastvae.likelihoods.declared import DECLARED
from fastvae.ops.head import MOST_HIDDEN, reduce_linear
from fastvae.ops.op import REGISTERED
from fastvae.ops.reduce import BoundReduction, reduce

from . import cases
from .conftest import CUDA

K, B, D, X, H, U, E, P = 3, 4, 5, 6, 7, 8, 3, 9
HIDDEN = [None] * (2 * MOST_HIDDEN)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
)  # fmt: skip
# Validated by the same Python code for any backend.
FEW_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int32)


class _Recording(TorchDispatchMode):
    """Mode that records the arguments of the first call of each op."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvae":
            self.calls.setdefault(func._opname, args)
        return func(*args, **(kwargs or {}))


def _leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def recorded(likelihoods):
    """Return valid dispatcher arguments of every op."""
    with _Recording() as mode:
        total = 0
        mu, logvar, p_mu, p_logvar = (_leaf(B, D, seed=s) for s in range(4))
        seed = torch.tensor(5)
        options = {"k": K, "prior": (p_mu, p_logvar), "seed": seed}
        for results in (
            ops.rsample_kl(mu, logvar, **options),
            ops.rsample_log_ratio(mu, logvar, estimator="dreg", **options),
            ops.rsample_tril(mu, _leaf(B, D * (D + 1) // 2, seed=4), k=K, seed=seed),
        ):
            total = total + sum(r.square().sum() for r in results)
        total = total + ops.log_mean_exp(_leaf(K, B)).square().sum()
        total = total + ops.mixture_log_prob(_leaf(B, D), _leaf(U, D), _leaf(U, D), _leaf(U)).sum()
        whole, each = ops.aggregate_log_prob(_leaf(B, D), _leaf(U, D), _leaf(U, D))
        total = total + whole.square().sum() + each.square().sum()
        total = total + ops.categorical_log_prob(torch.ones(B, P), _leaf(K, B, U, P)).sum()
        mask = cases.mask_of("most", B, X).cpu()
        total = total + ops.multinomial_log_prob(torch.ones(B, X), _leaf(K, B, X), mask=mask).sum()
        each = _leaf(K, B, U, E, P)
        logits, x = _leaf(K, B, U, P), torch.zeros(B, E, P)
        parts = (each, each, each)
        total = total + ops.discretized_logistic_mixture_log_prob(x, logits, *parts).sum()
        how = BoundReduction(1.0, "log_mean_exp", "none")
        for name in likelihoods:
            x = cases.data(name, B, X, seed=1).cpu().clamp(max=100)  # fits int8
            parameters = [p.cpu().requires_grad_() for p in cases.parameters(name, K, B, X, seed=2)]
            mask = cases.mask_of("most", B, X).cpu()
            total = total + getattr(ops, f"{name}_log_prob")(x, *parameters, mask=mask).sum()
            flat = tuple(p.detach().flatten(0, 1).requires_grad_() for p in parameters)
            total = total + reduce(name, x, flat, _leaf(K, B), torch.ones(B), how, mask=mask)[0].sum()
        x = cases.data("bernoulli", B, X, seed=1).cpu()
        layer = (_leaf(K * B, H), _leaf(X, H), _leaf(X), None, None)
        torch.ops.fastvae.linear_log_prob(x, *layer, *HIDDEN, "bernoulli", "").sum().backward()
        total = (
            total + reduce_linear("bernoulli", x, _layers(layer), _leaf(K, B), torch.ones(B), how)[0].sum()
        )
        total.backward()
        fastvae.random.normal(seed, K, B, D)
        fastvae.ops.codebook.nearest_code(_leaf(B, D).detach(), _leaf(U, D).detach())
    return mode.calls


def _layers(layer):
    from fastvae.ops.head import Layers

    return Layers(*layer)


def wrong(t, dtypes=DTYPES):
    """Yield (name, tensor) for each way in which a tensor may be invalid, or only seem so."""
    for dtype in dtypes:
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    for axis, n in enumerate(t.shape):
        yield f"one fewer along {axis}", t.narrow(axis, 0, n - 1).clone()
        yield f"one more along {axis}", torch.cat([t, t.narrow(axis, 0, 1)], axis)
        yield f"without axis {axis}", t.select(axis, 0).clone()
        yield f"empty along {axis}", t.narrow(axis, 0, 0).clone()
    yield "an axis before", t[None].clone()
    yield "an axis behind", t[..., None].clone()
    yield "four axes before", t[None, None, None, None].clone()
    yield "two of each before", torch.stack([t, t])
    yield "strided", torch.stack([t, t], -1)[..., 0]
    yield "on meta", t.to("meta")
    if t.dim() == 0:
        yield "empty", t.new_empty(0)
    else:
        yield "of stride 0", t[:1].expand(t.shape)
    if t.dim() == 2:
        yield "transposed", t.mT.contiguous().mT
        yield "sparse", t.to_sparse()
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    yield "freed", freed
    smaller = t.clone()
    smaller.untyped_storage().resize_(max(0, t.untyped_storage().nbytes() - t.itemsize))
    yield "of a storage too small", smaller


def _in_float64(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def _expected(op, args):
    """Compute the results by the definition in float64; None if it raises."""
    try:
        with torch.no_grad():
            return op._packed(op.composed("reference"))(*tree_map(_in_float64, args))
    except Exception:
        return None


def _complaint(op, args, found):
    """Return an error in the results, or None."""
    found = found if isinstance(found, tuple) else (found,)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(f is not None and f.is_meta for f in found):
        return None if len(tensors) == 1 else "ran on meta"
    expected = _expected(op, args)
    if expected is None:
        return "the definition refuses it"
    expected = expected if isinstance(expected, tuple) else (expected,)
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    for f, e in zip(found, expected, strict=False):
        if f is None or e is None or f.shape == (0,) != e.shape:
            continue
        if f.shape != e.shape and f.numel() != e.numel():
            return f"shape {list(f.shape)} for {list(e.shape)}"
        f, e = f.double().flatten(), e.double().flatten()
        scale = e[e.isfinite()].abs().max().clamp(min=1) if e.isfinite().any() else 1.0
        if not torch.allclose(f, e, rtol=0, atol=float(scale) * (0.05 if half else 1e-4), equal_nan=True):
            return f"{f[:4].tolist()} for {e[:4].tolist()}"
    return None


def walk(backend, likelihoods):
    """Print each call before running it, so that the last is the one that crashed; return complaints."""
    with fastvae.use_backend("native" if backend == "native" else "reference"):
        calls = recorded(likelihoods)
    # Torch's own functions compute the draws of op.module "gamma", and validate their arguments.
    ours = [n for n, op in REGISTERED.items() if op.module != "gamma"]
    missing = [n for n in ours if n not in calls and not _of_another_likelihood(n, likelihoods)]
    assert not missing, f"no arguments were recorded for {missing}"
    complaints, accepted, refused = [], 0, 0
    for name, args in calls.items():
        op = REGISTERED[name]
        overloads = ("default", "kernel") if backend == "native" else ("kernel",)
        ways = {o: getattr(getattr(torch.ops.fastvae, name), o) for o in overloads}
        # The fast path; its plain PyTorch fallbacks are not validated there.
        if backend == "native" and _is_cpp(op.native):
            ways["C++"] = op._packed(op.native)
        for i, t in enumerate(args[: op._tensors]):
            if t is None:
                continue
            # The forward pass saved draws of the original parameters.
            kept = any(n in ("slope", "eps") for n in op.contract.names)
            for kind, mutated in wrong(t, DTYPES if backend == "native" else FEW_DTYPES):
                if kept and kind == "of stride 0":
                    continue
                given = (*args[:i], mutated, *args[i + 1 :])
                for way, call in ways.items():
                    case = f"{name}.{way}: {op.contract.names[i]} {kind}"
                    print(case, flush=True)
                    try:
                        with torch.no_grad(), fastvae.use_backend(backend):
                            found = call(*given)
                    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
                        refused += 1
                        if "internal" in str(error).lower() or "unreachable" in str(error).lower():
                            complaints.append(f"{case}: {error}")
                        continue
                    accepted += 1
                    # A tensor without data may be one that is not read.
                    unreadable = kind in ("on meta", "freed", "of a storage too small")
                    if (complaint := _complaint(op, args if unreadable else given, found)) is not None:
                        complaints.append(f"{case}: {complaint}")
    print(f"{accepted} calls were right, {refused} were refused")
    return complaints


def _is_cpp(function):
    return inspect.isbuiltin(function.func if isinstance(function, functools.partial) else function)


def _of_another_likelihood(op, likelihoods):
    return any(n in op for n in DECLARED if n not in likelihoods)


if __name__ == "__main__":
    found = walk(sys.argv[1], sys.argv[2:])
    print("\n".join(found))
    sys.exit(bool(found))


@pytest.mark.parametrize("overload", ["default", "kernel"])
def test_layers_with_a_wrong_number_of_outputs_are_refused(overload):
    """The C++ would read an output that is not there."""
    op = getattr(torch.ops.fastvae.linear_log_prob, overload)
    x, h, weight = torch.zeros(B, X), torch.zeros(K * B, H), torch.zeros(X, H)
    with pytest.raises(ValueError, match="as many layers and constants as gaussian has outputs, 2"):
        op(x, h, weight, None, None, None, *HIDDEN, "gaussian", "")
    with pytest.raises(ValueError, match="as many layers and constants as bernoulli has outputs, 1"):
        op(x, h, weight, None, torch.zeros(X), None, *HIDDEN, "bernoulli", "")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", ["linear_log_prob", "reduce_bernoulli"])
@pytest.mark.parametrize(
    "x", [torch.zeros(B, X, dtype=torch.complex64), torch.zeros(B, X, 1), torch.zeros(X)]
)
def test_data_are_real_rows(x, op, backend):
    layer = torch.zeros(K * B, H), torch.zeros(X, H), None, None, None, *HIDDEN, "bernoulli", ""
    bound = None, torch.zeros(K * B, X), torch.zeros(B), None, *BoundReduction(1.0, "mean", "mean"), False
    call = getattr(torch.ops.fastvae, op).default
    with (
        fastvae.use_backend(backend),
        pytest.raises(ValueError, match=r"^fastvae::.*: x (is|has) .* expected"),
    ):
        call(x, *(layer if op == "linear_log_prob" else bound))


@pytest.mark.parametrize(
    "way",
    [
        "native",
        "reference",
        pytest.param("triton", marks=pytest.mark.skipif(CUDA, reason="runs the interpreter")),
    ],
)
def test_wrong_tensors(way):
    names = sorted(DECLARED) if way == "native" else ["gaussian"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_op_contracts", way, *names], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-3000:], done.stderr[-2000:])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_results_have_the_layout_that_compiled_code_expects(backend):
    """Results have the strides of the op's fake for any layout of the inputs: graphs take views of them."""

    def turned(t):
        return t.mT.contiguous().mT

    with fastvae.use_backend(backend):
        calls = recorded(list(DECLARED))
        for name, args in calls.items():
            op = getattr(torch.ops.fastvae, name)
            args = tree_map(lambda t: t.detach() if _is(t) else t, args)
            axes = [i for i, t in enumerate(args) if _is(t) and t.dim() > 1]
            accepted = 0
            for those in (axes, *([i] for i in axes)):
                given = [turned(t) if i in those else t for i, t in enumerate(args)]
                try:
                    results = op(*given)
                except ValueError as error:  # tensors that an op saved for its gradient are contiguous
                    assert "contiguous" in str(error)
                    continue
                accepted += 1
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    fakes = op(*tree_map(lambda t, m=mode: m.from_tensor(t) if _is(t) else t, given))
                for result, fake in zip(tree_leaves(results), tree_leaves(fakes), strict=True):
                    if result is not None:
                        assert result.shape == fake.shape and result.stride() == fake.stride(), (name, those)
            assert accepted or not axes, name


def _is(t):
    return isinstance(t, torch.Tensor)
