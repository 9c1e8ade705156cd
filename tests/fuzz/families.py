"""Distributions over z: the library's argument, and the same in torch.distributions in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn import functional as F

import fastvae
from fastvae.distributions import (
    DiagonalNormal,
    Exponential,
    FullNormal,
    Gumbel,
    Laplace,
    Logistic,
    LogNormal,
    LowRankNormal,
    Mixture,
    StudentT,
)


class Family(NamedTuple):
    """Family, as a posterior with rows [B] or as a prior without.

    Attributes:
        shapes: shapes of the leaves for D latents, without the batch axis.
        give: the library's argument as a function of the leaves (after ``before``).
        exact: the same distribution in float64.
        path: z as a differentiable function of the leaves, given its value (and the noise behind it).
        before: a user's computation on the leaves, in their dtype, such as of a scale.
    """

    shapes: Callable[[int], Sequence[tuple[int, ...]]]
    give: Callable[..., Any]
    exact: Callable[..., Any]
    path: Callable[..., Tensor]
    before: Callable[..., Sequence[Tensor]] = lambda *t: t
    support: str = "real"
    strata: int = 0
    spatial: bool = False
    least_latent: int = 1
    one_dtype: bool = False  # torch's own functions require a single dtype
    wide: bool = False  # torch's own lacks half precision
    addressed: bool = True  # draws are functions of the library's own noise


def frozen(value: Tensor) -> Tensor:
    return value.detach()


def located(loc: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """Return loc + scale·w, differentiable in loc and scale, at the w that gives z."""
    return loc + scale * frozen((z - loc) / scale)


def triangular(mu: Tensor, tril: Tensor, z: Tensor) -> Tensor:
    w = torch.linalg.solve_triangular(frozen(tril), frozen(z - mu).unsqueeze(-1), upper=False)
    return mu + (tril @ w).squeeze(-1)


class DirichletPath(torch.autograd.Function):
    """z of a Dirichlet as a function of its concentration, with torch's implicit derivative."""

    @staticmethod
    def forward(ctx, concentration, z):
        ctx.save_for_backward(concentration, z)
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        concentration, z = ctx.saved_tensors
        wide = concentration.expand(z.shape)
        slope = torch._dirichlet_grad(z, wide.contiguous(), wide.sum(-1, True).expand(z.shape).contiguous())
        return (slope * (grad - (z * grad).sum(-1, True))).sum_to_size(concentration.shape), None


def beta_path(a: Tensor, b: Tensor, z: Tensor) -> Tensor:
    pair = DirichletPath.apply(torch.stack([a, b], -1), torch.stack([z, 1 - z], -1))
    return pair[..., 0]


def gamma_path(a: Tensor, rate: Tensor, z: Tensor) -> Tensor:
    wide, g = torch.broadcast_tensors(a, frozen(z * rate))
    slope = torch._standard_gamma_grad(frozen(wide).contiguous(), g.contiguous())
    return (g + slope * (a - frozen(a))) / rate


def _normal(mu, logvar):
    return td.Normal(mu, (0.5 * logvar).exp())


def _normal_path(mu, logvar, z):
    return located(mu, (0.5 * logvar).exp(), z)


def _two(d: int):
    return (d,), (d,)


def _exps(*places: int):
    """Return a function that exponentiates the leaves at the given positions, to make them positive."""
    return functools.partial(_exponentials, tuple(i in places for i in range(4)))


# Booleans, as a compiler would treat integers that differ between families as dynamic sizes.
def _exponentials(positive: tuple[bool, ...], *leaves: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.exp() if p else v for v, p in zip(leaves, positive, strict=False))


def _pair(give, **options) -> Family:
    return Family(_two, give, _normal, _normal_path, **options)


def _scaled(give, exact, inner=located, **options) -> Family:
    """Build a family with leaves loc and log_scale."""
    return Family(
        _two, give, lambda loc, s: exact(loc, s.exp()), lambda loc, s, z: inner(loc, s.exp(), z), **options
    )


def _log_path(loc, scale, z):
    return located(loc, scale, z.log()).exp()


class LogisticOf:
    """Logistic distribution by definition: torch's composed transforms cancel far from the centre."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale

    def log_prob(self, z: Tensor) -> Tensor:
        w = (z - self.loc) / self.scale
        return -w.abs() - 2 * torch.log1p(torch.exp(-w.abs())) - self.scale.log()


def _of_tril(mu, entries):
    d = mu.shape[-1]
    rows, columns = torch.tril_indices(d, d)
    tril = entries.new_zeros(*entries.shape[:-1], d, d)
    tril[..., rows, columns] = entries
    return torch.diag_embed(tril.diagonal(dim1=-2, dim2=-1).exp()) + tril.tril(-1)


def _mvn(mu, tril):
    return td.MultivariateNormal(mu, scale_tril=tril)


def _low_rank(mu, logvar, factor):
    covariance = torch.diag_embed(logvar.exp()) + factor @ factor.mT
    return td.MultivariateNormal(mu, covariance)


def _low_rank_path(mu, logvar, factor, z, noise):
    own, shared = noise[..., : mu.shape[-1]], noise[..., mu.shape[-1] :]
    return mu + (0.5 * logvar).exp() * own + (factor @ shared.unsqueeze(-1)).squeeze(-1)


class MixtureOf:
    """Mixture over z's last axis, of components and log weights [..., C]."""

    def __init__(self, parts, logits):
        self.parts, self.logits = parts, torch.log_softmax(logits, -1)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack([density(p, z) for p in self.parts], -1) + self.logits, -1)


def _mixture(mu, logvar, loc, log_scale, logits):
    return MixtureOf([_normal(mu, logvar), td.Laplace(loc, log_scale.exp())], logits)


def _mixture_path(mu, logvar, loc, log_scale, logits, z, turns):
    first, second = _normal_path(mu, logvar, z), located(loc, log_scale.exp(), z)
    return torch.where((turns == 0)[:, None, None], first, second)


def component_dtypes(leaves: Sequence[Tensor]) -> list[torch.dtype]:
    """Return the dtypes of the components' draws."""
    mu, logvar, loc, log_scale, _ = (t.dtype for t in leaves)
    return [torch.promote_types(mu, logvar), torch.promote_types(loc, log_scale)]


def _tanh(mu, scale):
    return td.TransformedDistribution(td.Normal(mu, scale), [td.TanhTransform()])


def _tanh_given(mu, scale):
    return td.TransformedDistribution(td.Normal(mu, scale), [td.TanhTransform(cache_size=1)])


def _spatial(d: int):
    return ((d // 2, 1, 2),) * 2


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [t.flatten(-3) for t in tensors]


def density(d: Any, z: Tensor) -> Tensor:
    """Return the log density over z's last axis."""
    if not z.numel():  # torch's multivariate normal fails
        return z.sum(-1)
    value = d.log_prob(z)
    return value if value.dim() < z.dim() else value.sum(-1)


def softplus_normal(mu, raw):
    return td.Normal(mu, (F.softplus(raw) + 1e-4).sqrt())


POSITIVE = {"support": "positive"}
POSTERIORS: dict[str, Family] = {
    "pair": _pair(lambda mu, s: (mu, s)),
    "list": _pair(lambda mu, s: [mu, s]),
    "mapping": _pair(lambda mu, s: {"mu": mu, "logvar": s}),
    "object": _pair(lambda mu, s: SimpleNamespace(mean=mu, log_var=s)),
    "tensor": Family(
        lambda d: ((2 * d,),),
        lambda t: t,
        lambda t: _normal(*t.chunk(2, -1)),
        lambda t, z: _normal_path(*t.chunk(2, -1), z),
    ),
    "diagonal": _pair(DiagonalNormal),
    "clamped": Family(
        _two,
        lambda mu, s: DiagonalNormal(mu, s, logvar_range=(-1.0, 0.5)),
        lambda mu, s: _normal(mu, s.clamp(-1.0, 0.5)),
        lambda mu, s, z: _normal_path(mu, s.clamp(-1.0, 0.5), z),
    ),
    "softplus": Family(
        _two,
        lambda mu, s: DiagonalNormal(mu, s, scale_form="softplus", floor=1e-4),
        softplus_normal,
        lambda mu, s, z: located(mu, (F.softplus(s) + 1e-4).sqrt(), z),
    ),
    "log scale": _scaled(lambda mu, s: DiagonalNormal(mu, s, scale_form="log_scale"), td.Normal),
    "scale": Family(
        _two, lambda mu, s: DiagonalNormal(mu, s, scale_form="scale"), td.Normal, located, _exps(1)
    ),
    "full": Family(
        lambda d: ((d,), (d * (d + 1) // 2,)),
        FullNormal,
        lambda mu, t: _mvn(mu, _of_tril(mu, t)),
        lambda mu, t, z: triangular(mu, _of_tril(mu, t), z),
    ),
    "low rank": Family(
        lambda d: ((d,), (d,), (d, 2)), LowRankNormal, _low_rank, _low_rank_path, least_latent=2
    ),
    "laplace": _scaled(Laplace, td.Laplace),
    "logistic": _scaled(Logistic, LogisticOf),
    "gumbel": _scaled(Gumbel, td.Gumbel),
    "student": _scaled(lambda m, s: StudentT(m, s, 5.0), lambda m, s: td.StudentT(5.0, m, s)),
    "log-normal": _scaled(LogNormal, td.LogNormal, _log_path, **POSITIVE),
    "exponential": Family(
        lambda d: ((d,),),
        Exponential,
        lambda s: td.Exponential((-s).exp()),
        lambda s, z: s.exp() * frozen(z / s.exp()),
        **POSITIVE,
    ),
    "mixture": Family(
        lambda d: ((d,), (d,), (d,), (d,), (2,)),
        lambda a, b, c, d, logits: Mixture([DiagonalNormal(a, b), Laplace(c, d)], logits),
        _mixture,
        _mixture_path,
        strata=2,
    ),
    "spatial pair": Family(
        _spatial,
        lambda mu, s: (mu, s),
        lambda mu, s: _normal(*_flat(mu, s)),
        lambda mu, s, z: _normal_path(*_flat(mu, s), z),
        spatial=True,
    ),
    "spatial tensor": Family(
        lambda d: ((2 * (d // 2), 1, 2),),
        lambda t: t,
        lambda t: _normal(*_flat(*t.chunk(2, -3))),
        lambda t, z: _normal_path(*_flat(*t.chunk(2, -3)), z),
        spatial=True,
    ),
    "spatial td.Normal": Family(
        _spatial,
        td.Normal,
        lambda mu, s: td.Normal(*_flat(mu, s)),
        lambda mu, s, z: located(*_flat(mu, s), z),
        _exps(1),
        spatial=True,
    ),
    "td.Normal": Family(_two, td.Normal, td.Normal, located, _exps(1)),
    "td.Independent": Family(
        _two, lambda m, s: td.Independent(td.Normal(m, s), 1), td.Normal, located, _exps(1)
    ),
    "td.Laplace": Family(_two, td.Laplace, td.Laplace, located, _exps(1), one_dtype=True),
    "td.Gumbel": Family(_two, td.Gumbel, td.Gumbel, located, _exps(1), one_dtype=True),
    "td.Cauchy": Family(_two, td.Cauchy, td.Cauchy, located, _exps(1), one_dtype=True),
    "td.LogNormal": Family(_two, td.LogNormal, td.LogNormal, _log_path, _exps(1), one_dtype=True, **POSITIVE),
    "td.Exponential": Family(
        lambda d: ((d,),),
        td.Exponential,
        td.Exponential,
        lambda rate, z: frozen(z * rate) / rate,
        _exps(0),
        one_dtype=True,
        **POSITIVE,
    ),
    "td.HalfNormal": Family(
        lambda d: ((d,),),
        td.HalfNormal,
        td.HalfNormal,
        lambda s, z: s * frozen(z / s),
        _exps(0),
        one_dtype=True,
        addressed=False,
        **POSITIVE,
    ),
    "td.Gamma": Family(
        _two,
        td.Gamma,
        td.Gamma,
        gamma_path,
        _exps(0, 1),
        one_dtype=True,
        wide=True,
        addressed=False,
        **POSITIVE,
    ),
    "td.Beta": Family(
        _two,
        td.Beta,
        td.Beta,
        beta_path,
        _exps(0, 1),
        one_dtype=True,
        wide=True,
        addressed=False,
        support="unit",
    ),
    "td.Dirichlet": Family(
        lambda d: ((d,),),
        td.Dirichlet,
        td.Dirichlet,
        DirichletPath.apply,
        _exps(0),
        one_dtype=True,
        wide=True,
        addressed=False,
        support="simplex",
        least_latent=2,
    ),
    "td.MultivariateNormal": Family(
        lambda d: ((d,), (d, d)),
        lambda mu, tril: td.MultivariateNormal(mu, scale_tril=tril),
        _mvn,
        triangular,
        lambda mu, t: (mu, t.tril(-1) + torch.diag_embed(t.diagonal(dim1=-2, dim2=-1).exp())),
        one_dtype=True,
    ),
    "tanh": Family(
        _two,
        _tanh_given,
        _tanh,
        lambda m, s, z: located(m, s, z.atanh()).tanh(),
        _exps(1),
        one_dtype=True,
        support="interval",
    ),
}
NORMAL = ("pair", "tensor", "diagonal", "softplus", "full", "low rank", "td.Normal", "spatial pair")
# Latents are independent, so the KL of q and the prior is a sum over them.
UNIVARIATE = ("pair", "tensor", "diagonal", "softplus", "log scale", "scale", "list", "td.Normal")


class NormalMixture:
    """Normal mixture of rows [U, D] by definition: torch's own fails for empty tensors."""

    def __init__(self, mu, scale, logits):
        self.parts, self.logits = td.Normal(mu, scale), torch.log_softmax(logits, -1)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.logsumexp(self.parts.log_prob(z.unsqueeze(-2)).sum(-1) + self.logits, -1)


def _standard(loc: float = 0.0, scale: float = 1.0) -> td.Normal:
    return td.Normal(*torch.tensor([loc, scale], dtype=torch.float64))


PRIORS: dict[str, Family] = {
    "none": Family(lambda d: (), lambda: None, _standard, lambda: None),
    "standard": Family(lambda d: (), lambda: "standard_normal", _standard, lambda: None),
    "normal mixture": Family(
        lambda d: ((4, d), (4, d), (4,)),
        fastvae.distributions.NormalMixture,
        lambda m, s, w: NormalMixture(m, (0.5 * s).exp(), w),
        lambda: None,
    ),
    "td mixture": Family(
        lambda d: ((4, d), (4, d), (4,)),
        lambda m, s, w: td.MixtureSameFamily(td.Categorical(logits=w), td.Independent(td.Normal(m, s), 1)),
        NormalMixture,
        lambda: None,
        _exps(1),
        one_dtype=True,
        wide=True,  # Categorical normalises its logits in their dtype
    ),
    "td number": Family(lambda d: (), lambda: td.Normal(0.5, 2.0), lambda: _standard(0.5, 2.0), lambda: None),
    "of the context": Family(
        lambda d: ((d,), (d,)), lambda mu, s: None, lambda mu, s: td.Normal(mu, (0.5 * s).exp()), lambda: None
    ),
    **{
        name: POSTERIORS[name]
        for name in (
            "diagonal",
            "softplus",
            "full",
            "low rank",
            "laplace",
            "logistic",
            "gumbel",
            "student",
            "log-normal",
            "exponential",
            "mixture",
            "td.Normal",
            "td.Laplace",
            "td.Gamma",
            "td.Beta",
            "td.Dirichlet",
            "td.MultivariateNormal",
            "td.LogNormal",
            "td.Exponential",
            "tanh",
        )
    },
}


def priors_of(q: str, entry: str) -> list[str]:
    """Return the priors whose support is or contains q's (such as an explicit normal for positive z)."""
    support, spatial = POSTERIORS[q].support, POSTERIORS[q].spatial
    if spatial:
        return ["none", "standard", "diagonal"]
    found = [name for name, p in PRIORS.items() if p.support == support]
    if entry == "beta_tc":
        return [n for n in found if n != "of the context"]
    return found


def per_dimension(q: str, prior: str) -> bool:
    return q in UNIVARIATE and prior in (
        "none",
        "standard",
        "diagonal",
        "td.Normal",
        "of the context",
        "softplus",
    )


def turns(samples: int, seed: Tensor, count: int) -> Tensor:
    """Return the component that each sample of a mixture is drawn from."""
    return torch.remainder(torch.arange(samples) + int(seed) % count, count)


def closed_kl(q: Any, p: Any) -> Tensor | None:
    """Return the KL [B] or [B, D]; None if torch.distributions has no closed form."""
    q, p = (_joint(a) if isinstance(b, td.MultivariateNormal) else a for a, b in ((q, p), (p, q)))
    if not (isinstance(q, td.Distribution) and isinstance(p, td.Distribution)):
        return None
    if isinstance(q, td.MultivariateNormal) and not q.loc.numel():  # torch's formula fails
        return q.loc.sum(-1)
    if isinstance(p, td.Normal) and p.loc.dim() == 0 and isinstance(q, td.MultivariateNormal):
        p = td.Normal(p.loc.expand(q.loc.shape[-1:]), p.scale.expand(q.loc.shape[-1:]))
        p = _joint(p)
    try:
        return td.kl_divergence(q, p)
    except NotImplementedError:
        return None


def _joint(d: Any) -> Any:
    """Convert a normal of independent dimensions to a multivariate one."""
    if type(d) is td.Normal and d.loc.dim():
        return td.MultivariateNormal(d.loc, torch.diag_embed(d.scale.square()))
    return d
