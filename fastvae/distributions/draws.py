"""Draws from q with the KL or the log-ratio to p, by a fused op for the pair or by composition."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from .. import ops
from ..core.checks import check_result
from ..ops.normal_arguments import options
from ..ops.normal_diagonal import dreg_weight, flat_kl, flat_log_ratio, path_weight
from .base import Distribution, Located, innermost, is_family, is_real
from .closed_form import closed_kl
from .flow import Flow
from .normal import DiagonalNormal, StandardNormal
from .runs import NO_RUNS, Runs, runs_of, without_noise
from .tensors import fixed_at, frozen
from .wrapped import TorchDistribution

# Stateless and shared: creating a module costs more than the kernels of a small batch.
STANDARD = StandardNormal()
_NOT_FUSED = object()


def promoted(q: Distribution, p: Distribution) -> Distribution:
    """Return a diagonal normal q in the dtype that the fused op of q and p draws z in.

    Without it z would have q's own dtype wherever the composition draws it.
    """
    if not (is_family(q, DiagonalNormal) and is_family(p, DiagonalNormal)):
        return q
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in (q.mu, q.logvar, p.mu, p.logvar)])
    if q.mu.dtype == q.logvar.dtype == dtype:
        return q
    made = q.of(q.mu.to(dtype), q.logvar.to(dtype), q.latent)
    if q.z_dtype is not None:
        made.z_dtype = q.z_dtype
    return made


def fused_prior(q: Distribution, p: Distribution, seed: Tensor) -> Any:
    """Return the fused op's prior argument for this q and p, or _NOT_FUSED."""
    # The ops generate Philox noise only.
    if not is_family(q, DiagonalNormal) or seed.dim():
        return _NOT_FUSED
    if p is STANDARD or is_family(p, StandardNormal):
        return None
    if not is_family(p, DiagonalNormal):
        return _NOT_FUSED
    # Half precision would round the converted log variance; the composition computes in float32.
    if p.logvar.dtype.itemsize == 2 and not p.has_logvar:
        return _NOT_FUSED
    return p.mu, p.log_variance()


def draw_kl(
    q: Distribution, p: Distribution, samples: int, seed: Tensor, row_offset: int, per_dimension: bool
) -> tuple[Tensor, Tensor] | None:
    """Draw z [K·B, D] for a decoder and return it with KL(q ‖ p), or None without a closed form.

    The KL is [B] or [B, D], or [K, B] if q knows it only given a part of the draw.

    Raises:
        ValueError: if the KL of each dimension is requested, and only the sum is known.
    """
    usual = is_family(q, DiagonalNormal) and p is STANDARD and not seed.dim()
    prior = None if usual else fused_prior(q, p, seed)
    if prior is not _NOT_FUSED:
        parameters = q.mu, q.logvar, q.form  # type: ignore[attr-defined]
        return flat_kl(parameters, prior, seed, samples, row_offset, per_dimension)
    _check_prior(q, p)
    drawn = q._flat_kl(p, samples, seed, row_offset, per_dimension)
    if drawn is not None:
        return drawn
    kl = closed_kl(q, p)
    if kl is None:
        return None
    z = draw_z(q, samples, seed, 0, row_offset)
    shapes = (q.batch,), (q.batch, z.shape[2])
    if not isinstance(kl, Tensor) or kl.shape not in shapes:
        names = f"KL of {describe(q)} and {describe(p)}"
        came = list(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
        raise ValueError(
            f"the registered {names} is {came}; expected [B] = {list(shapes[0])} or [B, D] = "
            f"{list(shapes[1])}"
        )
    if per_dimension and kl.dim() == 1:
        names = f"KL of {describe(q)} and {describe(p)}"
        raise ValueError(
            f"free_bits needs the KL of each dimension, but the {names} is known only as a sum. Register a "
            "closed form [B, D] with fastvae.distributions.register_kl, or leave free_bits out"
        )
    return z.flatten(0, 1), kl if per_dimension or kl.dim() == 1 else kl.sum(1)


_said: set[tuple[str, str]] = set()


def say_monte_carlo(q: Distribution, p: Distribution) -> None:
    """Warn that the KL is estimated from draws, once for each pair of families."""
    names = describe(q), describe(p)
    if names not in _said:
        _said.add(names)
        warnings.warn(
            f"fastvae.elbo: no closed form of KL(q || p) is known for q = {names[0]} and p = {names[1]}; it "
            'is estimated from the draws. Pass kl="mc" to ask for that (and stop this warning), or register '
            "a closed form with fastvae.distributions.register_kl",
            UserWarning,
            stacklevel=3,
        )


def describe(distribution: Distribution) -> str:
    inner: Any = getattr(distribution, "distribution", None)
    while type(inner).__name__ == "_Flattened":
        inner = inner.base_dist
    own: str = getattr(distribution, "made_by", type(distribution).__name__)
    return own if inner is None else type(inner).__name__


def draw_ratio(
    q: Distribution,
    p: Distribution,
    samples: int,
    seed: Tensor,
    row_offset: int,
    estimator: str = "iwae",
    alpha: float = 0.0,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw z [K·B, D] and return it with log p(z) − log q(z|x) [K, B], including the log weights of strata.

    ``alpha`` and ``groups`` describe the power mean that DReG differentiates.
    """
    usual = is_family(q, DiagonalNormal) and p is STANDARD and not seed.dim()
    prior = None if usual else fused_prior(q, p, seed)
    if prior is not _NOT_FUSED:
        parameters = q.mu, q.logvar, q.form  # type: ignore[attr-defined]
        return flat_log_ratio(parameters, prior, seed, samples, row_offset, estimator, alpha, groups)
    z, log_ratio, _ = _composed(q, p, samples, seed, estimator, alpha, groups, row_offset=row_offset)
    shares = log_stratum_weights(q, samples, seed)
    return z.flatten(0, 1), log_ratio if shares is None else log_ratio + shares


def draw_strata(
    q: Distribution, p: Distribution, samples: int, seed: Tensor, row_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z [K, B, D], log p(z) − log q(z|x) [K, B] and the draws' weights [K, B], for a q with strata."""
    z, log_ratio, _ = _composed(q, p, samples, seed, "iwae", row_offset=row_offset)
    return z, log_ratio, q.log_stratum_weights(samples, seed).exp().expand(log_ratio.shape)


def draw_chunk(
    q: Distribution,
    p: Distribution,
    samples: int,
    seed: Tensor,
    sample_offset: int,
    row_offset: int,
    route: str = "iwae",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z [K, B, D], the log-ratio and a carrier of q's gradient (or None), [K, B], for some samples.

    The carrier, zeros, receives the gradient that is to reach q by a route that weights samples differently
    from the decoder; for ``"score"`` it is log q(z|x). It is None for ``"iwae"`` and ``"stl"``.
    ``"dreg"`` would need all samples, not a chunk: use ``"paths"``.
    """
    prior = fused_prior(q, p, seed)
    place: dict[str, Any]
    place = {"sample_offset": sample_offset, "row_offset": row_offset}
    if prior is _NOT_FUSED or route in ("tied", "score"):
        z, log_ratio, q_grad = _composed(q, p, samples, seed, route, **place)
        shares = log_stratum_weights(q, samples, seed, sample_offset)
        return z, log_ratio if shares is None else log_ratio + shares, q_grad
    place |= options(q.form)  # type: ignore[attr-defined]
    by_paths = route == "paths"
    z, log_ratio, *zeros = ops.rsample_log_ratio(
        q.mu, q.logvar, k=samples, prior=prior,  # type: ignore[attr-defined]
        estimator="stl" if by_paths else route, seed=seed, paths=by_paths, **place,
    )  # fmt: skip
    return z, log_ratio, zeros[0] if zeros else None


def _composed(
    q: Distribution,
    p: Distribution,
    samples: int,
    seed: Tensor,
    route: str,
    alpha: float = 0.0,
    groups: int = 1,
    **place: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the results of :func:`draw_chunk`, for any q and p.

    ``route`` selects the gradient of a sample that reaches q: ``"iwae"``, ``"stl"`` and ``"dreg"`` use that
    of a log weight. The others weight a sample differently from the decoder: through z (``"paths"``), through
    z and the score of q (``"tied"``), or through the score alone (``"score"``).
    """
    _check_prior(q, p)
    if q.strata > 1 and route not in ("iwae", "stl"):
        raise ValueError(
            f"estimator='dreg' and a bound of the encoder's own need draws from q itself; those of "
            f"{describe(q)} come from its components in turn. Use estimator='iwae' or 'stl'"
        )
    if route == "iwae" and (drawn := q.rsample_log_ratio(p, samples, seed, **place)) is not None:
        return *drawn, None
    runs = NO_RUNS if route == "iwae" else runs_of(q, p)
    if route == "score":
        with torch.no_grad(), runs.of("q", q):
            z, log_q = rsample_log_prob(q, samples, seed, **place)
        z = z.detach() if z.requires_grad else z  # if possible z itself, which transforms recognise
        score = _at_fixed(q, z, runs, "q")
        runs.check(describe(q), log_q, score)
        return z, _at_fixed(p, z, runs, "p") - score.detach(), score
    with runs.of("q", q):
        z, log_q = rsample_log_prob(q, samples, seed, **place)
    if route not in ("iwae", "tied"):
        # q's parameters are frozen in its density, and reached through z alone.
        through_z = _of_frozen(q, z, runs, "q", route)
        runs.check(describe(q), log_q, through_z)
        # Half precision rounds z by as much as a narrow posterior's σ: take the value from the noise.
        log_q = with_gradient(log_q.detach(), through_z) if z.dtype.itemsize == 2 else through_z
    if route in ("iwae", "stl"):
        with runs.of("p", p):
            log_p = _log_prob(p, z, "p(z)")
        return z, log_p - log_q, None
    log_p = _at_fixed(p, z, runs, "p")
    log_ratio = _of_frozen(p, z, runs, "p", route) - log_q
    z, log_ratio, q_grad = _Rerouted.apply(z, log_ratio, alpha, groups, route != "dreg")  # type: ignore[no-untyped-call]
    # The prior's parameters get the bound's gradient, at a detached z.
    return z, with_gradient(log_ratio, log_p), q_grad


def log_stratum_weights(q: Distribution, samples: int, seed: Tensor, sample_offset: int = 0) -> Tensor | None:
    """Return the log weights of strata, [K, B] or [K, 1], or None if all draws have equal weight."""
    return q.log_stratum_weights(samples, seed, sample_offset=sample_offset) if q.strata > 1 else None


_DENSITIES = {"q": "q(z|x)", "p": "p(z)"}
_ASKED = {"paths": "estimator='dreg'", "tied": "a bound of the encoder's own"}


def _at_fixed(distribution: Distribution, z: Tensor, runs: Runs, role: str) -> Tensor:
    """Return the log density at a detached z."""
    of_fixed, value = fixed_at(distribution, z)
    with runs.of(role, of_fixed):
        return _log_prob(of_fixed, value, _DENSITIES[role])


def _of_frozen(distribution: Distribution, z: Tensor, runs: Runs, role: str, route: str) -> Tensor:
    """Return the log density at z with frozen parameters, or raise if it still reaches some elsewhere."""
    fixed: Distribution = frozen(distribution)
    if distribution.reaches_others:
        _check_frozen(fixed, z, runs, role, route)
    with runs.of(role, fixed):
        return _log_prob(fixed, z, _DENSITIES[role])


def _check_frozen(fixed: Distribution, z: Tensor, runs: Runs, role: str, route: str) -> None:
    """Raise if a user's log_prob reaches parameters that are not frozen."""
    of_fixed, value = fixed_at(fixed, z)
    with runs.of(role, of_fixed):
        reaches = of_fixed.log_prob(value[:2]).requires_grad
    if reaches:
        raise RuntimeError(
            f"{_ASKED.get(route, f'estimator={route!r}')} needs {describe(fixed)}.log_prob with its "
            "parameters frozen, but it reaches some that are not its own tensors or modules: in a "
            "closure, a namedtuple, a compiled or scripted module. Keep them as attributes of the "
            "distribution, or use estimator='iwae'"
        )


class _Rerouted(torch.autograd.Function):
    """Identity on z and the log-ratio whose backward pass multiplies their gradients by a factor per sample.

    The factor is DReG's, computed from the log-ratio's upstream gradient; or, with ``q_grad``, the upstream
    gradient of the third result, zeros [K, B], divided by that of the log-ratio.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, log_ratio: Tensor, alpha: float, groups: int, q_grad: bool) -> tuple[Any, ...]:
        return z.view_as(z), log_ratio.view_as(log_ratio), torch.zeros_like(log_ratio) if q_grad else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        ctx.set_materialize_grads(False)
        *_, ctx.alpha, ctx.groups, ctx.q_grad = inputs

    @staticmethod
    def backward(ctx: Any, grad_z: Any, grad_ratio: Any, grad_q: Any) -> Any:
        if ctx.q_grad:
            weight = path_weight(grad_ratio, grad_q)
        else:
            weight = dreg_weight(grad_ratio, ctx.alpha, ctx.groups)
        if grad_z is not None:
            grad_z = (weight.unsqueeze(-1) * grad_z).to(grad_z.dtype)  # the weight may exceed float16's range
        return grad_z, weight * grad_ratio, None, None, None


def with_gradient(value: Tensor, source: Tensor) -> Tensor:
    """Return ``value``, whose gradient also reaches ``source``.

    Adding ``source - source.detach()`` would make an infinite log density NaN.
    """
    if not source.requires_grad:
        return value
    return _WithGradient.apply(value, source.expand_as(value))  # type: ignore[no-any-return, no-untyped-call]


class _WithGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, grad.to(ctx.dtype)


# Validation of users' distributions

_GAMMA = "torch.distributions.Gamma(torch.ones(D), torch.ones(D))"
_SUPPORTS = (
    (td.constraints.simplex, "the simplex", "torch.distributions.Dirichlet(torch.ones(D))"),
    (td.constraints.unit_interval, "(0, 1)", "torch.distributions.Beta(torch.ones(D), torch.ones(D))"),
    (td.constraints.positive, "z > 0", _GAMMA),
    (td.constraints.nonnegative, "z ≥ 0", _GAMMA),
)


def check_support(q: Distribution, p: Distribution) -> None:
    """Validate that the supports of posterior and prior match.

    A posterior over a subset of R^D rejects N(0, I), and one on a simplex any known density over R^D.

    Raises:
        ValueError: for such a pair.
    """
    support = q.support
    if is_real(support):
        return
    support = innermost(support)
    known = isinstance(p, (DiagonalNormal, Located, TorchDistribution)) and not p.reaches_others
    on_simplex = support is td.constraints.simplex
    if is_family(p, StandardNormal) or (on_simplex and known and is_real(p.support)):
        kind = type(support).__name__.lstrip("_")
        where, such = next(((name, text) for c, name, text in _SUPPORTS if c is support), (kind, ""))
        prior = "N(0, I), the default," if is_family(p, StandardNormal) else describe(p)
        raise ValueError(
            f"q is {describe(q)}, whose support is {where} and not all of R^D, but the prior, {prior} is "
            f"over R^D; pass prior=, a distribution of q's support{such and ', such as ' + such}"
        )


def check_everywhere(what: str, instead: str, *distributions: Distribution) -> None:
    """Validate that distributions are over all of R^D, from which ``what`` draws z.

    Raises:
        ValueError: for one that declares another support, or a flow whose distribution does.
    """
    for d in distributions:
        made = d._made() if isinstance(d, Flow) else None
        declared = TorchDistribution(made) if isinstance(made, td.Distribution) else d
        if not is_real(declared.support):
            raise ValueError(
                f"{what} draws z from all of R^D, but {describe(d)} has a density on a part of it only; use "
                f"{instead}"
            )


def _check_prior(q: Distribution, p: Distribution) -> None:
    """Validate that q and p have the same number of latents, if both are known."""
    own = _location(q)
    if own is None or own.dim() < 2:
        return
    other = _location(p)
    if other is None or other.dim() == 0:
        return
    if other.shape[-1] not in (1, own.shape[-1]):
        raise ValueError(
            f"the prior, {describe(p)}, has parameters {list(other.shape)}, but q's are {list(own.shape)}; "
            f"both must have D = {own.shape[-1]} latents"
        )


def _location(d: Distribution) -> Any:
    names = ("mu",) if isinstance(d, TorchDistribution) else ("mu", "loc")
    return next((value for name in names if (value := _found(d, name)) is not None), None)


def _found(d: Distribution, name: str) -> Any:
    """Return an attribute, or None without it, which a module's own lookup reports by a slow exception."""
    kind: Any = type(d)
    if isinstance(d, nn.Module) and kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, name):
        return next((own[name] for own in (d.__dict__, d._parameters, d._buffers) if name in own), None)
    return getattr(d, name, None)


def rsample_log_prob(q: Distribution, samples: int, seed: Tensor, **place: int) -> tuple[Tensor, Tensor]:
    """Call ``q.rsample_log_prob`` and validate its results, except for fastvae's DiagonalNormal."""
    place = {name: value for name, value in place.items() if not (type(value) is int and value == 0)}
    results = q.rsample_log_prob(samples, seed, **place)
    if is_family(q, DiagonalNormal):
        return results
    if not (isinstance(results, (tuple, list)) and len(results) == 2):
        came = f"{len(results)} results" if isinstance(results, (tuple, list)) else type(results).__name__
        raise TypeError(
            f"{describe(q)}.rsample_log_prob returned {came}; expected z [K, B, D] and log q(z|x) [K, B]"
        )
    z, log_q = results
    shape = (samples, q.batch, z.shape[-1] if isinstance(z, Tensor) and z.dim() else "D")
    fix = "samples come first, and the latent dimensions last"
    check_result(q, "rsample_log_prob", "z", z, "[K, B, D]", shape, q.device, fix)
    _check_density(q, "rsample_log_prob", "log q(z|x)", log_q, z)
    return z, log_q


class Drawable(Distribution):
    """Distribution that can be sampled without evaluating its density."""

    def draw(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        """Draw z [K, B, D], the same as :meth:`rsample_log_prob`."""
        raise NotImplementedError

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        z = self.draw(samples, seed, sample_offset, row_offset)
        return z, without_noise(self, self.log_prob, z)


def draw_z(q: Distribution, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    """Draw z [K, B, D], without evaluating the density if it is not needed for the draw."""
    if isinstance(q, Drawable):
        return q.draw(samples, seed, sample_offset, row_offset)
    return rsample_log_prob(q, samples, seed, sample_offset=sample_offset, row_offset=row_offset)[0]


def draw_prior(
    p: Distribution,
    n: int,
    dim: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw z [n, dim] from the prior for n examples, from its own row for each if it has rows.

    Raises:
        ValueError: if the prior has another number of rows or of latents.
    """
    if not (p.has_rows or p.per_row):
        return p.sample(n, dim=dim, device=device, generator=generator)
    if p.has_rows and p.batch not in (1, n):
        raise ValueError(f"the prior, {describe(p)}, has {p.batch} rows, but {n} draws were requested")
    rows = p if p.has_rows and p.batch == n else p.expand(n, torch.empty(n, dim, device=device))
    z = rows.sample(generator=generator)[0]
    if z.shape[1] != dim:
        raise ValueError(f"the prior, {describe(p)}, has D = {z.shape[1]} latents; expected {dim}")
    return z


def rsample_as_stored(q: Distribution, samples: int, seed: Tensor, **place: int) -> tuple[Tensor, Tensor]:
    """Return z [K, B, D] and log q(z|x) [K, B] at the stored z, for comparison with other densities at z.

    Half precision rounds z by as much as a narrow posterior's σ, so the density of the noise would differ.
    """
    z, log_q = rsample_log_prob(q, samples, seed, **place)
    return z, _log_prob(q, z, "q(z|x)") if z.dtype.itemsize == 2 else log_q


def sample_as_stored(
    q: Distribution, samples: int, seed: Tensor, generator: torch.Generator | None, **place: int
) -> tuple[Tensor, Tensor]:
    """Return z [K, B, D], each a draw from q without a weight, and log q(z|x) [K, B] at the stored z.

    Draws in strata follow q only with their weights; ``q.sample`` draws the strata, too, by the generator.
    """
    if q.strata == 1:
        return rsample_as_stored(q, samples, seed, **place)
    z = q.sample(samples, generator=generator)
    return z, _log_prob(q, z, "q(z|x)")


def _log_prob(distribution: Distribution, z: Tensor, what: str) -> Tensor:
    value = distribution.log_prob(z)
    _check_density(distribution, "log_prob", f"log {what}", value, z)
    return value


def _check_density(distribution: Distribution, method: str, what: str, value: Any, z: Tensor) -> None:
    fix = "sum over the latent dimensions, not over samples or batch"
    check_result(distribution, method, what, value, "[K, B]", tuple(z.shape[:2]), z.device, fix)
