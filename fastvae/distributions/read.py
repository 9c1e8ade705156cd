"""Conversion of the accepted forms of q(z|x) and p(z) to distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch import distributions as td

from ..core.checks import check_tensor, shape_of
from ..core.fast_path import are_rows
from ..core.hints import described, did_you_mean, explained
from ..ops.normal_arguments import Form
from .base import Distribution, is_family
from .covariance import FullNormal, LowRankNormal
from .draws import STANDARD
from .location_scale import LocationScale
from .mixture import NormalMixture
from .normal import SCALE, DiagonalNormal, StandardNormal, check_posterior, diagonal
from .spatial import flat_posterior
from .wrapped import TorchDistribution, in_single, univariate

# Names of a mean and a log variance in an encoder's output: in plain code, diffusers, pythae.
_MEANS = ("mu", "mean", "loc", "embedding")
_LOGVARS = ("logvar", "log_var", "log_covariance")


def as_posterior(q: Any) -> Distribution:
    """Convert an encoder's output to a distribution.

    Accepted are a fastvae distribution, a tensor [B, 2 D], a pair (mu, logvar), a torch.distributions object
    with rsample, or an object or mapping that names its mean and log variance. Latents with several axes,
    [B, *latent], are flattened.
    """
    if type(q) is tuple and len(q) == 2:
        return _pair(*q)
    if isinstance(q, Distribution):
        return _posterior(q)
    if isinstance(q, Tensor):
        mu, logvar = _halves(q)
        return _pair(mu, logvar)
    if type(q) is list and len(q) == 2:
        return _pair(*q)
    if isinstance(q, td.Distribution):
        # The batch must not be part of the event.
        if len(q.batch_shape) and type(normal := univariate(q)) is td.Normal:
            return _pair(normal.loc, normal.scale, SCALE)
        return _posterior(_of_torch(q))
    if (inner := _named(q, "latent_dist")) is not None:
        return as_posterior(inner)
    # The log variance first: a distribution without one may raise when its mean is read.
    logvar = _first_named(q, _LOGVARS)
    if isinstance(logvar, Tensor) and isinstance(mu := _first_named(q, _MEANS), Tensor):
        return _pair(mu, logvar)
    raise TypeError(
        "q must be a pair (mu, logvar) of tensors [B, D]; a tensor [B, 2 D], mu and logvar side by side; a "
        "torch.distributions object of shape [B, D] with rsample; a fastvae.distributions.Distribution; "
        "or an object or "
        f"mapping with a mean ({', '.join(_MEANS)}) and a log variance ({', '.join(_LOGVARS)}); latents may "
        f"have several axes, [B, C, H, W] in place of [B, D]. Got {_describe(q)}"
    )


def _pair(mu: Any, logvar: Any, form: Form | None = None) -> DiagonalNormal:
    q = diagonal(mu, logvar, form)
    return q if are_rows(mu, logvar) else check_posterior(q)


def _of_torch(d: td.Distribution) -> Distribution:
    """Convert to fastvae's family if there is one; half precision is computed in float32."""
    d, z_dtype = in_single(d)
    read = _family_of(d)
    if z_dtype is not None:
        read.z_dtype = z_dtype
    return read


def _family_of(d: td.Distribution) -> Distribution:
    if type(d) is td.MultivariateNormal and d.loc.dim() <= 2:
        return FullNormal.of(d.loc, d.scale_tril)
    if type(d) is td.LowRankMultivariateNormal and d.loc.dim() <= 2:
        return LowRankNormal(d.loc, d.cov_diag.log(), d.cov_factor)
    if type(d) is td.MixtureSameFamily and type(d.mixture_distribution) is td.Categorical:
        logits, normal = d.mixture_distribution.logits, univariate(d.component_distribution)
        rows = len(d.event_shape) == 1 and logits.dim() == 1
        if type(normal) is td.Normal and normal.loc.dim() == 2 and rows:
            return NormalMixture(normal.loc, 2 * normal.scale.log(), logits)
    return TorchDistribution(d)


def as_component(value: Any) -> Distribution:
    """Convert a component of a mixture, which may be a posterior or a prior."""
    if isinstance(value, (Distribution, td.Distribution)):
        return as_prior(value)
    return as_posterior(value)


def _posterior(q: Distribution) -> Distribution:
    """Validate a posterior, as far as its family is known."""
    if isinstance(q, DiagonalNormal):
        return check_posterior(q)
    if isinstance(q, TorchDistribution):
        q = q.prepared()
        d = q.distribution
        shape = (*d.batch_shape, *d.event_shape)
        spatial = is_family(q, TorchDistribution) and len(d.batch_shape) > 0 and len(shape) > 2
        if not (q.is_posterior or spatial):
            raise ValueError(
                f"q is {_describe(d)} with batch shape {list(d.batch_shape)} and event shape "
                f"{list(d.event_shape)}; expected [B, D] in all (or [B, *latent]), with B in the batch and D "
                "in the batch or in the event"
            )
        if not d.has_rsample:
            raise TypeError(
                f"q is a {_describe(d)}, which has no rsample (reparameterised draws); use a family that has"
            )
        return flat_posterior(q) if spatial else q
    if isinstance(q, LocationScale) and len(shape := q.wide()[0].shape) > 2:
        raise ValueError(
            f"q is {type(q).__name__} with parameters {list(shape)}; expected [B, D]: flatten them, such as "
            "loc.flatten(1), and restore the shape in the decoder, z.unflatten(1, (C, H, W)). Shaped latents "
            "may be normal, (mu, logvar), or a torch.distributions object"
        )
    if not q.has_rows:
        raise TypeError(
            f"q is {type(q).__name__}, which has no rows (batch and device), so it is not a posterior: pass "
            "the distribution that the encoder returns, with parameters [B, D], a row for each example"
        )
    return q


def _halves(q: Tensor) -> tuple[Tensor, ...]:
    check_tensor("q", q)
    if q.dim() < 2 or q.shape[1] % 2:
        raise ValueError(
            f"q has shape {shape_of(q)}; a tensor must be [B, 2 D], mu and logvar side by side, so that its "
            "width is even, or [B, 2 C, ...], channels that are mu and then logvar, on axis 1"
        )
    return q.chunk(2, dim=1)


def _named(q: Any, name: str) -> Any:
    return q.get(name) if isinstance(q, Mapping) else getattr(q, name, None)


def _first_named(q: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _named(q, name)) is not None), None)


def _describe(q: Any) -> str:
    kind = type(q).__name__
    if isinstance(q, Mapping):
        return f"a {kind} of {', '.join(map(str, q)) or 'nothing'}"
    if isinstance(q, td.Independent):
        return f"Independent({type(q.base_dist).__name__}, {q.reinterpreted_batch_ndims})"
    if hasattr(q, "_fields"):
        return f"a {kind} of {', '.join(q._fields)}"
    if isinstance(q, nn.Module):
        return f"the module {kind} itself: pass what it returns, such as encoder(x)"
    return f"a {kind} of length {len(q)}" if isinstance(q, (tuple, list)) else kind


_NAMES = {"standard_normal": StandardNormal}


def is_conditional(prior: Any) -> bool:
    """Return True if the prior is a function of the context."""
    return callable(prior) and not isinstance(prior, (Distribution, td.Distribution))


def as_prior(prior: Any, context: Any = None) -> Distribution:
    """Convert the accepted forms of a prior to a distribution.

    Accepted are None or "standard_normal", a pair (mu, logvar), a fastvae distribution, a
    torch.distributions object, or a function of the context that returns one of these or an encoder's output.
    """
    if is_conditional(prior):
        if context is None:
            raise ValueError(
                "prior is a function of the context, p(z|context), but no context was given; pass context=, "
                "a tensor or a dict of tensors with the batch axis"
            )
        note = "fastvae called prior, a function of the context, with the context"
        made = explained(prior, (context,), lambda: f"{note} {described(context)}")
        if isinstance(made, (Distribution, td.Distribution)):
            return as_prior(made)
        try:
            return as_posterior(made)
        except TypeError:
            raise TypeError(
                "prior, a function of the context, must return a distribution, a pair (mu, logvar) or a "
                f"tensor [B, 2 D]; got {_describe(made)}"
            ) from None
    if prior is None:
        return STANDARD
    if isinstance(prior, Distribution):
        return prior
    if type(prior) in (tuple, list) and len(prior) == 2:
        for name, part in zip(("mu", "logvar"), prior, strict=True):
            check_tensor(f"the prior's {name}", part)
        return DiagonalNormal(*prior)
    if isinstance(prior, str):
        if prior not in _NAMES:
            raise ValueError(
                f"prior={prior!r} is unknown; known: {', '.join(map(repr, _NAMES))}, or a distribution"
                f"{did_you_mean(prior, _NAMES)}"
            )
        return _NAMES[prior]()
    if isinstance(prior, td.Distribution):
        # flat_prior handles events with more axes: spatial latents, or an error.
        if len(prior.event_shape) <= 1 and type(normal := univariate(prior)) is td.Normal:
            if normal.scale.dtype.itemsize == 2:
                return DiagonalNormal(normal.loc, normal.scale, scale_form="scale")
            return DiagonalNormal(normal.loc, 2 * normal.scale.log())
        return _of_torch(prior)
    raise TypeError(
        f"prior must be None for N(0, I), a name ({', '.join(map(repr, _NAMES))}), a pair (mu, logvar), a "
        "fastvae.distributions.Distribution such as fastvae.distributions.Laplace(loc, log_scale), a "
        f"torch.distributions object, or a function of the context; got {type(prior).__name__}"
    )
