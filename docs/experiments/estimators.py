"""``python -m docs.experiments.estimators``: estimates of log p(x) against the truth, for docs/estimators.md.

Linear-Gaussian models have an exact log p(x), and a q that is inexact by a stated amount; for two models of
scikit-learn's digits, trained as in the demo with the ELBO and with IWAE, the truth is an estimate by very
many draws from adapted proposals. Every estimator in ESTIMATORS is a function of a model, the draws per
example and a seed, and a row of both tables. The fields of LogMarginal that have a standard error are among
them by their declaration; a proposal takes one line there. Those in SLOW are measured on fewer examples.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from benchmarks import report
from fastvae.cli import images as demo_images
from fastvae.cli import training
from fastvae.estimation.weights import ESTIMATES
from fastvae.likelihoods import Bernoulli, Gaussian, Poisson

OUT = Path(__file__).parents[1] / "estimators.md"
NOISE = 0.5  # standard deviation of x given z
# D; q's standard deviation over the posterior's, and its mean's distance in standard deviations.
EXACT = (
    *((2, scale, shift) for scale, shift in ((1.3, 0), (0.9, 0), (0.7, 0), (0.5, 0), (1, 2))),
    *((10, scale, shift) for scale, shift in ((1.3, 0), (0.9, 0), (0.7, 0), (0.6, 0), (1.1, 1.5))),
    *((50, scale, shift) for scale, shift in ((1.2, 0), (0.97, 0), (0.9, 0), (0.8, 0), (1.05, 1.5))),
)
# Models for the comparison of all estimators.
COMPARED = (
    *((2, scale, shift) for scale, shift in ((1.3, 0), (0.7, 0), (1, 2))),
    *((10, scale, shift) for scale, shift in ((0.9, 0), (0.6, 0), (1.1, 1.5))),
    *((50, scale, shift) for scale, shift in ((0.97, 0), (0.8, 0), (1.05, 1.5))),
)


class Model(NamedTuple):
    """Examples, their q, the decoder, and the true log p(x)."""

    name: str
    x: Tensor  # [N, X]
    q: Any
    decoder: Callable[..., Any]
    options: dict[str, Any]  # likelihood and prior
    log_px: Tensor  # [N] float64


class Estimate(NamedTuple):
    """Estimates of log p(x) and 95 % intervals, [N] in float64 each, and the rows decoded per example."""

    value: Tensor
    low: Tensor
    high: Tensor
    evaluations: int


Estimator = Callable[[Model, int, int], Estimate]


def marginal(model: Model, k: int, seed: int, **options: Any) -> fastvae.LogMarginal:
    """Compute :func:`fastvae.log_marginal` of a model, in float64."""
    noise = torch.Generator().manual_seed(seed)
    found = fastvae.log_marginal(
        model.x, model.q, model.decoder, k=k, generator=noise, **model.options, **options
    )
    return fastvae.LogMarginal(**{name: v.double() for name, v in vars(found).items()})


def _normal(value: str, error: str) -> Estimator:
    """Return an estimator: a field of LogMarginal, plus and minus 1.96 of its standard errors."""

    def estimator(model: Model, k: int, seed: int) -> Estimate:
        found = marginal(model, k, seed)
        center, half = getattr(found, value), 1.96 * getattr(found, error)
        return Estimate(center, center - half, center + half, k)

    return estimator


def _interval(**options: Any) -> Estimator:
    """Return an estimator: the jackknife and the interval, with options of log_marginal."""

    def estimator(model: Model, k: int, seed: int) -> Estimate:
        found = marginal(model, k, seed, **options)
        return Estimate(found.jackknife, found.low, found.high, k)

    return estimator


PROPOSALS: dict[str, Estimator] = {
    f'`proposal="{name}"`': _interval(proposal=name) for name in ("posterior", "adapted", "refined")
}
ESTIMATORS: dict[str, Estimator] = {
    **{
        f"`{name}` ± 1.96 `{declared.stderr}`": _normal(name, declared.stderr)
        for name, declared in ESTIMATES.items()
        if declared.stderr
    },
    "`jackknife`, `low` to `high`": _interval(),
    '`noise="qmc"`': _interval(noise="qmc"),
    '`proposal="defensive"`': _interval(proposal="defensive"),
    '`proposal="adapted"`': _interval(proposal="adapted"),
    '`proposal="refined"`': _interval(proposal="refined"),
}


def _annealed(model: Model, k: int, seed: int) -> Estimate:
    draws, steps, leapfrog = 16, 200, 2
    found = fastvae.audit.ais(
        model.x, model.q, model.decoder, k=draws, steps=steps, leapfrog=leapfrog,
        generator=torch.Generator().manual_seed(seed), **model.options,
    )  # fmt: skip
    half = 1.96 * found.log_px_stderr
    return Estimate(found.log_px, found.log_px - half, found.log_px + half, draws * steps * leapfrog * 5 // 4)


def _unbiased(levels: bool) -> Estimator:
    """Return an estimator: Russian roulette at the mean cost of k draws, per example, without interval."""

    def estimator(model: Model, k: int, seed: int) -> Estimate:
        generator = torch.Generator().manual_seed(seed)
        values, cost = [], 0
        for i in range(len(model.x)):
            one = model.x[i : i + 1], tuple(v[i : i + 1] for v in model.q), model.decoder

            def draw(n: int, one: Any = one) -> Tensor:
                with torch.no_grad():
                    parts = fastvae.log_weights(*one, k=n, generator=generator, **model.options)
                return (parts.log_likelihood + parts.log_ratio)[:, 0].double()

            value, rows = roulette(draw, round(k / 2.207) if levels else k - 5, generator, levels=levels)
            values.append(value)
            cost += rows
        none = torch.full((len(values),), math.nan, dtype=torch.float64)
        return Estimate(torch.tensor(values, dtype=torch.float64), none, none, cost // len(values))

    return estimator


def roulette(
    draw: Callable[[int], Tensor], m: int, generator: torch.Generator, *, levels: bool
) -> tuple[float, int]:
    """Return an unbiased estimate of log p(x) and the number of draws, from ``draw(n)``, n log weights.

    SUMO (Luo et al. 2020, section 4): bounds of m, m + 1, … draws, P(K >= k) = 1/k up to 80 and 0.9 times the
    previous one beyond. With ``levels`` bounds of m, 2m, 4m, … draws, means over disjoint blocks (Shi &
    Cornish 2021), P(level >= l) = 2^(-1.5 l).
    """
    u = 1 - float(torch.rand((), generator=generator, dtype=torch.float64))
    if levels:
        top = int(-math.log2(u) / 1.5)
        log_w = draw(m << top)
        blocks = [log_w.reshape(-1, m << level) for level in range(top + 1)]
        bounds = torch.stack([(b.logsumexp(1) - math.log(b.shape[1])).mean() for b in blocks])
        survival = 2.0 ** (-1.5 * torch.arange(1, top + 1, dtype=torch.float64))
    else:
        top = int(1 / u) if u >= 1 / 80 else 80 + int(math.log(80 * u) / math.log(0.9))
        log_w = draw(m + top)
        number = torch.arange(1, m + top + 1, dtype=torch.float64)
        bounds = (log_w.logcumsumexp(0) - number.log())[m - 1 :]
        k = number[:top]
        survival = torch.where(k <= 80, 1 / k, 0.9 ** (k - 80) / 80)
    return float(bounds[0] + (bounds.diff() / survival).sum()), len(log_w)


SLOW: dict[str, Estimator] = {
    "`log_px` ± 1.96 `log_px_stderr`": _normal("log_px", "log_px_stderr"),
    "`ais` ± 1.96 `log_px_stderr`, with gradients": _annealed,
    "SUMO": _unbiased(levels=False),
    "unbiased by levels": _unbiased(levels=True),
}


def linear_gaussian(latent: int, scale: float, shift: float, examples: int) -> Model:
    """Build z ~ N(0, I), x = A z + noise, with orthogonal columns of A: an uncorrelated posterior."""
    numbers = latent + 3
    generator = torch.Generator().manual_seed(latent)
    basis = torch.linalg.qr(torch.randn(numbers, latent, generator=generator, dtype=torch.float64)).Q
    a = torch.linspace(2, 0.5, latent, dtype=torch.float64)
    z = torch.randn(examples, latent, generator=generator, dtype=torch.float64)
    x = z * a @ basis.T + NOISE * torch.randn(examples, numbers, generator=generator, dtype=torch.float64)
    precision = 1 + (a / NOISE).square()
    mean = a * (x @ basis) / NOISE**2 / precision
    mean[:, 0] += shift / precision[0].sqrt()
    logvar = (2 * math.log(scale) - precision.log()).expand_as(mean)
    weight = basis * a
    covariance = weight @ weight.T + NOISE**2 * torch.eye(numbers, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(x.new_zeros(numbers), covariance).log_prob(x)
    off = [f"σ of q × {scale:g}"] * (scale != 1) + [f"mean off by {shift:g} σ"] * (shift != 0)
    options = {"likelihood": Gaussian(scale=NOISE)}
    name = f"D = {latent}, {', '.join(off)}"
    return Model(name, x, (mean, logvar.contiguous()), lambda z: z @ weight.T, options, truth)


# Decoder of each latent's own elements, and their likelihood.
CURVED: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "counts": (lambda u: u + 0.5, Poisson()),
    "quadratic": (lambda u: u + 0.3 * u.square(), Gaussian(scale=NOISE)),
    "five bits": (lambda u: 2 * u, Bernoulli()),
}


def curved(name: str, latent: int, examples: int) -> Model:
    """Build a model whose log p(x) is a sum of integrals over one latent each, computed on a grid.

    The latents are rotated, so that the posterior is correlated; q is normal, with its mean, and has the
    conditional variances of a normal posterior, as from the ELBO.
    """
    function, likelihood = CURVED[name]
    copies = 5 if name == "five bits" else 1
    generator = torch.Generator().manual_seed(latent)
    rotation = torch.linalg.qr(torch.randn(latent, latent, generator=generator, dtype=torch.float64)).Q
    slopes = torch.linspace(1.5, 0.5, latent, dtype=torch.float64)

    def outputs(u: Tensor, slopes: Tensor = slopes) -> Tensor:
        return function(slopes * u) if name == "counts" else slopes * function(u)

    def decoder(z: Tensor) -> Tensor:
        return outputs(z @ rotation).repeat_interleave(copies, -1)

    z = torch.randn(examples, latent, generator=generator, dtype=torch.float64)
    x = likelihood.sample(decoder(z), generator=generator)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    log_prior = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi) + math.log(16 / 800)
    total, mean, variance = (
        torch.zeros(examples, dtype=torch.float64),
        torch.empty_like(z),
        torch.empty_like(z),
    )
    for i, own in enumerate(x.unflatten(1, (latent, copies)).unbind(1)):
        # One "sample" of the decoder's output for each point of the grid.
        at = outputs(grid, slopes[i])[:, None, None].expand(-1, examples, copies).flatten(0, 1)
        log_joint = likelihood.log_likelihood(own, at, len(grid)) + log_prior[:, None]
        total += log_joint.logsumexp(0)
        w = torch.softmax(log_joint, 0)
        mean[:, i] = grid @ w
        variance[:, i] = grid.square() @ w - mean[:, i].square()
    precision = (1 / variance) @ rotation.T.square()
    q = mean @ rotation.T, -precision.log()
    return Model(f"{name}, D = {latent}", x, q, decoder, {"likelihood": likelihood}, total)


def unbiased(models: list[Model], k: int) -> list[str]:
    """Return the table of the mean of p̂(x) / p(x) over seeds, one for each example."""
    lines = ["| model | seeds | mean of p̂(x) / p(x) − 1 |", "|---|---|---|"]
    for model in models:
        found = marginal(model, k, 3, proposal="refined")
        off = (found.log_px - model.log_px).exp() - 1
        mean = f"{float(off.mean()):+.5f} ± {float(off.std()) / math.sqrt(len(off)):.5f}".replace("-", "−")
        lines.append(f"| {model.name} | {len(off)} | {mean} |")
        print(lines[-1], flush=True)
    return lines


def digits(k: int | None, latent: int, epochs: int, examples: int, reference: int) -> Model:
    """Train a model of scikit-learn's digits with the ELBO, or IWAE with k draws.

    Its log p(x) of test images is estimated by ``reference`` draws.
    """
    images = demo_images.digits()
    name = "ELBO" if k is None else f"IWAE-{k}"
    architecture = {"pixels": 64, "hidden": 128, "latent": latent}
    model = training.train(name, k, images, architecture, epochs, 1, 0).model
    x = images.test[:examples]
    with torch.no_grad():
        q = model.encoder(x)
    options = {"likelihood": model.likelihood, "prior": model.prior}
    found = Model(f"digits, D = {latent}, trained with {name}", x, q, model.decoder, options, x)
    return found._replace(log_px=marginal(found, reference, 1, proposal="adapted").log_px)


def some_of(model: Model, examples: int) -> Model:
    """Return the model with its first examples."""
    q = tuple(v[:examples] for v in model.q)
    return model._replace(x=model.x[:examples], q=q, log_px=model.log_px[:examples])


def measured(model: Model, estimator: Estimator, k: int, seeds: int) -> list[str]:
    """Return a row's cells: bias, rms error, coverage, share of open intervals, width, evaluations, time."""
    begin = time.process_time()
    runs = [estimator(model, k, 100 + seed) for seed in range(seeds)]
    seconds = (time.process_time() - begin) / seeds / len(model.x)
    value, low, high = (torch.stack([run[i] for run in runs]) for i in range(3))
    off = value - model.log_px
    holds = ((low <= model.log_px) & (model.log_px <= high)).double().mean()
    # Seeds share examples, but errors are independent, as the truth is known.
    error = float(off.std()) / math.sqrt(off.numel())
    return [
        f"{float(off.mean()):+.4f} ± {error:.4f}".replace("-", "−"),
        f"{float(off.square().mean().sqrt()):.4f}",
        *(
            ["", "", ""]
            if bool(low.isnan().all())
            else [
                f"{100 * float(holds):.1f}",
                f"{100 * float(high.isinf().double().mean()):.1f}",
                f"{float((high - low).median()):.3f}".replace("inf", "∞"),
            ]
        ),
        str(runs[0].evaluations),
        f"{1e6 * seconds:.0f}",
    ]


COLUMNS = (
    *("model", "median k̂", "estimate and interval", "bias, nats", "rms error", "coverage, %"),
    *("open, %", "median width", "decoder rows", "CPU µs per example"),
)


def table(models: list[Model], k: int, seeds: int, estimators: dict[str, Estimator]) -> list[str]:
    """Return the table with a row per model and estimator."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for model in models:
        khat = float(marginal(model, k, 0).khat.nanmedian())
        first = [model.name, f"{khat:.2f}".replace("-", "−")]
        for name, estimator in estimators.items():
            lines.append(f"| {' | '.join([*first, name, *measured(model, estimator, k, seeds)])} |")
            first = ["", ""]
            print(lines[-1], flush=True)
    return lines


def coverage(models: list[Model], draws: list[int]) -> list[str]:
    """Return the table of the intervals' coverage of log p(x), by the number of draws."""
    cells = [f"K = {k}{what}" for k in draws for what in (": ± 1.96 stderr", ": low to high", ", open")]
    lines = [f"| model | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for model in models:
        row = [model.name]
        for k in draws:
            found = marginal(model, k, 7)
            normal = (found.log_px - model.log_px).abs() <= 1.96 * found.log_px_stderr
            holds = (found.low <= model.log_px) & (model.log_px <= found.high)
            row += [f"{100 * float(v.double().mean()):.1f}" for v in (normal, holds, found.high.isinf())]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    return lines


TEXT = """# Estimates of log p(x), measured

Generated by `python -m docs.experiments.estimators` ({where}).

`log_marginal` and `evaluate` return these estimates from the same draws, without evaluating the decoder
again:

| field | meaning | when to quote it |
|---|---|---|
{fields}
| `low`, `high` | a 95 % interval over the draws: Hall's for a mean, its upper end raised by the posterior \
of the Pareto tail | always; `high` = ∞ means that these draws do not bound log p(x) from above |

Where weights are light-tailed, the three agree, and so do the intervals. Where they are heavy-tailed, the
jackknife has the smallest bias and the largest spread, PSIS the largest bias and the smallest spread. In a
mean over examples the spread averages out and the bias does not, so `print(evaluation)` recommends quoting
the jackknife's NLL. With k̂ above 0.7 all three are low by a tenth of a nat or more; where that holds for
more than 5 % of the examples, it prints "a bound only".

## Exact models

z ~ N(0, I_D), x = A z + noise; q has the posterior's mean and standard deviations except as stated.
{examples} examples, K = {k}, 95 % intervals. *coverage*: the share of intervals that contain log p(x).
*open*: the share whose upper end is ∞. The rows of `noise` and `proposal` also show the jackknife with
`low` to `high`, for the same number of draws.

{exact}

Where q is off, the error of `proposal="adapted"` is 2 to 9 times smaller than that of the same number of
draws from q, except for a mean that is off with fifty latents (1.1 times larger). Where q is good it is 1.2
times larger, and 1.9 times with fifty latents. Sobol' points have half to a fifth of the error where
weights are light-tailed, and hardly less where they are not. `proposal="refined"` is exact on these models:
its first step finds the posterior of a linear decoder, and all weights are equal. What is left is rounding,
which the intervals do not cover.

Coverage by the number of draws, {some} examples:

{coverage}

The interval fails where the draws are too few to show the tail: for K = 50 it is fitted to ten of them. Below
21 draws nothing is fitted, and the upper end is Hall's.

## Models whose posterior is not normal

Each latent has elements of its own, so that log p(x) is a sum of integrals over one latent; the latents are
rotated, so that q, which is diagonal, misses the correlations. *counts*: Poisson with a log rate linear in
the latent. *quadratic*: normal, with a mean u + 0.3 u², so that there is a second mode in every dimension.
*five bits*: Bernoulli. K = {k}; {examples} examples, a quarter of them for fifty latents; the jackknife with
`low` to `high`.

{curved}

Where the posterior has further modes (*quadratic*) the fit covers one of them, and K = {k} draws, a
twentieth of them from the prior, do not find the others in fifty dimensions: the estimate is low. k̂ does not
say so for a mode that no draw has found.

The estimate is unbiased: over as many seeds as examples, at K = {k} with `proposal="refined"`,

{unbiased}

## Trained models

The demo's two models of scikit-learn's digits; {images} test images, K = {k}, {seeds} seeds. The truth is
`log_px` from {reference} draws with `proposal="adapted"` and another seed.

{digits}

## Costlier estimators

{few} examples, one seed. `ais` with its defaults takes 8000 decoder evaluations, each with its gradient; it
serves to audit the others. SUMO (Luo et al. 2020) and sums over doubling levels (Shi & Cornish 2021)
estimate log p(x) without bias, here at the mean cost of {k} draws: their errors are larger than the bias they
remove, so fastvae has neither (docs/log.md gives the reason).

{slow}

## Not implemented

The second-order jackknife (pairs of draws omitted): by brute force on such models with K = 20, 50 and 100 its
rms error was never below the first order's (0.573 for the first and 0.676 nats for the second at D = 2,
σ of q × 0.5, K = 50; 0.886 and 0.991 at D = 50, σ of q × 0.8), and its bias was smaller only where both are
far off (−0.105 and −0.084; −0.249 and −0.209).
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.estimators", description=__doc__)
    parser.add_argument("--k", type=int, default=500, help="draws per example (default: %(default)s)")
    parser.add_argument(
        "--examples", type=int, default=1000, help="examples per exact model (default: %(default)s)"
    )
    parser.add_argument(
        "--latent", type=int, default=10, help="latents of the digit models (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=100, help="training epochs (default: %(default)s)")
    parser.add_argument(
        "--reference", type=int, default=20_000, help="draws for the reference (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds for the digit models (default: %(default)s)"
    )
    parser.add_argument("--names", nargs="+", help="exact models, by substrings of their names; default: all")
    parser.add_argument("--quick", action="store_true", help="a smaller version that takes seconds")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write (default: %(default)s)")
    settings = parser.parse_args(arguments)
    draws = [50, 500, 5000]
    if settings.quick:
        settings.examples, settings.epochs, settings.reference, settings.seeds = 50, 1, 1000, 1
        draws = [30, 100]
    begin = time.process_time()
    some = max(50, settings.examples * 2 // 5)
    exact = {case: linear_gaussian(*case, settings.examples) for case in EXACT + COMPARED}
    if settings.names:
        exact = {c: m for c, m in exact.items() if any(name in m.name for name in settings.names)}
    compared = [m for case, m in exact.items() if case in COMPARED]
    fewer = [some_of(m, some) for m in exact.values()]
    fields = [f"| `{name}` | {d.about} | {d.quote} |" for name, d in ESTIMATES.items() if d.about]
    tables = {
        "fields": fields,
        "exact": table(compared, settings.k, 1, ESTIMATORS),
        "coverage": coverage(fewer, draws),
    }
    bent = [curved(n, d, settings.examples // (4 if d == 50 else 1)) for n in CURVED for d in (2, 10, 50)]
    tables["curved"] = table(bent, settings.k, 1, PROPOSALS)
    single = [
        curved(n, d, 10 * settings.examples) for n, d in (("counts", 10), ("five bits", 10), ("counts", 2))
    ]
    tables["unbiased"] = unbiased(single, settings.k)
    images = 50 if settings.quick else 397
    models = [digits(k, settings.latent, settings.epochs, images, settings.reference) for k in (None, 50)]
    tables["digits"] = table(models, settings.k, settings.seeds, ESTIMATORS)
    few = 20 if settings.quick else 100
    tables["slow"] = table([some_of(m, few) for m in [*compared, *models]], settings.k, 1, SLOW)
    minutes = (time.process_time() - begin) / 60
    where = f"{report.processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, "
    where += f"{', '.join(report.versions_of('torch', 'fastvae'))}; {minutes:.1f} minutes of CPU time"
    values = {"some": some, "few": few, "images": images, "where": where} | vars(settings)
    text = TEXT.format(**values | {name: "\n".join(lines) for name, lines in tables.items()})
    settings.out.write_text(text)
    print(settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
