"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

import fastvae
from fastvae.objectives import schedules

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X = 5, 3, 7
LINEAR = [0.1, 0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9]
WAVE = [0.1 + 0.8 * (1 - math.cos(math.pi * u)) / 2 for u in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1)]
# Two cycles of 3.5 steps, with ramps of 0.4 of each, 1.4 steps.
CYCLES = [0.1 + 0.8 * min(1, (t % 3.5) / 1.4) for t in range(7)]
CASES = {
    "linear": (schedules.linear(0.1, 0.9, steps=4, delay=2), LINEAR),
    "linear, down": (schedules.linear(0.9, 0.1, steps=4, delay=2), [1 - v for v in LINEAR]),
    "cosine": (schedules.cosine(0.1, 0.9, steps=4, delay=2), WAVE),
    "cyclical": (
        schedules.cyclical(0.1, 0.9, steps=7, cycles=2, ramp=0.4, delay=3),
        [0.1, 0.1, 0.1, *CYCLES, 0.9, 0.9, 0.9],
    ),
    "cyclical, as published": (
        schedules.cyclical(0.0, 1.0, steps=40),
        [min(1, (t % 10) / 5) for t in range(40)] + [1.0] * 5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    beta, expected = CASES[name]
    for step, value in enumerate(expected):
        for given in (step, torch.tensor(step), torch.tensor(step, dtype=torch.int32, device=DEVICE)):
            found = beta(given)
            assert found.dtype == torch.float32 and found.shape == ()
            # Two roundings of float32: of the fraction and of the ramp.
            assert float(found) == pytest.approx(value, abs=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", CASES)
def test_the_final_value_is_reached_and_kept(name):
    beta, expected = CASES[name]
    last = torch.tensor(expected[-1]).float()
    assert torch.equal(beta(10**6), last) and torch.equal(beta(torch.tensor(2**40)), last)


def test_objectives_accept_schedules():
    x, weight = rand(B, X, seed=2).round(), randn(D, X, seed=3)
    q = randn(B, 2 * D, seed=4)
    beta, expected = CASES["linear"]
    for step in (0, 5):
        bounds = [
            fastvae.elbo(x, q, lambda z: z @ weight, likelihood="bernoulli", beta=b, generator=generator(5))
            for b in (beta(step), expected[step])
        ]
        torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("of_tensors", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_schedules_compile_once(name, of_tensors):
    """Schedules called outside the compiled step, or in it with a tensor step, compile once."""
    torch._dynamo.reset()
    x, weight, seen = rand(B, X, seed=2).round(), randn(D, X, seed=3), []
    q = randn(B, 2 * D, seed=4)
    beta, expected = CASES[name]

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    def bound(t):
        weight_of_kl = beta(t) if of_tensors else t
        return weight_of_kl, fastvae.elbo(
            x, q, lambda z: z @ weight, likelihood="bernoulli", beta=weight_of_kl
        )

    step = torch.compile(bound, backend=backend, fullgraph=True)
    for t in range(6):
        found, _ = step(torch.tensor(t, device=DEVICE) if of_tensors else beta(t))
        assert float(found) == pytest.approx(expected[t], abs=2 * torch.finfo(torch.float32).eps)
    assert len(seen) == 1


def test_stages():
    k = schedules.stages([(0, 1), (10, 5), (50, 20)])
    steps = [0, 9, 10, 49, 50, 10**9]
    assert [k(s) for s in steps] == [k(torch.tensor(s, device=DEVICE)) for s in steps] == [1, 1, 5, 5, 20, 20]
    assert type(k(10)) is int
    name = schedules.stages(((0, "iwae"), (3, "dreg")))
    assert [name(s) for s in range(5)] == ["iwae"] * 3 + ["dreg"] * 2


WRONG = {
    "a ramp of 0": (
        lambda: schedules.cyclical(0.0, 1.0, 10, ramp=0.0),
        ValueError,
        r"ramp must lie in \(0, 1\]",
    ),
    "a ramp above 1": (lambda: schedules.cyclical(0.0, 1.0, 10, ramp=1.5), ValueError, "ramp must lie in"),
    "no cycle": (lambda: schedules.cyclical(0.0, 1.0, 10, cycles=0), ValueError, "cycles must be at least 1"),
    "no steps": (lambda: schedules.cosine(0.0, 1.0, 0), ValueError, "steps must be at least 1"),
    "a negative delay": (
        lambda: schedules.linear(0.0, 1.0, 3, delay=-1),
        ValueError,
        "delay must be at least 0",
    ),
    "a step that is a fraction": (
        lambda: schedules.linear(0.0, 1.0, 3)(0.5),
        TypeError,
        "step must be an int",
    ),
    "an end that is not a number": (
        lambda: schedules.cosine("0", 1.0, 3),
        TypeError,
        "first must be a number",
    ),
    "no stages": (lambda: schedules.stages([]), TypeError, "at least one; got an empty one"),
    "a dict of stages": (lambda: schedules.stages({0: 1}), TypeError, "list of pairs.*got dict"),
    "stages without steps": (lambda: schedules.stages([1, 5]), TypeError, "pairs .*got 1"),
    "stages from 1": (lambda: schedules.stages([(1, 1)]), ValueError, r"begin at step 0.*got \[1\]"),
    "stages out of order": (
        lambda: schedules.stages([(0, 1), (5, 2), (5, 3)]),
        ValueError,
        r"rising steps.*\[0, 5, 5\]",
    ),
    "a stage of True": (lambda: schedules.stages([(0, 1)])(True), TypeError, "step must be an int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
