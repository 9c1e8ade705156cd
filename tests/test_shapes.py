"""Any shape: rows longer than a tile, few rows, millions of rows, one column, and more than 2^31 elements."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae import ops
from fastvae.ops.normal_arguments import Draw

from . import cases, test_logsumexp, test_normal_diagonal
from .compare import assert_accurate
from .conftest import CUDA, DEVICE
from .strategies import of_addresses

FREE = (0, 0, -math.inf, math.inf)
SEED = torch.tensor(3)
interpreted = pytest.mark.skipif(CUDA, reason="needs the addresses of Triton's interpreter")


@pytest.fixture
def no_poison():
    """Disable poisoning: the results of these tests are larger than memory."""
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def ends(grid):
    """Return the first program and the last."""
    return [(0, 0, 0), tuple(n - 1 for n in grid)]


def assert_reaches_the_ends(launch, *names: str) -> None:
    """Assert access to the first and last element; out-of-range accesses fail in recording."""
    for name in names:
        tensor = launch.tensors[name]
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        offsets = [o for part in (launch.loads, launch.stores) for o in part.get(name, [])]
        assert offsets and min(int(o.min()) for o in offsets) == 0, f"{launch.kernel}: {name}"
        assert max(int(o.max()) for o in offsets) == last * tensor.element_size(), name
        assert last > 2**31, name


def of_likelihoods(kernels, data, wide, grad):
    """Yield calls of every likelihood's kernels, and the arguments whose ends each must reach."""
    for declared in cases.DECLARED.values():
        given = [wide] * len(declared.outputs)
        need = [False] + [True] * len(given)
        yield lambda d=declared, g=given: kernels.log_prob(d, data, None, *g), ["p_p0"]
        yield (
            lambda d=declared, g=given, n=need: kernels.log_prob_backward(d, grad, data, None, *g, n),
            ["p_p0", *(f"p_grad_p{i}" for i in range(len(given)))],
        )


@interpreted
def test_more_elements_than_int32(no_poison):
    """Every kernel's offsets are int64: the last program reaches the last of more than 2^31 elements."""
    from fastvae.kernels import likelihood as kernels
    from fastvae.kernels import logsumexp, normal_diagonal, random

    from .traffic import recorded

    k, b, x = 2, 2**20 + 3, 1100
    q, wide = (of_addresses(b, x), of_addresses(b, x)), of_addresses(k, b, x)
    data, grad = of_addresses(b, x), of_addresses(k, b, dtype=torch.float32)
    arguments = (*q, None, None, SEED, Draw(k, *FREE))
    need = [True, True, False, False]
    long = [of_addresses(2 * b, x) for _ in range(3)]
    for call, names in (
        (lambda: normal_diagonal.rsample_kl(*arguments, False), ["p_z"]),
        (lambda: normal_diagonal.rsample_log_ratio(*arguments, "iwae"), ["p_z"]),
        (lambda: normal_diagonal.rsample_kl_backward(wide, None, *arguments, need), ["p_grad_z"]),
        (
            lambda: normal_diagonal.rsample_kl_backward(None, *long, None, None, SEED, Draw(1, *FREE), need),
            ["p_mu", "p_logvar", "p_grad_kl", "p_grad_mu", "p_grad_logvar"],
        ),
        *of_likelihoods(kernels, data, wide, grad),
        (lambda: logsumexp.log_mean_exp(wide.view(2 * 1100, b)), ["p_log_w"]),
        (
            lambda: logsumexp.log_mean_exp_backward(grad[0], wide.view(2 * 1100, b), grad[0], grad[1]),
            ["p_log_w", "p_out"],
        ),
        (lambda: random.normal(SEED, k, b, x), ["p_out"]),
    ):
        with recorded(touch=False, programs=ends) as launches:
            call()
        assert_reaches_the_ends(launches[0], *names)


@interpreted
def test_strides_beyond_int32():
    """Strides of rows, samples and columns may exceed 2^31 elements."""
    from fastvae.kernels import likelihood as kernels
    from fastvae.kernels import logsumexp, normal_diagonal

    from .traffic import recorded

    far = 2**31 + 64
    row, column = ((far, 1), (1, far))
    for stride in (row, column):
        mu, logvar, data, grad_kl = (of_addresses(2, 3, stride=stride) for _ in range(4))
        grad_z = of_addresses(2, 2, 3, stride=(4, *stride))
        arguments = (mu, logvar, None, None, SEED, Draw(2, *FREE))
        log_w = of_addresses(3, 2, stride=stride)
        for call, names in (
            (lambda: normal_diagonal.rsample_kl(*arguments, False), ["p_mu", "p_logvar"]),  # noqa: B023
            (lambda: normal_diagonal.rsample_log_ratio(*arguments, "iwae"), ["p_mu", "p_logvar"]),  # noqa: B023
            (
                lambda z=grad_z, kl=grad_kl, a=arguments: normal_diagonal.rsample_kl_backward(
                    z, kl, *a, [True, True, False, False]
                ),
                ["p_mu", "p_logvar", "p_grad_z", "p_grad_kl"],
            ),
            *(
                (
                    lambda d=d, g=grad_z, x=data: kernels.log_prob(d, x, None, *[g] * len(d.outputs)),
                    ["p_x", "p_p0"],
                )
                for d in cases.DECLARED.values()
            ),
            (lambda: logsumexp.log_mean_exp(log_w), ["p_log_w"]),  # noqa: B023
        ):
            with recorded(touch=False) as launches:
                call()
            assert_reaches_the_ends(launches[0], *names)


def test_the_grid_is_large_enough():
    """The grid's second axis stays within 65535 for any number of samples."""
    pytest.importorskip("triton")
    from fastvae.kernels import normal_tiles

    for b, d in ((1, 512), (4, 100), (1, 10**6)):
        tiles = normal_tiles.latent_tiles(2 * 10**8, b, d, 512, min_steps=8, max_steps=32)
        assert tiles.grid[1] <= 65535 and tiles.grid[1] * tiles.k_per_program >= 2 * 10**8


SHAPES = {
    "one long row": (1, 1, 9001),
    "few long rows": (1, 3, 2100),
    "long rows, several samples": (3, 2, 1300),
    "many short rows": (1, 1201, 3),
    "one column": (2, 777, 1),
    "one of everything": (1, 1, 1),
    "many samples of one row": (2001, 1, 2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_normal_diagonal_shapes(backend, shape):
    k, b, d = shape
    mu, logvar, grad_kl = (torch.randn(b, d, device=DEVICE) for _ in range(3))
    case = {
        "inputs": [mu, logvar, None, None],
        "samples": k,
        "seed": SEED.to(DEVICE),
        "offsets": (0, 0),
        "logvar_range": None,
        "need": [True, True, False, False],
        "per_dimension": False,
        "estimator": "iwae",
        "grads": [torch.randn(k, b, d, device=DEVICE), grad_kl, torch.randn(k, b, device=DEVICE)],
        "which": "both",
    }
    for op in (ops.rsample_kl, ops.rsample_log_ratio):
        for result in test_normal_diagonal.results(case, op):
            assert_accurate(*result)


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_likelihood_shapes(backend, shape, likelihood):
    for result in cases.results(cases.case(likelihood, *shape)):
        assert_accurate(*result)


@pytest.mark.parametrize("k, n", [(5001, 1), (3000, 3), (1, 3000), (2, 16_501), (600, 17)])
def test_log_mean_exp_shapes(backend, k, n):
    """Samples split over programs work, with -inf, inf and NaN in some columns."""
    log_w = 30 * torch.randn(k, n, device=DEVICE)
    log_w[-1, 0] = -math.inf
    if n > 5:
        log_w[:, 1] = -math.inf
        log_w[k // 2, 2] = math.inf
        log_w[k // 2, 3] = math.nan
    bound, (name, *weights) = test_logsumexp.results((log_w, torch.randn(n, device=DEVICE)))
    assert_accurate(*bound)
    # In a column with an infinite weight the others are unspecified; NaN affects only its own column.
    columns = [i for i in range(n) if n <= 5 or i != 2]
    assert_accurate(name, *(t[:, columns] for t in weights))
