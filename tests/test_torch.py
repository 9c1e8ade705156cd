"""The ops and objectives inside torch: dispatcher, autograd, compile, autocast, torch.func, DDP, modules."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import distributed, nn

import fastvae
from fastvae import ops
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian
from fastvae.ops import head
from fastvae.ops.reduce import BoundReduction

from . import cases, models
from .cases import DECLARED, LIKELIHOODS
from .conftest import CUDA, DEVICE
from .models import generator, rand, randn, seed_of

B, D, X, K = 5, 3, 7, 4
INF = math.inf


@pytest.fixture
def fallback_random():
    """Make compiled code draw seeds from torch's own generator, so that it equals eager mode."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


# The registration.


LOGVAR = ("logvar", 0.0)


def _latent_arguments(op: str):
    """Yield argument lists of an op of the latent module: with and without prior, clamp, offsets."""
    mu, logvar = randn(B, D, seed=1).requires_grad_(), randn(B, D, seed=2).requires_grad_()
    prior = tuple(randn(B, D, seed=s).requires_grad_() for s in (3, 4))
    row = tuple(randn(D, seed=s).requires_grad_().expand(B, D) for s in (5, 6))
    options = {
        "rsample_kl": ((True,), (False,), (False,)),
        "rsample_log_ratio": (("iwae", 0.0, 1, False), ("stl", 0.0, 1, True), ("dreg", 0.5, K, False)),
    }[op]
    yield mu, logvar, None, None, seed_of(1), 1, 0, 0, -INF, INF, False, *LOGVAR, *options[0], True
    yield mu.detach(), logvar, *prior, seed_of(1), K, 2, 9, -0.5, 0.5, True, *LOGVAR, *options[1], True
    yield mu, logvar.detach(), *row, seed_of(1), K, 0, 0, -INF, INF, False, *LOGVAR, *options[2], False
    if op == "rsample_kl":
        yield mu, logvar, None, None, seed_of(1), 1, 0, 0, -INF, INF, True, *LOGVAR, *options[0], True
    for form in (("log_scale", 0.0), ("softplus", 0.0), ("softplus", 1e-2)):
        yield mu, logvar, *prior, seed_of(1), K, 2, 9, -INF, INF, True, *form, *options[1], True
    sigma = logvar.detach().exp().requires_grad_()
    yield mu, sigma, None, None, seed_of(1), K, 2, 9, -INF, INF, True, "scale", 0.0, *options[0], True


def _backward_arguments(op: str):
    """Yield argument lists of an op's backward, with and without each upstream gradient."""
    g = {
        "z": randn(K, B, D, seed=7),
        "kl": randn(B, seed=8),
        "dims": randn(B, D, seed=9),
        "ratio": randn(K, B, seed=10),
        "slope": randn(K, B, D, seed=16),
    }
    mu, logvar, *prior = (randn(B, D, seed=s) for s in (1, 2, 3, 4))
    inputs = (mu, logvar, *prior, seed_of(1), K, 2, 9, -0.5, 0.5, False, *LOGVAR)
    bare = (mu, logvar, None, None, seed_of(1), K, 0, 0, -INF, INF, False, *LOGVAR)
    raw = (mu, logvar, *prior, seed_of(1), K, 2, 9, -INF, INF, False, "softplus", 1e-2)
    if op == "rsample_kl_backward":
        yield g["z"], g["kl"], g["slope"], *inputs, [True] * 4
        yield None, g["dims"], g["slope"], *bare, [True, False, False, False]
        yield g["z"], None, None, *inputs, [False, True, True, False]
        yield g["z"], g["kl"], None, *raw, [True] * 4
        bare = (mu, logvar, None, None, seed_of(1), 1, 0, 0, -INF, INF, True, *LOGVAR)
        yield g["z"][0], g["kl"], g["slope"][0], *bare, [True, True, False, False]
    else:
        yield g["z"], g["ratio"], None, g["slope"], *inputs, False, [True] * 4
        yield (
            *(g["z"], g["ratio"], torch.softmax(g["ratio"], 0), None),
            *(*bare, True, [True, True, False, False]),
        )
        yield g["z"], g["ratio"], None, None, *raw, True, [True] * 4
        yield None, g["ratio"], None, g["slope"], *inputs, True, [False, False, True, True]
        yield g["z"], None, None, g["slope"], *inputs, False, [True, False, False, False]


def _tril_arguments(op: str):
    """Yield argument lists of full-covariance draws, flat or not, and of their backward pass."""
    inputs = [randn(B, D, seed=1), randn(B, D * (D + 1) // 2, seed=2)]
    place = seed_of(1), K, 2, 9
    if op == "rsample_tril":
        for dtype, flat, keep in ((torch.float32, False, True), (torch.float64, True, True)):
            yield *(t.to(dtype).requires_grad_() for t in inputs), *place, flat, keep
        yield inputs[0].bfloat16().requires_grad_(), inputs[1].bfloat16(), *place, False, False
        return
    grad_z, grad_log_q, eps = randn(K, B, D, seed=7), randn(K, B, seed=8), randn(B, K, D, seed=9)
    yield grad_z, grad_log_q, eps, *inputs, *place, False, [True, True]
    yield grad_z.flatten(0, 1), None, None, *inputs, *place, True, [False, True]
    yield grad_z, grad_log_q, None, *inputs, *place, False, [True, False]
    yield None, grad_log_q, None, *inputs, *place, False, [True, True]


def _log_prob_arguments(op: str):
    """Yield argument lists of a likelihood and its backward pass: broadcast parameters, dtypes."""
    declared = DECLARED[op.removesuffix("_backward").removesuffix("_log_prob")]
    x, first = cases.data(declared.name, B, X), randn(K, B, X, seed=12)
    masks = None, cases.mask_of("most", B, X), cases.mask_of("of one event", B, X), None
    others = len(declared.outputs) - 1
    for i, shape in enumerate(((K, B, X), (1, 1, X), (1, 1, 1), (K, B, 1)) if others else [(K, B, X)] * 3):
        mask = masks[i]
        given = [first, *(randn(*shape, seed=14 + j) for j in range(others))]
        if op.endswith("_backward"):
            need = [declared.differentiable and i != 1] + [True] * len(given)
            yield randn(K, B, seed=13), x, mask, *given, need
            yield randn(K, B, seed=13), x, mask, *given, [False, True] + [False] * others
        else:
            leaves = (p.clone().requires_grad_() for p in given)
            yield x.clone().requires_grad_(declared.differentiable), mask, *leaves
    if not op.endswith("_backward"):
        yield (
            x,
            masks[1],
            first.bfloat16().requires_grad_(),
            *(randn(1, B, X, seed=14) for _ in range(others)),
        )
        if declared.takes_integers:
            yield (
                x.int(),
                None,
                first.half().requires_grad_(),
                *(randn(1, 1, X, seed=14) for _ in range(others)),
            )


def _reduce_arguments(op: str):
    """Yield argument lists of a bound and its backward pass: terms, reductions, broadcast parameters."""
    declared = DECLARED[op.removeprefix("reduce_").removesuffix("_backward")]
    x, rows = cases.data(declared.name, B, X), randn(K * B, X, seed=12)
    kl, ratio, beta = randn(B, seed=41), randn(K, B, seed=42), rand(B, seed=43)
    masks = iter((None, cases.mask_of("most", B, X), cases.mask_of("of one event", B, X)))
    seconds = [(K * B, X), (X,), ()]
    for shape, term, factor, over, reduction, terms in (
        (seconds[0], kl, None, "mean", "mean", True),
        (seconds[1], ratio, beta, "mean", "none", False),
        (seconds[2], ratio, None, "log_mean_exp", "sum", True),
    ):
        parameters = (rows, *(randn(*shape, seed=14 + j) for j in range(len(declared.outputs) - 1)))
        how = BoundReduction(-0.5, over, reduction, *((0.5, K, 0.25) if over == "log_mean_exp" else ()))
        mask = next(masks)
        if not op.endswith("_backward"):
            leaves = (t.clone().requires_grad_() for t in (*parameters, term))
            yield x.clone().requires_grad_(declared.differentiable), mask, *leaves, factor, *how, terms
            continue
        weights = torch.softmax(ratio, 0) if over == "log_mean_exp" else None
        grad = randn(B, seed=44) if reduction == "none" else randn(seed=44)
        mean = randn(B, seed=45) if terms and over == "mean" else None
        need = [declared.differentiable] + [True] * (len(parameters) + 1)
        yield grad, mean, weights, x, mask, *parameters, term, factor, *how, need


def _categorical_arguments(op: str):
    """Yield argument lists of float and integer classes, many and few positions, and classes last."""
    cases = (
        (9, 5, False, torch.float32),
        (9, 5, False, torch.bfloat16),
        (2, 17, True, torch.float32),
        (9, 5, True, torch.float64),
    )
    for p, c, last, dtype in cases:
        x = torch.arange(B * p, device=DEVICE).reshape(B, p) % 5
        x = x if p > 2 else x.float()
        logits = randn(K * B, *((p, c) if last else (c, p)), seed=1).to(dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        if op.endswith("_backward"):
            yield randn(K * B, seed=3).to(wide), randn(K * B, p, seed=4).to(wide), x, None, logits, last, -100
        else:
            yield x, None, logits.requires_grad_(), last, -100
    x, begins, logits = (
        torch.arange(2 * B).reshape(B, 2) % 3,
        torch.tensor([0, 3, 20]),
        randn(K * B, 20, seed=1),
    )
    x, begins = x.to(DEVICE), begins.to(DEVICE)
    if op.endswith("_backward"):
        yield randn(K * B, seed=3), randn(K * B, 2, seed=4), x, begins, logits, True, -100
    else:
        yield x, begins, logits.requires_grad_(), True, -100


def _multinomial_arguments(op: str):
    """Yield argument lists of dense and sparse counts, with and without a mask."""
    x = (3 * rand(B, X, seed=1)).floor()
    csr = x.to_sparse_csr()
    # Copies: a view of a sparse tensor cannot be traced.
    values, begins, columns = (t.clone() for t in (csr.values(), csr.crow_indices(), csr.col_indices()))
    mask = rand(B, X, seed=2) > 0.3
    for dtype, given in (
        (torch.float32, (x, None, None, None)),
        (torch.bfloat16, (x.long(), None, None, mask)),
        (torch.float64, (values, begins, columns, None)),
        (torch.float32, (values, begins, columns, mask)),
    ):
        wide = dtype if dtype == torch.float64 else torch.float32
        logits = randn(K * B, X, seed=3).to(dtype)
        if op.endswith("_backward"):
            grad, normaliser = (randn(K * B, seed=s).to(wide) for s in (4, 5))
            yield grad, normaliser, x.sum(1).to(wide), *given, logits
        else:
            yield *given, logits.requires_grad_(), dtype != torch.float64


def _components_arguments(op: str):
    """Yield argument lists of mixtures, grey and coloured."""
    backward = op.endswith("_backward")

    def of(x, parameters, half):
        n, _, p = parameters[0].shape
        if not backward:
            return (x, *(None if q is None else q.clone().requires_grad_() for q in parameters), half)
        sums = [randn(*shape, seed=3) for shape in ((n,), (n, p), (n, p))]
        needs = [False, True, *[q is not None and i != 1 for i, q in enumerate(parameters[1:])]]
        return (*sums, x, *parameters, half, needs)

    for channels, coupled in ((1, False), (3, True)):
        x = rand(B, channels, 9, seed=1).round() * 2 - 1
        others = [randn(K * B, 2 * channels, 9, seed=2 + i) for i in range(3)]
        yield of(x, (randn(K * B, 2, 9, seed=1), *others[:2], others[2] if coupled else None), 1 / 3)


def _head_arguments(op: str):
    """Yield argument lists with one and two products, biases or not, fixed parameters, one-pass bounds."""
    b, inner = 9, 4
    x, grad = rand(b, X, seed=1).round(), randn(K, b, seed=2)
    for likelihood, count, fixed in (("bernoulli", 1, 0), ("gaussian", 2, 0), ("gaussian", 1, 1)):
        h, weight = randn(K * b, inner, seed=3), randn(count * X, inner, seed=4)
        layers = [h, weight, randn(count * X, seed=5) if count == 1 else None, None, None]
        layers[3] = randn(X, seed=6) if fixed else None
        width = 3 if count == 2 else None  # of one hidden layer
        names = likelihood, "" if width is None else "elu:0.7"
        if width is not None:
            layers[0] = randn(K * b, width, seed=3)
        hidden = [None, None] if width is None else [randn(inner, width, seed=9), randn(inner, seed=10)]
        layers += [*hidden, *[None] * (2 * head.MOST_HIDDEN - 2)]
        need = [t is not None for t in layers]
        if op == "linear_log_prob":
            yield (
                x,
                *(t if t is None else t.clone().requires_grad_() for t in layers),
                *names,
            )
        elif op == "linear_log_prob_backward":
            yield grad, x, *layers, *names, need
            yield grad, x, *layers, *names, [True, *[False] * (len(layers) - 1)]
        else:
            for over, reduction in (("mean", "none"), ("log_mean_exp", "none"), ("log_mean_exp", "mean")):
                how, term = BoundReduction(-0.5, over, reduction), randn(K, b, seed=7)
                if op == "reduce_linear":
                    leaves = (t if t is None else t.clone().requires_grad_() for t in layers)
                    yield (
                        x,
                        *leaves,
                        term.clone().requires_grad_(),
                        None,
                        *how,
                        *names,
                        False,
                        need,
                    )
                    continue
                weights = torch.softmax(grad, 0) if over == "log_mean_exp" else None
                arrives = randn(b, seed=8) if reduction == "none" else randn(seed=8)
                yield (
                    arrives,
                    None,
                    weights,
                    x,
                    *layers,
                    term,
                    None,
                    *how,
                    *names,
                    [*need, True],
                )


def _arguments(op: str):
    """Return all argument lists that opcheck gets for ``torch.ops.fastvae.<op>``."""
    log_w = randn(K, B, seed=13)
    if op.startswith("rsample_tril"):
        yield from _tril_arguments(op)
    elif op.startswith("rsample"):
        yield from _backward_arguments(op) if op.endswith("_backward") else _latent_arguments(op)
    elif op.startswith("categorical"):
        yield from _categorical_arguments(op)
    elif op.startswith("multinomial"):
        yield from _multinomial_arguments(op)
    elif op.startswith("discretized_logistic_mixture"):
        yield from _components_arguments(op)
    elif op.startswith(("linear_log_prob", "reduce_linear")):
        yield from _head_arguments(op)
    elif op.startswith(tuple(LIKELIHOODS)):
        yield from _log_prob_arguments(op)
    elif op.startswith("reduce"):
        yield from _reduce_arguments(op)
    elif op.startswith("mixture_log_prob"):
        components = randn(7, D, seed=21), randn(7, D, seed=22), randn(7, seed=23)
        if op == "mixture_log_prob":
            for dtype in (torch.float32, torch.float64):
                yield [t.to(dtype).requires_grad_() for t in (randn(B, D, seed=20), *components)]
        else:
            column, total = randn(B, seed=24), rand(B, seed=25) + 1
            for need in ([True] * 4, [True, False, False, False], [False, True, False, True]):
                yield column, column, total, randn(B, D, seed=20), *components, need
    elif op.startswith("aggregate_log_prob"):
        components = randn(7, D, seed=21), randn(7, D, seed=22)
        if op == "aggregate_log_prob":
            for dtype, size in ((torch.float32, 0), (torch.float64, 20)):
                inputs = [t.to(dtype).requires_grad_() for t in (randn(14, D, seed=20), *components)]
                yield *inputs, size
        else:
            z, each, column = randn(14, D, seed=20), randn(14, D, seed=24), randn(14, seed=25)
            for given, need in (((column, each), [True] * 3), ((None, each), [False, True, False])):
                yield *given, column, each, z, *components, 20, need
    elif op == "log_mean_exp":
        yield (log_w.clone().requires_grad_(),)
        yield (log_w.double().T.contiguous().T.requires_grad_(),)
    elif op == "log_mean_exp_backward":
        maximum = log_w.amax(0)
        yield randn(B, seed=15), log_w, maximum, torch.exp(log_w - maximum).sum(0)
    elif op == "nearest_code":
        for dtype in (torch.float32, torch.float64):
            yield randn(B, D, seed=26, dtype=dtype), randn(7, D, seed=27, dtype=dtype)
    elif op in ("standard_gamma", "dirichlet"):
        yield rand(K, B, D, seed=28).requires_grad_(), torch.tensor(9, device=log_w.device), 1, 4
    elif op in ("standard_gamma_backward", "dirichlet_backward"):
        z = rand(B, D, seed=29)
        yield rand(B, D, seed=28), z / z.sum(-1, True), randn(B, D, seed=30)
    elif op == "normal":
        yield torch.tensor(9, device=log_w.device), K, B, D, 1, 4, 2, torch.float32


def _registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("fastvae::") for n in names if n.startswith("fastvae::"))


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("op", _registered())
def test_opcheck(op, implementation):
    name, _, overload = op.partition(".")
    cases = list(_arguments(name))
    assert cases, f"no arguments here for fastvae::{name}: add some"
    registered = getattr(getattr(torch.ops.fastvae, name), overload or "default")
    with fastvae.use_backend(implementation):
        for arguments in cases:
            if overload:  # below autograd
                arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
            torch.library.opcheck(registered, arguments)


def _kernel_arguments(name: str):
    """Yield opcheck's argument lists, and dtypes for which the C++ falls back to Python."""
    yield from _arguments(name)
    if name == "normal":
        yield torch.tensor([9, 4]), K, B, D, 1, 4, 0, torch.float64  # of two randomisations
    if name in ("linear_log_prob", "linear_log_prob_backward", "reduce_linear"):
        for arguments in _arguments(name):
            # Weights and biases that the C++ must copy first.
            yield [a.half() if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in arguments]
    if not name.startswith("reduce_gaussian"):
        return
    for x, mask, mean, logvar, term, *rest in _arguments(name) if not name.endswith("_backward") else ():
        yield x, mask, mean.bfloat16(), logvar.bfloat16(), term, *rest
        yield x, mask, mean, logvar, term.double(), *rest
        empty = mask if mask is None else mask[:, :0]
        yield x[:, :0], empty, mean[:, :0], logvar[..., :0] if logvar.dim() else logvar, term, *rest
    for grads, weights, own, x, mask, mean, logvar, *rest in (
        _arguments(name) if name.endswith("_backward") else ()
    ):
        yield grads, weights, own, x, mask, mean.bfloat16(), logvar.bfloat16(), *rest


@pytest.mark.parametrize("name", sorted({n.partition(".")[0] for n in _registered()}))
def test_kernels_of_graphs_equal_the_ops(name):
    """The kernels a compiled graph calls, in C++ on CPU tensors, give the op's bits."""
    op = getattr(torch.ops.fastvae, name)
    for arguments in _kernel_arguments(name):
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        with torch.inference_mode():  # below autograd, so from Python
            expected = op.default(*arguments)
        actual = op.kernel(*arguments)
        if isinstance(expected, torch.Tensor):
            expected, actual = [expected], [actual]
        for a, e in zip(actual, expected, strict=True):
            if e is None:
                assert a is None
            else:
                torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, check_stride=True)


@pytest.mark.parametrize("x", [0.5, 1.5], ids=["in C++", "refused by Python"])
def test_kernels_of_graphs_leak_nothing(x):
    x, logits, term = torch.full((B, X), x), torch.zeros(K * B, X), torch.zeros(K, B)
    how = *BoundReduction(1.0, "log_mean_exp", "none"), True
    results = ()
    try:
        results = torch.ops.fastvae.reduce_bernoulli.kernel(x, None, logits, term, None, *how)
    except ValueError:
        assert x[0, 0] > 1
    alive = [weakref.ref(t) for t in (x, logits, term, *results)]
    # A tensor referenced in C++ would keep its Python object alive.
    del x, logits, term, results
    assert [r() for r in alive] == [None] * len(alive)


def _functions_called(function) -> set[str]:
    """Return the names of fastvae's Python functions that run in a call."""
    folder, names = os.path.dirname(fastvae.__file__), set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.skipif(CUDA, reason="on a GPU the kernels are Triton's, which Python launches")
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "mixture_log_prob",
        "mixture_log_prob_backward",
        "aggregate_log_prob",
        "aggregate_log_prob_backward",
        "categorical_log_prob",
        "categorical_log_prob_backward",
        "multinomial_log_prob",
        "multinomial_log_prob_backward",
        "discretized_logistic_mixture_log_prob",
        "discretized_logistic_mixture_log_prob_backward",
        "linear_log_prob",
        "linear_log_prob_backward",
        "reduce_linear",
    ],
)
def test_kernels_of_graphs_call_no_python(name):
    kernel = getattr(torch.ops.fastvae, name).kernel
    arguments = next(iter(_arguments(name)))
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    assert _functions_called(lambda: kernel(*arguments)) <= {"on_cpu", "_default"}


@pytest.mark.skipif(CUDA, reason="on a GPU the kernels are Triton's, which Python launches")
def test_a_compiled_graph_calls_no_python():
    x, mu, logvar = rand(B, X, seed=1), randn(B, D, seed=2), randn(B, D, seed=3)
    weight = randn(X, D, seed=4).requires_grad_()

    def loss(x, mu, logvar):
        def decoder(z):
            return z @ weight.T

        options = {"likelihood": "bernoulli"}
        return fastvae.elbo(x, (mu, logvar), decoder, **options) + fastvae.iwae(
            x, (mu, logvar), decoder, k=K, estimator="dreg", **options
        )

    compiled = torch.compile(loss, fullgraph=True)
    inputs = mu.requires_grad_(), logvar.requires_grad_()

    def step(x=x):
        return torch.autograd.grad(compiled(x, *inputs), (*inputs, weight))

    first = step()
    # It only looks up the selected backend.
    assert _functions_called(step) <= {"on_cpu", "_default"}
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(loss)) == 1
    with pytest.raises(ValueError, match=r"x holds values in .*Bernoulli targets must lie in \[0, 1\]"):
        step(x + 1)
    with fastvae.use_backend("reference"):
        assert "reduce" in _functions_called(step)
    assert all(g.shape == f.shape for g, f in zip(step(), first, strict=True))


# Derivatives.


def _double(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def gradcheck(function, inputs) -> bool:
    """Run torch's gradcheck without undefined gradients, which are tested in a separate process."""
    return torch.autograd.gradcheck(function, inputs, check_undefined_grad=False)


@pytest.mark.parametrize("prior", ["standard", "row", "full"])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradcheck_of_the_sampling_ops(implementation, prior):
    mu, logvar = _double(B, D, seed=20), _double(B, D, seed=21)
    shape = {"row": (D,), "full": (B, D)}.get(prior)
    parts = () if shape is None else (_double(*shape, seed=22), _double(*shape, seed=23))
    forms = ({"scale": "log_scale"}, {"scale": "softplus"}, {"scale": "softplus", "floor": 0.1})
    # Some log variances lie outside the clamp, none near its corners.
    assert bool((logvar.abs() > 1.2).any())
    assert float((logvar.detach().abs() - 1.2).abs().min()) > 1e-3
    seed = seed_of(2)

    def arguments(mu, logvar, *parts):
        return {"args": (mu, logvar), "prior": parts or None, "seed": seed, "k": K}

    def call(op, **options):
        def function(*leaves):
            given = arguments(*leaves)
            return op(*given.pop("args"), **given, **options)

        return function

    with fastvae.use_backend(implementation):
        for function in (
            call(ops.rsample_kl),
            call(
                ops.rsample_kl,
                per_dimension=True,
                logvar_range=(-1.2, 1.2),
                sample_offset=3,
                row_offset=2**31,
            ),
            call(ops.rsample_log_ratio),
            call(ops.rsample_log_ratio, logvar_range=(-1.2, 1.2)),
            *(call(op, **form) for op in (ops.rsample_kl, ops.rsample_log_ratio) for form in forms),
        ):
            assert gradcheck(function, (mu, logvar, *parts))
        for op in (ops.rsample_kl, ops.rsample_log_ratio):
            assert gradcheck(call(op, scale="scale"), (mu, logvar.detach().exp().requires_grad_(), *parts))


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradcheck_of_the_likelihoods(implementation):
    x, mean = _double(B, X, seed=24), _double(K, B, X, seed=25)
    targets = rand(B, X, seed=26, dtype=torch.float64).requires_grad_()
    with fastvae.use_backend(implementation):
        # One entry per element, per sample, per pixel, per row, per row and sample, one for all, and a
        # partial row.
        for shape in ((K, B, X), (K, 1, 1), (X,), (B, 1), (K, B, 1), ()):
            assert gradcheck(ops.gaussian_log_prob, (x, mean, _double(*shape, seed=27)))
        image, centre = _double(B, 2, 3, seed=28), _double(K, B, 2, 3, seed=29)
        assert gradcheck(ops.gaussian_log_prob, (image, centre, _double(2, 1, seed=30)))
        assert gradcheck(ops.bernoulli_log_prob, (targets, mean))
        assert gradcheck(ops.bernoulli_log_prob, (targets, _double(B, X, seed=31)))


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradcheck_of_log_mean_exp(implementation):
    with fastvae.use_backend(implementation):
        for dim in (0, 1, -1):
            assert gradcheck(lambda w: ops.log_mean_exp(w, dim), (_double(K, B, D, seed=32),))  # noqa: B023


@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "elbo free bits", "elbo free bits of each", "iwae"])
def test_gradcheck_of_the_objectives(objective):
    """Gradcheck by encoder outputs, decoder weights, learned scale, learned prior and x at once."""
    x, mu, logvar, weight = (
        _double(B, X, seed=33),
        _double(B, D, seed=34),
        _double(B, D, seed=35),
        _double(D, X, seed=36),
    )
    prior_mu, prior_logvar = _double(D, seed=37), _double(D, seed=38)
    scale = (rand(X, seed=39, dtype=torch.float64) + 0.5).requires_grad_()

    def function(x, mu, logvar, weight, scale, prior_mu, prior_logvar):
        shared = {
            "likelihood": Gaussian(scale=scale),
            "prior": DiagonalNormal(prior_mu, prior_logvar),
            "reduction": "none",
            "generator": generator(3),
        }
        decoder = lambda z: torch.tanh(z @ weight)  # noqa: E731
        if objective == "iwae":
            return fastvae.iwae(x, (mu, logvar), decoder, k=K, **shared)
        options = {
            "elbo": {},
            "elbo mc": {"kl": "mc"},
            "elbo free bits": {"free_bits": 1.0, "beta": 0.3},
            "elbo free bits of each": {"free_bits": 1.0, "free_bits_per": "example"},
        }[objective]
        return fastvae.elbo(x, (mu, logvar), decoder, k=K, **options, **shared)

    assert gradcheck(function, (x, mu, logvar, weight, scale, prior_mu, prior_logvar))


def _public_likelihoods():
    found = {}
    for name, declared in DECLARED.items():
        op, x, mean = (
            getattr(ops, f"{name}_log_prob"),
            cases.data(name, B, X, seed=44),
            randn(K, B, X, seed=45),
        )
        if not declared.differentiable:
            op, x = functools.partial(op, x), None
        for form, shape in (("", (K, B, X)), (" pixel", (X,)), (" number", ())):
            others = [randn(*shape, seed=46 + i) for i in range(len(declared.outputs) - 1)]
            if others or not form:
                found[f"{name}_log_prob{form}"] = op, (*(() if x is None else (x,)), mean, *others)
    return found


def _public_ops():
    """Return each public op as a function of all its float inputs, and those inputs."""
    mu, logvar, prior_mu, prior_logvar = (randn(B, D, seed=s) for s in (40, 41, 42, 43))
    mean = randn(K, B, X, seed=45)
    seed = seed_of(4)

    def latent(op, **options):
        return lambda m, v, pm, pv: op(m, v, k=K, prior=(pm, pv), seed=seed, **options)

    inputs = (mu, logvar, prior_mu, prior_logvar)
    return {
        "rsample_kl": (latent(ops.rsample_kl), inputs),
        "rsample_kl per dimension": (latent(ops.rsample_kl, per_dimension=True), inputs),
        "rsample_log_ratio iwae": (latent(ops.rsample_log_ratio), inputs),
        "rsample_log_ratio dreg": (latent(ops.rsample_log_ratio, estimator="dreg"), inputs),
        "rsample_log_ratio stl": (latent(ops.rsample_log_ratio, estimator="stl"), inputs),
        "rsample_tril": (
            lambda m, t: ops.rsample_tril(m, t, k=K, seed=seed),
            (mu, randn(B, D * (D + 1) // 2, seed=44)),
        ),
        **_public_likelihoods(),
        "log_mean_exp": (ops.log_mean_exp, (mean[:, :, 0],)),
        "mixture_log_prob": (
            ops.mixture_log_prob,
            # Without logits, whose softmax the compiler computes itself.
            (randn(K, B, D, seed=31), randn(7, D, seed=32), randn(7, D, seed=33)),
        ),
        "aggregate_log_prob": (
            ops.aggregate_log_prob,
            (randn(K, B, D, seed=31), randn(7, D, seed=32), randn(7, D, seed=33)),
        ),
    }


PUBLIC = list(_public_ops())


def _outputs(function, *inputs):
    result = function(*inputs)
    return result if isinstance(result, tuple) else (result,)


def _scalar(function, *inputs):
    """Return a sum of the outputs with fixed, distinct weights."""
    return sum((randn(*o.shape, seed=47 + i) * o).sum() for i, o in enumerate(_outputs(function, *inputs)))


@pytest.mark.parametrize("name", PUBLIC)
def test_gradients_only_where_required(backend, name):
    """Any subset of the inputs gets the same gradients as when all require them; the rest get none."""
    function, inputs = _public_ops()[name]
    everything = [t.clone().requires_grad_() for t in inputs]
    full = torch.autograd.grad(_scalar(function, *everything), everything)
    subsets = range(1, 2 ** len(inputs) - 1)
    if backend == "triton":
        subsets = list(subsets)[:: max(1, len(subsets) // 3)]
    for subset in subsets:
        wanted = [bool(subset >> i & 1) for i in range(len(inputs))]
        leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        _scalar(function, *leaves).backward()
        for leaf, want, expected in zip(leaves, wanted, full, strict=True):
            if want:
                # A kernel without the unneeded sums may contract other multiply-adds: one or two roundings of
                # each of the K terms, the largest of which is about the largest gradient.
                allowed = K * torch.finfo(torch.float32).eps * float(expected.abs().max())
                assert float((leaf.grad - expected).abs().max()) <= allowed
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("name", ["rsample_kl", "rsample_log_ratio iwae", "rsample_log_ratio stl"])
def test_either_output_may_go_unused(backend, name):
    """If one of two outputs is unused, the gradient equals that with a zero upstream gradient."""
    function, inputs = _public_ops()[name]
    for used in (0, 1):
        grads = []
        for scale in (None, 0.0):
            leaves = [t.clone().requires_grad_() for t in inputs]
            outputs = function(*leaves)
            loss = (randn(*outputs[used].shape, seed=50) * outputs[used]).sum()
            if scale is not None:
                loss = loss + scale * outputs[1 - used].sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


_UNDEFINED = """
import sys
import torch
import fastvae
from tests import test_torch

class Stop(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: None)

with fastvae.use_backend(sys.argv[1]):
    for name, (function, inputs) in test_torch._public_ops().items():
        leaves = [t.clone().requires_grad_() for t in inputs]
        print(name, end=": ", flush=True)
        sum(Stop.apply(o).sum() for o in test_torch._outputs(function, *leaves)).backward()
        assert all(t.grad is None or not t.grad.any() for t in leaves)
        print("fine", flush=True)
"""


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_undefined_gradients(implementation):
    """An undefined upstream gradient (a Function that returned None) gives undefined gradients.

    In a separate process, since a null pointer would crash it.
    """
    run = subprocess.run(
        [sys.executable, "-c", _UNDEFINED, implementation], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count("fine") == len(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_second_derivatives_raise(name):
    function, inputs = _public_ops()[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(_scalar(function, *leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives are not implemented.*Differentiate once"):
        sum(g.pow(2).sum() for g in grads).backward()


def test_second_derivatives_raise_through_an_objective():
    """Second derivatives, usually for a gradient penalty, raise instead of being silently wrong."""
    encoder, decoder = models.networks(X, D)
    x = randn(B, X, seed=51).requires_grad_()
    (grad,) = torch.autograd.grad(fastvae.elbo(x, encoder(x), decoder), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("name", PUBLIC)
def test_forward_mode_raises(name):
    function, inputs = _public_ops()[name]
    with pytest.raises(
        RuntimeError, match="forward-mode differentiation is not implemented; use reverse mode"
    ):
        torch.func.jvp(function, inputs, tuple(torch.ones_like(t) for t in inputs))


# Functional transforms.


@pytest.mark.parametrize("name", PUBLIC)
def test_func_grad_of_the_ops(name):
    function, inputs = _public_ops()[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(_scalar(function, *leaves), leaves)
    positions = tuple(range(len(inputs)))
    got = torch.func.grad(lambda *t: _scalar(function, *t), argnums=positions)(*inputs)
    for actual, reference in zip(got, expected, strict=True):
        assert torch.equal(actual, reference)
        assert bool(actual.any())
    # vjp's returned function is called after the transform has ended.
    value, pull = torch.func.vjp(lambda *t: _scalar(function, *t), *inputs)
    for actual, reference in zip(pull(torch.ones_like(value)), expected, strict=True):
        assert torch.equal(actual, reference)


def _functional_loss(encoder, decoder, x, estimator="iwae"):
    """Return a stateless function from both networks' parameters to iwae, with noise fixed by manual_seed."""
    names = {"encoder": encoder, "decoder": decoder}

    def loss(parameters):
        def call(name, v):
            return torch.func.functional_call(names[name], parameters[name], v)

        return fastvae.iwae(x, call("encoder", x), lambda z: call("decoder", z), k=K, estimator=estimator)

    return loss, {n: {k: p.detach() for k, p in m.named_parameters()} for n, m in names.items()}


def _eager_gradients(encoder, decoder, x, estimator):
    torch.manual_seed(5)
    fastvae.iwae(x, encoder(x), decoder, k=K, estimator=estimator).backward()
    modules = {"encoder": encoder, "decoder": decoder}
    return {n: {k: p.grad for k, p in m.named_parameters()} for n, m in modules.items()}


def _same(actual, expected, rtol=1e-5, atol=1e-6):
    for name in expected:
        for key in expected[name]:
            assert bool(expected[name][key].any())
            torch.testing.assert_close(actual[name][key], expected[name][key], rtol=rtol, atol=atol)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_batched_gradients_of_an_objective(objective):
    """They go through another vmap than functorch's."""
    q, x, decoder = torch.randn(5, 6, requires_grad=True), torch.rand(5, 7).round(), nn.Linear(3, 7)
    bound = getattr(fastvae, objective)(x, q, decoder, k=4, likelihood="bernoulli", reduction="none")
    loop = [torch.autograd.grad(b, q, retain_graph=True)[0] for b in bound]
    (found,) = torch.autograd.grad(bound, q, torch.eye(5), is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(loop))


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_func_grad_of_an_objective(estimator):
    encoder, decoder = models.networks(X, D)
    x = randn(B, X, seed=52)
    expected = _eager_gradients(encoder, decoder, x, estimator)
    loss, parameters = _functional_loss(encoder, decoder, x, estimator)
    torch.manual_seed(5)
    _same(torch.func.grad(loss)(parameters), expected)


# torch.compile. Each compilation takes seconds, so one graph covers as much as possible.


def _all_ops(function_inputs):
    def run(*groups):
        return tuple(
            o for (f, _), inputs in zip(function_inputs, groups, strict=True) for o in _outputs(f, *inputs)
        )

    return run


@pytest.mark.slow
def test_compiled_ops_equal_eager(fallback_random):
    """All ops in one full graph give eager mode's values and gradients."""
    cases = list(_public_ops().values())
    run = _all_ops(cases)
    compiled = torch.compile(run, fullgraph=True)
    results = []
    for function in (run, compiled):
        groups = [tuple(t.clone().requires_grad_() for t in inputs) for _, inputs in cases]
        leaves = [t for group in groups for t in group]
        outputs = function(*groups)
        loss = sum((randn(*o.shape, seed=60 + i) * o).sum() for i, o in enumerate(outputs))
        results.append(([o.detach() for o in outputs], torch.autograd.grad(loss, leaves)))
    (values, grads), (compiled_values, compiled_grads) = results
    # The ops are opaque to the compiler: the same kernels on the same inputs.
    for actual, expected in zip(compiled_values, values, strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(compiled_grads, grads, strict=True):
        assert bool(actual.any())
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_compiled_objectives_equal_eager(fallback_random, likelihood):
    """elbo and iwae in one training graph that draws the seeds give eager mode's values and gradients."""
    encoder, decoder = models.networks(X, D, likelihood)
    x = rand(B, X, seed=61)

    def losses(x):
        q = encoder.linear(x).chunk(2, dim=1)
        return (
            fastvae.elbo(x, q, decoder, likelihood=likelihood, k=2),
            fastvae.elbo(x, q, decoder, likelihood=likelihood, kl="mc"),
            fastvae.elbo(x, q, decoder, likelihood=likelihood, kl="mc"),
            fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, estimator="dreg"),
        )

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True)):
        for module in (encoder, decoder):
            module.zero_grad()
        torch.manual_seed(6)
        values = function(x)
        assert float(values[1]) != float(values[2]), "two draws were merged"
        sum((i + 1) * value for i, value in enumerate(values)).backward()
        grads = [p.grad.clone() for m in (encoder, decoder) for p in m.parameters()]
        results.append((torch.stack(values).detach(), grads))
        # A second call advances the generator: different noise.
        assert not torch.equal(torch.stack(function(x)), results[-1][0])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-5)
    for actual, expected in zip(results[1][1], results[0][1], strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_draws_are_not_merged(fallback_random):
    """Two equal calls in one training graph draw different noise: the compiler must not merge them."""
    mu, logvar = randn(B, D, seed=62).requires_grad_(), randn(B, D, seed=63).requires_grad_()

    def draw(mu, logvar):
        one, _ = ops.rsample_kl(mu, logvar)
        other, _ = ops.rsample_kl(mu, logvar)
        return one, other, *(ops.rsample_log_ratio(mu, logvar, k=1)[0] for _ in range(2))

    # aot_eager runs the same graph passes, without generating code.
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    drawn = compiled(mu, logvar)
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one.flatten(), other.flatten()) for other in drawn[:i])
    torch.manual_seed(7)
    for actual, expected in zip(drawn, draw(mu, logvar), strict=True):
        assert torch.equal(actual, expected)
    # Each backward pass uses its own noise: dz/dlogvar = (z - mu) / 2.
    (grad,) = torch.autograd.grad(drawn[0].sum() + 10 * drawn[1].sum(), logvar)
    expected = 0.5 * (drawn[0] - mu) + 5 * (drawn[1] - mu)
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-5, atol=1e-5)


def test_seeds_drawn_by_inductor_are_uniform():
    """Inductor's own integer draws give seeds with 64 fair bits, no two of them equal."""
    torch._dynamo.reset()
    calls, draws = 64, 64

    def draw():
        return torch.stack([fastvae.random.draw_seed(DEVICE) for _ in range(draws)])

    compiled = torch.compile(draw, fullgraph=True)
    torch.manual_seed(71)
    seeds = torch.cat([compiled() for _ in range(calls)]).cpu()
    number = calls * draws
    assert len(set(seeds.tolist())) == number
    bits = (seeds.unsqueeze(1) >> torch.arange(64)) & 1
    # Six standard deviations, for 64 bits and 2016 pairs of them.
    assert float((bits.double().mean(0) - 0.5).abs().max()) < 6 * 0.5 / math.sqrt(number)
    signs = 1 - 2 * bits.double()
    together = (signs.T @ signs / number).fill_diagonal_(0)
    assert float(together.abs().max()) < 6 / math.sqrt(number)


def test_compiled_with_dynamic_shapes(fallback_random):
    """A single graph serves several batch sizes and widths, equal to eager mode for each."""
    graphs = 0

    def losses(x, mu, logvar, weight, seed):
        z, kl = ops.rsample_kl(mu, logvar, k=K, seed=seed)
        one = ops.bernoulli_log_prob(x, z @ weight).mean(0) - kl
        z, ratio = ops.rsample_log_ratio(mu, logvar, k=K, seed=seed, estimator="dreg")
        return one + ops.log_mean_exp(ops.gaussian_log_prob(x, z @ weight, 0.0) + ratio)

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=counting)
    for b, d, size in ((5, 3, 7), (6, 2, 9), (11, 4, 8)):
        x, weight = rand(b, size, seed=64), randn(d, size, seed=65).requires_grad_()
        mu, logvar = randn(b, d, seed=66).requires_grad_(), randn(b, d, seed=67).requires_grad_()
        arguments = (x, mu, logvar, weight, seed_of(8))
        for got, expected in zip(
            (compiled(*arguments), *torch.autograd.grad(compiled(*arguments).sum(), (mu, logvar, weight))),
            (losses(*arguments), *torch.autograd.grad(losses(*arguments).sum(), (mu, logvar, weight))),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    assert graphs == 1


def test_compiled_func_grad(fallback_random):
    """torch.compile(torch.func.grad(f)) equals eager; an autograd.Function over a bare op gave zeros."""
    encoder, decoder = models.networks(X, D)
    x = randn(B, X, seed=68)
    expected = _eager_gradients(encoder, decoder, x, "dreg")
    loss, parameters = _functional_loss(encoder, decoder, x, "dreg")
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    _same(compiled(parameters), expected)


def _linear_vae():
    """Build a VAE of networks without call counters, which a compiler would treat as constants."""
    return fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli", latent_dim=D).to(DEVICE)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_weights_of_the_kl(fallback_random, dynamic):
    """beta and free_bits, as numbers and tensors, compile to eager's values via elbo and via forward."""
    vae, x = _linear_vae(), rand(B, X, seed=61)
    # One draw each, so that the noise also comes from a compiled program.
    weights = (0.3, torch.tensor(0.3, device=DEVICE), rand(B, seed=62), 0.2, torch.tensor(0.2, device=DEVICE))

    def losses(x, beta, one, rows, bits, free):
        return torch.stack(
            [*(vae.elbo(x, beta=w) for w in (beta, one)), *(vae(x, beta=w) for w in (beta, rows))]
            + [vae(x, free_bits=w) for w in (bits, free)]
        )

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        vae.zero_grad()
        torch.manual_seed(6)
        value = function(x, *weights)
        (value * randn(6, seed=63)).sum().backward()
        results.append((value.detach(), *[p.grad for p in vae.parameters()]))
    for got, expected in zip(*results, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor_with_a_tensor_beta(fallback_random):
    vae, x = _linear_vae(), rand(B, X, seed=61)
    beta = rand(B, seed=62).requires_grad_()
    results = []
    for function in (vae.elbo, torch.compile(vae.elbo, fullgraph=True, dynamic=True)):
        torch.manual_seed(6)
        value = function(x, beta=beta)
        results.append((value.detach(), *torch.autograd.grad(value, [beta, *vae.parameters()])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["number", "tensor", "attribute"])
def test_a_schedule_of_beta_does_not_recompile(kind, dynamic):
    """A scheduled beta does not recompile: tensors are inputs, numbers variables from the second value on."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    vae, x = _linear_vae(), rand(B, X, seed=61)

    class Step(nn.Module):
        def forward(self, x):
            return vae(x, beta=self.beta)

    step, counter = Step(), CompileCounter()
    function = step if kind == "attribute" else lambda x, beta: vae(x, beta=beta)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for i in range(1, 8):
        step.beta = 0.1 * i
        beta = torch.tensor(step.beta, device=DEVICE) if kind == "tensor" else step.beta
        compiled(x) if kind == "attribute" else compiled(x, beta)
    torch._dynamo.reset()
    assert counter.frame_count <= (1 if kind == "tensor" or dynamic else 2)


def test_export_of_an_objective():
    """Exporting a VAE exports its forward, and the program draws the noise."""
    vae, x = _linear_vae(), rand(B, X, seed=61)
    program = torch.export.export(vae, (x,), {"objective": "iwae", "k": K})
    assert "fastvae.rsample_log_ratio" in str(program.graph)
    torch.manual_seed(6)
    expected = vae(x, objective="iwae", k=K)
    torch.manual_seed(6)
    torch.testing.assert_close(program.module()(x, objective="iwae", k=K), expected)


def _image_decoder(outputs):
    return nn.Sequential(nn.Linear(D, 12 * outputs), nn.Unflatten(1, (3 * outputs, 2, 2)))


class _Halves(nn.Module):
    """Decoder of two parameters, each an image."""

    def __init__(self):
        super().__init__()
        self.body = _image_decoder(2)

    def forward(self, z):
        return self.body(z).chunk(2, 1)


_PRIORS = {
    "mixture": lambda: fastvae.distributions.NormalMixture(randn(4, D, seed=5), randn(4, D, seed=6)),
    "vamp": lambda: fastvae.distributions.VampPrior(nn.Linear(12, 2 * D), rand(4, 12, seed=7)),
}
# Likelihood, decoder, prior and objective.
DYNAMIC = {
    "bernoulli": ("bernoulli", lambda: _image_decoder(1), None, "iwae"),
    "gaussian": ("gaussian", _Halves, None, "elbo"),
    "laplace": ("laplace", _Halves, None, "iwae"),
    "discretized_logistic": ("discretized_logistic", _Halves, None, "iwae"),
    "optimal": (Gaussian(scale="optimal"), lambda: _image_decoder(1), None, "elbo"),
    "mixture": ("bernoulli", lambda: _image_decoder(1), "mixture", "iwae"),
    "vamp": ("bernoulli", lambda: _image_decoder(1), "vamp", "iwae"),
    "beta_tc": ("bernoulli", lambda: _image_decoder(1), None, "beta_tc"),
    "mask": ("bernoulli", lambda: _image_decoder(1), None, "iwae"),
}


def _dynamic(name):
    """Return a VAE of images [B, 3, 2, 2], options of its forward, and a function that makes x."""
    likelihood, decoder, prior, objective = DYNAMIC[name]
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2 * D))
    prior = None if prior is None else _PRIORS[prior]()
    vae = fastvae.VAE(encoder, decoder(), likelihood=likelihood, prior=prior).to(DEVICE)
    options = {"objective": objective}
    if objective == "iwae":
        options["k"] = K
    if objective == "beta_tc":
        options |= {"beta": 2.0, "dataset_size": 50}
    if name == "mask":
        options["mask"] = torch.tensor([True, False] * 6, device=DEVICE).reshape(3, 2, 2)

    def make(batch):
        return rand(batch, 3, 2, 2, seed=batch).round()

    return vae, options, make


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_exported_program_takes_any_batch(name):
    vae, options, make = _dynamic(name)

    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, x):
            return self.vae(x, **options)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Objective(), (make(5),), dynamic_shapes=({0: rows},)).module()
    for batch in (5, 8):
        torch.manual_seed(6)
        expected = vae(make(batch), **options)
        torch.manual_seed(6)
        torch.testing.assert_close(program(make(batch)), expected)


@pytest.mark.parametrize("name", ["bernoulli", "mixture", "vamp", "beta_tc"])
def test_one_graph_for_every_batch(name):
    """The first size is compiled as it is, the second for all."""
    from torch._dynamo.testing import CompileCounter

    vae, options, make = _dynamic(name)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: vae(x, **options), fullgraph=True, backend=counter)
    for batch in (4, 5, 6, 7):
        compiled(make(batch))
    torch._dynamo.reset()
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["bernoulli", "mixture", "vamp", "beta_tc"])
def test_a_batch_marked_as_dynamic(name):
    """A graph that fixes the size would raise."""
    vae, options, make = _dynamic(name)
    x = make(5)
    torch._dynamo.mark_dynamic(x, 0)
    torch.manual_seed(6)
    value = torch.compile(lambda x: vae(x, **options), fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    torch.manual_seed(6)
    torch.testing.assert_close(value, vae(make(5), **options))


@pytest.mark.parametrize("prior", ["mixture", "laplace"])
def test_vmap_over_dreg(prior):
    """torch.func's gradients of each example equal those of the example alone."""
    zeros = torch.zeros(D, device=DEVICE)
    priors = {"mixture": _PRIORS["mixture"], "laplace": lambda: fastvae.distributions.Laplace(zeros, zeros)}
    p, decoder, x = priors[prior](), nn.Linear(D, X).to(DEVICE), rand(B, X, seed=3).round()
    q = randn(B, 2 * D, seed=4)

    def objective(q, x):
        options = {"k": K, "estimator": "dreg", "likelihood": "bernoulli", "prior": p}
        return fastvae.iwae(x[None], q[None], decoder, **options)

    each = torch.func.vmap(torch.func.grad(objective), randomness="same")
    torch.manual_seed(8)
    together = each(q, x)
    for i in range(B):
        torch.manual_seed(8)
        torch.testing.assert_close(together[i], torch.func.grad(objective)(q[i], x[i]))


def test_export_keeps_the_ops():
    """torch.export traces the public ops into their dispatcher entries, including shapes."""

    class Bound(nn.Module):
        def forward(self, x, mu, logvar, seed):
            z, kl = ops.rsample_kl(mu, logvar, k=K, seed=seed)
            return ops.gaussian_log_prob(x, z, 0.0).mean(0) - kl

    inputs = (randn(B, D, seed=69), randn(B, D, seed=70), randn(B, D, seed=71), seed_of(9))
    program = torch.export.export(Bound(), inputs)
    assert "fastvae.rsample_kl" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), Bound()(*inputs))


# Autocast.


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_autocast(likelihood):
    """Networks run in bfloat16, the objective in float32, and its gradients reach float32 parameters."""
    encoder, decoder = models.networks(X, D, likelihood)
    x = rand(B, X, seed=72)
    seen = {}

    def watching(z):
        seen["z"], seen["out"] = z, decoder(z)
        return seen["out"]

    for objective in (fastvae.elbo, fastvae.iwae):
        options = {"k": K}
        options |= {"likelihood": likelihood, "reduction": "none"}
        full = objective(x, encoder(x), decoder, generator=generator(10), **options)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            q = encoder(x)
            bound = objective(x, q, watching, generator=generator(10), **options)
        assert q[0].dtype == seen["z"].dtype == torch.bfloat16
        assert bound.dtype == torch.float32
        # Given the networks' outputs, the objective is the float32 one of the same numbers: only z was
        # rounded.
        out = tuple(o.float() for o in seen["out"]) if likelihood == "gaussian" else seen["out"].float()
        wide = tuple(t.float() for t in q)
        again = objective(x, wide, lambda z, out=out: out, generator=generator(10), **options)
        torch.testing.assert_close(bound, again, rtol=1e-6, atol=1e-5)
        # It is near the float32 networks': parameters accurate to 2^-8, sums of X terms of order 1 to 10.
        torch.testing.assert_close(bound, full, rtol=0.03, atol=0.3)
        encoder.zero_grad(), decoder.zero_grad()
        bound.sum().backward()
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.isfinite().all())
            assert bool(parameter.grad.any())


# Modules.


def _vae():
    encoder, decoder = models.networks(X, D, "bernoulli")
    likelihood = Gaussian(scale=torch.full((X,), 0.7, device=DEVICE), learned=True)
    prior = DiagonalNormal(nn.Parameter(randn(D, seed=73)), nn.Parameter(torch.zeros(D, device=DEVICE)))
    return fastvae.VAE(encoder, decoder, likelihood=likelihood, prior=prior, latent_dim=D)


def _value(vae, x):
    return vae.iwae(x, k=K, generator=generator(11))


def test_learned_scale_and_prior_are_parameters():
    vae = _vae()
    names = dict(vae.named_parameters())
    assert {"likelihood.log_scale", "prior.mu", "prior.logvar"} <= set(names)
    _value(vae, randn(B, X, seed=74)).backward()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_vae_is_copied(how):
    vae, x = _vae(), randn(B, X, seed=75)
    with torch.no_grad():
        vae.likelihood.log_scale.add_(0.3)
    if how == "deepcopy":
        twin = copy.deepcopy(vae)
    else:
        file = io.BytesIO()
        torch.save(vae if how == "pickle" else vae.state_dict(), file)
        file.seek(0)
        if how == "pickle":
            twin = torch.load(file, weights_only=False)
        else:
            twin = _vae()
            twin.load_state_dict(torch.load(file, weights_only=True))
    expected = _value(vae, x)
    assert torch.equal(_value(twin, x), expected)
    # A copy, not an alias.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(_value(vae, x), expected)
    assert not torch.equal(_value(twin, x), expected)


def test_fixed_scale_and_prior_follow_the_module():
    """Fixed scales and priors are buffers: they are saved, and move with .to()."""
    encoder, decoder = models.networks(X, D, "bernoulli")
    vae = fastvae.VAE(
        encoder, decoder, likelihood=Gaussian(scale=torch.full((X,), 0.7, device=DEVICE)),
        prior=DiagonalNormal(randn(D, seed=76), randn(D, seed=77)),
    )  # fmt: skip
    assert {"likelihood.fixed_scale", "prior.mu", "prior.logvar"} <= set(vae.state_dict())
    assert len(list(vae.parameters())) == 4
    wide = copy.deepcopy(vae).double()
    assert _value(wide, randn(B, X, seed=78, dtype=torch.float64)).dtype == torch.float64


def test_training_raises_the_bound():
    torch.manual_seed(8)
    vae, x = _vae(), randn(64, X, seed=79)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    before = float(vae.log_marginal(x, k=200).log_px.mean())
    for _ in range(100):
        optimizer.zero_grad()
        (-vae.iwae(x, k=K, estimator="dreg")).backward()
        optimizer.step()
    assert float(vae.log_marginal(x, k=200).log_px.mean()) > before + 1


@pytest.mark.parametrize(("samples", "event"), [((), (X,)), ((K,), (X,)), ((), (2, 3))])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_likelihoods_may_change_backend_between_the_passes(likelihood, samples, event):
    x = rand(B, *event, seed=1)
    parameters = [randn(*samples, B, *event, seed=s) for s in ((2, 3) if likelihood == "gaussian" else (2,))]
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    op = ops.gaussian_log_prob if likelihood == "gaussian" else ops.bernoulli_log_prob
    upstream = randn(*samples, B, seed=4)
    backends = ["native", "reference"] + ["triton"] * (DEVICE.type == "cpu")
    results = []
    for forward in backends:
        for backward in backends:
            with fastvae.use_backend(forward):
                value = op(*leaves)
            with fastvae.use_backend(backward):
                results.append(torch.autograd.grad(value, leaves, upstream))
    for grads in results:
        for actual, expected in zip(grads, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Distributed.


def _train_one_rank(rank: int, ranks: int, store: str) -> None:
    """Assert that gradients of DDP-wrapped networks are the ranks' mean of the unwrapped ones."""
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for estimator, k_chunk in (("elbo", None), ("dreg", None), ("dreg", 2)):
            x = torch.randn(B, X, generator=torch.Generator().manual_seed(rank))

            def loss(encoder, decoder, x=x, estimator=estimator, k_chunk=k_chunk):
                noise = torch.Generator().manual_seed(100 + rank)
                if estimator == "elbo":
                    return fastvae.elbo(x, encoder(x), decoder, generator=noise)
                options = {"k": K, "k_chunk": k_chunk, "estimator": estimator, "generator": noise}
                return fastvae.iwae(x, encoder(x), decoder, **options)

            plain = [m.cpu() for m in models.networks(X, D)]
            loss(*plain).backward()
            expected = [p.grad for m in plain for p in m.parameters()]
            for grad in expected:
                distributed.all_reduce(grad)
                grad /= ranks
            wrapped = [DistributedDataParallel(m.cpu()) for m in models.networks(X, D)]
            loss(*wrapped).backward()
            for actual, reference in zip(
                (p.grad for m in wrapped for p in m.parameters()), expected, strict=True
            ):
                assert bool(actual.any())
                torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-6)
        # If torn down while the other rank communicates, gloo sometimes aborts (seen without fastvae, too).
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _train_a_module_on_one_rank(rank: int, ranks: int, store: str) -> None:
    """Assert that DDP(vae)(x) on parts of a batch, with one seed, gives the whole batch's gradient."""
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        every = (
            {},
            {"objective": "elbo", "k": 2, "beta": torch.tensor(0.3)},
            {"objective": "iwae", "k": K, "estimator": "dreg"},
            {"objective": "iwae", "k": K, "k_chunk": 3},
        )
        for options, fused in itertools.product(every, (False, True)):
            # Fuse however small, in this test's own process.
            head.ROWS_PER_INPUT = head.NUMBERS_PER_INPUT = 0
            head.FEWEST_NUMBERS = head.FEWEST_BY_BLAS = fastvae.vae.FEWEST_NUMBERS = 0 if fused else 2**60
            x = torch.randn(ranks * B, X, generator=torch.Generator().manual_seed(1))
            gradients, bounds = [], []
            for together in (False, True):
                vae = fastvae.VAE(*[m.cpu() for m in models.networks(X, D)])
                module = DistributedDataParallel(vae) if together else vae
                mine = slice(rank * B, (rank + 1) * B) if together else slice(None)
                torch.manual_seed(0)
                bound = module(x[mine], row_offset=rank * B if together else 0, **options)
                (-bound).backward()
                gradients.append([p.grad for p in vae.parameters()])
                with torch.no_grad():
                    module(x[mine], objective="log_marginal", k=9)
                bounds.append(bound.detach().clone())
            distributed.all_reduce(bounds[1])
            torch.testing.assert_close(bounds[1] / ranks, bounds[0], rtol=1e-5, atol=1e-5)
            for actual, expected in zip(gradients[1], gradients[0], strict=True):
                assert bool(expected.any())
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel_of_the_module(tmp_path):
    torch.multiprocessing.spawn(_train_a_module_on_one_rank, args=(2, str(tmp_path / "store")), nprocs=2)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path):
    # A failed assertion in either process is raised here.
    torch.multiprocessing.spawn(_train_one_rank, args=(2, str(tmp_path / "store")), nprocs=2)


# The process.


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of the CPU kernels")
@pytest.mark.parametrize("what", ["latent", *LIKELIHOODS, "log_mean_exp", "iwae"])
def test_threads_do_not_change_a_bit(what):
    """Results do not depend on the number of threads, for shapes well above the parallel threshold.

    The kernels run in parallel from about 40 000 elements on.
    """
    b, d, size, k = 601, 33, 130, 3
    mu, logvar, x, mean = (
        randn(b, d, seed=80),
        randn(b, d, seed=81),
        rand(b, size, seed=82),
        randn(k, b, size, seed=83),
    )
    weight = randn(d, size, seed=84) / d
    log_w = randn(40, 5001, seed=85)

    def latent(m, v, pm, pv):
        z, kl = ops.rsample_kl(m, v, k=k, prior=(pm, pv), seed=seed_of(12))
        z2, ratio = ops.rsample_log_ratio(m, v, k=k, prior=(pm, pv), seed=seed_of(12), estimator="dreg")
        return z, kl, z2, ratio

    def objective(m, v, s):
        # The decoder avoids matrix products, whose library may split sums by the number of threads.
        return fastvae.iwae(
            x, (m, v), lambda z: z[:, :1] * weight[0], k=k, likelihood=Gaussian(scale=s),
            estimator="dreg", reduction="none", generator=generator(12),
        )  # fmt: skip

    def likelihood(first, *others):
        """Compute log p for full parameters and for rows of them; a differentiable x comes last."""
        data = others[-1] if DECLARED[what].differentiable else cases.data(what, b, size)
        op, number = getattr(ops, f"{what}_log_prob"), len(DECLARED[what].outputs) - 1
        in_full = op(data, first, *others[:number])
        return (in_full, op(data, first, *others[number : 2 * number])) if number else (in_full,)

    if what in LIKELIHOODS:
        number = len(DECLARED[what].outputs) - 1
        shapes = [(k, b, size)] * number + [(size,)] * number
        parameters = [mean, *(randn(*s, seed=88 + i) for i, s in enumerate(shapes))]
        parameters += [cases.data(what, b, size)] * DECLARED[what].differentiable
    function, inputs = {
        "latent": (latent, (mu, logvar, randn(b, d, seed=86), randn(b, d, seed=87))),
        "log_mean_exp": (ops.log_mean_exp, (log_w,)),
        "iwae": (objective, (mu, logvar, rand(size, seed=90) + 0.5)),
    }.get(what) or (likelihood, parameters)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaves = [t.clone().requires_grad_() for t in inputs]
            outputs = _outputs(function, *leaves)
            # grad_outputs instead of a loss, to avoid torch's sums.
            upstream = [randn(*o.shape, seed=91 + i) for i, o in enumerate(outputs)]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", PUBLIC)
def test_same_inputs_same_bits(backend, name):
    function, inputs = _public_ops()[name]
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = _outputs(function, *leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_inference_mode():
    encoder, decoder = models.networks(X, D)
    x = randn(B, X, seed=95)
    expected = fastvae.iwae(x, encoder(x), decoder, k=K, generator=generator(13))
    with torch.inference_mode():
        got = fastvae.iwae(x, encoder(x), decoder, k=K, generator=generator(13))
        fastvae.log_marginal(x, encoder(x), decoder, k=K)
    assert torch.equal(got, expected)


_IMPORT = """
import sys
import torch
torch.manual_seed(3)
before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state(),
          torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
assert "triton" not in sys.modules
import fastvae
after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state(),
         torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
for one, other in zip(before, after):
    assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (one, other)
assert "triton" not in sys.modules, "importing fastvae imports triton"
# Denormals still exist: an extension linked with -ffast-math flushes them for the whole process.
x, q = torch.rand(5, 7), (torch.zeros(5, 3), torch.zeros(5, 3))
bound = fastvae.iwae(x, q, lambda z: z[:, :1].expand(-1, 7), k=4, likelihood="bernoulli")
assert bool(torch.full((100,), 1e-40).mul(0.5).gt(0).all())
assert sys.float_info.min / 2 > 0
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "running on a CPU imports triton"
print("fine")
"""


def test_import_has_no_side_effects():
    run = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "fine", run.stderr
