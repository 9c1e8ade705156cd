"""Every decoder gives the same numbers, gradients, hook calls and errors, with a fused last layer or not."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import fastvae
from fastvae.ops import head

from .decoders import DECODERS, EVENTS

B, K, D, X = 13, 130, 3, 160  # K·B·X is above the threshold, 2^18

# Decoders whose structure proves that fusing the last layer cannot be observed.
LEFT_OUT = {
    "linear", "linear without bias", "sequential", "sequential of one", "nested", "relu in place",
    "batch norm", "dropout", "the body doubles the last layer", "a weight that is not a parameter",
    "frozen last layer", "frozen weight", "frozen body", "frozen", "weight tensor hook",
    "post-accumulate hook", "tied", "a transposed weight", "saved on the CPU", "anomaly detection",
    "deepcopied", "pickled", "saved and loaded", "compiled body",
    *(name for name in DECODERS if name.endswith(" on the body")),
}  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    """Record calls of the ops that fuse the last layer."""
    found = []
    for module, name in (
        (fastvae.objectives.reduce, "reduce_linear"),
        (fastvae.likelihoods.declared, "linear_rows"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function: found.append(f) or f(*args))
    return found


@pytest.fixture(autouse=True)
def threshold(monkeypatch):
    """Use the threshold of processors with matrix tiles, so that every processor fuses the layer here."""
    monkeypatch.setattr(head, "FEWEST_BY_BLAS", head.FEWEST_NUMBERS)
    monkeypatch.setattr(head, "NUMBERS_PER_INPUT", 0)


def outcome(name, fuse, run):
    """Return value, gradients by name, hook calls and the error's type of a fresh decoder."""
    case = DECODERS[name]
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(X, 2 * D), case.make(D, X)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", latent_dim=D, fuse=fuse)
    x = torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()
    EVENTS.clear()
    torch.manual_seed(2)
    error = None
    value = torch.full((), torch.nan)
    try:
        with case.around(decoder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = run(vae, x)
            if value.requires_grad:
                value.sum().backward()
    except Exception as e:
        error = type(e)
    grads = {n: p.grad for n, p in vae.named_parameters()}
    return value.detach(), grads, dict(EVENTS), error


RUNS = {
    "iwae": lambda vae, x: vae.iwae(x, k=K),
    "log_marginal": lambda vae, x: vae.log_marginal(x, k=K).log_px,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", DECODERS)
def test_fusion_changes_neither_results_nor_side_effects(fused, name, run):
    value, grads, events, error = outcome(name, True, RUNS[run])
    assert bool(fused) == (name in LEFT_OUT)
    expected, expected_grads, expected_events, expected_error = outcome(name, False, RUNS[run])
    assert error is expected_error
    assert events == expected_events
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
    assert grads.keys() == expected_grads.keys()
    # The gradient of a bias in front of a batch norm is the rounding of a sum of numbers like the largest.
    largest = max(
        (float(g.abs().nan_to_num().max()) for g in expected_grads.values() if g is not None), default=0
    )
    for parameter, grad in expected_grads.items():
        assert (grads[parameter] is None) == (grad is None), parameter
        if grad is not None:
            atol = 1e-4 * float(grad.abs().max()) + 1e-6 * largest
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-3, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", ["sequential", "forward hook on the container", "Linear.forward patched"])
def test_fusion_changes_neither_results_nor_side_effects_when_compiled(fused, name):
    results = []
    for fuse in (True, False):
        torch._dynamo.reset()
        fused.clear()
        results.append(
            outcome(name, fuse, lambda vae, x: torch.compile(vae, backend="eager")(x, "iwae", k=K))
        )
        assert bool(fused) == (fuse and name in LEFT_OUT)
    (value, grads, events, error), (expected, expected_grads, expected_events, _) = results
    assert error is None and events == expected_events
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-4)


def test_nested_and_concurrent_calls_of_the_decoder():
    """Calls from the decoder's body or from another thread return a plain tensor."""
    found = []

    class Calling(nn.Module):
        def forward(self, h):
            if not found:
                found.append(None)
                found.append(decoder(torch.ones(2, D)))
                thread = threading.Thread(target=lambda: found.append(decoder(torch.ones(2, D))))
                thread.start()
                thread.join()
            return h

    decoder = nn.Sequential(Calling(), nn.Linear(D, X))
    vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood="bernoulli")
    vae.iwae(torch.rand(B, X).round(), k=K)
    assert [type(t) for t in found[1:]] == [torch.Tensor] * 2 and torch.equal(found[1], found[2])


def test_frozen_layers_changed_between_the_passes(fused):
    """Changing frozen weights between the passes is an error with k_chunk, which reruns the decoder."""
    decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, X)).requires_grad_(False)
    vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood="bernoulli")
    bound = vae.iwae(torch.rand(B, X).round(), k=2 * K, k_chunk=K)
    decoder[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place between the forward and the backward pass"):
        bound.backward()
    assert fused


def test_sharded_and_replicated():
    """FSDP1, FSDP2 and DDP of the VAE, the decoder and its last layer work, in a separate process."""
    run = subprocess.run([sys.executable, "-m", "tests.sharded"], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
    found = dict.fromkeys(line.split("|")[0] for line in run.stdout.splitlines())
    for name in found:
        found[name] = dict(
            line.split("|")[1:] for line in run.stdout.splitlines() if line.startswith(f"{name}|")
        )
    assert len(found) == 11

    def numbers(text):
        return pytest.approx([float(word) for word in text.split()], rel=1e-4)

    for name, outcomes in found.items():
        assert numbers(outcomes["True"]) == numbers(outcomes["False"]).expected, (name, outcomes)
        assert outcomes["False"].startswith("-1"), (name, outcomes)
        if name == "FSDP2 of the decoder, too":
            assert "was freed after the call, as sharding does" in outcomes["FusedHead"]
        else:
            fused_head = outcomes.get("FusedHead", outcomes["True"])
            assert numbers(fused_head) == numbers(outcomes["True"]).expected, (name, outcomes)
