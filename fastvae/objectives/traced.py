"""The usual call of an objective in a compiled graph for a GPU, in few steps.

The compiler guards each name, default and attribute that its trace reads, and checks them in every call. For
a small model the guards of the general path take as long as all launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, is_tensor, ops, randint, strided

from ..distributions.draws import STANDARD
from ..distributions.normal import diagonal
from ..inputs.batch import Inputs
from ..likelihoods.declared import DECLARED, SHARED
from ..ops.reduce import BoundReduction
from .reduce import reduce_parameters

# Fused ops, and the number of their parameters, of likelihoods that take all of them from the decoder.
_REDUCED: dict[str, tuple[int, Callable[..., Any]]] = {
    name: (len(kind.outputs), getattr(ops.fastvae, f"reduce_{name}").default)
    for name, kind in DECLARED.items()
    if not kind.constants and kind.differentiable
}
_DRAWN_KL, _DRAWN_RATIO = ops.fastvae.rsample_kl.default, ops.fastvae.rsample_log_ratio.default
_INF = float("inf")


def traced_elbo(
    *given: Any,
    likelihood: Any = "gaussian",
    prior: Any = None,
    k: Any = 1,
    reduction: Any = "mean",
    **others: Any,
) -> Tensor | None:
    """Return :func:`fastvae.elbo` of a usual call, with few options, or None."""
    if others or len(given) != 3:
        return None
    return _traced_bound(*given, likelihood, prior, k, reduction, None)


def traced_iwae(
    *given: Any,
    likelihood: Any = "gaussian",
    prior: Any = None,
    k: Any = 50,
    estimator: Any = "iwae",
    reduction: Any = "mean",
    **others: Any,
) -> Tensor | None:
    """Return :func:`fastvae.iwae` of a usual call, with few options, or None."""
    if others or len(given) != 3 or estimator not in ("iwae", "stl"):
        return None
    return _traced_bound(*given, likelihood, prior, k, reduction, estimator)


def _traced_bound(
    x: Any, q: Any, decoder: Any, likelihood: Any, prior: Any, k: Any, reduction: Any, estimator: Any
) -> Tensor | None:
    """Return the bound of a usual call, or None.

    Usual are floating x [B, X] on a GPU, q = (mu, logvar), each [B, D], or a tensor [B, 2 D], a likelihood by
    name that has no parameters of its own, and the prior N(0, I). A decoder may return anything. Without an
    estimator the bound is the ELBO with the analytic KL.
    """
    if not isinstance(likelihood, str) or likelihood not in _REDUCED or prior is not None:
        return None
    if not isinstance(k, int) or k is True:
        return None
    if not (is_tensor(x) and x.is_cuda and x.layout is strided and x.is_floating_point()):
        return None
    if x.dim() != 2 or k <= 0:
        return None
    if is_tensor(q):
        if q.dim() != 2 or q.shape[1] % 2 or q.shape[1] == 0:
            return None
        q = q.chunk(2, 1)
    elif not isinstance(q, tuple) or len(q) != 2:
        return None
    mu, logvar = q
    for t in (mu, logvar):
        if not (is_tensor(t) and t.is_floating_point() and t.dim() == 2 and t.device == x.device):
            return None
    if mu.shape != logvar.shape or mu.dtype != logvar.dtype or mu.shape[0] != x.shape[0]:
        return None
    if reduction not in ("mean", "sum", "none") or not (x.numel() and callable(decoder)):
        return None
    seed = randint(-(2**63), 2**63 - 1, (), device=x.device)
    drawn = mu, logvar, None, None, seed, k, 0, 0, -_INF, _INF, True, "logvar", 0.0
    if estimator is None:
        z, term, _ = _DRAWN_KL(*drawn, False, False)
        coefficient, over = -1.0, "mean"
    else:
        z, term, _, _ = _DRAWN_RATIO(*drawn, estimator, 0.0, 1, False, False)
        coefficient, over = 1.0, "log_mean_exp"
    output = decoder(z)
    number, reduced = _REDUCED[likelihood]
    parameters = output if type(output) is tuple else (output,)
    fits, shape = len(parameters) == number, (k * x.shape[0], x.shape[1])
    for p in parameters:
        fits = fits and (is_tensor(p) and p.is_floating_point() and p.shape == shape and p.device == x.device)
    if fits:
        bound: Tensor = reduced(
            x, None, *parameters, term, None, coefficient, over, reduction, 0.0, 1, 0.0, False
        )[0]
        return bound
    inputs = Inputs(x, diagonal(mu, logvar), decoder, SHARED[likelihood], STANDARD)
    read = inputs.read_output(z, output, k)
    how = BoundReduction(coefficient, over, reduction)
    return reduce_parameters(inputs, z, read, term, k, None, how, False)[0]
