"""The first measurements on a GPU: ``python -m tools.gpu --first``.

Launch parameters of the likelihoods in turns, the front end, ``fastvae.graphed``, and the last layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import fastvae
from benchmarks import frontend, head, likelihood, objectives
from benchmarks.measure import FALLBACK, OURS, Place, Work, assert_near, bits_of
from fastvae.ops.likelihood import DECLARED

from .device import DeviceLost

# Groups of the rows, in order, and the headings of their tables.
PARAMETERS, FRONT_END, GRAPHED, LAST_LAYER = "parameters", "front end", "fastvae.graphed", "last layer"
TABLES = {
    PARAMETERS: "launch parameters, the default (fastvae) and others, µs, × of it; same bits unless noted",
    FRONT_END: "an objective, forward+backward, without its decoder, µs per call, × of fastvae's",
    GRAPHED: "a training step by fastvae.graphed (fastvae), and otherwise, µs, × of it",
    LAST_LAYER: "last layer and likelihood, forward+backward, fused (fastvae) and not, µs, × of it (MiB)",
}
# Values in turns: elements of a forward program's tile, and samples of a backward program.
VALUES = {"tile": (1024, 2048), "samples": (1, 2, 4)}
BY_HAND, WITHOUT = "captured by hand", f"{OURS}, without a graph"


class Parameters:
    """The launch parameters of the likelihoods, one of which is changed at a time."""

    def __init__(self) -> None:
        # Imported late, as tools.gpu itself explains a missing Triton.
        from fastvae.kernels import common, launching, likelihood_flat

        self.launch, self.flat, self.forget = common.LAUNCH, likelihood_flat, launching.clear_caches
        self.defaults = {name: common.LAUNCH[name] for name in ("likelihood", "likelihood_backward")}
        self.samples: int = likelihood_flat.SAMPLES_FLAT
        self.changed: tuple[str, int] | None = None

    def default_of(self, what: str, name: str) -> int:
        """Return the default of a key of VALUES for a likelihood."""
        from fastvae.kernels.likelihood_parameters import launching_of

        tile: int = launching_of(DECLARED[name], False).tile
        return tile if what == "tile" else self.samples

    def set(self, what: str = "", value: int = 0) -> None:
        """Set one parameter, and the other to its default; both without arguments."""
        if self.changed == (what, value):
            return
        # The plans depend on the parameters, which are not in their keys.
        self.forget()
        tile = {"tile": value} if what == "tile" else {}
        self.launch |= {name: launch._replace(**tile) for name, launch in self.defaults.items()}
        self.flat.SAMPLES_FLAT = value if what == "samples" else self.samples
        self.changed = what, value


def parameters(name: str, size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield a likelihood's forward pass by tile, and forward and backward by samples of a program."""
    settings = Parameters()
    # The same inputs for each value, and checks of its results.
    each = [likelihood.log_prob(name, size, {}, place) for _ in range(max(map(len, VALUES.values())))]
    try:
        for works, (what, values) in zip(zip(*each, strict=True), VALUES.items(), strict=True):
            default, work = settings.default_of(what, name), works[0]
            runs, checks = {}, {}
            # The default is first.
            for value, own in zip(sorted(values, key=lambda v: v != default), works, strict=False):
                way = OURS if value == default else f"{what} {value}"
                set_to = functools.partial(settings.set, what, value)
                runs[way], checks[way] = _after(set_to, own.run[OURS]), _after(set_to, own.check[OURS])
            yield replace(
                work,
                group=PARAMETERS,
                case=f"{work.group} {work.case}, {what} {default}",
                run=runs,
                check=checks,
                graphs=frozenset(runs) if work.graphs else frozenset(),
                bits={way: functools.partial(bits_of, run, work.sets) for way, run in runs.items()},
            )
    finally:
        settings.set()


def _after(first: Callable[[], object], then: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> Any:
        first()
        return then()

    return both


def front_end(size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield a case of ``python -m benchmarks frontend``, on the wall and by the processor's time."""
    k, *rest = size
    case = frontend.Case(0 if k == 1 else k, *rest)
    given = frontend.make(case, "bernoulli", str(place.device))
    runs = frontend.implementations(case, "bernoulli", given, True, place.host.compile)
    del runs[FALLBACK]
    for clock in ("wall", "processor"):
        name = f"{case}, {clock}{place.label}"
        yield Work(FRONT_END, name, "forward+backward", runs, base="link", processor=clock == "processor")
    torch._dynamo.reset()


def graphed_step(what: str, size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield a training step by ``fastvae.graphed``, by a graph captured by hand, and without one."""
    k, batch, *hidden, latent = size
    place = replace(place, versions={})
    # One model for each.
    (work,), (other,) = (objectives.steps(what, k, batch, tuple(hidden), latent, {}, place) for _ in range(2))
    by_hand, step = (w.run[f"{OURS}, CUDA graph"] for w in (work, other))
    x = torch.rand(batch, objectives.PIXELS).round().to(place.device)
    graphed = fastvae.graphed(step)
    try:
        for _ in range(4):
            graphed(x)
    except RuntimeError as error:
        # After a failed capture a process cannot continue.
        raise DeviceLost(str(error)) from error
    yield replace(
        work,
        group=GRAPHED,
        case=f"{what} {work.case}",
        run={OURS: lambda: graphed(x), BY_HAND: by_hand, WITHOUT: work.run[OURS]},
        check={OURS: lambda: assert_near(graphed(x), by_hand(), 0.02)},
        graphs=frozenset([BY_HAND]),
    )


def last_layer(precision: str, size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield the last layer fused with the likelihood, and its output stored.

    ``precision`` is that of float32 products, as in ``torch.set_float32_matmul_precision``.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        k, b, inner, outputs = size
        work = head.head(k, b, inner, outputs, {}, replace(place, versions={}))
        yield replace(work, group=LAST_LAYER, case=f"{work.case}{', TF32' * (precision == 'high')}")
    finally:
        torch.set_float32_matmul_precision(before)


WORKS = {
    "parameters of gaussian_log_prob": functools.partial(parameters, "gaussian"),
    "parameters of bernoulli_log_prob": functools.partial(parameters, "bernoulli"),
    "front end": front_end,
    "graphed ELBO step": functools.partial(graphed_step, "ELBO step"),
    "graphed IWAE step": functools.partial(graphed_step, "IWAE step"),
    "last layer": functools.partial(last_layer, "highest"),
    "last layer, TF32": functools.partial(last_layer, "high"),
}
