"""Registered likelihoods and generated inputs for them; tests over these cover every declared likelihood."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastvae  # noqa: F401
from fastvae.core.checks import INTEGERS
from fastvae.likelihoods.declared import DECLARED

from . import formulas, strategies
from .oracles import HAZARDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIKELIHOODS = sorted(DECLARED)
SPREADS = (0.01, 1.0, 5.0)
SIZES = strategies.distinct_sizes(3)


def counts(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return counts: mostly zeros and small numbers, some large, some not integers."""
    values = torch.poisson(
        torch.rand(shape, generator=generator, dtype=torch.float64) * 4, generator=generator
    )
    kind = torch.rand(shape, generator=generator)
    values = torch.where(kind < 0.3, torch.zeros_like(values), values)
    large = torch.floor(torch.exp(10.3 * torch.rand(shape, generator=generator, dtype=torch.float64)))
    values = torch.where(kind > 0.9, large, values)
    return torch.where((kind > 0.85) & (kind < 0.9), values + kind.double(), values)


def data(likelihood: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return data within the likelihood's support, its ends included."""
    declared, generator = DECLARED[likelihood], torch.Generator().manual_seed(seed)
    if declared.high < math.inf:
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        # Both ends too, except for beta, whose infinite density there is tested separately.
        values = 1e-4 + 0.98 * values**4 if likelihood == "beta" else (values * 1.4 - 0.2).clamp(0, 1)
        values = values * (declared.high - declared.low) + declared.low
    elif declared.low == 0 and declared.takes_integers:
        values = counts(shape, generator)
    elif declared.low == 0:
        # Positive: zero is an edge case of each likelihood, tested separately.
        values = torch.exp(1.5 * torch.randn(shape, generator=generator, dtype=torch.float64))
    else:
        assert declared.low == -math.inf, f"{likelihood}: tell tests/cases.py how to draw its data"
        values = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype in INTEGERS:
        most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        values = values.round().clamp(max=most)
    return values.to(device=DEVICE, dtype=dtype)


def parameters(
    likelihood: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return the decoder's outputs, each tensor of the given shape."""
    generator = torch.Generator().manual_seed(seed + 1)
    number = len(DECLARED[likelihood].outputs)
    return [torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype) for _ in range(number)]


MASKS = ("all", "none", "of one event", "few", "most")
BAD = (math.nan, math.inf, -math.inf, -7.0, 1e30)


def mask_of(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Return a mask [B, *event]: of any density with whole rows left out, or shared by all rows."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2))
    if kind in ("all", "none"):
        return torch.full(shape, kind == "all", device=DEVICE)
    if kind == "of one event":
        return (uniform[:1] < 0.6).expand(shape).to(DEVICE)
    observed = uniform < (0.15 if kind == "few" else 0.8)
    observed[::3] = False
    return observed.to(DEVICE)


def spoiled(value: Tensor, mask: Tensor, bad: float) -> Tensor:
    """Return the value with ``bad``, or another extreme number of its dtype, where the mask is False."""
    if not value.is_floating_point():
        bad = 1 if value.dtype == torch.bool else torch.iinfo(value.dtype).max
    return torch.where(mask, value, torch.full((), bad, dtype=value.dtype, device=value.device))


def returned(likelihood: str) -> int:
    """Return the number of parameters that the decoder returns."""
    return len(DECLARED[likelihood].outputs) - len(DECLARED[likelihood].constants)


def forms(likelihood: str, k: int, b: int, event: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return shapes for the parameters after the first, [K, B, *event]; empty if there is only one."""
    ones = (1,) * len(event)
    all_ = [(k, b, *event), event, (), (b, *event), (b, *ones), (k, 1, *ones), (k, b, *ones)]
    return all_ if len(DECLARED[likelihood].outputs) > 1 else []


@st.composite
def log_prob(draw, likelihood: str, sizes=SIZES):
    """Draw a call of ``ops.<likelihood>_log_prob``: x, parameters, upstream gradient, needed gradients."""
    declared = DECLARED[likelihood]
    k, b, size = draw(sizes)
    event = (size,) if size % 4 else (size // 4, 4)
    dtype = draw(strategies.dtypes)
    kinds = [dtype, torch.float32, *(INTEGERS if declared.takes_integers else ())]
    x = data(likelihood, b, *event, seed=draw(strategies.seeds), dtype=draw(st.sampled_from(kinds)))
    given = []
    for i, name in enumerate(declared.outputs):
        shape = draw(st.sampled_from(forms(likelihood, k, b, event))) if i else (k, b, *event)
        spreads = SPREADS[:2] if dtype == torch.float16 else SPREADS
        spread = draw(st.sampled_from((*spreads, *HAZARDS.get(likelihood, {}).get(name, ()))))
        # A number or row often stays in float32 when the other tensors are in half precision.
        kept = torch.float32 if i and dtype != torch.float64 and draw(st.booleans()) else dtype
        given.append(draw(strategies.tensors(shape, kept, spread=spread, device=DEVICE)))
    mask, bad = None, None
    if (kind := draw(st.sampled_from((None, None, *MASKS)))) is not None:
        mask = mask_of(kind, b, *event, seed=draw(strategies.seeds))
        bad = draw(st.sampled_from((None, *BAD)))
    asked = st.lists(st.booleans(), min_size=len(given), max_size=len(given))
    need_x = declared.differentiable and draw(st.booleans())
    need = [need_x, *draw(asked if need_x else asked.filter(any))]
    return {
        "likelihood": likelihood,
        "x": strategies.laid_out(x, draw(strategies.layouts)),
        "parameters": given,
        "grad": draw(strategies.tensors((k, b), torch.float32, device=DEVICE)),
        "need": need,
        "mask": mask,
        "bad": bad,
    }


def case(
    likelihood: str,
    k: int,
    b: int,
    x: int,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    mask: str | None = None,
    bad: float | None = None,
) -> dict:
    """Return a call with the given sizes and all gradients; ``shape`` is that of the later parameters.

    With ``bad`` x and the first parameter contain it where the mask is False.
    """
    declared = DECLARED[likelihood]
    first, *others = parameters(likelihood, k, b, x, seed=seed)
    if shape is not None:
        others = [o.flatten()[: math.prod(shape)].reshape(shape) for o in others]
    return {
        "likelihood": likelihood,
        "x": data(likelihood, b, x, seed=seed),
        "parameters": [first, *others],
        "grad": torch.randn(k, b, generator=torch.Generator().manual_seed(seed)).to(DEVICE),
        "need": [declared.differentiable] + [True] * len(declared.outputs),
        "mask": None if mask is None else mask_of(mask, b, x, seed=seed),
        "bad": bad,
    }


def run(case: dict) -> list[Tensor]:
    """Return the op's result and its gradients."""
    inputs, mask = [t.detach() for t in (case["x"], *case["parameters"])], case["mask"]
    if case["bad"] is not None:
        inputs[:2] = [spoiled(t, mask, case["bad"]) for t in inputs[:2]]
    for t, need in zip(inputs, case["need"], strict=True):
        t.requires_grad_(need)
    out = getattr(fastvae.ops, f"{case['likelihood']}_log_prob")(*inputs, mask=mask)
    asked = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, asked, case["grad"].to(out.dtype))
    assert all(g.dtype == t.dtype for g, t in zip(grads, asked, strict=True))
    return [out, *grads]


def results(case: dict) -> list[tuple]:
    """Return (name, actual, plain PyTorch's, expected) for every result of a case."""
    actual = run(case)
    with fastvae.use_backend("reference"):
        eager = run(case)
    given = case["x"], *case["parameters"], case["grad"]
    out, grads = formulas.rows(case["likelihood"], *given, mask=case["mask"])
    names = ("x", *DECLARED[case["likelihood"]].outputs)
    wanted = [(f"gradient of {n}", g) for n, g, need in zip(names, grads, case["need"], strict=True) if need]
    return [(n, a, e, w) for (n, w), a, e in zip([("log prob", out), *wanted], actual, eager, strict=True)]
