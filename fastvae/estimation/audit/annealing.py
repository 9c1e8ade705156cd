r"""Annealed Markov chains from a distribution with known draws to p(z|x), and in reverse.

:func:`fastvae.audit.ais`, :func:`fastvae.audit.bdmc` and the audit of :func:`fastvae.evaluate` use them.
Between
:math:`π_0 = q_0` and :math:`π_1 ∝ p(x, z)` lie :math:`\log π_β = (1 - β) \log q_0(z) + β \log p(x, z)`. A
transition of Hamiltonian Monte Carlo leaves :math:`π_β` invariant and is reversible, so a chain may run in
either direction.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributions as td

from ... import random
from ...core.nested import decoded
from ...core.options import Start
from ...distributions import DiagonalNormal, Distribution
from ...distributions.draws import draw_prior, log_stratum_weights, rsample_log_prob
from ...distributions.tensors import frozen
from ...inputs.batch import Inputs
from ...likelihoods.base import Likelihood
from ...likelihoods.declared import Declared
from ...likelihoods.joint import Joint
from ...likelihoods.natural import Natural
from ...ops.op import accumulator
from ..stream import Chunks, suppress_out_of_memory
from ..weights import Weights

ACCEPTANCE = 0.65  # target of the step size adaptation: Neal 2011, section 5.4.4
# Separate noise for each kind of run: last words of the address, far from the levels of a hierarchy.
_FORWARD, _PILOT, _REVERSE = (2**32 - n for n in (1, 2, 3))
_RATE = 0.3  # adaptation rate of the log step size
_JITTER = 0.5  # relative jitter of step sizes, so that no trajectory is a full period of a normal's orbit
_FOR_SCALE = 64  # draws of q0 to estimate its scale, if it is not a parameter


def temperatures(steps: int) -> list[float]:
    """Return temperatures 0 = β_0 < … < β_T = 1 on a sigmoid, denser at both ends."""
    # Steeper sigmoids, 4 and 6 in place of 2, have a larger error on trained models (docs/log.md).
    ends = [1 / (1 + math.exp(-2 * (2 * t / steps - 1))) for t in range(steps + 1)]
    inner = [(s - ends[0]) / (ends[-1] - ends[0]) for s in ends[1:-1]]
    return [0.0, *inner, 1.0]


class Settings(NamedTuple):
    """Settings of the chains: steps, chains per example, leapfrog steps per transition, start and chunks."""

    steps: int
    chains: int
    leapfrog: int
    start: Start
    chunks: Chunks

    @property
    def pilots(self) -> int:
        """Number of chains of the pilot run, which adapts the step sizes."""
        return -(-self.chains // 4)

    def work(self, runs: int) -> int:
        """Return the number of transitions of ``runs`` runs and the pilot, for a progress bar."""
        return (runs * self.chains + self.pilots) * (self.steps - 1)


class Point(NamedTuple):
    """State of the chains: z [C, B, D], log q0(z) and log p(x, z) [C, B] in float64, and their gradients."""

    z: Tensor
    base: Tensor
    joint: Tensor
    slope_base: Tensor
    slope_joint: Tensor

    def density(self, beta: float) -> Tensor:
        return (1 - beta) * self.base + beta * self.joint

    def slope(self, beta: float) -> Tensor:
        return (1 - beta) * self.slope_base + beta * self.slope_joint

    def where(self, accepted: Tensor, other: Point) -> Point:
        """Select this point where a chain accepts, else the other."""
        wide = accepted[..., None]
        return Point(
            *(torch.where(wide if a.dim() == 3 else accepted, a, b) for a, b in zip(self, other, strict=True))
        )


class Annealed(NamedTuple):
    """Log weights [C, B] in float64 and mean acceptance probability [B] of a run."""

    log_w: Tensor
    acceptance: Tensor


class Annealing:
    """Annealed chains of a batch, with step sizes tuned by a pilot run.

    The pilot's noise is independent of the runs', and the runs do not change the step sizes, so that each
    transition leaves its distribution invariant.

    Args:
        inputs: the batch and its distributions.
        seed: seed of all noise, which is addressed by run, chain, transition and row.
        settings: settings of the chains.
        row_offset: index of the first example in the noise's address. Default 0.
        tick: called after each transition with the number of chains, for a progress bar. Default: None.
    """

    def __init__(
        self,
        inputs: Inputs,
        seed: Tensor,
        settings: Settings,
        row_offset: int = 0,
        tick: Callable[[int], Any] | None = None,
    ):
        self.inputs, self.seed, self.settings, self.row_offset = inputs, seed, settings, row_offset
        self.tick = tick
        self.betas = temperatures(settings.steps)
        self.prior = _without_validation(inputs.prior)
        like = rsample_log_prob(inputs.q, 1, seed, row_offset=row_offset)[0]
        self.dtype, self.dim = like.dtype, like.shape[2]
        self.drawn = inputs.q if settings.start == "posterior" else _expanded(inputs.prior, like)
        self.base = _without_validation(self.drawn)
        self.scale = self._scale()
        self.step_sizes = self._pilot()

    def forward(self) -> Annealed:
        """Run the chains from q0 to p(z|x): E[w] = p(x)."""
        start = self._drawn(0, self.settings.chains)
        return self._run(_FORWARD, range(self.settings.steps - 1), *start)

    def reverse(self, z: Tensor) -> Annealed:
        """Run all chains from one draw z [B, D] of p(z|x) per example to q0: E[1/w] = 1/p(x)."""
        point = self._at(z.to(accumulator(self.dtype)).expand(self.settings.chains, *z.shape))
        order = range(self.settings.steps - 1)[::-1]
        return self._run(_REVERSE, order, point, torch.zeros_like(point.base))

    def estimate(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimate log p(x), its standard error, the effective number of chains and acceptance, each [B]."""
        log_w, acceptance = self.forward()
        w = Weights.of(log_w, 1)
        return w.log_px, w.log_px_stderr, w.ess, acceptance

    def bounds(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bound log p(x) from below and above, with standard errors, each [B], given draws z of p(z|x)."""
        lower, upper = (Weights.of(w, 1) for w in (self.forward().log_w, -self.reverse(z).log_w))
        return lower.log_px, -upper.log_px, lower.log_px_stderr, upper.log_px_stderr

    def _run(self, level: int, order: range, point: Point, log_w: Tensor) -> Annealed:
        """Run the chains from ``point`` through the transitions in this order."""
        rises = [after - before for before, after in pairwise(self.betas)]
        if order.step < 0:
            rises.reverse()
        log_w = log_w + rises[0] * (point.joint - point.base)
        accepted = torch.zeros_like(log_w[0])
        for t, rise in zip(order, rises[1:], strict=True):
            noise = self._noise(level, t, self.settings.chains)
            point, probability = self._move(point, self.betas[t + 1], self.step_sizes[t], noise)
            accepted += probability.mean(0)
            log_w = log_w + rise * (point.joint - point.base)
        # Without transitions there is no acceptance probability: NaN.
        return Annealed(log_w, accepted / (len(order) or math.nan))

    def _pilot(self) -> list[Tensor]:
        """Tune the step sizes [B] of each transition, in units of q0's scale, by a pilot run."""
        count = self.settings.pilots
        size = self.scale.new_full(self.scale.shape[:1], 0.5 * self.dim**-0.25)
        sizes: list[Tensor] = []
        if self.settings.steps == 1:
            return sizes
        point, _ = self._drawn(self.settings.chains, count)
        for t in range(self.settings.steps - 1):
            point, accepted = self._move(point, self.betas[t + 1], size, self._noise(_PILOT, t, count))
            size = size * torch.exp(_RATE * (accepted.mean(0) - ACCEPTANCE)).to(size.dtype)
            sizes.append(size)
        return sizes

    def _drawn(self, first: int, count: int) -> tuple[Point, Tensor]:
        """Draw the initial points of chains from q0, and their log weights, nonzero for a stratified q0."""
        z, _ = rsample_log_prob(self.drawn, count, self.seed, sample_offset=first, row_offset=self.row_offset)
        point = self._at(z.to(accumulator(z.dtype)))
        shares = log_stratum_weights(self.drawn, count, self.seed, first)
        log_w = torch.zeros_like(point.base)
        return point, log_w if shares is None else log_w + shares

    def _scale(self) -> Tensor:
        """Return q0's scale per dimension [B, D]: half the width of its central 68 %, for any family."""
        dtype = accumulator(self.dtype)
        if isinstance(self.base, DiagonalNormal):
            return torch.exp(0.5 * self.base.wide()[1]).to(dtype).expand(self.inputs.q.batch, self.dim)
        first = self.settings.chains + self.settings.pilots
        z, _ = rsample_log_prob(
            self.drawn, _FOR_SCALE, self.seed, sample_offset=first, row_offset=self.row_offset
        )
        low, high = torch.quantile(z.to(dtype), z.new_tensor([0.16, 0.84], dtype=dtype), dim=0)
        width = 0.5 * (high - low)
        return torch.where((width > 0) & width.isfinite(), width, 1.0)

    def _noise(self, level: int, transition: int, chains: int) -> Tensor:
        """Draw momenta for all chains, and two more columns for the step size and the acceptance."""
        return random.normal(
            self.seed, chains, self.inputs.q.batch, self.dim + 2, sample_offset=transition * chains,
            row_offset=self.row_offset, level=level, dtype=accumulator(self.dtype),
        )  # fmt: skip

    def _at(self, z: Tensor) -> Point:
        """Evaluate densities and gradients at z, in chunks of chains that fit into memory."""
        chunks, batch = self.settings.chunks, self.inputs.q.batch
        some_at = self._some_at
        if torch.compiler.is_compiling():  # torch.compile does not support several gradients of one graph
            some_at = torch.compiler.disable(some_at)
        parts: list[Point] = []
        first = 0
        while first < len(z):
            count = chunks.draws(self.inputs, batch, len(z) - first)
            part = None
            with suppress_out_of_memory() if count > 1 else contextlib.nullcontext():
                part = some_at(z[first : first + count])
            # Outside the exception handler, whose traceback would keep the failed chunk's tensors alive.
            if part is None:
                if z.device.type == "cuda":
                    torch.cuda.empty_cache()
                chunks.halve(count, batch)
                continue
            parts.append(part)
            first += count
        return parts[0] if len(parts) == 1 else Point(*map(torch.cat, zip(*parts, strict=True)))

    def _some_at(self, z: Tensor) -> Point:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            at = z.to(self.dtype)
            base = self.base.log_prob(at)
            # A copy, which the decoder may change in place.
            joint = self.inputs.log_likelihood(at.clone(), self.settings.chunks.see, frozen=True)
            slope_joint = _slope(joint, z)
            if slope_joint is None:
                raise ValueError(
                    "log p(x|z) has no gradient for z: annealing follows it through the decoder, which must "
                    "be differentiable, without torch.no_grad() or .detach() inside, nor under "
                    "torch.inference_mode()"
                )
            slope_base = _slope_or_zero(base, z)
            if self.settings.start == "posterior":
                prior = self.prior.log_prob(at)
                joint, slope_joint = joint + prior, slope_joint + _slope_or_zero(prior, z)
        base, joint = base.detach().double(), joint.detach().double()
        if self.settings.start == "prior":
            joint, slope_joint = joint + base, slope_joint + slope_base
        return Point(z.detach(), base, joint, slope_base, slope_joint)

    def _move(self, point: Point, beta: float, size: Tensor, noise: Tensor) -> tuple[Point, Tensor]:
        """Apply a transition that leaves π_β invariant; return point and acceptance probability [C, B]."""
        momentum, others = noise[..., : self.dim], _uniform(noise[..., self.dim :])
        jitter = (1 - _JITTER + 2 * _JITTER * others[..., 0]).to(size.dtype)
        step = (size * jitter)[..., None] * self.scale
        kinetic = momentum.double().square().sum(-1)
        new = point
        for _ in range(self.settings.leapfrog):
            momentum = momentum + 0.5 * step * new.slope(beta)
            new = self._at(new.z + step * momentum)
            momentum = momentum + 0.5 * step * new.slope(beta)
        gain = new.density(beta) - point.density(beta) + 0.5 * (kinetic - momentum.double().square().sum(-1))
        # NaN means that the trajectory has left the support: reject it.
        probability = torch.nan_to_num(gain.clamp(max=0).exp(), nan=0.0)
        if self.tick is not None:
            self.tick(len(momentum))
        return new.where(others[..., 1] < probability, point), probability


def _slope(value: Tensor, z: Tensor) -> Tensor | None:
    """Return the gradient by z, or None if there is none, without accumulating parameter gradients."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value.sum(), z, allow_unused=True)[0]


def _slope_or_zero(value: Tensor, z: Tensor) -> Tensor:
    """Return the gradient by z, 0 if there is none, as for a uniform density."""
    slope = _slope(value, z)
    return torch.zeros_like(z) if slope is None else slope


def _uniform(normal: Tensor) -> Tensor:
    return 0.5 * torch.erfc(normal.double() * -math.sqrt(0.5))


def _without_validation(distribution: Distribution) -> Distribution:
    """Return a copy whose torch distributions return −∞ or NaN outside their support, and do not raise."""
    if not any(isinstance(d, td.Distribution) for d in _parts(distribution)):
        return distribution
    fixed: Distribution = frozen(distribution)
    for part in _parts(fixed):
        if isinstance(part, td.Distribution):
            part._validate_args = False
    return fixed


def _parts(value: Any) -> Iterator[Any]:
    """Yield a distribution and all distributions inside it."""
    if isinstance(value, (Distribution, td.Distribution, nn.ModuleList)):
        yield value
        for part in (*vars(value).values(), *vars(value).get("_modules", {}).values()):
            yield from _parts(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)


def _expanded(prior: Distribution, like: Tensor) -> Distribution:
    """Expand the prior to one row per example, to draw from."""
    try:
        return prior.expand(like.shape[1], like)
    except NotImplementedError:
        raise ValueError(
            f"start='prior' needs draws of the prior for each example, which {type(prior).__name__} does not "
            "have; use start='posterior'"
        ) from None


# Simulated data


def simulate(inputs: Inputs, dim: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Draw z [B, D] from the prior and x from p(x|z), so that z is an exact draw from p(z|x).

    Context, sizes and masks are those of the batch, and unobserved elements of its x are left unchanged.
    """
    batch, device, x = inputs.q.batch, inputs.device, inputs.x
    mask, size_factor, context = inputs.conditioning or (None, None, None)
    z = draw_prior(inputs.prior, batch, dim, device, generator).to(dtype)
    returned = decoded(inputs.decoder, z, context, inputs.q.latent)
    parameters = inputs.likelihood.read(returned, x)
    drawn = inputs.likelihood.sample(
        _sized(inputs.likelihood, parameters, x, size_factor), generator=generator
    )
    return z, _like(drawn, x, mask)


def _sized(likelihood: Likelihood, parameters: Any, x: Any, size_factor: Any) -> Any:
    """Apply the size factors of the examples to the decoder's output."""
    if isinstance(likelihood, Joint):
        return {
            name: _sized(
                part, parameters[name], x[name], None if size_factor is None else size_factor.get(name)
            )
            for name, part in likelihood._each()
        }
    if size_factor is None:
        return parameters
    if not isinstance(likelihood, Declared):
        raise likelihood.no_size()
    parameters = likelihood._natural(parameters)
    parts = parameters if isinstance(parameters, (tuple, list)) else (parameters,)
    found = likelihood._sized(parts, 1, size_factor)
    if likelihood.converts:
        return Natural(found[0])
    return found if len(found) > 1 else found[0]


def _like(drawn: Any, x: Any, mask: Any) -> Any:
    """Convert a draw to the dtype and shape of x, and take x's own values where nothing was observed."""
    if isinstance(drawn, dict):
        return {n: _like(d, x[n], None if mask is None else mask.get(n)) for n, d in drawn.items()}
    drawn = drawn.reshape(x.shape).to(x.dtype)
    return drawn if mask is None else torch.where(mask, drawn, x)
