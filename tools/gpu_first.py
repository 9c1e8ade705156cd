"""The first measurements on a GPU: ``python -m tools.gpu --first``.

Launch parameters of the likelihoods in turns, the front end, ``fastvae.graphed``, the last layer, steps
shaped like users' codes, whole decoders in an evaluation, and the ops that the other items lack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import fastvae
from benchmarks import (
    aggregate,
    categorical,
    codebook,
    components,
    frontend,
    head,
    likelihood,
    mixture,
    multinomial,
    normal_full,
    objectives,
    users,
)
from benchmarks.measure import FALLBACK, OURS, Place, Work, assert_near, bits_of
from benchmarks.users.case import step_of
from fastvae.ops.likelihood import DECLARED

from .device import DeviceLost

# Groups of the rows, in order, and the headings of their tables.
PARAMETERS, FRONT_END, GRAPHED, LAST_LAYER = "parameters", "front end", "fastvae.graphed", "last layer"
USERS, DECODERS, MORE = users.case.GROUP, "whole decoders", "more ops"
TABLES = {
    PARAMETERS: "launch parameters, the default (fastvae) and others, µs, × of it; same bits unless noted",
    FRONT_END: "an objective, forward+backward, without its decoder, µs per call, × of fastvae's",
    GRAPHED: "a training step by fastvae.graphed (fastvae), and otherwise, µs, × of it",
    LAST_LAYER: "last layer and likelihood, forward+backward, fused (fastvae) and not, µs, × of it (MiB)",
    USERS: "steps shaped like users' codes (python -m benchmarks users), µs, × of it",
    DECODERS: "log p(x) by whole decoders in one kernel (fastvae) and layer by layer, µs, × of it",
    MORE: "more ops, µs, × of it",
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


def user(name: str, size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield a case of ``python -m benchmarks users``, and its training step as CUDA graphs."""
    (case,) = (c for c in users.CASES if c.name == name)
    tiny = size[0] == case.tiny["batch"]
    (work,) = users.case.works([case], tiny, False, place)
    if case.trains:
        randn = functools.partial(torch.randn, device=place.device)
        losses = {OURS: case.ours, "eager": lambda model, batch: case.eager(model, batch, randn)}
        for way, loss in losses.items():
            work.run[f"{way}, graphed"] = _graphed_user(case, tiny, loss, place)
    yield work
    # Graphs keep their memory.
    work.run.clear()


def _graphed_user(case: Any, tiny: bool, loss: Callable[..., Any], place: Place) -> Callable[[], Any]:
    torch.manual_seed(0)
    model, batch = case.build(**(case.tiny if tiny else case.sizes))
    model, batch = model.to(place.device), users.case.on(place.device, batch)
    step = fastvae.graphed(step_of(model, lambda: loss(model, batch), capturable=place.device.type == "cuda"))
    try:
        for _ in range(4):
            step()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error
    return step


@torch.no_grad()
def whole_decoder(hidden: tuple[int, ...], size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield log p(x) of images, with the decoder in one kernel and layer by layer; in float32 by TF32."""
    k, images, latent = size
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model = objectives.model_of(hidden, latent).eval().to(place.device, place.dtype)
        torch.manual_seed(1)
        x = torch.rand(images, objectives.PIXELS).round().to(place.device, place.dtype)
        ways = {OURS: {}, "layer by layer": {"fuse": False}}
        run, found = {}, {}
        for way, options in ways.items():
            vae = fastvae.VAE(model["encoder"], model["decoder"], likelihood="bernoulli", **options)

            def evaluate(vae: Any = vae) -> torch.Tensor:
                torch.manual_seed(2)
                return fastvae.evaluate(vae, x, k=k, progress=False).log_px

            run[way] = evaluate

        def check(way: str) -> None:
            found[way] = run[way]().mean().double().cpu()
            # Of the same noise; rounded products of ten bits, or eight, in each layer.
            assert abs(found[way] - found[OURS]) < 0.5, f"log p(x) is {found}"

        name = f"{objectives._name(hidden, latent)}, K={k}, {images} images{place.label}"
        operations = images * k * objectives._products(hidden, latent)[1]
        checks = {way: functools.partial(check, way) for way in ways}
        yield Work(DECODERS, name, "evaluation", run, checks, 0, operations)
    finally:
        torch.set_float32_matmul_precision(before)


def more(works: Callable[..., Any], size: tuple[int, ...], place: Place) -> Iterator[Work]:
    """Yield an op at one size, without torch.compile's versions."""
    found = works(*size, place=replace(place, versions={}))
    for work in [found] if isinstance(found, Work) else found:
        yield replace(work, group=MORE, case=f"{work.group} {work.case}", target={})


def _with_target(works: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *size, place: works(*size, {}, place)


# By the group of their rows.
_GROUPS: dict[str, dict[str, Callable[..., Iterator[Work]]]] = {
    PARAMETERS: {
        "parameters of gaussian_log_prob": functools.partial(parameters, "gaussian"),
        "parameters of bernoulli_log_prob": functools.partial(parameters, "bernoulli"),
    },
    FRONT_END: {"front end": front_end},
    GRAPHED: {
        "graphed ELBO step": functools.partial(graphed_step, "ELBO step"),
        "graphed IWAE step": functools.partial(graphed_step, "IWAE step"),
    },
    LAST_LAYER: {
        "last layer": functools.partial(last_layer, "highest"),
        "last layer, TF32": functools.partial(last_layer, "high"),
    },
    USERS: {case.name: functools.partial(user, case.name) for case in users.CASES},
    DECODERS: {
        "whole decoder": functools.partial(whole_decoder, (200,)),
        "whole decoder of two hidden layers": functools.partial(whole_decoder, (200, 200)),
    },
    MORE: {
        "classes": functools.partial(more, lambda *s, place: categorical.classes(*s, -1, place)),
        "clicks": functools.partial(more, multinomial.clicks),
        **{
            name: functools.partial(more, lambda *s, place, name=name: components.counts(name, *s, place))
            for name in ("negative_binomial", "zero_inflated_negative_binomial")
        },
        "discretized logistic mixture": functools.partial(more, components.mixture),
        "mixture": functools.partial(more, _with_target(mixture.mixture)),
        "aggregate": functools.partial(more, _with_target(aggregate.aggregate)),
        "nearest code": functools.partial(more, codebook.nearest),
        "full covariance": functools.partial(more, _with_target(normal_full.rsample_tril)),
    },
}
WORKS = {name: works for group in _GROUPS.values() for name, works in group.items()}
GROUP_OF = {name: group for group, works in _GROUPS.items() for name in works}
