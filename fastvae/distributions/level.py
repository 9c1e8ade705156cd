"""Level of a hierarchy: its networks, and the pair of normals p and q that they define."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.checks import FLOATING, check_choice, check_count, check_tensor, is_dense, shape_of
from ..core.formula import Formula
from ..core.special import expm1_minus
from ..ops.normal_diagonal import native_kl, native_kl_backward
from .base import Distribution, is_family
from .normal import DiagonalNormal, StandardNormal, diagonal
from .read import as_posterior

_MERGES = ("residual", "precision")
_LOG_2_PI = math.log(2 * math.pi)


class Level(nn.Module):
    r"""Level of a :class:`Hierarchy`.

    It consists of the networks for :math:`p(z_l | z_{<l})` and :math:`q(z_l | x, z_{<l})`.

    Its modules see one batch axis, the N = K·B rows of all samples, and z in the shape ``dim``. The levels
    above reach them as the *state*: these levels concatenated along axis 1, or the output of ``top_down``.
    The first level has no state. Each module returns a normal in a form accepted from an encoder: a pair of
    mean and log variance, each [N, \*dim]; one tensor with both concatenated along axis 1; or a normal
    distribution.

    Args:
        dim: the latents of this level: a number, or a shape such as (channels, height, width).
        posterior: a module (features, state) -> normal; for the first level (features) -> normal.
        prior: a module (state) -> normal; or None, the default, for N(0, I); or a
            :class:`DiagonalNormal` whose parameters broadcast to [D], fixed or learned. The first
            level has no state, so its prior is one of the last two.
        merge: the combination of the posterior's output and the prior's (m, log s²) to q. None: the output is
            q's mean and log variance. ``"residual"``: the output (Δμ, Δlogvar) is relative to the prior,
            :math:`q = N(m + Δμ, s^2 e^{Δ\mathrm{logvar}})`, as in NVAE. ``"precision"``: the output is a
            normal that depends on x alone, and q is its product with the prior, as in the ladder VAE,
            :math:`σ^{-2} = \hat σ^{-2} + s^{-2},\ μ = σ^2 (\hat μ \hat σ^{-2} + m s^{-2})`; the posterior
            is then called with the features alone, once for all samples.
        top_down: a module (z of the level above, state of the level above) -> state of this level; for the
            second level, whose predecessor has no state, (z) -> state. It is a deterministic path, such as
            NVAE's; for a Markov chain use ``lambda z, state=None: z``.

    A callable that is not a module must have no parameters: an optimiser would not find them.

    Raises:
        TypeError, ValueError: for invalid arguments.

    References:
        Vahdat & Kautz, NVAE, 2020, eq. 2; Sønderby, Raiko, Maaløe, Sønderby & Winther, Ladder Variational
        Autoencoders, 2016, eq. 17 to 19.

    Example:
        >>> import torch, fastvae
        >>> fastvae.distributions.Level(5, torch.nn.Linear(8, 10))
        Level(
          dim=5
          (posterior): Linear(in_features=8, out_features=10, bias=True)
        )
    """

    # Modules or functions.
    posterior: Any
    prior: Any
    top_down: Any

    def __init__(
        self,
        dim: int | Sequence[int],
        posterior: Callable[..., Any],
        *,
        prior: Callable[..., Any] | Distribution | None = None,
        merge: str | None = None,
        top_down: Callable[..., Any] | None = None,
    ):
        super().__init__()
        event = tuple(dim) if isinstance(dim, (tuple, list, torch.Size)) else (dim,)
        meaning = "the latents of a level, or each axis of their shape"
        event = tuple([check_count("dim", n, meaning) for n in event or (0,)])
        self.event: tuple[int, ...] = event
        self.dim = math.prod(event)
        for name, function in (("posterior", posterior), ("prior", prior), ("top_down", top_down)):
            fixed = name == "prior" and isinstance(function, Distribution)
            if not (callable(function) or fixed or function is None and name != "posterior"):
                raise TypeError(f"{name} must be a module or another callable; got {type(function).__name__}")
            setattr(self, name, function)
        if merge is not None:
            check_choice("merge", merge, _MERGES)
        self.merge = merge
        if isinstance(prior, Distribution):
            self._check_fixed(prior)

    def extra_repr(self) -> str:
        dim = self.event if len(self.event) > 1 else self.dim
        return f"dim={dim}" + (f", merge={self.merge!r}" if self.merge else "")

    def _check_fixed(self, prior: Distribution) -> None:
        """Validate a prior that is the same for all rows."""
        if is_family(prior, StandardNormal):
            return
        if not is_family(prior, DiagonalNormal):
            raise TypeError(
                f"prior is a {type(prior).__name__}; the levels of a hierarchy are normal: N(0, I), a "
                "fastvae.distributions.DiagonalNormal, or a module that returns mean and log variance"
            )
        for name, value in (("mu", prior.mu), ("logvar", prior.logvar)):
            if value.shape not in ((), (1,), (self.dim,)):
                raise ValueError(
                    f"prior.{name} has shape {shape_of(value)}; expected [D] = [{self.dim}] or [], for every "
                    "row alike"
                )

    @property
    def fixed_prior(self) -> DiagonalNormal | None:
        """Fixed or learned prior without a module; None for N(0, I)."""
        return self.prior if isinstance(self.prior, DiagonalNormal) else None

    @property
    def has_conditional_prior(self) -> bool:
        return self.prior is not None and not isinstance(self.prior, Distribution)

    def read(self, value: Any, rows: int, network: tuple[str, int]) -> DiagonalNormal:
        """Validate a module's output, each part [rows, D], and return it as a normal."""
        # The usual output, without the words of errors.
        if (
            (type(value) is Tensor and len(self.event) == 1 and value.shape == (rows, 2 * self.dim))
            and value.dtype in FLOATING
            and is_dense(value)
        ):
            mu, logvar = value.chunk(2, 1)
            return diagonal(mu, logvar)
        name, index = network
        who = f"the {name} of level {index + 1}"
        whole = (rows, 2 * self.event[0], *self.event[1:])

        def expected() -> str:  # not formatted without an error: that would fix a compiler's symbolic size
            return f"mean and log variance, each [N, *dim] = {[rows, *self.event]}"

        form = None
        if isinstance(value, Tensor):
            check_tensor(f"what {who} returned", value)
            if value.shape != whole:
                raise ValueError(
                    f"{who} returned a tensor {shape_of(value)}; expected one tensor {list(whole)}, or "
                    f"{expected()}"
                )
            mu, logvar = value.chunk(2, 1)
        elif type(value) in (tuple, list) and len(value) == 2:
            mu, logvar = value
        else:
            try:
                q = as_posterior(value)
            except TypeError:
                q = None
            if q is None or not is_family(q, DiagonalNormal):
                raise TypeError(
                    f"{who} returned {type(value).__name__}; expected a normal: {expected()}, or one tensor "
                    f"{list(whole)}"
                )
            mu, logvar, form = q.mu, q.logvar, q.form
        for name, part in (("mean", mu), ("log variance", logvar)):
            check_tensor(f"the {name} that {who} returned", part)
            if part.shape not in ((rows, *self.event), (rows, self.dim)):
                raise ValueError(f"{who} returned a {name} {shape_of(part)}; expected {expected()}")
        return diagonal(mu.flatten(1), logvar.flatten(1), form)


class Step(NamedTuple):
    """Distributions p = N(mean, exp(logvar)) and q = N(mean + shift, exp(logvar + stretch)) of a level.

    Each field broadcasts to [K, B, D]. Comparisons of q and p use the differences, so that nothing cancels.
    """

    mean: Tensor
    logvar: Tensor
    shift: Tensor
    stretch: Tensor

    def draw(self, eps: Tensor) -> Tensor:
        return self.mean + self.shift + torch.exp(0.5 * (self.logvar + self.stretch)) * eps

    # Each returns a tensor broadcastable to [K, B, D].

    def log_q_of(self, z: Tensor) -> Tensor:
        white = (z - self.mean - self.shift) * torch.exp(-0.5 * (self.logvar + self.stretch))
        return self.log_q(white)

    def log_q(self, eps: Tensor) -> Tensor:
        return -0.5 * (eps.square() + self.logvar + self.stretch + _LOG_2_PI)

    def log_ratio(self, eps: Tensor) -> Tensor:
        """Return log p − log q as a function of the noise."""
        # (z - m) / s.
        white = self.shift * torch.exp(-0.5 * self.logvar) + torch.exp(0.5 * self.stretch) * eps
        return 0.5 * ((eps - white) * (eps + white) + self.stretch)

    def kl(self, eps: Tensor) -> Tensor:
        """Return the KL in closed form, independent of the noise."""
        white = self.shift * torch.exp(-0.5 * self.logvar)
        return 0.5 * (white.square() + expm1_minus(self.stretch))


def precision_weighted(mu: Tensor, logvar: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a product of normals relative to the prior: the share of the features, and of the prior."""
    # The features' share of q's precision, and the log of the prior's share.
    share = torch.sigmoid(scale - logvar)
    return share * (mu - mean), functional.logsigmoid(logvar - scale)


# A draw of a level with its KL, for rows [N, D] of one dtype: each tensor's own row, or None for p = N(0, I).


def _drawn(step: Step, eps: Tensor, summed: bool) -> tuple[Tensor, Tensor]:
    kl = step.kl(eps)
    return step.draw(eps), kl.sum(-1) if summed else kl


def _composed_direct(
    mu: Tensor, logvar: Tensor, mean: Tensor | None, scale: Tensor | None, eps: Tensor, summed: bool
) -> tuple[Tensor, Tensor]:
    zero = mu.new_zeros(())
    mean, scale = zero if mean is None else mean, zero if scale is None else scale
    return _drawn(Step(mean, scale, mu - mean, logvar - scale), eps, summed)


def _value_direct(
    mu: Tensor, logvar: Tensor, mean: Tensor | None, scale: Tensor | None, eps: Tensor, summed: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
    # The derivative of z by logvar.
    slope = torch.exp(0.5 * logvar).mul_(eps).mul_(0.5)
    z = torch.add(mu, slope, alpha=2)
    return (z, native_kl(mu, logvar, mean, scale, per_dimension=not summed)), (slope,)


def _gradient_direct(
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    mu: Tensor,
    logvar: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    eps: Tensor,
    summed: bool,
) -> Sequence[Tensor | None]:
    grad_z, grad_kl = grads
    return *native_kl_backward(grad_z, grad_kl, kept[0], mu, logvar, mean, scale), None


def _composed_relative(
    shift: Tensor, stretch: Tensor, mean: Tensor | None, scale: Tensor | None, eps: Tensor, summed: bool
) -> tuple[Tensor, Tensor]:
    zero = shift.new_zeros(())
    mean, scale = zero if mean is None else mean, zero if scale is None else scale
    return _drawn(Step(mean, scale, shift, stretch), eps, summed)


def _value_relative(
    shift: Tensor, stretch: Tensor, mean: Tensor | None, scale: Tensor | None, eps: Tensor, summed: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    if mean is None or scale is None:
        return _value_direct(shift, stretch, None, None, eps, summed)
    slope = torch.exp(0.5 * (scale + stretch)).mul_(eps).mul_(0.5)
    z = (mean + shift).add_(slope, alpha=2)
    kl = native_kl(shift * torch.exp(-0.5 * scale), stretch, per_dimension=not summed)
    return (z, kl), (slope,)


def _gradient_relative(
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    shift: Tensor,
    stretch: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    eps: Tensor,
    summed: bool,
) -> Sequence[Tensor | None]:
    if mean is None or scale is None:
        return _gradient_direct(grads, kept, shift, stretch, None, None, eps, summed)
    grad_z, grad_kl = grads
    of_shift = of_stretch = of_scale = None
    if grad_kl is not None:
        each = grad_kl[:, None] if summed else grad_kl
        of_shift = (each * shift).mul_(torch.exp(-scale))
        of_stretch = torch.expm1(stretch).mul_(each).mul_(0.5)
        of_scale = of_shift * shift * -0.5
    if grad_z is None:
        return of_shift, of_stretch, None, of_scale, None
    of_spread = kept[0] * grad_z
    if of_shift is None or of_stretch is None or of_scale is None:
        return grad_z, of_spread, grad_z, of_spread, None
    return of_shift.add_(grad_z), of_stretch.add_(of_spread), grad_z, of_scale.add_(of_spread), None


draw_direct = Formula(_composed_direct, _value_direct, _gradient_direct, 5)
draw_relative = Formula(_composed_relative, _value_relative, _gradient_relative, 5)
