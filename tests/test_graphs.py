"""Training steps as CUDA graphs: on a GPU, or elsewhere with a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastvae
from fastvae.objectives import graphs

from .conftest import CUDA, DEVICE

on_a_card = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
B, D, X, K = 6, 3, 20, 4


def _training(device=DEVICE, generator=None):
    """Return a model's parameters, and its training step."""
    torch.manual_seed(1)
    encoder, decoder = torch.nn.Linear(X, 2 * D).to(device), torch.nn.Linear(D, X).to(device)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, capturable=torch.device(device).type == "cuda")

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        bound = fastvae.iwae(x, encoder(x), decoder, k=K, likelihood="bernoulli", generator=generator)
        (-bound).backward()
        optimizer.step()
        return -bound.detach()

    return parameters, step


def test_on_a_cpu_a_step_runs_unchanged():
    x = torch.rand(B, X).round()
    results = []
    for wrap in (lambda step: step, fastvae.graphed):
        parameters, step = _training("cpu")
        step = wrap(step)
        torch.manual_seed(2)
        results.append(([step(x) for _ in range(6)], parameters))
    (losses, parameters), (graphed_losses, graphed_parameters) = results
    assert torch.equal(torch.stack(losses), torch.stack(graphed_losses))
    assert all(torch.equal(p, g) for p, g in zip(parameters, graphed_parameters, strict=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fastvae.graphed(3), "step must be a function of tensors, got int"),
        (lambda: fastvae.graphed(torch.sin, generators=[7]), "generators must be torch.Generators, got int"),
        (lambda: fastvae.graphed(torch.sin, warmup=0), "warmup"),
        (lambda: fastvae.graphed(torch.sin)(2.0), "argument 0 of a graphed step is float; expected a tensor"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


class Cuda:
    """Recording stand-in for torch.cuda: a capture runs the step, a replay runs it again in place."""

    def __init__(self, monkeypatch):
        self.did, self.registered = [], []
        cuda = self

        class CUDAGraph:
            def register_generator_state(self, generator):
                cuda.registered.append(generator)

            def replay(self):
                cuda.did.append("replay")
                wrapped = cuda.wrapped
                results = wrapped.results, wrapped.step(*wrapped.inputs)
                if dataclasses.is_dataclass(results[0]):
                    results = [vars(r).values() for r in results]
                for place, result in zip(*results, strict=True):
                    place.copy_(result)

        @contextlib.contextmanager
        def graph(_, stream):
            assert stream is cuda.stream
            cuda.did.append("capture")
            yield

        self.stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "Stream": lambda: self.stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: self.stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: cuda.did.append("eager"))
        monkeypatch.setattr(graphs._Graphed, "_on_a_card", staticmethod(lambda inputs: True))


@pytest.mark.skipif(CUDA, reason="stands in for a card")
def test_calls_warm_up_then_capture_then_replay(monkeypatch):
    cuda, generator = Cuda(monkeypatch), torch.Generator()
    step = fastvae.graphed(lambda x, y: (x + y, x * y), generators=[generator], warmup=2)
    cuda.wrapped = step
    kept = []
    for i in range(5):
        x, y = torch.full((3,), float(i)), torch.arange(3.0)
        one, other = step(x, y)
        kept.append(one)
        assert torch.equal(one, x + y) and torch.equal(other, x * y)
    assert cuda.did == ["eager"] * 4 + ["capture"] + ["replay"] * 3
    # Returned tensors belong to the caller: later calls do not write to them.
    assert [float(k[0]) for k in kept] == [0, 1, 2, 3, 4]
    assert cuda.registered == [generator]
    # Inputs of another shape or dtype run eagerly, and the graph is kept.
    cuda.did.clear()
    for x, y in ((torch.ones(2), torch.ones(2)), (torch.ones(3).double(), torch.ones(3))):
        assert torch.equal(step(x, y)[0], x + y)
    assert cuda.did == ["eager"] * 4
    step(torch.ones(3), torch.ones(3))
    assert cuda.did[4:] == ["replay"]


@pytest.mark.skipif(CUDA, reason="stands in for a card")
def test_a_step_may_return_a_record(monkeypatch):
    cuda = Cuda(monkeypatch)
    step = fastvae.graphed(lambda x: fastvae.audit.LatticeMarginal(x + 1, 2 * x), warmup=1)
    cuda.wrapped = step
    found = [step(torch.full((3,), float(i))) for i in range(4)]
    assert cuda.did == ["eager"] * 2 + ["capture"] + ["replay"] * 3
    assert all(type(result) is fastvae.audit.LatticeMarginal for result in found)
    assert [float(result.log_px[0]) for result in found] == [1, 2, 3, 4]
    assert [float(result.error[0]) for result in found] == [0, 2, 4, 6]


@pytest.mark.skipif(CUDA, reason="stands in for a card")
def test_a_failed_capture_is_explained(monkeypatch):
    cuda = Cuda(monkeypatch)

    def step(x):
        if "capture" in cuda.did:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    step = fastvae.graphed(step, warmup=1)
    step(torch.ones(2, 3))
    message = r"with inputs \[2, 3\]: operation not permitted .*capturable=True"
    with pytest.raises(RuntimeError, match=message):
        step(torch.ones(2, 3))
    step = fastvae.graphed(lambda x: {"loss": x}, warmup=1)
    with pytest.raises(TypeError, match="must return a tensor, a tuple of tensors, or None; got dict"):
        step(torch.ones(2))


@on_a_card
def test_a_graphed_step_trains():
    generator = torch.Generator(DEVICE).manual_seed(3)
    parameters, plain = _training(generator=generator)
    step = fastvae.graphed(plain, generators=[generator])
    x = torch.rand(B, X, device=DEVICE).round()
    losses = torch.stack([step(x) for _ in range(300)]).double().cpu()
    assert bool(losses.isfinite().all()) and losses.unique().numel() > 290
    assert losses[-50:].mean() < losses[:50].mean()
    before = [p.clone() for p in parameters]
    assert bool(step(x[:4]).isfinite())
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert bool(step(x).isfinite())


NOT_REGISTERED = """
import torch
from tests.test_graphs import B, X, _training
import fastvae

_, plain = _training(generator=torch.Generator("cuda"))
step = fastvae.graphed(plain, warmup=1)
x = torch.rand(B, X, device="cuda").round()
step(x)
try:
    step(x)
except RuntimeError as error:
    print(error)
"""


@on_a_card
def test_a_generator_that_is_not_registered_is_refused():
    """An unregistered generator is refused, in a separate process: a failed capture leaves torch unusable."""
    run = subprocess.run([sys.executable, "-c", NOT_REGISTERED], capture_output=True, text=True)
    assert "generators=[generator]" in run.stdout, run.stdout + run.stderr[-3000:]
