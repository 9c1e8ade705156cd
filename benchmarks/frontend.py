"""``python -m benchmarks frontend``: overhead of an objective, with a decoder that costs nothing.

Forward and backward of ``fastvae.elbo`` and ``fastvae.iwae``, minus the decoder's own node in the graph,
against the same lines of PyTorch, eager and compiled, and against two autograd nodes that allocate the same
results and do nothing. For small models this is the whole cost. ``--steps`` measures whole training steps.

On a machine without a GPU, ``python -m tools.fakecard -- python -m benchmarks frontend --device cuda --cpu``
measures the host's work for one: the processor's time of all threads, while kernels do nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fastvae

from .measure import COMPILE, EMPTY, FALLBACK, HOST, OURS, Host, Place, keep_memory


class Case(NamedTuple):
    k: int  # 0 for the ELBO
    batch: int
    latent: int
    pixels: int

    def __str__(self) -> str:
        bound = f"iwae K={self.k}" if self.k else "elbo"
        return f"{bound}, {self.batch}×{self.latent}, {self.pixels} pixels"


CASES = (
    Case(0, 32, 10, 64),
    Case(0, 64, 20, 784),
    Case(0, 128, 50, 784),
    Case(5, 32, 10, 64),
    Case(50, 16, 20, 64),
)
LIKELIHOODS = ("bernoulli", "gaussian")


class Inputs(NamedTuple):
    x: Tensor
    mu: Tensor
    logvar: Tensor
    outputs: tuple[Tensor, ...]  # decoder outputs
    grad_z: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.mu, self.logvar, *self.outputs


def make(case: Case, likelihood: str, device: str = "cpu") -> Inputs:
    torch.manual_seed(0)
    rows = max(1, case.k) * case.batch

    def randn(*shape):
        return torch.randn(*shape, device=device)

    mu, logvar = (randn(case.batch, case.latent).requires_grad_() for _ in range(2))
    number = 2 if likelihood == "gaussian" else 1
    outputs = tuple((0.1 * randn(rows, case.pixels)).requires_grad_() for _ in range(number))
    x = torch.rand(case.batch, case.pixels, device=device).round()
    return Inputs(x, mu, logvar, outputs, randn(rows, case.latent))


class Link(torch.autograd.Function):
    """Decoder stand-in: prepared outputs, and a prepared gradient for z."""

    @staticmethod
    def forward(ctx, z, grad_z, *outputs):
        ctx.save_for_backward(grad_z)
        return tuple(o.view_as(o) for o in outputs) if len(outputs) > 1 else outputs[0].view_as(outputs[0])

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.saved_tensors, None, *grads


def ours(case: Case, likelihood: str, i: Inputs) -> Tensor:
    def decoder(z):
        return Link.apply(z, i.grad_z, *i.outputs)

    q = i.mu, i.logvar
    if case.k:
        return fastvae.iwae(i.x, q, decoder, k=case.k, likelihood=likelihood)
    return fastvae.elbo(i.x, q, decoder, likelihood=likelihood)


def eager(case: Case, likelihood: str, i: Inputs) -> Tensor:
    k = max(1, case.k)
    eps = torch.randn(k, *i.mu.shape, device=i.mu.device)
    z = i.mu + torch.exp(0.5 * i.logvar) * eps
    outputs = Link.apply(z.flatten(0, 1), i.grad_z, *i.outputs)
    x = i.x.expand(k, *i.x.shape).flatten(0, 1)
    if likelihood == "bernoulli":
        terms = -functional.binary_cross_entropy_with_logits(outputs, x, reduction="none")
    else:
        mean, logvar = outputs
        terms = -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() * torch.exp(-logvar))
    log_px = terms.sum(-1)
    if not case.k:
        kl = 0.5 * (i.mu.square() + i.logvar.exp() - 1 - i.logvar).sum(-1)
        return (log_px - kl).mean()
    ratio = 0.5 * (eps.square() - z.square() + i.logvar).sum(-1)
    return (torch.logsumexp(log_px.view(k, -1) + ratio, 0) - math.log(k)).mean()


class EmptyDraw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mu, logvar, k):
        return mu.new_empty(max(1, k) * mu.shape[0], mu.shape[1]), mu.new_empty(max(1, k), mu.shape[0])

    @staticmethod
    def backward(ctx, grad_z, grad_term):
        shape = grad_term.shape[1], grad_z.shape[1]
        return grad_z.new_empty(shape), grad_z.new_empty(shape), None


class EmptyReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, term, *outputs):
        ctx.save_for_backward(term, *outputs)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        term, *outputs = ctx.saved_tensors
        return None, torch.empty_like(term), *(torch.empty_like(o) for o in outputs)


def empty(case: Case, likelihood: str, i: Inputs) -> Tensor:
    z, term = EmptyDraw.apply(i.mu, i.logvar, case.k)
    outputs = Link.apply(z, i.grad_z, *i.outputs)
    return EmptyReduce.apply(i.x, term, *(outputs if isinstance(outputs, tuple) else (outputs,)))


def bare(i: Inputs) -> Callable[[], object]:
    """Return forward and backward of the link alone."""
    z = torch.zeros_like(i.grad_z, requires_grad=True)
    grads = tuple(torch.ones_like(o) for o in i.outputs)

    def run():
        outputs = Link.apply(z, i.grad_z, *i.outputs)
        return torch.autograd.grad(outputs, (z, *i.outputs), grads)

    return run


COMPILED = "fastvae, compiled"
COLUMNS = (OURS, COMPILED, "eager", COMPILE, FALLBACK, EMPTY)


def implementations(
    case: Case,
    likelihood: str,
    i: Inputs,
    compiled: bool,
    compile: Callable[..., Callable[..., Tensor]] = HOST.compile,
) -> dict[str, Callable[[], object]]:
    """Return each implementation's forward and backward pass, and the link's.

    Args:
        case: the sizes.
        likelihood: one of LIKELIHOODS.
        i: the inputs.
        compiled: add the compiled implementations.
        compile: compiles a function, with options of torch.compile. Default: that of the CPU.
    """
    functions = {OURS: ours, "eager": eager, EMPTY: empty}
    if compiled:
        torch._dynamo.reset()
        functions |= {
            COMPILED: compile(ours),
            COMPILE: compile(eager),
            FALLBACK: compile(eager, options={"fallback_random": True}),
        }
    runs: dict[str, Callable[[], object]] = {"link": bare(i)}
    for name in (c for c in COLUMNS if c in functions):

        def run(function=functions[name]):
            return torch.autograd.grad(function(case, likelihood, i), i.leaves)

        runs[name] = run
    return runs


def measure(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    wait: Callable[[], object] = bool,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Return microseconds of each run in each round, minus the median of the link, if it is among them.

    Rounds run in a random order, each after an uncounted call, without garbage collection.

    Args:
        runs: name → function to measure.
        rounds: number of rounds.
        calls: consecutive calls per round. Default: 1.
        wait: returns when the device has finished. Default: no wait.
        clock: returns nanoseconds. Default: those on the wall.
    """
    for run in runs.values():
        for _ in range(20):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled = list(runs.items()), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            # What runs before a round leaves caches, and objects to free, to it.
            shuffled.shuffle(order)
            for name, run in order:
                run()
                wait()
                before = clock()
                for _ in range(calls):
                    run()
                wait()
                times[name].append((clock() - before) / (1e3 * calls))
    finally:
        gc.enable()
    link = statistics.median(times.pop("link", [0]))
    return {name: [t - link for t in values] for name, values in times.items()}


# Samples, batch, hidden layers and latents of whole steps.
STEPS = ((1, 128, (200, 200), 50), (50, 64, (200, 200), 50))


class _On(Host):
    """Host of another device, whose works are run without its clock."""

    def __init__(self, device: str):
        self.device = torch.device(device)


def steps(case: tuple[int, int, tuple[int, ...], int], device: str) -> dict[str, Callable[[], object]]:
    """Return each implementation's training step of benchmarks.objectives."""
    from . import objectives

    (work,) = objectives.steps("", *case, {}, Place(host=_On(device), versions={COMPILE: {}}))
    return {name: run for name, run in work.run.items() if name != "Pyro"}


def _print_steps(device: str, rounds: int, *how: Any) -> None:
    for case in STEPS:
        runs = steps(case, device)
        found = measure(runs, rounds, *how)
        k, batch, hidden, latent = case
        print(f"step, K={k}, B={batch}, 784-{'-'.join(map(str, hidden))}-{latent} | " + " | ".join(
            f"{name} {statistics.median(values):.0f}" for name, values in found.items()
        ), flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks frontend", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=400, help="rounds per implementation (default 400)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--likelihoods", nargs="+", default=LIKELIHOODS, choices=LIKELIHOODS)
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of the cases to run"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="device of the tensors (default cpu); other devices run twenty calls in a row",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="the processor's time of all threads, not the time on the wall"
    )
    parser.add_argument("--steps", action="store_true", help="whole training steps instead")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        options.threads = [torch.get_num_threads()]
    columns = [c for c in COLUMNS if not options.no_compile or "compile" not in c]
    keep_memory()
    queue = (20, torch.cuda.synchronize) if options.device.startswith("cuda") else (1, bool)
    how = *queue, time.process_time_ns if options.cpu else time.perf_counter_ns
    microseconds = f"microseconds{' of the processor' * options.cpu}"
    if options.steps:
        print(f"{microseconds}: median\n")
        _print_steps(options.device, options.rounds, *how)
        return 0
    print(f"{microseconds}, forward + backward without the decoder: median (20th to 80th percentile)\n")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for likelihood in options.likelihoods:
            print(
                f"{threads} thread{'s' * (threads > 1)}, {likelihood} | "
                + " | ".join(columns)
                + " | vs eager | vs compiled | vs empty"
            )
            for case in (CASES[n] for n in options.cases):
                i = make(case, likelihood, options.device)
                runs = implementations(case, likelihood, i, not options.no_compile)
                found = measure(runs, options.rounds, *how)
                middle = {name: statistics.median(values) for name, values in found.items()}
                best = min(middle[c] for c in (OURS, COMPILED) if c in middle)
                peers = [v for name, v in middle.items() if name.startswith("torch.compile")]
                cells = []
                for name in columns:
                    low, *_, high = statistics.quantiles(found[name], n=5)
                    cells.append(f"{middle[name]:.0f} ({low:.0f} to {high:.0f})")
                ratios = [middle["eager"] / middle[OURS], min(peers) / best if peers else math.nan]
                ratios.append(middle[OURS] / max(40.0, middle["empty nodes"]))
                print(f"{case} | " + " | ".join(cells + [f"{r:.2f}×" for r in ratios]), flush=True)
            print()
    return 0
